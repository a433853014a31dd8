"""Documents that nearly repeat an earlier one: MinHash signatures by `rensa`, compared where a band of them agrees.

With b bands of r rows, a pair of Jaccard similarity s becomes a candidate with probability 1 - (1 - s^r)^b; of the
candidates, those go whose signatures agree in at least `threshold` of their places.

Reference: Broder, 1997; the settings (runs of 5 words, 14 bands of 8) are FineWeb's, arXiv:2406.17557.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib

import numpy as np

from moelab.data.document import DataError, Document
from moelab.data.quality import shingles
from moelab.data.quality.contract import BaseFilter, Verdicts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter(BaseFilter):
    """Removes documents like an earlier one, in whatever domain. Score: 1 - the similarity to the likest earlier one.

    Who comes first stays, in the order of the data: originals before what was injected.
    """

    threshold: float = 0.7  # Jaccard similarity of the sets of runs from which a document goes
    ngram: int = 5  # words of a run
    bands: int = 14  # of the signature
    rows: int = 8  # of a band
    seed: int = 1  # of the permutations

    shares = ("threshold",)
    counts = ("ngram", "bands", "rows")
    packages = ("rensa",)

    def judge(self, pool) -> Verdicts:
        """Computes the signatures in several processes, and compares them here."""
        try:
            importlib.import_module("rensa")
        except ImportError as error:
            raise DataError(
                f"data.filter: {self.kind} needs rensa: pip install 'moelab[data]'"
            ) from error
        score, index = [], {}
        signatures: list[np.ndarray] = []
        for part in pool.map(functools.partial(_signatures, self), self.kind):
            for signature in part:
                if signature is None:
                    score.append(np.nan)
                    continue
                likeness = _likest(signature, index, signatures, self.bands)
                score.append(1 - likeness)
                if likeness < self.threshold:
                    _remember(signature, index, signatures, self.bands)
        score_N = np.array(score, np.float32)
        kept_N = ~(score_N <= np.float32(1 - self.threshold))
        return Verdicts(score_N, kept_N, np.where(kept_N, "", "near_duplicate").astype(object))


def _signatures(tool: Filter, documents: list[Document]) -> list[np.ndarray | None]:
    """Returns a uint32 signature for each document with words that is judged; runs in a worker."""
    import rensa

    runs = [
        np.unique(shingles.hashes(one.text, tool.ngram))
        if tool.applies(one.domain)
        else np.zeros(0, np.uint64)
        for one in documents
    ]
    stops = np.cumsum([0, *map(len, runs)]).astype(np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(runs), stops, tool.bands * tool.rows, tool.seed
    )
    rows = np.array(matrix.to_rows(), np.uint32)
    return [row if len(found) else None for row, found in zip(rows, runs, strict=True)]


def _keys(signature: np.ndarray, bands: int) -> list[tuple[int, bytes]]:
    return [(number, band.tobytes()) for number, band in enumerate(np.split(signature, bands))]


def _likest(signature: np.ndarray, index: dict, signatures: list, bands: int) -> float:
    """Returns the largest share of equal places with an earlier signature that shares a band."""
    near = {number for key in _keys(signature, bands) for number in index.get(key, ())}
    return max((float((signatures[number] == signature).mean()) for number in near), default=0.0)


def _remember(signature: np.ndarray, index: dict, signatures: list, bands: int) -> None:
    for key in _keys(signature, bands):
        index.setdefault(key, []).append(len(signatures))
    signatures.append(signature)
