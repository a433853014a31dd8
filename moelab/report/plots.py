"""The report's figures as inline SVG: text stays text, colours follow the page's light or dark theme.

Every figure is about 446 points wide, so that it reads on a phone and doubles up on a desktop. Ask `canvas.available`
first: the extra `report` may be absent.

S steps, L MoE layers, E experts, D domains.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moelab.report import canvas, heat_maps, router_curves, statistics
from moelab.report import formatting as fmt
from moelab.report.runs import REFERENCE, Run

_MAX_COLUMNS = 400  # of a heat map over steps; more are averaged
_MAX_POINTS = 1500  # of a curve; more are averaged


def figures(run: Run) -> list[canvas.Figure]:
    """Draws every figure that a run's records allow; each is left out where its data is."""
    drawn = []
    makers: tuple[Callable[[Run], canvas.Figure | None], ...] = (
        loss_curve,
        quality_against_bytes,
        violation_curve,
        router_curves.figure,
        domain_heat_map,
        load_heat_map,
    )
    for maker in makers:
        figure = maker(run)
        if figure is not None:
            drawn.append(figure)
    return drawn


def loss_curve(run: Run) -> canvas.Figure | None:
    """Draws training and validation loss over steps, with resumed and skipped steps marked."""
    train = run.records("train")
    if not train:
        return None
    with canvas.single(2.9) as (figure, axes):
        _draw_train_loss(axes, train, canvas.PALETTE[0], "training")
        steps, losses = _validation(run)
        if steps:
            axes.plot(
                steps, losses, "o-", color=canvas.PALETTE[5], ms=4.5, lw=1.6, label="validation"
            )
        skipped = [r["step"] for r in train if r.get("skipped")]
        for i, step in enumerate(skipped):
            axes.axvline(
                step, color=canvas.PALETTE[3], lw=1, label="" if i else "skipped (non-finite)"
            )
        resumed = [r["step"] for r in run.records("event") if r.get("event") == "resumed"]
        for i, step in enumerate(resumed):
            axes.axvline(step, color=canvas.INK, lw=0.9, ls=":", label="" if i else "resumed")
        canvas.label_axes(axes, "optimizer step", "loss [nats per token]")
        _limit_loss(axes, [r.get("loss") for r in train])
        axes.legend(frameon=False, loc="upper right")
        return canvas.Figure(
            "Loss",
            "Language-model loss without balancing losses. Training: logged steps (pale) and "
            "its moving average; validation: the fixed validation subset.",
            canvas.to_svg(figure, "loss"),
        )


def loss_curves(runs: Sequence[tuple[str, Run]]) -> canvas.Figure | None:
    """Overlays the loss curves of several runs: moving average of training, points of validation."""
    if not any(run.records("train") for _, run in runs):
        return None
    with canvas.single(3.2) as (figure, axes):
        every = []
        for i, (name, run) in enumerate(runs):
            color = canvas.PALETTE[i % len(canvas.PALETTE)]
            if not run.records("train"):
                continue
            _draw_train_loss(axes, run.records("train"), color, name, raw=False)
            every += [r.get("loss") for r in run.records("train")]
            steps, losses = _validation(run)
            axes.plot(steps, losses, "o", color=color, ms=5)
        canvas.label_axes(axes, "optimizer step", "loss [nats per token]")
        _limit_loss(axes, every)
        axes.legend(frameon=False, loc="upper right")
        return canvas.Figure(
            "Loss",
            "Language-model loss without balancing losses. Lines: moving average of the training "
            "loss; points: the fixed validation subset.",
            canvas.to_svg(figure, "losses"),
        )


def _draw_train_loss(axes: Any, train: list, color: str, name: str, raw: bool = True) -> None:
    step_S = np.array([r["step"] for r in train], float)
    loss_S = np.array([_or_nan(r.get("loss")) for r in train])
    step_S, loss_S = canvas.binned(step_S, _MAX_POINTS), canvas.binned(loss_S, _MAX_POINTS)
    if raw:
        axes.plot(step_S, loss_S, color=color, lw=0.8, alpha=0.35)
    axes.plot(step_S, canvas.smooth(loss_S), color=color, lw=1.8, label=name)


def _validation(run: Run) -> tuple[list[float], list[float]]:
    points = [
        (r["step"], _or_nan(r.get("loss")))
        for r in run.records("evaluation")
        if r.get("split") == "validation" and r.get("precision", REFERENCE) == REFERENCE
    ]
    return [p[0] for p in points], [p[1] for p in points]


def _limit_loss(axes: Any, losses: Sequence[Any]) -> None:
    """Keeps one early spike from flattening the curve."""
    finite = np.array([v for v in map(_or_nan, losses) if math.isfinite(v)])
    if finite.size > 10:
        low, high = finite.min(), np.percentile(finite, 99)
        axes.set_ylim(low - 0.06 * (high - low + 1e-3), high + 0.10 * (high - low + 1e-3))


def violation_curve(run: Run) -> canvas.Figure | None:
    """Draws MaxVio of every MoE layer over training."""
    train = [r for r in run.records("train") if r.get("router", {}).get("max_violation")]
    if not train:
        return None
    layers = train[-1]["router"]["layers"]
    values_SL = np.array([[_or_nan(v) for v in r["router"]["max_violation"]] for r in train])
    step_S = canvas.binned(np.array([r["step"] for r in train], float), _MAX_POINTS)
    values_SL = canvas.binned(values_SL, _MAX_POINTS)
    with canvas.single(2.9) as (figure, axes):
        for i, layer in enumerate(layers):
            color = canvas.layer_color(i, len(layers))
            axes.plot(step_S, values_SL[:, i], color=color, lw=0.7, alpha=0.3)
            axes.plot(
                step_S, canvas.smooth(values_SL[:, i]), color=color, lw=1.8, label=f"block {layer}"
            )
        canvas.label_axes(axes, "optimizer step", "MaxVio")
        axes.set_ylim(bottom=0)
        if len(layers) <= 8:
            axes.legend(frameon=False, loc="upper right", ncols=2 if len(layers) > 3 else 1)
        return canvas.Figure(
            "Worst overload over training",
            "MaxVio per MoE layer and batch: 0 is perfect balance; 1 means that the busiest expert "
            "gets twice the mean. Pale: logged steps; strong: moving average.",
            canvas.to_svg(figure, "violation"),
        )


def violation_curves(runs: Sequence[tuple[str, Run]]) -> canvas.Figure | None:
    """Overlays the MaxVio of several runs, averaged over their MoE layers."""
    drawn = False
    with canvas.single(3.2) as (figure, axes):
        for i, (name, run) in enumerate(runs):
            train = [r for r in run.records("train") if r.get("router", {}).get("max_violation")]
            if not train:
                continue
            drawn = True
            step_S = canvas.binned(np.array([r["step"] for r in train], float), _MAX_POINTS)
            mean_S = np.array([np.mean(r["router"]["max_violation"]) for r in train])
            smooth_S = canvas.smooth(canvas.binned(mean_S, _MAX_POINTS))
            axes.plot(
                step_S, smooth_S, color=canvas.PALETTE[i % len(canvas.PALETTE)], lw=1.8, label=name
            )
        if not drawn:
            return None
        canvas.label_axes(axes, "optimizer step", "MaxVio, mean over layers")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, loc="upper right")
        return canvas.Figure(
            "Worst overload over training",
            "MaxVio (busiest expert's load over the mean, minus 1), averaged over MoE layers; moving "
            "average over steps.",
            canvas.to_svg(figure, "violations"),
        )


def load_heat_map(run: Run) -> canvas.Figure | None:
    """Draws the load of every expert over training, one panel per MoE layer."""
    train = [r for r in run.records("train") if r.get("router", {}).get("load")]
    if not train:
        return None
    layers = train[-1]["router"]["layers"]
    load_SLE = np.array([r["router"]["load"] for r in train], float)
    load_SLE = canvas.binned(load_SLE, _MAX_COLUMNS) * load_SLE.shape[-1]
    extent = (train[0]["step"] - 0.5, train[-1]["step"] + 0.5, -0.5, load_SLE.shape[-1] - 0.5)
    return canvas.Figure(
        "Load per expert over training",
        "Share of the assignments that each expert gets, relative to a perfectly even share: "
        "1 is balanced (grey), red is overloaded, deep blue is starved.",
        heat_maps.stacked(
            "load",
            [load_SLE[:, i].T for i in range(len(layers))],
            [f"block {layer}" for layer in layers],
            height=max(0.75, min(1.25, 11 / len(layers))),
            x="optimizer step",
            y="expert",
            extent=extent,
        ),
    )


def domain_heat_map(run: Run) -> canvas.Figure | None:
    """Draws which experts serve which domain, one panel per MoE layer."""
    evaluation = run.card["evaluation"]
    shares, layers = evaluation.get("load_by_domain"), evaluation.get("layers")
    if not shares or not layers or not run.domains:
        return None
    share_LDE = np.array([[[_or_nan(v) for v in e] for e in d] for d in shares])
    relative_LDE = share_LDE * share_LDE.shape[-1]
    return canvas.Figure(
        "Experts by domain",
        f"Share of a domain's assignments per expert on the {evaluation.get('split')} split, "
        "relative to an even share. Columns that change colour down the rows are specialists.",
        heat_maps.stacked(
            "domains",
            list(relative_LDE),
            [f"block {layer}" for layer in layers],
            height=0.42 + 0.17 * len(run.domains),
            x="expert",
            rows=run.domains,
        ),
    )


def quality_against_bytes(run: Run) -> canvas.Figure | None:
    """Draws bits per byte against the bytes of expert weights, each precision labelled."""
    points = _quality_points(run)
    if len(points) < 2:
        return None
    with canvas.single(3.5) as (figure, axes):
        for x, y, low, high, row in points:
            quantized = bool(row.get("activations"))
            color = canvas.PALETTE[5] if quantized else canvas.PALETTE[0]
            if low is not None:
                axes.plot([x, x], [low, high], color=color, lw=1.6, solid_capstyle="butt")
            axes.plot(
                x,
                y,
                marker="D" if quantized else "o",
                ms=5.5,
                color=color,
                ls="none",
            )
        axes.set_xscale("log")
        _byte_ticks(axes, [p[0] for p in points])
        _spread_labels(axes, points)
        canvas.label_axes(axes, "bytes of expert weights (log scale)", "bits per byte, all domains")
        for name, marker, color in (
            ("expert weights only", "o", canvas.PALETTE[0]),
            ("weights and activations", "D", canvas.PALETTE[5]),
        ):
            axes.plot([], [], marker, ms=5.5, color=color, label=name)
        axes.legend(frameon=False, loc="upper right")
        return canvas.Figure(
            "Quality against bytes",
            "Lower left is better. Bars: 95 % interval of the difference from float32 (paired "
            f"bootstrap over documents, {statistics.RESAMPLES} resamples), drawn around the point.",
            canvas.to_svg(figure, "quality"),
        )


def _quality_points(run: Run) -> list[tuple]:
    points = []
    for row in run.rows:
        x, y = fmt.number(row.get("expert_bytes")), fmt.number(row["bits_per_byte"].get("all"))
        if not x or y is None or not math.isfinite(y):
            continue
        low = high = None
        table = run.documents
        if table is not None and {REFERENCE, row["precision"]} <= set(table.nats):
            bounds = statistics.bits_per_byte_difference(table, REFERENCE, row["precision"])
            if math.isfinite(bounds.low):
                low, high = y - bounds.estimate + bounds.low, y - bounds.estimate + bounds.high
        points.append((x, y, low, high, row))
    return points


def _byte_ticks(axes: Any, values: list[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = math.log10(min(values)), math.log10(max(values))
    pad = max(0.06, 0.14 * (high - low))
    axes.set_xlim(10 ** (low - pad), 10 ** (high + 2.2 * pad))
    steps = [b * 10.0**p for p in range(0, 16) for b in (1, 2, 5)]
    axes.xaxis.set_major_locator(FixedLocator(steps))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: re.sub(r"\.0+ ", " ", fmt.size(v))))


def _spread_labels(axes: Any, points: list[tuple]) -> None:
    """Writes each precision right of its point, pushing labels of one column apart."""
    low, high = axes.get_ylim()
    span = high - low
    axes.set_ylim(low - 0.05 * span, high + 0.25 * span)  # room for the legend
    gap = 0.075 * (axes.get_ylim()[1] - axes.get_ylim()[0])
    placed: list[tuple[float, float]] = []
    for x, y, _, _, row in sorted(points, key=lambda p: (p[1], p[0])):
        height = y
        for other_x, other_y in sorted(placed, key=lambda p: p[1]):
            if abs(math.log(x / other_x)) < 0.5 and abs(height - other_y) < gap:
                height = other_y + gap
        placed.append((x, height))
        column = max(p[0] for p in points if abs(math.log(x / p[0])) < 0.2)
        axes.annotate(
            row["precision"],
            (x, y),
            xytext=(column * 1.06, height),
            fontsize=10,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "lw": 0.5,
                "color": canvas.RULE,
                "shrinkA": 0,
                "shrinkB": 3,
            },
        )


def _or_nan(value: Any) -> float:
    x = fmt.number(value)
    return math.nan if x is None else x
