"""Downpour SGD: workers push what they have moved since they last came, and start again from the centre."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsim import tree
from fedsim.tree import Stack, Tree
from strategies.base import Broadcast, Report, Rule, State
from strategies.elastic import candidates


@dataclass(frozen=True)
class Downpour(Rule):
    """Add to the centre what each worker has moved since it last received the centre.

    ``v_i = x_i - c_i`` with ``c_i`` the centre that worker i received last, ``c <- c + v_i``, and ``x_i <- c``. The moves of all workers
    are added, not averaged: W workers with the learning rate ``lr`` move the centre like one with ``W lr``. Made
    for ``schedule = "FreeRunning(...)"``; with the synchronous schedule all come at once, in the order of their ids.

    References
    ----------
    Dean et al. (2012), Large scale distributed deep networks, NeurIPS. In the form of Zhang, Choromanska, LeCun (2015),
    arXiv:1412.6651.
    """

    keeps_rows: ClassVar[bool] = True
    keeps_state: ClassVar[bool] = True
    recovers: ClassVar[bool] = True
    asynchronous: ClassVar[bool] = True
    reported: ClassVar[str] = "center"

    def init(self, theta: Tree, num_workers: int) -> tuple[State, Broadcast]:
        """Start with nothing to push; the state holds what each worker received last, leaves ``[W, *]``."""
        return {"model": theta, "sent": tree.replicate(theta, num_workers)}, {"model": theta}

    def weight(self, samples: Tensor) -> Tensor:
        """Weigh all workers equally."""
        return torch.ones_like(samples, dtype=torch.float64)

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Add all moves."""
        sent = state["sent"]
        worker = report.worker.to(next(iter(rows.values())).device)
        center = tree.tree_map(lambda c, x, s: c + (x - s[worker]).sum(0), state["model"], rows, sent)

        def remember(s: Tensor, c: Tensor) -> Tensor:
            return s.index_copy(0, worker, c.expand(len(worker), *c.shape))

        return {"model": center, "sent": tree.tree_map(remember, sent, center)}, {"model": center}

    def models(self, state: State, rows: Stack, report: Report) -> dict[str, Tree]:
        """Evaluate the mean of the rows and the row of lowest training loss too."""
        return candidates(rows, report)
