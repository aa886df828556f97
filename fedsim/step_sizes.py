"""Step sizes of linear models: how large the data let them be."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from clients import SGD, LocalRule, ScaledSGD
from fedsim.models import Linear
from fedsim.objectives import CrossEntropy, Exponential, Logistic, SquaredError
from fedsim.tree import Tree

if TYPE_CHECKING:
    from fedsim.experiment import Experiment
    from fedsim.federation import Federation


def features(federation: Federation, model: Tree) -> np.ndarray:
    """Return the training rows ``[N, d]``, worker after worker, with a last entry 1 if the model has a bias.

    Parameters
    ----------
    federation : Federation
        The data.
    model : Tree
        Parameters of a linear model.

    Returns
    -------
    ndarray
        In float64.
    """
    order = federation.train.order.to(federation.dataset.x.device)
    x = federation.dataset.x[order].flatten(1).double().cpu().numpy()
    return np.hstack([x, np.ones((len(x), 1))]) if len(model) > 1 else x


def curvature(objective: Any) -> float | None:
    """Return the largest second derivative of a loss by the outputs, None where there is none.

    Parameters
    ----------
    objective : Objective
        The loss of a row.

    Returns
    -------
    float or None
        1/4 for `Logistic`, 1 for `Exponential` (at 0), 1/2 for `CrossEntropy`, 2 or 1 for `SquaredError`.
    """
    if isinstance(objective, SquaredError):
        return 1.0 if objective.half else 2.0
    known = {Logistic: 0.25, Exponential: 1.0, CrossEntropy: 0.5}
    return known.get(type(objective))


def smoothness(experiment: Experiment, federation: Federation) -> float:
    """Return ``beta = h max_i |X_i|_2^2 / n_i``, a bound of the curvature of the workers' losses on a linear model.

    Parameters
    ----------
    experiment : Experiment
        The run.
    federation : Federation
        Rows of all workers.

    Returns
    -------
    float
        With ``h`` of `curvature`.

    Raises
    ------
    ValueError
        If the model is not linear, the objective has no such bound, or rows of some workers are not known here.
    """
    h = curvature(federation.objective)
    if not isinstance(experiment.parts.model, Linear) or h is None:
        raise ValueError(
            f"no bound on the curvature is known for model = {experiment.model!r} with objective = "
            f"{experiment.objective!r}; it needs 'Linear(...)' and a convex loss of its outputs"
        )
    if federation.train.num_workers < experiment.num_workers:
        raise ValueError("a node that knows only its own rows cannot bound the curvature; write SGD(lr=...)")
    nodes = np.split(features(federation, federation.theta), federation.train.offsets[1:-1].numpy())
    return h * max(float(np.linalg.norm(x, 2)) ** 2 / len(x) for x in nodes if len(x))


def settle(experiment: Experiment, federation: Federation) -> LocalRule:
    """Return the experiment's local rule with every `ScaledSGD` in it replaced by ``SGD(lr)``.

    Parameters
    ----------
    experiment : Experiment
        The run.
    federation : Federation
        Its data and model.

    Returns
    -------
    LocalRule
        What workers really do.

    Raises
    ------
    ValueError
        In one line, if the step size cannot be known.
    """
    return _settled(experiment.parts.client, experiment, federation)


def _settled(rule: Any, experiment: Experiment, federation: Federation) -> LocalRule:
    if isinstance(rule, ScaledSGD):
        steps = experiment.local_steps if rule.mode == "scaled" else 1
        if not steps:
            raise ValueError(f"{rule!r} divides by the local steps; set local-steps instead of local-epochs")
        return SGD(lr=rule.c / (smoothness(experiment, federation) * steps))
    if any(field.name == "inner" for field in dataclasses.fields(rule)):
        inner = _settled(rule.inner, experiment, federation)
        return rule if inner is rule.inner else dataclasses.replace(rule, inner=inner)
    return rule
