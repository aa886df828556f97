"""Rates of convergence from measured curves, and the bounds known for large steps.

On separable data the loss falls like ``1 / t`` and the direction error `cosd` like ``1 / log^2 t``, ``t = eta L k``
(Soudry et al. 2018, arXiv 1710.10345, for gradient descent). A fit of these laws is a straight line in logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True, eq=False)
class Rate:
    """Fitted law ``value = exp(b_0) prod_j x_j^b_j``.

    Attributes
    ----------
    names : tuple of str
        Names of the regressors ``x_j``.
    exponents, low, high : ndarray
        ``[r]``, estimates ``b_j`` and the ends of their confidence intervals.
    constant : float
        ``exp(b_0)``.
    residual : float
        Standard deviation of the residuals in ``log value``.
    confidence : float
        Of the intervals, in (0, 1).
    spread : ndarray
        Covariance ``[r+1, r+1]`` of ``(b_0, b)``, or bootstrap draws ``[B, r+1]``.
    dof : int
        Degrees of freedom of the t interval; 0 for a bootstrap.
    """

    names: tuple[str, ...]
    exponents: np.ndarray
    low: np.ndarray
    high: np.ndarray
    constant: float
    residual: float
    confidence: float
    spread: np.ndarray
    dof: int

    def band(self, regressors: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Evaluate the fitted curve with its pointwise confidence band.

        Parameters
        ----------
        regressors : mapping
            A positive array ``[n]`` for each of ``names``.

        Returns
        -------
        tuple of ndarray
            ``(fit, low, high)``, each ``[n]``.
        """
        design = _design("Rate.band", {name: regressors[name] for name in self.names})
        middle = design @ np.concatenate([[math.log(self.constant)], self.exponents])
        if self.dof == 0:
            curves = design @ self.spread.T
            tail = (1 - self.confidence) / 2
            low, high = np.quantile(curves, [tail, 1 - tail], axis=1)
        else:
            error = np.sqrt(np.einsum("ni,ij,nj->n", design, self.spread, design))
            half = stats.t.ppf((1 + self.confidence) / 2, self.dof) * error
            low, high = middle - half, middle + half
        return np.exp(middle), np.exp(low), np.exp(high)


def _design(where: str, regressors: Mapping[str, np.ndarray]) -> np.ndarray:
    columns = []
    for name, x in regressors.items():
        values = np.asarray(x, dtype=np.float64)
        if not ((values > 0) & np.isfinite(values)).all():
            raise ValueError(
                f"{where}: {name} must be positive and finite, its smallest entry is {values.min()}"
            )
        columns.append(np.log(values))
    return np.column_stack([np.ones(len(columns[0])), *columns])


def fit_rate(
    value: np.ndarray,
    regressors: Mapping[str, np.ndarray],
    *,
    confidence: float = 0.95,
    runs: np.ndarray | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Rate:
    """Fit ``log value = b_0 + sum_j b_j log x_j`` by ordinary least squares, with confidence intervals.

    For the loss take ``{"k": k, "L": L, "eta": eta}`` or ``{"t": eta * L * k}`` (exponent near -1); for `cosd` take
    ``{"log t": np.log(t)}`` (near -2). Points of one run are not independent: name the runs to get intervals from
    resampling whole runs (percentile bootstrap); t intervals are too narrow then.

    Parameters
    ----------
    value : ndarray
        ``[n]``, positive.
    regressors : mapping
        Name to positive array ``[n]``; n at least two more than their number, none a product of powers of others.
    confidence : float
        In (0, 1).
    runs : ndarray, optional
        ``[n]``, run of each point, at least 2 different; None gives t intervals.
    draws : int
        Bootstrap samples, at least 1.
    seed : int
        Of the bootstrap, >= 0.

    Returns
    -------
    Rate
        Exponents with intervals.

    Raises
    ------
    ValueError
        If numbers are not positive, lengths differ, regressors are collinear or there are too few points or runs.

    Examples
    --------
    >>> k = np.arange(1.0, 50.0)
    >>> fit_rate(3 * k**-2.0, {"k": k}).exponents.round(6)
    array([-2.])
    """
    if not 0 < confidence < 1:
        raise ValueError(f"fit_rate: confidence = {confidence} must lie in (0, 1)")
    if not regressors:
        raise ValueError("fit_rate: regressors is empty, needs at least one")
    y = _design("fit_rate", {"value": value})[:, 1]
    lengths = {name: len(x) for name, x in regressors.items() if len(x) != len(y)}
    if lengths:
        raise ValueError(f"fit_rate: regressors have {lengths} entries, must have {len(y)} like value")
    x = _design("fit_rate", regressors)
    n, columns = x.shape
    if n < columns + 1:
        raise ValueError(f"fit_rate: {n} points are too few for {columns - 1} exponents, needs {columns + 1}")
    if np.linalg.matrix_rank(x) < columns:
        raise ValueError(
            f"fit_rate: {', '.join(regressors)} cannot be told apart: one is constant or a power of others"
        )
    b = np.linalg.lstsq(x, y)[0]
    dof = n - columns
    variance = float(np.square(y - x @ b).sum()) / dof
    if runs is None:
        spread = variance * np.linalg.inv(x.T @ x)
        half = stats.t.ppf((1 + confidence) / 2, dof) * np.sqrt(np.diag(spread))
        low, high = b - half, b + half
    else:
        spread, dof = _resampled(x, y, np.asarray(runs), draws, seed), 0
        tail = (1 - confidence) / 2
        low, high = np.quantile(spread, [tail, 1 - tail], axis=0)
    return Rate(
        tuple(regressors),
        b[1:],
        low[1:],
        high[1:],
        math.exp(b[0]),
        math.sqrt(variance),
        confidence,
        spread,
        dof,
    )


def _resampled(x: np.ndarray, y: np.ndarray, runs: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Refit on whole runs drawn with replacement, through the normal equations of each run."""
    names, member = np.unique(runs, return_inverse=True)
    if runs.shape != y.shape or len(names) < 2:
        raise ValueError(f"fit_rate: runs must name at least 2 runs, one name for each of {len(y)} points")
    if draws < 1:
        raise ValueError(f"fit_rate: draws = {draws} must be >= 1")
    grams = np.stack([x[member == r].T @ x[member == r] for r in range(len(names))])
    sides = np.stack([x[member == r].T @ y[member == r] for r in range(len(names))])
    picked = np.random.default_rng(seed).multinomial(
        len(names), np.full(len(names), 1 / len(names)), size=draws
    )
    gram = np.einsum("br,rij->bij", picked, grams)
    # A draw may miss every run that tells two regressors apart; the minimum-norm answer keeps it finite.
    return np.einsum("bij,bj->bi", np.linalg.pinv(gram, hermitian=True), picked @ sides)


def average_loss_bound(
    rounds: int, eta: float, local_steps: int, gamma: float, start_norm: float = 0.0
) -> float:
    """Bound the mean loss over the first r rounds, for any step size.

    ``26 (||w_0||^2 + 1 + log^2(K + eta K gamma^2 r) + eta^2 K^2) / (eta gamma^4 r)`` for logistic loss and rows of
    norm at most 1 (Crawshaw, Woodworth, Liu 2025, arXiv 2506.13974).

    Parameters
    ----------
    rounds, local_steps : int
        r and K, at least 1.
    eta, gamma : float
        Step size and margin of the union, > 0.
    start_norm : float
        ``||w_0||``.

    Returns
    -------
    float
        The bound.
    """
    growth = math.log(local_steps + eta * local_steps * gamma**2 * rounds) ** 2
    return 26 * (start_norm**2 + 1 + growth + (eta * local_steps) ** 2) / (eta * gamma**4 * rounds)


def stable_loss_bound(rounds: int, unstable: int, eta: float, local_steps: int, gamma: float) -> float:
    """Bound the loss after the unstable phase, ``16 / (eta gamma^2 K (r - tau))``.

    Parameters
    ----------
    rounds, unstable : int
        r and tau, ``r > tau >= 0`` (Crawshaw, Woodworth, Liu 2025, arXiv 2506.13974).
    eta, gamma : float
        Step size and margin, > 0.
    local_steps : int
        K.

    Returns
    -------
    float
        The bound.

    Raises
    ------
    ValueError
        If ``rounds <= unstable``.
    """
    if rounds <= unstable:
        raise ValueError(f"stable_loss_bound: rounds = {rounds} must be > unstable = {unstable}")
    return 16 / (eta * gamma**2 * local_steps * (rounds - unstable))


def stable_threshold(eta: float, local_steps: int, num_nodes: int, gamma: float) -> float:
    """Loss below which the stable phase is certain, ``gamma / (70 eta K M)`` (arXiv 2506.13974)."""
    return gamma / (70 * eta * local_steps * num_nodes)


def unstable_rounds(eta: float, local_steps: int, num_nodes: int, gamma: float) -> float:
    """Order of the length of the unstable phase, ``eta K M / gamma^3``, without constants and logarithms."""
    return eta * local_steps * num_nodes / gamma**3


@dataclass(frozen=True)
class LargeStep:
    """What a run with a large step did.

    Attributes
    ----------
    max_loss : float
        Largest loss, round 0 included.
    last_increase : int
        Last round whose loss is more than 1e-15 above that of the round before; 0 if there is none.
    first_stable : int | None
        First round with a loss below `stable_threshold`; None if never.
    product : float
        ``F_R eta K R gamma^2``, near 1 in the stable phase.
    """

    max_loss: float
    last_increase: int
    first_stable: int | None
    product: float


def large_step(losses: np.ndarray, eta: float, local_steps: int, num_nodes: int, gamma: float) -> LargeStep:
    """Summarise the losses of a run with a large step.

    Parameters
    ----------
    losses : ndarray
        ``[R + 1]``, F after 0, 1, ..., R rounds, R at least 1.
    eta, gamma : float
        Step size and margin, > 0.
    local_steps, num_nodes : int
        K and M.

    Returns
    -------
    LargeStep
        Maximum, last increase, first stable round and product.
    """
    losses = np.asarray(losses, dtype=np.float64)
    rises = np.flatnonzero(np.diff(losses) > 1e-15)
    below = np.flatnonzero(losses < stable_threshold(eta, local_steps, num_nodes, gamma))
    return LargeStep(
        max_loss=float(losses.max()),
        last_increase=int(rises[-1]) + 1 if len(rises) else 0,
        first_stable=int(below[0]) if len(below) else None,
        product=float(losses[-1]) * eta * local_steps * (len(losses) - 1) * gamma**2,
    )
