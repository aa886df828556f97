"""How figures look: style, size, colours, axes and points, the same for all."""

from __future__ import annotations

import io
import re
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = {
    "round": "round",
    "local_steps": "local steps of all workers",
    "gradients": "gradients computed",
    "bytes": "bytes sent and received",
    "sim_time": "simulated time",
}
"""What figures have on their horizontal axis."""

WIDTH, HEIGHT = 4.8, 3.4
"""Inches of a figure; printed at half a page width its letters have about 8 points."""

MOST_POINTS = 2000
"""Points of a curve that are drawn; longer curves are thinned evenly."""

INK, PAPER, GRID = "#262626", "#ffffff", "#cccccc"
"""Letters and frame, background, and grid; pages replace them where people prefer dark colours."""

PALE = "#8c8c8c"


def style() -> AbstractContextManager[None]:
    """Return the context in which figures are drawn and saved: seaborn's white grid, letters as outlines or TrueType."""
    import matplotlib
    import seaborn as sns

    settings = sns.axes_style("whitegrid") | sns.plotting_context("notebook", font_scale=0.95)
    settings |= {"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "path", "lines.linewidth": 1.8}
    settings |= {"grid.linewidth": 0.7, "axes.formatter.useoffset": False, "font.family": "DejaVu Sans"}
    settings |= {"axes.edgecolor": "#262626", "axes.labelcolor": "#262626", "legend.frameon": False}
    return matplotlib.rc_context(settings)  # type: ignore[arg-type]


def canvas(width: float = WIDTH, height: float = HEIGHT) -> Figure:
    """Return an empty figure that is not attached to any window; to be called within `style`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.07, w_pad=0.07))
    FigureCanvasAgg(figure)
    return figure


def palette(number: int) -> list[Any]:
    """Return so many colours that colour-blind people tell apart, ten at most before they repeat."""
    import seaborn as sns

    return list(sns.color_palette("colorblind", number))


def along(history: pd.DataFrame, x: str) -> np.ndarray:
    """Return the horizontal axis of a history.

    Parameters
    ----------
    history : pandas.DataFrame
        As in `fedsim.Run`.
    x : str
        One of `AXES`.

    Returns
    -------
    ndarray
        A number a round; NaN where it is not known.

    Raises
    ------
    ValueError
        If the axis is unknown.
    """
    if x not in AXES:
        raise ValueError(f"x = {x!r} must be one of {', '.join(AXES)}")
    columns = ("bytes_up", "bytes_down") if x == "bytes" else (x,)
    nothing = np.full(len(history), np.nan)
    return sum(
        (np.asarray(history[c], dtype=float) if c in history else nothing for c in columns),
        start=np.zeros(len(history)),
    )


def points(history: pd.DataFrame, column: str, x: str = "round") -> tuple[np.ndarray, np.ndarray]:
    """Return the finite points of a column, at most `MOST_POINTS` and always the last.

    Parameters
    ----------
    history : pandas.DataFrame
        As in `fedsim.Run`.
    column : str
        Its name; a column that is absent has no points.
    x : str
        One of `AXES`.

    Returns
    -------
    tuple of ndarray
        Places and values.
    """
    if column not in history:
        return np.zeros(0), np.zeros(0)
    place, y = along(history, x), np.asarray(history[column], dtype=float)
    there = np.flatnonzero(np.isfinite(y) & np.isfinite(place))
    stride = max(1, -(-len(there) // MOST_POINTS))
    there = there[::-1][::stride][::-1]
    return place[there], y[there]


def marks(y: np.ndarray) -> str:
    """Return the marker of a curve: a dot where there are too few points for a line."""
    return "o" if len(y) < 3 else ""


def finish(axes: Axes, ylabel: str, x: str, values: np.ndarray) -> None:
    """Label the axes and choose their scales.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
        With everything drawn.
    ylabel : str
        Label of the vertical axis.
    x : str
        One of `AXES`.
    values : ndarray
        All finite values that are drawn.
    """
    import seaborn as sns
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set(xlabel=AXES[x], ylabel=ylabel)
    name, settings = scale(values)
    axes.set_yscale(name, **settings)
    if x == "round":
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        low, high = axes.get_xlim()
        if high - low < 1:
            axes.set_xlim((low + high) / 2 - 1, (low + high) / 2 + 1)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        unit = {"bytes": "B", "sim_time": "s"}.get(x, "")
        axes.xaxis.set_major_formatter(EngFormatter(unit=unit, sep=" " if unit else ""))
    sns.despine(ax=axes)


def scale(values: np.ndarray) -> tuple[str, dict[str, float]]:
    """Choose a vertical scale: logarithmic over two decades or more, and linear about zeros among them.

    Parameters
    ----------
    values : ndarray
        All finite values that are drawn.

    Returns
    -------
    tuple of str and dict
        What ``Axes.set_yscale`` takes.

    Examples
    --------
    >>> scale(np.array([1.0, 2.0])), scale(np.array([1e-3, 1.0]))
    (('linear', {}), ('log', {}))
    >>> scale(np.array([0.0, 1e-4, 1.0]))
    ('symlog', {'linthresh': 0.0001})
    """
    positive = values[values > 0]
    if not len(positive) or (values < 0).any() or positive.max() < 100 * positive.min():
        return "linear", {}
    if len(positive) == len(values):
        return "log", {}
    return "symlog", {"linthresh": float(max(positive.min(), 1e-12 * positive.max()))}


def legend(figure: Figure, axes: Axes, columns: int = 2, title: str | None = None) -> None:
    """Put the legend below the axes, where it covers nothing; a single curve needs none."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=min(columns, len(handles)),
            fontsize="small",
            title=title,
            title_fontsize="small",
            columnspacing=1.2,
            handlelength=1.6,
        )


def svg(figure: Figure) -> str:
    """Write a figure as SVG whose letters, grid and background follow the reader's choice of light or dark.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        Drawn within `style`.

    Returns
    -------
    str
        One ``<svg>`` element with letters as outlines: it needs no font.
    """
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, name in ((INK, "ink"), (PAPER, "paper"), (GRID, "grid")):
        text = re.sub(rf"(fill|stroke): {colour}", rf"\1: var(--{name})", text)
    light = f"--ink: {INK}; --paper: {PAPER}; --grid: {GRID};"
    dark = "--ink: #dcdcdc; --paper: #1b1e23; --grid: #3f444c;"
    rules = f"svg {{{light}}} @media (prefers-color-scheme: dark) {{svg {{{dark}}}}}"
    opening = text.index(">") + 1
    return f"{text[:opening]}<style>{rules}</style>{text[opening:]}"
