"""The losses by which strategies compare workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from clients import LocalRule, Oracle, State, Told, told
from fedsim.batches import Batches, Sampler, Sampling
from fedsim.experiment import BadInput, Experiment
from fedsim.federation import Federation
from fedsim.plans import Plan, Work
from fedsim.random import numpy_generator
from fedsim.tree import Stack, Tree


@dataclass(frozen=True)
class _Look:
    """Take the loss of a batch, and stay."""

    def init(self, theta: Tree) -> State:
        """Remember nothing."""
        return {}

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Return the row as it is."""
        _, loss = oracle.grad(theta)
        return theta, state, told(loss)


class Scorer:
    """Computes what `strategies.Rule.score` asks for, and remembers the last losses of each worker for it.

    Parameters
    ----------
    experiment : Experiment
        The run; its strategy has a score.
    federation : Federation
        Its data and model.
    first, last : int
        The range of workers.

    Raises
    ------
    BadInput
        If shared rows are asked for where nodes have data of their own.
    """

    def __init__(self, experiment: Experiment, federation: Federation, first: int, last: int) -> None:
        score = experiment.parts.strategy.score
        assert score is not None
        self.score, self.first, self.federation = score, first, federation
        self.device = next(iter(federation.theta.values())).device
        self._plan: Plan | None = None
        self.recent = torch.full((last - first, score.window), torch.nan, dtype=torch.float64)
        e = experiment
        size = e.batch_size if score.by == "fresh_batch" else 0
        sampling = Sampling(size, 1, 0, e.replacement, e.seed, "score")
        self.sampler = Sampler(federation.train, sampling, self.device, federation.first)
        if score.by == "shared_val":
            if federation.held.num_workers < e.num_workers:
                raise BadInput(
                    f"strategy = {e.strategy!r}: nodes with data of their own share no held-out rows"
                )
            order = federation.held.order
            draw = numpy_generator(e.seed, "shared rows")
            shared = draw.choice(len(order), min(score.window, len(order)), replace=False)
            self.shared = order[torch.from_numpy(shared).sort().values].to(self.device)

    @property
    def records(self) -> bool:
        """Whether the loss of every local step is needed."""
        return self.score.by == "running_train"

    def remember(self, workers: Tensor, losses: Tensor, steps: Tensor) -> None:
        """Take in the losses of local steps.

        Parameters
        ----------
        workers : Tensor
            ``[m]`` ids.
        losses : Tensor
            ``[m, T]``, on the CPU.
        steps : Tensor
            ``[m]``, steps of each; later entries of its losses do not count.
        """
        local, window = workers - self.first, self.score.window
        every = torch.cat([self.recent[local], losses], dim=1)
        self.recent = self.recent.index_copy(0, local, every.gather(1, steps[:, None] + torch.arange(window)))

    def of(self, round: int, workers: Tensor, rows: Stack, make: Callable[[LocalRule], Plan]) -> Tensor:
        """Return the scores of workers that are at ``rows``.

        Parameters
        ----------
        round : int
            Round.
        workers : Tensor
            ``[m]`` ids, ascending.
        rows : Stack
            Their rows.
        make : callable
            Makes the plan that takes the losses.

        Returns
        -------
        Tensor
            ``[m]`` float64 on the CPU.
        """
        if self.score.by == "running_train":
            return self.recent[workers - self.first].nanmean(1)
        m = len(workers)
        if self.score.by == "shared_val":
            index = self.shared.expand(m, 1, -1)
            batches = Batches(torch.arange(m), torch.ones(m, dtype=torch.int64), [m], index, None)
        else:
            batches = self.sampler.draw(round, workers)
        data = self.federation.dataset
        work = Work(rows, {}, {}, data.x, data.y, batches, workers.to(self.device), 0)
        if self._plan is None:
            self._plan = make(_Look())
        return self._plan.run(work).loss.cpu()
