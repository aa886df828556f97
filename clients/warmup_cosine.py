"""A learning rate that rises and falls over the steps of the whole run, around any local rule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from clients.adaptive_sgd import refuse_schedule
from clients.base import LocalRule, Oracle, State, Told
from clients.sgd import SGD
from fedsim import checks, tree
from fedsim.tree import Tree


@dataclass(frozen=True)
class WarmupCosine:
    """Multiply the learning rate by a factor that rises linearly and then falls as a cosine.

    With ``t = 0, 1, ...`` the steps that the worker has made in all rounds, the factor is
    ``f = (t + 1) / warmup`` while ``t < warmup``, then
    ``f = floor + (1 - floor) (1 + cos(pi (t - warmup) / (total - warmup))) / 2``, and ``floor`` from
    ``t = total`` on. The inner step from ``theta`` to ``theta'`` becomes one to ``theta + f (theta' - theta)``.
    For rules whose step is proportional to the learning rate and whose state does not know it, as ``SGD`` and
    ``AdamW`` with its weight decay, that is the rule at the rate ``f lr``.

    The count of steps is part of the worker's state: it needs a strategy whose workers keep states, such as
    ``DiLoCo``, which with ``lr = 1, momentum = 0`` averages like ``FedAvg``. ``WarmupCosine(PALSGD(...))``
    counts all steps and scales pulls too; ``PALSGD(WarmupCosine(...))`` counts gradient steps and leaves pulls
    as they are.

    Parameters
    ----------
    inner : LocalRule
        The rule that makes the step.
    warmup : int
        Steps of the rise, >= 0.
    total : int
        Steps after which the factor is ``floor``, > ``warmup``: for a run ``rounds * local-steps``.
    floor : float
        Factor at the end, in [0, 1].

    Raises
    ------
    ValueError
        If a value is outside its range, or the inner rule adapts its step.

    References
    ----------
    Loshchilov, Hutter (2017), SGDR: Stochastic gradient descent with warm restarts, arXiv:1608.03983; warm-up:
    Goyal et al. (2017), Accurate, large minibatch SGD, arXiv:1706.02677.
    """

    inner: LocalRule = SGD()  # noqa: RUF009 - it is frozen
    warmup: int = 0
    total: int = 1000
    floor: float = 0.0

    def __post_init__(self) -> None:
        refuse_schedule(self, self.inner)
        checks.nonnegative(self, "warmup")
        if not self.total > self.warmup:
            raise ValueError(
                f"WarmupCosine: total = {self.total!r} must be > warmup = {self.warmup!r}, the steps of the whole run"
            )
        if not 0 <= self.floor <= 1:
            raise ValueError(f"WarmupCosine: floor = {self.floor!r} must be in [0, 1]")

    def init(self, theta: Tree) -> State:
        """Start the inner rule, and the count of steps at 0."""
        return self._kept(self.inner.init(theta), next(iter(theta.values())).new_zeros(()))

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Make a part of one inner step."""
        count = state["count"]
        new, inner, said = self.inner.step(theta, state.get("inner", {}), oracle)
        return tree.lerp(theta, new, self.factor(count)), self._kept(inner, count + 1), said

    def factor(self, count: Tensor) -> Tensor:
        """Return the factor of the step before which so many have been made, in the shape of ``count``."""
        share = ((count - self.warmup) / (self.total - self.warmup)).clamp(0, 1)
        falling = self.floor + (1 - self.floor) * (1 + torch.cos(math.pi * share)) / 2
        return torch.where(count < self.warmup, (count + 1) / max(1, self.warmup), falling)

    def _kept(self, inner: State, count: Tensor) -> State:
        # Without an entry for an inner rule that remembers nothing: flattening would lose it.
        return {"count": count} | ({"inner": inner} if inner else {})
