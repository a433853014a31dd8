"""Where one arm overtakes another as compute grows: validation against training FLOPs, and the crossing's interval.

S seeds, X budgets.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moelab.report import canvas, fits
from moelab.report import formatting as fmt
from moelab.report.arms import Arm, Comparison
from moelab.report.documents import ALL
from moelab.report.runs import Run

_ROUNDING = 1e-9  # relative, of a number that went through its logarithm
CAPTION = (
    "As trained, on the validation split; mean over seeds, band from the lowest to the highest. Where a schedule "
    "decays at its end, earlier points are of an undecayed learning rate."
)


def validation(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Returns training FLOPs and bits per byte on the validation split at each look; both empty without one."""
    training = run.card["training"]
    per_token, tokens, steps = (
        fmt.number(training.get(k)) for k in ("flops_per_token", "tokens", "steps")
    )
    found = []
    for record in run.records("evaluation"):
        bits = fmt.number((record.get("bits_per_byte") or {}).get(ALL))
        if record.get("split") == "validation" and bits is not None and math.isfinite(bits):
            found.append((record["step"], bits))
    if not (found and per_token and tokens and steps):
        return np.empty(0), np.empty(0)
    step_X, bits_X = np.array(found, float).T
    return step_X * tokens / steps * per_token, bits_X


def crossings(base: Arm, arm: Arm) -> list[fits.Crossover] | None:
    """Finds where two arms are equal in validation bits per byte at equal FLOPs; None where it cannot be asked.

    Seeds that both have are compared over the FLOPs that all of them cover, their curves lines in log FLOPs. Bounds
    reach to the looks around them: what lies between two looks is not known.
    """
    seeds = sorted(base.runs.keys() & arm.runs.keys())
    curves = [[validation(a.runs[seed]) for seed in seeds] for a in (base, arm)]
    looks = [flops for side in curves for flops, _ in side if flops.size > 1]
    if len(looks) < 2 * len(seeds) or len(seeds) < 2:
        return None
    low, high = max(flops.min() for flops in looks), min(flops.max() for flops in looks)
    if not low < high:
        return None
    budget_X = np.unique(
        np.concatenate([flops[(low <= flops) & (flops <= high)] for flops in looks])
    )
    a_SX, b_SX = (
        np.array([np.interp(np.log(budget_X), np.log(f), bits) for f, bits in side])
        for side in curves
    )
    return [_between_looks(one, looks) for one in fits.crossovers(budget_X, a_SX, b_SX)]


def of_arm(arm: Arm, comparison: Comparison) -> list[fits.Crossover] | None:
    """Finds where an arm crosses the reference; None where arms cost the same, or one of the two diverged."""
    base = comparison.reference
    lost = comparison.diverged.keys() & {arm.name, base.name}
    return None if arm is base or lost or not _asked(comparison) else crossings(base, arm)


def _between_looks(found: fits.Crossover, looks: Sequence[np.ndarray]) -> fits.Crossover:
    """Widens the bounds to the looks of either arm around them."""
    place = found.place
    below = [flops[flops <= place.low * (1 + _ROUNDING)] for flops in looks]
    above = [flops[flops >= place.high * (1 - _ROUNDING)] for flops in looks]
    low = min([place.low, *(float(flops.max()) for flops in below if flops.size)])
    high = max([place.high, *(float(flops.min()) for flops in above if flops.size)])
    return found._replace(place=place._replace(low=low, high=high))


def _asked(comparison: Comparison) -> bool:
    """Whether arms differ in compute: else the learning curves say it all."""
    costs = {
        tuple(fmt.number(arm.first.card["training"].get(k)) for k in ("flops_per_token", "tokens"))
        for arm in comparison.arms
    }
    return len(costs) > 1


def notes(comparison: Comparison) -> list[str]:
    """Says of each arm where it crosses the reference, and of which no crossing is shown; first, of which numbers.

    Nothing is said of arms that diverged.
    """
    told, without, base = [], [], comparison.reference.name
    for arm in comparison.arms:
        found = of_arm(arm, comparison)
        for place, b_gains in found or ():
            way = "better beyond" if b_gains else "worse beyond"
            bounds = f"[{place.low:.3g}, {place.high:.3g}]"
            told.append(
                f"{arm.name} crosses {base} at {place.estimate:.3g} {bounds} training FLOPs, {way}."
            )
        if found == []:
            without.append(arm.name)
    if without:
        told.append(
            f"No crossing with {base} is shown, within the FLOPs that both have, for {', '.join(without)}."
        )
    if not told:
        return []
    return [
        "Crossings are of the curves on the validation split, as trained, not of the numbers in the table: in high "
        "precision until a recipe starts, with an undecayed learning rate until a schedule decays. Bounds reach to the "
        "looks around them.",
        *told,
    ]


def drawable(comparison: Comparison) -> bool:
    """Says whether there is anything to draw: two arms of different compute that looked more than once."""
    return len(_shown(comparison)) > 1


def figure(comparison: Comparison) -> canvas.Figure | None:
    """Draws validation against training FLOPs: mean over seeds, band from the lowest to the highest."""
    if not drawable(comparison):
        return None
    with _drawn(comparison) as drawing:
        return canvas.Figure(
            "Validation against compute",
            f"{CAPTION} {' '.join(notes(comparison))}",
            canvas.to_svg(drawing, "compute"),
        )


def write_png(comparison: Comparison, path: Path, made_from: str) -> None:
    """Writes that figure of a `drawable` comparison as a picture."""
    with _drawn(comparison) as drawing:
        canvas.to_png(drawing, path, made_from)


def _shown(comparison: Comparison) -> list[tuple[Arm, np.ndarray, np.ndarray]]:
    curves = [(arm, *_mean_curve(arm)) for arm in comparison.arms] if _asked(comparison) else []
    return [found for found in curves if found[1].size > 1]


@contextlib.contextmanager
def _drawn(comparison: Comparison) -> Iterator[Any]:
    shown = _shown(comparison)
    columns = 2 if len(shown) > 4 else 1
    with canvas.single(3.6 + 0.22 * -(-len(shown) // columns)) as (drawing, axes):
        for i, (arm, flops_X, bits_SX) in enumerate(shown):
            color = canvas.PALETTE[i % len(canvas.PALETTE)]
            style = ("-", "--", ":")[i // len(canvas.PALETTE) % 3]
            if len(bits_SX) > 1:
                low_X, high_X = bits_SX.min(axis=0), bits_SX.max(axis=0)
                axes.fill_between(flops_X, low_X, high_X, color=color, alpha=0.18, lw=0)
            axes.plot(flops_X, bits_SX.mean(axis=0), style, color=color, lw=1.6, label=arm.name)
        every = np.concatenate([flops_X for _, flops_X, _ in shown])
        canvas.positive_axis(axes, every, "{:.3g}".format)
        # Above: curves of different compute begin and end all over the panel.
        drawing.legend(frameon=False, loc="outside upper left", ncols=columns)
        canvas.label_axes(axes, "training FLOPs", "bits per byte, validation")
        yield drawing


def _mean_curve(arm: Arm) -> tuple[np.ndarray, np.ndarray]:
    curves: Sequence[tuple[np.ndarray, np.ndarray]] = [validation(r) for r in arm.runs.values()]
    lengths = {flops.size for flops, _ in curves}
    if len(lengths) != 1:  # seeds that looked at other steps
        return np.empty(0), np.empty((0, 0))
    return curves[0][0], np.array([bits for _, bits in curves])
