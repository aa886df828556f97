"""Adam with decoupled weight decay."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clients.base import Oracle, State, Told, told
from fedsim import checks, tree
from fedsim.tree import Tree


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay, in the arithmetic of ``torch.optim.AdamW``.

    ``m <- beta1 m + (1 - beta1) g``; ``v <- beta2 v + (1 - beta2) g^2``; at step ``t = 1, 2, ...``
    ``theta <- (1 - lr weight_decay) theta - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)``.

    Parameters
    ----------
    lr : float
        Learning rate, > 0.
    beta1, beta2 : float
        Decay of the two moments, in [0, 1).
    eps : float
        Added to the denominator, > 0.
    weight_decay : float
        Decoupled decay, >= 0.

    Raises
    ------
    ValueError
        If a value is outside its range.

    References
    ----------
    Loshchilov, Hutter (2019), Decoupled weight decay regularization, arXiv:1711.05101.
    """

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        checks.positive(self, "lr", "eps")
        checks.unit(self, "beta1", "beta2")
        checks.nonnegative(self, "weight_decay")

    def init(self, theta: Tree) -> State:
        """Start with both moments and the step count at 0."""
        count = next(iter(theta.values())).new_zeros(())
        return {"m": tree.zeros_like(theta), "v": tree.zeros_like(theta), "count": count}

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Make one step against the normalised first moment."""
        gradient, loss = oracle.grad(theta)
        count = state["count"] + 1
        m = tree.lerp(state["m"], gradient, 1 - self.beta1)
        v = tree.tree_map(lambda v, g: self.beta2 * v + (1 - self.beta2) * g * g, state["v"], gradient)
        rate = self.lr / (1 - self.beta1**count)
        root = torch.sqrt(1 - self.beta2**count)

        def update(x: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return x * (1 - self.lr * self.weight_decay) - rate * m / (v.sqrt() / root + self.eps)

        return tree.tree_map(update, theta, m, v), {"m": m, "v": v, "count": count}, told(loss)
