"""Settings, formulas and ways to run the worked example, for the tests of methods that sync seldom."""

from __future__ import annotations

from typing import Any

from toys import A, B, snapshots

from fedsim import client_app
from fedsim.carriers import Carrier
from fedsim.experiment import Experiment
from fedsim.federation import load
from fedsim.grid import InProcessGrid
from fedsim.over_grid import OverGrid, greet
from fedsim.probes import Snapshot

DILOCO = "DiLoCo(lr=0.7, momentum=0.9)"
ADAMW = "AdamW(lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)"


def over_messages(experiment: Experiment) -> Carrier:
    """Train on two nodes."""
    federation = load(experiment)
    grid = InProcessGrid(client_app.app, 2, experiment.to_mapping())
    return OverGrid(grid, experiment, federation, greet(grid, 2))


def path(experiment: Experiment, carrier: Carrier | None = None) -> list[float]:
    """Return the one parameter of the toy after each round."""
    return [s.model["0.weight"].item() for s in snapshots(experiment, carrier)]


def column(found: list[Snapshot], name: str) -> list[Any]:
    return [s.metrics[name] for s in found]


def fixed_point(weights: list[float]) -> float:
    return sum(w * b for w, b in zip(weights, B, strict=True)) / sum(weights)


def weights_of(local_steps: int, mu: float = 0.0, lr: float = 0.1) -> list[float]:
    return [(1 - (1 - lr * (a + mu)) ** local_steps) * a / (a + mu) for a in A]
