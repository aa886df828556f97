"""SCAFFOLD: control variates against the drift of workers with different data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedsim import checks, tree
from fedsim.tree import Stack, Tree
from strategies.base import Broadcast, Report, Rule, State, Traffic


@dataclass(frozen=True)
class Scaffold(Rule):
    """Average the rows of workers that correct their gradients, ``g_i - c_i + c``; needs ``client = "Controlled(...)"``.

    ``theta <- theta + lr mean_S(theta_i - theta)`` and ``c <- c + (#S / W) mean_S(c_i' - c_i)`` over the participants S of the round, with
    the workers' control variates before (``c_i``) and after (``c_i'``) the round, all 0 in the beginning (see ``Controlled``). Absent
    workers keep theirs. Both ways of a sync carry one more tree than in `FedAvg`: the channel ``control`` is c,
    and with its row each worker sends ``c_i' - c_i``.

    Parameters
    ----------
    lr : float
        Server learning rate, > 0.

    Raises
    ------
    ValueError
        If ``lr`` is not positive.

    References
    ----------
    Karimireddy, Kale, Mohri, Reddi, Stich, Suresh (2020), SCAFFOLD: Stochastic controlled averaging for federated
    learning, arXiv:1910.06378; option II.
    """

    keeps_state: ClassVar[bool] = True
    upload: ClassVar[Literal["rows", "mean", "chosen"]] = "mean"
    carries: ClassVar[tuple[str, ...]] = ("moved",)

    lr: float = 1.0

    def __post_init__(self) -> None:
        checks.positive(self, "lr")

    def init(self, theta: Tree, num_workers: int) -> tuple[State, Broadcast]:
        """Start with ``c = 0``."""
        channels = {"model": theta, "control": tree.zeros_like(theta)}
        return {**channels, "workers": {"count": torch.tensor(num_workers)}}, channels

    def weight(self, samples: Tensor) -> Tensor:
        """Weigh all workers equally."""
        return torch.ones_like(samples, dtype=torch.float64)

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Move the model to the mean of the rows, and ``c`` by the share of workers that took part."""
        mean, theta = tree.mean(rows, report.weight), state["model"]
        share = float(report.weight.sum()) / int(state["workers"]["count"])
        control = {k: c + share * mean[f"moved/{k}"] for k, c in state["control"].items()}
        model = tree.axpy(self.lr, tree.tree_map(lambda x, y: y - x, theta, mean), theta)
        channels = {"model": model, "control": control}
        return {**channels, "workers": state["workers"]}, channels

    def traffic(self, broadcast: Broadcast, num_workers: int) -> Traffic:
        """Count two trees up and two down for each worker."""
        return Traffic(2 * num_workers, 2)
