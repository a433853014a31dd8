"""The unrounded numbers of a comparison of arms, for CSV and JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moelab.report import arms_measures, crossing, paired
from moelab.report import formatting as fmt
from moelab.report.arms import VALIDATION, Arm, Comparison, Difference
from moelab.report.runs import REFERENCE


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Lists the unrounded numbers, one dict per arm. None: not measured.

    Behind the comparison's columns and a seed's each, means over seeds with their bounds: bits per byte by domain
    (bits_per_byte.DOMAIN, .low, .high) and tasks (task.TASK.MEASURE.PRECISION, .low, .high). Where arms differ in
    compute, each place where an arm crosses the reference on the validation split (crossing.1.flops, crossing.1.low,
    crossing.1.high, crossing.1.better_beyond).
    """
    listed = []
    for arm in comparison.arms:
        bits = arm.bits(comparison.precision)
        row: dict[str, Any] = {
            "arm": arm.name,
            "n": len(bits),
            "not_ranked": arm.apart,
            "config_sha256": arm.first.card["config_sha256"],
            "bits_per_byte": float(np.mean(list(bits.values()))),
            **{f"parameters.{k}": arm.first.card["parameters"].get(k) for k in ("total", "active")},
            "tokens": arm.first.card["training"].get("tokens"),
            "flops_per_token": arm.first.card["training"].get("flops_per_token"),
            "train_seconds": arm.mean("training", "train_seconds"),
            "max_violation": max_violation(arm, comparison.precision),
        }
        row |= _interquartile(arm, comparison.precision)
        row |= _difference_columns(comparison.differences.get(arm.name))
        row |= {f"seed{seed}": value for seed, value in bits.items()}
        if comparison.precision != VALIDATION:  # what follows is of the test split
            row |= _domains(arm, comparison.precision) | _tasks(arm)
        listed.append(row | _crossings(arm, comparison))
    return listed


def _domains(arm: Arm, precision: str) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, values in arms_measures.domain_values(arm, precision).items():
        found |= _mean(f"bits_per_byte.{name}", values)
    return found


def _tasks(arm: Arm) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for key, rows in arms_measures.task_rows(arm).items():
        values = [fmt.number(row["value"]) for row in rows]
        found |= _mean(".".join(("task", *key)), values, rows[0]["unit"])
    return found


def _mean(name: str, values: Sequence[float | None], unit: str = "") -> dict[str, float | None]:
    names = name, f"{name}.low", f"{name}.high"
    if None in values or not np.isfinite(values).all():
        mean = None if None in values else float(np.mean(values))
        return dict(zip(names, (mean, None, None), strict=True))
    found = paired.mean_interval(values, arms_measures.range_of(unit))
    return dict(zip(names, (None if math.isnan(v) else v for v in found), strict=True))


def _crossings(arm: Arm, comparison: Comparison) -> dict[str, float | bool]:
    found: dict[str, float | bool] = {}
    for i, (place, b_gains) in enumerate(crossing.of_arm(arm, comparison) or (), start=1):
        numbers = zip(("flops", "low", "high"), place, strict=True)
        found |= {f"crossing.{i}.{key}": value for key, value in numbers}
        found[f"crossing.{i}.better_beyond"] = b_gains
    return found


def _interquartile(arm: Arm, precision: str) -> dict[str, float | None]:
    """The interquartile mean over seeds and domains: what a domain or a run far off cannot move."""
    names = ("interquartile_mean", "interquartile_low", "interquartile_high")
    rows = [r for run in arm.runs.values() for r in run.rows if r["precision"] == precision]
    domains = arm.first.domains
    score_RM = np.array(
        [[fmt.number(row["bits_per_byte"].get(d)) or math.nan for d in domains] for row in rows]
    )
    if not score_RM.size or not np.isfinite(score_RM).all():
        return dict.fromkeys(names)
    found = paired.interquartile_mean(score_RM)
    return dict(zip(names, (None if math.isnan(v) else v for v in found), strict=True))


def _difference_columns(d: Difference | None) -> dict[str, Any]:
    names = "pairs difference difference_low difference_high interval_over p_t p_holm p_sign_flip p_smallest "
    names += "detectable correlation both_low both_high"
    if d is None:
        return dict.fromkeys(names.split())
    flip = d.sign_flip
    values = (
        *(d.n, d.mean, d.low, d.high, d.over, d.t, d.holm),
        *((flip.p, flip.smallest) if flip else (None, None)),
        *(d.detectable, d.correlation.estimate if d.correlation else None),
        *((d.both.low, d.both.high) if d.both else (None, None)),
    )
    clean = (None if isinstance(v, float) and math.isnan(v) else v for v in values)
    return dict(zip(names.split(), clean, strict=True))


def max_violation(arm: Arm, precision: str = REFERENCE) -> float | None:
    """Averages MaxVio of the evaluation set over layers and seeds."""
    values = []
    for run in arm.runs.values():
        row = next((r for r in run.rows if r["precision"] == precision), {})
        values += [fmt.number(v) for v in row.get("max_violation") or ()]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
