"""What each test document cost under each precision: the rows from which every evaluation number follows.

`evaluation/documents.parquet` holds one row per (precision, document): nats and tokens over the document's targets and
the UTF-8 bytes of its text. Loss and bits per byte are ratios of sums over documents, so whole documents can be
resampled (statistics.py) and the card can be re-checked (verify.py).

D documents.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

NAME = "evaluation/documents.parquet"
SCHEMA = pa.schema(
    [
        ("precision", pa.string()),
        ("domain", pa.string()),
        ("document", pa.string()),
        ("nats", pa.float64()),
        ("bytes", pa.int64()),
        ("tokens", pa.int64()),
    ]
)
ALL = "all"


class DocumentsError(ValueError):
    """A document table that cannot be used; the message says why."""


@dataclasses.dataclass(frozen=True)
class Documents:
    """The same documents under every precision, in one order, so that differences are paired.

    Attributes:
      domain_D: str, the document's domain.
      document_D: str, its id, unique within its domain.
      bytes_D: int64 UTF-8 bytes of its text.
      tokens_D: int64 targets counted.
      nats: precision -> float64 (D,), negative log-likelihood summed over the document's targets.
    """

    domain_D: np.ndarray
    document_D: np.ndarray
    bytes_D: np.ndarray
    tokens_D: np.ndarray
    nats: dict[str, np.ndarray]

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains in the order of first appearance."""
        return tuple(dict.fromkeys(self.domain_D.tolist()))

    @property
    def sha256(self) -> str:
        """Of the evaluation set: domains, ids and sizes of the documents in any order."""
        rows = zip(
            self.domain_D.tolist(), self.document_D.tolist(), self.bytes_D.tolist(), strict=True
        )
        return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions in the order of first appearance."""
        return tuple(self.nats)

    def loss(self, precision: str) -> float:
        """Returns nats per token: sum of nats / sum of tokens over all documents."""
        return float(self.nats[precision].sum() / self.tokens_D.sum())

    def bits_per_byte(self, precision: str) -> dict[str, float]:
        """Returns sum of nats / ln 2 / sum of bytes per domain, and over all documents as "all"."""
        bits_D = self.nats[precision] / math.log(2.0)
        value = {}
        for domain in self.domains:
            chosen_D = self.domain_D == domain
            value[domain] = float(bits_D[chosen_D].sum() / self.bytes_D[chosen_D].sum())
        value[ALL] = float(bits_D.sum() / self.bytes_D.sum())
        return value


def read(path: Path | str) -> Documents:
    """Reads a document table and lines the precisions up.

    Raises:
      FileNotFoundError: there is no such file.
      DocumentsError: no Parquet file, other columns, or precisions that saw different documents.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        table = pa.parquet.read_table(path)
        table = table.select(SCHEMA.names).cast(SCHEMA)
    except (pa.ArrowException, KeyError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error)
        raise DocumentsError(f"{path.name} is not the document table: {reason}") from None
    if table.num_rows == 0 or any(column.null_count for column in table.columns):
        raise DocumentsError(f"{path.name} is empty or has empty cells")
    return _align({name: table[name].to_numpy() for name in SCHEMA.names}, path.name)


def write(path: Path | str, columns: dict[str, list]) -> None:
    """Writes the columns precision, domain, document, nats, bytes and tokens as one Parquet file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.table(columns, schema=SCHEMA), path)


def _align(column: dict[str, np.ndarray], name: str) -> Documents:
    tables: dict[str, dict[tuple[str, str], tuple[float, int, int]]] = {}
    fields = (column[key].tolist() for key in SCHEMA.names)
    for precision, domain, document, nats, size, tokens in zip(*fields, strict=True):
        table = tables.setdefault(precision, {})
        if (domain, document) in table:
            raise DocumentsError(f"{name}: {document!r} of {domain!r} twice under {precision!r}")
        table[domain, document] = (nats, size, tokens)
    first, order = next(iter(tables.items()))
    for precision, table in tables.items():
        _check_same(order, table, f"{name}: under {precision!r}, unlike {first!r},")
    size_D, tokens_D = (np.array([row[i] for row in order.values()], np.int64) for i in (1, 2))
    if (size_D <= 0).any() or (tokens_D <= 0).any():
        raise DocumentsError(f"{name}: a document without bytes or tokens")
    domain_D, document_D = (np.array([key[i] for key in order], object) for i in (0, 1))
    nats = {p: np.array([table[key][0] for key in order]) for p, table in tables.items()}
    return Documents(domain_D, document_D, size_D, tokens_D, nats)


def _check_same(order: dict, table: dict, where: str) -> None:
    for key in table.keys() ^ order.keys():
        verb = "is missing" if key in order else "appears"
        raise DocumentsError(f"{where} document {key[1]!r} of {key[0]!r} {verb}")
    for key, (_, size, tokens) in table.items():
        if order[key][1:] != (size, tokens):
            raise DocumentsError(
                f"{where} document {key[1]!r} of {key[0]!r} has {size} bytes and {tokens} tokens"
            )
