"""What the routers' records say over training, besides the overload: one figure, a panel per quantity.

S steps, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moelab.report import canvas
from moelab.report import formatting as fmt
from moelab.report.runs import Run

_MAX_POINTS = 1500  # of a curve; more are averaged
PANELS = (  # key of a record's router, label, factor, whether zeros alone are worth a panel
    ("entropy", "load entropy", 1, True),
    ("dead_experts", "dead experts", 1, True),
    ("dropped_share", "dropped [%]", 100, False),
    ("logit_norm", "logit norm", 1, True),
)


def figure(run: Run) -> canvas.Figure | None:
    """Draws entropy of the load, dead experts, dropped assignments and logit norm; None where nothing was recorded."""
    train = [r for r in run.records("train") if r.get("router", {}).get("layers")]
    shown = [
        (label, values)
        for label, values in map(lambda p: _panel(train, *p), PANELS)
        if values is not None
    ]
    if not shown:
        return None
    layers = train[-1]["router"]["layers"]
    step_S = canvas.binned(np.array([r["step"] for r in train], float), _MAX_POINTS)
    with canvas.panels(len(shown), 1.45) as (drawn, axes_P):
        for axes, (label, value_SL) in zip(axes_P, shown, strict=True):
            _lines(axes, step_S, canvas.binned(value_SL, _MAX_POINTS), layers)
            canvas.label_axes(axes, "", label)
            if label.startswith(("dead", "dropped")):
                axes.set_ylim(0, max(1.0, 1.1 * float(np.nanmax(value_SL))))
        axes_P[-1].set_xlabel("optimizer step")
        if len(layers) <= 8:
            axes_P[0].legend(frameon=False, loc="best", ncols=2 if len(layers) > 3 else 1)
        dropped = any(label.startswith("dropped") for label, _ in shown)
        return canvas.Figure(
            "Routers over training",
            "Per MoE layer and batch, moving average. Entropy of the load: 1 is balanced. Dead experts got no token "
            "of the batch. "
            + ("Dropped: by a capacity. " if dropped else "")
            + "Logit norm: mean length of the router's logits; a growing one means harder choices.",
            canvas.to_svg(drawn, "routers"),
        )


def _panel(
    train: Sequence[dict[str, Any]], key: str, label: str, factor: float, zeros: bool
) -> tuple[str, np.ndarray | None]:
    """The label and the values (S, L), None where they were not recorded or say nothing."""
    width = len(train[-1]["router"]["layers"]) if train else 0
    missing = [None] * width
    rows = [r["router"].get(key) or missing for r in train]
    value_SL = np.array(
        [[np.nan if (x := fmt.number(v)) is None else x for v in row] for row in rows], float
    )
    known = value_SL[np.isfinite(value_SL)]
    if not known.size or not (zeros or known.any()):
        return label, None
    return label, factor * value_SL


def _lines(axes: Any, step_S: np.ndarray, value_SL: np.ndarray, layers: Sequence[int]) -> None:
    for i, layer in enumerate(layers):
        color = canvas.layer_color(i, len(layers))
        axes.plot(
            step_S, canvas.smooth(value_SL[:, i]), color=color, lw=1.6, label=f"block {layer}"
        )
