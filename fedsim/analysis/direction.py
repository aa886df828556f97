"""Which linear solution did a federation pick: distances of averaged weights from the hard-margin direction.

Every metric takes one weight vector ``[d]`` or a trajectory ``[k, d]`` and gives a number or ``[k]``. Nodes are lists of
signed rows ``Z_i = y_i X_i``, ``[n_i, d]``; ``p`` weighs them alike in the average and in the loss
``F(w) = sum_i p_i (1/n_i) sum_j l(z_ij . w)``. With L local steps of size eta, ``t = eta L k`` after k averages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import logsumexp, softmax

from fedsim.analysis.max_margin import max_margin

Loss = Literal["logistic", "exponential"]
Weights = Literal["uniform", "size"] | Sequence[float] | np.ndarray


def node_weights(nodes: Sequence[np.ndarray], p: Weights = "uniform") -> np.ndarray:
    """Weigh the nodes: ``1/M`` (uniform), ``n_i / N`` (size), or given numbers divided by their sum.

    Parameters
    ----------
    nodes : sequence of ndarray
        M arrays ``[n_i, d]``, none empty, d the same.
    p : {"uniform", "size"} or sequence of float
        M nonnegative numbers, not all zero.

    Returns
    -------
    ndarray
        ``[M]``, sum 1.

    Raises
    ------
    ValueError
        If there is no node, a node has no row, widths differ, or ``p`` does not fit.
    """
    if not len(nodes):
        raise ValueError("node_weights: nodes is empty, needs at least one node")
    for i, z in enumerate(nodes):
        if z.ndim != 2 or len(z) == 0:
            raise ValueError(
                f"node_weights: node {i} has shape {z.shape}, must be [n, d] with at least one row"
            )
        if z.shape[1] != nodes[0].shape[1]:
            raise ValueError(
                f"node_weights: node {i} has {z.shape[1]} features, node 0 has {nodes[0].shape[1]}"
            )
    if isinstance(p, str):
        if p not in ("uniform", "size"):
            raise ValueError(f"node_weights: p = {p!r} must be 'uniform', 'size' or {len(nodes)} numbers")
        raw = np.array([1.0 if p == "uniform" else len(z) for z in nodes])
    else:
        raw = np.asarray(p, dtype=np.float64)
        if raw.shape != (len(nodes),) or not (raw >= 0).all() or not 0 < raw.sum() < np.inf:
            raise ValueError(f"node_weights: p = {p} must be {len(nodes)} nonnegative numbers, not all zero")
    return raw / raw.sum()


def federated_loss(
    nodes: Sequence[np.ndarray], w: np.ndarray, p: Weights = "uniform", loss: Loss = "logistic"
) -> np.ndarray:
    """Compute ``F(w) = sum_i p_i (1/n_i) sum_j l(z_ij . w)``, ``l(s) = log(1 + e^-s)`` or ``e^-s``.

    Parameters
    ----------
    nodes : sequence of ndarray
        Signed rows of each node.
    w : ndarray
        ``[d]`` or ``[k, d]``.
    p : {"uniform", "size"} or sequence of float
        Weights of the nodes; those of the average.
    loss : {"logistic", "exponential"}
        The loss of one row.

    Returns
    -------
    ndarray
        A number or ``[k]``.
    """
    return np.exp(log_federated_loss(nodes, w, p, loss))


def log_federated_loss(
    nodes: Sequence[np.ndarray], w: np.ndarray, p: Weights = "uniform", loss: Loss = "logistic"
) -> np.ndarray:
    """Compute ``log F(w)`` without underflow of the exponential loss; arguments as in `federated_loss`.

    Parameters
    ----------
    nodes, w, p, loss
        As in `federated_loss`.

    Returns
    -------
    ndarray
        A number or ``[k]``.

    Raises
    ------
    ValueError
        If the loss is unknown.
    """
    weight = np.concatenate([
        np.full(len(z), p_i / len(z)) for z, p_i in zip(nodes, node_weights(nodes, p), strict=True)
    ])
    scores = np.asarray(w) @ np.vstack(nodes).T
    if loss == "exponential":
        return np.asarray(logsumexp(-scores, axis=-1, b=weight))
    if loss == "logistic":
        return np.log(np.logaddexp(0.0, -scores) @ weight)
    raise ValueError(f"federated_loss: loss = {loss!r} must be 'logistic' or 'exponential'")


def smoothness(nodes: Sequence[np.ndarray], loss: Loss = "logistic") -> float:
    """Bound the curvature of the node losses at 0, ``beta = max_i ||Z_i||_2^2 / (4 n_i)``; times 4 if exponential."""
    curvature = max(float(np.linalg.norm(z, 2)) ** 2 / len(z) for z in nodes)
    return curvature if loss == "exponential" else curvature / 4


def unit(w: np.ndarray) -> np.ndarray:
    """Scale vectors along the last axis to length 1; a zero vector has no direction and gives NaN."""
    w = np.asarray(w, dtype=np.float64)
    norm = np.linalg.norm(w, axis=-1, keepdims=True)
    return w / np.where(norm > 0, norm, np.nan)


def cosd(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Measure one minus the cosine as ``||u/||u|| - v/||v||||^2 / 2``, exact also below 1e-16.

    Parameters
    ----------
    u, v : ndarray
        ``[d]`` or ``[k, d]``.

    Returns
    -------
    ndarray
        In [0, 2], a number or ``[k]``; NaN where a vector is zero.

    Examples
    --------
    >>> print(f"{cosd(np.array([1.0, 1e-10]), np.array([1.0, 0.0])):.3g}")
    5e-21
    """
    return 0.5 * np.square(unit(u) - unit(v)).sum(axis=-1)


def angle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Measure the angle in radians, ``2 arcsin(sqrt(cosd / 2))``; arguments as in `cosd`."""
    return 2 * np.arcsin(np.minimum(1.0, np.sqrt(cosd(u, v) / 2)))


def margin(z: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Measure the normalised margin ``min_j z_j . w / ||w||``.

    Parameters
    ----------
    z : ndarray
        ``[N, d]``, signed rows.
    w : ndarray
        ``[d]`` or ``[k, d]``.

    Returns
    -------
    ndarray
        A number or ``[k]``; NaN where ``w`` is zero.
    """
    return (unit(w) @ z.T).min(axis=-1)


def margin_ratio(z: np.ndarray, w: np.ndarray, gamma: float) -> np.ndarray:
    """Measure ``margin(w) / gamma``, at most 1."""
    return margin(z, w) / gamma


def mgap(z: np.ndarray, w: np.ndarray, gamma: float) -> np.ndarray:
    """Measure ``1 - margin(w) / gamma``, which bounds `cosd` to the hard-margin direction from above."""
    return 1 - margin_ratio(z, w, gamma)


def late(loss: np.ndarray, t: np.ndarray, gamma: float) -> np.ndarray:
    """Compute ``F(w^k) t gamma^2``, which tends to 1 on separable data, ``t = eta L k``."""
    return np.asarray(loss) * np.asarray(t) * gamma**2


def slope_direction(early: np.ndarray, later: np.ndarray) -> np.ndarray:
    """Estimate the limit direction by ``(w^{k'} - w^k) / ||w^{k'} - w^k||``, often closer than ``w^{k'}`` itself."""
    return unit(np.asarray(later) - np.asarray(early))


def slope_ratio(early: np.ndarray, later: np.ndarray, w_hat: np.ndarray, factor: float = 2.0) -> np.ndarray:
    """Compute ``||w^{k'} - w^k|| / (log(k'/k) ||w_hat||)``, which tends to 1 on separable data.

    Parameters
    ----------
    early, later : ndarray
        ``w^k`` and ``w^{k'}``, ``[d]`` or ``[k, d]``.
    w_hat : ndarray
        ``[d]``, hard-margin vector (its norm counts).
    factor : float
        ``k' / k``, > 1.

    Returns
    -------
    ndarray
        A number or ``[k]``.

    Raises
    ------
    ValueError
        If ``factor`` is not above 1.
    """
    if not factor > 1:
        raise ValueError(f"slope_ratio: factor = {factor} must be > 1")
    moved = np.linalg.norm(np.asarray(later) - np.asarray(early), axis=-1)
    return moved / (np.log(factor) * np.linalg.norm(w_hat))


def loss_exponent(early: np.ndarray, later: np.ndarray, factor: float) -> np.ndarray:
    """Compute ``-log(F_{k'} / F_k) / log(k'/k)`` from two losses with ``factor = k'/k > 1``; tends to 1."""
    return -np.log(np.asarray(later) / np.asarray(early)) / np.log(factor)


def support_weights(z: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Share of each row in the gradient, ``softmax(-Z w)``, ``[N]`` or ``[k, N]``; tends to ``a / sum a``."""
    return softmax(-(np.asarray(w) @ z.T), axis=-1)


def support_distance(z: np.ndarray, w: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
    """Measure the total variation ``||softmax(-Z w) - a / sum a||_1 / 2`` between gradient shares and multipliers.

    Parameters
    ----------
    z : ndarray
        ``[N, d]``, signed rows.
    w : ndarray
        ``[d]`` or ``[k, d]``.
    multipliers : ndarray
        ``[N]``, ``a`` of the hard-margin problem; unique only for rows in general position.

    Returns
    -------
    ndarray
        In [0, 1], a number or ``[k]``; falls slowly where multipliers are small.
    """
    return 0.5 * np.abs(support_weights(z, w) - multipliers / multipliers.sum()).sum(axis=-1)


def relative_error(u: np.ndarray, w_hat: np.ndarray) -> np.ndarray:
    """Measure ``||u - w_hat|| / ||w_hat||``, norm included, for trajectories of projections."""
    return np.linalg.norm(np.asarray(u) - w_hat, axis=-1) / np.linalg.norm(w_hat)


@dataclass(frozen=True, eq=False)
class ReferencePoints:
    """Distances of two simple answers from the hard margin of the union.

    Attributes
    ----------
    nodes : ndarray
        ``[M]``, `cosd` of each node's own hard-margin vector.
    mean : float
        `cosd` of their plain mean, the baseline of averaging once at the end.
    """

    nodes: np.ndarray
    mean: float


def reference_points(nodes: Sequence[np.ndarray], w_hat: np.ndarray) -> ReferencePoints:
    """Compute what nodes would find alone, and the plain mean of it.

    Parameters
    ----------
    nodes : sequence of ndarray
        Signed rows of each node; each must be separable by itself.
    w_hat : ndarray
        ``[d]``, hard-margin vector of the union.

    Returns
    -------
    ReferencePoints
        Distances of the nodes' vectors and of their mean.
    """
    own = np.stack([max_margin(z).w_hat for z in nodes])
    return ReferencePoints(cosd(own, w_hat), float(cosd(own.mean(axis=0), w_hat)))
