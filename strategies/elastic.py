"""Elastic averaging: workers and a centre at the server pull each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedsim import checks, tree
from fedsim.tree import Stack, Tree
from strategies.base import Broadcast, Report, Rule, State, Traffic
from strategies.leader import best


@dataclass(frozen=True)
class ElasticAveraging(Rule):
    """Elastic averaging SGD: workers keep their own parameters and are tied to a centre by a spring.

    With ``alpha = beta / W``, at the first step of each round, from the same old point ``x_i`` and old centre ``c``:
    ``x_i <- x_i - lr grad(x_i) - alpha (x_i - c)`` and ``c <- (1 - beta) c + beta mean_i x_i``; the other steps of the round are the
    client's own. With the client ``Nesterov(lr, momentum)`` it is EAMSGD: the spring never enters the velocity.
    With ``schedule = "FreeRunning(...)"`` each worker comes when it is ready, ``c <- c + alpha (x_i - c)``, and makes its next gradient
    step from the point at which it came.

    Note how weak the pull is: ``beta = 0.9`` pulls each of 16 workers by 5.6 % only. The centre of workers
    with different data is not the minimiser of their mean loss.

    Parameters
    ----------
    beta : float
        Pull of the centre, in [0, 1] for one that does not overshoot, >= 0.
    alpha : float or None
        Pull of a worker, >= 0; None for ``beta / W``. In the literature ``alpha = lr rho``.
    after_step : bool
        Exchange after the local steps, as the authors of leader SGD did in their comparison: another method.

    Raises
    ------
    ValueError
        If a value is negative.

    References
    ----------
    Zhang, Choromanska, LeCun (2015), Deep learning with elastic averaging SGD, arXiv:1412.6651.
    """

    keeps_rows: ClassVar[bool] = True
    keeps_state: ClassVar[bool] = True
    recovers: ClassVar[bool] = True
    asynchronous: ClassVar[bool] = True
    reported: ClassVar[str] = "center"

    beta: float = 0.9
    alpha: float | None = None
    after_step: bool = False

    def __post_init__(self) -> None:
        checks.nonnegative(self, "beta")
        if self.alpha is not None:
            checks.nonnegative(self, "alpha")

    @property
    def follows(self) -> Literal["never", "first", "every"]:
        """The first step of a round."""
        return "never" if self.after_step else "first"

    def init(self, theta: Tree, num_workers: int) -> tuple[State, Broadcast]:
        """Start the centre from the initial model, which is the mean of the rows where they start apart."""
        pull = self.beta / num_workers if self.alpha is None else self.alpha
        alpha = torch.tensor(pull, dtype=torch.float64, device=next(iter(theta.values())).device)
        return {"model": theta, "mean": theta, "pull": {"alpha": alpha}}, _send(theta, alpha)

    def weight(self, samples: Tensor) -> Tensor:
        """Weigh all workers equally."""
        return torch.ones_like(samples, dtype=torch.float64)

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Move the centre to the mean of the rows from which the workers made their first step of this round."""
        mean = tree.mean(rows, report.weight)
        if self.after_step:
            sent, center = state["model"], tree.lerp(state["model"], mean, self.beta)
        else:
            sent = center = tree.lerp(state["model"], state["mean"], self.beta)
        alpha = state["pull"]["alpha"]
        return {"model": center, "mean": mean, "pull": state["pull"]}, _send(sent, alpha)

    def exchange(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Move the centre to one worker, and send that worker the centre from before."""
        alpha, row = state["pull"]["alpha"], tree.take(rows, 0)
        center = tree.tree_map(lambda c, x: c + alpha.to(c.dtype) * (x - c), state["model"], row)
        return state | {"model": center}, _send(state["model"], alpha)

    def adopt(self, row: Tree, broadcast: Broadcast, worker: Tensor) -> Tree:
        """Stay: the pull comes with the next gradient, unless ``after_step``."""
        return _pulled(row, row, broadcast) if self.after_step else row

    def follow(self, row: Tree, anchor: Tree, broadcast: Broadcast, worker: Tensor, period: int) -> Tree:
        """Add the pull at the point where the gradient was taken."""
        return _pulled(row, anchor, broadcast)

    def traffic(self, broadcast: Broadcast, num_workers: int) -> Traffic:
        """Count a row up and a row down for each worker."""
        return Traffic(num_workers, 1)

    def models(self, state: State, rows: Stack, report: Report) -> dict[str, Tree]:
        """Evaluate the mean of the rows and the row of lowest training loss too."""
        return candidates(rows, report)


def candidates(rows: Stack, report: Report) -> dict[str, Tree]:
    """Return the mean of the rows and the row of the lowest finite loss, if there is one.

    Parameters
    ----------
    rows : Stack
        Leaves ``[m, *]``.
    report : Report
        Losses.

    Returns
    -------
    dict of str to Tree
        ``average``, ``leader``.
    """
    first = best(report.loss)
    device = next(iter(rows.values())).device
    ones = torch.ones(tree.num_rows(rows), dtype=torch.float64, device=device)
    found = {"average": tree.mean(rows, ones)}
    return found if first is None else found | {"leader": tree.take(rows, first)}


def _send(center: Tree, alpha: Tensor) -> Broadcast:
    return {"model": center, "pull": {"alpha": alpha}}


def _pulled(row: Tree, at: Tree, broadcast: Broadcast) -> Tree:
    alpha = broadcast["pull"]["alpha"]
    return tree.tree_map(lambda x, a, c: x - alpha.to(x.dtype) * (a - c), row, at, broadcast["model"])
