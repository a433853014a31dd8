"""Predictions for measured rows of your own: a table of configurations and times, scored by the shipped calibration."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path

import numpy as np

from moelab.errors import UserError
from moelab.plan import audit, hardware, readers, recipes, search, validation
from moelab.plan.hardware import System
from moelab.plan.roofline import ENGINES
from moelab.plan.serving import Load
from moelab.plan.work import Layout

WANTED = audit.KINDS["serving"]
OPTIONAL = {"dp": 1, "ep": 1, "engine": "trtllm", "date": "2026-01-01"}


@dataclasses.dataclass(frozen=True)
class Predicted:
    """A row of yours and its prediction.

    Attributes:
      what: the configuration, in words.
      measured, predicted, low, high: seconds per output token, the last two an 80 % band.
      outside: what is beyond the calibrated range.
    """

    what: str
    measured: float
    predicted: float
    low: float
    high: float
    outside: tuple[str, ...]


def predict(path: Path) -> tuple[Predicted, ...]:
    """Predicts every row of a table with the columns WANTED, and OPTIONAL where they are there.

    Raises:
      UserError: no such table, or a row that cannot be predicted; the message names the row.
    """
    columns = audit.read(path)
    missing = [name for name in WANTED if name not in columns]
    if missing:
        raise UserError(
            f"{path} wants the columns {', '.join(WANTED)} (and may have {', '.join(OPTIONAL)}); "
            f"{', '.join(missing)} is not there"
        )
    count = len(columns[WANTED[0]])
    return tuple(_row(path, columns, i) for i in range(count))


def _row(path: Path, columns, i: int) -> Predicted:
    row = OPTIONAL | {n: c[i] for n, c in columns.items() if c[i] not in ("", None)}
    try:
        numbers = {n: int(float(row[n])) for n in ("tp", "dp", "ep", "batch", "isl", "osl")}
        measured = float(row["tpot_ms"]) / 1e3
        if min(numbers.values()) <= 0 or not 0 < measured < float("inf"):
            raise ValueError("sizes and times are above 0")
        if empty := [n for n in WANTED if n not in row]:
            raise ValueError(f"{', '.join(empty)} is empty")
        if row["engine"] not in ENGINES:
            raise ValueError(f"engine {row['engine']!r} is none of {', '.join(ENGINES)}")
        day = datetime.date.fromisoformat(str(row["date"]))
    except KeyError as error:
        raise UserError(f"{path}, row {i}: {error.args[0]} is empty") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}, row {i}: {error}") from None
    layout = Layout(numbers["tp"], numbers["dp"], numbers["ep"])
    years = (day - datetime.date(2026, 1, 1)).days / 365.25
    try:
        model, gpu = readers.model(str(row["model"])), hardware.find(str(row["gpu"]))
        recipe = recipes.named(str(row["precision"]))
        found = search.evaluate(
            *(model, recipe, System(gpu, numbers["tp"] * numbers["dp"]), layout, numbers["batch"]),
            Load(numbers["isl"], numbers["osl"], by_load=False),
            search.Options(engine=str(row["engine"]), years=years),
        )
    except UserError as error:
        raise UserError(f"{path}, row {i}: {error}") from None
    tpot = float(found.tpot[0])
    sizes = " ".join(f"{n}={v}" for n, v in numbers.items())
    what = f"{model.name} {gpu.name} {recipe.name} {row['engine']} {sizes}"
    band = (tpot * float(found.low[0]), tpot * float(found.high[0]))
    return Predicted(what, measured, tpot, *band, found.notes[0])


def score(rows: tuple[Predicted, ...], name: str) -> validation.Score:
    """Scores the predictions."""
    predicted, measured = (
        np.array([getattr(r, n) for r in rows]) for n in ("predicted", "measured")
    )
    inside = float(np.mean([r.low <= r.measured <= r.high for r in rows]))
    found = validation.score("moelab", name, "all", predicted, measured)
    return dataclasses.replace(found, coverage=inside)
