"""A subspace for workers to filter their gradients with: the span of the gaps that the server has seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedsim import checks, random, tree
from fedsim.gaps import Buffer, from_trees, gaps, push, subspace, to_trees
from fedsim.tree import Stack, Tree
from strategies.base import Broadcast, Report, Rule, State
from strategies.fedavg import FedAvg


@dataclass(frozen=True)
class GapFilter(Rule):
    """Wrap a strategy and send, as channel ``basis``, an orthonormal basis of the newest worker-average gaps.

    To be used with the client ``Filtered(...)``, which removes that subspace from its gradients. Gaps are
    ``x_m - sum_j p_j x_j`` with the inner strategy's weights. From the end of round ``warm_up`` on, the basis is

    * ``fifo``: the span of the newest gaps, renewed every ``refresh`` rounds. Gaps of filtered workers are orthogonal
      to it, so that the buffer forgets the sharp directions in time;
    * ``frozen``: the span as it was at round ``warm_up``;
    * ``random``: a new random subspace of the same dimension, a control.

    Before that the basis has no rows. The broadcast grows by q P numbers for a dimension q, which the
    clock charges. At equal step size the filter neither helps nor hurts much: it is an instrument, not an accelerator.

    Parameters
    ----------
    inner : Rule
        Strategy that averages; it keeps no rows and no states at the workers.
    source : {"fifo", "frozen", "random"}
        Which basis.
    capacity : int
        Gaps c of the buffer, >= 1; 4 c P bytes.
    warm_up : int
        Rounds without a filter, >= 1.
    refresh : int
        Rounds between new bases, >= 1.
    seed : int
        Of random subspaces.

    Raises
    ------
    ValueError
        If a value is outside its range or the inner strategy does not fit.

    References
    ----------
    Dimlioglu, Topollai, Choromanska (2026), arXiv:2605.27739; the protocol is ours.
    """

    upload: ClassVar[Literal["rows", "mean", "chosen"]] = "rows"

    inner: Rule = FedAvg()  # noqa: RUF009 - it is frozen
    source: Literal["fifo", "frozen", "random"] = "fifo"
    capacity: int = 64
    warm_up: int = 1
    refresh: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        checks.at_least(self, 1, "capacity", "warm_up", "refresh")
        checks.nonnegative(self, "seed")
        checks.one_of(self, "source", ("fifo", "frozen", "random"))
        if self.inner.keeps_rows or self.inner.keeps_state:
            raise ValueError(f"GapFilter: inner = {self.inner} must be a strategy whose workers keep nothing")

    def weight(self, samples: Tensor) -> Tensor:
        """Return the inner strategy's weights."""
        return self.inner.weight(samples)

    def init(self, theta: Tree, num_workers: int) -> tuple[State, Broadcast]:
        """Start with an empty buffer and a basis without rows."""
        state, broadcast = self.inner.init(theta, num_workers)
        basis = tree.tree_map(lambda x: x.new_zeros(0, *x.shape), theta)
        return _wrap(state, {"basis": basis, "clock": {"round": torch.tensor(0)}}), broadcast | {
            "basis": basis
        }

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Merge as the inner strategy does, and renew the basis where it is due."""
        own = {k.removeprefix(_OWN): x for k, x in state.items() if k.startswith(_OWN)}
        merged, broadcast = self.inner.merge(_inner(state), rows, report)
        number, basis = int(own["clock"]["round"]) + 1, own["basis"]
        buffer = from_trees(own)
        if self.source != "frozen" or number <= self.warm_up:
            buffer = push(buffer, gaps(rows, report.weight), number, report.worker, self.capacity)
        since = number - self.warm_up
        due = since == 0 if self.source == "frozen" else since >= 0 and since % self.refresh == 0
        if due and buffer.rank:
            basis = self._basis(buffer, number, rows)
        own = to_trees(buffer) | {"basis": basis, "clock": {"round": torch.tensor(number)}}
        return _wrap(merged, own), broadcast | {"basis": basis}

    def model(self, state: State, rows: Stack) -> Tree:
        """Return the inner strategy's model."""
        return self.inner.model(_inner(state), rows)

    def _basis(self, buffer: Buffer, number: int, rows: Stack) -> Tree:
        if self.source == "random":
            generator = random.torch_generator(self.seed, "random filter", number)
            size = buffer.blocks[0].shape[1]
            drawn = torch.randn(size, buffer.rank, dtype=torch.float64, generator=generator)
            q = torch.linalg.qr(drawn).Q
        else:
            q = subspace(buffer).basis()
        like = tree.take(rows, 0)
        return tree.tree_map(lambda x, y: x.to(y).contiguous(), tree.unflatten(q.T.contiguous(), like), like)


_OWN = "filter."


def _wrap(inner: State, own: State) -> State:
    return inner | {_OWN + k: x for k, x in own.items()}


def _inner(state: State) -> State:
    return {k: x for k, x in state.items() if not k.startswith(_OWN)}
