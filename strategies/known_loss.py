"""Averages of workers who know the global loss before they step, and momentum on the dual of its logarithm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedsim import tree
from fedsim.tree import Stack, Tree
from strategies.base import Broadcast, Report, State, Traffic
from strategies.fedavg import FedAvg


@dataclass(frozen=True)
class KnownLoss(FedAvg):
    """`FedAvg` after a question: workers tell ``log f_i(w^k)``, and begin their steps with ``log F(w^k)``.

    ``F = sum_i p_i f_i`` with the weights of the average, summed in the logarithmic domain; the channel ``loss`` of the
    broadcast holds it as ``log``. It is the server's half of the local rule `LossNormalised`, and costs a second
    trip a round.

    Parameters
    ----------
    weighting : {"samples", "uniform"}
        As in `FedAvg`.

    References
    ----------
    Nacson, Lee, Gunasekar, Savarese, Srebro, Soudry (2019), arXiv:1803.01905, for one learner.
    """

    asks: ClassVar[bool] = True

    def inform(self, broadcast: Broadcast, report: Report) -> Broadcast:
        """Add ``log F`` to the broadcast."""
        share = (report.weight / report.weight.sum()).log()
        return broadcast | {"loss": {"log": torch.logsumexp(share + report.loss, 0)}}

    def traffic(self, broadcast: Broadcast, num_workers: int) -> Traffic | None:
        """Two trips: a number up and a row down, then a number down and a row up."""
        return Traffic(up=num_workers, down=1, numbers=1, trips=2)


@dataclass(frozen=True)
class DualAcceleration(KnownLoss):
    """Momentum on the dual of the exponential loss, ``w <- w + g + v`` with ``g <- t / (t + 1) (g + v)`` in round t + 1.

    ``v = sum_i p_i theta_i - w`` is the mean step. With the client ``LossNormalised(SGD(lr))``, one local step and
    ``lr = 1 / max_j |x_j|^2`` this is the method of the paper on all rows together, whatever their partition:
    ``v = lr Z^T softmax(-Z w)``, ``Z`` being the rows times their signs.

    Parameters
    ----------
    weighting : {"samples", "uniform"}
        As in `FedAvg`; the paper's method weighs by samples.

    References
    ----------
    Ji, Srebro, Telgarsky (2021), Fast margin maximization via dual acceleration, arXiv:2107.00595.
    """

    def init(self, theta: Tree, num_workers: int) -> tuple[State, Broadcast]:
        """Start with no momentum."""
        state = {"model": theta, "momentum": tree.zeros_like(theta)}
        return state | {"merges": {"count": torch.zeros((), dtype=torch.int64)}}, {"model": theta}

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Move by the mean step and the momentum."""
        t = int(state["merges"]["count"])
        move = tree.sub(tree.mean(rows, report.weight), state["model"])
        momentum = tree.scale(t / (t + 1), tree.add(state["momentum"], move))
        model = tree.add(state["model"], tree.add(momentum, move))
        return {"model": model, "momentum": momentum, "merges": {"count": torch.tensor(t + 1)}}, {
            "model": model
        }
