"""Gradients of pure noise, around any local rule: the null model of an optimisation path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clients.base import LocalRule, Oracle, State, Told
from clients.sgd import SGD
from fedsim import random, tree
from fedsim.tree import Tree


@dataclass(frozen=True)
class Gaussian:
    """Replace every gradient by a Gaussian vector of the same norm, over all parameters of the worker together.

    The gradient becomes ``|g| z / |z|`` with ``z ~ N(0, I_P)``, drawn anew for each worker, round and step. The path is then a
    random walk with the original's step lengths, and what `fedsim geometry` finds in it is what chance alone gives.

    Parameters
    ----------
    inner : LocalRule
        The rule that makes the step.
    """

    inner: LocalRule = SGD()  # noqa: RUF009 - it is frozen

    def init(self, theta: Tree) -> State:
        """Start the inner rule."""
        return self.inner.init(theta)

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Make one inner step with noise for a gradient."""
        return self.inner.step(theta, state, without_direction(oracle))


def without_direction(oracle: Oracle) -> Oracle:
    """Return an oracle whose gradients are noise of the same norm."""

    def grad(x: Tree) -> tuple[Tree, Tensor]:
        gradient, loss = oracle.grad(x)
        noise = _normal(oracle, gradient)
        return tree.scale(tree.norm(gradient) / tree.norm(noise), noise), loss

    return oracle._replace(grad=grad)


def _normal(oracle: Oracle, like: Tree) -> Tree:
    """Draw a standard normal number for each entry."""
    # The step's own uniform number is its key; the step is mixed in, as few bits of a float32 number differ.
    stream = (oracle.u.double() * 2.0**53).long() + oracle.step
    slot = torch.arange(tree.num_parameters(like), device=oracle.u.device)
    normal = tree.unflatten(random.normal(stream, slot), {k: like[k] for k in sorted(like)})
    return {k: normal[k].to(x.dtype) for k, x in like.items()}  # plans may list parameters in another order
