"""Local-GD on linear classifiers through the production engine, with the signature of the plain reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from reference_local_gd import step_size
from torch import Tensor

from clients import SGD, LocalRule, Prox
from fedsim import tree
from fedsim.analysis.direction import Loss, Weights, node_weights
from fedsim.data import Dataset, Shards
from fedsim.experiment import Experiment
from fedsim.federation import Federation, assemble
from fedsim.probes import Snapshot
from fedsim.registry import register
from fedsim.simulate import rounds as run_rounds
from strategies import AnchoredAverage, FedAvg

LINEAR = "Linear(bias=False, zero_init=True)"


@dataclass(frozen=True)
class Weighted(FedAvg):
    """`FedAvg` with given weights of the workers, all of whom take part."""

    p: tuple[float, ...] = ()

    def weight(self, samples: Tensor) -> Tensor:
        """Return the given weights."""
        return torch.tensor(self.p, dtype=torch.float64)


register("strategy", Weighted)


def federation_of(
    experiment: Experiment, zs: Sequence[np.ndarray], y: np.ndarray | None = None
) -> Federation:
    """Give worker i the signed rows ``zs[i]``: every second row changes side, or the targets ``y`` decide."""
    x = torch.from_numpy(np.vstack(zs)).clone()
    owner = np.repeat(np.arange(len(zs)), [len(z) for z in zs])
    target = torch.ones(len(x), dtype=torch.int64) if y is None else torch.from_numpy(y)
    if y is None:
        x[1::2], target[1::2] = -x[1::2], 0
    data = Dataset(x, target, x[:0], target[:0], 1, "binary" if y is None else "regression", "rows")
    return assemble(experiment, data, Shards.from_assignment(owner, len(zs)))


def linear(
    num_workers: int,
    local_steps: int,
    rounds: int,
    client: LocalRule,
    strategy: FedAvg | AnchoredAverage,
    **more,
) -> Experiment:
    """Describe full-batch training of a linear model without bias from 0, in float64."""
    settings = {"model": LINEAR, "objective": "Logistic()", "dtype": "float64"}
    settings |= {"batch_size": 0, "eval_every": 0, "device": "cpu"} | more
    return Experiment.from_mapping(
        settings
        | {
            "num_workers": num_workers,
            "local_steps": local_steps,
            "rounds": rounds,
            "client": client,
            "strategy": strategy,
        }
    )


def models(experiment: Experiment, federation: Federation) -> np.ndarray:
    """Run, and return the model before the first and after every round, ``[K + 1, d]``."""
    out = [federation.theta, *(s.model for s, _ in run_rounds(experiment, federation))]
    return torch.stack([tree.flatten(m) for m in out]).numpy()


def engine(
    zs: Sequence[np.ndarray],
    local_steps: int,
    rounds: int,
    mode: str = "fixed",
    *,
    c: float = 1.0,
    eta: float | None = None,
    p: Weights = "uniform",
    loss: Loss = "logistic",
    pull: float = 0.0,
    anchored: bool = False,
    indices: np.ndarray | None = None,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """Run K rounds; given ``indices`` only their number of rows a step counts, the engine draws its own."""
    rule: LocalRule = SGD(step_size(zs, local_steps, mode, c) if eta is None else eta)
    weights = tuple(node_weights(zs, p).tolist())
    averaged = AnchoredAverage() if anchored else Weighted(p=weights)
    batch = 0 if indices is None else indices.shape[-1]
    experiment = linear(
        len(zs),
        local_steps,
        rounds,
        Prox(rule, mu=pull) if pull else rule,
        averaged,
        objective="Exponential()" if loss == "exponential" else "Logistic()",
        batch_size=batch,
        replacement=batch > 0,
    )
    federation = federation_of(experiment, zs)
    if start is not None:
        federation = federation._replace(theta=tree.unflatten(torch.from_numpy(start), federation.theta))
    return models(experiment, federation)


def told(snapshot: Snapshot) -> dict[str, Any]:
    """Return what a round has measured, of any type."""
    return dict(snapshot.metrics)
