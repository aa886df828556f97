"""Model, data and training."""

import functools
from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@functools.cache
def read(path: str) -> dict[str, np.ndarray]:
    """Read the file with all clients' rows; each process does it once."""
    with np.load(path) as arrays:
        return {k: arrays[k] for k in arrays.files}


def initial_parameters(path: str) -> "OrderedDict[str, Tensor]":
    """Return the state dictionary from which all implementations start."""
    named = [(k.removeprefix("theta/"), v) for k, v in read(path).items() if k.startswith("theta/")]
    return OrderedDict((k, torch.from_numpy(v.copy())) for k, v in named)


def make_net(path: str) -> nn.Module:
    """Build the model whose parameters the file holds."""
    shapes = [v.shape for v in initial_parameters(path).values()]
    if len(shapes) == 2:
        return nn.Sequential(nn.Flatten(), nn.Linear(shapes[0][1], shapes[0][0]))
    if len(shapes) == 4:
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(shapes[0][1], shapes[0][0]),
            nn.ReLU(),
            nn.Linear(shapes[2][1], shapes[2][0]),
        )
    return nn.Sequential(
        nn.Conv2d(shapes[0][1], shapes[0][0], 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(shapes[2][1], shapes[2][0], 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(shapes[4][1], shapes[4][0]),
    )


def load_data(partition_id: int, path: str) -> tuple[Tensor, Tensor]:
    """Return the rows of one client."""
    arrays = read(path)
    begin, end = arrays["offsets"][partition_id : partition_id + 2]
    rows = arrays["order"][begin:end]
    return torch.from_numpy(arrays["x"][rows]), torch.from_numpy(arrays["y"][rows])


def train(
    net: nn.Module, x: Tensor, y: Tensor, steps: int, batch: int, lr: float, device: torch.device
) -> float:
    """Make some steps of SGD and return the mean loss."""
    net.to(device).train()
    x, y = x.to(device), y.to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    running = 0.0
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,), device=device)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        running += loss.item()
    return running / steps


def test(net: nn.Module, x: Tensor, y: Tensor, device: torch.device) -> tuple[float, float]:
    """Return mean loss and accuracy."""
    net.to(device).eval()
    with torch.no_grad():
        output = net(x.to(device))
        loss = F.cross_entropy(output, y.to(device)).item()
        accuracy = (output.argmax(1) == y.to(device)).float().mean().item()
    return loss, accuracy
