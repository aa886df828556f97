"""Linear classification beyond separable data: the largest separable part, finite minimisers and their bias.

Nodes are lists of signed rows ``Z_i``, ``[n_i, d]``, and ``F(w) = sum_i p_i f_i(w)`` with ``f_i(w) = (1/n_i) sum_j l(z_ij . w)``,
``l(s) = log(1 + e^-s)``, the logistic loss, or ``e^-s``, the exponential one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array, eye_array, hstack
from scipy.special import expit

from fedsim.analysis.direction import Loss, Weights, node_weights
from fedsim.analysis.max_margin import max_margin, signed_rows


def separable_part(z: np.ndarray) -> np.ndarray:
    """Find the largest strictly separable part: rows with ``z . w > 0`` for one ``w`` with ``Z w >= 0``.

    One linear programme, ``max sum s`` over ``w`` and ``0 <= s <= 1`` with ``Z w >= s``; all other rows have
    ``z . w = 0`` for every such ``w`` (the partition of Ji and Telgarsky 2018, arXiv 1803.07300).

    Parameters
    ----------
    z : ndarray
        ``[N, d]``, signed rows; for margins below 1e-6 of a row's norm use `max_margin`, which is sharper.

    Returns
    -------
    ndarray
        ``[N]``, bool.

    Raises
    ------
    ValueError
        If the rows are not finite or the programme fails.
    """
    z = signed_rows(z)
    n, d = z.shape
    norm = np.linalg.norm(z, axis=1, keepdims=True)
    # The partition does not depend on the length of rows; the solver's tolerances do.
    rows = z / np.where(norm > 0, norm, 1.0)
    answer = linprog(
        c=np.concatenate([np.zeros(d), -np.ones(n)]),
        A_ub=hstack([csr_array(-rows), eye_array(n)], format="csr"),
        b_ub=np.zeros(n),
        bounds=[(None, None)] * d + [(0, 1)] * n,
        method="highs",
    )
    if answer.status != 0:
        raise ValueError(f"separable_part: the linear programme failed: {answer.message}")
    return answer.x[d:] > 0.5


def _derivatives(s: np.ndarray, loss: Loss) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give ``l(s)``, ``-l'(s)`` and ``l''(s)`` of each score."""
    if loss == "exponential":
        with np.errstate(over="ignore"):  # a step that is too long gives inf, and is halved
            value = np.exp(-s)
        return value, value, value
    if loss != "logistic":
        raise ValueError(f"loss = {loss!r} must be 'logistic' or 'exponential'")
    sigma = expit(-s)
    return np.logaddexp(0.0, -s), sigma, sigma * (1 - sigma)


def finite_minimiser(
    nodes: Sequence[np.ndarray], p: Weights = "uniform", loss: Loss = "logistic"
) -> np.ndarray:
    """Find the minimiser of F by Newton's method from 0, until the gradient is below 1e-12.

    Parameters
    ----------
    nodes : sequence of ndarray
        Signed rows of each node; no direction may separate a part of them (see `separable_part`).
    p : {"uniform", "size"} or sequence of float
        Weights of the nodes.
    loss : {"logistic", "exponential"}
        The loss of one row.

    Returns
    -------
    ndarray
        ``[d]``, in the span of the rows (the shortest minimiser if the rows do not span all features).
    """
    weight = node_weights(nodes, p)
    row_weight = np.concatenate([np.full(len(z), q / len(z)) for z, q in zip(nodes, weight, strict=True)])
    return _newton(signed_rows(np.vstack(nodes)), row_weight, loss)


def _newton(z: np.ndarray, weight: np.ndarray, loss: Loss) -> np.ndarray:
    """Minimise ``sum_j weight_j l(z_j . w)`` in the span of the rows, with step halving."""
    _, singular, rows = np.linalg.svd(z, full_matrices=False)
    basis = rows[singular > singular[0] * 1e-12 * max(z.shape)]
    x = z @ basis.T
    w = np.zeros(len(basis))
    each, slope, bend = _derivatives(x @ w, loss)
    # Along a separating direction the gradient also falls below 1e-12, but only after 27 units of margin.
    for _ in range(100):
        gradient = -(weight * slope) @ x
        if np.linalg.norm(gradient) < 1e-12 and (x @ w).min() < 0:
            return w @ basis
        hessian = (x.T * (weight * bend)) @ x
        try:
            step = np.linalg.solve(hessian, gradient)
        except np.linalg.LinAlgError:
            break
        length = 1.0
        value = weight @ each
        while length > 1e-6 and weight @ _derivatives(x @ (w - length * step), loss)[0] > value + 1e-15:
            length /= 2
        w = w - length * step
        each, slope, bend = _derivatives(x @ w, loss)
    raise ValueError(
        "finite_minimiser: Newton does not converge, a part of the rows is separable: no finite minimiser"
    )


def gradients(nodes: Sequence[np.ndarray], w: np.ndarray, loss: Loss = "logistic") -> np.ndarray:
    """Gradient ``[M, d]`` of each node's loss, ``(1/n_i) Z_i^T l'(Z_i w)``."""
    return np.stack([-(_derivatives(z @ w, loss)[1] @ z) / len(z) for z in nodes])


def hessians(nodes: Sequence[np.ndarray], w: np.ndarray, loss: Loss = "logistic") -> np.ndarray:
    """Hessian ``[M, d, d]`` of each node's loss, ``(1/n_i) Z_i^T diag(l''(Z_i w)) Z_i``."""
    return np.stack([(z.T * _derivatives(z @ w, loss)[2]) @ z / len(z) for z in nodes])


def first_order_bias(
    nodes: Sequence[np.ndarray],
    w_star: np.ndarray,
    eta: float,
    local_steps: int,
    p: Weights = "uniform",
    loss: Loss = "logistic",
) -> np.ndarray:
    """Predict where Local-GD stops, ``w_fix - w* = eta (L - 1)/2 H^-1 sum_i p_i H_i g_i + O(eta^2)``.

    ``H_i, g_i`` are Hessian and gradient of node i at ``w*``, ``H = sum_i p_i H_i``. The bias vanishes for L = 1 and
    for nodes with equal data.

    Parameters
    ----------
    nodes : sequence of ndarray
        Signed rows of each node.
    w_star : ndarray
        ``[d]``, minimiser of F with the same ``p``.
    eta : float
        Step size, > 0.
    local_steps : int
        L, at least 1.
    p : {"uniform", "size"} or sequence of float
        Weights of the nodes.
    loss : {"logistic", "exponential"}
        The loss of one row.

    Returns
    -------
    ndarray
        ``[d]``.
    """
    weight = node_weights(nodes, p)
    curvature = hessians(nodes, w_star, loss)
    pull = np.einsum("i,ijk,ik->j", weight, curvature, gradients(nodes, w_star, loss))
    total = np.einsum("i,ijk->jk", weight, curvature)
    return eta * (local_steps - 1) / 2 * np.linalg.lstsq(total, pull)[0]


@dataclass(frozen=True, eq=False)
class MixedLimit:
    """Where gradient descent ends on partly separable data.

    Attributes
    ----------
    separable : ndarray
        ``[N]`` bool, rows of the strictly separable part.
    finite : ndarray
        ``[d]``, component in ``S``, the span of the other rows: their minimiser; zero if there are none.
    direction : ndarray or None
        ``[d]``, unit vector orthogonal to ``S`` along which ``w`` grows: the hard margin of the separable part
        projected on the complement of ``S``; None if no row is separable.
    basis : ndarray
        ``[s, d]``, orthonormal rows spanning ``S``.
    """

    separable: np.ndarray
    finite: np.ndarray
    direction: np.ndarray | None
    basis: np.ndarray

    def parts(self, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Split ``w``, ``[d]`` or ``[k, d]``, into its components in ``S`` and orthogonal to it."""
        inside = (np.asarray(w) @ self.basis.T) @ self.basis
        return inside, w - inside


def mixed_limit(nodes: Sequence[np.ndarray], p: Weights = "uniform", loss: Loss = "logistic") -> MixedLimit:
    """Compute the limit of gradient descent on any data set (Ji and Telgarsky 2018, arXiv 1803.07300).

    Local-GD has the same direction, but for L > 1 another component in ``S``.

    Parameters
    ----------
    nodes : sequence of ndarray
        Signed rows of each node.
    p : {"uniform", "size"} or sequence of float
        Weights of the nodes.
    loss : {"logistic", "exponential"}
        The loss of one row; the direction is the same for both, the finite component is not.

    Returns
    -------
    MixedLimit
        Partition, finite component and direction.
    """
    weight = node_weights(nodes, p)
    z = signed_rows(np.vstack(nodes))
    row_weight = np.concatenate([
        np.full(len(part), q / len(part)) for part, q in zip(nodes, weight, strict=True)
    ])
    strict = separable_part(z)
    basis = np.zeros((0, z.shape[1]))
    finite = np.zeros(z.shape[1])
    rest = z[~strict]
    if rest.any():
        _, singular, rows = np.linalg.svd(rest, full_matrices=False)
        basis = rows[singular > singular[0] * 1e-12 * max(rest.shape)]
        finite = _newton(rest, row_weight[~strict], loss)
    direction = None
    if strict.any():
        outside = z[strict] - (z[strict] @ basis.T) @ basis
        direction = max_margin(outside).direction
    return MixedLimit(strict, finite, direction, basis)
