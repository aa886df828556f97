"""Rows made from a formula, as many as wanted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from fedsim.checks import at_least, positive, unit
from fedsim.data.dataset import Dataset
from fedsim.random import numpy_generator


@dataclass(frozen=True)
class Synthetic:
    """Gaussian classes, ``x = mu_y + e`` with ``e ~ N(0, I_F)`` and ``mu_c = 4 / (sqrt(2) difficulty) u_c``.

    The directions ``u_c`` are random unit vectors, orthogonal where features >= classes. Then any two means are
    ``d = 4 / difficulty`` apart, and the nearest mean, which no classifier beats, errs on a share of

        1 - E[Phi(z + d / sqrt(2))^(C - 1)],   z ~ N(0, 1);

    for C = 10 that is 2.7e-4 at difficulty 0.5, 0.12 at 1 and 0.52 at 2; for C = 2 it is ``Phi(-d / 2)``, 3.2e-5,
    0.023 and 0.16. With fewer features than classes means come closer and the error is larger.

    Parameters
    ----------
    rows : int
        Rows to train and to test on together, >= 1.
    features : int
        Entries F of a row, >= 1.
    classes : int
        Classes C >= 2, equally frequent.
    difficulty : float
        Noise relative to the distance between classes, > 0.
    test : float
        Share of the rows in the central test set, in ``[0, 1)``.

    Raises
    ------
    ValueError
        If an argument is not admissible.
    """

    rows: int = 10_000
    features: int = 32
    classes: int = 10
    difficulty: float = 1.0
    test: float = 0.2

    def __post_init__(self) -> None:
        at_least(self, 1, "rows", "features")
        at_least(self, 2, "classes")
        positive(self, "difficulty")
        unit(self, "test")

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Make ``x [N, F]`` and ``y [N]``; the number of workers does not matter."""
        rng = numpy_generator(seed, "synthetic")
        directions = rng.standard_normal((self.features, self.classes))
        if self.features >= self.classes:
            directions = np.linalg.qr(directions)[0]
        directions /= np.linalg.norm(directions, axis=0)
        means = (2 * math.sqrt(2) / self.difficulty * directions.T).astype(np.float32)
        y = rng.permutation(np.arange(self.rows) % self.classes)
        x = rng.standard_normal((self.rows, self.features), dtype=np.float32)
        x += means[y]
        train = max(1, int((1 - self.test) * self.rows))
        tensors = [torch.from_numpy(part) for part in (x[:train], y[:train], x[train:], y[train:])]
        return Dataset(*tensors, num_outputs=self.classes, task="classes", name="synthetic")
