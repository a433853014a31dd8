"""Figures of a comparison of arms: differences with every point, learning curves with bands, Pareto fronts, loads.

S seeds, A arms, T steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moelab.report import canvas, crossing, heat_maps
from moelab.report import formatting as fmt
from moelab.report.arms import VALIDATION, Arm, Comparison
from moelab.report.documents import ALL
from moelab.report.runs import REFERENCE, Run

_MOST_CURVES, _MOST_MAPS = 12, 10  # more cannot be told apart
_STYLES = ("-", "--", ":")


def figures(comparison: Comparison) -> list[canvas.Figure]:
    """Draws every figure that the cards and journals allow."""
    made = [differences(comparison), curves(comparison)]
    made += [pareto(comparison, axis) for axis in COSTS]
    made += [crossing.figure(comparison), domains(comparison)]
    return [figure for figure in made if figure is not None]


def differences(comparison: Comparison) -> canvas.Figure | None:
    """Draws each arm's paired differences: every seed as a point, the mean with its interval."""
    shown = [arm for arm in comparison.arms if arm.name in comparison.differences]
    shown = [arm for arm in shown if math.isfinite(comparison.differences[arm.name].mean)]
    if not shown:
        return None
    with canvas.single(0.9 + 0.32 * len(shown)) as (figure, axes):
        for y, arm in enumerate(shown):
            found = comparison.differences[arm.name]
            color = canvas.PALETTE[6] if arm.apart else canvas.PALETTE[0]
            points = [b - a for a, b in found.pairs.values()]
            axes.plot(points, [y] * len(points), "o", color=color, ms=3.5, alpha=0.45)
            if math.isfinite(found.low):
                axes.plot([found.low, found.high], [y, y], color=color, lw=1.8)
            axes.plot(found.mean, y, "D", color=color, ms=5)
        axes.axvline(0, color=canvas.INK, lw=0.9)
        axes.set_yticks(
            range(len(shown)), [arm.name + (" *" if arm.apart else "") for arm in shown]
        )
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.xaxis.get_major_locator().set_params(nbins=5)
        canvas.label_axes(axes, f"bits per byte more than {comparison.reference.name}", "")
        return canvas.Figure(
            "Differences over paired seeds",
            "Points: one seed each. Diamonds: their mean with its 95 % interval (Student's t over seeds; of a single "
            "pair, over documents). Left of the line is better.",
            canvas.to_svg(figure, "differences"),
        )


def curves(comparison: Comparison) -> canvas.Figure | None:
    """Draws training loss: the mean over seeds, with a band from the lowest to the highest seed."""
    shown = [arm for arm in comparison.arms if any(r.records("train") for r in arm.runs.values())]
    if not shown:
        return None
    hidden = len(shown) - _MOST_CURVES
    late = []
    with canvas.single(3.6) as (figure, axes):
        for i, arm in enumerate(shown[:_MOST_CURVES]):
            step_T, loss_ST = _losses(arm)
            color = _color(i)
            style = _STYLES[i // len(canvas.PALETTE) % len(_STYLES)]
            low_T, high_T = loss_ST.min(axis=0), loss_ST.max(axis=0)
            if len(loss_ST) > 1:
                axes.fill_between(step_T, low_T, high_T, color=color, alpha=0.18, lw=0)
            axes.plot(step_T, loss_ST.mean(axis=0), style, color=color, lw=1.6, label=arm.name)
            late += [*loss_ST[:, len(step_T) // 10 :].ravel()]
        canvas.label_axes(axes, "optimizer step", "training loss [nats per token]")
        finite = np.array([v for v in late if math.isfinite(v)])
        if finite.size > 10:  # the first tenth would flatten the rest
            room = 0.05 * (np.ptp(finite) + 1e-3)
            axes.set_ylim(finite.min() - room, finite.max() + room)
        axes.legend(frameon=False, loc="upper right", ncols=2 if len(shown) > 4 else 1)
        return canvas.Figure(
            "Learning curves",
            "Moving average of the training loss without balancing losses: mean over seeds, band from the lowest to "
            "the highest seed."
            + (f" The {hidden} arms of highest loss are not drawn." if hidden > 0 else ""),
            canvas.to_svg(figure, "curves"),
        )


def _losses(arm: Arm) -> tuple[np.ndarray, np.ndarray]:
    """Smoothed losses of all seeds at the steps that all of them logged."""
    by_seed = []
    for run in arm.runs.values():
        train = run.records("train")
        steps = np.array([r["step"] for r in train], float)
        losses = np.array([_or_nan(r.get("loss")) for r in train])
        if steps.size:
            by_seed.append(dict(zip(steps, canvas.smooth(losses), strict=True)))
    common = sorted(set.intersection(*(set(found) for found in by_seed)))
    loss_ST = np.array([[found[step] for step in common] for found in by_seed])
    limit = 400
    if len(common) > limit:
        keep = np.linspace(0, len(common) - 1, limit).astype(int)
        return np.array(common)[keep], loss_ST[:, keep]
    return np.array(common), loss_ST


def _seconds(value: float) -> str:
    return fmt.duration(value) if value >= 10 else f"{value:.2f} s"


# Name of the axis -> (title, caption, how a run's value is read, how a tick is written).
COSTS = {
    "bytes": ("Quality against bytes", "bytes of weights", fmt.size),
    "flops": ("Quality against compute", "training FLOPs per token", fmt.compact),
    "seconds": ("Quality against wall time", "seconds of training", _seconds),
}


def pareto(comparison: Comparison, axis: str) -> canvas.Figure | None:
    """Draws bits per byte against a cost, the arms that nothing beats in both on a line."""
    title, label, form = COSTS[axis]
    points = _points(comparison, axis)
    if len({point.cost for point in points}) < 2:
        return None
    front = pareto_front([(point.cost, point.mean) for point in points])
    colors = {arm.name: _color(i) for i, arm in enumerate(comparison.arms)}
    several = axis == "bytes" and any(len(arm.first.rows) > 1 for arm in comparison.arms)
    with canvas.single(3.9) as (figure, axes):
        ranked = [points[i] for i in front if not points[i].apart]
        axes.plot([p.cost for p in ranked], [p.mean for p in ranked], color=canvas.RULE, lw=1.4)
        for point in points:
            color = colors[point.arm]
            if not several:
                axes.plot([point.cost] * 2, [point.low, point.high], color=color, lw=1.2, alpha=0.6)
            axes.plot(point.cost, point.mean, "D" if point.apart else "o", color=color, ms=5)
        canvas.positive_axis(axes, [point.cost for point in points], form)
        _labels(axes, [p for p in points if p.label and (not several or p in ranked)])
        if several:
            for name, color in colors.items():
                axes.plot([], [], "o", color=color, label=name)
            axes.legend(frameon=False, loc="upper right", ncols=2 if len(colors) > 6 else 1)
        precision = "" if several else f", {comparison.precision}"
        canvas.label_axes(axes, label, f"bits per byte{precision}")
        text = "Mean over seeds; lower left is better; grey line: what nothing beats in both."
        if several:
            text = (
                "Every precision of the evaluation is a point, named where nothing beats it. "
                + text
            )
        else:
            text += " Bars: from the lowest to the highest seed."
        if axis == "seconds":
            text += _machines(comparison)
        if axis == "bytes":
            text += " All weights as they were evaluated: experts packed, with their scales; the others in float32,"
            text += " under bf16 in bfloat16."
        return canvas.Figure(title, text, canvas.to_svg(figure, f"pareto-{axis}"))


def _color(index: int) -> str:
    return canvas.PALETTE[index % len(canvas.PALETTE)]


def _labels(axes: Any, points: Sequence[_Point]) -> None:
    """Writes each point's label right of it, those of neighbours pushed apart."""
    low, high = axes.get_ylim()
    gap, placed = 0.055 * (high - low), []
    left, right = axes.get_xlim()
    wide = math.log(right / left) if axes.get_xscale() == "log" else right - left
    for point in sorted(points, key=lambda point: point.mean):
        place = math.log(point.cost) if axes.get_xscale() == "log" else point.cost
        height = point.mean
        for other_place, other_height in sorted(placed, key=lambda p: p[1]):
            if abs(place - other_place) < 0.15 * wide and abs(height - other_height) < gap:
                height = other_height + gap
        placed.append((place, height))
        arrow = {"arrowstyle": "-", "lw": 0.5, "color": canvas.RULE, "shrinkA": 0, "shrinkB": 2}
        x = math.exp(place + 0.015 * wide) if axes.get_xscale() == "log" else place + 0.015 * wide
        axes.annotate(
            point.label,
            (point.cost, point.mean),
            xytext=(x, height),
            fontsize=9,
            va="center",
            arrowprops=arrow if height != point.mean else None,
        )


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Returns the places of the points that no other is at least as good as in both, by their first number.

    >>> pareto_front([(1, 3), (2, 2), (3, 2.5), (4, 1)])
    [0, 1, 3]
    """
    best, front = math.inf, []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if points[i][1] < best:
            best = points[i][1]
            front.append(i)
    return front


class _Point(NamedTuple):
    cost: float
    mean: float
    low: float  # of the seeds
    high: float
    arm: str
    label: str
    apart: bool


def _points(comparison: Comparison, axis: str) -> list[_Point]:
    """Each arm's cost and bits per byte; for bytes those of each arm and precision, which the test split alone has."""
    found = []
    for arm in comparison.arms:
        if axis == "bytes" and comparison.precision == VALIDATION:
            continue
        if axis == "bytes":
            several = len(arm.first.rows) > 1
            for row in arm.first.rows:
                name = row["precision"]
                label = name if several else arm.name
                found.append((weight_bytes(arm.first, row), _seeds(arm, name), arm, label))
        else:
            key = "flops_per_token" if axis == "flops" else "train_seconds"
            bits = list(arm.bits(comparison.precision).values())
            found.append((arm.mean("training", key), bits, arm, arm.name))
    return [
        _Point(x, float(np.mean(b)), min(b), max(b), arm.name, label, bool(arm.apart))
        for x, b, arm, label in found
        if x and b and np.isfinite(b).all()
    ]


def weight_bytes(run: Run, row: Mapping[str, Any]) -> float | None:
    """Bytes of all weights as a row was evaluated: experts as packed, the others at 2 bytes in bfloat16, at 4 else.

    None where the card does not tell.
    """
    total = fmt.number(run.card["parameters"].get("total"))
    plain = next((r for r in run.rows if r["precision"] == REFERENCE), {})
    experts, packed = (fmt.number(r.get("expert_bytes")) for r in (plain, row))
    if total is None or experts is None or packed is None:
        return None
    return packed + (total - experts / 4) * (2 if row["precision"] == "bf16" else 4)


def _seeds(arm: Arm, precision: str) -> list[float]:
    values = []
    for run in arm.runs.values():
        row = next((r for r in run.rows if r["precision"] == precision), {})
        values.append(fmt.number((row.get("bits_per_byte") or {}).get(ALL)))
    return [] if None in values else values


def _machines(comparison: Comparison) -> str:
    runs = [run for arm in comparison.arms for run in arm.runs.values()]
    kinds = {(r.card["environment"].get("cpu"), r.card["environment"].get("cores")) for r in runs}
    return "" if len(kinds) == 1 else " The runs were on different machines: times do not compare."


def domains(comparison: Comparison) -> canvas.Figure | None:
    """Draws which experts serve which domain, in the last MoE layer of each arm's first seed."""
    panels, titles, names = [], [], ()
    for arm in comparison.arms:
        share_LDE = arm.first.card["evaluation"].get("load_by_domain")
        if not share_LDE or not arm.first.domains:
            continue
        share_DE = np.array([[_or_nan(v) for v in row] for row in share_LDE[-1]])
        panels.append(share_DE * share_DE.shape[-1])
        titles.append(arm.name)
        names = arm.first.domains
    hidden = len(panels) - _MOST_MAPS
    widths = {panel.shape for panel in panels}
    if not panels or len(widths) > 1:  # arms of different numbers of experts share no axis
        panels, titles = _widest(panels, titles)
    if not panels:
        return None
    return canvas.Figure(
        "Experts by domain, by arm",
        "Share of a domain's assignments per expert in the last MoE layer, first seed, relative to an even share."
        + (f" {hidden} more arms are not drawn." if hidden > 0 else ""),
        heat_maps.stacked(
            "arms-domains",
            panels[:_MOST_MAPS],
            titles[:_MOST_MAPS],
            height=0.42 + 0.15 * len(names),
            x="expert",
            rows=names,
        ),
    )


def _widest(panels: list, titles: list) -> tuple[list, list]:
    """Keeps the panels of the commonest shape."""
    if not panels:
        return [], []
    shapes = [panel.shape for panel in panels]
    common = max(shapes, key=shapes.count)
    kept = [i for i, shape in enumerate(shapes) if shape == common]
    return [panels[i] for i in kept], [titles[i] for i in kept]


def _or_nan(value: Any) -> float:
    x = fmt.number(value)
    return math.nan if x is None else x
