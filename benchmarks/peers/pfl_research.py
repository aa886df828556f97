"""pfl-research: ``pip install pfl``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend  # pyright: ignore[reportMissingImports]
from pfl.aggregate.weighting import WeightByDatapoints  # pyright: ignore[reportMissingImports]
from pfl.algorithm.base import NNAlgorithmParams  # pyright: ignore[reportMissingImports]
from pfl.algorithm.federated_averaging import FederatedAveraging  # pyright: ignore[reportMissingImports]
from pfl.callback.base import TrainingProcessCallback  # pyright: ignore[reportMissingImports]
from pfl.data.dataset import Dataset  # pyright: ignore[reportMissingImports]
from pfl.data.federated_dataset import FederatedDataset  # pyright: ignore[reportMissingImports]
from pfl.data.sampling import get_user_sampler  # pyright: ignore[reportMissingImports]
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams  # pyright: ignore[reportMissingImports]
from pfl.metrics import Metrics, Weighted  # pyright: ignore[reportMissingImports]
from pfl.model.pytorch import PyTorchModel  # pyright: ignore[reportMissingImports]

from benchmarks.nets import build
from benchmarks.problem import Problem, Trained


class Net(torch.nn.Module):
    """A model with the two functions that the library asks for."""

    def __init__(self, body: torch.nn.Module) -> None:
        super().__init__()
        self.body = body

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the mean loss."""
        return F.cross_entropy(self.body(x), y)

    @torch.no_grad()
    def metrics(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
        """Return the loss as the library's weighted sum."""
        return {"loss": Weighted(F.cross_entropy(self.body(x), y, reduction="sum").item(), len(y))}


class Shard(Dataset):
    """A user's rows, with minibatches drawn with replacement."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, steps: int, generator: torch.Generator) -> None:
        super().__init__((x, y))
        self.steps, self.generator = steps, generator

    def iter(self, batch_size: int | None):
        """Yield one minibatch a step, or everything."""
        x, y = self.raw_data
        if batch_size is None:
            yield [x, y]
            return
        for _ in range(self.steps):
            rows = torch.randint(len(x), (batch_size,), generator=self.generator, device=x.device)
            yield [x[rows], y[rows]]


class Clock(TrainingProcessCallback):
    """Notes when each round ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int):
        """Note the time."""
        self.ends.append(time.monotonic())
        return False, Metrics()


def train(file: Path, rounds: int, device: str) -> Trained:
    """Run federated averaging in the library's simulated backend."""
    problem = Problem.load(file)
    np.random.seed(0)  # noqa: NPY002  (the library draws users from the global generator)
    net = Net(build(problem))
    net.body.load_state_dict({k: torch.from_numpy(v) for k, v in problem.theta.items()})
    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), lr=1.0))
    x, y = torch.from_numpy(problem.x).to(device), torch.from_numpy(problem.y).to(device)
    batches = torch.Generator(device).manual_seed(0)
    rows = [torch.from_numpy(problem.rows(i)).to(device) for i in range(problem.num_workers)]
    shards = [(x[r], y[r]) for r in rows]
    users = FederatedDataset(
        lambda i: Shard(shards[i][0], shards[i][1], problem.steps, batches),
        get_user_sampler("minimize_reuse", list(range(problem.num_workers))),
    )
    clock = Clock()
    FederatedAveraging().run(
        NNAlgorithmParams(rounds, rounds + 1, problem.participants, 0),
        SimulatedBackend(users, users, [WeightByDatapoints()]),
        model,
        NNTrainHyperParams(
            local_batch_size=problem.batch,
            local_num_epochs=None,
            local_num_steps=problem.steps,
            local_learning_rate=problem.lr,
        ),
        NNEvalHyperParams(local_batch_size=None),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    return Trained(clock.ends, {k: v.cpu().numpy() for k, v in net.body.state_dict().items()})
