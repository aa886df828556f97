"""Nesterov's momentum in the form of elastic averaging's authors."""

from __future__ import annotations

from dataclasses import dataclass

from clients.base import Oracle, State, Told, told
from fedsim import checks, tree
from fedsim.tree import Tree


@dataclass(frozen=True)
class Nesterov:
    """Gradient descent with the gradient taken ahead: ``v <- momentum v - lr grad(theta + momentum v)``; ``theta <- theta + v``.

    The velocity starts at 0 and is in units of parameters, unlike that of ``SGD``: changing ``lr`` does not change
    it. With ``ElasticAveraging`` this is EAMSGD. The reported loss is that at ``theta + momentum v``.

    Parameters
    ----------
    lr : float
        Learning rate, > 0.
    momentum : float
        In [0, 1); 0 is plain gradient descent.
    weight_decay : float
        Coefficient of ``theta + momentum v`` in the gradient, >= 0.

    Raises
    ------
    ValueError
        If a value is outside its range.

    References
    ----------
    Zhang, Choromanska, LeCun (2015), arXiv:1412.6651.
    """

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        checks.positive(self, "lr")
        checks.unit(self, "momentum")
        checks.nonnegative(self, "weight_decay")

    def init(self, theta: Tree) -> State:
        """Start with velocity 0."""
        return {"velocity": tree.zeros_like(theta)}

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Make one step."""
        ahead = tree.axpy(self.momentum, state["velocity"], theta)
        gradient, loss = oracle.grad(ahead)
        if self.weight_decay:
            gradient = tree.axpy(self.weight_decay, ahead, gradient)
        velocity = tree.axpy(-self.lr, gradient, tree.scale(self.momentum, state["velocity"]))
        return tree.add(theta, velocity), {"velocity": velocity}, told(loss)
