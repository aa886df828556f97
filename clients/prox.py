"""The proximal term of FedProx, around any local rule."""

from __future__ import annotations

from dataclasses import dataclass

from clients.base import LocalRule, Oracle, State, Told
from clients.sgd import SGD
from fedsim import checks, tree
from fedsim.tree import Tree


@dataclass(frozen=True)
class Prox:
    """Add the proximal term ``mu / 2 |theta - anchor|^2`` to the local loss.

    The gradient becomes ``grad(theta) + mu (theta - anchor)``, ``anchor`` being the row with which the
    worker began the round. The reported loss is without the term.

    Parameters
    ----------
    inner : LocalRule
        The rule that makes the step.
    mu : float
        Strength, >= 0; 0 is the inner rule.

    Raises
    ------
    ValueError
        If ``mu`` is negative.

    References
    ----------
    Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith (2020), Federated optimization in heterogeneous
    networks, arXiv:1812.06127.
    """

    inner: LocalRule = SGD()  # noqa: RUF009 - it is frozen
    mu: float = 0.1

    def __post_init__(self) -> None:
        checks.nonnegative(self, "mu")

    def init(self, theta: Tree) -> State:
        """Start the inner rule."""
        return self.inner.init(theta)

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Make one inner step on the regularised loss."""

        def grad(x: Tree) -> tuple[Tree, tree.Tensor]:
            gradient, loss = oracle.grad(x)
            return tree.axpy(self.mu, tree.sub(x, oracle.anchor), gradient), loss

        return self.inner.step(theta, state, oracle._replace(grad=grad))
