"""Figures of accuracy within the training domains against accuracy in a held-out one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from fedsim.analysis.generalisation import bins, budget
from fedsim.canvas import PALE, canvas, legend, palette, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""ID and OOD accuracies of the runs of each label, ``[n]`` each."""


def scatter(points: Points, held_out: str, *, threshold: float = 0.0, width: float = 0.1) -> Figure:
    """Draw OOD against ID accuracy, a dot a run, and the mean OOD of each bin of ID over the runs that are kept.

    Parameters
    ----------
    points : mapping
        Label, for instance of the optimiser, to ID and OOD accuracies.
    held_out : str
        Name of the held-out domain.
    threshold : float
        Runs with less ID accuracy are drawn pale and not averaged; the legend counts the others.
    width : float
        Of the bins; a line joins their means, in the middle of each.

    Returns
    -------
    matplotlib.figure.Figure
        Not attached to any window.
    """
    with style():
        figure = canvas()
        axes = figure.add_subplot()
        axes.axline((0, 0), slope=1, color=PALE, linewidth=0.8, linestyle=":")
        for (label, (inside, outside)), colour in zip(points.items(), palette(len(points)), strict=True):
            kept = inside >= threshold
            said = f"{label} ({kept.sum()} of {len(kept)})"
            axes.scatter(inside[kept], outside[kept], s=12, color=colour, alpha=0.6, linewidth=0, label=said)
            axes.scatter(inside[~kept], outside[~kept], s=8, color=colour, alpha=0.15, linewidth=0)
            if kept.any():
                found = bins(inside[kept], outside[kept], width)
                middle, some = (found.edges[:-1] + found.edges[1:]) / 2, found.count > 0
                axes.plot(middle[some], found.mean[some], "o-", color=colour, markersize=5, linewidth=1.4)
        axes.set(xlabel="accuracy in the training domains", ylabel="held-out accuracy")
        axes.set_title(f"held out: {held_out}", fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
        legend(figure, axes, columns=2)
    return figure


def budgets(points: Points, held_out: str, *, step: int = 10) -> Figure:
    """Draw the OOD accuracy of the best run by ID so far, and dotted that of the best by OOD, which is an oracle.

    Parameters
    ----------
    points : mapping
        As in `scatter`, in the order of the trials.
    held_out : str
        Name of the held-out domain.
    step : int
        Trials between two points.

    Returns
    -------
    matplotlib.figure.Figure
        Not attached to any window.
    """
    with style():
        figure = canvas()
        axes = figure.add_subplot()
        for (label, (inside, outside)), colour in zip(points.items(), palette(len(points)), strict=True):
            found = budget(inside, outside, step)
            axes.plot(found["trials"], found["ood"], "o-", color=colour, label=label, markersize=4)
            axes.plot(found["trials"], found["oracle"], ":", color=colour, linewidth=1.2)
        axes.plot([], [], ":", color=PALE, label="chosen by the held-out domain (oracle)")
        axes.set(xlabel="trials", ylabel="held-out accuracy")
        axes.set_title(f"held out: {held_out}", fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
        legend(figure, axes, columns=2)
    return figure
