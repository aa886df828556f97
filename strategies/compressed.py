"""What strategies have in common whose workers send less than their rows, and remember what they have not sent."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedsim import tree
from fedsim.tree import Stack, Tree
from strategies.base import Broadcast, Report, Rule, State, Traffic
from strategies.basis import BasisRule
from strategies.fedavg import FedAvg


@dataclass(frozen=True)
class Compressed(Rule):
    """Base class of strategies that wrap another one and compress the updates of its workers, with error feedback.

    Worker i starts a round from the model ``theta``, ends it at ``theta_i``, and remembers an error ``e_i``, 0
    in the beginning. It sends ``c_i = C(e_i + theta_i - theta)`` and keeps
    ``e_i <- e_i + theta_i - theta - c_i``. The inner strategy merges the rows ``theta + c_i``. What was sent
    and what is remembered add up to all updates: nothing is lost, it comes later. Workers that do not take part
    keep their errors. Without feedback ``e_i`` stays 0.

    A subclass says in `compress` what C is and in `num_bytes` how much of it is sent. Bytes up are those of
    ``c_i``; the model that comes back is whole. The errors, one more model a worker, are those of the workers;
    the simulation keeps them beside the state of the server, which so has them in its checkpoints, and messages
    within the simulator are not compressed.

    Parameters
    ----------
    inner : Rule
        Strategy whose workers start from its model and send their rows: they may keep states, but no rows.
    feedback : bool
        Whether workers remember what they have not sent.

    Raises
    ------
    ValueError
        If the inner strategy does not fit.

    References
    ----------
    Stich, Cordonnier, Jaggi (2018), Sparsified SGD with memory, arXiv:1809.07847. Karimireddy, Rebjock, Stich, Jaggi
    (2019), Error feedback fixes SignSGD and other gradient compression schemes, arXiv:1901.09847.
    """

    upload: ClassVar[Literal["rows", "mean", "chosen"]] = "rows"

    inner: Rule = FedAvg()  # noqa: RUF009 - it is frozen
    feedback: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        inner = self.inner
        special = (
            inner.carries
            or inner.asks
            or inner.follows != "never"
            or isinstance(inner, BasisRule | Compressed)
        )
        if inner.keeps_rows or inner.upload == "chosen" or special:
            raise ValueError(
                f"{type(self).__name__}: inner = {inner} must be a strategy whose workers start from its model and send "
                "their rows, such as FedAvg() or DiLoCo()"
            )

    @property
    def keeps_state(self) -> bool:  # type: ignore[override] - for others it is a matter of the class
        """Whether workers keep the state of their local rule: as the inner strategy says."""
        return self.inner.keeps_state

    @abstractmethod
    def compress(self, update: Tensor, round: int, worker: Tensor) -> Tensor:
        """Return what the server makes of compressed updates, each worker's by itself.

        Parameters
        ----------
        update : Tensor
            ``[m, P]``, finite.
        round : int
            Round, from 1.
        worker : Tensor
            Ids, ``[m]``.

        Returns
        -------
        Tensor
            ``[m, P]``.
        """

    @abstractmethod
    def num_bytes(self, entries: int, size: int) -> int:
        """Count the bytes of a compressed update of so many entries, of ``size`` bytes each where they are whole."""

    def init(self, theta: Tree, num_workers: int) -> tuple[State, Broadcast]:
        """Start with errors 0, leaves ``[W, *]``."""
        state, broadcast = self.inner.init(theta, num_workers)
        error = tree.tree_map(lambda x: x.new_zeros(num_workers, *x.shape), theta) if self.feedback else {}
        return _wrap(state, broadcast["model"], error, 0), broadcast

    def weight(self, samples: Tensor) -> Tensor:
        """Return the inner strategy's weights."""
        return self.inner.weight(samples)

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Compress the updates of all rows, and merge what comes of it as the inner strategy does."""
        start, error = state[_OWN + "start"], state.get(_OWN + "error", {})
        round = int(state[_OWN + "clock"]["round"]) + 1
        first = next(iter(rows.values()))
        worker = report.worker.to(first.device)
        # In the order of the rows' names: a state that was read from a file may have another one.
        update = tree.tree_map(torch.sub, rows, start)
        if self.feedback:
            update = tree.add(update, tree.take(error, worker))
        sent = tree.unflatten(self.compress(tree.flatten_rows(update), round, worker), tree.take(rows, 0))
        if self.feedback:
            left = tree.sub(update, sent)
            error = tree.tree_map(lambda e, x: e.index_copy(0, worker, x), error, left)
        inner, broadcast = self.inner.merge(_inner(state), tree.tree_map(torch.add, sent, start), report)
        return _wrap(inner, broadcast["model"], error, round), broadcast

    def model(self, state: State, rows: Stack) -> Tree:
        """Return the inner strategy's model."""
        return self.inner.model(_inner(state), rows)

    def traffic(self, broadcast: Broadcast, num_workers: int) -> Traffic:
        """Count a compressed row up, and whole ones down, for each worker."""
        model = broadcast["model"]
        entries, size = tree.num_parameters(model), next(iter(model.values())).element_size()
        return Traffic(num_workers, len(broadcast), row=self.num_bytes(entries, size))


_OWN = "compressed."


def _wrap(inner: State, start: Tree, error: Tree, round: int) -> State:
    own = {"start": start, "clock": {"round": torch.tensor(round)}} | ({"error": error} if error else {})
    return inner | {_OWN + k: x for k, x in own.items()}


def _inner(state: State) -> State:
    return {k: x for k, x in state.items() if not k.startswith(_OWN)}
