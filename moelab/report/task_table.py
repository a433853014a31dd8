"""What a run gave beyond its loss: the rows of moelab.tasks, each beside its chance level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moelab.report import formatting as fmt
from moelab.report.runs import Run
from moelab.report.tables import Cell, Table

TITLE = "Beyond the loss, with 95 % intervals"


def of_run(run: Run) -> Table | None:
    """The tasks of a card; None where it has none."""
    section = run.card["evaluation"].get("tasks") or {}
    return make(section["rows"]) if section.get("rows") else None


def make(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line per task, measure and precision."""
    columns = ("task", "measure", "precision", "value [95 %]", "chance", "n", "unit")
    return Table(TITLE, columns, tuple(map(_line, rows)))


def notes(section: Mapping[str, Any]) -> list[str]:
    """Says what was left out, and why."""
    texts = [f"{kind} was left out: {why}" for kind, why in section.get("left_out", {}).items()]
    for kind, count in section.get("dropped", {}).items():
        texts.append(f"{kind}: {count} items are longer than the model's training windows")
    if section.get("leak"):
        texts.append(f"not a causal language model: {section['leak']}; what it scores may be told")
    return texts


def _line(row: Mapping[str, Any]) -> tuple[Cell, ...]:
    bounds = f"[{fmt.fixed(row['low'], 3)}, {fmt.fixed(row['high'], 3)}]"
    return (
        Cell(row["task"].replace("_", " "), row["task"]),
        Cell(row["measure"], row["measure"]),
        Cell(row["precision"], row["precision"]),
        Cell(fmt.fixed(row["value"], 3), fmt.number(row["value"]), bounds),
        Cell(fmt.fixed(row["chance"], 3), fmt.number(row["chance"])),
        Cell(str(row["n"]), row["n"]),
        Cell(row["unit"], row["unit"]),
    )
