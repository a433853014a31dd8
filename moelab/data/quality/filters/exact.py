"""Documents that are the same as an earlier one, but for case and white space."""

from __future__ import annotations

import dataclasses
import functools
import hashlib

import numpy as np

from moelab.data.document import Document
from moelab.data.quality.contract import BaseFilter, Verdicts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter(BaseFilter):
    """Removes all but the first of equal documents, in whatever domain. Score: 1 for the first, 0 for the others."""

    normalise: bool = True  # case and white space do not count

    def judge(self, pool) -> Verdicts:
        """Compares the documents by their sha256."""
        seen, score = set(), []
        for part in pool.map(functools.partial(_digests, self), self.kind):
            for digest in part:
                if digest is None:
                    score.append(np.nan)
                else:
                    score.append(float(digest not in seen))
                    seen.add(digest)
        score_N = np.array(score, np.float32)
        kept_N = ~(score_N == 0)
        return Verdicts(score_N, kept_N, np.where(kept_N, "", "duplicate").astype(object))


def _digests(tool: Filter, documents: list[Document]) -> list[bytes | None]:
    return [
        hashlib.sha256(
            (" ".join(one.text.lower().split()) if tool.normalise else one.text).encode()
        ).digest()
        if tool.applies(one.domain)
        else None
        for one in documents
    ]
