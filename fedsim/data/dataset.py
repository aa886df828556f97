"""What a source of data gives: one data set, all rows in memory, not yet shared out among workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fedsim.data.cuts import Cuts


class Domains(NamedTuple):
    """What a data set with a held-out domain adds: rows of the training domains that nobody trains on.

    Attributes
    ----------
    x, y : Tensor
        ``[M, *]`` and ``[M]``, as in `Dataset`.
    domain : Tensor
        ``[M]`` int64, 0 to E - 1: the training domain of each row.
    names : tuple of str
        Names of the E training domains.
    held_out : str
        Name of the domain of the central test set.
    """

    x: Tensor
    y: Tensor
    domain: Tensor
    names: tuple[str, ...]
    held_out: str


TASKS = ("classes", "binary", "regression", "tokens")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows to train on and a central set to test on.

    Parameters
    ----------
    x : Tensor
        ``[N, *]`` float32 features (images ``[N, C, H, W]``), or int64 tokens ``[N, T]`` of text.
    y : Tensor
        ``[N]`` int64 labels in ``[0, num_outputs)``; ``[N]`` in {0, 1} for ``"binary"``; ``[N]`` float targets for
        ``"regression"``; ``[N, T]`` int64 next tokens for ``"tokens"``.
    test_x, test_y : Tensor
        Central test set of the same form; may have no rows.
    num_outputs : int
        Classes C; the size of the vocabulary for ``"tokens"``; 1 for ``"regression"`` and ``"binary"``.
    task : str
        ``"classes"``, ``"binary"``, ``"regression"`` or ``"tokens"``.
    name : str
        Name for messages and plots.
    workers : Tensor | None
        ``[N]`` int64, the worker each row comes from by nature, where the source knows it.
    labels : tuple[str, ...]
        Names of the classes, or the characters of the vocabulary; empty if there are none.
    cuts : Cuts | None
        Where local steps take other parts of the training pictures at each use; ``x`` holds their middle parts.
    domains : Domains | None
        Where the test set is a domain that no worker has: rows to evaluate on within the others.

    Raises
    ------
    ValueError
        If the task is unknown, rows and labels differ in number, or train and test rows differ in shape.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_outputs: int
    task: str
    name: str
    workers: Tensor | None = None
    labels: tuple[str, ...] = ()
    cuts: Cuts | None = None
    domains: Domains | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"Dataset: task = {self.task!r} must be one of {', '.join(TASKS)}")
        for part, x, y in (("", self.x, self.y), ("test_", self.test_x, self.test_y)):
            if len(x) != len(y):
                raise ValueError(f"Dataset: {part}x has {len(x):,} rows, {part}y has {len(y):,}")
        if self.x.shape[1:] != self.test_x.shape[1:]:
            raise ValueError(
                f"Dataset: rows of x are {tuple(self.x.shape[1:])}, of test_x {tuple(self.test_x.shape[1:])}"
            )
        if self.cuts is not None and self.cuts.middle().shape != self.x.shape:
            raise ValueError(
                f"Dataset: x has shape {tuple(self.x.shape)}, the middle parts of its pictures "
                f"{tuple(self.cuts.middle().shape)}"
            )
        if self.workers is not None and self.workers.shape != self.x.shape[:1]:
            raise ValueError(
                f"Dataset: workers has shape {tuple(self.workers.shape)}, must be ({len(self.x)},)"
            )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one row of ``x``."""
        return tuple(self.x.shape[1:])


class Source(Protocol):
    """Where a data set comes from, e.g. ``Digits()`` or ``Hub("ylecun/mnist")``."""

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Read or make the data set; the same seed gives the same rows for any number of workers."""
        ...


def standardise(x: Tensor, test_x: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and scale every channel, ``(x - mean) / std``, by the training rows' mean and population std.

    Parameters
    ----------
    x : Tensor
        ``[N, C, *]`` float, N >= 1; changed in place.
    test_x : Tensor
        ``[M, C, *]`` float; changed in place.

    Returns
    -------
    tuple[Tensor, Tensor]
        Both parts; a channel that is constant over the training rows becomes 0 there.
    """
    axes = [i for i in range(x.ndim) if i != 1]
    variance, mean = torch.var_mean(x, dim=axes, correction=0, keepdim=True)
    std = torch.where(variance > 0, variance.sqrt(), torch.ones_like(variance))
    return x.sub_(mean).div_(std), test_x.sub_(mean).div_(std)
