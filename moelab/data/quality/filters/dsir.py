"""Importance weights of hashed n-grams: how much likelier a document is in clean text than in the pool.

    score = mean over the document's n-grams of ln p(n-gram | clean) - ln p(n-gram | pool)

with both from counts in `buckets`, a tenth of each spread evenly: what neither has seen then weighs nothing, though
there is less clean text. (With one added to each count, as the paper does, a random string would look clean.) The paper
sums over the document, so that length counts, and draws documents in proportion to their weight; here the mean ranks.

Reference: DSIR, arXiv:2302.03169, section 4.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from moelab.data.document import Document
from moelab.data.quality import ranking, shingles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter(ranking.RankingFilter):
    """Keeps the documents whose n-grams are clean text's."""

    characters: int = (
        2_000_000  # of each domain's clean text, and of each half of its pool, to learn from
    )
    buckets: int = 10_000  # that n-grams are hashed into
    max_ngram: int = 2  # longest run of words

    counts = ("characters", "buckets", "max_ngram")

    def scores(self, pool) -> np.ndarray:
        """Counts the n-grams of each domain, then lets each half be judged by the other's counts."""
        clean = ranking.clean_texts(pool, self, self.characters, self.seed)
        judged = (one for one in pool.documents() if self.applies(one.domain))
        rest = ranking.sample(judged, self.characters, self.seed, folds=True)
        weights = {
            (domain, 1 - half): _log_share(self, clean[domain]) - _log_share(self, texts)
            for (domain, half), texts in rest.items()
        }
        parts = pool.map(functools.partial(_scores, self, weights), self.kind)
        return np.concatenate(list(parts))


def buckets(tool: Filter, text: str) -> np.ndarray:
    """Returns the bucket of each n-gram of a text, n from 1 to max_ngram."""
    runs = [shingles.hashes(text, n) for n in range(1, tool.max_ngram + 1)]
    return (np.concatenate(runs) % np.uint64(tool.buckets)).astype(np.int64)


def _log_share(tool: Filter, texts: list[str]) -> np.ndarray:
    count = np.zeros(tool.buckets)
    for text in texts:
        count += np.bincount(buckets(tool, text), minlength=tool.buckets)
    return np.log(0.9 * count / max(count.sum(), 1) + 0.1 / tool.buckets)


def _scores(tool: Filter, weights: dict, documents: list[Document]) -> np.ndarray:
    """Scores a chunk; runs in a worker."""
    score_N = np.full(len(documents), np.nan, np.float32)
    for number, one in enumerate(documents):
        if tool.applies(one.domain):
            key = (one.domain, ranking.fold(tool.seed, one))
            weight = weights.get(key)
            weight = weights[key[0], 1 - key[1]] if weight is None else weight
            found = buckets(tool, one.text)
            score_N[number] = weight[found].mean() if len(found) else 0.0
    return score_N
