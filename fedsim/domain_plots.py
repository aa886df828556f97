"""Figures of accuracy in the training domains against accuracy in held-out ones, a panel a held-out domain, which its title names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from fedsim.analysis.generalisation import bins, budget
from fedsim.canvas import HEIGHT, PALE, WIDTH, canvas, legend, palette, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURES = {
    "train": "training",
    "id": "training domains, new rows",
    "ood": "held-out domain",
    "gap": "difference of these",
}
"""What is summarised of runs (see `fedsim.analysis.generalisation.boxes`)."""


def scatter(runs: pd.DataFrame, *, threshold: float = 0.0, width: float = 0.1) -> Figure:
    """Draw OOD against ID accuracy, a dot a run, and the mean OOD of each bin of ID over the runs that are kept.

    Parameters
    ----------
    runs : pandas.DataFrame
        Columns ``held_out``, ``label``, ``id`` and ``ood``, a row a run.
    threshold : float
        Runs with less ID accuracy are drawn pale and not averaged; each panel then says how many of each label are left.
    width : float
        Of the bins; a line joins their means, in the middle of each.

    Returns
    -------
    matplotlib.figure.Figure
        Not attached to any window.
    """
    labels = list(dict.fromkeys(runs["label"]))
    colours = dict(zip(labels, palette(len(labels)), strict=True))
    with style():
        figure, panels = _panels(runs)
        for axes, own in panels:
            said = []
            for label, some in own.groupby("label", sort=False):
                inside, outside = (some[k].to_numpy(dtype=float) for k in ("id", "ood"))
                kept, colour = inside >= threshold, colours[label]
                said.append(f"{label} {kept.sum()} of {len(kept)}")
                axes.scatter(inside[kept], outside[kept], s=12, color=colour, alpha=0.6, linewidth=0)
                axes.scatter(inside[~kept], outside[~kept], s=8, color=colour, alpha=0.35, linewidth=0)
                line = "o-"
                if kept.any():
                    found = bins(inside[kept], outside[kept], width)
                    middle, there = (found.edges[:-1] + found.edges[1:]) / 2, found.count > 0
                    axes.plot(
                        middle[there], found.mean[there], line, color=colour, markersize=5, linewidth=1.4
                    )
                axes.plot([], [], line, color=colour, markersize=5, linewidth=1.4, label=label)
            if threshold > 0:
                axes.axvline(threshold, color=PALE, linewidth=0.8, linestyle="--")
                text = "kept\n" + "\n".join(said)
                axes.text(0.02, 0.98, text, transform=axes.transAxes, va="top", fontsize="x-small")
            axes.set_xlabel("accuracy in the training domains")
        limits = panels[0][0].get_xlim(), panels[0][0].get_ylim()  # the diagonal is not to widen them
        for axes, _ in panels:
            axes.axline((0, 0), slope=1, color=PALE, linewidth=0.8, linestyle=":")
            axes.set(xlim=limits[0], ylim=limits[1])
        legend(figure, panels[0][0], columns=5)
    return figure


def binned(runs: pd.DataFrame, *, threshold: float = 0.0, width: float = 0.1) -> Figure:
    """Draw the mean OOD accuracy of each bin of ID accuracy as bars, with the number of runs on each.

    Parameters
    ----------
    runs : pandas.DataFrame
        As for `scatter`.
    threshold : float
        Runs with less ID accuracy are left out.
    width : float
        Of the bins; 1 is a multiple of it.

    Returns
    -------
    matplotlib.figure.Figure
        Not attached to any window.
    """
    runs = runs.loc[runs["id"] >= threshold]
    labels = list(dict.fromkeys(runs["label"]))
    with style():
        figure, panels = _panels(runs, wide=True)
        for axes, own in panels:
            for i, (label, colour) in enumerate(zip(labels, palette(len(labels)), strict=True)):
                some = own.loc[own["label"] == label]
                found = bins(some["id"].to_numpy(dtype=float), some["ood"].to_numpy(dtype=float), width)
                left = (found.edges[:-1] + found.edges[1:]) / 2 - 0.4 * width
                there, each = found.count > 0, 0.8 * width / len(labels)
                drawn = axes.bar(
                    left[there] + i * each, found.mean[there], each, align="edge", color=colour, label=label
                )
                axes.bar_label(drawn, [str(n) for n in found.count[there]], fontsize="x-small", padding=1)
            axes.set_xlabel(f"accuracy in the training domains, bins of width {width:g}")
            axes.grid(visible=False, axis="x")
        legend(figure, panels[0][0], columns=5)
    return figure


def boxplots(runs: pd.DataFrame, *, threshold: float = 0.0, top: int = 10) -> Figure:
    """Draw training, ID and OOD accuracy and the gap of each label as boxes: of all runs, of those kept and of the best by ID.

    Parameters
    ----------
    runs : pandas.DataFrame
        As for `scatter`, with ``train``.
    threshold : float
        Least ID accuracy of the runs that are kept.
    top : int
        How many of the best by ID.

    Returns
    -------
    matplotlib.figure.Figure
        A row a held-out domain and a column a figure; whiskers reach to the extremes.
    """
    runs = runs.assign(gap=runs["id"] - runs["ood"])
    names, labels = list(dict.fromkeys(runs["held_out"])), list(dict.fromkeys(runs["label"]))
    best = runs.sort_values("id", ascending=False, kind="stable").groupby(["held_out", "label"]).head(top)
    subsets = {
        "all runs": runs,
        f"ID accuracy from {threshold:g}": runs[runs["id"] >= threshold],
        f"the {top} best by ID": best,
    }
    with style():
        figure = canvas(2.4 * WIDTH, 0.6 + 0.8 * HEIGHT * len(names))
        grid = figure.subplots(len(names), len(FIGURES), squeeze=False, sharex=True)
        for row, held_out in zip(grid, names, strict=True):
            for axes, (column, name) in zip(row, FIGURES.items(), strict=True):
                for i, ((_, some), colour) in enumerate(zip(subsets.items(), palette(3), strict=True)):
                    own = some[some["held_out"] == held_out]
                    values = [
                        own.loc[own["label"] == label, column].to_numpy(dtype=float) for label in labels
                    ]
                    axes.boxplot(
                        values, positions=np.arange(len(labels)) + (i - 1) * 0.27, widths=0.22, whis=(0, 100), manage_ticks=False,
                        patch_artist=True, boxprops={"facecolor": colour, "alpha": 0.5, "linewidth": 0.8},
                        medianprops={"color": colour, "linewidth": 1.6}, whiskerprops={"linewidth": 0.8},
                        capprops={"linewidth": 0.8},
                    )  # fmt: skip
                axes.set_xticks(np.arange(len(labels)), labels, rotation=30)
                axes.set_title(f"{name}\nheld out: {held_out}", fontsize="small")
                axes.spines[["top", "right"]].set_visible(False)
                axes.grid(visible=False, axis="x")
            row[0].set_ylabel("accuracy")
        for name, colour in zip(subsets, palette(3), strict=True):
            grid[0, 0].fill_between([], [], [], color=colour, alpha=0.5, label=name)
        legend(figure, grid[0, 0], columns=3)
    return figure


def budgets(runs: pd.DataFrame, *, step: int = 10, top: int = 10) -> Figure:
    """Draw what so many trials reach: OOD accuracy of the best run by ID, of the best by OOD, which is an oracle, and means.

    Parameters
    ----------
    runs : pandas.DataFrame
        As for `scatter`.
    step : int
        Trials between two points.
    top : int
        Runs of the mean over the best by ID.

    Returns
    -------
    matplotlib.figure.Figure
        Above, full lines are what a choice by ID gets and dotted ones the oracle; below, dashed lines are the mean of the ``top`` best by ID
        and dash-dotted ones the mean of all.
    """
    labels = list(dict.fromkeys(runs["label"]))
    colours = dict(zip(labels, palette(len(labels)), strict=True))
    kinds = [
        {"ood": ("o-", "the best by ID"), "oracle": (":", "the best by OOD (oracle)")},
        {"top": ("--", f"mean of the {top} best by ID"), "mean": ("-.", "mean of all")},
    ]
    with style():
        figure, panels = _panels(runs, rows=2)
        for i, (axes, own) in enumerate(panels):
            drawn = kinds[2 * i // len(panels)]
            for label, some in own.groupby("label", sort=False):
                found = budget(some["id"].to_numpy(dtype=float), some["ood"].to_numpy(dtype=float), step, top)
                for kind, (line, _) in drawn.items():
                    axes.plot(
                        found["trials"],
                        found[kind],
                        line,
                        color=colours[str(label)],
                        markersize=4,
                        linewidth=1.3,
                    )
            axes.set_xlabel("trials")
        first = panels[0][0]
        for label, colour in colours.items():
            first.plot([], [], "-", color=colour, label=label)
        for line, name in (pair for group in kinds for pair in group.values()):
            first.plot([], [], line, color=PALE, markersize=4, label=name)
        legend(figure, first, columns=4 if len(panels) > 2 else 2)
    return figure


def _panels(
    runs: pd.DataFrame, rows: int = 1, wide: bool = False
) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """Make panels, a column for each held-out domain, or a row where they are wide, and give them its runs; row after row."""
    names = list(dict.fromkeys(runs["held_out"]))
    across = 1 if wide else len(names)
    down = len(names) if wide else rows
    size = (2 if wide else 0.9 * across if across > 1 else 1, 0.35 + (0.65 if wide else 0.8) * down)
    figure = canvas(WIDTH * size[0], HEIGHT * size[1])
    grid = figure.subplots(down, across, squeeze=False, sharey=True, sharex=True)
    found = []
    for row in grid:
        row[0].set_ylabel("held-out accuracy")
    for i, axes in enumerate(grid.flat):
        name = names[i % len(names)]
        axes.set_title(f"held out: {name}", fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
        found.append((axes, runs.loc[runs["held_out"] == name]))
    return figure, found
