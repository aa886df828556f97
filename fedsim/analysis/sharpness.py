"""How flat a minimum is: the top eigenvalue of a Hessian by power iteration, and the rise of the loss nearby.

Products with the Hessian are exact (`fedsim.analysis.hessian`): differences of gradients meet the kinks of ReLU
networks and report curvature that is not there. With cross-entropy the Hessian shrinks with the loss, so an
eigenvalue says little without the loss at which it was found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedsim import random, tree
from fedsim.analysis.hessian import TrainingLoss
from fedsim.tree import Tree

Product = Callable[[Tensor], Tensor]
"""A symmetric map ``v [P] -> H v [P]``."""


class Top(NamedTuple):
    """The largest algebraic eigenvalue.

    Attributes
    ----------
    value : float
        The eigenvalue.
    products : int
        Products that were needed.
    converged : bool
        Whether it changed by less than the tolerance in the end.
    """

    value: float
    products: int
    converged: bool


def power_iteration(multiply: Product, start: Tensor, *, tol: float = 1e-4, most: int = 100) -> Top:
    """Find the largest algebraic eigenvalue of a symmetric map.

    The iteration ``v <- H v / |H v|`` leads to the eigenvalue of largest magnitude. Where that is negative, a second
    one on ``H - lambda I``, whose eigenvalues are all >= 0, leads to the other end of the spectrum.

    Parameters
    ----------
    multiply : callable
        ``v -> H v``.
    start : Tensor
        ``[P]``, not 0.
    tol : float
        Relative change of the Rayleigh quotient at which to stop, > 0.
    most : int
        Products of an iteration, >= 2.

    Returns
    -------
    Top
        Eigenvalue and cost.

    Raises
    ------
    ValueError
        If ``tol`` or ``most`` is outside its range.

    Examples
    --------
    >>> spectrum = torch.tensor([-6.5, 1.0, 4.0], dtype=torch.float64)
    >>> start = torch.ones(3, dtype=torch.float64)
    >>> round(power_iteration(lambda v: spectrum * v, start, tol=1e-9).value, 3)
    4.0
    """
    if not tol > 0:
        raise ValueError(f"power_iteration: tol = {tol} must be > 0")
    if most < 2:
        raise ValueError(f"power_iteration: most = {most} must be >= 2")
    first = _largest(multiply, start, tol, most)
    if first.value >= 0:
        return first
    second = _largest(lambda v: multiply(v) - first.value * v, start, tol, most)
    return Top(first.value + second.value, first.products + second.products, second.converged)


def _largest(multiply: Product, start: Tensor, tol: float, most: int) -> Top:
    v, last = start / start.norm(), float("nan")
    value = 0.0
    for made in range(1, most + 1):
        after = multiply(v)
        value, length = (v * after).sum().item(), after.norm()
        if length == 0 or abs(value - last) <= tol * abs(value):
            return Top(value, made, True)
        v, last = after / length, value
    return Top(value, most, False)


def top_eigenvalue(
    problem: TrainingLoss, theta: Tree, *, tol: float = 1e-4, most: int = 100, seed: int = 0
) -> Top:
    """Find the largest algebraic eigenvalue of the Hessian of the mean loss.

    Parameters
    ----------
    problem : TrainingLoss
        Model, objective and data.
    theta : Tree
        Where.
    tol, most : float, int
        As in `power_iteration`.
    seed : int
        Of the Gaussian start vector, which has a generator of its own.

    Returns
    -------
    Top
        Eigenvalue and cost.
    """
    return power_iteration(problem.product(theta), start_vector(theta, seed), tol=tol, most=most)


def start_vector(theta: Tree, seed: int) -> Tensor:
    """Draw the Gaussian vector ``[P]`` from which a power iteration begins, in the type of the parameters."""
    like = tree.flatten(theta)
    return torch.randn(like.shape, generator=random.torch_generator(seed, "power"), dtype=torch.float64).to(
        like
    )


def federated_product(problems: Sequence[TrainingLoss], share: Tensor, theta: Tree) -> Product:
    """Return ``v -> sum_k p_k H_k v``: one product of each worker makes one of the federation.

    Rayleigh quotients and traces average in the same way; eigenvalues do not, the federation's is at most the
    mean of the workers': ``lambda_max(sum_k p_k H_k) <= sum_k p_k lambda_max(H_k)``.

    Parameters
    ----------
    problems : sequence of TrainingLoss
        A worker each.
    share : Tensor
        ``p``, ``[W]``, summing to 1.
    theta : Tree
        Where.

    Returns
    -------
    callable
        The map.
    """
    each = [problem.product(theta) for problem in problems]
    return lambda v: torch.stack([
        p * multiply(v) for p, multiply in zip(share.to(v), each, strict=True)
    ]).sum(0)


def m_sharpness(problem: TrainingLoss, theta: Tree, rho: float, m: int = 0) -> float:
    """Return by how much the loss rises in the ascent of SAM, ``mean_B [L_B(theta + rho g_B / |g_B|) - L_B(theta)]``.

    Means over groups B of m rows, in the order of the data, the last one smaller; about ``rho |g|`` for one group
    and a small radius.

    Parameters
    ----------
    problem : TrainingLoss
        Model, objective and data.
    theta : Tree
        Where.
    rho : float
        Radius, > 0.
    m : int
        Rows of a group, >= 0; 0 for all in one.

    Returns
    -------
    float
        The rise.

    Raises
    ------
    ValueError
        If ``rho`` or ``m`` is outside its range.

    References
    ----------
    Foret, Kleiner, Mobahi, Neyshabur (2021), arXiv:2010.01412.
    """
    if not rho > 0:
        raise ValueError(f"m_sharpness: rho = {rho} must be > 0")
    if m < 0:
        raise ValueError(f"m_sharpness: m = {m} must be >= 0")
    total, n = 0.0, len(problem.x)
    for start in range(0, n, m or n):
        rows = slice(start, start + (m or n))
        group = problem._replace(x=problem.x[rows], y=problem.y[rows])
        gradient, loss = group.gradient(theta)
        length = gradient.norm()
        if length > 0:
            like = tree.flatten(theta)
            above = like.double() + rho * gradient / length
            total += (group.gradient(tree.unflatten(above.to(like), theta))[1] - loss) * len(group.x)
    return total / n
