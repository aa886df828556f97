"""How two domains differ: features of only one of them (diversity shift), and labels that go with others (correlation shift).

For a discrete feature z, such as a colour, a cluster or a label, with densities p and q in the two domains,
``D_div = 1/2 sum over z with p(z) q(z) = 0 of |p(z) - q(z)|`` and
``D_cor = 1/2 sum over z with p(z) q(z) > 0 of sqrt(p(z) q(z)) sum_y |p(y | z) - q(y | z)|``. Both are in [0, 1].

Ye, Li, Bai, Yu, Hong, Zhou, Li, Zhu 2022, arXiv 2106.03721, estimate the densities of a network's features;
here they are counted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Shift(NamedTuple):
    """Diversity and correlation shift of two domains."""

    diversity: float
    correlation: float


def shift(p: np.ndarray, q: np.ndarray) -> Shift:
    """Measure the shift between two domains by their tables of features and labels.

    Parameters
    ----------
    p, q : ndarray
        ``[Z, Y]`` counts or probabilities of feature z together with label y, >= 0, with a positive sum.

    Returns
    -------
    Shift
        Both in [0, 1].

    Raises
    ------
    ValueError
        If the tables differ in shape, or one has negative entries or no positive one.

    Examples
    --------
    >>> found = shift(np.array([[90, 10], [10, 90]]), np.array([[10, 90], [90, 10]]))
    >>> found.diversity, round(found.correlation, 12)
    (0.0, 0.8)
    """
    if p.ndim != 2 or p.shape != q.shape:
        raise ValueError(f"shift: tables of shapes {p.shape} and {q.shape} must be two of the same [Z, Y]")
    if min(p.min(), q.min()) < 0 or not (p.sum() > 0 and q.sum() > 0):
        raise ValueError("shift: tables must be >= 0 with a positive sum")
    p, q = p / p.sum(), q / q.sum()
    of_p, of_q = p.sum(1), q.sum(1)
    both = (of_p > 0) & (of_q > 0)
    apart = np.abs(p[both] / of_p[both, None] - q[both] / of_q[both, None]).sum(1)
    return Shift(
        float(np.abs(of_p - of_q)[~both].sum() / 2),
        float((np.sqrt(of_p[both] * of_q[both]) * apart).sum() / 2),
    )


def between_workers(
    feature: np.ndarray, label: np.ndarray, worker: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Measure the shifts between all pairs of workers.

    Parameters
    ----------
    feature, label : ndarray
        ``[N]`` whole numbers >= 0.
    worker : ndarray
        ``[N]``, who owns each row, 0 to W - 1; each owns one.

    Returns
    -------
    tuple of ndarray and ndarray
        Diversity and correlation shifts, ``[W, W]``, symmetric, 0 on the diagonal.
    """
    shape = int(worker.max()) + 1, int(feature.max()) + 1, int(label.max()) + 1
    tables = np.zeros(shape)
    np.add.at(tables, (worker, feature, label), 1)
    found = np.array([[shift(p, q) for q in tables] for p in tables])
    return found[..., 0], found[..., 1]


def clusters(x: np.ndarray, number: int, seed: int = 0) -> np.ndarray:
    """Give each row a discrete feature: its cluster among those of all rows together (k-means of scikit-learn).

    Parameters
    ----------
    x : ndarray
        ``[N, *]``.
    number : int
        Clusters; with few rows a cluster, a feature may be absent at a worker by chance.
    seed : int
        Of the start.

    Returns
    -------
    ndarray
        ``[N]``, 0 to ``number - 1``.
    """
    from sklearn.cluster import KMeans

    flat = np.asarray(x, dtype=np.float64).reshape(len(x), -1)
    return KMeans(number, n_init="auto", random_state=seed).fit_predict(flat)
