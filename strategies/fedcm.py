"""FedCM: workers' momentum is the direction in which the federation moved last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fedsim import checks, tree
from fedsim.tree import Stack, Tree
from strategies.base import Broadcast, MeanRule, Report, State


@dataclass(frozen=True)
class FedCM(MeanRule):
    """Average the rows, and send along how far a local step went; needs ``client = "Guided(...)"``, maybe within `SAM`.

    ``theta <- theta + lr sum_i p_i (theta_i - theta)`` and ``D = sum_i p_i (theta_i - theta) / H_i`` over the participants,
    with the H_i local steps of worker i; the channel ``displacement`` is D, 0 in the first round. Around ``SGD``, that is
    FedCM, and with ``client = "SAM(Guided(SGD(lr), alpha), rho)"`` MoFedSAM. Twice as much is sent down as in `FedAvg`.

    Parameters
    ----------
    lr : float
        Server learning rate, > 0.
    weighting : {"samples", "uniform"}
        Which ``p_i``, as in `FedAvg`.

    Raises
    ------
    ValueError
        If a value is outside its range.

    References
    ----------
    Xu, Wang, Wang, Yao (2021), FedCM: Federated learning with client-level momentum, arXiv:2106.10874. MoFedSAM:
    Qu, Li, Duan, Liu, Tang, Lu (2022), arXiv:2206.02618.
    """

    upload: ClassVar[Literal["rows", "mean", "chosen"]] = (
        "rows"  # steps may differ, and a mean hides whose row it was
    )

    lr: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive(self, "lr")

    def init(self, theta: Tree, num_workers: int) -> tuple[State, Broadcast]:
        """Start with ``D = 0``."""
        channels = {"model": theta, "displacement": tree.zeros_like(theta)}
        return channels, channels

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Move the model to the mean of the rows, and remember the mean step."""
        theta = state["model"]

        def step(x: Tensor, x0: Tensor) -> Tensor:
            gap = x - x0
            return gap / report.steps.clamp(min=1).to(gap).view(-1, *(1,) * (gap.ndim - 1))

        moved = tree.sub(tree.mean(rows, report.weight), theta)
        displacement = tree.mean(tree.tree_map(step, rows, theta), report.weight)
        channels = {"model": tree.axpy(self.lr, moved, theta), "displacement": displacement}
        return channels, channels
