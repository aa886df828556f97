"""Server optimisers on the pseudo-gradient, in the form of their papers.

Flower ships strategies of the same names with other arithmetic (bias correction in FedAdam, second moments
that start at 0); they are ``flwr.FedAdam(...)`` and so on here.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim import checks, tree
from fedsim.tree import Stack, Tree
from strategies.base import Broadcast, MeanRule, Report, State


@dataclass(frozen=True)
class FedAvgM(MeanRule):
    """Heavy-ball momentum on the server.

    ``D = theta - sum_i p_i theta_i``; ``v <- momentum v + D``; ``theta <- theta - lr v``; ``v`` starts at 0.

    Parameters
    ----------
    lr : float
        Server learning rate, > 0.
    momentum : float
        In [0, 1); 0 with ``lr = 1`` is `FedAvg`.

    References
    ----------
    Hsu, Qi, Brown (2019), Measuring the effects of non-identical data distribution for federated
    visual classification, arXiv:1909.06335.
    """

    lr: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive(self, "lr")
        checks.unit(self, "momentum")

    def init(self, theta: Tree, num_workers: int) -> tuple[State, Broadcast]:
        """Start with velocity 0."""
        return {"model": theta, "velocity": tree.zeros_like(theta)}, {"model": theta}

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Make one heavy-ball step along the pseudo-gradient."""
        gap = tree.sub(state["model"], tree.mean(rows, report.weight))
        velocity = tree.axpy(self.momentum, state["velocity"], gap)
        model = tree.axpy(-self.lr, velocity, state["model"])
        return {"model": model, "velocity": velocity}, {"model": model}


@dataclass(frozen=True)
class Adaptive(MeanRule):
    """Base class of the adaptive server optimisers of Reddi et al. (2021), arXiv:2003.00295.

    ``d = sum_i p_i theta_i - theta``; ``m <- beta1 m + (1 - beta1) d``; ``v <- second(v, d)``;
    ``theta <- theta + lr m / (sqrt(v) + tau)``; ``m`` starts at 0, ``v`` at ``tau^2``; no bias correction.

    Parameters
    ----------
    lr : float
        Server learning rate, > 0.
    beta1, beta2 : float
        Decay of the moments, in [0, 1).
    tau : float
        Adaptivity, > 0.
    """

    lr: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive(self, "lr", "tau")
        checks.unit(self, "beta1", "beta2")

    @abstractmethod
    def second(self, v: Tensor, d: Tensor) -> Tensor:
        """Update the second moment of one leaf."""

    def init(self, theta: Tree, num_workers: int) -> tuple[State, Broadcast]:
        """Start with ``m = 0`` and ``v = tau^2``."""
        v = tree.tree_map(lambda x: torch.full_like(x, self.tau**2), theta)
        return {"model": theta, "m": tree.zeros_like(theta), "v": v}, {"model": theta}

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Make one step along the mean displacement."""

        def update(x: Tensor, m: Tensor, v: Tensor) -> Tensor:
            return x + self.lr * m / (v.sqrt() + self.tau)

        d = tree.sub(tree.mean(rows, report.weight), state["model"])
        m = tree.lerp(state["m"], d, 1 - self.beta1)
        v = tree.tree_map(self.second, state["v"], d)
        model = tree.tree_map(update, state["model"], m, v)
        return {"model": model, "m": m, "v": v}, {"model": model}


@dataclass(frozen=True)
class FedAdam(Adaptive):
    """Adam on the server: `Adaptive` with ``v <- beta2 v + (1 - beta2) d^2``."""

    def second(self, v: Tensor, d: Tensor) -> Tensor:
        """Average the squares."""
        return self.beta2 * v + (1 - self.beta2) * d * d


@dataclass(frozen=True)
class FedYogi(Adaptive):
    """Yogi on the server: `Adaptive` with ``v <- v - (1 - beta2) d^2 sign(v - d^2)``."""

    def second(self, v: Tensor, d: Tensor) -> Tensor:
        """Move towards the square at a rate that does not depend on the distance."""
        return v - (1 - self.beta2) * d * d * torch.sign(v - d * d)


@dataclass(frozen=True)
class FedAdagrad(Adaptive):
    """Adagrad on the server: `Adaptive` with ``v <- v + d^2`` and, by default, ``beta1 = 0``.

    ``beta2`` is not used.
    """

    beta1: float = 0.0

    def second(self, v: Tensor, d: Tensor) -> Tensor:
        """Sum the squares."""
        return v + d * d
