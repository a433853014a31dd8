"""A curve through the arms of a report: loss against size at one budget, or against the granularity of experts."""

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
class Fitted:
    """A fit of the arms' bits per byte.

    Attributes:
      kind: of KINDS.
      axis: what x is.
      x: of each arm.
      bits_SX: bits per byte of each seed and arm.
      result: the numbers, for JSON.
      sentence: what it says.
      curve: bits per byte of the mean seed over x.
    """

    kind: str
    axis: str
    x: np.ndarray
    bits_SX: np.ndarray
    result: dict[str, Any]
    sentence: str
    curve: Callable[[np.ndarray], np.ndarray]


def fit(comparison: Comparison, kind: str) -> Fitted:
    """Fits the ranked arms over the seeds that all of them have.

    Args:
      comparison: arms that differ in size (isoflop: at equal training FLOPs) or in the width of their experts
        (granularity: at equal total and active parameters).
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
    _check_equal(arms, "training FLOPs", _flops)
    x = np.array([_number(arm, "parameters", "active") for arm in arms])
    found = fits.isoflop(x, bits_SX)
    size, loss = found.size, found.loss
    bounds = f"[{fmt.compact(size.low)}, {fmt.compact(size.high)}]"
    if math.isnan(size.estimate):
        told = "the points have no minimum."
    else:
        where = "" if found.inside else ", outside the sizes that ran"
        told = (
            f"least bits per byte at {fmt.compact(size.estimate)} active parameters {bounds}{where}"
        )
        told += "." if math.isnan(loss.estimate) else f": {_loss(loss, len(bits_SX))}."
    coefficients = np.polyfit(np.log(x), bits_SX.mean(axis=0), 2)
    result = {"size": size._asdict(), "bits_per_byte": loss._asdict(), "inside": found.inside}
    return Fitted(
        "isoflop",
        "active parameters",
        x,
        bits_SX,
        result,
        f"IsoFLOP, a parabola in log size with a level per seed: {told}",
        lambda v: np.polyval(coefficients, np.log(v)),
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
    return Fitted(
        "granularity",
        "granularity (widest expert over expert width)",
        x,
        bits_SX,
        result,
        f"Granularity, floor + gain * g^-exponent with a level per seed: {told}",
        lambda v: found.floor + (found.gain * v**-e.estimate if found.gain else 0 * v),
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
        for bits_X in found.bits_SX:
            axes.plot(found.x, bits_X, "o", color=canvas.PALETTE[0], ms=3.5, alpha=0.4)
        axes.plot(found.x, found.bits_SX.mean(axis=0), "D", color=canvas.PALETTE[0], ms=5)
        line = np.geomspace(found.x.min(), found.x.max(), 200)
        axes.plot(line, found.curve(line), color=canvas.PALETTE[5], lw=1.6)
        write = fmt.compact if found.kind == "isoflop" else "{:g}".format
        canvas.positive_axis(axes, found.x, write)
        canvas.label_axes(axes, found.axis, "bits per byte")
        caption = f"Points: seeds; diamonds: their mean; line: the fit. {found.sentence}"
        title = {"isoflop": "Quality against size", "granularity": "Quality against granularity"}
        return canvas.Figure(title[found.kind], caption, canvas.to_svg(drawing, "fit"))
