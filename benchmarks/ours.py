"""fedsim through its public entry point, with history, checkpoints and figures."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import fedsim
from benchmarks.problem import Problem, Trained
from benchmarks.workloads import workloads
from fedsim.probes import Snapshot


def train(file: Path, rounds: int, device: str) -> Trained:
    """Run the workload; the last round evaluates the model."""
    return _run(file, rounds, device, eval_every=0)


def train_and_evaluate(file: Path, rounds: int, device: str) -> Trained:
    """Run the workload and evaluate the model on the whole test set after every round."""
    return _run(file, rounds, device, eval_every=1)


def train_with_flowers_strategy(file: Path, rounds: int, device: str) -> Trained:
    """Run the workload with the averaging that ships with Flower, which sees a message a worker."""
    return _run(file, rounds, device, eval_every=0, strategy="flwr.FedAvg()")


def _run(file: Path, rounds: int, device: str, eval_every: int, strategy: str = "FedAvg()") -> Trained:
    ends: list[float] = []

    def note(snapshot: Snapshot, experiment: fedsim.Experiment) -> None:
        ends.append(time.monotonic())

    with tempfile.TemporaryDirectory(prefix="fedsim-") as folder:
        changes = {"rounds": rounds, "device": device, "eval-every": eval_every, "strategy": strategy}
        changes["out"] = f"{folder}/run"
        experiment = workloads()[Problem.load(file).name].experiment.replace(changes)
        run = fedsim.run(experiment, progress=note)
    model = {k: v.cpu().numpy() for k, v in run.model.items()}
    losses = run.history["test_loss"].tolist() if eval_every else []
    return Trained(ends, model, f"plan {run.summary['plan']}", losses)
