"""`moelab bench ...`: times the CPU or GPU backends, MoE layers and training steps; compares with an older file."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from moelab.cli import output
from moelab.errors import UserError


def kernels(args: argparse.Namespace) -> int:
    """Times the grouped matmul of every backend."""

    def measure(shapes):
        from pallas_kernels.grouped_matmul import bench

        return bench.measure(shapes, args.repeats)

    return _run(args, "kernels", measure, (4, 4))


def layer(args: argparse.Namespace) -> int:
    """Times the MoE layer against a dense one."""

    def measure(shapes):
        from moelab.bench import layer

        return layer.measure(shapes or layer.SHAPES, args.repeats)

    return _run(args, "layer", measure, (2, 5))


def step(args: argparse.Namespace) -> int:
    """Times training steps of sparse models against dense ones."""

    def measure(_):
        from moelab.bench import step

        return step.measure(None, args.repeats)

    return _run(args, "step", measure)


def _run(
    args: argparse.Namespace,
    benchmark: str,
    measure: Callable[[Sequence[tuple[int, ...]] | None], list[dict]],
    sizes: tuple[int, int] = (0, 0),
) -> int:
    shapes = [_shape(text, *sizes) for text in getattr(args, "shape", None) or ()] or None
    from moelab import environment

    environment.prepare()
    from moelab.bench import record

    old = record.read(args.compare) if args.compare else None
    if old is not None:  # before the time is spent, not after
        record.check_origin(old, benchmark, args.compare)
    rows = record.stamped(benchmark, measure(shapes))
    if args.out:
        record.write(args.out, rows)
    if old is None:
        _print(args, rows, _measured)
    else:
        _print(args, record.compare(rows, old, args.compare), _compared)
    return 0


def _shape(text: str, fewest: int, most: int) -> tuple[int, ...]:
    words = text.split(",")
    if not fewest <= len(words) <= most or not all(
        word.isdecimal() and int(word) for word in words
    ):
        numbers = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        raise UserError(f"--shape wants {numbers} numbers from 1, joined by commas, got {text!r}")
    return tuple(map(int, words))


def _print(args: argparse.Namespace, rows: list[dict], line: Callable[[dict], dict]) -> None:
    if args.json:
        output.print_json(rows)
        return
    lines = [line(row) for row in rows]
    output.print_table(tuple(lines[0]), [tuple(cells.values()) for cells in lines])


def _measured(row: dict) -> dict:
    return _what(row) | {
        "ms": _milliseconds(row["median_s"]),
        "quartiles": f"{_milliseconds(row['low_s'])}-{_milliseconds(row['high_s'])}",
        "ratio": _number(row.get("ratio")),
        "ratio's quartiles": _range(row.get("ratio_low"), row.get("ratio_high")),
        "to": row.get("against") or "",
    }


def _compared(row: dict) -> dict:
    return _what(row) | {
        "old ms": _milliseconds(row["old_s"]),
        "new ms": _milliseconds(row["new_s"]),
        "new/old": _number(row["ratio"]),
        "spread": _range(row["ratio_low"], row["ratio_high"]),
        "ratio was": _number(row["old_ratio"]),
        "is": _number(row["new_ratio"]),
        "to": row["against"] or "",
    }


def _what(row: dict) -> dict:
    from moelab.bench import record

    part = f" {row['part']}" if row.get("part") else ""
    return {"case": f"{row['case']}{part}", "shape": record.shape_text(row["shape"])}


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _range(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.2f}-{high:.2f}"
