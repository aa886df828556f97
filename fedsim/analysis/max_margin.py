"""Hard-margin direction of linearly separable data, with a certificate that does not trust the solver.

All functions work on *signed rows* ``z_j = y_j x_j`` in float64, without an intercept. The hard-margin vector is
``w_hat = argmin ||w||`` subject to ``Z w >= 1``; its multipliers ``a >= 0`` give ``w_hat = Z^T a`` and
``sum a = ||w_hat||^2``; the margin is ``gamma = 1 / ||w_hat||``. A solver with an intercept solves another problem.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedsim.least_distance import least_distance, solve

__all__ = ["MaxMargin", "dual_acceleration", "least_distance", "max_margin", "node_rows", "signed_rows"]

Solver = Literal["auto", "ldp", "working_set", "dual"]
Status = Literal["separable", "non_separable", "undecided"]

_ZERO_UPPER = 1e-11  # an upper bound on gamma / rho below this counts as zero
_ZERO_LOWER = 1e-12  # a margin above this times rho is a witness of separability
_DIRECT_ROWS = 5000  # up to here one NNLS over all rows is the fastest plan


@dataclass(frozen=True, eq=False)
class MaxMargin:
    """Answer of `max_margin`: a status, certified bounds on the margin, and a direction where there is one.

    Attributes
    ----------
    status : {"separable", "non_separable", "undecided"}
        Separable: ``solution`` has a margin above 1e-12 of the longest row. Non-separable: ``simplex`` is a
        certificate of Gordan, ``Z^T q = 0`` to 1e-11 of the longest row, and there is no such solution. Undecided:
        neither; float64 cannot tell the margin from zero, or an iterative solver stopped early.
    certified : bool
        Whether primal feasibility, stationarity and duality gap hold to 1e-10 and the bounds agree to 1e-8.
    lower, upper : float
        ``min(Z w) / ||w|| <= gamma <= ||Z^T q||``, in the units of the rows; ``upper`` holds for any data.
    solution : ndarray or None
        ``[d]``, the vector ``w_hat``, scaled to ``min(Z w) = 1``; None unless separable.
    dual : ndarray or None
        ``[N]``, multipliers ``a >= 0``; None unless separable. Not unique for linearly dependent rows (duplicates).
    simplex : ndarray
        ``[N]``, ``q >= 0``, ``sum q = 1``, the evidence for ``upper``.
    infeasibility, stationarity, gap : float
        ``max(0, 1 - min(Z w))``, ``||Z^T a - w|| / ||w||`` and ``|sum a - ||w||^2| / ||w||^2``; infinite without a solution.
    reason : str
        Why there is no direction, in words; empty if there is one.
    """

    status: Status
    certified: bool
    lower: float
    upper: float
    solution: np.ndarray | None
    dual: np.ndarray | None
    simplex: np.ndarray
    infeasibility: float
    stationarity: float
    gap: float
    reason: str

    @property
    def w_hat(self) -> np.ndarray:
        """Hard-margin vector ``[d]``; asking for it without separability is an error.

        Raises
        ------
        ValueError
            If the status is not "separable".
        """
        if self.solution is None:
            raise ValueError(
                f"max_margin: rows are {self.status}, there is no max-margin direction: {self.reason}"
            )
        return self.solution

    @property
    def multipliers(self) -> np.ndarray:
        """Multipliers ``a``, ``[N]``, ``w_hat = Z^T a``; asking for them without separability is an error.

        Raises
        ------
        ValueError
            If the status is not "separable".
        """
        if self.dual is None:
            raise ValueError(f"max_margin: rows are {self.status}, there are no multipliers: {self.reason}")
        return self.dual

    @property
    def direction(self) -> np.ndarray:
        """Unit vector ``w_hat / ||w_hat||``, shape ``[d]``."""
        return self.w_hat / np.linalg.norm(self.w_hat)

    @property
    def gamma(self) -> float:
        """Margin ``1 / ||w_hat||``."""
        return 1.0 / float(np.linalg.norm(self.w_hat))

    @property
    def width(self) -> float:
        """Relative width ``(upper - lower) / upper`` of the bounds on the margin."""
        return (self.upper - self.lower) / self.upper if self.upper > 0 else 0.0

    @property
    def support(self) -> np.ndarray:
        """Indices of rows with positive weight in ``simplex``: support vectors, or the rows of the conflict."""
        return np.flatnonzero(self.simplex > 0)


def signed_rows(x: np.ndarray, y: np.ndarray | None = None) -> np.ndarray:
    """Multiply rows by their labels, ``z_j = y_j x_j``, in float64.

    Parameters
    ----------
    x : ndarray
        ``[N, d]``, finite, N and d at least 1.
    y : ndarray, optional
        ``[N]``, labels in {-1, 1} or {0, 1}; one class alone is fine. Without it ``x`` is taken as signed already.

    Returns
    -------
    ndarray
        ``[N, d]``.

    Raises
    ------
    ValueError
        If shapes do not match, a feature is not finite or a label is none of the above.
    """
    z = np.asarray(x, dtype=np.float64)
    if z.ndim != 2 or 0 in z.shape:
        raise ValueError(
            f"signed_rows: x has shape {z.shape}, must be [N, d] with at least one row and one column"
        )
    finite = np.isfinite(z).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"signed_rows: row {int(np.argmin(finite))} of x is NaN or infinite, features must be finite"
        )
    if y is None:
        return z
    labels = np.asarray(y, dtype=np.float64)
    if labels.shape != z.shape[:1]:
        raise ValueError(f"signed_rows: y has shape {labels.shape}, must be ({len(z)},) like the rows of x")
    if np.isin(labels, (0.0, 1.0)).all():
        labels = 2 * labels - 1
    if not np.isin(labels, (-1.0, 1.0)).all():
        raise ValueError(
            f"signed_rows: labels are {np.unique(labels)[:5]}, must be in {{-1, 1}} or in {{0, 1}}"
        )
    return labels[:, None] * z


def node_rows(x: np.ndarray, y: np.ndarray, workers: np.ndarray) -> list[np.ndarray]:
    """Split signed rows by the node that owns them.

    Parameters
    ----------
    x, y : ndarray
        ``[N, d]`` and ``[N]`` as in `signed_rows`.
    workers : ndarray
        ``[N]``, node of each row, integers 0..M-1, every node with at least one row.

    Returns
    -------
    list of ndarray
        M arrays ``Z_i`` of shape ``[n_i, d]``.

    Raises
    ------
    ValueError
        If a node has no row.
    """
    z = signed_rows(x, y)
    owner = np.asarray(workers)
    if owner.shape != z.shape[:1] or owner.min() < 0:
        raise ValueError(f"node_rows: workers has shape {owner.shape}, must be ({len(z)},) with entries >= 0")
    counts = np.bincount(owner)
    if not counts.all():
        empty = int(np.argmin(counts > 0))
        raise ValueError(
            f"node_rows: node {empty} has no row ({len(z)} rows, {len(counts)} nodes), needs at least one"
        )
    return [z[owner == i] for i in range(len(counts))]


def _result(
    z: np.ndarray, w: np.ndarray | None, a: np.ndarray | None, weights: list[np.ndarray], why: str
) -> MaxMargin:
    """Judge a candidate: every number comes from ``z``, ``w``, ``a`` and the simplex points, none from the solver."""
    rho = float(np.linalg.norm(z, axis=1).max())
    points = [q / q.sum() for q in weights if q.sum() > 0]
    bounds = [float(np.linalg.norm(q @ z)) for q in points]
    best = int(np.argmin(bounds))
    upper, simplex = bounds[best], points[best]
    lower = 0.0
    infeasibility = stationarity = gap = float("inf")
    if w is not None and np.isfinite(w).all() and (norm := float(np.linalg.norm(w))) > 0:
        smallest = float((z @ w).min())
        lower = smallest / norm
        infeasibility = max(0.0, 1.0 - smallest)
        if a is not None:
            stationarity = float(np.linalg.norm(a @ z - w)) / norm
            gap = abs(float(a.sum()) - norm**2) / norm**2
    status: Status = "undecided"
    if lower > _ZERO_LOWER * rho:  # a witness outweighs any upper bound that rounding may have lowered
        status = "separable"
    elif upper <= _ZERO_UPPER * rho:
        status = "non_separable"
    if status != "separable":
        if not why:
            rows = int((simplex > 0).sum())
            why = (
                f"a convex combination of {rows} rows has norm {upper:.1e}"
                if status == "non_separable"
                else f"the margin lies in [{max(lower, 0.0):.1e}, {upper:.1e}], which does not exclude zero"
            )
        return MaxMargin(
            status, False, lower, upper, None, None, simplex, infeasibility, stationarity, gap, why
        )
    exact = max(infeasibility, stationarity, gap) <= 1e-10
    certified = exact and (upper - lower) <= 1e-8 * upper
    return MaxMargin(status, certified, lower, upper, w, a, simplex, infeasibility, stationarity, gap, "")


def _conflict(z: np.ndarray) -> MaxMargin | None:
    """Find the two conflicts that users meet, a zero row and a point that carries both labels."""
    zero = np.flatnonzero(~z.any(axis=1))
    weight = np.zeros(len(z))
    if len(zero):
        weight[zero[0]] = 1.0
        return _result(z, None, None, [weight], f"row {zero[0]} is zero")
    # Adding 0.0 turns -0.0 into 0.0, so that equal rows have equal bytes.
    seen = {row.tobytes(): j for j, row in enumerate(z + 0.0)}
    for j, row in enumerate(0.0 - z):
        other = seen.get(row.tobytes())
        if other is not None:
            weight[[j, other]] = 1.0
            why = f"rows {min(j, other)} and {max(j, other)} are one point with contradicting labels"
            return _result(z, None, None, [weight], why)
    return None


def _direct(z: np.ndarray) -> MaxMargin:
    """One least-distance problem over all rows; wide data are first rotated into the span of the rows."""
    rho = float(np.linalg.norm(z, axis=1).max())
    if z.shape[1] > z.shape[0]:
        basis, r = np.linalg.qr(z.T)
        q, a, u = solve(r.T / rho, np.ones(len(z)))
        q = basis @ q
    else:
        q, a, u = solve(z / rho, np.ones(len(z)))
    return _result(z, q / rho, a / rho**2, [u, a], "")


def _working_set(z: np.ndarray) -> MaxMargin:
    """Least-distance problems over support and rows of smallest margin, until no other row is violated."""
    n, d = z.shape
    w, _, _ = _dual_steps(z, 200)
    margins = z @ w
    rows = np.empty(0, dtype=np.intp)
    norm = 0.0
    while True:
        # Keeping the support and adding a violated row makes ||w|| grow strictly, so no set of rows comes back.
        rows = np.union1d(rows, np.argsort(margins, kind="stable")[: 2 * d])
        part = _direct(z[rows])
        simplex = np.zeros(n)
        simplex[rows] = part.simplex
        if part.solution is None or part.dual is None:
            return _result(z, None, None, [simplex], "")
        margins = z @ part.solution
        previous, norm = norm, float(np.linalg.norm(part.solution))
        violated = np.flatnonzero(margins < 1 - 1e-10)
        if np.isin(violated, rows).all() or norm <= previous:
            a = np.zeros(n)
            a[rows] = part.dual
            return _result(z, part.solution, a, [simplex, a], "")
        rows = rows[part.support]


def _dual_steps(z: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Run dual acceleration; return the best ``w``, the best ``q`` and the lower bound of that ``w``."""
    rho = float(np.linalg.norm(z, axis=1).max())
    q = np.full(len(z), 1.0 / len(z))
    g = np.zeros(z.shape[1])
    w = np.zeros(z.shape[1])
    best_w, lower, best_q, upper = w, -np.inf, q, np.inf
    for t in range(steps):
        v = (q @ z) / rho
        if (bound := float(np.linalg.norm(v))) < upper:
            best_q, upper = q, bound
        g = t / (t + 1) * (g + v)
        w = w + g + v
        s = (z @ w) / rho
        norm = float(np.linalg.norm(w))
        if norm > 0 and s.min() / norm > lower:
            best_w, lower = w, float(s.min()) / norm
        # w grows like t^2: only the renormalised softmax keeps q on the simplex to the last digit.
        q = np.exp(s.min() - s)
        q /= q.sum()
    return best_w, best_q, lower * rho


def dual_acceleration(z: np.ndarray, steps: int = 3000) -> MaxMargin:
    """Approximate the hard-margin direction by momentum on the dual of the normalised exponential loss.

    ``v = Z^T q;  g = t/(t+1) (g + v);  w = w + g + v;  q = softmax(-Z w)`` on rows scaled by the longest one, with
    bounds on the margin from the best ``w`` and the best ``q`` so far (Ji, Srebro, Telgarsky 2021, arXiv 2107.00595).

    Parameters
    ----------
    z : ndarray
        ``[N, d]``, signed rows.
    steps : int
        At least 1; each is two products with ``Z``.

    Returns
    -------
    MaxMargin
        ``width`` falls roughly like ``1 / steps^2``; seldom ``certified``.

    Raises
    ------
    ValueError
        If ``steps`` is not positive or the rows are not finite.
    """
    if steps < 1:
        raise ValueError(f"dual_acceleration: steps = {steps} must be >= 1")
    z = signed_rows(z)
    if (known := _conflict(z)) is not None:
        return known
    w, q, lower = _dual_steps(z, steps)
    if lower <= 0:
        return _result(z, None, None, [q], "")
    w = w / float((z @ w).min())
    return _result(z, w, q * float(w @ w), [q], "")


def max_margin(x: np.ndarray, y: np.ndarray | None = None, *, solver: Solver = "auto") -> MaxMargin:
    """Compute ``w_hat = argmin ||w||`` subject to ``y_j x_j . w >= 1``, with a certificate; no intercept.

    Parameters
    ----------
    x : ndarray
        ``[N, d]``, finite.
    y : ndarray, optional
        ``[N]`` in {-1, 1} or {0, 1}; without it ``x`` holds signed rows.
    solver : {"auto", "ldp", "working_set", "dual"}
        ``ldp`` solves all rows at once, ``working_set`` grows a set of rows, ``dual`` gives bounds only. ``auto`` takes
        ``ldp`` up to 5000 or 4 d rows, then ``working_set``; where NNLS does not finish, the next in this order.

    Returns
    -------
    MaxMargin
        Status, bounds and certificate; a direction only for separable rows.

    Raises
    ------
    ValueError
        If the solver is unknown, the data are not finite or labels are wrong.

    Examples
    --------
    >>> answer = max_margin(np.array([[0.6, 0.8], [0.6, -0.4]]))
    >>> answer.status, answer.certified, round(answer.gamma, 12)
    ('separable', True, 0.6)
    >>> max_margin(np.array([[1.0, 2.0], [1.0, 2.0]]), np.array([1, 0])).reason
    'rows 0 and 1 are one point with contradicting labels'
    """
    if solver not in ("auto", "ldp", "working_set", "dual"):
        raise ValueError(f"max_margin: solver = {solver!r} must be one of auto, ldp, working_set, dual")
    z = signed_rows(x, y)
    if (known := _conflict(z)) is not None:
        return known
    if solver == "dual":
        return dual_acceleration(z)
    if solver == "ldp" or (solver == "auto" and len(z) <= max(_DIRECT_ROWS, 4 * z.shape[1])):
        try:
            return _direct(z)
        except RuntimeError:  # NNLS met its iteration limit
            pass
    try:
        return _working_set(z)
    except RuntimeError:
        return dual_acceleration(z)
