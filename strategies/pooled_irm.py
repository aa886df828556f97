"""Invariant risk minimisation with several workers in an environment, whose penalty is that of all its rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedsim import checks
from fedsim.tree import Stack, Tree
from strategies.base import Broadcast, Report, State, Traffic
from strategies.fedsgd import FedIRM


@dataclass(frozen=True)
class PooledIRM(FedIRM):
    """`FedIRM` for environments that are blocks of ``per_domain`` workers; needs ``client = "IRM(...)"``.

    Before they step, workers k tell ``D_k`` at the weights that they have received. D is a mean over rows, so that of environment e is
    ``D_e = sum_k (n_k / N_e) D_k`` over its workers, with ``N_e = sum_k n_k``; the channel ``slopes`` returns it, ``pooled`` ``[W]``, the D of each
    worker's environment, and workers step along ``grad R_k + 2 lam D_e grad D_k``. With weights ``(1 / E) n_k / N_e`` the mean of these is exactly the
    gradient for one worker an environment. Without that the mean of the squares ``D_k^2`` exceeds ``D_e^2``, the more, the fewer rows a worker has.
    One number more goes up and down, and a round has two trips.

    Parameters
    ----------
    per_domain : int
        Workers of an environment, >= 1: worker k belongs to environment ``k // per_domain``, as with ``partition = "Natural()"`` on data with domains.
    optimiser, lr, beta1, beta2, eps, penalty, anneal, divide, on_anneal
        As in `FedIRM`.
    weighting : {"samples"}
        Within an environment; environments weigh the same.

    Raises
    ------
    ValueError
        If a value is outside its range; from `init`, if the workers are no whole number of environments.

    References
    ----------
    Arjovsky, Bottou, Gulrajani, Lopez-Paz 2019, arXiv 1907.02893. The federated form is ours.
    """

    asks: ClassVar[bool] = True
    upload: ClassVar[Literal["rows", "mean", "chosen"]] = "rows"

    per_domain: int = 1
    weighting: Literal["samples", "uniform"] = field(default="samples", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least(self, 1, "per_domain")
        checks.one_of(self, "weighting", ("samples",))

    def init(self, theta: Tree, num_workers: int) -> tuple[State, Broadcast]:
        """Start with moments of 0, and ask for D."""
        if num_workers % self.per_domain:
            raise ValueError(
                f"per_domain = {self.per_domain} must divide the number of workers, {num_workers}"
            )
        like = next(iter(theta.values()))
        number = torch.tensor(num_workers // self.per_domain, device=like.device)
        return self._asking(*super().init(theta, num_workers), number)

    def inform(self, broadcast: Broadcast, report: Report) -> Broadcast:
        """Add the D of each worker's environment; of environments without a worker in this round it is 0."""
        domain = report.worker // self.per_domain
        number = int(broadcast["irm"]["pools"])
        total, rows = (
            torch.zeros(number, dtype=torch.float64, device=domain.device).index_add_(0, domain, x.double())
            for x in (report.weight * report.loss, report.weight)
        )
        pooled = torch.where(rows > 0, total / rows.clamp(min=1), 0.0)
        return broadcast | {"slopes": {"pooled": pooled.repeat_interleave(self.per_domain)}}

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Make one step along the mean over environments, and send the weight of the next."""
        merged = super().merge(state, rows, report._replace(weight=self.shares(report)))
        return self._asking(*merged, state["environments"]["number"])

    def _asking(self, state: State, broadcast: Broadcast, number: Tensor) -> tuple[State, Broadcast]:
        irm = broadcast["irm"] | {"pools": number}
        return state | {"environments": {"number": number}}, broadcast | {"irm": irm}

    def shares(self, report: Report) -> Tensor:
        """Return ``n_k / N_e`` of the workers of a report, ``[m]``; their sum is the number of environments."""
        domain = report.worker // self.per_domain
        total = torch.zeros(int(domain.max()) + 1, dtype=torch.float64, device=domain.device)
        return report.weight / total.index_add_(0, domain, report.weight.double())[domain]

    def traffic(self, broadcast: Broadcast, num_workers: int) -> Traffic | None:
        """Two trips: a number up and a row down, then a number down and a row up."""
        return Traffic(up=num_workers, down=1, numbers=1, trips=2)
