"""Who takes part in a round, with how many steps, and when: workers at different speeds."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fedsim import checks
from fedsim.random import numpy_generator

if TYPE_CHECKING:
    from fedsim.experiment import Experiment


def participants(experiment: Experiment, round: int) -> Tensor:
    """Draw the workers of a round, uniformly without replacement, ascending.

    Parameters
    ----------
    experiment : Experiment
        Number of workers, share that takes part, and seed.
    round : int
        Round, from 1.

    Returns
    -------
    Tensor
        ``[m]`` worker ids, int64.
    """
    e = experiment
    if e.num_participants == e.num_workers:
        return torch.arange(e.num_workers)
    draw = numpy_generator(e.seed, "participants", round)
    chosen = draw.choice(e.num_workers, e.num_participants, replace=False, shuffle=False)
    return torch.from_numpy(chosen).sort().values


class Schedule(Protocol):
    """When workers meet: frozen dataclasses with these verbs. Times are in units of ``Network(step)``."""

    def durations_of(self, num_workers: int, seed: int) -> Tensor:
        """Return what a local step of each worker takes, ``[W]`` float64."""
        ...

    def steps(self, experiment: Experiment, round: int) -> Tensor | None:
        """Return the local steps of all workers in a round, ``[W]`` int64; None for those of the experiment."""
        ...

    def work(self, experiment: Experiment, round: int, worker: Tensor, steps: Tensor) -> float:
        """Return how long the workers of a round compute until the sync can begin."""
        ...


@dataclass(frozen=True)
class _Speeds:
    """Workers at different speeds: ``d_i = durations[i mod n] exp(sigma z_i)`` with ``z_i ~ N(0, 1)`` drawn once a run."""

    durations: tuple[float, ...] = (1.0,)
    sigma: float = 0.0

    def __post_init__(self) -> None:
        if not self.durations or not min(self.durations) > 0:
            raise ValueError(f"{type(self).__name__}: durations = {self.durations} must be numbers > 0")
        checks.nonnegative(self, "sigma")

    def durations_of(self, num_workers: int, seed: int) -> Tensor:
        """Return what a local step of each worker takes, ``[W]`` float64."""
        given = torch.tensor(self.durations, dtype=torch.float64)
        own = given[torch.arange(num_workers) % len(given)]
        if self.sigma == 0:
            return own
        noise = numpy_generator(seed, "speeds").standard_normal(num_workers)
        return own * torch.from_numpy(noise).mul(self.sigma).exp()

    def steps(self, experiment: Experiment, round: int) -> Tensor | None:
        """Leave the steps to the experiment."""
        return None

    def work(self, experiment: Experiment, round: int, worker: Tensor, steps: Tensor) -> float:
        """Return the time of the slowest worker."""
        if not len(worker):
            return 0.0
        own = self.durations_of(experiment.num_workers, experiment.seed)
        return float((own[worker] * steps).max())


@dataclass(frozen=True)
class Synchronous(_Speeds):
    """Every worker makes the experiment's local steps, and the sync waits for the slowest.

    Parameters
    ----------
    durations : tuple of float
        What a local step takes, in units of ``Network(step)``, all > 0; repeated over the workers.
    sigma : float
        Spread of the workers' speeds, >= 0: durations are multiplied by ``exp(sigma z)``, ``z`` normal, drawn once a run.

    Raises
    ------
    ValueError
        If a value is outside its range.
    """


@dataclass(frozen=True)
class TotalSteps(_Speeds):
    """A sync takes place after ``W local-steps`` steps in total: fast workers make more of them, slow ones fewer.

    At the start of a round every worker asks for a step, and again whenever it has finished one; the first ``W local-steps``
    requests are granted (at equal times those of lower ids), and the sync waits for the steps in flight. So a
    round has exactly ``W local-steps`` steps and lasts until the slowest step in flight ends. With equal durations
    it is `Synchronous`.

    Parameters
    ----------
    durations : tuple of float
        What a local step takes, in units of ``Network(step)``, all > 0; repeated over the workers.
    sigma : float
        Spread of the workers' speeds, >= 0 (see `Synchronous`).

    Raises
    ------
    ValueError
        If a value is outside its range.

    References
    ----------
    Teng et al. (2019), arXiv:1905.10395, for leader SGD.

    Examples
    --------
    >>> grants((1.0, 1.0, 2.0, 4.0), 16)
    ((6, 5, 3, 2), 8.0)
    """

    def steps(self, experiment: Experiment, round: int) -> Tensor | None:
        """Return the granted steps."""
        return torch.tensor(self._grants(experiment)[0])

    def work(self, experiment: Experiment, round: int, worker: Tensor, steps: Tensor) -> float:
        """Return when the last granted step ends."""
        return self._grants(experiment)[1]

    def _grants(self, experiment: Experiment) -> tuple[tuple[int, ...], float]:
        e = experiment
        own = tuple(self.durations_of(e.num_workers, e.seed).tolist())
        return grants(own, e.num_workers * e.local_steps)


@dataclass(frozen=True)
class FreeRunning(_Speeds):
    """No barrier: each worker comes alone, whenever it has made its local steps, and goes on at once.

    The server handles one worker after the other, in the order of the simulated clock (at equal times that of
    ids): it takes in the worker's row as it came, and the worker goes on from what the server sends back. At time 0 all
    come once. A round is ``arrivals`` of them. In a Flower deployment the order is that in which replies come.
    For strategies that take workers one at a time: ``ElasticAveraging``, ``Downpour``.

    Parameters
    ----------
    durations : tuple of float
        What a local step takes, in units of ``Network(step)``, all > 0; repeated over the workers.
    sigma : float
        Spread of the workers' speeds, >= 0 (see `Synchronous`).
    arrivals : int
        Arrivals in a round, >= 0; 0 for the number of workers.

    Raises
    ------
    ValueError
        If a value is outside its range.
    """

    arrivals: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.nonnegative(self, "arrivals")


@lru_cache(maxsize=64)
def grants(durations: tuple[float, ...], total: int) -> tuple[tuple[int, ...], float]:
    """Grant ``total`` steps, in the order in which workers ask for them.

    Parameters
    ----------
    durations : tuple of float
        Of a step of each worker.
    total : int
        Steps to grant.

    Returns
    -------
    tuple of tuple and float
        Steps of each worker, and when the last one ends.
    """
    steps = [0] * len(durations)
    asking = [(0.0, i) for i in range(len(durations))]
    for _ in range(total):
        _, i = asking[0]
        steps[i] += 1
        heapq.heapreplace(asking, (steps[i] * durations[i], i))
    return tuple(steps), max(s * d for s, d in zip(steps, durations, strict=True))
