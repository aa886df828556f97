"""Which rows each worker uses in each local step: index tensors for a whole round, drawn at once.

A draw depends on (seed, round, worker, pass, row) alone, so it is the same on every device and for every
spread of workers over nodes. Workers are sorted by their number of steps, longest first; those that have
finished are cut off as a suffix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim import random
from fedsim.data import Shards


@dataclass(frozen=True)
class Sampling:
    """How minibatches are drawn.

    Attributes
    ----------
    batch_size : int
        Rows B of a batch, or 0 for all rows of the worker.
    local_steps : int
        Steps of a round, or 0 if ``local_epochs`` counts.
    local_epochs : int
        Passes of a round over the worker's rows, or 0.
    replacement : bool
        Draw rows with replacement; else each pass is a shuffle of its own, begun anew every round.
    seed : int
        Seed of the run.
    purpose : str
        What the minibatches are for; those for different purposes are independent.
    """

    batch_size: int
    local_steps: int
    local_epochs: int
    replacement: bool
    seed: int
    purpose: str = "batches"


class Batches(NamedTuple):
    """The rows of a round for m workers, sorted by steps, longest first.

    Attributes
    ----------
    order : Tensor
        ``[m]``, position in the caller's list of workers of each sorted worker.
    steps : Tensor
        ``[m]``, steps of each sorted worker, descending, on the CPU.
    active : list of int
        Number of workers that make step t, for t = 0..T-1; descending.
    rows : Tensor
        ``[m, T, B]`` rows of the data set, or ``[m, 1, n]`` for full batches.
    valid : Tensor or None
        Valid entries of each batch, ``[m, T]`` (or ``[m, 1]``); None if all batches are full.
    """

    order: Tensor
    steps: Tensor
    active: list[int]
    rows: Tensor
    valid: Tensor | None


class _Shuffles(NamedTuple):
    """The entries that a round has to shuffle: one for each (worker, pass, row), sorted by worker and pass."""

    worker: Tensor
    number: Tensor
    slot: Tensor
    segment: Tensor
    where: Tensor
    slot_bits: int
    segment_bits: int


class _Layout(NamedTuple):
    """What does not depend on the round, for one list of workers, sorted by steps."""

    order: Tensor
    steps: Tensor
    active: list[int]
    worker: Tensor
    offset: Tensor
    size: Tensor
    rows: Tensor | None = None
    valid: Tensor | None = None
    shuffles: _Shuffles | None = None


class Sampler:
    """Draws the `Batches` of a round.

    Parameters
    ----------
    shards : Shards
        Which rows belong to which worker.
    sampling : Sampling
        How to draw.
    device : torch.device
        Where the index tensors live.
    first : int
        Id of the first worker of the shards.
    """

    def __init__(self, shards: Shards, sampling: Sampling, device: torch.device, first: int = 0) -> None:
        self.first = first
        self.sampling = sampling
        self.device = device
        self.owned = shards.order.to(device)
        self.offsets = shards.offsets
        self._cached: tuple[tuple[bytes, bytes | None], _Layout] | None = None

    def steps(self, sizes: Tensor) -> Tensor:
        """Return the local steps of workers with ``sizes`` rows."""
        s = self.sampling
        if s.local_steps:
            return torch.full_like(sizes, s.local_steps)
        if s.batch_size == 0:
            return torch.full_like(sizes, s.local_epochs)
        return s.local_epochs * -(-sizes // s.batch_size)

    def draw(self, round: int, workers: Tensor, steps: Tensor | None = None) -> Batches:
        """Draw the batches of a round.

        Parameters
        ----------
        round : int
            Round, from 1.
        workers : Tensor
            ``[m]`` worker ids, int64 on the CPU.
        steps : Tensor or None
            ``[m]``, their local steps, >= 1, where they are not those of the sampling.

        Returns
        -------
        Batches
            On the sampler's device.
        """
        s = self.sampling
        name = workers.numpy().tobytes(), None if steps is None else steps.numpy().tobytes()
        if self._cached is None or self._cached[0] != name:
            self._cached = (name, self._layout(workers, steps))
        layout = self._cached[1]
        if layout.rows is not None:
            return Batches(layout.order, layout.steps, layout.active, layout.rows, layout.valid)
        stream = random.key(s.seed, s.purpose, round)
        if layout.shuffles is None:  # with replacement
            m, total, size = len(workers), len(layout.active), s.batch_size
            slot = torch.arange(total * size, device=self.device)
            position = random.integers(stream, layout.size[:, None], layout.worker[:, None], slot)
            where = position.add_(layout.offset[:, None]).view(-1)
            rows = self.owned.index_select(0, where).view(m, total, size)
        else:
            shuffled = _shuffle(stream, layout.shuffles)
            rows = self.owned[shuffled[layout.shuffles.where] + layout.offset[:, None, None]]
        return Batches(layout.order, layout.steps, layout.active, rows, layout.valid)

    def _layout(self, workers: Tensor, given: Tensor | None) -> _Layout:
        s = self.sampling
        first = self.offsets[workers - self.first]
        size = self.offsets[workers - self.first + 1] - first
        steps = self.steps(size) if given is None else given
        total = int(steps.max())
        if bool((steps == total).all()):
            order, active = torch.arange(len(workers)), [len(workers)] * total
        else:
            order = torch.argsort(steps, descending=True, stable=True)
            steps, first, size = steps[order], first[order], size[order]
            # active[t] = number of workers with more than t steps
            active = np.searchsorted(-steps.numpy(), -np.arange(total), side="left").tolist()
        offset, device_size = first.to(self.device), size.to(self.device)
        worker = workers[order].to(self.device)
        base = _Layout(order, steps, active, worker, offset, device_size)
        if s.batch_size == 0:
            slot = torch.arange(int(size.max()), device=self.device)
            inside = torch.minimum(slot, device_size[:, None] - 1)
            rows = self.owned[offset[:, None] + inside][:, None]
            even = bool((size == size[0]).all())
            return base._replace(rows=rows, valid=None if even else device_size[:, None])
        if s.replacement:
            return base
        # Without replacement: every worker needs ceil(steps / batches a pass) shuffles of its rows.
        b = s.batch_size
        batches = -(-size // b)
        passes = -(-steps // batches)
        segments = int(passes.sum())
        owner = torch.repeat_interleave(torch.arange(len(workers)), passes)
        passed = torch.arange(segments) - torch.repeat_interleave(torch.cumsum(passes, 0) - passes, passes)
        length = size[owner]
        start = torch.cumsum(length, 0) - length
        segment = torch.repeat_interleave(torch.arange(segments), length)
        slot = torch.arange(int(length.sum())) - start[segment]
        # Entry of (worker, step, place): start of its pass + place within the pass.
        t = torch.arange(total)
        of_pass, of_batch = t // batches[:, None], t % batches[:, None]
        begin = (torch.cumsum(passes, 0) - passes)[:, None] + torch.minimum(of_pass, passes[:, None] - 1)
        inside = of_batch[..., None] * b + torch.arange(b)
        where = start[begin][..., None] + torch.minimum(inside, size[:, None, None] - 1)
        count = torch.clamp(size[:, None] - of_batch * b, max=b)
        uneven = bool((count[steps[:, None] > t] < b).any())
        shuffles = _Shuffles(
            worker=workers[order][owner][segment].to(self.device),
            number=passed[segment].to(self.device),
            slot=slot.to(self.device),
            segment=segment.to(self.device),
            where=where.to(self.device),
            slot_bits=int(size.max()).bit_length(),
            segment_bits=segments.bit_length(),
        )
        return base._replace(valid=count.to(self.device) if uneven else None, shuffles=shuffles)


def _shuffle(stream: int, entries: _Shuffles) -> Tensor:
    """Shuffle the slots within each segment by their hashes."""
    # Segment, hash and slot are packed into one positive number: one plain sort does it, and ties are broken
    # in the same way everywhere.
    hashed = random.bits(stream, entries.worker, entries.number, entries.slot)
    free = 63 - entries.slot_bits - entries.segment_bits
    noise = (hashed >> (64 - free)) & ((1 << free) - 1)
    packed = (((entries.segment << free) | noise) << entries.slot_bits) | entries.slot
    if packed.device.type == "cpu":
        ordered = torch.from_numpy(np.sort(packed.numpy()))
    else:
        ordered = torch.sort(packed).values
    return ordered & ((1 << entries.slot_bits) - 1)
