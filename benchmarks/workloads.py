"""The workloads, each an experiment of fedsim."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.problem import Problem
from fedsim import Experiment, register
from fedsim.data import Dataset
from fedsim.federation import Federation, load
from fedsim.random import numpy_generator


@dataclass(frozen=True)
class NoisyTemplates:
    """Random 28x28 pictures: one template a class plus unit Gaussian noise; stands in for MNIST.

    Parameters
    ----------
    rows : int
        Rows to train on; a fifth of that many more to test on.
    """

    rows: int = 10_000

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Make the pictures; the number of workers does not matter."""
        rng = numpy_generator(seed, "templates")
        templates = torch.from_numpy(0.3 * rng.standard_normal((10, 1, 28, 28), dtype="float32"))
        total = self.rows + self.rows // 5
        y = torch.from_numpy(rng.integers(0, 10, total))
        x = templates[y] + torch.from_numpy(rng.standard_normal((total, 1, 28, 28), dtype="float32"))
        parts = x[: self.rows], y[: self.rows], x[self.rows :], y[self.rows :]
        return Dataset(*parts, num_outputs=10, task="classes", name="noisy templates")


register("data", NoisyTemplates)


@dataclass(frozen=True)
class Workload:
    """What is measured.

    Attributes
    ----------
    title : str
        One line for tables.
    model : str
        As in `benchmarks.problem.Problem`.
    experiment : Experiment
        The run; evaluated only at its end, so that rounds are training, merging and history alone.
    """

    title: str
    model: str
    experiment: Experiment


def _pictures() -> str:
    """Name MNIST where ``FEDSIM_DATA`` has it, else random pictures of its shape."""
    folder = os.environ.get("FEDSIM_DATA")
    found = folder is not None and (Path(folder) / "mnist").is_dir()
    return "MNIST(rows=10000)" if found else "NoisyTemplates(rows=10000)"


def workloads() -> dict[str, Workload]:
    """Return the three workloads by name."""
    pictures = _pictures()
    same = {"client": "SGD(lr=0.1)", "strategy": "FedAvg()", "replacement": True, "eval_every": 0}
    a = {"data": "Digits()", "partition": "Dirichlet(alpha=0.3)", "model": "MLP(hidden=(200,))"}
    a |= {"num_workers": 100, "local_steps": 10, "batch_size": 16, "rounds": 50}
    b = {"data": "Synthetic(rows=62500, features=64)", "partition": "IID()", "model": "Linear()"}
    b |= {"num_workers": 1000, "participation": 0.05, "local_steps": 5, "batch_size": 10, "rounds": 100}
    c = {"data": pictures, "partition": "IID()", "model": "SmallCNN(channels=(16, 32))"}
    c |= {"num_workers": 10, "local_steps": 20, "batch_size": 32, "rounds": 10}
    titles = {
        "A": ("100 workers, MLP 64-200-10, digits, 10 steps of 16", "mlp"),
        "B": ("50 of 1,000 workers, logistic 64-10, synthetic, 5 steps of 10", "linear"),
        "C": (f"10 workers, CNN of 16 and 32 channels, {pictures.split('(')[0]}, 20 steps of 32", "cnn"),
    }
    made = {"A": a, "B": b, "C": c}
    return {k: Workload(*titles[k], Experiment.from_mapping(same | made[k])) for k in made}


def problem(name: str, workload: Workload, federation: Federation | None = None) -> Problem:
    """Return the arrays that every implementation is given."""
    e = workload.experiment
    f = load(e.replace({"device": "cpu"})) if federation is None else federation
    return Problem(
        name,
        workload.model,
        e.num_participants,
        e.local_steps,
        e.batch_size,
        0.1,
        f.dataset.x.numpy(),
        f.dataset.y.numpy(),
        f.train.order.numpy(),
        f.train.offsets.numpy(),
        {k: v.numpy() for k, v in f.theta.items()},
    )
