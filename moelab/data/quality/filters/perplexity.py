"""Perplexity under a model that was trained before: a finished run of the toolkit, best on clean text.

    score = -bits per byte of the document's beginning

Reference: CCNet, arXiv:1911.00359; with small reference models, "Perplexed by Perplexity", arXiv:2405.20541.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from moelab.data.document import DataError
from moelab.data.quality import ranking


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter(ranking.RankingFilter):
    """Keeps the documents that surprise the model of a run least."""

    run: str = ""  # directory of the finished run
    tokens: int = 256  # of a document's beginning that are scored; 0: all

    def problems(self) -> Iterator[str]:
        """Yields what is wrong with `run`."""
        if not self.run:
            yield "run must name the directory of a finished run; it is empty"

    def identity(self) -> dict[str, Any]:
        """Returns the fields, with the run's checkpoint in the place of its path."""
        from moelab.report import card

        try:
            found = card.read(self.run)
        except (card.CardError, OSError) as error:
            raise DataError(
                f"data.filter: perplexity wants a finished run, and run={self.run} is none: {error}"
            ) from error
        return dataclasses.asdict(self) | {"run": found["checkpoint"]["digest"]}

    def scores(self, pool) -> np.ndarray:
        """Runs the model here: jax has the cores already."""
        judged, score_N = [], []
        for number, one in enumerate(pool.documents()):
            score_N.append(np.nan)
            if self.applies(one.domain):
                judged.append(number)
        documents = (one for one in pool.documents() if self.applies(one.domain))
        # Not an import: nothing under data/ knows of models.
        model = importlib.import_module("moelab.perplexity")
        for done, bits in model.bits_per_byte(self.run, documents, tokens=self.tokens):
            score_N[judged[done]] = -bits
            if done % 500 == 0:
                pool.progress(self.kind, done, len(judged))
        return np.array(score_N, np.float32)
