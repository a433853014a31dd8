"""Curves through the arms of a report: loss against size, budget by budget, or against the granularity of experts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from moelab import spelling
from moelab.report import canvas, fits
from moelab.report import formatting as fmt
from moelab.report.arms import Arm, Comparison
from moelab.report.runs import ReportError
from moelab.report.statistics import Interval

KINDS = ("isoflop", "granularity")
_EQUAL = 0.05  # by which what must be equal may differ, relative


@dataclasses.dataclass(frozen=True)
class Part:
    """One curve and the points that it is through.

    Attributes:
      label: of the budget; empty where there is one curve.
      x: of each arm.
      bits_SX: bits per byte of each seed and arm.
      curve: bits per byte of the mean seed over x.
    """

    label: str
    x: np.ndarray
    bits_SX: np.ndarray
    curve: Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A fit of the arms' bits per byte.

    Attributes:
      kind: of KINDS.
      axis: what x is.
      parts: the curves.
      result: the numbers, for JSON.
      sentence: what it says.
    """

    kind: str
    axis: str
    parts: tuple[Part, ...]
    result: dict[str, Any]
    sentence: str


def fit(comparison: Comparison, kind: str) -> Fitted:
    """Fits the ranked arms over the seeds that all of them have.

    Args:
      comparison: arms that differ in size (isoflop: several sizes at each budget of training FLOPs; from three budgets
        on how the best size grows) or in the width of their experts (granularity: at equal total and active
        parameters).
      kind: of KINDS.

    Raises:
      ReportError: another kind, arms that this cannot be asked of, or too few of them.
    """
    if kind not in KINDS:
        guess = spelling.hint(kind, KINDS, "--fit=") or f"; there are {', '.join(KINDS)}"
        raise ReportError(f"no fit {kind!r}{guess}")
    arms = [arm for arm in comparison.arms if not arm.apart]
    for arm in arms:
        if arm.name in comparison.diverged:
            count = comparison.diverged[arm.name]
            raise ReportError(
                f"--fit={kind}: {arm.name} diverged in {count} of {len(arm.runs)} runs"
            )
    seeds = sorted(set.intersection(*(set(arm.runs) for arm in arms))) if arms else []
    if not seeds:
        raise ReportError(f"--fit={kind} wants arms with a seed in common")
    bits = [arm.bits(comparison.precision) for arm in arms]
    bits_SX = np.array([[values[seed] for values in bits] for seed in seeds])
    try:
        return (_isoflop if kind == "isoflop" else _granularity)(arms, bits_SX)
    except ValueError as error:
        raise ReportError(
            f"--fit={kind} of {len(arms)} arms and {len(seeds)} seeds: {error}"
        ) from None


def _isoflop(arms: list[Arm], bits_SX: np.ndarray) -> Fitted:
    budgets = _budgets(arms)
    parts, results, told = [], [], []
    for flops, places in budgets:
        label = f"{fmt.compact(flops)} training FLOPs"
        if len(budgets) > 1 and len(places) < 3:
            raise ReportError(
                f"--fit=isoflop wants three sizes at each budget; at {label} there is only "
                f"{' and '.join(arms[i].name for i in places)}"
            )
        x = np.array([_number(arms[i], "parameters", "active") for i in places])
        part_SX = bits_SX[:, places]
        found = fits.isoflop(x, part_SX)
        coefficients = np.polyfit(np.log(x), part_SX.mean(axis=0), 2)
        parts.append(
            Part(
                label if len(budgets) > 1 else "",
                x,
                part_SX,
                lambda v, coefficients=coefficients: np.polyval(coefficients, np.log(v)),
            )
        )
        results.append(
            {
                "training_flops": flops,
                "size": found.size._asdict(),
                "bits_per_byte": found.loss._asdict(),
                "inside": found.inside,
            }
        )
        at = f"at {label} " if len(budgets) > 1 else ""
        told.append(at + _bottom(found, len(part_SX)))
    sentence = f"IsoFLOP, a parabola in log size with a level per seed: {'; '.join(told)}."
    if len(budgets) == 1:
        return Fitted("isoflop", "active parameters", tuple(parts), results[0], sentence)
    growth = _growth(results)
    result = {"budgets": results, "exponent": growth.exponent._asdict() if growth else None}
    return Fitted(
        "isoflop", "active parameters", tuple(parts), result, f"{sentence} {_grows(growth)}"
    )


def _budgets(arms: list[Arm]) -> list[tuple[float, list[int]]]:
    """Training FLOPs and the places of the arms that have about as many, from the smallest on."""
    found: list[tuple[float, list[int]]] = []
    for flops, place in sorted((_flops(arm), i) for i, arm in enumerate(arms)):
        if found and flops <= (1 + _EQUAL) * found[-1][0]:
            found[-1][1].append(place)
        else:
            found.append((flops, [place]))
    return found


def _bottom(found: fits.IsoFlop, seeds: int) -> str:
    size, loss = found.size, found.loss
    if math.isnan(size.estimate):
        return "the points have no minimum"
    bounds = f"[{fmt.compact(size.low)}, {fmt.compact(size.high)}]"
    where = "" if found.inside else ", outside the sizes that ran"
    told = f"least bits per byte at {fmt.compact(size.estimate)} active parameters {bounds}{where}"
    return told if math.isnan(loss.estimate) else f"{told}: {_loss(loss, seeds)}"


def _growth(results: list[dict[str, Any]]) -> fits.PowerLaw | None:
    """The best size over budgets, of those budgets whose best size lies among the sizes that ran; None below three."""
    shown = [one for one in results if one["inside"]]
    if len(shown) < 3:
        return None
    return fits.power_law(
        [one["training_flops"] for one in shown], [one["size"]["estimate"] for one in shown]
    )


def _grows(growth: fits.PowerLaw | None) -> str:
    if growth is None:
        return (
            "How the best size grows wants three budgets with a minimum among the sizes that ran."
        )
    e = growth.exponent
    return (
        f"The best size grows as training FLOPs^{e.estimate:.2f} [{e.low:.2f}, {e.high:.2f}], from {growth.n} budgets; "
        "what is unsure about each best size is not in it."
    )


def _loss(loss: Interval, seeds: int) -> str:
    of = "" if seeds > 1 else " of this seed"
    return f"{loss.estimate:.4f} [{loss.low:.4f}, {loss.high:.4f}]{of}"


def _granularity(arms: list[Arm], bits_SX: np.ndarray) -> Fitted:
    for key in ("active", "total"):
        _check_equal(
            arms, f"{key} parameters", lambda arm, key=key: _number(arm, "parameters", key)
        )
    width = np.array([_number(arm, "config", "moe", "expert_width") for arm in arms])
    x = width.max() / width
    found = fits.granularity(x, bits_SX)
    e = found.exponent
    result = {"exponent": e._asdict(), "floor": found.floor, "gain": found.gain}
    told = f"exponent {e.estimate:.2f} [{e.low:.2f}, {e.high:.2f}], floor {found.floor:.4f}, gain {found.gain:.4f}."
    if math.isnan(e.estimate):
        told = f"no gain: the points are all at {found.floor:.4f}."
    elif e.low == 0 or e.high == math.inf:
        told += " The points do not pin it down."

    def curve(v: np.ndarray) -> np.ndarray:
        return found.floor + (found.gain * v**-e.estimate if found.gain else 0 * v)

    return Fitted(
        "granularity",
        "granularity (widest expert over expert width)",
        (Part("", x, bits_SX, curve),),
        result,
        f"Granularity, floor + gain * g^-exponent with a level per seed: {told}",
    )


def _number(arm: Arm, *path: str) -> float:
    value: Any = arm.first.card
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    found = fmt.number(value)
    if not found:
        raise ReportError(f"{arm.name} has no {'.'.join(path)}: it cannot be fitted")
    return found


def _flops(arm: Arm) -> float:
    return _number(arm, "training", "flops_per_token") * _number(arm, "training", "tokens")


def _check_equal(arms: list[Arm], what: str, read: Callable[[Arm], float]) -> None:
    values = {arm.name: read(arm) for arm in arms}
    low, high = min(values, key=values.get), max(values, key=values.get)
    if values[high] > (1 + _EQUAL) * values[low]:
        raise ReportError(
            f"this fit wants equal {what}; {low} has {fmt.compact(values[low])} and {high} "
            f"{fmt.compact(values[high])}"
        )


def figure(found: Fitted) -> canvas.Figure:
    """Draws the arms' points and the curve of the mean seed."""
    with canvas.single(3.4) as (drawing, axes):
        for i, part in enumerate(found.parts):
            several = len(found.parts) > 1
            points, line = (i, i) if several else (0, 5)
            points, line = (canvas.PALETTE[c % len(canvas.PALETTE)] for c in (points, line))
            for bits_X in part.bits_SX:
                axes.plot(part.x, bits_X, "o", color=points, ms=3.5, alpha=0.4)
            axes.plot(part.x, part.bits_SX.mean(axis=0), "D", color=points, ms=5)
            x = np.geomspace(part.x.min(), part.x.max(), 200)
            axes.plot(x, part.curve(x), color=line, lw=1.6, label=part.label)
        if several:
            axes.legend(frameon=False)
        write = fmt.compact if found.kind == "isoflop" else "{:g}".format
        canvas.positive_axis(axes, np.concatenate([part.x for part in found.parts]), write)
        canvas.label_axes(axes, found.axis, "bits per byte")
        caption = f"Points: seeds; diamonds: their mean; line: the fit. {found.sentence}"
        title = {"isoflop": "Quality against size", "granularity": "Quality against granularity"}
        return canvas.Figure(title[found.kind], caption, canvas.to_svg(drawing, "fit"))
