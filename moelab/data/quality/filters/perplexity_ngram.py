"""Perplexity under a Kneser-Ney bigram of the dataset's tokens, one for each domain: order matters to it.

    score = -bits per byte of the document, its first token given the end of another
    against=unigram: mean over its tokens of log2 p(token | the one before) / p(token), bits: how much order helps

The plain score says most about how rare the words of a document are; the second one is what sees words in wrong places.

Reference: CCNet, arXiv:1911.00359, section 2.4, with a 5-gram over clean text; the bigram is moelab's yardstick.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from moelab.data import kneser_ney, tokenizer
from moelab.data.document import DataError, Document
from moelab.data.quality import ranking


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter(ranking.RankingFilter):
    """Keeps the documents that surprise least."""

    learn_from: str = "validation"  # clean text; or pool: the other half of it, and then what is repeated looks good
    against: str = "nothing"  # or unigram: what the order of the words is worth, rare words or not
    characters: int = 4_000_000  # of each domain (and half) to learn from

    counts = ("characters",)

    def problems(self) -> Iterator[str]:
        """Yields what is wrong with `learn_from` and `against`."""
        if self.learn_from not in ("pool", "validation"):
            yield f"learn_from must be pool or validation, got {self.learn_from!r}"
        if self.against not in ("nothing", "unigram"):
            yield f"against must be nothing or unigram, got {self.against!r}"

    def scores(self, pool) -> np.ndarray:
        """Fits the bigrams, then judges in several processes."""
        if pool.tokenizer is None or not pool.tokenizer.has_text:
            raise DataError(f"data.filter: {self.kind} needs a tokenizer that reads text")
        if self.learn_from == "validation":
            clean = ranking.clean_texts(pool, self, self.characters, self.seed)
            models = {(domain, 0): _fit(pool.tokenizer, texts) for domain, texts in clean.items()}
        else:
            judged = (one for one in pool.documents() if self.applies(one.domain))
            rest = ranking.sample(judged, self.characters, self.seed, folds=True)
            models = {
                (domain, 1 - half): _fit(pool.tokenizer, texts)
                for (domain, half), texts in rest.items()
            }
        made = (pool.tokenizer.kind, pool.tokenizer.text)
        parts = pool.map(functools.partial(_scores, self, made, models), self.kind)
        return np.concatenate(list(parts))


def _fit(made, texts: list[str]) -> kneser_ney.Bigram:
    parts = made.encode_batch(texts)
    context = np.concatenate([np.append(made.end_id, part[:-1]) for part in parts if len(part)])
    return kneser_ney.fit(context, np.concatenate([*parts]), made.vocab_size)


@functools.lru_cache(maxsize=2)
def _tokenizer(kind: str, text: str):
    return tokenizer.Bytes() if kind == "byte" else tokenizer.Bpe(text)


def _scores(tool: Filter, made, models: dict, documents: list[Document]) -> np.ndarray:
    """Scores a chunk; runs in a worker."""
    encoder = _tokenizer(*made)
    score_N = np.full(len(documents), np.nan, np.float32)
    judged = [number for number, one in enumerate(documents) if tool.applies(one.domain)]
    encoded = encoder.encode_batch([documents[number].text for number in judged])
    for number, token_T in zip(judged, encoded, strict=True):
        one = documents[number]
        half = ranking.fold(tool.seed, one) if tool.learn_from == "pool" else 0
        model = models.get((one.domain, half)) or models[one.domain, 1 - half]
        context_T = np.append(encoder.end_id, token_T[:-1])
        bits_T = -np.log2(model.probability(context_T, token_T))
        if tool.against == "unigram":
            score_N[number] = -(bits_T + np.log2(model.unigram_V[token_T])).mean()
        else:
            score_N[number] = -bits_T.sum() / max(1, len(one.text.encode()))
    return score_N
