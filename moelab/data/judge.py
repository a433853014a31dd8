"""Filters on a config's text without building with them: scores of every document, and text back out of a dataset."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import gzip
import io
import json
import pathlib
from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np

from moelab import atomic
from moelab.data import sources
from moelab.data.build import Progress, as_section, build, cache_directory
from moelab.data.dataset import Dataset
from moelab.data.document import DataError
from moelab.data.quality import chain, spec, workers
from moelab.data.quality.pool import Pool
from moelab.data.quality.table import Table


def score(
    data_section, tokenizer_section, *, cache=None, progress: Progress | None = None
) -> tuple[Table, list[dict[str, Any]]]:
    """Lets each filter of `data.filter` judge all training documents, with the dirt of `data.inject` in.

    Args:
      data_section, tokenizer_section, cache, progress: as of `build`. The clean dataset is built if it is not there:
        its tokenizer is used.

    Returns:
      The table of all training documents, a row of scores per filter; and precision, recall and what is kept, per
      filter (quality.truth.outcome).

    Raises:
      DataError: the data, or a setting of it, is not as wanted.
    """
    section = as_section("data", data_section)
    clean = dataclasses.replace(section, inject=(), filter=())
    made = build(clean, tokenizer_section, cache=cache, progress=progress).tokenizer
    source = sources.open_source(section, cache_directory(cache) / "data" / "files")
    try:
        pool = Pool(source, spec.parse_injectors(section.inject), made, progress)
        return chain.score(pool, spec.parse_filters(section.filter))
    finally:
        workers.stop()


def rows(table: Table) -> Iterator[dict[str, Any]]:
    """Yields a dict per training document: domain, id, label, strength, source, bytes, and a score per filter."""
    for number in range(len(table)):
        scores = table.score_FN[:, number].tolist()
        yield {
            "domain": table.domains[table.domain_N[number]],
            "id": table.ids[number],
            "label": table.kinds[table.kind_N[number]],
            "strength": round(float(table.strength_N[number]), 6),
            "source": table.sources[number],
            "bytes": int(table.num_bytes_N[number]),
        } | {
            name: None if np.isnan(value) else value
            for name, value in zip(table.filters, scores, strict=True)
        }


def write_scores(table: Table, path: str | pathlib.Path) -> None:
    """Writes the rows of a table to FILE.csv, FILE.jsonl or FILE.parquet, whole or not at all.

    Raises:
      DataError: the file cannot be written; an older one is left as it was.
    """
    found = list(rows(table))
    with _replacing(path) as temporary:
        if str(path).endswith(".parquet"):
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), temporary)
            return
        with temporary.open("w", encoding="utf-8", newline="") as file:
            if str(path).endswith(".csv"):
                writer = csv.DictWriter(file, found[0])
                writer.writeheader()
                writer.writerows(found)
            else:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found)


def write_text(dataset: Dataset, path: str | pathlib.Path) -> int:
    """Writes the training documents of a dataset as JSON lines: domain, id, text.

    Returns:
      How many.

    Raises:
      DataError: the file cannot be written; an older one is left as it was.
    """
    part = dataset.split("train")
    with _replacing(path) as temporary, _opened(temporary, pathlib.Path(path).name) as file:
        for number, name in enumerate(part.ids):
            text = dataset.tokenizer.decode(part.document(number).tolist())
            row = {"domain": part.domains[part.domain_N[number]], "id": name, "text": text}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return len(part)


@contextlib.contextmanager
def _replacing(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    try:
        with atomic.replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def _opened(path: pathlib.Path, name: str) -> Iterator[TextIO]:
    """Opens a file for text; with a name that ends in .gz it is compressed, and says that name."""
    if not name.endswith(".gz"):
        with path.open("w", encoding="utf-8") as file:
            yield file
        return
    with (
        path.open("wb") as raw,
        gzip.GzipFile(name, "wb", fileobj=raw) as packed,
        io.TextIOWrapper(packed, encoding="utf-8") as file,
    ):
        yield file
