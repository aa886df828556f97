"""How rows are shared out among workers: from alike to as different as can be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fedsim.checks import at_least, positive
from fedsim.data.dataset import Dataset
from fedsim.data.shards import Shards
from fedsim.random import numpy_generator


class Partition(Protocol):
    """A rule that shares out the training rows."""

    def assign(self, dataset: Dataset, num_workers: int, seed: int) -> Shards:
        """Give each of ``num_workers`` workers at least one row, and (but for `Shared`) no row to two of them."""
        ...


@dataclass(frozen=True)
class IID:
    """Equal parts of a random permutation: sizes N // W or one more, every row used once."""

    def assign(self, dataset: Dataset, num_workers: int, seed: int) -> Shards:
        """Share out the rows, see `IID`."""
        n = check_workers(dataset, num_workers)
        worker = np.empty(n, dtype=np.int64)
        worker[numpy_generator(seed, "partition").permutation(n)] = _blocks(n, num_workers)
        return Shards.from_assignment(worker, num_workers)


@dataclass(frozen=True)
class Shared:
    """Every worker owns all rows, as in data-parallel Local SGD: workers differ by their minibatches alone."""

    def assign(self, dataset: Dataset, num_workers: int, seed: int) -> Shards:
        """Give all rows to each worker; the seed does not matter."""
        n = len(dataset.y)
        order = torch.arange(n).repeat(num_workers)
        return Shards(order, torch.arange(num_workers + 1) * n)


@dataclass(frozen=True)
class Contiguous:
    """Worker i gets the i-th block of consecutive rows: sizes N // W or one more, every row used once.

    The partition for text, whose neighbouring windows belong together.
    """

    def assign(self, dataset: Dataset, num_workers: int, seed: int) -> Shards:
        """Share out the rows, see `Contiguous`; the seed does not matter."""
        return Shards.from_assignment(_blocks(check_workers(dataset, num_workers), num_workers), num_workers)


@dataclass(frozen=True)
class Dirichlet:
    """Skewed labels: class k is cut in proportions ``p_k ~ Dirichlet_W(alpha, ..., alpha)``, every row used once.

    For balanced classes and many workers this is the mixture of Hsu et al., each worker's class mix drawn from
    ``Dirichlet_C(alpha)``, with sizes that follow a Gamma(C alpha) law. Workers that come out below ``min_size``
    are topped up with random rows of the largest workers.

    Parameters
    ----------
    alpha : float
        Concentration > 0: a class goes to one worker as alpha -> 0, all workers are alike for ``inf``.
    min_size : int
        Least rows of a worker, >= 1.

    Raises
    ------
    ValueError
        If an argument is not admissible.

    References
    ----------
    Yurochkin et al. 2019, arXiv 1905.12022; Hsu, Qi, Brown 2019, arXiv 1909.06335.
    """

    alpha: float = 0.3
    min_size: int = 1

    def __post_init__(self) -> None:
        positive(self, "alpha")
        at_least(self, 1, "min_size")

    def assign(self, dataset: Dataset, num_workers: int, seed: int) -> Shards:
        """Share out the rows, see `Dirichlet`."""
        n = check_workers(dataset, num_workers)
        y = _labels("Dirichlet", dataset)
        if self.min_size * num_workers > n:
            raise ValueError(
                f"Dirichlet: min_size = {self.min_size} for {num_workers:,} workers needs "
                f"{self.min_size * num_workers:,} rows, {dataset.name} has {n:,}: lower min_size or num-workers"
            )
        rng = numpy_generator(seed, "partition")
        shuffled = rng.permutation(n)
        by_class = shuffled[_stable_argsort(y[shuffled])]
        worker = np.empty(n, dtype=np.int64)
        start = 0
        for n_k in np.bincount(y):
            counts = _cut(int(n_k), _dirichlet(rng, self.alpha, num_workers))
            worker[by_class[start : start + n_k]] = np.repeat(np.arange(num_workers), counts)
            start += n_k
        # in shuffled order, so that the rows which the largest give away are random ones
        worker[shuffled] = _top_up(worker[shuffled], num_workers, self.min_size)
        return Shards.from_assignment(worker, num_workers)


@dataclass(frozen=True)
class Pathological:
    """A few classes a worker: each gets ``classes`` different ones, and a class is cut evenly among its holders.

    Classes are dealt from random permutations, so that all have the same number of holders (or one more). Every
    row is used once if ``num_workers * classes`` is at least the number of classes; classes that nobody holds are
    left out otherwise. Unlike shards of the sorted rows, no worker's share straddles two classes.

    Parameters
    ----------
    classes : int
        Classes c of a worker, >= 1 and at most those of the data set.

    Raises
    ------
    ValueError
        If ``classes`` is below 1.

    References
    ----------
    McMahan et al. 2017, arXiv 1602.05629 (there two shards of the sorted rows a worker).
    """

    classes: int = 2

    def __post_init__(self) -> None:
        at_least(self, 1, "classes")

    def assign(self, dataset: Dataset, num_workers: int, seed: int) -> Shards:
        """Share out the rows, see `Pathological`."""
        check_workers(dataset, num_workers)
        y = _labels("Pathological", dataset)
        present = np.unique(y)
        if self.classes > len(present):
            raise ValueError(
                f"Pathological: classes = {self.classes} is larger than the {len(present)} classes of {dataset.name}"
            )
        rng = numpy_generator(seed, "partition")
        # consecutive entries of a repeated permutation are different classes, and after C / gcd(c, C) workers
        # each class was dealt equally often: then a new permutation starts
        period = len(present) // math.gcd(self.classes, len(present))
        decks = -(-num_workers // period)
        permutations = rng.permuted(np.tile(present, (decks, 1)), axis=1)
        dealt = permutations[:, np.arange(period * self.classes) % len(present)]
        held = dealt.reshape(-1, self.classes)[:num_workers]
        return _share_classes("Pathological", dataset, y, held, rng)


@dataclass(frozen=True)
class ByLabel:
    """One class a worker: worker i holds class i mod C, cut evenly among the workers that share it.

    With fewer workers than classes, the classes from ``num_workers`` on are left out.
    """

    def assign(self, dataset: Dataset, num_workers: int, seed: int) -> Shards:
        """Share out the rows, see `ByLabel`; C is ``dataset.num_outputs``, 2 for a binary task."""
        check_workers(dataset, num_workers)
        y = _labels("ByLabel", dataset)
        num_classes = 2 if dataset.task == "binary" else dataset.num_outputs
        held = (np.arange(num_workers) % num_classes)[:, None]
        return _share_classes("ByLabel", dataset, y, held, numpy_generator(seed, "partition"))


@dataclass(frozen=True)
class ByQuantity:
    """Alike rows, unequal sizes: every worker gets one row, the other N - W are cut in proportions p.

    ``p ~ Dirichlet_W(alpha, ..., alpha)``, or ``p_i`` proportional to ``exp(sigma z_i)`` with ``z_i ~ N(0, 1)``
    (log-normal sizes). Every row is used once.

    Parameters
    ----------
    alpha : float | None
        Concentration > 0, or None for log-normal sizes.
    sigma : float | None
        Spread >= 0 of the log sizes, 0 for equal sizes, or None for Dirichlet sizes.

    Raises
    ------
    ValueError
        If not exactly one of the two is given, or it is not admissible.

    References
    ----------
    Li, Diao, Chen, He 2021, arXiv 2102.02079 (quantity skew).
    """

    alpha: float | None = None
    sigma: float | None = None

    def __post_init__(self) -> None:
        if (self.alpha is None) == (self.sigma is None):
            raise ValueError(
                f"ByQuantity: give alpha or sigma, not both or none (alpha = {self.alpha}, sigma = {self.sigma})"
            )
        if self.alpha is not None:
            positive(self, "alpha")
        elif self.sigma is not None and not 0 <= self.sigma < math.inf:
            raise ValueError(f"ByQuantity: sigma = {self.sigma} must be >= 0 and finite")

    def assign(self, dataset: Dataset, num_workers: int, seed: int) -> Shards:
        """Share out the rows, see `ByQuantity`."""
        n = check_workers(dataset, num_workers)
        rng = numpy_generator(seed, "partition")
        if self.alpha is not None:
            shares = _dirichlet(rng, self.alpha, num_workers)
        else:
            shares = _softmax((self.sigma or 0.0) * rng.standard_normal(num_workers))
        sizes = 1 + _cut(n - num_workers, shares)
        worker = np.empty(n, dtype=np.int64)
        worker[rng.permutation(n)] = np.repeat(np.arange(num_workers), sizes)
        return Shards.from_assignment(worker, num_workers)


@dataclass(frozen=True)
class Natural:
    """The workers the rows come from (``dataset.workers``), every row used once.

    With K natural workers, K >= W, the j-th in order of id goes to worker ``j W // K``: one each if K = W, else
    neighbouring ids are merged, K // W or one more of them.
    """

    def assign(self, dataset: Dataset, num_workers: int, seed: int) -> Shards:
        """Share out the rows, see `Natural`; the seed does not matter."""
        check_workers(dataset, num_workers)
        if dataset.workers is None:
            raise ValueError(
                f"Natural: {dataset.name} does not say which worker a row comes from: name the column that does with "
                "worker='...' in the source, or take another partition"
            )
        ids, natural = np.unique(dataset.workers.cpu().numpy(), return_inverse=True)
        if len(ids) < num_workers:
            raise ValueError(
                f"num-workers = {num_workers:,} is larger than the {len(ids):,} natural workers of {dataset.name}: "
                f"take num-workers <= {len(ids)}"
            )
        return Shards.from_assignment(natural * num_workers // len(ids), num_workers)


def check_workers(dataset: Dataset, num_workers: int) -> int:
    """Return the number N of training rows, after a check that there is a row for each worker.

    Parameters
    ----------
    dataset : Dataset
        What is shared out.
    num_workers : int
        Number of workers W.

    Returns
    -------
    int
        N.

    Raises
    ------
    ValueError
        If W is not in ``[1, N]``.
    """
    n = len(dataset.x)
    if num_workers < 1:
        raise ValueError(f"num-workers = {num_workers} must be >= 1")
    if num_workers > n:
        raise ValueError(
            f"num-workers = {num_workers} is larger than the {n:,} training rows of {dataset.name}: "
            "every worker needs a row, so lower num-workers or take a larger data set"
        )
    return n


def check_no_worker_empty(partition: str, shards: Shards, dataset: Dataset, change: str) -> Shards:
    """Return the shards, after a check that each worker has a row.

    Parameters
    ----------
    partition : str
        Name of the rule, for the message.
    shards : Shards
        What it made.
    dataset : Dataset
        What was shared out.
    change : str
        What to change if a worker is empty.

    Returns
    -------
    Shards
        The same shards.

    Raises
    ------
    ValueError
        If a worker is empty; the message names the first few.
    """
    empty = (shards.sizes == 0).nonzero()[:, 0].tolist()
    if empty:
        names = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
        raise ValueError(
            f"{partition}: {len(empty):,} of {shards.num_workers:,} workers have no row of {dataset.name} "
            f"(worker {names}): {change}"
        )
    return shards


def _labels(partition: str, dataset: Dataset) -> np.ndarray:
    """Labels ``[N]``, or an error if the rows have none."""
    if dataset.task not in {"classes", "binary"}:
        raise ValueError(
            f"{partition}: {dataset.name} has no classes (task = {dataset.task!r}): "
            "take IID, Contiguous, ByQuantity or Natural"
        )
    return dataset.y.cpu().numpy().astype(np.int64)


def _stable_argsort(y: np.ndarray) -> np.ndarray:
    """Stable order of small nonnegative integers: NumPy sorts 16-bit ones by radix."""
    return np.argsort(y.astype(np.uint16) if y.max() < 2**16 else y, kind="stable")


def _blocks(n: int, num_workers: int) -> np.ndarray:
    """``[n]`` not decreasing workers, each n // W times or one more."""
    return np.repeat(np.arange(num_workers), np.diff(np.arange(num_workers + 1) * n // num_workers))


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def _dirichlet(rng: np.random.Generator, alpha: float, size: int) -> np.ndarray:
    """Draw ``[size]`` proportions ~ Dirichlet(alpha, ..., alpha); equal ones for infinite alpha."""
    if math.isinf(alpha):
        return np.full(size, 1 / size)
    # Gamma(alpha) = Gamma(alpha + 1) U^(1 / alpha) in logarithms: small alpha would underflow to zeros only
    log_u = -rng.standard_exponential(size)
    return _softmax(np.log(rng.standard_gamma(alpha + 1, size)) + log_u / alpha)


def _cut(n: int, shares: np.ndarray) -> np.ndarray:
    """Sizes with sum n in the given proportions: the differences of the rounded running sums."""
    ends = np.rint(n * np.cumsum(shares)).astype(np.int64)
    ends[-1] = n
    return np.diff(np.minimum(ends, n), prepend=0)


def _top_up(worker: np.ndarray, num_workers: int, min_size: int) -> np.ndarray:
    """Move the last rows of the largest workers to those below ``min_size``; ``worker`` is the owner of each row."""
    # the largest are lowered to a common level: as if rows were moved one by one, always from the largest
    sizes = np.bincount(worker, minlength=num_workers)
    lack = np.maximum(min_size - sizes, 0)
    if not lack.any():
        return worker
    low, high = min_size, int(sizes.max())  # the highest level at which the largest give enough
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if np.maximum(sizes - level, 0).sum() >= lack.sum() else (low, level - 1)
    gives = np.maximum(sizes - low, 0)
    gives[gives.nonzero()[0][: gives.sum() - lack.sum()]] -= 1
    order = np.argsort(worker, kind="stable")
    rank = np.arange(len(worker)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    moved = order[rank >= np.repeat(sizes - gives, sizes)]
    worker = worker.copy()
    worker[moved] = np.repeat(np.arange(num_workers), lack)
    return worker


def _share_classes(
    partition: str, dataset: Dataset, y: np.ndarray, held: np.ndarray, rng: np.random.Generator
) -> Shards:
    """Cut each class evenly among its holders; ``held [W, c]`` are the different classes of each worker."""
    n, num_workers = len(y), len(held)
    slots = held.reshape(-1)
    num_classes = max(int(y.max()), int(slots.max())) + 1
    holders = np.bincount(slots, minlength=num_classes)
    rows = np.bincount(y, minlength=num_classes)
    slots_by_class = np.argsort(slots, kind="stable")
    first_slot = np.cumsum(holders) - holders
    shuffled = rng.permutation(n)
    by_class = shuffled[_stable_argsort(y[shuffled])]
    k = y[by_class]
    rank = np.arange(n) - (np.cumsum(rows) - rows)[k]
    used = holders[k] > 0
    k, rank = k[used], rank[used]
    slot = slots_by_class[first_slot[k] + rank * holders[k] // rows[k]]
    worker = np.full(n, -1, dtype=np.int64)
    worker[by_class[used]] = slot // held.shape[1]
    change = "a class has fewer rows than holders, so lower num-workers or take IID or Dirichlet"
    return check_no_worker_empty(partition, Shards.from_assignment(worker, num_workers), dataset, change)
