"""Pictures of workers that move on a landscape of two parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, vmap

from fedsim import tree
from fedsim.canvas import HEIGHT, canvas, palette, style
from fedsim.carriers import InProcess
from fedsim.experiment import Experiment
from fedsim.federation import Federation, load
from fedsim.simulate import rounds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Paths(NamedTuple):
    """Where workers have been.

    Attributes
    ----------
    rows : Tensor
        ``[rounds + 1, W, 2]`` positions after each sync, from the start.
    model : Tensor
        ``[rounds + 1, 2]`` positions of the reported model.
    """

    rows: Tensor
    model: Tensor


def follow(experiment: Experiment) -> Paths:
    """Run an experiment whose model has two parameters, and keep all positions.

    Parameters
    ----------
    experiment : Experiment
        Its strategy keeps the workers' rows.

    Returns
    -------
    Paths
        On the CPU, float64.

    Raises
    ------
    ValueError
        If the model has more or fewer parameters, or workers keep no rows.
    """
    federation = load(experiment)
    if tree.num_parameters(federation.theta) != 2:
        raise ValueError(
            f"model = {experiment.model!r} has {tree.num_parameters(federation.theta)} parameters, must have 2"
        )
    if not experiment.parts.strategy.keeps_rows:
        raise ValueError(f"strategy = {experiment.strategy!r} keeps no rows of workers")
    carrier, everyone = InProcess(experiment, federation), torch.arange(experiment.num_workers)
    rows = [tree.flatten_rows(carrier.fetch(everyone).rows)]
    model = [tree.flatten(federation.theta)]
    for snapshot, _ in rounds(experiment, federation, carrier):
        rows.append(tree.flatten_rows(carrier.fetch(everyone).rows))
        model.append(tree.flatten(snapshot.model))
    return Paths(torch.stack(rows).double().cpu(), torch.stack(model).double().cpu())


def draw(experiments: dict[str, Experiment], size: int = 200) -> Figure:
    """Draw the workers' paths over level lines, a panel an experiment.

    Parameters
    ----------
    experiments : dict of str to Experiment
        By title; their models are functions of two parameters (`fedsim.landscapes`).
    size : int
        Points of the grid along each axis.

    Returns
    -------
    matplotlib.figure.Figure
        Lines from the starts (circles) to the ends (crosses), and the reported model dashed.
    """
    with style():
        figure = canvas(HEIGHT * 1.15 * len(experiments), HEIGHT * 1.15)
        panels = np.atleast_1d(figure.subplots(1, len(experiments), sharex=True, sharey=True))
        for axes, (title, experiment) in zip(panels, experiments.items(), strict=True):
            _panel(axes, load(experiment), follow(experiment), size)
            axes.set_title(title)
        panels[0].legend(fontsize="small", loc="lower right")
    return figure


def _panel(axes: Axes, federation: Federation, paths: Paths, size: int) -> None:
    every = torch.cat([paths.rows.flatten(0, 1), paths.model])
    low, high = every.min(0).values, every.max(0).values
    margin = 0.08 * float((high - low).max())
    x = torch.linspace(float(low[0]) - margin, float(high[0]) + margin, size, dtype=torch.float64)
    y = torch.linspace(float(low[1]) - margin, float(high[1]) + margin, size, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    sample, like = federation.dataset.x[:1], federation.theta

    def value(point: Tensor) -> Tensor:
        theta = tree.tree_map(lambda leaf, part: part.to(leaf), like, tree.unflatten(point, like))
        return functional_call(federation.module, theta, (sample,)).sum()

    with torch.no_grad():
        levels = vmap(value)(points.flatten(0, 1)).view(size, size).cpu()
    axes.contour(x, y, levels, levels=14, cmap="Greys", linewidths=0.6, alpha=0.7)
    for i, colour in enumerate(palette(paths.rows.shape[1])):
        path = paths.rows[:, i]
        axes.plot(path[:, 0], path[:, 1], color=colour, label=f"worker {i}")
        axes.plot(*path[0], "o", color=colour)
        axes.plot(*path[-1], "x", color=colour)
    axes.plot(paths.model[:, 0], paths.model[:, 1], color="black", linestyle="--", linewidth=1, label="model")
    axes.set_aspect("equal")
