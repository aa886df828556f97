"""A subspace for workers to filter their gradients with: the span of the gaps that the server has seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedsim import checks, random, tree
from fedsim.gaps import Buffer, from_trees, gaps, push, subspace, to_trees
from fedsim.tree import Stack
from strategies.base import Broadcast, Report
from strategies.basis import BasisRule, Own, like_model


@dataclass(frozen=True)
class GapFilter(BasisRule):
    """Wrap a strategy and send, as channel ``basis``, an orthonormal basis of the newest worker-average gaps.

    To be used with the client ``Filtered(...)``, which removes that subspace from its gradients, or with any client
    and ``update = "remove"`` or "keep", where the server filters the updates instead. Gaps are ``x_m - sum_j p_j x_j``
    of the rows that workers send, with the inner strategy's weights. From the end of round ``warm_up`` on, the basis is

    * ``fifo``: the span of the newest gaps, renewed every ``refresh`` rounds. Gaps of filtered workers are orthogonal
      to it, so that the buffer forgets the sharp directions in time;
    * ``raw``: the same, for workers that send unfiltered steps along the filtered path,
      ``x_m = x - eta sum_s g_s`` for SGD, whose gaps do not forget. Filtering is linear, so
      ``x + (I - Q Q^T)(x_m - x)`` is where such a worker really is, and that is what is merged. Not for
      ``Filtered(..., keep=True)``;
    * ``frozen``: the span as it was at round ``warm_up``;
    * ``random``: a new random subspace of the same dimension, a control.

    Before that the basis has no rows. Gaps, and probes, see rows as they are sent: raw ones with ``raw``, whole ones where
    the server filters. A basis at the workers makes the broadcast grow by q P numbers for a
    dimension q, which the clock charges. At equal step size the filter neither helps nor hurts much: it is an
    instrument, not an accelerator.

    Parameters
    ----------
    inner : Rule
        Strategy that averages; it keeps no rows and no states at the workers.
    source : {"fifo", "raw", "frozen", "random"}
        Which basis.
    capacity : int
        Gaps c of the buffer, >= 1; 4 c P bytes.
    seed : int
        Of random subspaces.
    warm_up : int
        Rounds without a filter, >= 1.
    refresh : int
        Rounds between new bases, >= 1.
    update : {"whole", "remove", "keep"}
        Which part of the updates the server merges; "whole" for ``Filtered`` clients and for ``raw``.

    Raises
    ------
    ValueError
        If a value is outside its range or the inner strategy does not fit.

    References
    ----------
    Dimlioglu, Topollai, Choromanska (2026), arXiv:2605.27739; the protocol is ours.
    """

    source: Literal["fifo", "raw", "frozen", "random"] = "fifo"
    capacity: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        checks.at_least(self, 1, "capacity", "warm_up")
        checks.nonnegative(self, "seed")
        checks.one_of(self, "source", ("fifo", "raw", "frozen", "random"))
        super().__post_init__()
        if self.source == "raw" and self.update != "whole":
            raise ValueError(
                f"GapFilter: update = {self.update!r} must be 'whole' for source = 'raw', whose workers filter"
            )

    def sends(self, basis: Stack) -> Broadcast:
        """Name the channel after what workers send back: filtered rows, or raw ones."""
        return {"raw_basis": basis} if self.source == "raw" else super().sends(basis)

    @property
    def projects(self) -> bool:
        """Whether the server filters updates: raw rows need it."""
        return self.source == "raw" or super().projects

    def is_due(self, round: int) -> bool:
        """Make a frozen basis once."""
        return round == self.warm_up if self.source == "frozen" else super().is_due(round)

    def renew(self, own: Own, rows: Stack, report: Report) -> Own:
        """Push the gaps of the round, and make a new basis where it is due."""
        buffer = from_trees(own.trees)
        if self.source != "frozen" or own.round <= self.warm_up:
            buffer = push(buffer, gaps(rows, report.weight), own.round, report.worker, self.capacity)
        basis = own.basis
        if self.is_due(own.round) and buffer.rank:
            basis = like_model(self._basis(buffer, own.round), tree.take(rows, 0))
        return own._replace(basis=basis, trees=to_trees(buffer))

    def _basis(self, buffer: Buffer, number: int) -> Tensor:
        if self.source != "random":
            return subspace(buffer).basis()
        generator = random.torch_generator(self.seed, "random filter", number)
        size = buffer.blocks[0].shape[1]
        drawn = torch.randn(size, buffer.rank, dtype=torch.float64, generator=generator)
        return torch.linalg.qr(drawn).Q
