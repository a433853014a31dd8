"""Tools that learn from clean text and rank: what they learn from, and how much of the ranking stays.

Clean text is the validation split, which no model is trained on; text of unknown quality is the pool itself. What is
learned from half of the pool judges the other half, so that no document is judged by what learned from it.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import re
from collections.abc import Iterable, Iterator

import numpy as np

from moelab.data.document import DataError, Document
from moelab.data.quality import chance
from moelab.data.quality.contract import BaseFilter, Verdicts


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankingFilter(BaseFilter):
    """Keeps the best `keep` of each domain's bytes; a subclass scores."""

    keep: float = (
        0.5  # of each domain's bytes, the best; 1: all, and their scores are kept with the data
    )
    seed: int = 0  # of the samples that are learned from

    shares = ("keep",)

    def scores(self, pool) -> np.ndarray:
        """Scores every document of pool.documents(): float32, NaN where the filter does not apply."""
        raise NotImplementedError

    def judge(self, pool) -> Verdicts:
        """Scores, then ranks within each domain."""
        score_N = self.scores(pool)
        domain_N, size_N = pool.outline()
        kept_N = best(score_N, size_N, domain_N, self.keep)
        return Verdicts(score_N, kept_N, np.where(kept_N, "", "ranked_low").astype(object))


def best(score_N: np.ndarray, size_N: np.ndarray, domain_N: np.ndarray, keep: float) -> np.ndarray:
    """Marks the documents with the highest scores that make up a share of each domain's bytes.

    A document stays while those above it hold less than the share; ties go by order. Those without a score stay.

    >>> best(np.array([3.0, 1, 2]), np.array([10, 10, 10]), np.array(["a"] * 3), 0.5).tolist()
    [True, False, True]
    """
    kept_N = np.isnan(score_N)
    for domain in dict.fromkeys(domain_N.tolist()):
        here = np.flatnonzero((domain_N == domain) & ~np.isnan(score_N))
        order = here[np.argsort(-score_N[here], kind="stable")]
        above = np.cumsum(size_N[order]) - size_N[order]
        kept_N[order[above < keep * size_N[here].sum()]] = True
    return kept_N


def fold(seed: int, document: Document) -> int:
    """Returns the half, 0 or 1, that a document is in."""
    return int(chance.uniform(seed, "fold", document) < 0.5)


def sample(
    documents: Iterable[Document], characters: int, seed: int, *, folds: bool
) -> dict[tuple[str, int], list[str]]:
    """Draws texts of each domain, and of each half of it, up to a number of characters.

    Args:
      documents: read once.
      characters: of each domain and half; the texts with the lowest draws.
      seed: of the draws.
      folds: False: all are of half 0.

    Returns:
      {(domain, half): texts in the order of their draw}.
    """
    heaps: dict[tuple[str, int], list] = collections.defaultdict(list)
    sizes: collections.Counter = collections.Counter()
    for document in documents:
        key = (document.domain, fold(seed, document) if folds else 0)
        draw = chance.uniform(seed, "sample", document)
        if sizes[key] >= characters and draw > -heaps[key][0][0]:
            continue
        heapq.heappush(heaps[key], (-draw, document.id, document.text))
        sizes[key] += len(document.text)
        while sizes[key] - len(heaps[key][0][2]) >= characters:
            sizes[key] -= len(heapq.heappop(heaps[key])[2])
    return {key: [text for _, _, text in sorted(heap, reverse=True)] for key, heap in heaps.items()}


def clean_texts(pool, tool: BaseFilter, characters: int, seed: int) -> dict[str, list[str]]:
    """Draws clean texts of each domain that a filter judges.

    Raises:
      DataError: a domain has no validation documents.
    """
    found = sample(
        (one for one in pool.validation() if tool.applies(one.domain)),
        characters,
        seed,
        folds=False,
    )
    wanted = {domain for domain in pool.outline()[0] if tool.applies(domain)}
    missing = sorted(wanted - {domain for domain, _ in found})
    if missing:
        raise DataError(
            f"data.filter: {tool.kind} learns from the validation split, which has no document of "
            f"{', '.join(missing)}; add documents, or set domains"
        )
    return {domain: texts for (domain, _), texts in found.items() if domain in wanted}


_BLANK = re.compile(r"\s")


def pieces(text: str, size: int) -> Iterator[str]:
    """Cuts a text at blanks into pieces of about `size` characters, so that a long one has many votes.

    >>> list(pieces("one two three four", 5))
    ['one two', 'three', 'four']
    """
    start = 0
    while start < len(text):
        found = _BLANK.search(text, start + size)
        stop = found.start() if found else len(text)
        if text[start:stop].strip():
            yield text[start:stop].strip()
        start = stop + 1
