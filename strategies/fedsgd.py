"""Server optimisers as PyTorch has them, on the mean gradient: FedSGD, and FedIRM with the schedule of its penalty."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fedsim import checks, tree
from fedsim.tree import Stack, Tree
from strategies.base import Broadcast, MeanRule, Report, State

OPTIMISERS = {
    "sgd": (),
    "momentum": ("first",),
    "nesterov": ("first",),
    "rmsprop": ("second",),
    "adam": ("first", "second"),
}
"""What each optimiser remembers."""


@dataclass(frozen=True)
class FedSGD(MeanRule):
    """Make one step of a centralised optimiser along ``g = theta - sum_i p_i theta_i``.

    With ``client = "SGD(lr=1.0)"`` and ``local-steps = 1``, g is the mean gradient and the run is centralised training. The arithmetic
    is that of ``torch.optim``: ``sgd`` steps along g; ``momentum`` along ``v <- beta1 v + g``; ``nesterov`` along
    ``g + beta1 v``; ``rmsprop`` along ``g / (sqrt(s) + eps)`` with ``s <- beta2 s + (1 - beta2) g^2``; ``adam`` along
    ``m / (1 - beta1^t) / (sqrt(s / (1 - beta2^t)) + eps)`` with ``m <- beta1 m + (1 - beta1) g``. In `FedAdam` there is no bias
    correction, and s begins at ``tau^2``.

    Parameters
    ----------
    optimiser : {"sgd", "momentum", "nesterov", "rmsprop", "adam"}
        Which.
    lr : float
        Learning rate, > 0.
    beta1, beta2 : float
        Decay of the moments, in [0, 1).
    eps : float
        Added to the root, > 0.
    weighting : {"samples", "uniform"}
        As in `FedAvg`, with equal weights by default: a large environment does not become the objective.

    Raises
    ------
    ValueError
        If a value is outside its range.

    References
    ----------
    McMahan, Moore, Ramage, Hampson, Agüera y Arcas (2017), arXiv:1602.05629 (FedSGD); Kingma, Ba (2015), arXiv:1412.6980.
    """

    optimiser: Literal["sgd", "momentum", "nesterov", "rmsprop", "adam"] = "adam"
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weighting: Literal["samples", "uniform"] = field(default="uniform", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.one_of(self, "optimiser", OPTIMISERS)
        checks.positive(self, "lr", "eps")
        checks.unit(self, "beta1", "beta2")

    def init(self, theta: Tree, num_workers: int) -> tuple[State, Broadcast]:
        """Start with moments of 0."""
        state = {"model": theta, **_fresh(self.optimiser, theta)}
        return state, {"model": theta}

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Make one step."""
        state = self._step(self.optimiser, state, rows, report)
        return state, {"model": state["model"]}

    def _step(self, optimiser: str, state: State, rows: Stack, report: Report) -> State:
        g = tree.sub(state["model"], tree.mean(rows, report.weight))
        count = int(state["clock"]["steps"]) + 1
        new = {**state, "clock": {"steps": torch.tensor(count)}}
        direction = g
        if optimiser in ("momentum", "nesterov"):
            direction = new["first"] = tree.axpy(self.beta1, state["first"], g)
            if optimiser == "nesterov":
                direction = tree.axpy(self.beta1, new["first"], g)
        elif optimiser in ("rmsprop", "adam"):

            def square(s: Tensor, x: Tensor) -> Tensor:
                return self.beta2 * s + (1 - self.beta2) * x * x

            new["second"], correction = tree.tree_map(square, state["second"], g), 1.0
            if optimiser == "adam":
                new["first"] = tree.lerp(state["first"], g, 1 - self.beta1)
                direction = tree.scale(1 / (1 - self.beta1**count), new["first"])
                correction = 1 - self.beta2**count

            def divide(x: Tensor, s: Tensor) -> Tensor:
                return x / ((s / correction).sqrt() + self.eps)

            direction = tree.tree_map(divide, direction, new["second"])
        return {**new, "model": tree.axpy(-self.lr, direction, state["model"])}


def _fresh(optimiser: str, theta: Tree) -> State:
    return {"clock": {"steps": torch.tensor(0)}} | {k: tree.zeros_like(theta) for k in OPTIMISERS[optimiser]}


@dataclass(frozen=True)
class FedIRM(FedSGD):
    """`FedSGD` that sends the weight of the invariance penalty; needs ``client = "IRM(...)"``.

    The channel ``irm`` holds ``weight = lam_t``, which is ``penalty`` from step ``t >= anneal`` on and 1 before, for t from 0, and ``divisor``, by which
    workers divide their whole objective: ``max(1, lam_t)`` with ``divide``, else 1.

    Parameters
    ----------
    optimiser, lr, beta1, beta2, eps
        As in `FedSGD`.
    penalty : float
        ``lam``, >= 0.
    anneal : int
        Step at which the penalty takes its full weight, >= 0.
    divide : bool
        Whether to divide; plain and heavy-ball steps need it.
    on_anneal : {"rebuild", "keep", "domainbed_compat"}
        At that step forget the moments, keep them, or go on with Adam at the same learning rate, whatever the optimiser was,
        as the released code of DomainBed does.
    weighting : {"samples", "uniform"}
        Equal weights of the environments by default.

    Raises
    ------
    ValueError
        If a value is outside its range.

    References
    ----------
    Arjovsky, Bottou, Gulrajani, Lopez-Paz 2019, arXiv 1907.02893; Gulrajani, Lopez-Paz 2020, arXiv 2007.01434. The
    federated form is ours.
    """

    penalty: float = 1e4
    anneal: int = 90
    divide: bool = True
    on_anneal: Literal["rebuild", "keep", "domainbed_compat"] = "rebuild"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.nonnegative(self, "penalty", "anneal")
        checks.one_of(self, "on_anneal", ("rebuild", "keep", "domainbed_compat"))

    def weights(self, step: int) -> tuple[float, float]:
        """Return ``lam_t`` and the divisor of a step, from 0."""
        weight = self.penalty if step >= self.anneal else 1.0
        return weight, max(1.0, weight) if self.divide else 1.0

    def init(self, theta: Tree, num_workers: int) -> tuple[State, Broadcast]:
        """Start with moments of 0, and the weight of step 0."""
        state = super().init(theta, num_workers)[0] | {"rounds": {"done": torch.tensor(0)}}
        return state, self._send(theta, 0)

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Make one step, and send the weight of the next."""
        done, optimiser = int(state["rounds"]["done"]), self.optimiser
        if self.on_anneal == "domainbed_compat" and done >= self.anneal:
            optimiser = "adam"
        if self.on_anneal != "keep" and done == self.anneal:
            state = {"model": state["model"], **_fresh(optimiser, state["model"])}
        state = self._step(optimiser, state, rows, report) | {"rounds": {"done": torch.tensor(done + 1)}}
        return state, self._send(state["model"], done + 1)

    def _send(self, model: Tree, step: int) -> Broadcast:
        like = next(iter(model.values()))
        weight, divisor = (like.new_tensor(x) for x in self.weights(step))
        return {"model": model, "irm": {"weight": weight, "divisor": divisor}}
