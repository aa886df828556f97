"""Local steps along a mixture of the gradient and the direction of the last round, around any local rule."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clients.base import LocalRule, Oracle, State, Told
from clients.palsgd import learning_rate
from clients.sgd import SGD
from fedsim import checks, tree
from fedsim.tree import Tree


@dataclass(frozen=True)
class Guided:
    """Mix every gradient with the federation's direction, ``alpha g + (1 - alpha) M``.

    ``M = -D / lr`` with the learning rate ``lr`` of ``inner`` and the mean displacement of a local step of the last round,
    ``D = sum_i p_i (theta_i - theta) / H_i``, which is the channel ``displacement`` of ``strategy = "FedCM(...)"``,
    0 in the first round. ``SAM(Guided(SGD(lr), alpha), rho)`` is MoFedSAM: the mixed gradient is that of the perturbed
    point. In ``Guided(SAM(SGD(lr)), alpha)`` the ascent would follow the mixture instead.

    Parameters
    ----------
    inner : LocalRule
        The rule that makes the step; it, or the rule that it wraps, has a learning rate ``lr``.
    alpha : float
        Share of the gradient, in (0, 1]; 1 is the inner rule.

    Raises
    ------
    ValueError
        If ``alpha`` is outside its range or the inner rule has no learning rate.

    References
    ----------
    Xu, Wang, Wang, Yao (2021), FedCM: Federated learning with client-level momentum, arXiv:2106.10874. MoFedSAM:
    Qu, Li, Duan, Liu, Tang, Lu (2022), Generalized federated learning via sharpness aware minimization,
    arXiv:2206.02618.
    """

    inner: LocalRule = SGD()  # noqa: RUF009 - it is frozen
    alpha: float = 0.1

    def __post_init__(self) -> None:
        checks.positive(self, "alpha")
        if not self.alpha <= 1:
            raise ValueError(f"Guided: alpha = {self.alpha!r} must be in (0, 1]")
        learning_rate(self.inner, "Guided")

    def init(self, theta: Tree) -> State:
        """Start the inner rule."""
        return self.inner.init(theta)

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Make one inner step along the mixture."""
        pull = -(1 - self.alpha) / learning_rate(self.inner, "Guided")

        def grad(x: Tree) -> tuple[Tree, Tensor]:
            gradient, loss = oracle.grad(x)
            return tree.axpy(pull, oracle.broadcast["displacement"], tree.scale(self.alpha, gradient)), loss

        return self.inner.step(theta, state, oracle._replace(grad=grad))
