"""DiLoCo without a barrier: the server takes in one worker at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedsim import checks, tree
from fedsim.tree import Stack, Tree
from strategies.base import Broadcast, Report, Rule, State
from strategies.diloco import nesterov


@dataclass(frozen=True)
class AsyncDiLoCo(Rule):
    """Nesterov's momentum on the pseudo-gradients of workers that come one by one, as in asynchronous Local SGD.

    Made for ``schedule = "FreeRunning(...)"``; with the synchronous one all come at once, in the order of their ids. Worker i
    brings ``g = theta_sent - theta_i``, how far it has moved from the model with which it was sent off, and goes on from the new model. With
    t arrivals so far, ``N = every`` and s arrivals of others since worker i was sent off (its staleness):

    * ``delayed`` (Delayed Nesterov): ``B <- B + g``; if N does not divide t, ``theta <- theta - lr g / N``; if it does,
      ``v <- momentum v + B / N``, ``theta <- theta - lr (g / N + momentum v)``, ``B <- 0``. N arrivals together move the model as one step of
      ``DiLoCo`` on their mean;
    * ``naive``: ``v <- momentum v + w g``; ``theta <- theta - lr (w g + momentum v)`` with ``w = 1 / sqrt(W)``, times ``1 / sqrt(1 + s)`` with ``discount``.
      It needs a smaller ``lr``, say a tenth;
    * ``buffered``: nothing until N have come, then one step of ``DiLoCo`` on their mean. With ``FreeRunning(grace=inf)`` this is
      ``DiLoCo``.

    The server remembers what each of W workers was sent.

    Parameters
    ----------
    lr : float
        Outer learning rate, > 0.
    momentum : float
        Outer momentum, in [0, 1).
    how : {"delayed", "naive", "buffered"}
        What an arrival does.
    every : int
        Arrivals N between updates of the velocity, >= 0; 0 for the number of workers. Not used by "naive".
    discount : bool
        Let stale workers count less; "naive" only.

    Raises
    ------
    ValueError
        If a value is outside its range.

    References
    ----------
    Liu, Chhaparia, Douillard, Kale, Rusu, Shen, Szlam, Ranzato (2024), Asynchronous Local-SGD training for language
    modeling, arXiv:2401.09135.
    """

    keeps_rows: ClassVar[bool] = True
    keeps_state: ClassVar[bool] = True
    asynchronous: ClassVar[bool] = True

    lr: float = 0.7
    momentum: float = 0.9
    how: Literal["delayed", "naive", "buffered"] = "delayed"
    every: int = 0
    discount: bool = False

    def __post_init__(self) -> None:
        checks.positive(self, "lr")
        checks.unit(self, "momentum")
        checks.one_of(self, "how", ("delayed", "naive", "buffered"))
        checks.nonnegative(self, "every")
        if self.discount and self.how != "naive":
            raise ValueError(f"AsyncDiLoCo: discount = True needs how = 'naive' (it is {self.how!r})")

    def init(self, theta: Tree, num_workers: int) -> tuple[State, Broadcast]:
        """Start with velocity 0; all workers have the initial model, and none was sent off yet."""
        nobody = torch.full((num_workers,), -1)
        state = {
            "model": theta,
            "velocity": tree.zeros_like(theta),
            "sent": tree.replicate(theta, num_workers),
            "arrivals": {"count": torch.zeros((), dtype=torch.int64), "seen": nobody},
        }
        if self.how != "naive":
            state["buffer"] = tree.zeros_like(theta)
        return state, {"model": theta}

    def weight(self, samples: Tensor) -> Tensor:
        """Weigh all workers equally."""
        return torch.ones_like(samples, dtype=torch.float64)

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Take in all workers, one after the other, and send them off."""
        for i in torch.argsort(report.worker).tolist():
            state = self._push(state, tree.take(rows, i), int(report.worker[i]))
        for worker in report.worker.tolist():
            state = self.depart(state, worker)
        return state, {"model": state["model"]}

    def exchange(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Take in one worker; it brings nothing if it was never sent off."""
        worker = int(report.worker[0])
        if int(state["arrivals"]["seen"][worker]) >= 0:
            state = self._push(state, tree.take(rows, 0), worker)
        return state, {"model": state["model"]}

    def depart(self, state: State, worker: int) -> State:
        """Remember what the worker was sent, and when."""
        sent = tree.tree_map(lambda s, x: _put(s, worker, x), state["sent"], state["model"])
        arrivals = state["arrivals"]
        seen = _put(arrivals["seen"], worker, arrivals["count"])
        return state | {"sent": sent, "arrivals": arrivals | {"seen": seen}}

    def _push(self, state: State, row: Tree, worker: int) -> State:
        model, velocity, arrivals = state["model"], state["velocity"], state["arrivals"]
        gap = tree.sub(tree.take(state["sent"], worker), row)
        before, num_workers = int(arrivals["count"]), len(arrivals["seen"])
        state = state | {"arrivals": arrivals | {"count": torch.tensor(before + 1)}}
        if self.how == "naive":
            stale = before - int(arrivals["seen"][worker]) if self.discount else 0
            gap = tree.scale(1 / math.sqrt(num_workers * (1 + max(0, stale))), gap)
            model, velocity = nesterov(model, velocity, gap, self.lr, self.momentum)
            return state | {"model": model, "velocity": velocity}
        n = self.every or num_workers
        buffer = tree.add(state["buffer"], gap)
        due = (before + 1) % n == 0
        mean = tree.scale(1 / n, buffer)
        state["buffer"] = tree.zeros_like(buffer) if due else buffer
        if self.how == "buffered":
            if due:
                model, velocity = nesterov(model, velocity, mean, self.lr, self.momentum)
            return state | {"model": model, "velocity": velocity}
        step = tree.scale(1 / n, gap)
        if due:
            velocity = tree.axpy(self.momentum, velocity, mean)
            step = tree.axpy(self.momentum, velocity, step)
        return state | {"model": tree.axpy(-self.lr, step, model), "velocity": velocity}


def _put(x: Tensor, index: int, value: Tensor) -> Tensor:
    x = x.clone()
    x[index] = value
    return x
