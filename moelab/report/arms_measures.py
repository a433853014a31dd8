"""What arms gave apart from the one number: bits per byte by domain, and the tasks beyond the loss.

Values are means over seeds with their t interval; a single seed has none, nor have seeds that all gave the same number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moelab.report import formatting as fmt
from moelab.report import paired
from moelab.report.arms import VALIDATION, Arm, Comparison
from moelab.report.tables import BASELINES, Cell, Table


def all_tables(comparison: Comparison) -> list[Table]:
    """Returns the tables that the arms' cards allow."""
    return [one for one in (domains(comparison), tasks(comparison)) if one is not None]


def domains(comparison: Comparison) -> Table | None:
    """Tells the arms' bits per byte by domain, below them what a bigram of the text that each saw gives.

    Returns:
      A line per arm; None where there is one domain or the numbers are of the validation split.
    """
    names = comparison.reference.first.domains
    if len(names) < 2 or comparison.precision == VALIDATION:
        return None
    body = []
    for arm in comparison.arms:
        found = domain_values(arm, comparison.precision)
        cells = [_mean(found[name], 4) for name in names]
        body.append((Cell(arm.name, arm.name), *cells))
    body += _baselines(comparison.arms, names)
    title = f"Bits per byte by domain in {comparison.precision}, mean over seeds [95 %]"
    return Table(title, ("arm", *names), tuple(body))


def domain_values(arm: Arm, precision: str) -> dict[str, list[float | None]]:
    """Returns the bits per byte of every run of an arm by domain; none of the validation split."""
    rows = [r for run in arm.runs.values() for r in run.rows if r["precision"] == precision]
    return {
        name: [fmt.number(r["bits_per_byte"].get(name)) for r in rows]
        for name in (arm.first.domains if rows else ())
    }


def _baselines(arms: Sequence[Arm], domains: Sequence[str]) -> list[tuple[Cell, ...]]:
    """A line per baseline; where arms saw different text, one for all arms that give the same."""
    lines: dict[tuple, list[str]] = {}
    for arm in arms:
        cards = [run.card["evaluation"].get("baselines") or {} for run in arm.runs.values()]
        for name in cards[0]:
            cells = tuple(
                _mean([fmt.number((card.get(name) or {}).get(domain)) for card in cards], 4)
                for domain in domains
            )
            lines.setdefault((name, cells), []).append(arm.name)
    kinds = [name for name, _ in lines]
    body = []
    for (name, cells), of in lines.items():
        text = BASELINES.get(name, name)
        text += f": {', '.join(of)}" if kinds.count(name) > 1 else ""
        body.append((Cell(f"({text})", name), *cells))
    return body


def tasks(comparison: Comparison) -> Table | None:
    """Tells the tasks, a line per measure and a column per arm, empty where not all runs of the arm have it.

    Of the comparison's precision; of all precisions where the tasks were not asked in it.

    Returns:
      None where no arm has any, or the numbers are of the validation split.
    """
    found = {arm.name: task_rows(arm) for arm in comparison.arms}
    units = {key: rows[0] for have in found.values() for key, rows in have.items()}
    if not units or comparison.precision == VALIDATION:
        return None
    asked_in = {precision for _, _, precision in units} & {comparison.precision}
    body = []
    for key, row in units.items():
        task, measure, precision = key
        if asked_in and precision not in asked_in:
            continue
        body.append(
            (
                Cell(
                    f"{task.replace('_', ' ')}: {measure}"
                    + (f", {precision}" if precision != comparison.precision else "")
                ),
                Cell(row["unit"], row["unit"]),
                Cell(fmt.fixed(row["chance"], 3), fmt.number(row["chance"])),
                *(
                    _mean(
                        [fmt.number(r["value"]) for r in found[arm.name].get(key, ())],
                        3,
                        row["unit"],
                    )
                    for arm in comparison.arms
                ),
            )
        )
    heads = ("measure", "unit", "chance", *(arm.name for arm in comparison.arms))
    return Table("Beyond the loss, mean over seeds [95 %]", heads, tuple(body))


def task_rows(arm: Arm) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Returns the rows of an arm's runs by task, measure and precision, of those that all of its runs have."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for run in arm.runs.values():
        for row in (run.card["evaluation"].get("tasks") or {}).get("rows") or ():
            found.setdefault((row["task"], row["measure"], row["precision"]), []).append(row)
    return {key: rows for key, rows in found.items() if len(rows) == len(arm.runs)}


def range_of(unit: str) -> tuple[float, float]:
    """Returns what a measure of the unit can be."""
    return (0.0, 1.0) if unit == "share" else (-np.inf, np.inf)


def _mean(values: Sequence[float | None], digits: int, unit: str = "") -> Cell:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return Cell("")
    if not np.isfinite(known).all():
        return Cell("NaN")
    found = paired.mean_interval(known, range_of(unit))
    bounds = f"[{fmt.fixed(found.low, digits)}, {fmt.fixed(found.high, digits)}]"
    return Cell(
        fmt.fixed(found.estimate, digits), found.estimate, bounds if np.isfinite(found.low) else ""
    )
