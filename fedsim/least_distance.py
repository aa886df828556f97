"""The least-distance problem, ``min ||q||`` subject to ``G q >= h``: projections and hard margins come down to it."""

from __future__ import annotations

import numpy as np
from scipy.linalg import solve_triangular
from scipy.optimize import nnls


def least_distance(g: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Solve ``min ||q||`` subject to ``G q >= h``, the least-distance problem.

    Lawson and Hanson (1974, ch. 23) turn it into one nonnegative least-squares problem; its support ``S`` is then
    solved exactly, ``q = Q R^-T h_S`` with ``G_S^T = Q R``, which keeps all digits when ``||q||`` is large.

    Parameters
    ----------
    g, h : ndarray
        ``[m, d]`` and ``[m]``.

    Returns
    -------
    q : ndarray
        ``[d]``.
    a : ndarray
        ``[m]``, multipliers ``a >= 0`` with ``q = G^T a``.

    Raises
    ------
    ValueError
        If no ``q`` satisfies the constraints.
    """
    scale = float(np.linalg.norm(g, axis=1).max())
    reach = float(np.abs(h).max())
    if (h <= 0).all():
        return np.zeros(g.shape[1]), np.zeros(len(g))
    if scale > 0:
        q, a, _ = solve(g / scale, h / reach)
        if np.isfinite(q).all() and float(np.min(g @ q / scale - h / reach)) >= -1e-8:
            return q * (reach / scale), a * (reach / scale**2)
    raise ValueError("least_distance: no point satisfies G q >= h")


def solve(g: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Solve the least-distance problem without a check that it has a solution.

    Parameters
    ----------
    g, h : ndarray
        ``[m, d]`` and ``[m]``, of order 1.

    Returns
    -------
    q, a : ndarray
        As in `least_distance`; ``q`` is NaN where no solution was found.
    u : ndarray
        ``[m]``, the answer of the nonnegative least squares: if ``G q >= h > 0`` has no solution, ``u / sum u`` is
        a convex combination of the rows of G with norm near 0.
    """
    d = g.shape[1]
    target = np.zeros(d + 1)
    target[d] = 1.0
    system = np.vstack([g.T, h])
    u, residual = nnls(system, target)
    support = np.flatnonzero(u > 0)
    a = np.zeros(len(g))
    if residual > 1e-13 and 0 < len(support) <= d:
        basis, r = np.linalg.qr(g[support].T)
        if np.abs(np.diag(r)).min() > 0:
            inner = solve_triangular(r, h[support], trans=1)
            # Rounding can leave a zero multiplier at -1e-17; the certificate is computed after the clip.
            a[support] = np.maximum(solve_triangular(r, inner), 0.0)
            return basis @ inner, a, u
    return np.full(d, np.nan), a, u
