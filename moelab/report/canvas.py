"""The paper that the plots are drawn on: figures without pyplot, one style, SVG made fit for a page.

Importing matplotlib is left to the functions, because the extra `report` may be absent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Stand-ins that the SVG carries until they are exchanged for the page's CSS variables.
INK, RULE = "#0a0b0c", "#d0d1d2"
_THEME = {INK: "var(--ink)", RULE: "var(--rule)"}
# Okabe and Ito's palette: told apart by colour-blind readers, on white and on black.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a8f00")
_WIDTH = 6.2  # inches; 72 SVG units each
_MADE_FROM = "Description"  # a PNG's text field


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure: its heading, the sentence that says how to read it, and its SVG."""

    title: str
    caption: str
    svg: str


def available() -> bool:
    """Says whether matplotlib can be imported (extra `report`)."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def binned(values: np.ndarray, limit: int) -> np.ndarray:
    """Averages neighbours along the first axis until at most `limit` are left."""
    if len(values) <= limit:
        return values
    known = np.isfinite(values)
    first = np.linspace(0, len(values), limit, endpoint=False).astype(int)
    total = np.add.reduceat(np.where(known, values, 0.0), first, axis=0)
    weight = np.add.reduceat(known.astype(float), first, axis=0)
    return np.divide(total, weight, out=np.full(total.shape, np.nan), where=weight > 0)


def smooth(values: np.ndarray) -> np.ndarray:
    """Averages over a centred window of about 5 % of the run, skipping gaps; it shrinks at the ends."""
    count = len(values)
    place = np.arange(count)
    half = np.minimum(max(1, count // 40), np.minimum(place, count - 1 - place))
    known = np.isfinite(values)
    totals = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    weights = np.concatenate([[0.0], np.cumsum(known)])
    low, high = place - half, place + half + 1
    weight = weights[high] - weights[low]
    total = totals[high] - totals[low]
    return np.divide(total, weight, out=np.full(count, np.nan), where=weight > 0)


def layer_color(index: int, count: int) -> str:
    """Picks a layer's colour: apart from the others where there are few, ordered by depth where many."""
    if count <= len(PALETTE):
        return PALETTE[index]
    import matplotlib as mpl

    return mpl.colors.to_hex(mpl.colormaps["viridis"](0.1 + 0.8 * index / (count - 1)))


def label_axes(axes: Any, x: str, y: str) -> None:
    """Names both axes, with a quiet grid and no box."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, color=RULE, lw=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def positive_axis(axes: Any, values: Sequence[float], write: Callable[[float], str]) -> None:
    """Scales the x axis for positive values: logarithmic where they span more than 3 times, with room for names.

    Ticks are written by `write`: matplotlib's own are formulas, which our text does not parse.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    low, high = min(values), max(values)
    if high > 3 * low:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.3, high * (high / low) ** 0.3)
        steps = (1, 2, 5) if high < 100 * low else (1,)
        axes.xaxis.set_major_locator(FixedLocator([b * 10.0**p for p in range(28) for b in steps]))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(low - 0.08 * (high - low), high + 0.3 * (high - low))
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: re.sub(r"\.0+(?= )", "", write(v))))


@contextlib.contextmanager
def single(height: float) -> Iterator[tuple[Any, Any]]:
    """Opens a figure of one panel, `height` inches high."""
    with panels(1, height) as (figure, axes_L):
        yield figure, axes_L[0]


@contextlib.contextmanager
def panels(count: int, height: float) -> Iterator[tuple[Any, Sequence[Any]]]:
    """Opens a figure of stacked panels without pyplot, so that no display or global state is touched."""
    extra = 0.85 if count > 1 or height < 2 else 0
    with _opened(height * count + extra) as figure:
        yield figure, figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]


@contextlib.contextmanager
def grid(count: int, columns: int) -> Iterator[tuple[Any, Sequence[Any]]]:
    """Opens a figure of square panels, row by row, with room above for a scale."""
    rows = -(-count // columns)
    with _opened(rows * _WIDTH / max(columns, 2) + 0.85) as figure:
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for unused in axes[count:]:
            unused.set_axis_off()
        yield figure, axes[:count]


@contextlib.contextmanager
def _opened(height: float) -> Iterator[Any]:
    import matplotlib as mpl
    from matplotlib.figure import Figure as MplFigure

    with mpl.rc_context(_STYLE):
        yield MplFigure(figsize=(_WIDTH, height), layout="constrained")


_STYLE = {
    "font.size": 11.5,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "text.parse_math": False,  # a name with a $ is a name
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.fontsize": 10.5,
    "legend.labelcolor": INK,
}


def to_svg(figure: Any, name: str) -> str:
    """Renders to SVG for inlining: no prolog, no metadata, ids unique to `name`, theme variables."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)  # HTML needs no namespaces
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", text)
    number = itertools.count()  # images are named by their content, which panels may share
    text = re.sub(r'(<image [^>]*?\bid=")', lambda m: f"{m[1]}{next(number)}-", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    text = re.sub(r"<style.*?</style>\s*", "", text, flags=re.DOTALL)  # would leak into the page
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for stand_in, variable in _THEME.items():
        text = text.replace(stand_in, variable)
    return text.replace("<svg", f'<svg role="img" aria-label="{name} plot"', 1)


def to_png(figure: Any, path: Path, made_from: str) -> None:
    """Writes a PNG on white, with what it was made from as its description."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with mpl.rc_context(_STYLE):
        FigureCanvasAgg(figure).print_figure(
            path, dpi=150, facecolor="white", metadata={_MADE_FROM: made_from, "Software": None}
        )


def png_made_from(path: Path) -> str:
    """Returns what a PNG of `to_png` says that it was made from; empty where there is none."""
    from PIL import Image  # comes with matplotlib

    if not path.is_file():
        return ""
    with Image.open(path) as picture:
        return str(picture.info.get(_MADE_FROM, ""))
