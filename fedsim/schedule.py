"""Who takes part in a round, with how many steps, and when: workers at different speeds."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
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
    chosen.sort()
    return torch.from_numpy(chosen)


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


@lru_cache(maxsize=8)
def _durations(durations: tuple[float, ...], sigma: float, num_workers: int, seed: int) -> Tensor:
    """See `Schedule.durations_of`; callers must not change the result."""
    given = torch.tensor(durations, dtype=torch.float64)
    own = given[torch.arange(num_workers) % len(given)]
    if sigma == 0:
        return own
    noise = numpy_generator(seed, "speeds").standard_normal(num_workers)
    return own * torch.from_numpy(noise).mul(sigma).exp()


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
        return _durations(self.durations, self.sigma, num_workers, seed)

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
class PostLocal(_Speeds):
    """`Synchronous`, but with ``first`` local steps in each of the first ``until`` rounds, then with ``local-steps``.

    With ``first = 1`` this is post-local SGD: a sync after every step, as long as the model changes fast. It also lets the
    fragments of ``StreamingDiLoCo(delay=d)`` be due at multiples of ``local-steps``: ``PostLocal(until=1, first=local-steps - d)``.

    Parameters
    ----------
    until : int
        Rounds, >= 0.
    first : int
        Local steps of each of them, >= 1.
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
    Lin, Stich, Patel, Jaggi (2020), Don't use large mini-batches, use local SGD, arXiv:1808.07217.
    """

    until: int = field(default=1, kw_only=True)
    first: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.nonnegative(self, "until")
        checks.at_least(self, 1, "first")

    def steps(self, experiment: Experiment, round: int) -> Tensor | None:
        """Return the first steps in the first rounds."""
        return torch.full((experiment.num_workers,), self.first) if round <= self.until else None


@dataclass(frozen=True)
class DynamicSteps(_Speeds):
    """Slow workers make fewer local steps, so that all come at nearly the same time: dynamic local updates (DyLU).

    ``H_i = max(1, floor(H d_min / d_i))`` with ``H`` the experiment's ``local-steps`` and the durations ``d_i`` of a step, for every round.
    The floor of one step is ours.

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
    Liu et al. (2024), Asynchronous Local-SGD training for language modeling, arXiv:2401.09135.

    Examples
    --------
    >>> dynamic_steps(torch.tensor([0.58, 0.75, 1.51, 3.33]), 20).tolist()
    [20, 15, 7, 3]
    """

    def steps(self, experiment: Experiment, round: int) -> Tensor | None:
        """Return the steps that each worker makes in the time in which the fastest makes ``local-steps``."""
        e = experiment
        return dynamic_steps(self.durations_of(e.num_workers, e.seed), e.local_steps)


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
    come once. A round is ``arrivals`` of them. The history tells their ``staleness``, the arrivals of others since a worker
    was sent off, and as ``arrivals`` how often the rarest and the most frequent worker has come so far. In a Flower
    deployment the order is that in which replies come, and their node gets new work at once.
    For strategies that take workers one at a time: ``ElasticAveraging``, ``Downpour``, ``AsyncDiLoCo``.

    With ``grace``, for ``AsyncDiLoCo``: the first arrival opens a window; a worker that has come waits, until the next one would come more than
    ``grace`` later or nobody is on the way. Then all who wait are sent off together, from the time of the last
    arrival. At time 0 all are sent off, and nobody comes. In a deployment nobody waits.

    Parameters
    ----------
    durations : tuple of float
        What a local step takes, in units of ``Network(step)``, all > 0; repeated over the workers.
    sigma : float
        Spread of the workers' speeds, >= 0 (see `Synchronous`).
    arrivals : int
        Arrivals in a round, >= 0; 0 for the number of workers.
    grace : float or None
        How long a window stays open, in units of ``Network(step)``, >= 0, ``inf`` to wait for all; None to send workers
        off at once.
    dynamic : bool
        Slow workers make fewer local steps, as in `DynamicSteps`.

    Raises
    ------
    ValueError
        If a value is outside its range.
    """

    arrivals: int = 0
    grace: float | None = None
    dynamic: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.nonnegative(self, "arrivals")
        if self.grace is not None:
            checks.nonnegative(self, "grace")

    def steps(self, experiment: Experiment, round: int) -> Tensor | None:
        """Leave the steps to the experiment, unless they are ``dynamic``."""
        if not self.dynamic:
            return None
        own = self.durations_of(experiment.num_workers, experiment.seed)
        return dynamic_steps(own, experiment.local_steps)


def dynamic_steps(durations: Tensor, most: int) -> Tensor:
    """Return ``max(1, floor(most min(durations) / durations))``, ``[W] -> [W]`` int64."""
    # A third of three steps is one step, however its quotient is rounded.
    exact = most * durations.min() / durations + 1e-9 * most
    return exact.floor().clamp(min=1).to(torch.int64)


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
