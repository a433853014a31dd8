"""The route trace: which experts every token of some text went to, in one file.

A trace is what diagnostics, expert placement and comparisons of two checkpoints (or two precisions)
read instead of the model. It is made of arrays only; no jax here.

M MoE layers, T tokens, K slots per token, E computing experts, C >= E columns of the router's
scores (columns E.. are experts without computation), G domains.

The file, for other programs: a NumPy `.npz` (a zip of `.npy` members, no pickled objects), with
little-endian arrays in C order.

    member      dtype              shape      content
    meta        uint8              (bytes,)   a JSON object in UTF-8, below
    expert_MTK  uint8/uint16/32    (M, T, K)  column 0..C-1 that a slot chose; C: no expert
    weight_MTK  float16            (M, T, K)  weight of the slot in the combine; may be absent
    token_id_T  uint32             (T,)       vocabulary id
    domain_T    int16              (T,)       index into `domains`; -1: unknown
    document_T  int32              (T,)       document of the token, >= 0, in the order of the text

`expert_MTK` is uint8 where C < 255, uint16 where C < 65535, else uint32. The JSON object has

    format       "moelab.trace"
    version      1
    num_experts  E
    num_columns  C
    layers       M ascending indices of the transformer blocks that hold the MoE layers
    domains      G different names
    header       a free JSON object: config hash, checkpoint step, precision, split ...
    sha256       hexadecimal digest of the arrays without meta

The digest runs over the arrays in alphabetical order of their names; for each, the ASCII line
"<name> <dtype> <shape>\\n" (as in "token_id_T <u4 4096\\n" or "expert_MTK |u1 12,4096,8\\n"), then
its bytes. The JSON text itself is guarded by the zip's CRC-32 only.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moelab import metrics
from moelab.errors import UserError

FORMAT = "moelab.trace"
VERSION = 1

_ARRAYS = ("expert_MTK", "token_id_T", "domain_T", "document_T")
_META = ("num_experts", "num_columns", "layers", "domains", "header")


class TraceError(UserError):
    """A trace, or its file, that is not what it should be; the message names the file."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Trace:
    """The routing of T tokens in M MoE layers. Making one checks it and narrows the dtypes.

    The arrays become read-only views (no copy where the dtype is already right).

    Attributes:
      expert_MTK: integers, column 0..C-1 of the router's scores; C means "no expert".
      token_id_T: uint32 vocabulary ids.
      domain_T: int16 index into `domains`, -1 where unknown.
      document_T: int32 document ids, >= 0, each used by one document only.
      layers: ascending indices of the transformer blocks, one for each of the M layers.
      domains: different names of the G domains.
      num_experts: E, experts that compute: columns 0..E-1.
      num_columns: C >= E.
      weight_MTK: float16 combine weights, finite; None where they were not recorded.
      header: free JSON object that says where the trace comes from (config hash, checkpoint step,
        precision, split, moelab version, tokenizer digest ...).

    Raises:
      TraceError: a shape, a type or a value that does not fit.
    """

    expert_MTK: np.ndarray
    token_id_T: np.ndarray
    domain_T: np.ndarray
    document_T: np.ndarray
    layers: tuple[int, ...]
    domains: tuple[str, ...]
    num_experts: int
    num_columns: int
    weight_MTK: np.ndarray | None = None
    header: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for checked in (_checked_meta, _checked_arrays):  # the arrays are checked against the rest
            for name, value in checked(self).items():
                object.__setattr__(self, name, value)


def save(path: Path | str, trace: Trace) -> None:
    """Writes a trace to one compressed `.npz`, whole or not at all (atomic replacement).

    Args:
      path: the file; missing folders are made, an older file is replaced.
      trace: what to write.

    Raises:
      OSError: the file cannot be written; an older one is left as it was.
    """
    path = Path(path)
    arrays = {name: getattr(trace, name) for name in _names(trace.weight_MTK is not None)}
    arrays = {n: a.astype(a.dtype.newbyteorder("<"), copy=False) for n, a in arrays.items()}
    meta = {"format": FORMAT, "version": VERSION} | {n: getattr(trace, n) for n in _META}
    text = json.dumps(meta | {"sha256": _digest(arrays)}, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez_compressed(file, meta=np.frombuffer(text.encode(), np.uint8), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path | str) -> Trace:
    """Reads a trace and checks every field and the digest.

    Args:
      path: a file that `save`, or another program after the module's description, wrote.

    Raises:
      TraceError: the file is missing, cut off, damaged, no trace, of another version, or its
        content does not fit together. The message names the file and what is wrong.
    """
    path = Path(path)
    try:
        return _read(path)
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from error.__cause__


def select(
    trace: Trace,
    *,
    documents: Iterable[int] | None = None,
    domains: Iterable[str] | None = None,
) -> Trace:
    """Keeps the tokens of some documents and some domains, in their order.

    Args:
      trace: any trace.
      documents: document ids; None: all.
      domains: names of domains; None: all, unknown ones too.

    Raises:
      TraceError: a document or a domain that the trace has not, or no token left.
    """
    keep_T = np.ones(trace.token_id_T.shape, bool)
    if documents is not None:
        present = np.unique(trace.document_T).tolist()
        keep_T &= np.isin(trace.document_T, _known(documents, present, "document"))
    if domains is not None:
        names = _known(domains, trace.domains, "domain")
        keep_T &= np.isin(trace.domain_T, [trace.domains.index(name) for name in names])
    if not keep_T.any():
        raise TraceError("no token is left by this selection of documents and domains")
    return _taken(trace, keep_T)


def interleave(trace: Trace) -> Trace:
    """Reorders whole documents so that every stretch of text has all domains in their proportion.

    A recorded split comes domain by domain. Document n of a domain's N is put at (n + 1/2) / N, so
    that the first half of the result holds half of each domain. Tokens stay in order within theirs.
    """
    _, first_U, document_T = np.unique(trace.document_T, return_index=True, return_inverse=True)
    domain_U = trace.domain_T[first_U]
    place_U = np.empty(len(first_U))
    for domain in np.unique(domain_U):
        mine = np.flatnonzero(domain_U == domain)
        mine = mine[np.argsort(first_U[mine])]
        place_U[mine] = (np.arange(len(mine)) + 0.5) / len(mine)
    rank_U = np.empty(len(first_U), np.int64)
    rank_U[np.lexsort((first_U, place_U))] = np.arange(len(first_U))
    return _taken(trace, np.argsort(rank_U[document_T], kind="stable"))


def _taken(trace: Trace, which_T: np.ndarray) -> Trace:
    """Picks tokens by a mask or by their numbers."""
    weight_MTK = trace.weight_MTK
    return replace(
        trace,
        expert_MTK=trace.expert_MTK[:, which_T],
        weight_MTK=None if weight_MTK is None else weight_MTK[:, which_T],
        **{n: getattr(trace, n)[which_T] for n in ("token_id_T", "domain_T", "document_T")},
    )


def _known(asked: Iterable, present: Sequence, what: str) -> list:
    asked = list(asked)
    missing = [item for item in asked if item not in set(present)]
    if missing:
        raise TraceError(f"no {what} {missing[0]} in this trace; it has {_few(present)}")
    return asked


def _few(items: Sequence) -> str:
    return ", ".join(map(str, items[:8])) + (f" ... ({len(items)})" if len(items) > 8 else "")


def _read(path: Path) -> Trace:
    if not path.is_file():
        if path.is_dir():
            raise TraceError("is a directory; a trace is a file in it, such as routes.npz")
        raise TraceError("there is no such file")
    try:
        with path.open("rb") as raw:  # np.load leaves a file that it opened itself open on errors
            cut = raw.read(2) == b"PK"
            if not zipfile.is_zipfile(raw):
                raise TraceError(
                    "cut off: the end of the zip archive is missing" if cut else "not an .npz file"
                )
            raw.seek(0)
            with np.load(raw, allow_pickle=False) as file:
                meta = _parsed(file["meta"].tobytes() if "meta" in file.files else None)
                arrays = {name: file[name] for name in _listed(set(file.files) - {"meta"})}
    except TraceError:
        raise
    except Exception as error:
        # Damaged bytes surface as almost anything: zip, zlib, the .npy header, memory.
        raise TraceError(f"damaged ({type(error).__name__}: {error})") from error
    found = _digest(arrays)
    if found != meta["sha256"]:
        raise TraceError(f"the arrays' sha256 is {found}, the file says {meta['sha256']!r}")
    return Trace(**arrays, **{name: meta[name] for name in _META})


def _parsed(text: bytes | None) -> dict[str, Any]:
    try:
        meta = json.loads(text) if text is not None else None
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise TraceError("an .npz file, but not a route trace (no meta with its format)")
    if meta.get("version") != VERSION:
        raise TraceError(
            f"format version {meta.get('version')!r}; this moelab reads version {VERSION}"
        )
    missing = [name for name in (*_META, "sha256") if name not in meta]
    if missing:
        raise TraceError(f"meta lacks {', '.join(missing)}")
    return meta


def _names(weights: bool) -> tuple[str, ...]:
    return (*_ARRAYS, "weight_MTK") if weights else _ARRAYS


def _listed(names: set[str]) -> tuple[str, ...]:
    wanted = _names("weight_MTK" in names)
    if names != set(wanted):
        raise TraceError(f"wants the arrays {', '.join(wanted)}; has {', '.join(sorted(names))}")
    return wanted


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        shape = ",".join(map(str, array.shape))
        digest.update(f"{name} {array.dtype.str} {shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _checked_meta(trace: Trace) -> dict[str, Any]:
    layers = tuple(_whole(layer, "layers") for layer in _listing(trace.layers, "layers"))
    if not layers or layers[0] < 0 or list(layers) != sorted(set(layers)):
        raise TraceError(f"layers wants ascending block indices >= 0; got {list(layers)}")
    domains = _listing(trace.domains, "domains")
    if not all(isinstance(name, str) for name in domains) or len(set(domains)) < len(domains):
        raise TraceError(f"domains wants different names; got {_few(domains)}")
    if len(domains) > 2**15:
        raise TraceError(f"domains wants at most {2**15} names (domain_T is int16)")
    experts = _whole(trace.num_experts, "num_experts")
    columns = _whole(trace.num_columns, "num_columns")
    if not 1 <= experts <= columns < 2**32:
        raise TraceError(f"wants 1 <= num_experts <= num_columns; got {experts}, {columns}")
    if not isinstance(trace.header, Mapping):
        raise TraceError(f"header wants a JSON object; got {type(trace.header).__name__}")
    try:
        header = metrics.plain(trace.header)
    except TypeError as error:
        raise TraceError(f"header: {error}") from error
    return dict(zip(_META, (experts, columns, layers, domains, header), strict=True))


def _listing(values: Any, name: str) -> tuple:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TraceError(f"{name} wants a list; got {values!r}")
    return tuple(values)


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TraceError(f"{name} wants whole numbers; got {value!r}")
    return int(value)


def _checked_arrays(trace: Trace) -> dict[str, np.ndarray | None]:
    columns, domains = trace.num_columns, len(trace.domains)
    narrow = np.uint8 if columns < 255 else np.uint16 if columns < 65535 else np.uint32
    expert_MTK = _integers(trace.expert_MTK, "expert_MTK", "MTK", 0, columns, narrow)
    _, tokens, _ = shape = expert_MTK.shape
    if shape[0] != len(trace.layers):
        raise TraceError(f"expert_MTK has {shape[0]} layers, layers names {len(trace.layers)}")
    found = {
        "expert_MTK": expert_MTK,
        "token_id_T": _integers(trace.token_id_T, "token_id_T", "T", 0, 2**32 - 1, np.uint32),
        "domain_T": _integers(trace.domain_T, "domain_T", "T", -1, domains - 1, np.int16),
        "document_T": _integers(trace.document_T, "document_T", "T", 0, 2**31 - 1, np.int32),
    }
    for name, array in found.items():
        if name != "expert_MTK" and len(array) != tokens:
            raise TraceError(f"{name} has {len(array)} tokens, expert_MTK has {tokens}")
    found["weight_MTK"] = None if trace.weight_MTK is None else _weights(trace.weight_MTK, shape)
    return found


def _integers(
    array: Any, name: str, axes: str, least: int, most: int, dtype: type[np.integer]
) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype.kind not in "iu" or array.ndim != len(axes) or not array.size:
        raise TraceError(
            f"{name} wants integers with the axes {axes}, none empty; "
            f"got {array.dtype} of shape {array.shape}"
        )
    for value in (int(array.min()), int(array.max())):
        if not least <= value <= most:
            raise TraceError(f"{name} wants values from {least} to {most}; got {value}")
    return _frozen(array.astype(dtype, copy=False))


def _weights(array: Any, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype.name not in ("float16", "float32", "float64", "bfloat16"):
        raise TraceError(f"weight_MTK wants floats; got {array.dtype}")
    if array.shape != shape:
        raise TraceError(f"weight_MTK has shape {array.shape}, expert_MTK has {shape}")
    with np.errstate(over="ignore"):
        half = array.astype(np.float16, copy=False)
    if not np.isfinite(half).all():
        raise TraceError("weight_MTK wants finite values within float16 (below 65504)")
    return _frozen(half)


def _frozen(array: np.ndarray) -> np.ndarray:
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view
