"""Heat maps of load, one panel per MoE layer, all on one scale around an even share.

E experts, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moelab.report import canvas

_TITLE = {"loc": "left", "fontsize": 10.5, "pad": 3}


def stacked(
    name: str,
    relative_LYX: Sequence[np.ndarray],
    titles: Sequence[str],
    *,
    height: float,
    x: str,
    y: str = "",
    rows: Sequence[str] = (),
    extent: tuple[float, float, float, float] | None = None,
) -> str:
    """Draws one panel under the other and returns the SVG.

    Args:
      name: of the figure, for ids.
      relative_LYX: load relative to an even share, per panel; NaN stays blank.
      titles: of the panels.
      height: of a panel in inches.
      x, y: names of the axes.
      rows: names of the rows, first at the top; empty: numbered from the bottom.
      extent: left, right, bottom, top of the data, where x is not an index.
    """
    everything = np.concatenate([np.ravel(panel) for panel in relative_LYX])
    colors = load_colors(everything)
    with canvas.panels(len(relative_LYX), height) as (figure, axes_L):
        for axes, panel, title in zip(axes_L, relative_LYX, titles, strict=True):
            image = axes.imshow(
                panel,
                aspect="auto",
                origin="upper" if rows else "lower",
                interpolation="none",
                extent=extent,
                **colors,
            )
            if title:
                axes.set_title(title, **_TITLE)
            if rows:
                axes.set_yticks(range(len(rows)), rows)
                axes.tick_params(length=0)
            else:
                axes.yaxis.get_major_locator().set_params(integer=True, nbins=5)
            if extent is None:
                axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_ylabel(y)
        axes_L[-1].set_xlabel(x)
        color_bar(figure, image, axes_L, everything, "load relative to an even share")
        return canvas.to_svg(figure, name)


def squares(
    name: str,
    value_LCC: Sequence[np.ndarray],
    titles: Sequence[str],
    *,
    label: str,
    middle: float,
    axis: str,
) -> str:
    """Draws square panels two in a row, coloured around `middle`, and returns the SVG."""
    everything = np.concatenate([np.ravel(panel) for panel in value_LCC])
    colors = load_colors(everything, middle)
    with canvas.grid(len(value_LCC), min(2, len(value_LCC))) as (figure, axes_L):
        for axes, panel, title in zip(axes_L, value_LCC, titles, strict=True):
            image = axes.imshow(panel, interpolation="none", **colors)
            axes.set_title(title, **_TITLE)
            for each in (axes.xaxis, axes.yaxis):
                each.get_major_locator().set_params(integer=True, nbins=6)
            axes.set_xlabel(axis)
        axes_L[0].set_ylabel(axis)
        color_bar(figure, image, axes_L, everything, label)
        return canvas.to_svg(figure, name)


def load_colors(values: np.ndarray, middle: float = 1.0) -> dict[str, Any]:
    """Picks the colour map: grey in the middle, 0 deep blue, the 99.5th percentile (or twice the middle) red."""
    from matplotlib.colors import TwoSlopeNorm

    finite = values[np.isfinite(values)]
    top = float(np.percentile(finite, 99.5)) if finite.size else 2 * middle
    return {"cmap": "coolwarm", "norm": TwoSlopeNorm(middle, 0.0, max(2 * middle, top))}


def color_bar(
    figure: Any, image: Any, axes_L: Sequence[Any], values: np.ndarray, label: str
) -> None:
    """Draws the scale above the panels."""
    middle, top = image.norm.vcenter, image.norm.vmax
    over = np.any(values > top)  # NaN is not above anything
    bar = figure.colorbar(
        image,
        ax=list(axes_L),
        orientation="horizontal",
        location="top",
        shrink=0.5,
        aspect=36,
        pad=0.02,
        extend="max" if over else "neither",
    )
    ticks = [0, middle / 2, middle, (middle + top) / 2, top]
    bar.set_ticks(ticks)
    bar.ax.set_xticklabels([_tick(tick) for tick in ticks])
    bar.outline.set_visible(False)
    bar.set_label(label, fontsize=10)


def _tick(value: float) -> str:
    return f"{value:g}" if value * 2 % 1 == 0 and value < 1.5 else f"{value:.1f}"
