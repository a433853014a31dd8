"""The planner's figures as inline SVG for its pages and notebooks; the extra `report` draws them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moelab.plan.claim import Claim
from moelab.plan.search import Found
from moelab.report import canvas


def name_of(found: Found) -> str:
    """Returns "gb200x72 nvfp4"."""
    return f"{found.system.name} {found.recipe.name}"


def pareto(results: Sequence[Found]) -> canvas.Figure:
    """Draws every system's front with its 80 % band: tokens/s/GPU against tokens/s/user."""
    with canvas.single(3.6) as (figure, axes):
        for i, found in enumerate(results):
            front, color = found.front(), canvas.PALETTE[i % len(canvas.PALETTE)]
            user, rate = found.user[front], found.throughput[front]
            axes.plot(user, rate, "o-", ms=3, lw=1.5, color=color, label=name_of(found))
            # A step that takes f times as long moves a point by 1/f in both.
            slow, fast = found.high[front], found.low[front]
            x = np.concatenate([user / slow, (user / fast)[::-1]])
            y = np.concatenate([rate / slow, (rate / fast)[::-1]])
            axes.fill(x, y, color=color, alpha=0.12, lw=0)
        axes.set_yscale("log")
        axes.set_xscale("log")
        for axis in (axes.xaxis, axes.yaxis):  # plain numbers: the canvas typesets no mathematics
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        canvas.label_axes(axes, "tokens/s/user", "tokens/s/GPU")
        axes.legend(frameon=False)
        return canvas.Figure(
            "Speed against throughput",
            "Output tokens. Every point is the best layout and batch at its speed; shaded: 80 % band.",
            canvas.to_svg(figure, "pareto"),
        )


def bars(claim: Claim) -> canvas.Figure | None:
    """Draws a claim's numbers; nothing where it has none."""
    if not claim.bars:
        return None
    labels, values = zip(*claim.bars, strict=True)
    with canvas.single(0.9 + 0.34 * len(values)) as (figure, axes):
        place = np.arange(len(values))[::-1]
        axes.barh(place, values, color=canvas.PALETTE[0], height=0.6)
        axes.set_yticks(place, labels)
        for y, value in zip(place, values, strict=True):
            axes.annotate(
                f" {value:.3g}", (max(value, 0), y), va="center", fontsize=10, color=canvas.INK
            )
        axes.margins(x=0.15)
        canvas.label_axes(axes, claim.unit, "")
        return canvas.Figure(
            claim.claim, f"{claim.verdict}: {claim.because}", canvas.to_svg(figure, claim.name)
        )


def joint(rows: Sequence[dict]) -> canvas.Figure:
    """Draws what each format loses in quality against what it gains: the plot that joins quality to cost."""
    with canvas.single(3.2) as (figure, axes):
        for i, row in enumerate(rows):
            color = canvas.PALETTE[i % len(canvas.PALETTE)]
            low, high = row["bits_per_byte"] - row["low"], row["high"] - row["bits_per_byte"]
            point = (row["gain_over_fp8"], row["bits_per_byte"])
            axes.errorbar(*point, yerr=[[low], [high]], fmt="o", color=color, label=row["label"])
        canvas.label_axes(axes, "modelled throughput over FP8", "bits per byte more than float32")
        axes.legend(frameon=False, loc="upper left")
        return canvas.Figure(
            "Quality lost against throughput gained",
            "Quality: moelab's own MoE of 4.4 M parameters, 95 % intervals. Throughput: modelled.",
            canvas.to_svg(figure, "joint"),
        )
