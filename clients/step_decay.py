"""A learning rate that drops at some steps of the run, around any local rule."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from clients.adaptive_sgd import refuse_schedule
from clients.base import LocalRule, Oracle, State, Told
from clients.sgd import SGD
from fedsim import checks, tree
from fedsim.tree import Tree


@dataclass(frozen=True)
class StepDecay:
    """Multiply the learning rate by ``factor`` again and again, each time the worker has made so many steps.

    With ``t = 0, 1, ...`` the steps that the worker has made in all rounds and ``n`` the entries of ``at`` that are at most
    ``t``, the inner step from ``theta`` to ``theta'`` becomes one to ``theta + factor^n (theta' - theta)``. For rules whose step is
    proportional to the learning rate and whose state does not know it, as ``SGD``, that is the rule at the rate
    ``factor^n lr``.

    The count of steps is part of the worker's state: it needs a strategy whose workers keep states, such as
    ``LeaderSGD``, ``ElasticAveraging`` or ``Downpour``.

    Parameters
    ----------
    inner : LocalRule
        The rule that makes the step.
    at : tuple of int
        Steps, ascending, >= 1, at least one.
    factor : float
        In (0, 1].

    Raises
    ------
    ValueError
        If a value is outside its range, or the inner rule adapts its step.

    Examples
    --------
    >>> StepDecay(at=(10, 20), factor=0.5).factor_at(torch.tensor([9, 10, 20])).tolist()
    [1.0, 0.5, 0.25]
    """

    inner: LocalRule = SGD()  # noqa: RUF009 - it is frozen
    at: tuple[int, ...] = (1000,)
    factor: float = 0.1

    def __post_init__(self) -> None:
        refuse_schedule(self, self.inner)
        if not self.at or self.at[0] < 1 or not all(a < b for a, b in pairwise(self.at)):
            raise ValueError(f"StepDecay: at = {self.at!r} must be ascending numbers of steps >= 1")
        checks.positive(self, "factor")
        if self.factor > 1:
            raise ValueError(f"StepDecay: factor = {self.factor!r} must be in (0, 1]")

    def init(self, theta: Tree) -> State:
        """Start the inner rule, and the count of steps at 0."""
        return self._kept(self.inner.init(theta), next(iter(theta.values())).new_zeros(()))

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Make a part of one inner step."""
        count = state["count"]
        new, inner, said = self.inner.step(theta, state.get("inner", {}), oracle)
        return tree.lerp(theta, new, self.factor_at(count)), self._kept(inner, count + 1), said

    def factor_at(self, count: Tensor) -> Tensor:
        """Return the factor of the step before which so many have been made, in the shape of ``count``."""
        share = torch.ones_like(count, dtype=torch.promote_types(count.dtype, torch.float32))
        for n, start in enumerate(self.at, 1):
            share = torch.where(count < start, share, self.factor**n)
        return share

    def _kept(self, inner: State, count: Tensor) -> State:
        # Without an entry for an inner rule that remembers nothing: flattening would lose it.
        return {"count": count} | ({"inner": inner} if inner else {})
