"""A local rule that forgets between rounds."""

from __future__ import annotations

from dataclasses import dataclass

from clients.base import LocalRule, Oracle, State, Told
from clients.sgd import SGD
from fedsim import tree
from fedsim.tree import Tree


@dataclass(frozen=True)
class Fresh:
    """Begin the inner rule anew with the first step of every round.

    For strategies that let workers keep the state of their rule, such as ``DiLoCo``: moments and step counts start again
    at 0, as the authors of asynchronous Local SGD do in their toy problem. Elsewhere it changes nothing.

    Parameters
    ----------
    inner : LocalRule
        The rule that makes the step.

    References
    ----------
    Liu et al. (2024), Asynchronous Local-SGD training for language modeling, arXiv:2401.09135.
    """

    inner: LocalRule = SGD()  # noqa: RUF009 - it is frozen

    def init(self, theta: Tree) -> State:
        """Start the inner rule."""
        return self.inner.init(theta)

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Make one inner step, the first of a round from a new state."""
        new, old = tree.flatten_nested(self.inner.init(theta)), tree.flatten_nested(state)
        state = tree.unflatten_nested(tree.where(oracle.step == 0, new, old))
        return self.inner.step(theta, state, oracle)
