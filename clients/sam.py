"""Sharpness-aware minimisation, around any local rule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clients.base import LocalRule, Oracle, State, Told
from clients.sgd import SGD
from fedsim import checks, tree
from fedsim.tree import Tree


@dataclass(frozen=True)
class SAM:
    """Step with the gradient of the highest nearby point, ``theta <- inner(theta, grad(theta + e))``.

    ``e = rho g / (|g| + norm_eps)`` with ``g = grad(theta)``, both gradients on the same batch, the norm over all
    parameters of the worker. With ``adaptive`` (ASAM) ``e = rho T^2 g / (|T g| + norm_eps)``,
    ``T = |theta| + asam_eta`` entry by entry, and ``T = 1`` for parameters called ``bias``. The step is made from
    ``theta`` itself; the weight decay of ``inner``, and the pull of a `Prox` within, are those at ``theta``, while a
    `Prox` around it also moves the ascent. Told is the loss at ``theta``. Two gradients for one of ``inner``.

    FedSAM is ``SAM(SGD(lr), rho)`` under ``strategy = "FedAvg()"``, FedASAM the same with ``adaptive``, and MoFedSAM
    ``SAM(Guided(SGD(lr), alpha), rho)`` under ``strategy = "FedCM()"``.

    Parameters
    ----------
    inner : LocalRule
        The rule that makes the step.
    rho : float
        Radius of the ascent, >= 0; 0 is the inner rule at twice the cost.
    adaptive : bool
        Scale the ascent with the parameters.
    asam_eta : float
        Added to their absolute values, >= 0.
    norm_eps : float
        Added to the norm, >= 0; where the norm is 0 there is no ascent.

    Raises
    ------
    ValueError
        If a value is outside its range.

    References
    ----------
    Foret, Kleiner, Mobahi, Neyshabur (2021), Sharpness-aware minimization, arXiv:2010.01412. Kwon, Kim, Park, Choi
    (2021), ASAM, arXiv:2102.11600. FedSAM: Qu et al. (2022), arXiv:2206.02618; Caldarola, Caputo, Ciccone (2022),
    Improving generalization in federated learning by seeking flat minima, arXiv:2203.11834.
    """

    inner: LocalRule = SGD()  # noqa: RUF009 - it is frozen
    rho: float = 0.05
    adaptive: bool = False
    asam_eta: float = 0.01
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        checks.nonnegative(self, "rho", "asam_eta", "norm_eps")

    def init(self, theta: Tree) -> State:
        """Start the inner rule."""
        return self.inner.init(theta)

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Make one inner step with gradients of perturbed points."""

        def grad(x: Tree) -> tuple[Tree, Tensor]:
            gradient, loss = oracle.grad(x)
            above = (
                self._adaptively(x, gradient)
                if self.adaptive
                else ascend(x, gradient, self.rho, self.norm_eps)
            )
            return oracle.grad(above)[0], loss

        theta, state, said = self.inner.step(theta, state, oracle._replace(grad=grad))
        return theta, state, Told(said.loss, 2 * said.gradients)

    def _adaptively(self, theta: Tree, gradient: Tree) -> Tree:
        def scale(name: str) -> Tensor:
            x = theta[name]
            return torch.ones_like(x) if name.rpartition(".")[2] == "bias" else x.abs() + self.asam_eta

        scales = {k: scale(k) for k in theta}
        scaled = tree.tree_map(torch.mul, scales, gradient)
        factor = _over_norm(scaled, self.rho, self.norm_eps)
        return tree.axpy(factor, tree.tree_map(torch.mul, scales, scaled), theta)


def ascend(theta: Tree, gradient: Tree, rho: float | Tensor, norm_eps: float) -> Tree:
    """Return ``theta + rho g / (|g| + norm_eps)``, ``theta`` itself where ``g = 0``.

    Parameters
    ----------
    theta, gradient : Tree
        The point, and ``g``.
    rho : float or Tensor
        Radius, >= 0.
    norm_eps : float
        Added to the norm, >= 0.

    Returns
    -------
    Tree
        A new tree.
    """
    return tree.axpy(_over_norm(gradient, rho, norm_eps), gradient, theta)


def _over_norm(direction: Tree, rho: float | Tensor, norm_eps: float) -> Tensor:
    norm = tree.norm(direction)
    return rho / torch.where(norm > 0, norm + norm_eps, 1.0)
