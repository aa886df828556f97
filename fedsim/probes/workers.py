"""How workers differ in a round: their losses, and how far local steps carry them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call

from fedsim import checks, tree
from fedsim.probes.base import Memory, Probe, Snapshot


@dataclass(frozen=True)
class WorkerLoss(Probe):
    """Spread of the workers' training losses: their lowest, 10th percentile, median, 90th and highest.

    Parameters
    ----------
    at : {"steps", "row"}
        The mean of the round's minibatch losses, each seen before its step; or the loss of the row with which a worker
        goes on, on all of its own training rows.

    Raises
    ------
    ValueError
        If ``at`` is something else.
    """

    at: Literal["steps", "row"] = "steps"

    def __post_init__(self) -> None:
        checks.one_of(self, "at", ("steps", "row"))

    @property
    def needs_rows(self) -> bool:
        """Rows must be there to be evaluated."""
        return self.at == "row"

    def measure(self, snapshot: Snapshot, memory: Memory) -> tuple[dict[str, float], Memory]:
        """Return ``min``, ``p10``, ``median``, ``p90``, ``max`` over the participants of the round."""
        loss = (_at_rows(snapshot) if self.at == "row" else snapshot.report.loss).sort().values
        levels = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=loss.dtype)
        values = torch.quantile(loss, levels).tolist()
        return dict(zip(("min", "p10", "median", "p90", "max"), values, strict=True)), memory


def _at_rows(snapshot: Snapshot) -> Tensor:
    """Return the loss of each worker's row on all of its training rows, ``[m]`` float64."""
    federation, found = snapshot.federation, []
    data, device = federation.dataset, federation.dataset.x.device
    with torch.no_grad():
        for i, worker in enumerate(snapshot.told.worker.tolist()):
            own = federation.train.rows(worker - federation.first).to(device)
            output = functional_call(federation.module, tree.take(snapshot.after, i), (data.x[own],))
            found.append(federation.objective.loss(output, data.y[own]).double().mean().cpu())
    return torch.stack(found)


@dataclass(frozen=True)
class Drift(Probe):
    """How far local steps carry workers from the model they received, ``|theta_i - theta| / |theta|``."""

    @property
    def needs_rows(self) -> bool:
        """Every row is compared."""
        return True

    def measure(self, snapshot: Snapshot, memory: Memory) -> tuple[dict[str, float], Memory]:
        """Return ``mean`` and ``max`` over the participants of the round."""
        rows = tree.flatten_rows(snapshot.rows).double()
        before = tree.flatten(snapshot.sent["model"]).double()
        distance = (rows - before).norm(dim=1) / before.norm().clamp(min=torch.finfo(torch.float64).tiny)
        return {"mean": distance.mean().item(), "max": distance.max().item()}, memory
