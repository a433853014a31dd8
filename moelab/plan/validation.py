"""How good the planner is where it was not fitted: models held out, and GPU generations held out.

Beside it on the same rows: the plain roofline (peaks, no overhead), and what aiconfigurator itself predicts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from moelab.plan import calibrate, calibration, measured, peer, roofline, serving
from moelab.plan.calibrate import Data, Fit
from moelab.plan.measured import HOPPER, Row

BARS = {"median": 0.20, "coverage": (0.75, 0.85), "rank": 0.88}


@dataclasses.dataclass(frozen=True)
class Score:
    """Errors of predicted times on some rows.

    Attributes:
      who, split, part: the predictor, which rows were held out, and which of these.
      rows: number of rows.
      median, p90: absolute relative errors.
      bias: median of predicted over measured.
      rank: Spearman's correlation; NaN below three rows.
      coverage: share of the rows within the 80 % band; None: no band.
    """

    who: str
    split: str
    part: str
    rows: int
    median: float
    p90: float
    bias: float
    rank: float
    coverage: float | None = None

    def meets(self) -> dict[str, bool]:
        """Says which bars are met."""
        low, high = BARS["coverage"]
        found = {"median": self.median <= BARS["median"], "rank": self.rank >= BARS["rank"]}
        if self.coverage is not None:
            found["coverage"] = low <= self.coverage <= high
        return found


SPLITS: dict[str, Callable[[Row], bool]] = {
    "held-out models: DeepSeek, gpt-oss": lambda row: row.family in ("DeepSeek", "gpt-oss"),
    "held-out generation: Blackwell": lambda row: row.gpu not in HOPPER,
}


def score(who, split, part, predicted, measured_, band=None) -> Score:
    """Compares predicted with measured times."""
    ratio = np.asarray(predicted) / np.asarray(measured_)
    error, coverage = np.abs(ratio - 1), None
    if band is not None:
        off = -np.log(ratio)
        coverage = float(np.mean((off >= band[0]) & (off <= band[1])))
    return Score(
        who,
        split,
        part,
        len(ratio),
        float(np.median(error)),
        float(np.quantile(error, 0.9)),
        float(np.median(ratio)),
        rank_correlation(predicted, measured_),
        coverage,
    )


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Returns Spearman's correlation; NaN below three values.

    >>> rank_correlation([1, 2, 3, 4], [10, 30, 20, 40])
    0.8
    """
    if len(a) < 3:
        return float("nan")
    ranks = []
    for values in (a, b):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        last = np.cumsum(counts)
        ranks.append((last - (counts - 1) / 2)[inverse])
    return round(float(np.corrcoef(*ranks)[0, 1]), 12)


def split_scores(
    found: dict[float, Data], split: str, peer_rows: int = 0, progress=lambda _: None
) -> list[Score]:
    """Fits the rows that are not held out and scores those that are.

    Args:
      peer_rows: how many of the held-out rows aiconfigurator is asked for; 0: none.
    """
    held = SPLITS[split]
    fitted = calibrate.fit(found, lambda row: not held(row))
    band = calibrate.band(found, fitted, lambda row: not held(row))
    rows = calibrate.subset(found[fitted.skew], held)
    ours = calibrate.predict(rows, fitted.efficiency)
    plain = calibrate.subset(found[0.0], held)
    peak = calibrate.predict(plain, roofline.PEAK)
    scores = [
        score("moelab", split, "all", ours, rows.tpot_n, band),
        score("plain roofline", split, "all", peak, rows.tpot_n),
    ]
    parts = {
        **{f: [r.family == f for r in rows.rows] for f in measured.FAMILIES},
        **{g: [r.gpu == g for r in rows.rows] for g in ("h100", "h200", "b200", "b300")},
    }
    for name, mask in parts.items():
        if any(mask) and not all(mask):
            scores.append(score("moelab", split, name, ours[mask], rows.tpot_n[mask], band))
    scores.append(_first_token(fitted, rows, split))
    if peer_rows:
        scores += _peer(split, rows, ours, peak, band, peer_rows, progress)
    return scores


def _first_token(fitted: Fit, rows: Data, split: str) -> Score:
    found = serving.ttft(rows.prepared, fitted.efficiency, rows.engine_n, rows.years_n)
    known = rows.ttft_n > 0
    return score("moelab", split, "first token (no promise)", found[known], rows.ttft_n[known])


def _peer(split, rows, ours, peak, band, count, progress) -> list[Score]:
    chosen = np.random.default_rng(0).permutation(len(rows.rows))[:count]
    theirs, index = [], []
    for done, i in enumerate(chosen):
        seconds = peer.tpot(rows.rows[i])
        if seconds is not None:
            theirs.append(seconds)
            index.append(i)
        progress(f"aiconfigurator: {done + 1} of {len(chosen)} rows, {len(index)} predicted")
    part = f"{len(index)} of {len(chosen)} rows drawn, which aiconfigurator predicts"
    if not index:
        return []
    measured_ = rows.tpot_n[index]
    return [
        score("aiconfigurator", split, part, theirs, measured_),
        score("moelab", split, part, ours[index], measured_, band),
        score("plain roofline", split, part, peak[index], measured_),
    ]


def ship(found: dict[float, Data]) -> calibration.Calibration:
    """Fits all rows: the calibration that predictions use."""
    fitted = calibrate.fit(found)
    drawn = calibrate.draws(found, fitted)
    low, high = np.quantile(drawn, [0.1, 0.9], axis=0)
    rows = found[fitted.skew].rows
    models = {r.model: measured.model(r.model) for r in rows}
    numbers = {
        "batch": [r.batch for r in rows],
        "isl": [r.isl for r in rows],
        "osl": [r.osl for r in rows],
        "gpus": [r.tp * r.dp for r in rows],
        "parameters": [m.total() for m in models.values()],
        "experts": [m.experts for m in models.values()],
        "software": [round(r.years, 4) for r in rows],
    }
    names = {
        "gpu": sorted({r.gpu for r in rows}),
        "precision": sorted({r.precision.partition("+")[0] for r in rows}),
        "engine": sorted({r.engine for r in rows}),
    }
    return calibration.Calibration(
        values={n: float(f"{x:.4g}") for n, x in zip(calibrate.NAMES, fitted.theta, strict=True)},
        intervals={
            n: (float(f"{a:.3g}"), float(f"{b:.3g}"))
            for n, a, b in zip(calibrate.NAMES, low, high, strict=True)
        },
        draws={
            n: tuple(float(f"{x:.3g}") for x in drawn[:, i]) for i, n in enumerate(calibrate.NAMES)
        },
        skew=fitted.skew,
        band=tuple(round(x, 4) for x in calibrate.band(found, fitted)),
        ranges={n: (min(v), max(v)) for n, v in numbers.items()} | names,
        source=f"aiconfigurator-core {measured.VERSION}, {measured.FILE}",
        date="2025-10 to 2026-04",
        rows=len(rows),
        sweeps=len({calibrate.sweep(r) for r in rows}),
    )
