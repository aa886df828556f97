"""Who leads: how often each worker is the best, and how far the others are from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fedsim import tree
from fedsim.probes.base import Memory, Probe, Snapshot

if TYPE_CHECKING:
    from fedsim.experiment import Experiment
    from fedsim.federation import Federation

FEW = 32
"""Workers whose shares are told one by one."""


@dataclass(frozen=True)
class Leaders(Probe):
    """Who has the lowest loss when workers meet, by the score of the strategy or else by their training losses.

    Ties go to the lowest id, and losses that are not finite never lead. Figures, before any pull of this round:

    * ``who``, the best worker; ``switches``, how often that has changed;
    * ``share.i``, the share of all syncs led by worker i (of up to 32 workers), ``share.min`` and ``share.max`` over workers;
    * ``distance.mean`` and ``distance.max`` of the other workers' rows from the best one's, ``|x_i - x|``;
    * ``spread``, the highest finite loss minus the lowest.
    """

    @property
    def needs_rows(self) -> bool:
        """Every row is compared."""
        return True

    def begin(self, experiment: Experiment, federation: Federation) -> Memory:
        """Start counting."""
        led = torch.zeros(experiment.num_workers, dtype=torch.int64)
        return {"count": {"led": led, "last": torch.tensor(-1), "switches": torch.tensor(0)}}

    def measure(self, snapshot: Snapshot, memory: Memory) -> tuple[dict[str, float], Memory]:
        """Count this sync."""
        told, count = snapshot.told, memory["count"]
        loss = told.loss.cpu()
        usable = torch.where(loss.isfinite(), loss, torch.inf)
        if not bool(usable.isfinite().any()):
            return {}, memory
        first = int((usable == usable.min()).nonzero()[0])
        who, last = int(told.worker[first]), int(count["last"])
        led = count["led"].clone()
        led[who] += 1
        switches = int(count["switches"]) + (last not in (-1, who))
        rows = tree.flatten_rows(snapshot.rows).double()
        others = torch.arange(len(rows), device=rows.device) != first
        distance = (rows[others] - rows[first]).norm(dim=1)
        share = led.double() / led.sum()
        figures = {
            "who": who,
            "switches": switches,
            "share.min": share.min().item(),
            "share.max": share.max().item(),
            "spread": (loss[loss.isfinite()].max() - usable.min()).item(),
        }
        if len(distance):
            figures |= {"distance.mean": distance.mean().item(), "distance.max": distance.max().item()}
        if len(share) <= FEW:
            figures |= {f"share.{i}": x for i, x in enumerate(share.tolist())}
        new = {"led": led, "last": torch.tensor(who), "switches": torch.tensor(switches)}
        return figures, {"count": new}
