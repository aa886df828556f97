"""Idealised variants of Local-GD: parallel projections, loss-normalised steps, and regression in closed form.

With a weak pull ``lam -> 0`` towards the global model and exact local solutions, a node's answer divided by
``log(1 / lam)`` is the projection ``P_i`` on its feasible set ``C_i = {w : Z_i w >= 1}`` (for continual learning:
Evron et al. 2023, arXiv 2306.03534). Averaging projections reaches *some* point that all nodes accept; anchored at 0
(Halpern 1967) it reaches the shortest one, the hard-margin vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedsim.analysis.direction import Weights, node_weights, smoothness
from fedsim.analysis.max_margin import least_distance


def project(z: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Project ``v`` on ``{w : Z w >= 1}``: ``v + argmin ||q||`` subject to ``Z q >= 1 - Z v``.

    Parameters
    ----------
    z : ndarray
        ``[n, d]``, signed rows, separable.
    v : ndarray
        ``[d]``.

    Returns
    -------
    ndarray
        ``[d]``; ``v`` itself if it is feasible.
    """
    lack = 1.0 - z @ v
    return v + least_distance(z, lack)[0] if lack.max() > 0 else v


def parallel_projections(nodes: Sequence[np.ndarray], rounds: int, p: Weights = "uniform") -> np.ndarray:
    """Iterate ``u^{k+1} = sum_i p_i P_i(u^k)`` from ``u^0 = 0``; the limit satisfies all nodes but is not the shortest.

    Parameters
    ----------
    nodes : sequence of ndarray
        Signed rows of each node; the union must be separable.
    rounds : int
        K.
    p : {"uniform", "size"} or sequence of float
        Weights of the nodes.

    Returns
    -------
    ndarray
        ``[K + 1, d]``.
    """
    return _projections(nodes, np.ones(rounds), p)


def halpern(nodes: Sequence[np.ndarray], rounds: int, p: Weights = "uniform") -> np.ndarray:
    """Iterate ``u^k = k/(k+1) sum_i p_i P_i(u^{k-1})`` from ``u^0 = 0``; the limit is the hard-margin vector.

    Parameters
    ----------
    nodes : sequence of ndarray
        Signed rows of each node; the union must be separable.
    rounds : int
        K.
    p : {"uniform", "size"} or sequence of float
        Weights of the nodes.

    Returns
    -------
    ndarray
        ``[K + 1, d]``; the error of the vector, norm included, falls like ``1 / k``.
    """
    return _projections(nodes, np.array([anchor_factor(k) for k in range(1, rounds + 1)]), p)


def _projections(nodes: Sequence[np.ndarray], factors: np.ndarray, p: Weights) -> np.ndarray:
    weight = node_weights(nodes, p)
    out = np.zeros((len(factors) + 1, nodes[0].shape[1]))
    for k, factor in enumerate(factors):
        out[k + 1] = factor * (weight @ np.stack([project(z, out[k]) for z in nodes]))
    return out


def anchor_factor(k: int, anchored: bool = True) -> float:
    """Factor of the average that closes round k = 1, 2, ...: ``k / (k + 1)`` if anchored at 0, else 1.

    Parameters
    ----------
    k : int
        Round, counted from 1: a factor 0 in the first round would erase it.
    anchored : bool
        Whether the average is pulled to 0.

    Returns
    -------
    float
        In [1/2, 1].

    Raises
    ------
    ValueError
        If ``k`` is below 1.
    """
    if k < 1:
        raise ValueError(f"anchor_factor: k = {k} must be >= 1")
    return k / (k + 1) if anchored else 1.0


def modified_step_size(nodes: Sequence[np.ndarray], pull: float, c: float = 1.0) -> float:
    """Step size ``eta = c / beta`` of Modified Local-GD, whatever the number of local steps.

    Local step ``w_i <- w_i - eta (grad f_i(w_i) + lam (w_i - w^k))``, then ``w^{k+1} = theta sum_i p_i w_i`` with
    theta from `anchor_factor`. This is a reconstruction: Zhu, Vardhan, Mazumdar (2024, arXiv 2412.07971) regularise
    towards the global model and change the aggregation; the coefficients here are ours.

    Parameters
    ----------
    nodes : sequence of ndarray
        Signed rows of each node.
    pull : float
        lam, >= 0.
    c : float
        Share of ``1 / beta``, > 0.

    Returns
    -------
    float
        eta.

    Raises
    ------
    ValueError
        If ``lam < 0``, or ``eta (beta + lam) > 2``, where local steps no longer descend.
    """
    beta = smoothness(nodes)
    eta = c / beta
    if pull < 0 or not 0 < eta * (beta + pull) <= 2:
        raise ValueError(
            f"modified_step_size: c = {c}, pull = {pull} must have pull >= 0 and c (1 + pull / beta) <= 2"
        )
    return eta


def loss_normalised_local_gd(
    nodes: Sequence[np.ndarray], local_steps: int, rounds: int, c: float = 0.5, p: Weights = "uniform"
) -> np.ndarray:
    """Run Local-GD on the exponential loss with steps in proportion to ``1 / F(w^k)``.

    The server sends ``log F(w^k)``; nodes take L steps of size ``c / (beta L F(w^k))``, ``beta = max_i ||Z_i||_2^2 / n_i``,
    in the logarithmic domain. The direction error then falls like a power of k, not of ``log k`` (for one node:
    Nacson et al. 2019, arXiv 1803.01905).

    Parameters
    ----------
    nodes : sequence of ndarray
        Signed rows of each node.
    local_steps, rounds : int
        L and K, at least 1.
    c : float
        Relative step size, > 0.
    p : {"uniform", "size"} or sequence of float
        Weights of the nodes.

    Returns
    -------
    ndarray
        ``[K + 1, d]``, from 0.
    """
    weight = node_weights(nodes, p)
    sizes = np.array([len(z) for z in nodes])
    z = np.zeros((len(nodes), sizes.max(), nodes[0].shape[1]))
    log_share = np.full(z.shape[:2], -np.inf)  # log of p_i / n_i; padding rows have no share
    for i, rows in enumerate(nodes):
        z[i, : len(rows)] = rows
        log_share[i, : len(rows)] = np.log(weight[i] / len(rows)) if weight[i] > 0 else -np.inf
    back = z.transpose(0, 2, 1) * (
        c / (smoothness(nodes, "exponential") * local_steps) / sizes[:, None, None]
    )
    out = np.zeros((rounds + 1, z.shape[2]))
    for k in range(rounds):
        log_loss = np.logaddexp.reduce((log_share - z @ out[k]).ravel())
        w = np.repeat(out[k][None, :, None], len(nodes), axis=0)
        for _ in range(local_steps):
            w = w + back @ np.exp(-(z @ w) - log_loss)
        out[k + 1] = weight @ w[:, :, 0]
    return out


def regression_maps(xs: Sequence[np.ndarray], eta: float, local_steps: int | None) -> np.ndarray:
    """Error map of each node's local steps, ``T_i = (I - eta X_i^T X_i / n_i)^L``.

    Parameters
    ----------
    xs : sequence of ndarray
        M arrays ``X_i``, ``[n_i, d]``.
    eta : float
        Step size, > 0; not used if the local problem is solved exactly.
    local_steps : int or None
        L, at least 1; None for exact solutions, ``T_i = I - X_i^+ X_i``.

    Returns
    -------
    ndarray
        ``[M, d, d]``.
    """
    eye = np.eye(xs[0].shape[1])
    if local_steps is None:
        return np.stack([eye - np.linalg.pinv(x) @ x for x in xs])
    return np.stack([np.linalg.matrix_power(eye - eta * x.T @ x / len(x), local_steps) for x in xs])


def regression_limit(xs: Sequence[np.ndarray], ys: Sequence[np.ndarray], start: np.ndarray) -> np.ndarray:
    """Limit of Local-GD on interpolable least squares, ``w_0 + X^+ (y - X w_0)``: the solution nearest to the start.

    Parameters
    ----------
    xs, ys : sequence of ndarray
        M arrays ``[n_i, d]`` and ``[n_i]`` that one vector fits exactly.
    start : ndarray
        ``[d]``, ``w_0``.

    Returns
    -------
    ndarray
        ``[d]``.

    Raises
    ------
    ValueError
        If no vector fits all nodes.
    """
    x, y = np.vstack(xs), np.concatenate(ys)
    limit = start + np.linalg.lstsq(x, y - x @ start)[0]
    if np.abs(x @ limit - y).max() > 1e-8 * max(1.0, float(np.abs(y).max())):
        raise ValueError("regression_limit: no vector fits all nodes, the closed form needs interpolation")
    return limit


def regression_trajectory(
    xs: Sequence[np.ndarray],
    ys: Sequence[np.ndarray],
    eta: float,
    local_steps: int | None,
    rounds: int,
    p: Weights = "uniform",
    start: np.ndarray | None = None,
) -> np.ndarray:
    """Local-GD on ``f_i(w) = ||X_i w - y_i||^2 / (2 n_i)`` in closed form, ``w^k - w_lim = T^k (w^0 - w_lim)``.

    ``T = sum_i p_i T_i`` with the maps of `regression_maps`; no other term survives because ``X_i w_lim = y_i``.

    Parameters
    ----------
    xs, ys : sequence of ndarray
        M arrays ``[n_i, d]`` and ``[n_i]`` that one vector fits exactly.
    eta : float
        Step size, > 0.
    local_steps : int or None
        L, or None for exact local solutions.
    rounds : int
        K.
    p : {"uniform", "size"} or sequence of float
        Weights of the nodes.
    start : ndarray, optional
        ``[d]``, ``w_0``; zero by default.

    Returns
    -------
    ndarray
        ``[K + 1, d]``.
    """
    start = np.zeros(xs[0].shape[1]) if start is None else start
    limit = regression_limit(xs, ys, start)
    total = np.einsum("i,ijk->jk", node_weights(xs, p), regression_maps(xs, eta, local_steps))
    out = np.empty((rounds + 1, len(start)))
    error = start - limit
    for k in range(rounds + 1):
        out[k] = limit + error
        error = total @ error
    return out


def regression_contraction(
    xs: Sequence[np.ndarray], eta: float, local_steps: int | None, p: Weights = "uniform"
) -> float:
    """Contraction of the error in one round: the spectral radius of ``sum_i p_i T_i`` on the span of all rows.

    Parameters
    ----------
    xs : sequence of ndarray
        M arrays ``[n_i, d]``.
    eta : float
        Step size, > 0.
    local_steps : int or None
        L, or None for exact local solutions.
    p : {"uniform", "size"} or sequence of float
        Weights of the nodes.

    Returns
    -------
    float
        Below 1 iff Local-GD converges.
    """
    _, singular, rows = np.linalg.svd(np.vstack(xs), full_matrices=False)
    basis = rows[singular > singular[0] * 1e-12 * max(rows.shape)]
    total = np.einsum("i,ijk->jk", node_weights(xs, p), regression_maps(xs, eta, local_steps))
    return float(np.abs(np.linalg.eigvalsh(basis @ total @ basis.T)).max())
