"""Euclidean projection on a worker's own feasible set: what weakly regularised local training tends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clients.base import Oracle, State, Told, told
from fedsim.tree import Tree


@dataclass(frozen=True)
class Projection:
    """Move a linear classifier to the nearest one that gives all of the worker's rows a margin of 1.

    ``theta <- argmin_v |v - theta|`` subject to ``s_j x_j . v >= 1`` for all rows j, ``s = 2 y - 1``: up to a factor
    ``log(1 / mu)`` the limit of exact local training with a proximal term ``mu -> 0``. Averaged by
    ``AnchoredAverage(anchored=False)`` these are parallel projections, which end at some common feasible point;
    anchored they end at the hard-margin vector.

    It needs ``model = "Linear(bias=False)"``, ``batch-size = 0`` and ``local-steps = 1``, and runs on the plan ``loop``
    only (``auto`` takes it): each worker solves a quadratic problem of its own.

    Raises
    ------
    ValueError
        While running, if a worker's rows are not separable or the model is another one.

    References
    ----------
    Evron et al. (2023), Continual learning in linear classification on separable data, arXiv:2306.03534. Zhu,
    Vardhan, Mazumdar (2024), arXiv:2412.07971.
    """

    def init(self, theta: Tree) -> State:
        """Remember nothing."""
        return {}

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Project on the feasible set of the batch."""
        from fedsim.least_distance import least_distance  # brings scipy, which few runs need

        ((name, w),) = theta.items()
        x, y = oracle.batch
        z = ((2 * y - 1)[:, None] * x.flatten(1)).double()
        lack = 1 - z @ w.flatten().double()
        _, loss = oracle.grad(theta)
        if not bool((lack > 0).any()):
            return theta, state, told(loss)
        move = torch.from_numpy(least_distance(z.cpu().numpy(), lack.cpu().numpy())[0])
        return {name: w + move.to(w).view(w.shape)}, state, told(loss)
