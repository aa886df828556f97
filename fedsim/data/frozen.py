"""Activations of a network that was trained once, centrally, and is then frozen: training the last layer on them is linear."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.checks import at_least, positive
from fedsim.data.dataset import Dataset, Source
from fedsim.data.sources import Digits
from fedsim.layers import encoder
from fedsim.random import key, numpy_generator

BATCH = 64
"""Rows of a minibatch of the central training."""


@dataclass(frozen=True)
class FrozenFeatures:
    """Penultimate activations of a small network trained centrally on the classes of another source, ``x`` ``[N, width]``.

    Pictures of at least 16x16 pixels pass three 3x3 convolutions with ReLU and 2x2 pooling, other numbers one hidden ReLU
    layer of ``2 width``; then comes a layer of ``width`` ReLU units, the features. Tokens ``[N, T]`` pass a transformer encoder of two
    blocks, and its last position is the features. A linear head is trained with it and thrown away. Features are float64, scaled so that training rows have mean norm 1. Federated training of ``Linear(bias=False)`` on them
    is last-layer fine-tuning, to which all that holds for linear models applies exactly.

    Parameters
    ----------
    inner : Source
        A source with classes; its training rows alone are used to train.
    width : int
        Features d, >= 1.
    epochs : int
        Passes of the central training, >= 0; 0 leaves random features.
    lr : float
        Learning rate of Adam, > 0.

    Raises
    ------
    ValueError
        If an argument is outside its range; when loading, if the inner source has no classes.

    Examples
    --------
    >>> data = FrozenFeatures(Digits(), width=16, epochs=1).load(seed=0, num_workers=1)
    >>> tuple(data.x.shape), round(data.x.norm(dim=1).mean().item(), 6)
    ((1347, 16), 1.0)
    """

    inner: Source = Digits()  # noqa: RUF009 - it is frozen
    width: int = 64
    epochs: int = 10
    lr: float = 1e-3

    def __post_init__(self) -> None:
        at_least(self, 1, "width")
        at_least(self, 0, "epochs")
        positive(self, "lr")

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Train the network, a function of the seed, and replace every row by its activations."""
        data = self.inner.load(seed, num_workers)
        if data.task != "classes":
            raise ValueError(f"FrozenFeatures: the task of {data.name} is {data.task!r}, must be 'classes'")
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            # Layers draw their initial parameters from the default generator, which is put back afterwards.
            torch.default_generator.manual_seed(key(seed, "frozen"))
            tokens = not data.x.is_floating_point()
            body = _Reader(data, self.width) if tokens else self._body(data.input_shape)
            head = nn.Linear(self.width, data.num_outputs)
        network = nn.Sequential(body, head)
        optimiser = torch.optim.Adam(network.parameters(), lr=self.lr)
        rng = numpy_generator(seed, "frozen batches")
        with torch.enable_grad():
            for _ in range(self.epochs):
                for rows in torch.from_numpy(rng.permutation(len(data.x))).split(BATCH):
                    optimiser.zero_grad(set_to_none=True)
                    F.cross_entropy(network(data.x[rows]), data.y[rows]).backward()
                    optimiser.step()
        x, test_x = _activations(body, data.x), _activations(body, data.test_x)
        scale = x.norm(dim=1).mean().clamp(min=torch.finfo(x.dtype).tiny)
        return Dataset(
            x / scale,
            data.y,
            test_x / scale,
            data.test_y,
            data.num_outputs,
            "classes",
            f"{data.name} features",
            data.workers,
            data.labels,
        )

    def _body(self, shape: tuple[int, ...]) -> nn.Sequential:
        if len(shape) == 3 and min(shape[1:]) >= 16:
            layers: list[nn.Module] = []
            channels = shape[0]
            for out in (32, 64, 64):
                layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
                channels = out
            fan_in = channels * (shape[1] // 8) * (shape[2] // 8)
        else:
            layers = [nn.Flatten(), nn.Linear(math.prod(shape), 2 * self.width), nn.ReLU()]
            fan_in = 2 * self.width
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(fan_in, self.width), nn.ReLU())


class _Reader(nn.Module):
    """Embedding plus positions and a transformer encoder of two blocks; gives the vector of the last position."""

    def __init__(self, data: Dataset, width: int) -> None:
        super().__init__()
        largest = max(int(x.max()) for x in (data.x, data.test_x) if len(x))
        self.embedding = nn.Embedding(largest + 1, width)
        self.position = nn.Embedding(data.x.shape[1], width)
        self.body = encoder(2, width, math.gcd(8, width), 2)[:-1]  # a final norm would leave d - 1 dimensions
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``[B, T]`` to ``[B, width]``."""
        return self.body(self.embedding(tokens) + self.position.weight)[:, -1]


def _activations(body: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([body(part) for part in x.split(1024)]).double()
