"""Carriers: how a round's work reaches the workers. In this process, or as messages over a Flower grid."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from fedsim import tree
from fedsim.cohort import Cohort, Evaluated, Trained, Upload
from fedsim.experiment import Experiment
from fedsim.federation import Federation
from fedsim.tree import Stack, Tree
from strategies import Broadcast


class Answers(NamedTuple):
    """What came back from the nodes of a round, in the order of their workers.

    Attributes
    ----------
    trained : list of Trained
        One a node that answered.
    failures : dict of str to str
        Nodes that did not, by name, and why.
    before : Stack or None
        Rows at the start of the round, where they are at hand.
    lost : list of int
        Workers that had lost their rows and began again.
    """

    trained: list[Trained]
    failures: dict[str, str]
    before: Stack | None
    lost: tuple[int, ...] = ()


class Fetched(NamedTuple):
    """Kept rows that were asked for.

    Attributes
    ----------
    worker : Tensor
        Ids of the workers whose rows came, ascending.
    rows : Stack
        Their rows; nothing if none came.
    failures : dict of str to str
        Nodes that did not answer, by name, and why.
    """

    worker: Tensor
    rows: Stack
    failures: dict[str, str]


class Arrival(NamedTuple):
    """A worker that came on its own: its id, what it brings, or the node's name and why it failed, and whether its row was lost."""

    worker: int
    trained: Trained | None
    failure: tuple[str, str] | None = None
    lost: bool = False


class Carrier(Protocol):
    """Where workers live; ``knows_data`` says whether they train on the federation's rows or on rows of their own."""

    num_nodes: int
    knows_data: bool

    @property
    def plan(self) -> str:
        """Name of the engine's plan."""
        ...

    def use_plan(self, name: str) -> None:
        """Use the plan that an earlier part of the run chose."""
        ...

    def train(self, round: int, workers: Tensor, broadcast: Broadcast, upload: Upload) -> Answers:
        """Let the participants of a round make their local steps."""
        ...

    def fetch(self, workers: Tensor) -> Fetched:
        """Ask for the rows of some workers, ascending."""
        ...

    def adopt(self, broadcast: Broadcast, workers: Tensor | None = None) -> None:
        """Hand the broadcast to all workers, or to some."""
        ...

    def evaluate(self, model: Tree) -> tuple[list[Evaluated], dict[str, str]]:
        """Evaluate a model on every worker's held-out rows; also name the nodes that did not, and why."""
        ...

    def checkpoint(self) -> Tree:
        """Return what workers keep between rounds, for a checkpoint."""
        ...

    def restore(self, saved: Tree) -> None:
        """Put back what `checkpoint` returned."""
        ...


@runtime_checkable
class LiveCarrier(Carrier, Protocol):
    """Where workers come back whenever they are ready, not by the simulated clock."""

    def begin(self, worker: int, period: int, broadcast: Broadcast) -> None:
        """Send one worker off to make its local steps for the given time, counted from 1."""
        ...

    def arrive(self) -> Arrival:
        """Wait for the next worker."""
        ...

    @property
    def away(self) -> bool:
        """Whether there is a worker to wait for."""
        ...


def ranges(num_workers: int, num_nodes: int) -> list[tuple[int, int]]:
    """Spread workers over nodes in contiguous ranges whose sizes differ by at most one.

    Parameters
    ----------
    num_workers, num_nodes : int
        Both >= 1.

    Returns
    -------
    list of tuple of int
        First worker, and one behind the last, of each node.

    Examples
    --------
    >>> ranges(10, 3)
    [(0, 4), (4, 7), (7, 10)]
    """
    ends = np.cumsum([len(part) for part in np.array_split(np.arange(num_workers), num_nodes)]).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


class InProcess:
    """All workers in this process, without messages.

    Parameters
    ----------
    experiment : Experiment
        The run; its ``nodes`` say over how many cohorts the workers are spread.
    federation : Federation
        Data and model.
    """

    knows_data = True

    def __init__(self, experiment: Experiment, federation: Federation) -> None:
        spread = ranges(experiment.num_workers, experiment.nodes)
        self.cohorts = [Cohort(experiment, federation, first, last) for first, last in spread]
        self.num_nodes = len(self.cohorts)

    @property
    def plan(self) -> str:
        """Plan of the first cohort."""
        return self.cohorts[0].plan_name

    def use_plan(self, name: str) -> None:
        """Use one plan in all cohorts."""
        for cohort in self.cohorts:
            cohort.use_plan(name)

    def train(self, round: int, workers: Tensor, broadcast: Broadcast, upload: Upload) -> Answers:
        """Train cohort after cohort."""
        trained, before = [], []
        for cohort in self.cohorts:
            mine = self._mine(cohort, workers) if self.num_nodes > 1 else workers
            if len(mine):
                trained.append(cohort.train(round, mine, broadcast, upload))
                before.append(trained[-1].before)
        known = [b for b in before if b is not None]
        return Answers(trained, {}, tree.concat(known) if len(known) == len(before) else None)

    def fetch(self, workers: Tensor) -> Fetched:
        """Take the rows."""
        parts = [cohort.fetch(self._mine(cohort, workers)) for cohort in self.cohorts]
        return Fetched(workers, tree.concat(parts), {})

    def adopt(self, broadcast: Broadcast, workers: Tensor | None = None) -> None:
        """Move the kept rows."""
        for cohort in self.cohorts:
            mine = None if workers is None else self._mine(cohort, workers)
            if mine is None or len(mine):
                cohort.adopt(broadcast, mine)

    def _mine(self, cohort: Cohort, workers: Tensor) -> Tensor:
        return workers[(workers >= cohort.first) & (workers < cohort.last)]

    def evaluate(self, model: Tree) -> tuple[list[Evaluated], dict[str, str]]:
        """Evaluate cohort after cohort."""
        return [cohort.evaluate(model) for cohort in self.cohorts], {}

    def checkpoint(self) -> Tree:
        """Collect rows and states of all cohorts."""
        saved: Tree = {}
        for cohort in self.cohorts:
            saved |= {f"{cohort.first}/{k}": x for k, x in cohort.checkpoint().items()}
        return saved

    def restore(self, saved: Tree) -> None:
        """Give rows and states back to the cohorts."""
        for cohort in self.cohorts:
            name = f"{cohort.first}/"
            cohort.restore({k.removeprefix(name): x for k, x in saved.items() if k.startswith(name)})


def join_evaluations(parts: list[Evaluated]) -> Evaluated:
    """Join the nodes' evaluations."""
    return Evaluated(*(torch.cat(column) for column in zip(*parts, strict=True)))
