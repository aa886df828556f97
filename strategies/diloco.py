"""DiLoCo: many local steps of an optimiser that remembers, then a step of Nesterov's momentum at the server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fedsim import checks, tree
from fedsim.tree import Stack, Tree
from strategies.base import Broadcast, MeanRule, Report, State


@dataclass(frozen=True)
class DiLoCo(MeanRule):
    """Nesterov's momentum on the mean displacement of workers that keep their optimiser's state.

    ``D = theta - sum_i p_i theta_i``; ``v <- momentum v + D``; ``theta <- theta - lr (D + momentum v)``; ``v`` starts at 0. The form is
    that of ``torch.optim.SGD(nesterov=True)``: a constant ``D`` moves the model by ``lr (1 + momentum) D`` in the first round
    and by ``lr / (1 - momentum) D`` a round in the long run. The state of the local rule (moments, step counts) stays at
    each worker between rounds and is never averaged. The method of the paper has ``client = "AdamW(...)"``; with
    ``PALSGD(...)`` it is PALSGD, with ``lr = 1, momentum = 0`` Local SGD with persistent local states, and with
    ``lr = 1, local-steps = 1`` and the client ``SGD(lr)`` large-batch SGD with Nesterov's momentum.

    The outer momentum does not move the point at which workers with different data stop: it is no cure for drift.

    Parameters
    ----------
    lr : float
        Outer learning rate, > 0.
    momentum : float
        Outer momentum, in [0, 1).
    weighting : {"samples", "uniform"}
        Which ``p_i``: proportional to the number of training rows of worker ``i``, or equal (default).

    Raises
    ------
    ValueError
        If a value is outside its range.

    References
    ----------
    Douillard et al. (2023), DiLoCo: Distributed low-communication training of language models, arXiv:2311.08105.
    """

    keeps_state: ClassVar[bool] = True

    lr: float = 0.7
    momentum: float = 0.9
    weighting: Literal["samples", "uniform"] = field(default="uniform", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive(self, "lr")
        checks.unit(self, "momentum")

    def init(self, theta: Tree, num_workers: int) -> tuple[State, Broadcast]:
        """Start with velocity 0."""
        return {"model": theta, "velocity": tree.zeros_like(theta)}, {"model": theta}

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Make one step of Nesterov's momentum along the pseudo-gradient."""
        gap = tree.sub(state["model"], tree.mean(rows, report.weight))
        model, velocity = nesterov(state["model"], state["velocity"], gap, self.lr, self.momentum)
        return {"model": model, "velocity": velocity}, {"model": model}


def nesterov(theta: Tree, velocity: Tree, gap: Tree, lr: float, momentum: float) -> tuple[Tree, Tree]:
    """Return ``theta - lr (gap + momentum v)`` and ``v = momentum velocity + gap``."""
    velocity = tree.axpy(momentum, velocity, gap)
    return tree.axpy(-lr, tree.axpy(momentum, velocity, gap), theta), velocity
