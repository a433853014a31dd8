"""The figures that need a route trace: who works with whom, who serves which domain, when routing settled.

M MoE layers, C columns of the routers' scores, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moelab import diagnostics, placement
from moelab.report import canvas, heat_maps
from moelab.report.routes import Routes

_DEVICES = (8, 4, 2)  # of the placement that is drawn: the first that gives each two experts
_PANELS = 4  # co-activation of so many layers is shown at most


def figures(routes: Routes, rows: Sequence[Mapping[str, Any]]) -> list[canvas.Figure]:
    """Draws every figure that the traces allow.

    Args:
      routes: of the run directory.
      rows: what routes.summary said of the last trace.
    """
    drawn = (
        load_map(rows),
        specialisation_bars(rows),
        saturation_curve(routes),
        flip_curve(routes),
        co_activation_map(routes),
        placement_bars(routes),
    )
    return [figure for figure in drawn if figure is not None]


def load_map(rows: Sequence[Mapping[str, Any]]) -> canvas.Figure | None:
    """Draws the load of every expert in every MoE layer."""
    load_ME = np.array([row["load"] for row in rows])
    relative_ME = np.where(load_ME.sum(1, keepdims=True) > 0, load_ME * load_ME.shape[1], np.nan)
    return canvas.Figure(
        "Load per expert and layer",
        "Share of a layer's assignments over the whole evaluated text, relative to a perfectly even share.",
        heat_maps.stacked(
            "route-load",
            [relative_ME],
            [""],
            height=max(0.8, 0.3 + 0.2 * len(rows)),
            x="expert",
            rows=[f"block {row['layer']}" for row in rows],
        ),
    )


def specialisation_bars(rows: Sequence[Mapping[str, Any]]) -> canvas.Figure | None:
    """Draws what the expert says about the domain, with the 95 % line of the permutation null."""
    if any(row["mutual_information"] is None for row in rows):
        return None
    place_M = np.arange(len(rows))
    with canvas.single(2.6) as (figure, axes):
        values = [row["mutual_information"] for row in rows]
        axes.bar(place_M, values, width=0.62, color=canvas.PALETTE[0], label="measured")
        null = [row["null_q95"] for row in rows]
        left, right = place_M - 0.4, place_M + 0.4
        axes.hlines(null, left, right, color=canvas.PALETTE[5], lw=2, label="95 % of the null")
        canvas.label_axes(axes, "MoE layer", "information [nats]")
        axes.grid(False, axis="x")
        _layer_ticks(axes, [row["layer"] for row in rows])
        axes.set_ylim(0, 1.3 * max([*values, *null, 1e-9]))  # room for the legend
        axes.legend(frameon=False, loc="upper right", ncols=2)
        oracle = max(row["oracle"] for row in rows)
        return canvas.Figure(
            "Specialisation by domain",
            "Mutual information of the chosen expert and the text's domain. The null deals the domains to "
            "the documents at random; bars below its line say nothing. A router that knew the domains would "
            f"reach {oracle:.2f} nats.",
            canvas.to_svg(figure, "specialisation"),
        )


def co_activation_map(routes: Routes) -> canvas.Figure | None:
    """Draws how often two experts serve the same token, over independent choices, for some layers."""
    trace = routes.final
    share_MCC = diagnostics.co_activation(trace)
    ratio_MCC = diagnostics.independence_ratio(share_MCC)
    experts_M = share_MCC.trace(axis1=1, axis2=2)  # mean experts per token
    if not (experts_M > 1.001).any():
        return None
    columns = trace.num_columns
    chosen = np.unique(np.linspace(0, len(trace.layers) - 1, _PANELS).round().astype(int))
    per_token = float(experts_M[chosen].mean())
    chance = (per_token - 1) * columns / (per_token * (columns - 1))
    return canvas.Figure(
        "Experts that work together",
        "How often two experts serve the same token, over what independent choices would give. Grey is "
        f"chance ({chance:.2f} for {per_token:.1f} of {columns} without repetition); red pairs are partners, "
        "blue ones avoid each other. Blank: the diagonal, and experts never chosen.",
        heat_maps.squares(
            "co-activation",
            [ratio_MCC[m] for m in chosen],
            [f"block {trace.layers[m]}" for m in chosen],
            label="together, relative to independent choices",
            middle=chance,
            axis="expert",
        ),
    )


def saturation_curve(routes: Routes) -> canvas.Figure | None:
    """Draws how much of the final routing was there at earlier checkpoints."""
    final = routes.final.header.get("step")
    early = [(step, found) for step, found in routes.early if step != final]
    if not early:
        return None
    steps = [step for step, _ in early]
    value_SM = np.array([diagnostics.saturation(found, routes.final) for _, found in early])
    if isinstance(final, int):
        steps, value_SM = [*steps, final], np.vstack([value_SM, np.ones_like(value_SM[:1])])
    layers = routes.final.layers
    with canvas.single(2.7) as (figure, axes):
        for m, layer in enumerate(layers):
            color = canvas.layer_color(m, len(layers))
            axes.plot(
                steps, value_SM[:, m], "o-", color=color, ms=4, lw=1.6, label=f"block {layer}"
            )
        canvas.label_axes(axes, "optimizer step", "saturation")
        axes.set_ylim(0, 1.03)
        if len(layers) <= 8:
            axes.legend(frameon=False, loc="lower right", ncols=2 if len(layers) > 3 else 1)
        return canvas.Figure(
            "Router saturation",
            "Share of a token's final experts that an earlier checkpoint chose too, on the same text "
            "(OLMoE, arXiv:2409.02060); 1 is settled."
            + (" Dark: first layers; light: last." if len(layers) > len(canvas.PALETTE) else ""),
            canvas.to_svg(figure, "saturation"),
        )


def flip_curve(routes: Routes) -> canvas.Figure | None:
    """Draws how many tokens get other experts in other precisions, layer by layer."""
    if not routes.precisions:
        return None
    layers = routes.final.layers
    place_M = np.arange(len(layers))
    with canvas.single(2.6) as (figure, axes):
        for i, (name, found) in enumerate(routes.precisions):
            flip_M = 100 * diagnostics.flip_rate(found, routes.final).layer_M
            color = canvas.layer_color(i, len(routes.precisions))
            axes.plot(place_M, flip_M, "o-", color=color, ms=4.5, lw=1.6, label=name)
        _layer_ticks(axes, layers)
        canvas.label_axes(axes, "MoE layer", "flipped tokens [%]")
        axes.grid(False, axis="x")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, loc="upper left")
        usual = routes.final.header.get("precision", "the other")
        return canvas.Figure(
            "Routing flips by precision",
            f"Share of tokens whose set of experts differs from that in {usual}, per layer: errors of earlier "
            "layers move the later routers' logits.",
            canvas.to_svg(figure, "flips"),
        )


def placement_bars(routes: Routes) -> canvas.Figure | None:
    """Draws how uneven the devices' work is in serving, with experts in order and placed by the load."""
    found = routes.final
    fitting = (d for d in _DEVICES if found.num_experts % d == 0 and found.num_experts >= 2 * d)
    devices = next(fitting, None)
    if devices is None or np.unique(found.document_T).size < 2:
        return None
    plain = placement.evaluate_placement(found, devices)
    spare = placement.evaluate_placement(found, devices, redundant=devices)
    series = (
        ("experts in order", plain.before_held_M),
        ("placed by load", plain.after_held_M),
        ("and one more slot per device", spare.after_held_M),
    )
    place_M = np.arange(len(found.layers))
    with canvas.single(2.7) as (figure, axes):
        for i, (name, value_M) in enumerate(series):
            left_M = place_M + 0.27 * (i - 1)
            axes.bar(left_M, value_M, width=0.25, color=canvas.PALETTE[(0, 5, 3)[i]], label=name)
        _layer_ticks(axes, found.layers)
        canvas.label_axes(axes, "MoE layer", "device MaxVio")
        axes.grid(False, axis="x")
        axes.set_ylim(0, 1.8 * max(1e-3, *(float(np.nanmax(value_M)) for _, value_M in series)))
        axes.legend(frameon=False, loc="upper left")
        return canvas.Figure(
            "Placement of experts",
            f"Tokens of the fullest of {devices} devices over the mean, minus 1 (0 is even), on {plain.documents[1]} "
            f"documents that the placement did not see; it was fitted to {plain.documents[0]} others.",
            canvas.to_svg(figure, "placement"),
        )


def _layer_ticks(axes: Any, layers: Sequence[int]) -> None:
    axes.set_xticks(np.arange(len(layers)), [f"block {layer}" for layer in layers])
    if len(layers) > 8:
        axes.tick_params(axis="x", rotation=90)
