"""Figures of paths: gamma with what chance and other end points give, RSI and EB, and the locally optimal learning rate."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from fedsim.analysis.geometry import before_last, column, controls, derive
from fedsim.canvas import HEIGHT, PALE, WIDTH, canvas, finish, legend, marks, palette, style
from fedsim.experiment import BadInput
from fedsim.geometry import CONTROLS, FOLDER
from fedsim.plots import Drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTIONS = {
    "steps": "Local steps against the point where the run ends: means over the steps of each round, and lowest and highest "
    "as a band. Beside gamma: what independent steps of these lengths would have, what these steps have with the rounds in "
    "another order, and other end points.",
    "rounds": "Rounds against the point where the run ends: the mean displacement of the workers. Beside gamma: what "
    "independent steps of these lengths would have, what these rounds have in another order, and other end points.",
}
"""What the figures show."""


def path(table: pd.DataFrame, permuted: ArrayLike | None = None, *, title: str = "") -> Figure | None:
    """Draw gamma with its controls, RSI and EB, and the locally optimal learning rate over the rounds but the last.

    Parameters
    ----------
    table : pandas.DataFrame
        Steps or rounds of a `fedsim.geometry.Trace`.
    permuted : array_like or None
        A number a round: the column ``permuted_steps`` or ``permuted`` of the rounds.
    title : str
        Above the figure.

    Returns
    -------
    matplotlib.figure.Figure or None
        Not attached to any window; None if there is a single round only.
    """
    found = before_last(derive(table))
    if not len(found):
        return None
    number = column(found, "round")
    at, first = np.unique(number, return_index=True)  # rows are in the order of rounds

    def over_rounds(name: str, take: Callable[[np.ndarray], float] = np.mean) -> np.ndarray:
        parts = [part[np.isfinite(part)] for part in np.split(column(found, name), first[1:])]
        return np.array([take(part) if len(part) else math.nan for part in parts])

    with style():
        figure = canvas(1.25 * WIDTH, 2.1 * HEIGHT)
        top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
        own, update, *others = palette(2 + len(CONTROLS))
        if len(found) > len(at):
            low, high = over_rounds("gamma", np.min), over_rounds("gamma", np.max)
            top.fill_between(at, low, high, color=own, alpha=0.15, linewidth=0)
        drawn: list[tuple[np.ndarray, str, dict[str, Any]]] = []
        drawn.append((over_rounds("gamma"), "own end point", {"color": own}))
        if not np.allclose(column(found, "gamma"), column(found, "gamma_update"), atol=1e-6, equal_nan=True):
            drawn.append((over_rounds("gamma_update"), "own end point, of updates", {"color": update}))
        colours = dict(zip(CONTROLS, others, strict=True))
        for name in controls(table):
            look = {"color": colours.get(name, PALE), "linewidth": 1.3, "linestyle": "--"}
            drawn.append((over_rounds(f"gamma.{name}"), f"end point: {CONTROLS.get(name, name)}", look))
        look = {"color": "black", "linewidth": 1.2, "linestyle": ":"}
        drawn.append((over_rounds("null"), "random walk", look))
        if permuted is not None:
            values = np.asarray(permuted, dtype=float)[: len(at)]
            drawn.append((values, "rounds in random order", {"color": PALE, "linewidth": 1.2}))
        for values, label, look in drawn:
            top.plot(at, values, label=label, marker=marks(at), **look)
        top.axhline(0, color="black", linewidth=0.6)
        top.set_title(title, fontsize="small")
        ratios = [over_rounds(name) for name in ("rsi", "eb")]
        for values, label, colour in zip(ratios, ("RSI", "EB"), palette(2), strict=True):
            middle.plot(at, values, label=label, color=colour, marker=marks(at))
        middle.legend(fontsize="small")
        best = over_rounds("lr")
        bottom.plot(at, best, color=own, marker=marks(at))
        _finish(top, "gamma", np.array([0.0, 1.0]))
        _finish(middle, "RSI and EB", np.concatenate(ratios))
        _finish(bottom, "best rate\n(post hoc)", best)
        top.set_xlabel("")
        middle.set_xlabel("")
        legend(figure, top, columns=2)
    return figure


def _finish(axes: Axes, ylabel: str, values: np.ndarray) -> None:
    values = values[np.isfinite(values)]
    finish(axes, ylabel, "round", values if len(values) else np.zeros(1))


def drawings(directory: Path) -> Iterator[Drawing]:
    """Draw what `fedsim.geometry.write` has written.

    Parameters
    ----------
    directory : Path
        Run directory.

    Yields
    ------
    Drawing
        ``geometry_steps`` and ``geometry_rounds``; nothing where nothing was written.
    """
    folder = directory / FOLDER
    if not (folder / "summary.json").exists():
        return
    tables = {name: pd.read_csv(folder / f"{name}.csv") for name in ("steps", "rounds")}
    for name, order, title in (("steps", "permuted_steps", "local steps"), ("rounds", "permuted", "rounds")):
        permuted = column(tables["rounds"], order) if order in tables["rounds"] else None
        figure = path(tables[name], permuted, title=title)
        if figure is not None:
            yield Drawing(f"geometry_{name}", CAPTIONS[name], figure)


def save(directory: Path) -> list[Path]:
    """Draw what was written of a run into its folder ``figures``.

    Parameters
    ----------
    directory : Path
        Run directory.

    Returns
    -------
    list of Path
        The files.
    """
    folder = directory / "figures"
    folder.mkdir(exist_ok=True)
    files = []
    for name, _, figure in drawings(directory):
        files.append(folder / f"{name}.png")
        save_as(figure, files[-1])
    return files


def save_as(figure: Figure, file: Path) -> None:
    """Write a figure; the suffix says in which format.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        Of this module.
    file : Path
        Its folder is there.

    Raises
    ------
    BadInput
        If it cannot be written, or the format is unknown.
    """
    try:
        with style():
            figure.savefig(file, dpi=200)
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: cannot be written: {' '.join(str(error).split())}") from None


def read(directory: Path) -> dict[str, Any]:
    """Read the summary that `fedsim.geometry.write` has written, with NaN for what is undefined."""
    said = json.loads((directory / FOLDER / "summary.json").read_text(encoding="utf-8"))
    return {
        k: {name: math.nan if x is None else x for name, x in v.items()} if isinstance(v, dict) else v
        for k, v in said.items()
    }


def overview(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draw mean gamma of local steps and of rounds of several runs, with their controls.

    Parameters
    ----------
    found : mapping
        Label to the summaries of runs that differ in their seeds only; drawn from left to right, a dot a run and a line
        through the means.

    Returns
    -------
    matplotlib.figure.Figure
        Two panels: mean gamma, and the share of steps with gamma > 0; crosses are the same against the end of a run from
        another start, dotted the mean of gamma under a random walk of the same steps.
    """
    with style():
        figure = canvas(1.9 * WIDTH, 1.15 * HEIGHT)
        left, right = figure.subplots(1, 2)
        kinds = {"rounds": "rounds", "steps": "local steps"}
        for (kind, label), colour in zip(kinds.items(), palette(2), strict=True):
            for axes, name in ((left, "gamma"), (right, "positive")):
                values = [[run[kind].get(name, math.nan) for run in runs] for runs in found.values()]
                other = [
                    [run[kind].get(f"{name}.start", math.nan) for run in runs] for runs in found.values()
                ]
                _dots(axes, values, f"{label}, own end point", {"color": colour, "marker": "o"})
                _dots(
                    axes, other, f"{label}, end point: {CONTROLS['start']}", {"color": colour, "marker": "x"}
                )
            null = [[run[kind].get("null", math.nan) for run in runs] for runs in found.values()]
            _dots(left, null, f"{label}, random walk", {"color": colour, "marker": "", "linestyle": ":"})
        left.set_ylabel("mean gamma")
        right.set_ylabel("share of gamma > 0")
        for axes in (left, right):
            axes.axhline(0, color="black", linewidth=0.6)
            axes.set_xticks(range(len(found)), list(found), rotation=20, ha="right", fontsize="small")
            axes.margins(x=0.08)
            axes.spines[["top", "right"]].set_visible(False)
        legend(figure, left, columns=2)
    return figure


def _dots(axes: Axes, values: list[list[float]], label: str, look: dict[str, Any]) -> None:
    at = np.concatenate([np.full(len(v), i) for i, v in enumerate(values)])
    marker = look["marker"]
    if marker:
        axes.scatter(at, np.concatenate(values), color=look["color"], marker=marker, s=16, alpha=0.7)
    means = [float(np.mean(v)) for v in values]
    faint = {
        "color": look["color"],
        "linewidth": 1.4,
        "linestyle": look.get("linestyle", "-" if marker == "o" else "--"),
    }
    axes.plot(range(len(values)), means, label=label, marker=marker, markersize=5, **faint)
