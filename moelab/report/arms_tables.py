"""The tables of a comparison of arms, and the sentences that say what they can show."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moelab.report import formatting as fmt
from moelab.report import paired
from moelab.report.arms import VALIDATION, Arm, Comparison, Difference
from moelab.report.arms_rows import max_violation
from moelab.report.tables import Cell, Table

PAIRED = (
    "Differences are paired by seed: under one seed arms begin with the same values of the parameters that they share, "
    "and those that train on the same text see it in the same order. Intervals are Student's t over seeds; "
    "p of the t test is corrected by Holm for the arms of the table; the sign-flip test is exact and assumes no "
    "distribution."
)

_OF_ONE_PAIR = {  # by Difference.over
    "documents": "its interval is over documents alone",
    "nothing": "without its documents it has no interval",
}


def main_table(comparison: Comparison) -> Table:
    """Builds the table of arms: quality, difference to the reference with its tests, balance and cost."""
    heads = (
        "arm",
        "n",
        "bits per byte",
        "difference [95 %]",
        "p, t (Holm)",
        "p, sign flip",
        "detectable",
        "MaxVio",
        "active",
        "FLOPs/token",
        "training",
    )
    return Table(
        f"Bits per byte in {comparison.precision}; difference to {comparison.reference.name} over paired seeds",
        heads,
        tuple(_row(arm, comparison) for arm in comparison.arms),
    )


def _row(arm: Arm, comparison: Comparison) -> tuple[Cell, ...]:
    bits = list(arm.bits(comparison.precision).values())
    mean = float(np.mean(bits))
    found = comparison.differences.get(arm.name)
    violation, card = max_violation(arm, comparison.precision), arm.first.card
    flops, seconds = card["training"].get("flops_per_token"), arm.mean("training", "train_seconds")
    total, active = card["parameters"].get("total"), card["parameters"].get("active")
    return (
        Cell(
            arm.name + (" *" if arm.apart else ""),
            arm.name,
            detail=f"not ranked: {arm.apart}" if arm.apart else "",
        ),
        Cell(_runs(len(bits), found), len(bits)),
        Cell(fmt.fixed(mean, 4), mean, detail=_spread(bits)),
        _difference_cell(arm, comparison),
        _p(found),
        _flip(found),
        Cell(*_number(found.detectable if found else None, 4)),
        Cell(*_number(violation, 2)),
        Cell(fmt.compact(active), fmt.number(active), detail=f"of {fmt.compact(total)}"),
        Cell(fmt.compact(flops), fmt.number(flops)),
        Cell(fmt.duration(seconds), seconds),
    )


def _number(value: float | None, digits: int) -> tuple[str, float | None]:
    return ("", None) if value is None else (fmt.fixed(value, digits), value)


def _runs(n: int, found: Difference | None) -> str:
    """How many runs an arm has, and how many of them its difference is of, where these differ."""
    if found is None or found.n == n:
        return str(n)
    return f"{n} ({found.n} pair{'s' if found.n > 1 else ''})"


def _spread(bits: Sequence[float]) -> str:
    known = len(bits) > 1 and np.isfinite(bits).all()
    return f"sd {fmt.fixed(np.std(bits, ddof=1), 4)}" if known else ""


def _difference_cell(arm: Arm, comparison: Comparison) -> Cell:
    found = comparison.differences.get(arm.name)
    if arm is comparison.reference:
        return Cell("reference", 0.0)
    if arm.name in comparison.diverged:
        return Cell(f"diverged in {comparison.diverged[arm.name]} of {len(arm.runs)} runs")
    if found is None:
        return Cell("no seed in common")
    if math.isnan(found.mean):
        return Cell("the reference diverged")
    detail = f"one pair: over {found.over}" if found.over == "documents" else ""
    if found.over == "seeds" and found.both is not None:
        detail = "with documents " + _bounds(found.both.low, found.both.high)
    bounds = _bounds(found.low, found.high)
    return Cell(fmt.fixed(found.mean, 4, sign=True), found.mean, bounds, detail)


def _bounds(*bounds: float) -> str:
    return fmt.bounds(*(None if math.isnan(bound) else bound for bound in bounds))


def _p(found: Difference | None) -> Cell:
    if found is None or math.isnan(found.t):
        return Cell("")
    corrected = "" if math.isnan(found.holm) else f" ({fmt.p_value(found.holm)})"
    return Cell(fmt.p_value(found.t) + corrected, found.t)


def _flip(found: Difference | None) -> Cell:
    flip = found.sign_flip if found else None
    if flip is None:
        return Cell("")
    return Cell(fmt.p_value(flip.p, 4), flip.p, detail=f"least {flip.smallest:.3g}")


def points_table(comparison: Comparison) -> Table:
    """Lists every point: bits per byte by arm and seed, the difference to the reference in brackets."""
    seeds = sorted({seed for arm in comparison.arms for seed in arm.runs})
    body = []
    base = comparison.reference.bits(comparison.precision)
    for arm in comparison.arms:
        bits = arm.bits(comparison.precision)
        cells = [Cell(arm.name, arm.name)]
        for seed in seeds:
            value = bits.get(seed)
            bounds = ""
            paired_here = value is not None and seed in base and arm is not comparison.reference
            if paired_here and math.isfinite(value - base[seed]):
                bounds = f"({fmt.fixed(value - base[seed], 4, sign=True)})"
            cells.append(Cell("" if value is None else fmt.fixed(value, 4), value, bounds))
        body.append(tuple(cells))
    heads = ("arm", *(f"seed {seed}" for seed in seeds))
    return Table("Every point: bits per byte (difference to the reference)", heads, tuple(body))


def notes(comparison: Comparison) -> list[str]:
    """Says what so many seeds can show, of arms that did not diverge; what holds of every such table is in PAIRED."""
    compared = [d for d in comparison.differences.values() if math.isfinite(d.mean)]
    found = [d for d in compared if d.sign_flip is not None]
    told = []
    single = {d.over for d in compared if d.n == 1}
    if single:
        parts = [text for over, text in _OF_ONE_PAIR.items() if over in single]
        told.append(
            f"One pair of runs says nothing about the spread between seeds: {', '.join(parts)}."
        )
    if found:
        most = max(found, key=lambda d: d.n)
        smallest = most.sign_flip.smallest
        of = "" if min(d.n for d in found) == most.n else ", the most of this table,"
        told.append(
            f"With {most.n} pairs{of} the sign-flip test cannot give a p below {smallest:.3g}"
            + (", so it never reaches 0.05." if smallest > 0.05 else ".")
        )
        effects = [d.detectable for d in found]
        told.append(
            f"Detectable: the smallest true difference that these seeds would show with power {paired.POWER}; here "
            f"{_range(effects, '{:.4f}'.format)} bits per byte. A smaller one may exist unseen."
        )
        known = [d.correlation for d in found if not math.isnan(d.correlation.low)]
        if known:
            mean = float(np.mean([r.estimate for r in known]))
            clear = sum(r.low > 0 or r.high < 0 for r in known)
            arms = f"{len(known)} arm{'s' if len(known) != 1 else ''}"
            if 2 * clear <= len(known):
                meaning = "that pairing takes noise out is not shown for most"
            else:
                meaning = f"pairing takes {'noise' if mean > 0 else 'no noise'} out"
            told.append(
                f"Paired seeds correlate at {mean:.2f} (mean of {arms}; 0 lies outside {clear} of the intervals): "
                f"{meaning}."
            )
    if any(arm.apart for arm in comparison.arms):
        told.append("A star: not ranked with the others, and no hypothesis in Holm's correction.")
    return told


def limits(comparison: Comparison) -> str:
    """Says, from the cards, how far the table's numbers reach."""
    runs = [run for arm in comparison.arms for run in arm.runs.values()]
    cards = [run.card for run in runs]

    def distinct(read) -> list:
        return list(dict.fromkeys(value for card in cards if (value := read(card)) is not None))

    active = distinct(lambda c: fmt.number(c["parameters"].get("active")))
    tokens = distinct(lambda c: fmt.number(c["training"].get("tokens")))
    epochs = distinct(_epochs)
    machines = distinct(_machine)
    judged = [VALIDATION] if comparison.precision == VALIDATION else distinct(_evaluated)
    commits = distinct(
        lambda c: ((c["environment"].get("git") or {}).get("commit") or "")[:10] or None
    )
    seconds = math.fsum(fmt.number(c["training"].get("wall_seconds")) or 0.0 for c in cards)
    parts = [
        f"{_range(active, fmt.compact)} active parameters",
        f"{_range(tokens, fmt.compact)} training tokens"
        + (f" ({_range(epochs, '{:.2g}'.format)} epochs)" if epochs else ""),
        f"{len(runs)} runs, {fmt.duration(seconds)} of machine time in all",
        f"on {' and '.join(map(str, machines)) or 'an unknown machine'}",
        f"at {len(commits)} commit{'s' if len(commits) != 1 else ''}",
        f"evaluated on {' and '.join(judged)}",
    ]
    text = "Known limits: " + ", ".join(parts) + ". "
    if any((c["environment"].get("git") or {}).get("dirty") for c in cards):
        text += "Some runs had uncommitted changes. "
    if any(c["data"].get("fallback") for c in cards):
        text += "The corpus was the fallback. "
    if len(tokens) > 1:
        text += "Arms trained on different numbers of tokens. "
    if epochs and max(epochs) < 1:
        text += "Less than an epoch: repetition cannot show. "
    text += "Intervals over seeds do not hold that other documents might have been drawn. "
    return text + "Order and size of differences may change with scale, length and data."


def _epochs(card: dict) -> float | None:
    passes = fmt.number((card["data"].get("mixture") or {}).get("epochs"))
    if passes:  # of a part of the text, or of its domains at other weights
        return passes
    have = fmt.number((card["data"].get("tokens") or {}).get("train"))
    used = fmt.number(card["training"].get("tokens"))
    return used / have if have and used else None


def _machine(card: dict) -> str | None:
    """Says on what a run was: the processor with its vectors and the cores that the run had, or another device."""
    known = card["environment"]
    name = known.get("cpu") or (known.get("devices") or {}).get("kind")
    cores = known.get("cores")
    jax = (known.get("packages") or {}).get("jax")
    more = [
        known.get("simd"),
        f"{cores} core{'s' if cores != 1 else ''} a run" if cores else None,
        f"jax {jax}" if jax else None,
    ]
    told = ", ".join(part for part in more if part)
    return f"{name} ({told})" if name and told else name


def _evaluated(card: dict) -> str | None:
    found = card["evaluation"]
    documents, tokens = fmt.number(found.get("documents")), fmt.number(found.get("tokens"))
    if not documents or not tokens:
        return None
    return f"{documents:,.0f} documents ({tokens:,.0f} tokens) of the {found.get('split')} split"


def _range(values: Sequence[float], form) -> str:
    if not values:
        return "unknown"
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"
