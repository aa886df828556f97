"""Robust means: the coordinate-wise median and the trimmed mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim import tree
from fedsim.tree import Stack
from strategies.base import Broadcast, Report, Rule, State


def _sorted(rows: Stack) -> Stack:
    return tree.tree_map(lambda x: torch.sort(x, dim=0).values, rows)


@dataclass(frozen=True)
class FedMedian(Rule):
    """Coordinate-wise median of the rows; the mean of the two middle values for an even number.

    Every participant counts the same, whatever its number of rows.

    References
    ----------
    Yin, Chen, Ramchandran, Bartlett (2018), Byzantine-robust distributed learning: towards optimal
    statistical rates, arXiv:1803.01498.
    """

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Replace the model by the median."""
        m = tree.num_rows(rows)
        model = tree.tree_map(lambda x: (x[(m - 1) // 2] + x[m // 2]) / 2, _sorted(rows))
        return {"model": model}, {"model": model}


@dataclass(frozen=True)
class TrimmedMean(Rule):
    """Coordinate-wise mean without the ``floor(share m)`` lowest and highest of ``m`` values.

    Every participant counts the same, whatever its number of rows.

    Parameters
    ----------
    share : float
        Share cut off at each end, in [0, 0.5); 0 is the uniform mean.

    Raises
    ------
    ValueError
        If ``share`` is outside [0, 0.5).

    References
    ----------
    Yin, Chen, Ramchandran, Bartlett (2018), arXiv:1803.01498.
    """

    share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.share < 0.5:
            raise ValueError(f"TrimmedMean: share = {self.share} must be in [0, 0.5)")

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Replace the model by the trimmed mean."""
        m = tree.num_rows(rows)
        cut = int(self.share * m)

        def trimmed(x: Tensor) -> Tensor:
            return x[cut : m - cut].mean(dim=0)

        model = tree.tree_map(trimmed, _sorted(rows))
        return {"model": model}, {"model": model}
