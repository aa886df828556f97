"""The three models in plain PyTorch, with the parameter names of fedsim's."""

from __future__ import annotations

from torch import nn

from benchmarks.problem import Problem


def build(problem: Problem) -> nn.Sequential:
    """Build the module of a problem; its parameters are not the problem's."""
    shapes = [v.shape for v in problem.theta.values()]
    if problem.model == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(shapes[0][1], shapes[0][0]))
    if problem.model == "mlp":
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(shapes[0][1], shapes[0][0]),
            nn.ReLU(),
            nn.Linear(shapes[2][1], shapes[2][0]),
        )
    first, second, last = shapes[0], shapes[2], shapes[4]
    return nn.Sequential(
        nn.Conv2d(first[1], first[0], 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(second[1], second[0], 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(last[1], last[0]),
    )
