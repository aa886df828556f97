"""Risk and invariance penalty of the model in every environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.func import functional_call

from fedsim.invariance import penalty, slope_of
from fedsim.probes.base import Memory, Probe, Snapshot

if TYPE_CHECKING:
    from fedsim.experiment import Experiment
    from fedsim.federation import Federation


@dataclass(frozen=True)
class Environments(Probe):
    """Risk and penalty ``D^2`` of the model on the training rows of each worker, that is, of each environment.

    The penalty alone proves nothing: it is 0 also for outputs of 0 and for a calibrated constant. Read it beside the risk,
    ``id_accuracy`` and ``ood_accuracy``.

    References
    ----------
    Arjovsky, Bottou, Gulrajani, Lopez-Paz 2019, arXiv 1907.02893.
    """

    def begin(self, experiment: Experiment, federation: Federation) -> Memory:
        """Check that the loss has a penalty in closed form."""
        slope_of(federation.objective)
        return {}

    def measure(self, snapshot: Snapshot, memory: Memory) -> tuple[dict[str, float], Memory]:
        """Return ``risk.mean``, ``risk.max``, ``penalty.mean`` and ``penalty.max`` over all workers."""
        federation, found = snapshot.federation, []
        data = federation.dataset
        with torch.no_grad():
            for worker in range(federation.train.num_workers):
                own = federation.train.rows(worker).to(data.x.device)
                output = functional_call(federation.module, snapshot.model, (data.x[own],)).double()
                risk = federation.objective.loss(output, data.y[own]).mean()
                found.append(torch.stack([risk, penalty(federation.objective, output, data.y[own])]))
        values = torch.stack(found).cpu()
        return {
            f"{name}.{how}": value.item()
            for name, column in zip(("risk", "penalty"), values.T, strict=True)
            for how, value in (("mean", column.mean()), ("max", column.max()))
        }, memory
