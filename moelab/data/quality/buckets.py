"""Divides the training documents of a dataset into quality buckets: by their label, or by a filter's score."""

from __future__ import annotations

import numpy as np

from moelab.data.document import DataError
from moelab.spelling import hint

LABEL = "label"
UNJUDGED = "unjudged"


def divide(dataset, by: str, num_buckets: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Gives each document of the training split a bucket.

    Args:
      dataset: with labels and scores (data.inject or data.filter).
      by: "label": clean and each kind of dirt; or the kind of a filter: parts of its scores, within each domain, that
        hold equally many tokens; q1 is the worst.
      num_buckets: of a filter's scores.

    Returns:
      The buckets' names, and int32 bucket of each document of the split. Documents that the filter did not judge are in
      "unjudged".

    Raises:
      DataError: the dataset has no such label or filter.
    """
    table, split = dataset.quality, dataset.split("train")
    known = [LABEL, *(text.partition(" ")[0] for text in table.filters)] if table else []
    if by not in known:
        there = f"there are {', '.join(known)}" if known else "it has neither labels nor scores"
        raise DataError(
            f"mixture.bucket_by: the data has no {by!r}{hint(by, known) or f'; {there}'} "
            "(data.inject makes labels, data.filter scores)"
        )
    if by == LABEL:
        return table.kinds, table.kind_N[table.kept_N]
    score_N = table.score_FN[known.index(by) - 1][table.kept_N]
    names = (UNJUDGED, *(f"q{i + 1}" for i in range(num_buckets)))
    return names, _quantiles(score_N, split.num_tokens_N, split.domain_N, num_buckets)


def _quantiles(
    score_N: np.ndarray, size_N: np.ndarray, domain_N: np.ndarray, count: int
) -> np.ndarray:
    """Returns 1 .. count, the part of the domain's tokens in the order of the score; 0 without a score."""
    bucket_N = np.zeros(len(score_N), np.int32)
    for domain in np.unique(domain_N):
        here = np.flatnonzero((domain_N == domain) & ~np.isnan(score_N))
        order = here[np.argsort(score_N[here], kind="stable")]
        middle = np.cumsum(size_N[order]) - size_N[order] / 2
        bucket_N[order] = 1 + np.floor(middle / max(size_N[order].sum(), 1) * count).astype(int)
    return bucket_N
