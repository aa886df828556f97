"""Small linear problems with a known answer: separable, barely separable, non-separable, and regression.

The functions return one pair ``(X_i, y_i)`` a node in float64, labels in {-1, 1}; each draws from
``numpy.random.default_rng(seed)`` in a fixed order, so that fingerprints of the data hold. The classes are the same
problems as sources of an experiment: labels in {0, 1}, the node of each row in ``workers``, float64 kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from fedsim.data.dataset import Dataset
from fedsim.random import numpy_generator

Nodes = list[tuple[np.ndarray, np.ndarray]]


def _need_size(where: str, name: str, value: int, least: int = 1) -> None:
    if value < least:
        raise ValueError(f"{where}: {name} = {value} must be >= {least}")


def _need_positive(where: str, name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{where}: {name} = {value} must be > 0 and finite")


def _need_margin_arguments(where: str, kind: str, rows: int, features: int, sep: float, noise: float) -> None:
    if kind not in ("skew", "mix"):
        raise ValueError(f"{where}: kind = {kind!r} must be 'skew' or 'mix'")
    _need_size(where, "rows", rows)
    _need_size(where, "features", features)
    _need_positive(where, "sep", sep)
    if not 0 <= noise < math.inf:
        raise ValueError(f"{where}: noise = {noise} must be >= 0 and finite")


def _unit(rng: np.random.Generator, d: int) -> np.ndarray:
    w = rng.standard_normal(d)
    return w / np.linalg.norm(w)


def _separable_node(
    rng: np.random.Generator,
    w: np.ndarray,
    centre: np.ndarray,
    fixed: float | None,
    rows: int,
    sep: float,
    noise: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one node; ``fixed`` is the class of all its rows, or None for a fair coin."""
    x, y = np.empty((rows, len(w))), np.empty(rows)
    for j in range(rows):
        y[j] = fixed if fixed is not None else (1.0 if rng.random() < 0.5 else -1.0)
        row = centre + noise * rng.standard_normal(len(w))
        s = sep + 0.5 * abs(rng.standard_normal())
        x[j] = row - (row @ w) * w + y[j] * s * w
    return x, y


def _class_of(kind: str, node: int) -> float | None:
    return (1.0 if node % 2 == 0 else -1.0) if kind == "skew" else None


def _separable(
    kind: str, num_nodes: int, rows: int, features: int, sep: float, noise: float, seed: int
) -> tuple[np.ndarray, list[np.ndarray], Nodes]:
    rng = np.random.default_rng(seed)
    w = _unit(rng, features)
    centres, nodes = [], []
    for i in range(num_nodes):
        centres.append(0.5 * rng.standard_normal(features))
        nodes.append(_separable_node(rng, w, centres[i], _class_of(kind, i), rows, sep, noise))
    return w, centres, nodes


def margin_federation(
    kind: str, num_nodes: int, rows: int, features: int, sep: float = 1.0, noise: float = 1.0, seed: int = 0
) -> Nodes:
    """Draw separable data with a mean and labels of its own on each node; the margin of the union is >= ``sep``.

    ``x = v - (v . w*) w* + y s w*`` with ``v = c_i + noise e``, ``c_i ~ N(0, I / 4)``, ``s = sep + |N(0, 1)| / 2``.

    Parameters
    ----------
    kind : {"skew", "mix"}
        ``skew``: one class a node, in turn; ``mix``: labels from a fair coin, node means apart.
    num_nodes, rows, features : int
        M nodes with ``rows`` samples of d features; each at least 1.
    sep : float
        Least distance to the plane of the unit vector ``w*``, > 0.
    noise : float
        Standard deviation of a feature within a node, >= 0.
    seed : int
        Of the generator, >= 0.

    Returns
    -------
    list of (ndarray, ndarray)
        M pairs ``[rows, features]``, ``[rows]``.

    Examples
    --------
    >>> nodes = margin_federation("skew", num_nodes=4, rows=10, features=20, seed=0)
    >>> round(float(sum(x.sum() for x, _ in nodes)), 6)
    -18.126915
    """
    _need_size("margin_federation", "num_nodes", num_nodes)
    _need_margin_arguments("margin_federation", kind, rows, features, sep, noise)
    return _separable(kind, num_nodes, rows, features, sep, noise, seed)[2]


def toy(margin: float = 0.1) -> Nodes:
    """Place one point on each of two nodes, ``(g, r)`` and ``(g, -r/2)``, ``r = sqrt(1 - g^2)``.

    The hard-margin vector is ``(1/g, 0)`` and the margin is g, with multipliers in proportion 1 : 2: each node alone
    points almost at right angles to the answer (weak support).

    Parameters
    ----------
    margin : float
        g, in (0, 1).

    Returns
    -------
    list of (ndarray, ndarray)
        Two pairs ``[1, 2]``, ``[1]``.

    Raises
    ------
    ValueError
        If ``margin`` is outside (0, 1).
    """
    if not 0 < margin < 1:
        raise ValueError(f"toy: margin = {margin} must lie in (0, 1)")
    r = math.sqrt(1 - margin**2)
    return [(np.array([[margin, r]]), np.ones(1)), (np.array([[margin, -r / 2]]), np.ones(1))]


def _noisy_plane(rng: np.random.Generator) -> Nodes:
    e = np.eye(5)
    means = np.stack([e[0], e[1], -e[0] + 0.5 * e[2], -e[1] + 0.5 * e[3]])
    x = rng.standard_normal((4, 50, 5)) + means[:, None, :]
    y = np.sign(x @ np.array([1.0, -1.0, 0.5, 0.0, 0.2]) + 1.5 * rng.standard_normal((4, 50)))
    return list(zip(x, y, strict=True))


def non_separable(seed: int = 0) -> Nodes:
    """Draw 50 noisy rows of 5 features on each of 4 nodes; the logistic loss has a unique finite minimiser."""
    return _noisy_plane(np.random.default_rng(seed))


def mixed(seed: int = 2) -> Nodes:
    """Draw signed rows of which 60 are non-separable (features 0-2 only) and 30 separable, on 3 nodes, 8 features."""
    rng = np.random.default_rng(seed)
    flat = np.hstack([rng.standard_normal((60, 3)), np.zeros((60, 5))])
    split = rng.standard_normal((30, 8))
    split[:, 3] = np.abs(split[:, 3]) + 0.5
    return [
        (np.vstack([flat[20 * i : 20 * i + 20], split[10 * i : 10 * i + 10]]), np.ones(30)) for i in range(3)
    ]


def near_degenerate(sep: float, num_nodes: int = 1, seed: int = 5) -> Nodes:
    """Draw 60 signed rows of 6 features whose margin is about ``1.14 sep``, in runs of equal length on the nodes.

    Parameters
    ----------
    sep : float
        Least distance to the plane, > 0.
    num_nodes : int
        1 to 60.
    seed : int
        Of the generator, >= 0.

    Returns
    -------
    list of (ndarray, ndarray)
        Pairs ``[n_i, 6]``, ``[n_i]``.

    Raises
    ------
    ValueError
        If ``sep`` is not positive or there are more nodes than rows.
    """
    _need_positive("near_degenerate", "sep", sep)
    if not 1 <= num_nodes <= 60:
        raise ValueError(f"near_degenerate: num_nodes = {num_nodes} must lie in 1..60, the number of rows")
    rng = np.random.default_rng(seed)
    w = _unit(rng, 6)
    x = rng.standard_normal((60, 6))
    x = x - np.outer(x @ w, w)
    z = x + np.outer(sep * np.abs(rng.standard_normal(60)) + sep, w)
    return [(part, np.ones(len(part))) for part in np.array_split(z, num_nodes)]


def linear_regression(num_nodes: int = 5, rows: int = 8, features: int = 60, seed: int = 0) -> Nodes:
    """Draw ``y_i = X_i v_i`` with a truth ``v_i`` of its own on each node; all nodes can be fitted at once.

    Parameters
    ----------
    num_nodes, rows, features : int
        M, n and d with ``M n <= d``.
    seed : int
        Of the generator, >= 0.

    Returns
    -------
    list of (ndarray, ndarray)
        M pairs ``[rows, features]``, ``[rows]``.

    Raises
    ------
    ValueError
        If a size is below 1 or there are more rows than features.
    """
    _need_size("linear_regression", "num_nodes", num_nodes)
    _need_size("linear_regression", "rows", rows)
    if num_nodes * rows > features:
        raise ValueError(
            f"linear_regression: features = {features} must be >= {num_nodes * rows}, the number of rows"
        )
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_nodes, rows, features))
    return [(part, part @ rng.standard_normal(features)) for part in x]


def _dataset(name: str, nodes: Nodes, test: Nodes, task: str = "binary") -> Dataset:
    """Join the nodes; ``test`` may be empty. A single class of signed rows becomes two: odd rows change sides."""

    def target(parts: Nodes) -> torch.Tensor:
        y = np.concatenate([np.empty(0), *(y for _, y in parts)])
        return torch.from_numpy(y if task == "regression" else (y > 0).astype(np.int64))

    features = nodes[0][0].shape[1]
    x, y = torch.from_numpy(np.concatenate([x for x, _ in nodes])), target(nodes)
    if task == "binary" and bool((y == 1).all()):
        x[1::2], y[1::2] = -x[1::2], 0
    return Dataset(
        x=x,
        y=y,
        test_x=torch.from_numpy(np.concatenate([np.empty((0, features)), *(x for x, _ in test)])),
        test_y=target(test),
        num_outputs=1,
        task=task,
        name=name,
        workers=torch.from_numpy(np.repeat(np.arange(len(nodes)), [len(y) for _, y in nodes])),
        labels=() if task == "regression" else ("-1", "+1"),
    )


def _need_workers(where: str, num_workers: int, nodes: int) -> None:
    if num_workers > nodes:
        raise ValueError(
            f"{where}: num_workers = {num_workers} must be <= {nodes}, the nodes of this problem"
        )


@dataclass(frozen=True)
class Separable:
    """Separable rows of `margin_federation`, one node a worker; the test set is as large and from the same nodes.

    With ``features`` above the number of all rows the model is overparameterised and any labels are separable. Of few
    rows in many dimensions most are support vectors, and those with small multipliers are found last.

    Parameters
    ----------
    kind : {"skew", "mix"}
        One class a worker in turn, or mixed labels.
    rows_per_worker, features : int
        At least 1.
    sep : float
        Lower bound of the margin, > 0.
    noise : float
        Standard deviation within a worker, >= 0.
    nodes : int
        Nodes of the problem, which `Natural` shares out among fewer workers; 0 for one a worker. With
        ``num-workers = 1`` the run is the centralised baseline on the same rows.

    Raises
    ------
    ValueError
        If an argument is not admissible.
    """

    kind: str = "skew"
    rows_per_worker: int = 10
    features: int = 20
    sep: float = 1.0
    noise: float = 1.0
    nodes: int = 0

    def __post_init__(self) -> None:
        _need_margin_arguments(
            "Separable", self.kind, self.rows_per_worker, self.features, self.sep, self.noise
        )
        _need_size("Separable", "nodes", self.nodes, 0)

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Draw the rows of all nodes with ``numpy.random.default_rng(seed)``."""
        _need_size("Separable", "num_workers", num_workers)
        rows, sep, noise, count = self.rows_per_worker, self.sep, self.noise, self.nodes or num_workers
        _need_workers("Separable", num_workers, count)
        w, centres, nodes = _separable(self.kind, count, rows, self.features, sep, noise, seed)
        rng = numpy_generator(seed, "margin test")
        test = [
            _separable_node(rng, w, centre, _class_of(self.kind, i), rows, sep, noise)
            for i, centre in enumerate(centres)
        ]
        return _dataset("separable", nodes, test)


@dataclass(frozen=True)
class Toy:
    """Two workers with one point each, `toy`, of different classes; there is no test set.

    Each point alone points almost at right angles to the answer: both are weak support vectors.

    Parameters
    ----------
    margin : float
        Margin of the union, in (0, 1).

    Raises
    ------
    ValueError
        If ``margin`` is outside (0, 1).
    """

    margin: float = 0.1

    def __post_init__(self) -> None:
        toy(self.margin)

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Place the two points; nothing is drawn."""
        _need_workers("Toy", num_workers, 2)
        return _dataset("toy", toy(self.margin), [])


@dataclass(frozen=True)
class NonSeparable:
    """Four workers with 50 noisy rows each, `non_separable`; the test set is as large and from the same law."""

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Draw the rows with ``numpy.random.default_rng(seed)``."""
        _need_workers("NonSeparable", num_workers, 4)
        return _dataset(
            "non-separable", non_separable(seed), _noisy_plane(numpy_generator(seed, "margin test"))
        )


@dataclass(frozen=True)
class Mixed:
    """Three workers with a separable and a non-separable part, `mixed`; there is no test set."""

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Draw the rows with ``numpy.random.default_rng(seed)``."""
        _need_workers("Mixed", num_workers, 3)
        return _dataset("mixed", mixed(seed), [])


@dataclass(frozen=True)
class NearDegenerate:
    """Sixty rows with a margin near ``1.14 sep``, `near_degenerate`, in equal runs; there is no test set.

    Parameters
    ----------
    sep : float
        Least distance to the plane, > 0.

    Raises
    ------
    ValueError
        If ``sep`` is not positive.
    """

    sep: float = 1e-3

    def __post_init__(self) -> None:
        _need_positive("NearDegenerate", "sep", self.sep)

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Draw the rows with ``numpy.random.default_rng(seed)``."""
        return _dataset("near-degenerate", near_degenerate(self.sep, num_workers, seed), [])


@dataclass(frozen=True)
class LinearRegression:
    """Jointly interpolable least squares with a truth of its own on each worker; there is no test set.

    Parameters
    ----------
    rows_per_worker, features : int
        At least 1; ``nodes * rows_per_worker <= features``.
    nodes : int
        Nodes of the problem, as in `Separable`; 0 for one a worker.

    Raises
    ------
    ValueError
        If a size is below 1.
    """

    rows_per_worker: int = 8
    features: int = 60
    nodes: int = 0

    def __post_init__(self) -> None:
        _need_size("LinearRegression", "rows_per_worker", self.rows_per_worker)
        _need_size("LinearRegression", "features", self.features)
        _need_size("LinearRegression", "nodes", self.nodes, 0)

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Draw the rows with ``numpy.random.default_rng(seed)``."""
        count = self.nodes or num_workers
        _need_workers("LinearRegression", num_workers, count)
        nodes = linear_regression(count, self.rows_per_worker, self.features, seed)
        return _dataset("linear-regression", nodes, [], "regression")
