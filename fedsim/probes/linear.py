"""What probes of linear models share: the training rows with their weights, the model as a matrix, the step size."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from clients import SGD
from fedsim.models import Linear
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
    return torch.cat([x.double().reshape(len(x), -1) for x in model.values()], dim=1)


def features(federation: Federation, model: Tree) -> np.ndarray:
    """Return the training rows ``[N, d]``, worker after worker, with a last entry 1 if the model has a bias."""
    order = federation.train.order.to(federation.dataset.x.device)
    x = federation.dataset.x[order].flatten(1).double().cpu().numpy()
    return np.hstack([x, np.ones((len(x), 1))]) if len(model) > 1 else x


def scores(federation: Federation, w: Tensor, rows: Tensor) -> Tensor:
    """Return the outputs ``[N, C]`` of the matrix ``w`` ``[C, d]`` on rows of the data set."""
    x = federation.dataset.x.flatten(1)
    w = w.to(x.dtype)
    out = x @ w[:, : x.shape[1]].T
    if w.shape[1] > x.shape[1]:
        out = out + w[:, -1]
    return out[rows]


def weights(experiment: Experiment, federation: Federation) -> np.ndarray:
    """Return the workers' weights ``p_i`` in the average, ``[W]``, sum 1."""
    p = experiment.parts.strategy.weight(federation.train.sizes).double().numpy()
    return p / p.sum()


def row_weights(experiment: Experiment, federation: Federation) -> np.ndarray:
    """Return ``p_i / n_i`` of every training row, ``[N]``, in the order of `features`."""
    sizes = federation.train.sizes.numpy()
    return np.repeat(weights(experiment, federation) / sizes, sizes)


def step_size(experiment: Experiment) -> float | None:
    """Return the step size of plain gradient descent with plain averaging; None for every other algorithm."""
    client, strategy = experiment.parts.client, experiment.parts.strategy
    if type(client) is not SGD or client.momentum or client.weight_decay:
        return None
    return client.lr if isinstance(strategy, FedAvg) else None


def check_step(experiment: Experiment, nodes: list[np.ndarray], curvature: float) -> None:
    """Warn once about a learning rate beyond ``2 / beta``, ``beta = curvature max_i |X_i|_2^2 / n_i``.

    Parameters
    ----------
    experiment : Experiment
        The run.
    nodes : list of ndarray
        Rows of each worker, ``[n_i, d]``.
    curvature : float
        Largest second derivative of the loss by the output: 1/4 logistic, 1 squared (half) and, at 0, exponential.
    """
    eta = step_size(experiment)
    if eta is None:
        return
    beta = curvature * max(float(np.linalg.norm(x, 2)) ** 2 / len(x) for x in nodes)
    if eta * beta > 2:
        warnings.warn(
            f"client = {experiment.client!r}: lr = {eta:g} is beyond the stability bound 2 / beta = {2 / beta:.6g}; "
            "the loss may rise before it falls, or diverge",
            stacklevel=2,
        )
