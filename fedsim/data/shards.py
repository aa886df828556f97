"""Who owns which rows of a data set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.random import bits, key


@dataclass(frozen=True, eq=False)
class Shards:
    """Rows of every worker in compressed form: worker i owns ``order[offsets[i]:offsets[i + 1]]``.

    Parameters
    ----------
    order : Tensor
        ``[n]`` int64 row numbers, worker after worker; no row twice in one worker.
    offsets : Tensor
        ``[W + 1]`` int64, from 0 to n, not decreasing.

    Examples
    --------
    >>> shards = Shards.from_assignment(np.array([1, 0, 1]), num_workers=2)
    >>> shards.rows(1)
    tensor([0, 2])
    >>> shards.sizes
    tensor([1, 2])
    """

    order: Tensor
    offsets: Tensor

    @classmethod
    def from_assignment(cls, worker_of_row: np.ndarray, num_workers: int) -> Shards:
        """Group rows by owner; a worker's rows stay in increasing order.

        Parameters
        ----------
        worker_of_row : np.ndarray
            ``[N]`` integers, the owner of each row; -1 for a row that nobody owns.
        num_workers : int
            Number of workers W >= 1.

        Returns
        -------
        Shards
            One shard a worker, some of them possibly empty.

        Raises
        ------
        ValueError
            If an owner is outside ``[-1, num_workers)``.
        """
        outside = (worker_of_row < -1) | (worker_of_row >= num_workers)
        if outside.any():
            row = int(outside.argmax())
            raise ValueError(
                f"Shards: row {row} is owned by worker {worker_of_row[row]}, must be in [-1, {num_workers})"
            )
        order = np.argsort(worker_of_row, kind="stable")
        order = order[np.count_nonzero(worker_of_row == -1) :]
        sizes = np.bincount(worker_of_row[order], minlength=num_workers)
        return cls(torch.from_numpy(order.astype(np.int64)), _offsets(torch.from_numpy(sizes)))

    @property
    def num_workers(self) -> int:
        """Number of workers W."""
        return len(self.offsets) - 1

    @property
    def sizes(self) -> Tensor:
        """Rows of each worker, ``[W]`` int64."""
        return self.offsets.diff()

    def rows(self, i: int) -> Tensor:
        """Row numbers of worker ``i``, ``[n_i]`` int64."""
        if not 0 <= i < self.num_workers:
            raise IndexError(f"Shards: worker {i} must be in [0, {self.num_workers})")
        return self.order[self.offsets[i] : self.offsets[i + 1]]


def hold_out(shards: Shards, share: float, seed: int) -> tuple[Shards, Shards]:
    """Keep back a random part of each worker's rows, ``e_i = min(round(share n_i), n_i - 1)`` of its n_i.

    Parameters
    ----------
    shards : Shards
        The rows of each worker.
    share : float
        In ``[0, 1)``.
    seed : int
        Seed of the run; a row's draw depends on the seed and the row alone.

    Returns
    -------
    tuple[Shards, Shards]
        What each worker trains on (at least one row if it has any), and its own evaluation part (may be empty).

    Raises
    ------
    ValueError
        If the share is not in ``[0, 1)``.
    """
    if not 0 <= share < 1:
        raise ValueError(f"hold_out: share = {share} must be in [0, 1)")
    sizes = shards.sizes
    held = torch.minimum((share * sizes + 0.5).long(), (sizes - 1).clamp_min(0))
    owner = torch.repeat_interleave(torch.arange(shards.num_workers), sizes)
    # sorted by (owner, draw): two stable sorts, the less significant key first
    by_draw = bits(key(seed, "hold out"), shards.order).argsort(stable=True)
    shuffled = by_draw[owner[by_draw].argsort(stable=True)]
    rank = torch.empty_like(shuffled)
    rank[shuffled] = torch.arange(len(owner)) - shards.offsets[:-1][owner]
    back = rank < held[owner]
    return (
        Shards(shards.order[~back], _offsets(sizes - held)),
        Shards(shards.order[back], _offsets(held)),
    )


def _offsets(sizes: Tensor) -> Tensor:
    """``[W + 1]`` running sums of ``[W]`` sizes, from 0."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), sizes.long().cumsum(0)])
