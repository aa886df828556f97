"""Steps on the exponential loss in proportion to its inverse, so that they do not fade as the loss falls."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from clients.base import LocalRule, Oracle, State, Told, told
from clients.sgd import SGD
from fedsim import tree
from fedsim.tree import Tree


@dataclass(frozen=True)
class LossNormalised:
    """Divide the gradients of the exponential loss by the global loss with which the round began.

    The gradient becomes ``grad f_i(w) / F(w^k)``, ``f_i(w) = (1/n_i) sum_j exp(-s_j x_j . w)`` over the worker's rows and
    ``F = sum_i p_i f_i``, computed as exponentials of differences, so that losses may be far too small for a floating number. Workers
    first tell ``log f_i(w^k)``; the strategy, `KnownLoss` or `DualAcceleration`, answers with ``log F(w^k)``.

    It needs ``objective = "Exponential()"``, ``model = "Linear(bias=False)"`` and ``batch-size = 0``, and runs on the plan
    ``loop`` only (``auto`` takes it).

    Parameters
    ----------
    inner : LocalRule
        The rule that makes the step.

    References
    ----------
    Nacson, Lee, Gunasekar, Savarese, Srebro, Soudry (2019), Convergence of gradient descent on separable data,
    arXiv:1803.01905, for one learner; with local steps it is our extension.
    """

    inner: LocalRule = SGD()  # noqa: RUF009 - it is frozen

    def init(self, theta: Tree) -> State:
        """Start the inner rule."""
        return self.inner.init(theta)

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Make one inner step; before the strategy has answered, stay and tell ``log f_i``."""
        ((name, w),) = theta.items()
        x, y = oracle.batch
        z = (2 * y - 1)[:, None] * x.flatten(1)
        log_loss = torch.logsumexp(-(z @ w.flatten()), 0) - math.log(len(z))
        if "loss" not in oracle.broadcast:
            return theta, state, told(log_loss, 0)
        log_all = oracle.broadcast["loss"]["log"].to(w)

        def grad(at: Tree) -> tuple[Tree, tree.Tensor]:
            share = torch.exp(-(z @ at[name].flatten()) - log_all) / len(z)
            return {name: -(share @ z).view(w.shape)}, log_loss.exp()

        return self.inner.step(theta, state, oracle._replace(grad=grad))
