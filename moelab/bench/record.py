"""Rows of benchmarks as JSON: where and from which commit they come, and what changed since older ones.

Times of different machines or shapes say nothing about a change of code, so such files are refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moelab import environment
from moelab.errors import UserError

Row = dict[str, Any]
_NEEDED = ("benchmark", "case", "shape", "device", "commit", "median_s", "low_s", "high_s")


def stamped(benchmark: str, rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Adds to each row what it is: benchmark, device, commit and the version of JAX."""
    stamp = {"benchmark": benchmark, "device": device(), "commit": commit()}
    stamp["jax"] = environment.packages().get("jax")
    return [stamp | dict(row) for row in rows]


def device() -> str:
    """Returns the name of what computes: the GPU, or the processor and how many of its cores are ours."""
    from pallas_kernels import device as devices

    found = devices.current()
    if found.platform != "cpu":
        return str(found)
    return f"{environment.cpu_model()}, {len(os.sched_getaffinity(0))} cores"


def commit() -> str | None:
    """Returns the commit of the code, with a plus where it was changed since; None where there is none."""
    found = environment.git()
    if found is None or found["commit"] is None:
        return None
    return f"{found['commit'][:12]}{'+' if found['dirty'] else ''}"


def write(path: str | Path, rows: Sequence[Row]) -> None:
    """Writes rows to a file."""
    from moelab import metrics

    text = json.dumps(metrics.plain(list(rows)), indent=1, allow_nan=False)
    Path(path).write_text(f"{text}\n", encoding="utf-8")


def read(path: str | Path) -> list[Row]:
    """Reads what `write` wrote.

    Raises:
      UserError: there is no such file, or it holds something else.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        rows = None
    good = isinstance(rows, list) and rows
    if not good or not all(isinstance(row, dict) and set(_NEEDED) <= row.keys() for row in rows):
        raise UserError(f"{path}: no rows of 'moelab bench' (its --out writes them)")
    return rows


def check_origin(old: Sequence[Row], benchmark: str, path: str | Path) -> None:
    """Raises UserError unless rows are of this benchmark and of this device: to call before anything is timed."""
    for field, ours in (("benchmark", benchmark), ("device", device())):
        theirs = {row[field] for row in old} - {ours}
        if theirs:
            raise UserError(
                f"{path} cannot be compared: its {field} is {', '.join(map(str, theirs))}, this is {ours}"
            )


def compare(new: Sequence[Row], old: Sequence[Row], path: str | Path = "the file") -> list[Row]:
    """Finds how much longer each row takes than it did.

    Args:
      new, old: stamped rows.
      path: of the old ones, for messages.

    Returns:
      For each new row benchmark, case, part, shape, old_s and new_s, ratio (new / old), and ratio_low and ratio_high,
      from the quartiles of both that make it smallest and largest; `against`, old_ratio and new_ratio where rows are
      compared with another case of their own run, which a slower machine leaves as it is. A case that the old rows
      lack has None for what needs them.

    Raises:
      UserError: other benchmarks, devices or shapes; the message names the first difference.
    """
    check_origin(old, new[0]["benchmark"], path)
    _check_shapes(new, old, path)
    before = {_key(row): row for row in old}
    return [_compared(row, before.get(_key(row))) for row in new]


def _check_shapes(new: Sequence[Row], old: Sequence[Row], path: str | Path) -> None:
    ours, theirs = (dict.fromkeys(_shape(row) for row in rows) for rows in (new, old))
    extra = [shape for shape in theirs if shape not in ours]
    lacking = [shape for shape in ours if shape not in theirs]
    if extra:
        here = f"here it is {lacking[0]}" if lacking else "that was not timed here"
        raise UserError(f"{path} cannot be compared: it has the shape {extra[0]}; {here}")
    if lacking:
        raise UserError(f"{path} cannot be compared: it lacks the shape {lacking[0]}")


def _compared(new: Row, old: Row | None) -> Row:
    found = {name: new.get(name) for name in ("benchmark", "case", "part", "shape", "against")}
    found |= {"old_s": None, "new_s": new["median_s"]}
    found |= dict.fromkeys(("ratio", "ratio_low", "ratio_high", "old_ratio"))
    found["new_ratio"] = new.get("ratio")
    if old is not None:
        found["old_s"], found["old_ratio"] = old["median_s"], old.get("ratio")
        found["ratio"] = new["median_s"] / old["median_s"]
        found["ratio_low"] = new["low_s"] / old["high_s"]
        found["ratio_high"] = new["high_s"] / old["low_s"]
    return found


def shape_text(shape: Mapping[str, Any]) -> str:
    """Writes a shape on a line: rows=8 experts=64."""
    return " ".join(f"{name}={value}" for name, value in shape.items())


def _shape(row: Row) -> str:
    return shape_text(row["shape"])


def _key(row: Row) -> tuple:
    return row["case"], row.get("part"), _shape(row)
