"""What probes of linear models share: the training rows with their weights, the model as a matrix, the step size."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from clients import SGD, Prox
from fedsim.models import Linear
from fedsim.step_sizes import curvature, settle, smoothness
from fedsim.tree import Tree
from strategies import FedAvg

if TYPE_CHECKING:
    from fedsim.experiment import Experiment
    from fedsim.federation import Federation


def need_linear(experiment: Experiment, federation: Federation, tasks: tuple[str, ...]) -> None:
    """Refuse an experiment whose model is not linear or whose task is another one.

    Parameters
    ----------
    experiment : Experiment
        The run.
    federation : Federation
        Its data.
    tasks : tuple of str
        Tasks that the probe knows.

    Raises
    ------
    ValueError
        In one line.
    """
    if not isinstance(experiment.parts.model, Linear):
        raise ValueError(
            f"model = {experiment.model!r} must be linear, for instance 'Linear(bias=False, zero_init=True)'; "
            "for networks see NormalisedMargin()"
        )
    if federation.dataset.task not in tasks:
        raise ValueError(
            f"the task of the data is {federation.dataset.task!r}, must be one of {', '.join(tasks)}"
        )


def matrix(model: Tree) -> Tensor:
    """Write a linear model as one matrix ``[C, d]`` in float64; a bias is its last column."""
    if len(model) == 1:
        return next(iter(model.values())).double()
    return torch.cat([x.double().reshape(len(x), -1) for x in model.values()], dim=1)


def scores(federation: Federation, w: Tensor, rows: Tensor | None) -> Tensor:
    """Return the outputs ``[N, C]`` of the matrix ``w`` ``[C, d]`` on rows of the data set, None for all of them."""
    x = federation.dataset.x.flatten(1)
    w = w.to(x.dtype)
    out = x @ w[:, : x.shape[1]].T
    if w.shape[1] > x.shape[1]:
        out = out + w[:, -1]
    return out if rows is None else out[rows]


def weights(experiment: Experiment, federation: Federation) -> np.ndarray:
    """Return the workers' weights ``p_i`` in the average, ``[W]``, sum 1."""
    p = experiment.parts.strategy.weight(federation.train.sizes).double().numpy()
    return p / p.sum()


def row_weights(experiment: Experiment, federation: Federation) -> np.ndarray:
    """Return ``p_i / n_i`` of every training row, ``[N]``, in the order of `features`."""
    sizes = federation.train.sizes.numpy()
    return np.repeat(weights(experiment, federation) / sizes, sizes)


def step_size(
    experiment: Experiment, federation: Federation, strategies: tuple[type, ...] = (FedAvg,)
) -> float | None:
    """Return the step size of plain gradient descent under one of some strategies; None for every other algorithm."""
    client = settle(experiment, federation)
    if type(client) is not SGD or client.momentum or client.weight_decay:
        return None
    return client.lr if isinstance(experiment.parts.strategy, strategies) else None


def check_step(experiment: Experiment, federation: Federation) -> None:
    """Warn about a step size beyond ``2 / (beta + mu)`` of gradient descent, with or without a proximal term.

    Parameters
    ----------
    experiment : Experiment
        The run; its model is linear.
    federation : Federation
        Its data and model.
    """
    client, mu = settle(experiment, federation), 0.0
    if type(client) is Prox:
        client, mu = client.inner, client.mu
    if type(client) is not SGD or client.momentum or curvature(federation.objective) is None:
        return
    beta = smoothness(experiment, federation)
    if client.lr * (beta + mu) > 2:
        name = "2 / (beta + mu)" if mu else "2 / beta"
        warnings.warn(
            f"client = {experiment.client!r}: lr = {client.lr:g} is beyond the stability bound {name} = "
            f"{2 / (beta + mu):.6g}; the loss may rise before it falls, or diverge",
            stacklevel=2,
        )
