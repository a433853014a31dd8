"""What a dataset's build takes from here: documents to write, their labels and scores, the manifest's part."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from moelab.data.document import Document
from moelab.data.quality import chain, spec, table, truth, workers
from moelab.data.quality.pool import Pool, Progress

VERSION = 1  # raised when the same words make other text or other verdicts


def identity(section) -> dict[str, Any]:
    """Returns what `data.inject` and `data.filter` add to the identity of a dataset; nothing where both are empty.

    Raises:
      DataError: a text names no injector or filter, or a field is not as wanted.
    """
    texts = getattr(section, "inject", ()), getattr(section, "filter", ())
    if not any(texts):
        return {}
    injectors, filters = spec.parse_injectors(texts[0]), spec.parse_filters(texts[1])
    return {
        "quality": {
            "version": VERSION,
            "inject": [{"kind": one.kind} | dataclasses.asdict(one) for one in injectors],
            "filter": [{"kind": one.kind} | one.identity() for one in filters],
            "packages": packages(filters),
        }
    }


def packages(filters) -> dict[str, str]:
    """Returns the versions of the distributions that decide what filters say; "" where one is not installed."""
    names = sorted({name for one in filters for name in one.packages})
    return {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """The training split with its dirt and without what the filters removed.

    Attributes:
      pool: after the filters.
      table: labels, scores and verdicts of every training document.
      inject, filter: the texts, defaults left out.
      outcomes: of each filter (truth.outcome).
      packages: versions that decided the verdicts.
    """

    pool: Pool
    table: table.Table
    inject: tuple[str, ...]
    filter: tuple[str, ...]
    outcomes: list[dict[str, Any]]
    packages: dict[str, str]

    def documents(self) -> Iterator[tuple[Document, str]]:
        """Yields every document to write, and its split."""
        return self.pool.everything(self.table.kept_N)

    def finish(self, directory: pathlib.Path, domains: tuple[str, ...]) -> dict[str, Any]:
        """Writes labels and scores into a dataset's folder and returns what its manifest says of them."""
        found = self.table.ordered(domains)
        table.write(directory, found)
        return {
            "quality": {
                "inject": list(self.inject),
                "filter": list(self.filter),
                "packages": self.packages,
                "labels": truth.labels(found, np.ones(len(found), bool)),
                "kept_labels": truth.labels(found, found.kept_N),
                "outcomes": self.outcomes,
            }
        }


def prepare(source, section, made, progress: Progress | None = None) -> Prepared | None:
    """Injects and filters as a data section says; None where it says nothing.

    Args:
      source: as sources.open_source made it.
      section: a dataclass of schema.KINDS["data"].
      made: the dataset's tokenizer.
      progress: called with (what is done, documents so far, documents in all or 0).

    Raises:
      DataError: a text is wrong, a filter cannot work here, or nothing is left of a domain.
    """
    texts = getattr(section, "inject", ()), getattr(section, "filter", ())
    if not any(texts):
        return None
    injectors, filters = spec.parse_injectors(texts[0]), spec.parse_filters(texts[1])
    try:
        pool = Pool(source, injectors, made, progress)
        found, outcomes = chain.run(pool, filters)
    finally:
        workers.stop()
    return Prepared(
        pool,
        found,
        tuple(map(spec.written, injectors)),
        tuple(map(spec.written, filters)),
        outcomes,
        packages(filters),
    )
