"""Problems with a closed form: nothing but a function to minimise, the same for all workers or one for each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedsim.checks import at_least
from fedsim.data.dataset import Dataset
from fedsim.random import numpy_generator


@dataclass(frozen=True)
class Blank:
    """No data: every worker owns one row, and all rows are 0; for models that are functions of their parameters.

    The test set is one such row, so that the test loss of ``objective = "Value()"`` is the value of the function.
    """

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Make ``x [W, 1]`` and ``y [W]``, 0."""
        x = torch.zeros(num_workers, 1)
        owner = torch.arange(num_workers)
        return Dataset(x, x[:, 0], x[:1], x[:1, 0], 1, "regression", "blank", owner)


@dataclass(frozen=True)
class Parabolas:
    """Worker i minimises ``a_i (w - b_i)^2 / 2``, with ``model = "Scalar(...)"`` and ``SquaredError(half=True)``.

    The mean of all is least at ``sum_i a_i b_i / sum_i a_i``.

    Parameters
    ----------
    a : tuple of float
        Curvatures, > 0, one a worker.
    b : tuple of float
        Minimisers.

    Raises
    ------
    ValueError
        If their numbers differ or a curvature is not positive; when loaded, if there are more or fewer workers.
    """

    a: tuple[float, ...] = (1.0, 2.0, 0.5, 1.5)
    b: tuple[float, ...] = (0.0, 1.0, -1.0, 2.0)

    def __post_init__(self) -> None:
        if not self.a or not min(self.a) > 0:
            raise ValueError(f"Parabolas: a = {self.a} must be numbers > 0")
        if len(self.b) != len(self.a):
            raise ValueError(f"Parabolas: b = {self.b} must have {len(self.a)} numbers, as many as a")

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Write the squares as a regression on one feature, ``x = sqrt(a)``, ``y = sqrt(a) b``."""
        if num_workers != len(self.a):
            raise ValueError(f"Parabolas: a has {len(self.a)} numbers, for {num_workers} workers")
        root = torch.tensor(self.a, dtype=torch.float64).sqrt()
        y = root * torch.tensor(self.b, dtype=torch.float64)
        x = root[:, None]
        return Dataset(x, y, x[:0], y[:0], 1, "regression", "parabolas", torch.arange(num_workers))


@dataclass(frozen=True)
class LowRank:
    """One matrix U of ``size`` x ``rank`` N(0, 1) numbers, which every worker owns and the test set holds.

    The target of ``model = "Factorisation()"`` with ``objective = "Value()"``.

    Parameters
    ----------
    size : int
        Rows of U, >= 1.
    rank : int
        Columns of U, >= 1.

    Raises
    ------
    ValueError
        If a number is below 1.
    """

    size: int = 1000
    rank: int = 1

    def __post_init__(self) -> None:
        at_least(self, 1, "size", "rank")

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Draw U and give it to all workers, ``x [W, size, rank]``."""
        draw = numpy_generator(seed, "low rank").standard_normal((1, self.size, self.rank))
        u, owner = torch.from_numpy(draw), torch.arange(num_workers)
        y = torch.zeros(num_workers, dtype=torch.float64)
        x = u.expand(num_workers, -1, -1)
        return Dataset(x, y, u, y[:1], 1, "regression", "low rank", owner)
