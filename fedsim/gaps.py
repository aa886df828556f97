"""Worker-average gaps: how far workers end a round from their average, kept in a buffer and turned into a subspace.

``gap_m = x_m - sum_j p_j x_j`` for the rows ``x_m`` of a round and weights ``p_m`` that sum to 1, so that
``sum_m p_m gap_m = 0``. Everything is immutable: a push gives a new buffer that shares the old one's blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedsim.tree import Stack, Tree

CUT = 1e-10
"""Eigenvalues of a Gram matrix below this share of the largest are rounding."""


class Gaps(NamedTuple):
    """Gaps of one round.

    Attributes
    ----------
    values : Tensor
        ``[M, P]``, columns in the key order of the rows.
    gram : Tensor
        ``[M, M]`` inner products in float64, as precise as the values, on the CPU.
    weight : Tensor
        ``[M]`` float64, sums to 1, on the CPU.
    """

    values: Tensor
    gram: Tensor
    weight: Tensor


def gaps(rows: Stack, weight: Tensor, dtype: torch.dtype | None = None) -> Gaps:
    """Subtract the weighted mean from every row, ``x_m - sum_j p_j x_j`` with ``p = weight / sum(weight)``.

    Gaps are a few thousandths of the parameters, and a difference of float32 numbers from their float32 mean
    spoils the rank of the Gram matrix. So the row of largest weight is subtracted first, ``y = x - x_l``, and then the
    mean of what is left, ``y - mean(y)``: both differences are rounded in proportion to gaps. The result is that
    of float64 arithmetic, rounded to the given type. Time O(M^2 P); memory M P numbers.

    Parameters
    ----------
    rows : Stack
        Parameters after the local steps, leaves ``[M, *]``.
    weight : Tensor
        ``[M]``, nonnegative, not all zero: those with which the server averages.
    dtype : torch.dtype or None
        Type of the arithmetic and of the gaps, float32 or float64; that of the rows if None.

    Returns
    -------
    Gaps
        On the rows' device.

    Examples
    --------
    >>> found = gaps({"w": torch.tensor([[0.0], [2.0], [4.0]])}, torch.ones(3))
    >>> found.values.T, found.gram[0]
    (tensor([[-2.,  0.,  2.]]), tensor([ 4.,  0., -4.], dtype=torch.float64))
    """
    leaves = [x.reshape(x.shape[0], -1) for x in rows.values()]
    dtype = dtype or leaves[0].dtype
    share = weight.to(leaves[0].device, torch.float64)
    share = share / share.sum()
    m, p, largest = len(share), share.to(dtype), int(share.argmax())
    values = leaves[0].new_empty(m, sum(x.shape[1] for x in leaves), dtype=dtype)
    gram = torch.zeros(m, m, dtype=torch.float64, device=share.device)
    start = 0
    for leaf in leaves:
        for part in leaf.split(_block(leaf), dim=1):
            x = part.to(dtype)
            y = x - x[largest]
            gap = torch.sub(y, p @ y, out=values[:, start : start + y.shape[1]])
            gram += gap @ gap.T
            start += y.shape[1]
    return Gaps(values, gram.cpu(), share.cpu())


def _block(like: Tensor) -> int:
    """Columns handled at a time: they stay in the cache of a CPU."""
    return 2**14 if like.device.type == "cpu" else 2**20


class Buffer(NamedTuple):
    """The newest gaps of a run, oldest first (FIFO).

    Memory is 4 c P bytes for c gaps in float32, and 8 c^2 for the Gram matrix.

    Attributes
    ----------
    blocks : tuple of Tensor
        ``[m_r, P]`` for every round r that still has gaps here.
    round, worker, participants : Tensor
        ``[n]`` int64: round and worker of each gap, and how many gaps its round had.
    weight : Tensor
        ``[n]`` float64 aggregation weights.
    gram : Tensor
        ``[g, g]`` float64 inner products of the first g <= n gaps; `with_gram` adds the others.
    """

    blocks: tuple[Tensor, ...]
    round: Tensor
    worker: Tensor
    participants: Tensor
    weight: Tensor
    gram: Tensor

    @property
    def size(self) -> int:
        """Number n of gaps."""
        return len(self.round)

    @property
    def num_rounds(self) -> int:
        """Number of different rounds."""
        return len(self.blocks)

    @property
    def rank(self) -> int:
        """Rank of the gaps in general position: n minus the number of rounds that are wholly inside."""
        _, inverse, inside = self.round.unique(return_inverse=True, return_counts=True)
        whole = (inside[inverse] == self.participants).double() / self.participants
        return self.size - round(float(whole.sum()))

    def matrix(self) -> Tensor:
        """All gaps as rows, ``[n, P]``, oldest first."""
        return torch.cat(self.blocks)


def empty_buffer() -> Buffer:
    """Return a buffer without gaps."""
    none = torch.zeros(0, dtype=torch.int64)
    return Buffer((), none, none, none, none.double(), torch.zeros(0, 0, dtype=torch.float64))


def push(buffer: Buffer, new: Gaps, round: int, worker: Tensor, capacity: int) -> Buffer:
    """Append the gaps of a round and drop the oldest beyond the capacity, one by one; O(1), nothing is copied.

    Parameters
    ----------
    buffer : Buffer
        Gaps so far.
    new : Gaps
        Gaps of the round; if all are zero, as those of a lone participant, they are not pushed.
    round : int
        Round, larger than all before.
    worker : Tensor
        ``[M]`` ids in the order of the gaps.
    capacity : int
        Gaps c to keep, >= 1.

    Returns
    -------
    Buffer
        A new buffer; the old one is as it was.

    Raises
    ------
    ValueError
        If the capacity is below 1.
    """
    if capacity < 1:
        raise ValueError(f"push: capacity = {capacity} must be >= 1")
    m = len(new.values)
    if m < 2 or not new.gram.any():
        return buffer
    numbers = torch.full((m,), round, dtype=torch.int64)
    return newest(
        Buffer(
            (*buffer.blocks, new.values),
            torch.cat([buffer.round, numbers]),
            torch.cat([buffer.worker, worker.cpu()]),
            torch.cat([buffer.participants, torch.full_like(numbers, m)]),
            torch.cat([buffer.weight, new.weight]),
            buffer.gram,
        ),
        capacity,
    )


def newest(buffer: Buffer, capacity: int) -> Buffer:
    """Return the newest ``capacity`` gaps of a buffer: their span is nested in that of the whole."""
    drop = max(0, buffer.size - capacity)
    if not drop:
        return buffer
    blocks, left = list(buffer.blocks), drop
    while left >= len(blocks[0]):
        left -= len(blocks.pop(0))
    blocks[0] = blocks[0][left:]
    return Buffer(
        tuple(blocks),
        buffer.round[drop:],
        buffer.worker[drop:],
        buffer.participants[drop:],
        buffer.weight[drop:],
        buffer.gram[drop:, drop:],
    )


def with_gram(buffer: Buffer) -> Buffer:
    """Complete the Gram matrix ``G = D D^T``; O(m n P) for the m gaps that came since the last time."""
    known, n = len(buffer.gram), buffer.size
    if known == n:
        return buffer
    new, count = [], 0
    for block in reversed(buffer.blocks):
        if count < n - known:
            new.insert(0, block)
            count += len(block)
    cross = products(buffer.blocks, new)[:, count - (n - known) :].cpu()  # [n, n - known]
    gram = torch.zeros(n, n, dtype=torch.float64)
    gram[:known, :known] = buffer.gram
    gram[:, known:] = cross
    gram[known:, :known] = cross[:known].T
    return buffer._replace(gram=gram)


def products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Multiply rows with rows, ``A B^T`` in float64, a block of columns at a time.

    Parameters
    ----------
    left, right : sequence of Tensor
        Blocks ``[*, P]`` of the rows of A and of B.

    Returns
    -------
    Tensor
        ``[n, m]`` float64.
    """
    total, size = torch.zeros((), dtype=torch.float64, device=left[0].device), _block(left[0])
    for start in range(0, left[0].shape[1], size):
        part = slice(start, start + size)
        a, b = (torch.cat([x[:, part].double() for x in rows]) for rows in (left, right))
        total = total + a @ b.T
    return total


class Subspace(NamedTuple):
    """Orthonormal basis ``Q = D^T mix`` of the span of n vectors, without forming it.

    Attributes
    ----------
    blocks : tuple of Tensor
        The rows of D, ``[*, P]`` each.
    mix : Tensor
        ``[n, q]`` float64.
    """

    blocks: tuple[Tensor, ...]
    mix: Tensor

    @property
    def rank(self) -> int:
        """Dimension q."""
        return self.mix.shape[1]

    def coordinates(self, vectors: Tensor) -> Tensor:
        """Return ``Q^T v`` for every row v of ``vectors`` ``[m, P]``, as columns ``[q, m]`` float64; O(n m P)."""
        return self.mix.T @ products(self.blocks, [vectors])

    def basis(self) -> Tensor:
        """Return Q, ``[P, q]`` float64, orthonormal to rounding by a thin QR; 8 q P bytes, O(n q P)."""
        columns = [
            torch.cat([x[:, part].double() for x in self.blocks]).T @ self.mix
            for part in _slices(self.blocks[0])
        ]
        return torch.linalg.qr(torch.cat(columns)).Q


def _slices(like: Tensor) -> list[slice]:
    size = _block(like)
    return [slice(start, start + size) for start in range(0, like.shape[1], size)]


def subspace(buffer: Buffer, rank: int | None = None) -> Subspace:
    """Return the span of a buffer's gaps: eigenvectors of the Gram matrix above the cut.

    ``(e, V) = eigh(G)``, ``Q = D^T V diag(e)^(-1/2)`` over the eigenvalues ``e_j > 1e-10 max(e)``.

    Parameters
    ----------
    buffer : Buffer
        At least one gap that is not zero.
    rank : int or None
        Keep only so many of the largest eigenvalues; all if None.

    Returns
    -------
    Subspace
        Of dimension `Buffer.rank` for gaps in general position, or ``rank``.

    Raises
    ------
    ValueError
        If there is no gap or all are zero.
    """
    complete = with_gram(buffer)
    values, vectors = torch.linalg.eigh(complete.gram)
    kept = values > CUT * values[-1] if len(values) else values.bool()
    if not kept.any() or not values[-1] > 0:
        raise ValueError("subspace: the buffer holds no gap that is not zero")
    e, v = values[kept].flip(0)[:rank], vectors[:, kept].flip(1)[:, :rank]
    return Subspace(buffer.blocks, (v / e.sqrt()).to(buffer.blocks[0].device))


def subspace_of(rows: Tensor, rank: int | None = None) -> Subspace:
    """Return the span of the rows of any matrix ``[n, P]``, for instance centred gradients (see `subspace`)."""
    n = len(rows)
    number = torch.arange(n)
    weight = torch.full((n,), 1 / n, dtype=torch.float64)
    gram = torch.zeros(0, 0, dtype=torch.float64)
    return subspace(Buffer((rows,), number, number, number + 2, weight, gram), rank)


def to_trees(buffer: Buffer) -> dict[str, Tree]:
    """Write a buffer as two trees, for checkpoints and strategies' states."""
    names = (f"{int(r):09d}" for r in buffer.round.unique(sorted=True))
    entries = {
        "round": buffer.round,
        "worker": buffer.worker,
        "participants": buffer.participants,
        "weight": buffer.weight,
        "gram": buffer.gram,
    }
    return {"gaps": dict(zip(names, buffer.blocks, strict=True)), "entries": entries}


def from_trees(trees: dict[str, Tree]) -> Buffer:
    """Read what `to_trees` wrote; an empty buffer if there is nothing."""
    if not trees.get("gaps"):
        return empty_buffer()
    blocks = trees["gaps"]
    entries = {k: x.cpu() for k, x in trees["entries"].items()}
    return Buffer(blocks=tuple(blocks[k] for k in sorted(blocks)), **entries)
