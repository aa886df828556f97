"""Hard-margin reference for linear classifiers with several classes, through the solver for two.

A matrix W ``[C, d]`` scores ``W x``; the hard-margin problem is ``min sum_c ||W_c||^2`` subject to
``(W_y - W_c) . x >= 1`` for every sample and every ``c != y``. There is no intercept.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedsim.analysis.max_margin import MaxMargin, Solver, max_margin, signed_rows


def lifted_rows(x: np.ndarray, y: np.ndarray, num_classes: int) -> np.ndarray:
    """Write a problem with C classes as signed rows: ``z . vec(W) = (W_y - W_c) . x`` for every ``c != y``.

    Parameters
    ----------
    x, y : ndarray
        ``[N, d]`` and ``[N]``, labels 0..C-1.
    num_classes : int
        C, at least 2.

    Returns
    -------
    ndarray
        ``[N (C - 1), C d]``, the C - 1 rows of one sample next to each other.

    Raises
    ------
    ValueError
        If a label is outside 0..C-1 or C is below 2.
    """
    rows = signed_rows(x)
    labels = np.asarray(y)
    if num_classes < 2:
        raise ValueError(f"lifted_rows: num_classes = {num_classes} must be >= 2")
    if labels.shape != rows.shape[:1] or not np.isin(labels, np.arange(num_classes)).all():
        raise ValueError(f"lifted_rows: y must hold {len(rows)} labels in 0..{num_classes - 1}")
    n, d = rows.shape
    rivals = np.array([[c for c in range(num_classes) if c != label] for label in labels])
    out = np.zeros((n, num_classes - 1, num_classes, d))
    sample, slot = np.indices(rivals.shape)
    out[sample, slot, rivals] = -rows[:, None, :]
    out[sample, slot, labels.astype(int)[:, None]] = rows[:, None, :]
    return out.reshape(n * (num_classes - 1), num_classes * d)


def multiclass_max_margin(
    x: np.ndarray, y: np.ndarray, num_classes: int, *, solver: Solver = "auto"
) -> MaxMargin:
    """Compute ``argmin sum_c ||W_c||^2`` subject to ``(W_y - W_c) . x >= 1`` for every sample and ``c != y``.

    It is the limit direction of gradient descent on cross-entropy from zero (Soudry et al. 2018, arXiv 1710.10345).

    Parameters
    ----------
    x, y : ndarray
        ``[N, d]`` and ``[N]``, labels 0..C-1.
    num_classes : int
        C, at least 2; the rows of W sum to zero.
    solver : {"auto", "ldp", "working_set", "dual"}
        As in `max_margin`.

    Returns
    -------
    MaxMargin
        Of the rows of `lifted_rows`; ``w_hat.reshape(C, d)`` is W.
    """
    answer = max_margin(lifted_rows(x, y, num_classes), solver=solver)
    if answer.status == "separable":
        return answer
    return replace(answer, reason=f"with {num_classes - 1} lifted rows a sample, {answer.reason}")


def pair_margins(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Measure the geometric margin of every ordered pair of classes, ``min_{j: y_j = a} (W_a - W_b) . x_j / ||W_a - W_b||``.

    Parameters
    ----------
    w : ndarray
        ``[C, d]``.
    x, y : ndarray
        ``[N, d]`` and ``[N]``, labels 0..C-1.

    Returns
    -------
    ndarray
        ``[C, C]``, entry (a, b) over samples of class a; NaN on the diagonal, for absent classes and equal rows of W.
    """
    classes = len(w)
    out = np.full((classes, classes), np.nan)
    scores = x @ w.T
    for a in range(classes):
        own = scores[y == a]
        for b in range(classes):
            distance = float(np.linalg.norm(w[a] - w[b]))
            if len(own) and distance > 0:
                out[a, b] = (own[:, a] - own[:, b]).min() / distance
    return out
