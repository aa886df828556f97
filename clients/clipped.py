"""Gradients of bounded norm, around any local rule."""

from __future__ import annotations

from dataclasses import dataclass

from clients.base import LocalRule, Oracle, State, Told
from clients.sgd import SGD
from fedsim import checks, tree
from fedsim.tree import Tree

SMALL = 1e-6
"""Added to the norm before dividing by it, as `torch.nn.utils.clip_grad_norm_` does."""


@dataclass(frozen=True)
class Clipped:
    """Scale every gradient of the worker down to Euclidean norm ``norm``, over all parameters together, if it is longer.

    The gradient becomes ``min(1, norm / (|g| + 1e-6)) g``, in the arithmetic of
    ``torch.nn.utils.clip_grad_norm_``. The inner rule sees it; so ``Clipped(Prox(...))`` clips the gradient of
    the data alone, ``Prox(Clipped(...))`` that of the regularised loss.

    Parameters
    ----------
    inner : LocalRule
        The rule that makes the step.
    norm : float
        Largest norm, > 0.

    Raises
    ------
    ValueError
        If ``norm`` is not positive.

    References
    ----------
    Pascanu, Mikolov, Bengio (2013), On the difficulty of training recurrent neural networks, arXiv:1211.5063.
    """

    inner: LocalRule = SGD()  # noqa: RUF009 - it is frozen
    norm: float = 1.0

    def __post_init__(self) -> None:
        checks.positive(self, "norm")

    def init(self, theta: Tree) -> State:
        """Start the inner rule."""
        return self.inner.init(theta)

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Make one inner step with clipped gradients."""

        def grad(x: Tree) -> tuple[Tree, tree.Tensor]:
            gradient, loss = oracle.grad(x)
            return tree.scale((self.norm / (tree.norm(gradient) + SMALL)).clamp(max=1), gradient), loss

        return self.inner.step(theta, state, oracle._replace(grad=grad))
