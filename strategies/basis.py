"""What strategies have in common that send a basis, with which workers filter their gradients, or filter updates with it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fedsim import checks, tree
from fedsim.tree import Stack, Tree
from strategies.base import Broadcast, Report, Rule, State
from strategies.fedavg import FedAvg


class Own(NamedTuple):
    """What a `BasisRule` remembers besides its inner strategy.

    Attributes
    ----------
    round : int
        Rounds done.
    basis : Stack
        Rows of Q^T, leaves ``[q, *]``; no rows before there is a basis.
    start : Tree
        The model that was sent; empty unless the server filters updates.
    trees : dict of str to Tree
        The subclass's own.
    """

    round: int
    basis: Stack
    start: Tree
    trees: dict[str, Tree]


@dataclass(frozen=True)
class BasisRule(Rule):
    """Base class of strategies that wrap another one and know an orthonormal basis Q of a few directions.

    A subclass says in `renew` what Q is. With ``update = "whole"`` it is sent as channel ``basis``, for the client
    ``Filtered(...)``, and the broadcast grows by q P numbers, which the clock charges. Otherwise it stays at the
    server, which filters what the workers have done: ``x_m <- x + (I - Q Q^T)(x_m - x)`` for "remove",
    ``x_m <- x + Q Q^T (x_m - x)`` for "keep", x being the model from which they started.

    Parameters
    ----------
    inner : Rule
        Strategy that averages; its workers keep nothing, send their rows and start from its model.
    warm_up : int
        Rounds without a filter.
    refresh : int
        Rounds between new bases, >= 1.
    update : {"whole", "remove", "keep"}
        What of the workers' updates is merged.

    Raises
    ------
    ValueError
        If a value is outside its range or the inner strategy does not fit.
    """

    upload: ClassVar[Literal["rows", "mean", "chosen"]] = "rows"

    inner: Rule = FedAvg()  # noqa: RUF009 - it is frozen
    warm_up: int = field(default=1, kw_only=True)
    refresh: int = field(default=1, kw_only=True)
    update: Literal["whole", "remove", "keep"] = field(default="whole", kw_only=True)

    def __post_init__(self) -> None:
        checks.at_least(self, 1, "refresh")
        checks.one_of(self, "update", ("whole", "remove", "keep"))
        inner = self.inner
        keeps = inner.keeps_rows or inner.keeps_state or inner.carries
        more = inner.asks or inner.follows != "never" or type(inner).traffic is not Rule.traffic
        if keeps or more or isinstance(inner, BasisRule):
            raise ValueError(
                f"{type(self).__name__}: inner = {inner} must be a strategy whose workers keep nothing, send their rows "
                "and start from its model, such as FedAvg()"
            )

    @abstractmethod
    def renew(self, own: Own, rows: Stack, report: Report) -> Own:
        """Return what to remember after a round: ``own.round`` is this round, the rows are as they came."""

    def sends(self, basis: Stack) -> Broadcast:
        """Return the channels that carry the basis to the workers."""
        return {"basis": basis} if self.update == "whole" else {}

    def is_due(self, round: int) -> bool:
        """Whether the basis is renewed at the end of a round, or before the first one, 0."""
        since = round - self.warm_up
        return since >= 0 and since % self.refresh == 0

    def weight(self, samples: Tensor) -> Tensor:
        """Return the inner strategy's weights."""
        return self.inner.weight(samples)

    def init(self, theta: Tree, num_workers: int) -> tuple[State, Broadcast]:
        """Start with a basis without rows."""
        state, broadcast = self.inner.init(theta, num_workers)
        basis = tree.tree_map(lambda x: x.new_zeros(0, *x.shape), theta)
        return self.join(state, broadcast, Own(0, basis, {}, {}))

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Merge whole or filtered updates as the inner strategy does, and renew the basis."""
        inner, own = self.split(state)
        new = self.renew(own._replace(round=own.round + 1), rows, report)
        if self.projects and tree.num_rows(own.basis):
            rows = project_updates(rows, own.start, own.basis, keep=self.update == "keep")
        merged, broadcast = self.inner.merge(inner, rows, report)
        return self.join(merged, broadcast, new)

    @property
    def projects(self) -> bool:
        """Whether the server filters updates."""
        return self.update != "whole"

    def model(self, state: State, rows: Stack) -> Tree:
        """Return the inner strategy's model."""
        return self.inner.model(self.split(state)[0], rows)

    def join(self, inner: State, broadcast: Broadcast, own: Own) -> tuple[State, Broadcast]:
        """Put the inner strategy's state and broadcast together with our own."""
        trees = own.trees | {"basis": own.basis, "clock": {"round": torch.tensor(own.round)}}
        if self.projects:
            trees["start"] = broadcast["model"]
        return inner | {_OWN + k: x for k, x in trees.items()}, broadcast | self.sends(own.basis)

    def split(self, state: State) -> tuple[State, Own]:
        """Take apart what `join` put together."""
        own = {k.removeprefix(_OWN): x for k, x in state.items() if k.startswith(_OWN)}
        inner = {k: x for k, x in state.items() if not k.startswith(_OWN)}
        round, basis, start = int(own.pop("clock")["round"]), own.pop("basis"), own.pop("start", {})
        return inner, Own(round, basis, start, own)


_OWN = "filter."


def project_updates(rows: Stack, start: Tree, basis: Stack, keep: bool) -> Stack:
    """Filter updates, ``x_m <- x + Q Q^T (x_m - x)`` if ``keep``, else ``x_m <- x_m - Q Q^T (x_m - x)``.

    Parameters
    ----------
    rows : Stack
        ``x_m``, leaves ``[m, *]``.
    start : Tree
        x, from which all started.
    basis : Stack
        Rows of Q^T, leaves ``[q, *]``, orthonormal.
    keep : bool
        Which part is left.

    Returns
    -------
    Stack
        Leaves ``[m, *]``.
    """
    moved = {k: x - start[k] for k, x in rows.items()}
    basis = {k: basis[k] for k in rows}  # saved states may come back in another order
    coordinates = tree.flatten_rows(moved) @ tree.flatten_rows(basis).T  # [m, q]
    inside = {k: torch.tensordot(coordinates, basis[k], 1) for k in rows}
    return {k: start[k] + inside[k] if keep else x - inside[k] for k, x in rows.items()}


def like_model(basis: Tensor, like: Tree) -> Stack:
    """Cut an orthonormal basis ``[P, q]`` into rows with the shapes, type and device of a model."""
    rows = tree.unflatten(basis.T.contiguous(), like)
    return tree.tree_map(lambda x, y: x.to(y).contiguous(), rows, like)
