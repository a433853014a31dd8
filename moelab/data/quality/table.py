"""Labels and scores of every training document, those that were removed included: quality.npz in a dataset's folder.

N training documents before filtering, F filters. Rows are ordered by domain, and within it as the documents came, so
that the rows that were kept are the documents of the training split, in its order.
"""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np

from moelab.data import dataset
from moelab.data.quality.contract import CLEAN

FILE = "train/quality.npz"
_ARRAYS = ("domain", "kind", "strength", "num_bytes", "removed_by", "reason", "score")
_TEXTS = ("ids", "sources", "domains", "kinds", "filters", "reasons")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Table:
    """What is known of the training documents.

    Attributes:
      domains, kinds, filters, reasons: names that the indices point to; kinds[0] is "clean", reasons[0] is "".
      ids, sources: of each document; where its text comes from, if it is not its own.
      domain_N, kind_N: int32 indices.
      strength_N: float32, as the label says.
      num_bytes_N: int64 UTF-8 bytes.
      removed_by_N: int32 index of the filter that removed it; -1: kept.
      reason_N: int32 index of why.
      score_FN: float32, to four decimals; NaN where a filter did not judge, as after an earlier one removed it.
    """

    domains: tuple[str, ...]
    kinds: tuple[str, ...]
    filters: tuple[str, ...]
    reasons: tuple[str, ...]
    ids: tuple[str, ...]
    sources: tuple[str, ...]
    domain_N: np.ndarray
    kind_N: np.ndarray
    strength_N: np.ndarray
    num_bytes_N: np.ndarray
    removed_by_N: np.ndarray
    reason_N: np.ndarray
    score_FN: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def kept_N(self) -> np.ndarray:
        """bool, the documents of the training split."""
        return self.removed_by_N < 0

    @property
    def dirty_N(self) -> np.ndarray:
        """bool, the documents whose label is not "clean"."""
        return self.kind_N > 0

    def ordered(self, domains: tuple[str, ...]) -> Table:
        """Returns the table in the order of the domains, as a dataset's folder has it."""
        place = np.array([domains.index(name) for name in self.domains], np.int32)
        order_N = np.argsort(place[self.domain_N], kind="stable")
        changes = {
            name: getattr(self, name)[order_N]
            for name in (f"{name}_N" for name in _ARRAYS if name != "score")
        }
        changes["domain_N"] = place[self.domain_N][order_N]
        for name in ("ids", "sources"):
            values = getattr(self, name)
            changes[name] = tuple(values[i] for i in order_N.tolist())
        return dataclasses.replace(
            self, domains=domains, score_FN=self.score_FN[:, order_N], **changes
        )


def index(names: list[str], first: tuple[str, ...] = ()) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the different names, `first` at the front and in the order in which they come, and each one's index."""
    found = dict.fromkeys((*first, *names))
    place = {name: number for number, name in enumerate(found)}
    return tuple(found), np.array([place[name] for name in names], np.int32)


def begin(pool) -> Table:
    """Reads the pool once and lists its documents, nothing filtered yet."""
    rows = [
        (one.document.domain, one.document.id, one.label, len(one.document.text.encode()))
        for one in pool.training()
    ]
    domains, domain_N = index([row[0] for row in rows])
    kinds, kind_N = index([row[2].kind for row in rows], (CLEAN,))
    return Table(
        domains=domains,
        kinds=kinds,
        filters=(),
        reasons=("",),
        ids=tuple(row[1] for row in rows),
        sources=tuple(row[2].source for row in rows),
        domain_N=domain_N,
        kind_N=kind_N,
        strength_N=np.array([row[2].strength for row in rows], np.float32),
        num_bytes_N=np.array([row[3] for row in rows], np.int64),
        removed_by_N=np.full(len(rows), -1, np.int32),
        reason_N=np.zeros(len(rows), np.int32),
        score_FN=np.zeros((0, len(rows)), np.float32),
    )


def write(directory: pathlib.Path, table: Table) -> None:
    """Writes quality.npz: the same table, the same bytes."""
    arrays = {
        name: getattr(table, f"{name}_{'FN' if name == 'score' else 'N'}") for name in _ARRAYS
    }
    for name in _TEXTS:
        encoded = [text.encode() for text in getattr(table, name)]
        arrays[f"{name}_bytes"] = np.frombuffer(b"".join(encoded), np.uint8)
        arrays[f"{name}_stop"] = np.cumsum([len(text) for text in encoded], dtype=np.int64)
    dataset.write_arrays(directory / FILE, arrays)


def read(directory: pathlib.Path) -> Table | None:
    """Reads a dataset's quality.npz; None where neither dirt nor filters were asked for."""
    path = directory / FILE
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    texts = {
        name: tuple(_texts(arrays[f"{name}_bytes"], arrays[f"{name}_stop"])) for name in _TEXTS
    }
    values = {f"{name}_{'FN' if name == 'score' else 'N'}": arrays[name] for name in _ARRAYS}
    return Table(**texts, **values)


def _texts(content: np.ndarray, stops: np.ndarray):
    content, start = content.tobytes(), 0
    for stop in stops.tolist():
        yield content[start:stop].decode()
        start = stop
