"""Times programs beside each other: the speed of a shared machine drifts, so ratios within a round are what counts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax


def interleaved(
    calls: Mapping[Hashable, Callable[[], Any]],
    repeats: int,
    warm_ups: int = 1,
    *,
    settled: bool = False,
) -> dict[Any, list[float]]:
    """Runs every call once a round, in order, and waits for what it returns.

    Args:
      calls: name -> call.
      repeats: rounds that count, at least 1.
      warm_ups: rounds before them, which compile and touch memory.
      settled: run every call once more, untimed, just before its time is taken: a long call before it would otherwise
        have emptied the caches.

    Returns:
      name -> seconds of each round that counts.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + warm_ups):
        for name, call in calls.items():
            if settled:
                jax.block_until_ready(call())
            start = time.perf_counter()
            jax.block_until_ready(call())
            if repeat >= warm_ups:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns lower quartile, median and upper quartile; of fewer than four values the extremes for the quartiles.

    >>> quartiles([3.0, 1.0, 2.0])
    (1.0, 2.0, 3.0)
    """
    if len(values) < 4:
        return min(values), statistics.median(values), max(values)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def row(
    case: str,
    shape: Mapping[str, int | str],
    seconds: Mapping[str, Sequence[float]],
    against: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Describes one case of `interleaved` as plain values, for JSON.

    Args:
      case: a name in `seconds`.
      shape: what was computed: names and sizes.
      seconds: from `interleaved`.
      against: the case that it is compared with; None: none.
      more: further fields.

    Returns:
      case, shape, repeats; median_s, low_s, high_s (quartiles) and best_s; and with `against` ratio, ratio_low and
      ratio_high, the quartiles of the ratios within each round, and ratio_of_best.
    """
    low, middle, high = quartiles(seconds[case])
    found = {"case": case, "shape": dict(shape), "repeats": len(seconds[case])}
    found |= {"median_s": middle, "low_s": low, "high_s": high, "best_s": min(seconds[case])}
    if against is not None:
        base = seconds[against]
        low, middle, high = quartiles([a / b for a, b in zip(seconds[case], base, strict=True)])
        found |= {"against": against, "ratio": middle, "ratio_low": low, "ratio_high": high}
        found["ratio_of_best"] = min(seconds[case]) / min(base)
    return found | more


def compiled(function: Callable, arguments: tuple) -> tuple[Callable[[], Any], Any]:
    """Compiles a function for its arguments; returns a call without any and XLA's memory analysis."""
    program = jax.jit(function).lower(*arguments).compile()
    return (lambda: program(*arguments)), program.memory_analysis()
