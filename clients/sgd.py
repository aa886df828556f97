"""Stochastic gradient descent."""

from __future__ import annotations

from dataclasses import dataclass

from clients.base import Oracle, State, Told, told
from fedsim import checks, tree
from fedsim.tree import Tree


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum, Nesterov's form and weight decay.

    ``g = grad(theta) + weight_decay theta``; ``v <- momentum v + g``;
    ``theta <- theta - lr d`` with ``d = v``, or ``d = g + momentum v`` where ``nesterov``.
    The velocity starts at 0, as in PyTorch. Without momentum ``d = g``.

    Parameters
    ----------
    lr : float
        Learning rate, > 0.
    momentum : float
        In [0, 1).
    nesterov : bool
        Look ahead; needs momentum > 0.
    weight_decay : float
        Coefficient of ``theta`` in the gradient, >= 0.

    Raises
    ------
    ValueError
        If a value is outside its range.

    References
    ----------
    Sutskever, Martens, Dahl, Hinton (2013), On the importance of initialization and momentum.
    """

    lr: float = 0.1
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        checks.positive(self, "lr")
        checks.unit(self, "momentum")
        checks.nonnegative(self, "weight_decay")
        if self.nesterov and self.momentum == 0:
            raise ValueError("SGD: nesterov = True needs momentum > 0")

    def init(self, theta: Tree) -> State:
        """Start with velocity 0."""
        return {"velocity": tree.zeros_like(theta)} if self.momentum else {}

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Make one step against the gradient."""
        gradient, loss = oracle.grad(theta)
        if self.weight_decay:
            gradient = tree.axpy(self.weight_decay, theta, gradient)
        if not self.momentum:
            return tree.axpy(-self.lr, gradient, theta), state, told(loss)
        velocity = tree.axpy(self.momentum, state["velocity"], gradient)
        direction = tree.axpy(self.momentum, velocity, gradient) if self.nesterov else velocity
        return tree.axpy(-self.lr, direction, theta), {"velocity": velocity}, told(loss)
