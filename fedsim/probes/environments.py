"""Risk, accuracy and invariance penalty of the model in every environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.func import functional_call

from fedsim import checks
from fedsim.invariance import penalty, slope_of
from fedsim.probes.base import Memory, Probe, Snapshot

if TYPE_CHECKING:
    from fedsim.experiment import Experiment
    from fedsim.federation import Federation


@dataclass(frozen=True)
class Environments(Probe):
    """Risk, accuracy and penalty ``D^2`` of the model on the training rows of each worker, that is, of each environment.

    The penalty alone proves nothing: it is 0 also for outputs of 0 and for a calibrated constant. Read it beside the risk,
    ``id_accuracy`` and ``ood_accuracy``.

    Parameters
    ----------
    every : int
        Rounds between measurements, >= 1.

    Raises
    ------
    ValueError
        If ``every`` is smaller.

    References
    ----------
    Arjovsky, Bottou, Gulrajani, Lopez-Paz 2019, arXiv 1907.02893.
    """

    every: int = 1

    def __post_init__(self) -> None:
        checks.at_least(self, 1, "every")

    def begin(self, experiment: Experiment, federation: Federation) -> Memory:
        """Check that the loss has a penalty in closed form."""
        slope_of(federation.objective)
        return {}

    def measure(self, snapshot: Snapshot, memory: Memory) -> tuple[dict[str, float], Memory]:
        """Return ``risk.mean``, ``.max``, ``penalty.mean``, ``.max``, ``accuracy.mean`` and ``.min`` over all workers."""
        if snapshot.round % self.every:
            return {}, memory
        federation, found = snapshot.federation, []
        data, objective = federation.dataset, federation.objective
        with torch.no_grad():
            for worker in range(federation.train.num_workers):
                own = federation.train.rows(worker).to(data.x.device)
                y = data.y[own]
                output = functional_call(federation.module, snapshot.model, (data.x[own],)).double()
                right = objective.correct(output, y)
                assert right is not None  # the losses that have a penalty are those of classes
                figures = (
                    objective.loss(output, y).mean(),
                    penalty(objective, output, y),
                    right.double().mean(),
                )
                found.append(torch.stack(figures))
        risk, penalties, accuracy = torch.stack(found).cpu().T
        over = {
            "risk.mean": risk.mean(), "risk.max": risk.max(),
            "penalty.mean": penalties.mean(), "penalty.max": penalties.max(),
            "accuracy.mean": accuracy.mean(), "accuracy.min": accuracy.min(),
        }  # fmt: skip
        return {k: x.item() for k, x in over.items()}, memory
