"""Averaging with an anchor at 0, for Modified Local-GD and for projections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from fedsim import tree
from fedsim.tree import Stack, Tree
from strategies.base import Broadcast, MeanRule, Report, State


@dataclass(frozen=True)
class AnchoredAverage(MeanRule):
    """Average the rows and pull the average to 0: ``theta <- k / (k + 1) sum_i p_i theta_i`` at the end of round k.

    The factor (Halpern 1967) is 1/2 in round 1 and tends to 1. With the client ``Projection()`` the average tends to
    the point of all workers' feasible sets that is nearest to 0, the hard-margin vector. With
    ``Prox(SGD(lr), mu)`` it is Modified Local-GD: a *reconstruction*, since Zhu, Vardhan and Mazumdar (2024) regularise
    towards the global model and change the aggregation, while the coefficients here are ours.

    Parameters
    ----------
    anchored : bool
        False leaves the factor out: plain averaging.
    weighting : {"samples", "uniform"}
        Which ``p_i``: proportional to the number of training rows of worker ``i``, or equal (default).

    References
    ----------
    Halpern (1967), Fixed points of nonexpanding maps. Zhu, Vardhan, Mazumdar (2024), arXiv:2412.07971.
    """

    anchored: bool = True
    weighting: Literal["samples", "uniform"] = field(default="uniform", kw_only=True)

    def init(self, theta: Tree, num_workers: int) -> tuple[State, Broadcast]:
        """Start before round 1."""
        return {"model": theta, "merges": {"count": torch.zeros((), dtype=torch.int64)}}, {"model": theta}

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Replace the model by the anchored mean."""
        k = int(state["merges"]["count"]) + 1
        model = tree.mean(rows, report.weight)
        if self.anchored:
            model = tree.scale(k / (k + 1), model)
        return {"model": model, "merges": {"count": torch.tensor(k)}}, {"model": model}
