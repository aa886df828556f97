"""Problems and rules of our own for the tests of the engine: small, in float64, with closed forms; and their runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import fedsim
from clients import Oracle, State, Told, told
from fedsim import tree
from fedsim.carriers import Carrier, InProcess
from fedsim.data import Dataset, Shards
from fedsim.experiment import Experiment
from fedsim.federation import load
from fedsim.probes import Snapshot
from fedsim.registry import REGISTRY
from fedsim.simulate import rounds
from fedsim.tree import Stack, Tree
from strategies import Broadcast, Report, Rule

A, B = (1.0, 2.0, 0.5, 1.5), (0.0, 1.0, -1.0, 2.0)
"""The worked example of all golden vectors: ``f_i(x) = a_i (x - b_i)^2 / 2``."""


@dataclass(frozen=True)
class Quadratics:
    """Worker i minimises ``a_i (x - b_i)^2 / 2``; it owns ``rows_i`` equal rows."""

    a: tuple[float, ...] = A
    b: tuple[float, ...] = B
    rows: tuple[int, ...] = (1, 1, 1, 1)

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Write the squares as a regression on one feature."""
        owner = torch.repeat_interleave(torch.arange(len(self.a)), torch.tensor(self.rows))
        root = torch.tensor(self.a, dtype=torch.float64).sqrt()
        x, y = root[owner, None], (root * torch.tensor(self.b, dtype=torch.float64))[owner]
        return Dataset(x, y, x[:0], y[:0], 1, "regression", "quadratics", workers=owner)


@dataclass(frozen=True)
class Blobs:
    """Noisy classes with uneven shares: worker i owns ``rows_i`` rows."""

    rows: tuple[int, ...] = (7, 4, 9, 5, 6)
    features: int = 3
    test: int = 11

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Draw the rows, the same for every seed."""
        n, generator = sum(self.rows) + self.test, torch.Generator().manual_seed(5)
        x = torch.randn(n, self.features, generator=generator, dtype=torch.float64)
        y = (x[:, 0] + x[:, 1] * torch.randn(n, generator=generator, dtype=torch.float64) > 0).long()
        owner = torch.repeat_interleave(torch.arange(len(self.rows)), torch.tensor(self.rows))
        return Dataset(
            x[self.test :], y[self.test :], x[: self.test], y[: self.test], 2, "classes", "blobs", owner
        )


@dataclass(frozen=True)
class Owned:
    """The partition that the source names, in reversed order of workers if so wished."""

    reverse: bool = False

    def assign(self, dataset: Dataset, num_workers: int, seed: int) -> Shards:
        """Give every row to its worker."""
        assert dataset.workers is not None
        owner = num_workers - 1 - dataset.workers if self.reverse else dataset.workers
        return Shards.from_assignment(owner.numpy(), num_workers)


@dataclass(frozen=True)
class Point:
    """The model ``x -> w x`` with one weight."""

    start: float = 1.5

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        """Build the module, ``w = start``."""
        linear = nn.Linear(1, 1, bias=False)
        nn.init.constant_(linear.weight, self.start)
        return nn.Sequential(linear)


@dataclass(frozen=True)
class Elastic(Rule):
    """Workers keep their rows and move half-way to the mean, worker i by ``1 / (2 + i)`` less."""

    keeps_rows: ClassVar[bool] = True
    keeps_state: ClassVar[bool] = True

    def init(self, theta: Tree, num_workers: int) -> tuple[State, Broadcast]:
        """Start from the common model."""
        return {"model": theta}, {"model": theta}

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Take the mean."""
        model = tree.mean(rows, report.weight)
        return {"model": model}, {"model": model}

    def adopt(self, row: Tree, broadcast: Broadcast, worker: Tensor) -> Tree:
        """Move towards the mean."""
        return tree.lerp(row, broadcast["model"], 0.5 - 1 / (2 + worker.double()))

    def model(self, state: State, rows: Stack) -> Tree:
        """Evaluate the mean of the moved rows."""
        return tree.mean(rows, torch.ones(tree.num_rows(rows), dtype=torch.float64))


@dataclass(frozen=True)
class Remembering(Rule):
    """Federated averaging in which workers keep the state of their rule."""

    keeps_state: ClassVar[bool] = True

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Take the mean."""
        model = tree.mean(rows, report.weight)
        return {"model": model}, {"model": model}


@dataclass(frozen=True)
class Averaged:
    """Gradient descent towards the running mean of all points, which starts at the first of them."""

    lr: float = 0.1

    def init(self, theta: Tree) -> State:
        """Remember the first point."""
        return {"mean": tree.clone(theta), "count": torch.ones((), dtype=torch.float64)}

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Make one step."""
        gradient, loss = oracle.grad(theta)
        count = state["count"] + 1
        mean = tree.lerp(state["mean"], theta, 1 / count)
        new = tree.axpy(-self.lr, gradient, tree.lerp(theta, mean, self.lr))
        return new, {"mean": mean, "count": count}, told(loss)


_OWN = [
    ("data", Quadratics), ("data", Blobs), ("partition", Owned), ("model", Point), ("strategy", Elastic),
    ("strategy", Remembering), ("client", Averaged),
]  # fmt: skip


@contextmanager
def registered() -> Iterator[None]:
    """Make everything here known to expressions for a while."""
    for kind, component in _OWN:
        fedsim.register(kind, component)
    try:
        yield
    finally:
        for kind, component in _OWN:
            del REGISTRY[kind][component.__name__]


def quadratics(**settings: object) -> Experiment:
    """Describe a run on the worked example: full gradients, three local steps."""
    base = {
        "data": "Quadratics()", "partition": "Owned()", "model": "Point()", "objective": "SquaredError(half=True)",
        "client": "SGD(lr=0.1)", "strategy": "LocalGD()", "num_workers": 4, "rounds": 3, "local_steps": 3,
        "batch_size": 0, "device": "cpu", "dtype": "float64",
    }  # fmt: skip
    return Experiment.from_mapping(base | settings)


def blobs(**settings: object) -> Experiment:
    """Describe a run on five uneven workers: minibatches of three."""
    base = {
        "data": "Blobs()", "partition": "Owned()", "model": "MLP(hidden=(4,))", "client": "SGD(lr=0.3)",
        "num_workers": 5, "rounds": 4, "local_steps": 3, "batch_size": 3, "device": "cpu", "dtype": "float64",
    }  # fmt: skip
    return Experiment.from_mapping(base | settings)


def here(experiment: Experiment) -> Carrier:
    """Train in this process."""
    return InProcess(experiment, load(experiment))


def snapshots(experiment: Experiment, carrier: Carrier | None = None) -> list[Snapshot]:
    """Run to the end and return every round."""
    return [snapshot for snapshot, _ in rounds(experiment, carrier=carrier)]
