"""The reference protocol for worker disagreement: digits, a tanh network, 16 workers that draw from the same rows."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fedsim.analysis import disagreement as D
from fedsim.analysis.hessian import Eigenpairs, TrainingLoss, dominant
from fedsim.experiment import Experiment
from fedsim.federation import Federation, load
from fedsim.gaps import Buffer, Subspace, from_trees, newest, subspace
from fedsim.probes.disagreement import training_loss
from fedsim.simulate import Position, rounds
from fedsim.tree import Tree

SETTINGS = {
    "data": "Digits(test=0.0)",
    "partition": "Shared()",
    "model": "MLP(hidden=(32, 32), activation='tanh')",
    "objective": "SquaredError()",
    "client": "SGD(lr=0.01)",
    "strategy": "FedAvg(weighting='uniform')",
    "probes": "Disagreement(capacity=128)",
    "num_workers": 16,
    "rounds": 200,
    "local_steps": 8,
    "batch_size": 50,
    "replacement": True,
    "eval_every": 0,
}
CAPACITIES = (8, 16, 32, 64, 128)


class Checkpoint(NamedTuple):
    """A run at one of its rounds."""

    round: int
    federation: Federation
    problem: TrainingLoss
    theta: Tree
    gradient: torch.Tensor
    pairs: Eigenpairs
    buffer: Buffer
    position: Position

    def span(self, capacity: int) -> Subspace:
        return subspace(newest(self.buffer, capacity))

    def captures(self) -> list[D.Capture]:
        return [D.capture(self.gradient, self.pairs.vectors, self.span(c)) for c in CAPACITIES]


def std(**changes) -> Experiment:
    return Experiment.from_mapping(SETTINGS | changes)


def checkpoints(experiment: Experiment, at: tuple[int, ...], k: int = 10) -> list[Checkpoint]:
    """Run the experiment and look at it after some of its rounds."""
    federation = load(experiment)
    problem, found = training_loss(federation), []
    for snapshot, position in rounds(experiment, federation):
        if snapshot.round in at:
            theta = snapshot.model
            pairs = dominant(problem, theta, k)
            buffer = from_trees(position.memories[0])
            gradient, _ = problem.gradient(theta)
            found.append(
                Checkpoint(snapshot.round, federation, problem, theta, gradient, pairs, buffer, position)
            )
        if snapshot.round == max(at):
            break
    return found
