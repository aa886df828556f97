"""Federated averaging, and Local-GD, its name when workers use full gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fedsim import tree
from fedsim.tree import Stack
from strategies.base import Broadcast, MeanRule, Report, State


@dataclass(frozen=True)
class FedAvg(MeanRule):
    """Average the rows: ``theta <- sum_i p_i theta_i``, and every worker goes on from the average.

    Parameters
    ----------
    weighting : {"samples", "uniform"}
        Which ``p_i``: proportional to the number of training rows of worker ``i``, or equal.

    References
    ----------
    McMahan, Moore, Ramage, Hampson, Agüera y Arcas (2017), Communication-efficient learning of deep
    networks from decentralized data, arXiv:1602.05629. Stich (2019), Local SGD converges fast and
    communicates little, arXiv:1805.09767.
    """

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Replace the model by the mean."""
        model = tree.mean(rows, report.weight)
        return {"model": model}, {"model": model}


@dataclass(frozen=True)
class LocalGD(FedAvg):
    """`FedAvg` with full local gradients and equal weights: needs ``batch-size = 0``.

    Parameters
    ----------
    weighting : {"samples", "uniform"}
        As in `FedAvg`, with equal weights by default.

    References
    ----------
    Khaled, Mishchenko, Richtárik (2019), First analysis of local GD on heterogeneous data,
    arXiv:1909.04715.
    """

    weighting: Literal["samples", "uniform"] = field(default="uniform", kw_only=True)
