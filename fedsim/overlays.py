"""Figures of several runs: curves with their spread over seeds, and final values over a grid of settings."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from fedsim import runs
from fedsim.canvas import (
    AXES,
    HEIGHT,
    MOST_POINTS,
    WIDTH,
    along,
    canvas,
    finish,
    legend,
    marks,
    palette,
    points,
    style,
)
from fedsim.groups import Group, held_out, leading, present, summarise
from fedsim.plots import Drawing
from fedsim.results import BETTER, DOMAINS, NAMES, PROBED, over_seeds, plus_minus

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CURVES = 10
"""Groups in an overlay; of more, those with the best final values are drawn."""

OUTSIDE = (*DOMAINS, "test_accuracy", "test_loss")
"""Figures whose title names the held-out domain, where there is one."""


def overlay(groups: Sequence[Group], column: str, x: str = "round", title: str = "") -> Figure | None:
    """Draw a column of several groups: the mean over seeds, and one standard deviation as a band.

    Parameters
    ----------
    groups : sequence of Group
        At most `MOST_CURVES` are told apart by colour.
    column : str
        Of the history.
    x : str
        One of `fedsim.canvas.AXES`.
    title : str
        Of the figure, such as the held-out domain.

    Returns
    -------
    matplotlib.figure.Figure or None
        None if no group has a finite value.
    """
    with style():
        figure = canvas(WIDTH, HEIGHT + 0.2 * max(0, len(groups) - 2))
        axes = figure.add_subplot()
        drawn, ends, longest = [], [], 0
        for i, (g, colour) in enumerate(zip(groups, palette(len(groups)), strict=True)):
            place, mean, sd = _mean(g.runs, column, x)
            if not len(mean):
                continue
            label = "\n".join(textwrap.wrap(g.label, 56))
            line = ("-", "--", ":")[i // MOST_CURVES % 3]
            axes.plot(place, mean, color=colour, label=label, linestyle=line, marker=marks(mean))
            longest = max(longest, len(place))
            if np.any(sd > 0):
                axes.fill_between(place, mean - sd, mean + sd, color=colour, alpha=0.2, linewidth=0)
            drawn.append(mean)
            ends.append(place[-1])
        if not drawn:
            return None
        finish(axes, NAMES.get(column, column), x, np.concatenate(drawn))
        if x != "round" and max(ends) > 8 * min(ends) > 0:
            axes.set_xscale("log")  # what they cost is of different orders
        if column in PROBED and longest >= 20:
            axes.set_xscale("log")  # these fall like powers, or like powers of a logarithm
            if min(y.min() for y in drawn) > 0:
                axes.set_yscale("log")
        axes.set_title(title, fontsize="small")
        legend(figure, axes, columns=1 if max(len(g.label) for g in groups) > 24 else 2)
    return figure


def overlays(groups: Sequence[Group]) -> list[Drawing]:
    """Draw the main figures of several groups against rounds, and the leading one and the loss against what they cost.

    Parameters
    ----------
    groups : sequence of Group
        Of more than `MOST_CURVES`, those with the best final values are drawn.

    Returns
    -------
    list of Drawing
        Those that have something to show.
    """
    table = summarise(groups)
    chief = leading(table)
    chosen, some = list(groups), ""
    if len(groups) > MOST_CURVES:
        values = table[f"{chief}.final"].to_numpy(dtype=float) * (1 if BETTER[chief] is min else -1)
        chosen, some = (
            [groups[i] for i in sorted(np.argsort(values)[:MOST_CURVES])],
            f" The best {MOST_CURVES} of {len(groups)}.",
        )
    spread = " Mean and standard deviation over seeds." if any(len(g.runs) > 1 for g in chosen) else ""
    away, shown = held_out(chosen), present(table)
    wanted = [(c, "round") for c in shown if c not in ("held_loss.mean",)]
    wanted += [(c, x) for c in dict.fromkeys((chief, "test_loss")) for x in AXES if x != "round"]
    drawn = []
    for column, x in wanted:
        if not any(len(points(run.history, column, x)[1]) for g in chosen for run in g.runs):
            continue
        figure = overlay(chosen, column, x, f"held out: {away}" if away and column in OUTSIDE else "")
        if figure is not None:
            caption = f"{NAMES[column].capitalize()} against {AXES[x]}.{spread}{some}"
            drawn.append(Drawing(f"{column}-{x}", caption, figure))
    return drawn


def over_grid(
    settings: Sequence[Mapping[str, str]], finals: Sequence[float], column: str, away: str = ""
) -> Drawing | None:
    """Draw the final values of a main figure over a grid: a map, or points for a grid of a single key.

    Parameters
    ----------
    settings : sequence of mapping
        Values of the grid's keys, one mapping a run; runs that are equal in them are averaged.
    finals : sequence of float
        Final values of the runs, NaN for those that have none.
    column : str
        Name of the figure in the history.
    away : str
        The held-out domain that the title names; empty for none.

    Returns
    -------
    Drawing or None
        None if the grid has no key, or no run a value.
    """
    keys = list(settings[0])
    if not keys or not np.isfinite(np.asarray(finals, dtype=float)).any():
        return None
    places = [(each[keys[0]], ", ".join(list(each.values())[1:])) for each in settings]
    down, across = list(dict.fromkeys(d for d, _ in places)), list(dict.fromkeys(a for _, a in places))
    values: dict[tuple[str, str], list[float]] = {}
    for place, value in zip(places, finals, strict=True):
        values.setdefault(place, []).append(value)
    spread = [[over_seeds(values[d, a]) for a in across] for d in down]
    mean = np.array([[v.mean for v in row] for row in spread])
    sd = np.array([[v.sd for v in row] for row in spread])
    over = ", mean and standard deviation over seeds" if np.isfinite(sd).any() else ""
    caption = f"{NAMES[column].capitalize()} after the last round{over}."
    with style():
        if len(keys) > 1:
            figure = _map(mean, sd, keys, down, across, NAMES[column])
        else:
            figure = _points(mean[:, 0], sd[:, 0], keys[0], down, NAMES[column])
        if away:
            figure.axes[0].set_title(f"held out: {away}", fontsize="small")
    return Drawing(f"grid-{column}", caption, figure)


def _points(mean: np.ndarray, sd: np.ndarray, key: str, values: list[str], name: str) -> Figure:
    figure = canvas(WIDTH, max(2.0, 0.9 + 0.32 * len(values)))
    axes = figure.add_subplot()
    axes.errorbar(mean, np.arange(len(mean)), xerr=np.nan_to_num(sd), fmt="o", capsize=3, color=palette(1)[0])
    axes.set_yticks(np.arange(len(values)), values)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set(xlabel=f"{name}, final", ylabel=key)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _map(
    mean: np.ndarray, sd: np.ndarray, keys: list[str], down: list[str], across: list[str], name: str
) -> Figure:
    import seaborn as sns

    height = max(0.8 * HEIGHT, 1.5 + 0.45 * len(down))
    figure = canvas(max(WIDTH, 2.2 + 1.15 * len(across)), height)
    axes = figure.add_subplot()
    written = np.array([
        [plus_minus(m, s).replace(" ± ", "\n± ") for m, s in zip(*r, strict=True)]
        for r in zip(mean, sd, strict=True)
    ])
    sns.heatmap(
        mean, annot=written, fmt="", cmap="cividis", xticklabels=across, yticklabels=down, linewidths=1, ax=axes,
        annot_kws={"fontsize": "small"}, cbar_kws={"label": f"{name}, final"},
    )  # fmt: skip
    axes.set(xlabel=", ".join(keys[1:]), ylabel=keys[0])
    axes.tick_params(axis="y", rotation=0)
    axes.tick_params(axis="x", rotation=0 if max(map(len, across)) < 11 else 30)
    return figure


def _mean(members: Sequence[runs.Run], column: str, x: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Average a column over the rounds that all runs have; without thinning, as rounds must meet."""
    found = []
    for run in members:
        if column in run.history:
            y = np.asarray(run.history[column], dtype=float)
            frame = pd.DataFrame({"round": run.history["round"], "x": along(run.history, x), "y": y})
            found.append(frame[np.isfinite(y)])
    if not found:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    both = (
        pd
        .concat(found)
        .groupby("round")
        .agg(x=("x", "mean"), mean=("y", "mean"), sd=("y", "std"), n=("y", "size"))
    )
    both = both[(both["n"] == len(found)) & np.isfinite(both["x"])]
    stride = max(1, -(-len(both) // MOST_POINTS))
    both = both.iloc[::-1].iloc[::stride].iloc[::-1]
    return both["x"].to_numpy(), both["mean"].to_numpy(), both["sd"].fillna(0.0).to_numpy()
