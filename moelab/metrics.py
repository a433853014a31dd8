"""The journal of a run, `metrics.jsonl`, and the numbers that describe a router's load.

One JSON object a line, appended and flushed, so that a killed run loses at most the line that it was writing. JSON has
no NaN: a non-finite number is stored as the string "NaN", "Infinity" or "-Infinity" (the convention of protobuf's
JSON) and comes back as a float. No jax here.

L MoE layers, E experts, D domains.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from moelab.errors import UserError

_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_log = logging.getLogger("moelab")


class MetricsError(UserError):
    """A journal that cannot be read; the message names the file and the line."""


def plain(value: Any) -> Any:
    """Turns numpy and jax values into plain JSON values, non-finite floats into their names.

    Args:
      value: dicts, lists and tuples of Python, numpy or jax scalars and arrays; paths become strings.

    Returns:
      The same value made of dict, list, str, int, float, bool and None only.

    >>> plain({"loss": np.float32(0.5), "load": np.ones(2), "worst": float("nan")})
    {'loss': 0.5, 'load': [1.0, 1.0], 'worst': 'NaN'}
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and jax scalars and arrays, without importing jax
        return plain(value.tolist())
    raise TypeError(f"a record holds a {type(value).__name__}, which has no JSON form: {value!r}")


def restored(value: Any) -> Any:
    """Undoes the naming of non-finite numbers by `plain`."""
    if isinstance(value, str):
        return _NONFINITE.get(value, value)
    if isinstance(value, dict):
        return {key: restored(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [restored(inner) for inner in value]
    return value


def read(path: Path | str) -> list[dict[str, Any]]:
    """Reads a journal; a torn last line, the mark of a killed run, is left out.

    Raises:
      FileNotFoundError: there is no such file.
      MetricsError: a line before the last is not a JSON object.
    """
    return [restored(record) for _, record in _lines(Path(path))]


def truncate_after(path: Path | str, step: int) -> int:
    """Drops every line with a step beyond `step`, and a torn last line, by an atomic replacement.

    Returns:
      The number of lines dropped. A missing file is an empty journal: 0.

    Raises:
      MetricsError: a damaged line, or a line without an integer step.
    """
    path = Path(path)
    if not path.exists():
        return 0
    kept, dropped = [], 0
    for number, (text, record) in enumerate(_lines(path), start=1):
        if not isinstance(record.get("step"), int):
            raise MetricsError(
                f"{path}, line {number}: no integer step; got {record.get('step')!r}"
            )
        if record["step"] > step:
            dropped += 1
        else:
            kept.append(text)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(text + "\n" for text in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return dropped


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = path.read_bytes().split(b"\n")
    if not lines[-1]:  # the file ends with a newline
        lines.pop()
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8")
            record = json.loads(text)
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                return  # torn by a kill while it was written
            raise MetricsError(
                f"{path}, line {number} of {len(lines)} is damaged ({error}); only the last line "
                "may be torn"
            ) from None
        yield text, record


class TensorBoard:
    """Mirrors the scalars of train and evaluation records to TensorBoard events (tensorboardX).

    An extra view, never the source of truth: whatever it throws is logged once and switches it off.
    """

    def __init__(self, directory: Path | str):
        self._writer = None
        self._attempt(lambda: self._open(Path(directory)))

    def _open(self, directory: Path) -> None:
        import tensorboardX  # imported here: most runs do without it

        self._writer = tensorboardX.SummaryWriter(str(directory))

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds the record's numbers under `<kind>/<dotted key>`; lists per layer get a /<index>."""
        self._attempt(lambda: self._add(record))

    def _add(self, record: Mapping[str, Any]) -> None:
        if self._writer is None or record["kind"] == "event":
            return
        kind = "/".join(str(record[k]) for k in ("kind", "split", "precision") if k in record)
        for name, value in _scalars(record):
            self._writer.add_scalar(f"{kind}/{name}", value, record["step"])

    def close(self) -> None:
        """Flushes and closes the event file."""
        if self._writer is not None:
            self._attempt(self._writer.close)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            # Any failure of a side view (disk, protobuf, missing package) must leave the run alone.
            _log.warning("TensorBoard is off from here: %s: %s", type(error).__name__, error)
            self._writer = None


def _scalars(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if name or key != "step":
                yield from _scalars(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _scalars(inner, f"{name}/{index}")
    elif isinstance(value, bool | int | float):
        yield name, float(value)


class MetricsWriter:
    """Appends records to a journal, one flushed line each, and to TensorBoard when asked.

    Opening repairs the tail: a torn last line is cut off, or the next record would be glued to it.
    """

    def __init__(self, path: Path | str, tensorboard: Path | str | None = None):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _repair_tail(self.path)
        self._file = self.path.open("ab", buffering=0)  # one write call per line, nothing held back
        self._sink = TensorBoard(tensorboard) if tensorboard is not None else None

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record.

        Args:
          record: JSON-like, with "kind" and an integer "step"; numpy and jax values are converted.

        Raises:
          ValueError: no kind or no integer step.
          TypeError: a value without a JSON form.
        """
        record = plain(record)
        if not isinstance(record.get("kind"), str) or not isinstance(record.get("step"), int):
            raise ValueError(
                f"a record needs a kind and an integer step; got keys {sorted(record)}"
            )
        line = json.dumps(record, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        self._file.write(line.encode("utf-8") + b"\n")
        if self._sink is not None:
            self._sink.write(restored(record))

    def close(self) -> None:
        """Makes the journal durable (fsync) and closes it and TensorBoard; closing twice is fine."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()
        if self._sink is not None:
            self._sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _repair_tail(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    start = content.rfind(b"\n") + 1
    tail = content[start:]
    if not tail:
        return
    try:
        complete = isinstance(json.loads(tail), dict)
    except ValueError:
        complete = False
    with path.open("r+b") as file:
        if complete:  # only its newline is missing
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        else:
            file.truncate(start)


def max_violation(load_LE: np.ndarray) -> np.ndarray:
    """Measures the worst overload of each layer: max_e load / mean_e load - 1.

    Args:
      load_LE: (..., E) shares or counts, >= 0. Axes before the last are kept.

    Returns:
      float64 (...): 0 when balanced, E - 1 when one expert takes all, NaN without any load.

    Reference:
      MaxVio, Wang et al., arXiv:2408.15664, equation 4.

    >>> float(max_violation(np.array([0.5, 0.25, 0.25, 0.0])))
    1.0
    """
    share_LE = _share(load_LE)
    return share_LE.max(-1) * share_LE.shape[-1] - 1.0


def normalized_entropy(load_LE: np.ndarray) -> np.ndarray:
    """Measures how evenly load is spread: -sum_e p_e ln p_e / ln E.

    Args:
      load_LE: (..., E) shares or counts, >= 0.

    Returns:
      float64 (...) between 0 (one expert takes all) and 1 (balanced); NaN without any load; 1 for E = 1.
    """
    share_LE = _share(load_LE)
    if share_LE.shape[-1] == 1:
        return share_LE[..., 0]
    log_LE = np.log(share_LE, where=share_LE > 0, out=np.zeros_like(share_LE))
    return -(share_LE * log_LE).sum(-1) / math.log(share_LE.shape[-1])


def dead_experts(load_LE: np.ndarray) -> np.ndarray:
    """Counts the experts of each layer that got nothing.

    Args:
      load_LE: (..., E) shares or counts, >= 0.

    Returns:
      int64 (...).
    """
    _share(load_LE)
    return (np.asarray(load_LE) == 0).sum(-1)


def _share(load_LE: np.ndarray) -> np.ndarray:
    load_LE = np.asarray(load_LE, np.float64)
    if load_LE.ndim == 0 or load_LE.shape[-1] == 0 or (load_LE < 0).any():
        raise ValueError(
            f"load wants shares or counts >= 0 with experts on the last axis; got shape {load_LE.shape}"
            + (f", least {load_LE.min()}" if load_LE.size else "")
        )
    total_L1 = load_LE.sum(-1, keepdims=True)
    return np.divide(load_LE, total_L1, where=total_L1 > 0, out=np.full_like(load_LE, np.nan))


def router_record(
    layers: list[int],
    load_ME: np.ndarray,
    dropped_M: np.ndarray | None = None,
    logit_norm_M: np.ndarray | None = None,
    idle_M: np.ndarray | None = None,
    log_sum_exp_M: np.ndarray | None = None,
) -> dict[str, list]:
    """Describes the routing of M MoE layers for a journal record.

    Args:
      layers: block index of each MoE layer.
      load_ME: assignments that each expert computed.
      dropped_M: assignments that a capacity removed; None: nothing is said of them.
      logit_norm_M: mean Euclidean norm of the router's logits; None: not said.
      log_sum_exp_M: mean log-sum-exp of the router's logits; None: not said.
      idle_M: assignments to experts without computation; None or all zero: nothing is said of them.

    Returns:
      layers, assigned (assignments that experts computed), load (shares, each row sums to 1), max_violation, entropy,
      dead_experts, and where given dropped_share (of the router's choices), logit_norm, log_sum_exp and idle_share (of
      all assignments).
    """
    if not layers:
        keys = ("assigned", "load", "max_violation", "entropy", "dead_experts")
        return {"layers": []} | {key: [] for key in keys}
    load_ME = np.asarray(load_ME, np.float64).reshape(len(layers), -1)
    idle_M = np.zeros(len(layers)) if idle_M is None else np.asarray(idle_M, np.float64)
    total_M = load_ME.sum(1)
    found = {
        "layers": list(layers),
        "assigned": total_M.tolist(),
        "load": (load_ME / np.maximum(total_M, 1)[:, None]).tolist(),
        "max_violation": max_violation(load_ME).tolist(),
        "entropy": normalized_entropy(load_ME).tolist(),
        "dead_experts": dead_experts(load_ME).tolist(),
    }
    if dropped_M is not None:
        chosen_M = np.maximum(total_M + idle_M + dropped_M, 1)
        found["dropped_share"] = (np.asarray(dropped_M) / chosen_M).tolist()
    for name, value_M in (("logit_norm", logit_norm_M), ("log_sum_exp", log_sum_exp_M)):
        if value_M is not None:
            found[name] = np.asarray(value_M, np.float64).tolist()
    if idle_M.any():
        found["idle_share"] = (idle_M / np.maximum(total_M + idle_M, 1)).tolist()
    return found
