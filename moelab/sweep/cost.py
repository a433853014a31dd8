"""What a sweep will cost: training FLOPs from the configs, seconds from what finished runs of it took."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moelab import config as configs
from moelab import launch
from moelab.report import card as cards
from moelab.sweep.points import Point


@dataclasses.dataclass(frozen=True)
class Rate:
    """What finished runs measured.

    Attributes:
      flops_per_second: of training, median over runs.
      overhead: seconds of a run outside of training: start, compilation and evaluation, median.
      runs: how many were measured.
    """

    flops_per_second: float
    overhead: float
    runs: int

    def seconds(self, flops: float) -> float:
        """Estimates a run's seconds."""
        return flops / self.flops_per_second + self.overhead


def flops(points: Sequence[Point]) -> list[float]:
    """Returns the training FLOPs of each point; points that differ in their seed alone are counted once."""
    known: dict[str, float] = {}
    found = []
    for point in points:
        values = json.loads(configs.canonical(point.config))
        key = json.dumps(values | {"seed": 0}, sort_keys=True)
        if key not in known:
            summary = launch.summary(point.config)
            known[key] = float(summary["flops_per_token"]["train"]) * summary["tokens"]
        found.append(known[key])
    return found


def measured(runs: Iterable[tuple[Path, float | None]]) -> Rate | None:
    """Measures the rate of finished runs; None where none tells.

    Args:
      runs: run directories, and the seconds that their process took (None: not known).
    """
    rates, overheads = [], []
    for directory, seconds in runs:
        training = _training(directory)
        work = (training.get("flops_per_token") or 0) * (training.get("tokens") or 0)
        spent = training.get("train_seconds")
        if work and spent:
            rates.append(work / spent)
            overheads.append(max(0.0, (seconds or training.get("wall_seconds") or spent) - spent))
    if not rates:
        return None
    return Rate(statistics.median(rates), statistics.median(overheads), len(rates))


def _training(directory: Path) -> Mapping[str, Any]:
    try:
        return cards.read(directory)["training"]
    except cards.CardError:
        return {}
