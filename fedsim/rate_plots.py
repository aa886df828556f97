"""Figures of rates over several runs: curves that collapse or stay ordered, and fitted laws with their bands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from fedsim.analysis.rates import Rate, fit_rate
from fedsim.canvas import canvas, legend, palette, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


TICKS = (1, 1.5, 2, 3, 4, 6, 8, 11, 15, 20)
"""Marks on an axis of log t."""


def overlay(
    histories: Mapping[str, pd.DataFrame],
    column: str,
    *,
    x: str = "round",
    xlabel: str = "",
    ylabel: str = "",
) -> Figure:
    """Draw one column of several runs on two logarithmic axes.

    With ``eta = c / (beta L)`` the curves of all L collapse against rounds; with ``eta = c / beta`` they are ordered by L.

    Parameters
    ----------
    histories : mapping
        Label to history, as in `fedsim.Run`.
    column : str
        Column of the vertical axis, for instance ``direction.cosine_distance``.
    x : str
        Column of the horizontal axis, for instance ``round`` or ``direction.time``.
    xlabel, ylabel : str
        Labels of the axes; the columns' names if empty.

    Returns
    -------
    matplotlib.figure.Figure
        Not attached to any window.

    Raises
    ------
    ValueError
        If a run has no positive point.
    """
    with style():
        figure = canvas()
        axes = figure.add_subplot()
        for (label, history), colour in zip(histories.items(), palette(len(histories)), strict=True):
            at, value = _positive(label, history, x, column)
            axes.loglog(at, value, label=label, color=colour)
        axes.set(xlabel=xlabel or _words(x), ylabel=ylabel or _words(column))
        axes.spines[["top", "right"]].set_visible(False)
        legend(figure, axes, columns=3)
    return figure


def fitted(
    histories: Mapping[str, pd.DataFrame], column: str, *, start: int = 30, confidence: float = 0.95
) -> tuple[Figure, dict[str, Rate]]:
    """Fit ``value = c (log t)^b``, ``t = eta L k``, to each run, and draw the curves with the fits' confidence bands.

    On separable data b tends to -2 for ``direction.cosine_distance`` and to -1 for ``direction.margin_gap``. Rounds of
    a run are not independent: the t intervals say how well the law fits, not what another data set would give
    (`fedsim.analysis.rates.fit_rate` with ``runs`` does).

    Parameters
    ----------
    histories : mapping
        Label to history with a column ``direction.time``.
    column : str
        What is fitted.
    start : int
        First round that is fitted; earlier ones are drawn only. With many local steps they lag behind ``log t``.
    confidence : float
        In (0, 1).

    Returns
    -------
    tuple of Figure and dict of str to Rate
        The figure, and the fit of each run.

    Raises
    ------
    ValueError
        If a run has no point with ``t > 1``, or fewer than three from round ``start``.
    """
    rates: dict[str, Rate] = {}
    from matplotlib.ticker import NullLocator

    with style():
        figure = canvas()
        axes = figure.add_subplot()
        for (label, history), colour in zip(histories.items(), palette(len(histories)), strict=True):
            late = history.query("`direction.time` > 1")
            t, value = _positive(label, late, "direction.time", column)
            axes.loglog(np.log(t), value, ".", color=colour, markersize=4)
            t, value = _positive(label, late.query("round >= @start"), "direction.time", column)
            rates[label] = rate = fit_rate(value, {"log t": np.log(t)}, confidence=confidence)
            middle, low, high = rate.band({"log t": np.log(t)})
            said = f"{label}: {rate.exponents[0]:.2f} [{rate.low[0]:.2f}, {rate.high[0]:.2f}]"
            axes.plot(np.log(t), middle, color=colour, label=said)
            axes.fill_between(np.log(t), low, high, color=colour, alpha=0.25, linewidth=0)
        axes.set(xlabel="log t,  t = step size x local steps x rounds", ylabel=_words(column))
        axes.spines[["top", "right"]].set_visible(False)
        low, high = axes.get_xlim()
        axes.set_xticks([n for n in TICKS if low <= n <= high], minor=False)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        legend(figure, axes, columns=1, title="fitted exponent of log t")
    return figure, rates


def _words(column: str) -> str:
    return column.partition(".")[2].replace("_", " ") or column


def _positive(label: str, history: pd.DataFrame, x: str, column: str) -> tuple[np.ndarray, np.ndarray]:
    missing = [name for name in (x, column) if name not in history]
    if missing:
        raise ValueError(f"run {label!r} has no column {missing[0]!r}")
    at, value = (history[name].to_numpy(dtype=float) for name in (x, column))
    there = (at > 0) & (value > 0)
    if not there.any():
        raise ValueError(f"run {label!r} has no positive point of {column!r}")
    return at[there], value[there]
