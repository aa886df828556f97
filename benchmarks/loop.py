"""The usual sequential simulation: a copy of the model and an optimiser object a worker."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.nets import build
from benchmarks.problem import Problem, Trained


def train(file: Path, rounds: int, device: str) -> Trained:
    """Train worker after worker, then average their state dictionaries."""
    problem = Problem.load(file)
    model = build(problem).to(device)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in problem.theta.items()})
    x, y = torch.from_numpy(problem.x).to(device), torch.from_numpy(problem.y).to(device)
    shards = [torch.from_numpy(problem.rows(i)).to(device) for i in range(problem.num_workers)]
    chooser = np.random.default_rng(0)
    batches = torch.Generator(device).manual_seed(0)
    loss_of = nn.CrossEntropyLoss()
    ends = []
    for _ in range(rounds):
        chosen = np.sort(chooser.choice(problem.num_workers, problem.participants, replace=False))
        share = problem.sizes[chosen] / problem.sizes[chosen].sum()
        mean = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
        for worker, weight in zip(chosen, share, strict=True):
            local, shard = copy.deepcopy(model), shards[worker]
            optimizer = torch.optim.SGD(local.parameters(), lr=problem.lr)
            for _ in range(problem.steps):
                pick = torch.randint(len(shard), (problem.batch,), generator=batches, device=device)
                rows = shard[pick]
                optimizer.zero_grad()
                loss_of(local(x[rows]), y[rows]).backward()
                optimizer.step()
            for k, v in local.state_dict().items():
                mean[k] += float(weight) * v
        model.load_state_dict(mean)
        if device != "cpu":
            torch.cuda.synchronize()
        ends.append(time.monotonic())
    return Trained(ends, {k: v.cpu().numpy() for k, v in model.state_dict().items()})
