"""Documents that consist mostly of passages which occurred before.

Reference: ExactSubstr of arXiv:2107.06499 (runs of 50 tokens, a suffix array), here by hashes of every run of words:
8 bytes of memory for each word. Whole documents go, passages are not cut out.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from moelab.data.document import Document
from moelab.data.quality import shingles
from moelab.data.quality.contract import BaseFilter, Verdicts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter(BaseFilter):
    """Removes documents of which more than `max_share` was there before. Score: the share of the words that is new."""

    length: int = 50  # words of the shortest passage that counts
    max_share: float = 0.5  # of the words, in passages that occurred before

    shares = ("max_share",)
    counts = ("length",)

    def judge(self, pool) -> Verdicts:
        """Marks the runs of words that occurred before, in an earlier document or in the same."""
        runs_N, judged = [], []
        for part in pool.map(functools.partial(_runs, self), self.kind):
            for runs in part:
                judged.append(runs is not None)
                runs_N.append(np.zeros(0, np.uint64) if runs is None else runs)
        count_N = np.array([len(runs) for runs in runs_N])
        repeated = repeats(np.concatenate(runs_N))
        parts = np.split(repeated, np.cumsum(count_N)[:-1])
        covered = [_covered(part, self.length) for part in parts]
        score_N = np.where(judged, 1 - np.array(covered), np.nan).astype(np.float32)
        kept_N = ~(score_N < 1 - np.float32(self.max_share))
        return Verdicts(score_N, kept_N, np.where(kept_N, "", "repeated_text").astype(object))


def _runs(tool: Filter, documents: list[Document]) -> list[np.ndarray | None]:
    return [
        shingles.hashes(one.text, tool.length) if tool.applies(one.domain) else None
        for one in documents
    ]


def repeats(run_R: np.ndarray) -> np.ndarray:
    """Marks the entries whose value occurred before.

    >>> repeats(np.array([7, 8, 7, 9, 8])).tolist()
    [False, False, True, False, True]
    """
    first = np.zeros(len(run_R), bool)
    first[np.unique(run_R, return_index=True)[1]] = True
    return ~first


def _covered(repeated_R: np.ndarray, length: int) -> float:
    """Returns the share of a document's words that lie in a marked run; run i covers words i to i + length - 1."""
    if not repeated_R.any():
        return 0.0
    words = len(repeated_R) + length - 1
    if len(repeated_R) == 1:
        return 1.0  # a text of up to `length` words is one run
    edge = np.zeros(words + 1, np.int64)
    np.add.at(edge, np.flatnonzero(repeated_R), 1)
    np.add.at(edge, np.flatnonzero(repeated_R) + length, -1)
    return float((np.cumsum(edge[:-1]) > 0).mean())
