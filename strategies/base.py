"""What a strategy is: the server's half of a sync, pure functions with the state passed in and out.

`Rule` is also a ``flwr.serverapp.strategy.Strategy``: Flower's five methods are written once, here, on top
of the four verbs, so that ``FedAvg().start(grid, initial_arrays=...)`` works in anybody's ServerApp.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, Self, final

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedsim import checks, tree
from fedsim.tree import Stack, Tree
from strategies.messages import (
    Reply,
    as_dtypes,
    floating,
    from_record,
    log,
    mean_metrics,
    read_metrics,
    read_reply,
    to_record,
    without_errors,
)

State = dict[str, Tree]
"""What the server remembers between rounds: trees by name."""

Broadcast = dict[str, Tree]
"""What the server sends to the workers: trees by channel."""

Follower = Callable[[Stack, slice], Stack]
"""What is done after a local step to the rows of the workers at some positions; it may change them in place."""


class _Columns(NamedTuple):
    worker: Tensor
    loss: Tensor
    weight: Tensor
    steps: Tensor
    gradients: Tensor
    idle: Tensor


class Report(_Columns):
    """What workers tell besides their rows; all of shape ``[m]``, one entry a row, by ascending worker.

    Attributes
    ----------
    worker : Tensor
        Worker ids, int64.
    loss : Tensor
        Mean loss of the minibatches of this round, each seen before its step, float64; for a strategy the loss
        that it asks for (see `Rule.score`).
    weight : Tensor
        Aggregation weight (see `Rule.weight`), float64.
    steps : Tensor
        Local steps made, int64.
    gradients : Tensor
        Gradients computed, int64.
    idle : Tensor
        Those of the local steps that computed no gradient, such as pseudo-synchronisations, int64; 0 by default.
    """

    __slots__ = ()

    def __new__(
        cls,
        worker: Tensor,
        loss: Tensor,
        weight: Tensor,
        steps: Tensor,
        gradients: Tensor,
        idle: Tensor | None = None,
    ) -> Self:
        """Count no idle steps unless told."""
        idle = torch.zeros_like(steps) if idle is None else idle
        return super().__new__(cls, worker, loss, weight, steps, gradients, idle)


class Score(NamedTuple):
    """The loss by which a strategy compares workers, in place of the mean loss of the round.

    Attributes
    ----------
    by : {"running_train", "fresh_batch", "full_batch", "shared_val"}
        Mean of the last ``window`` minibatch losses, each seen before its step; loss of the row after the local
        steps on a new minibatch; on all of the worker's training rows; on held-out rows that all workers share.
    window : int
        Losses, or shared rows; not used by the other two.
    """

    by: Literal["running_train", "fresh_batch", "full_batch", "shared_val"]
    window: int = 0


class Traffic(NamedTuple):
    """What crosses the network in a sync.

    Attributes
    ----------
    up : int
        Rows that workers send, all together.
    down : int
        Rows that each worker receives.
    numbers : int
        Single numbers that each worker sends.
    trips : int
        Questions and answers, one after the other.
    entries : int or None
        Entries of a row that are sent, where that is a part of them; None for all.
    overlap : int
        Local steps that workers make meanwhile: what takes no longer than these costs no time.
    row : int or None
        Bytes of a row on its way up, where it is compressed; None for those of its entries.
    """

    up: int
    down: int
    numbers: int = 0
    trips: int = 1
    entries: int | None = None
    overlap: int = 0
    row: int | None = None


class Rule(Strategy):
    """Base class of strategies: frozen dataclasses with the verbs ``init, merge, adopt, model``.

    Attributes
    ----------
    keeps_rows : bool
        Workers keep their own parameters between rounds and `adopt` moves them. If False, a worker starts
        each round from the channel ``model`` of the broadcast.
    keeps_state : bool
        Workers keep the state of their local rule (moments, counts) between rounds.
    upload : {"rows", "mean", "chosen"}
        What `merge` needs: every worker's row, only weighted means over groups of workers, or, once the reports
        are known, the rows that `choose` names.
    recovers : bool
        A worker whose row is lost begins again from the channel ``model``; if False, its node fails.
    asynchronous : bool
        Workers may come one at a time (see `exchange`).
    ranks_first : bool
        Workers are scored before their first step too.
    asks : bool
        Workers are asked before their local steps: each tells as loss what a first step of its rule would tell and
        stays where it is; the steps then begin with what `inform` makes of that. They keep neither rows nor states.
    carries : tuple of str
        Entries of the local rule's state, trees like the model, that workers send with their rows: `merge` finds them
        there as leaves ``<entry>/<parameter>``. Only fedsim's own clients do.
    reported : str
        What the reported model is called among those of `models`; empty if it has no such name.
    """

    keeps_rows: ClassVar[bool] = False
    keeps_state: ClassVar[bool] = False
    upload: ClassVar[Literal["rows", "mean", "chosen"]] = "rows"
    recovers: ClassVar[bool] = False
    asynchronous: ClassVar[bool] = False
    ranks_first: ClassVar[bool] = False
    asks: ClassVar[bool] = False
    carries: ClassVar[tuple[str, ...]] = ()
    reported: ClassVar[str] = ""

    @property
    def score(self) -> Score | None:
        """What ``report.loss`` is in `choose` and `merge`; None for the mean loss of the round."""
        return None

    @property
    def follows(self) -> Literal["never", "first", "every"] | int:
        """After which local steps of a round `follow` is called; a number, from 1, for one of them."""
        return "never"

    def init(self, theta: Tree, num_workers: int) -> tuple[State, Broadcast]:
        """Return the server's state and the first broadcast for initial parameters ``theta``."""
        return {"model": theta}, {"model": theta}

    def weight(self, samples: Tensor) -> Tensor:
        """Return the aggregation weight of workers with ``samples`` training rows each, ``[m] -> [m]``."""
        return samples.to(torch.float64)

    @abstractmethod
    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Merge the rows of a round into a new state and a broadcast.

        Parameters
        ----------
        state : dict of str to Tree
            What `init` or the last `merge` returned.
        rows : Stack
            Parameters after the local steps, leaves ``[m, *]``, finite; those of `choose` alone are enough.
        report : Report
            What the workers told.

        Returns
        -------
        tuple of State and Broadcast
            Nothing is changed in place.
        """

    def inform(self, broadcast: Broadcast, report: Report) -> Broadcast:
        """Return the broadcast with which local steps begin, given what workers told when asked (see ``asks``)."""
        return broadcast

    def choose(self, state: State, report: Report) -> Tensor:
        """Name the workers whose rows alone `merge` needs where ``upload`` is "chosen": ids, ascending, ``[k]``."""
        return report.worker

    def exchange(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Merge one worker that has come on its own, ``m = 1``; the broadcast is for this worker."""
        return self.merge(state, rows, report)

    def depart(self, state: State, worker: int) -> State:
        """Note that a worker that comes on its own is sent off with what the server has now."""
        return state

    def adopt(self, row: Tree, broadcast: Broadcast, worker: Tensor) -> Tree:
        """Return the row with which ``worker`` goes on; written for one worker, batched by the engine."""
        return broadcast["model"]

    def follow(self, row: Tree, anchor: Tree, broadcast: Broadcast, worker: Tensor, period: int) -> Tree:
        """Return the row after a local step, at the worker and without communication; batched by the engine.

        Parameters
        ----------
        row : Tree
            After the step.
        anchor : Tree
            At the start of the round.
        broadcast : dict of str to Tree
            What the server last sent.
        worker : Tensor
            Its id, a scalar.
        period : int
            Local steps of a round, 0 if they are counted in epochs.

        Returns
        -------
        Tree
            The row from which the next step starts.
        """
        return row

    def follower(self, anchor: Stack, broadcast: Broadcast, worker: Tensor, period: int) -> Follower:
        """Return `follow` for all workers of a round at once; override it where that is faster.

        Parameters
        ----------
        anchor : Stack
            Rows at the start of the round, leaves ``[m, *]``.
        broadcast : dict of str to Tree
            What the server last sent.
        worker : Tensor
            ``[m]`` ids.
        period : int
            Local steps of a round, 0 if they are counted in epochs.

        Returns
        -------
        callable
            ``(rows, positions) -> rows``; it may change the rows in place.
        """
        batched = torch.vmap(self.follow, in_dims=(0, 0, None, 0, None))
        return lambda rows, at: batched(rows, tree.take(anchor, at), broadcast, worker[at], period)

    def model(self, state: State, rows: Stack) -> Tree:
        """Return the model that is evaluated and saved, given the rows after adoption."""
        return state["model"]

    def models(self, state: State, rows: Stack, report: Report) -> dict[str, Tree]:
        """Return further models to evaluate, by name, given the rows after adoption and the scores."""
        return {}

    def curvature(self, state: State) -> int:
        """Say how many dominant Hessian eigenvectors at the new model `learn` waits for, after `init` or a `merge`."""
        return 0

    def learn(self, state: State, broadcast: Broadcast, basis: Stack) -> tuple[State, Broadcast]:
        """Take in the eigenvectors that `curvature` asked for, of the whole training loss: leaves ``[k, *]``, orthonormal."""
        return state, broadcast

    def traffic(self, broadcast: Broadcast, num_workers: int) -> Traffic | None:
        """Say what a sync sends; None for a row up and the whole broadcast down, for each worker."""
        return None

    # ----------------------------------------------------------------- Flower's interface, written once

    @final
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send each node, a worker of its own, the row from which it trains.

        Parameters
        ----------
        server_round : int
            Round, from 1; round 1 starts a new session with the nodes that are online.
        arrays : ArrayRecord
            The global model, from which all nodes train unless the rule keeps rows.
        config : ConfigRecord
            Sent along unchanged, with ``server-round`` added to a copy.
        grid : Grid
            Names the nodes.

        Returns
        -------
        Iterable of Message
            One message a node, in ascending order of node ids.

        Raises
        ------
        ValueError
            If the strategy acts in local steps (see `follows`) or sends more than a model, which other ClientApps do not know.
        """
        online = sorted(grid.get_node_ids())
        if server_round == 1:
            theta = from_record(arrays)
            state, broadcast = self.init(floating(theta), len(online))
            more = not self.keeps_rows and broadcast.keys() != {"model"}
            if self.follows != "never" or self.asks or self.carries or more:
                raise ValueError(
                    f"{self!r} acts in the workers' local steps, which only fedsim's own ClientApp makes"
                )
            object.__setattr__(self, "_session", _Session(online, theta, state, broadcast))
        session = self._session_of()
        settings = ConfigRecord(dict(config) | {"server-round": server_round})
        shared = RecordDict({"arrays": arrays, "config": settings})
        messages = []
        for worker, node in enumerate(session.nodes):
            if node not in online:
                continue
            content = shared
            if self.keeps_rows:
                session.rows[node] = self.adopt(session.row(node), session.broadcast, torch.tensor(worker))
                content = RecordDict({"arrays": session.encode(session.rows[node]), "config": settings})
            messages.append(Message(content, dst_node_id=node, message_type=MessageType.TRAIN))
        return messages

    @final
    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge the replies, in the order of node ids whatever order they arrived in.

        Errors and rows that are not finite are logged and left out.

        Parameters
        ----------
        server_round : int
            Round, from 1.
        replies : Iterable of Message
            Each holds one ArrayRecord, a worker's row or a stack of rows with a leading worker axis, and one
            MetricRecord with ``num-examples`` and, where the rule looks at losses, ``train_loss`` or
            ``loss``: a number, or a list with one entry a row.

        Returns
        -------
        tuple of ArrayRecord and MetricRecord
            The model and the weighted means of the metrics, or ``(None, None)`` without a valid row of
            positive weight.

        Raises
        ------
        ValueError
            If a reply does not hold what it must.
        """
        session = self._session_of()
        decoded = [read_reply(message, session.theta) for message in without_errors(replies)]
        session.sizes |= {reply.node: len(reply.weight) for reply in decoded}
        usable = [reply.finite() for reply in decoded]
        for before, after in zip(decoded, usable, strict=True):
            if self.keeps_rows and len(before.weight) > 1:
                raise ValueError(
                    f"{self!r} keeps a row for each worker: node {before.node} sent "
                    f"{len(before.weight)} rows, must send 1"
                )
            if len(after.weight) < len(before.weight):
                lost = sorted({*session.workers(before)} - {*session.workers(after)})
                log.warning("aggregate_train: parameters of workers %s are not finite", lost)
            if self.keeps_rows and len(after.weight):
                session.rows[after.node] = tree.take(after.rows, 0)
        usable = [reply for reply in usable if len(reply.weight)]
        if not usable:
            return None, None
        rows = tree.concat([reply.rows for reply in usable])
        worker = torch.tensor([w for reply in usable for w in session.workers(reply)])
        report = Report(
            worker=worker,
            loss=torch.tensor([x for reply in usable for x in reply.loss], dtype=torch.float64),
            weight=self.weight(
                torch.tensor([w for reply in usable for w in reply.weight], dtype=torch.float64)
            ),
            steps=torch.ones_like(worker),
            gradients=torch.ones_like(worker),
        )
        if not report.weight.sum() > 0:
            log.warning("aggregate_train: num-examples is 0 in all replies")
            return None, None
        session.state, session.broadcast = self.merge(session.state, rows, report)
        if self.keeps_rows:
            adopted = [
                self.adopt(tree.take(rows, i), session.broadcast, w) for i, w in enumerate(report.worker)
            ]
            rows = tree.stack(adopted)
        model = session.encode(self.model(session.state, rows))
        return model, mean_metrics((reply.metrics, reply.weight) for reply in usable)

    @final
    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the model to every node for evaluation.

        Parameters
        ----------
        server_round : int
            Round, from 1.
        arrays : ArrayRecord
            The model.
        config : ConfigRecord
            Sent along.
        grid : Grid
            Names the nodes.

        Returns
        -------
        Iterable of Message
            One message a node.
        """
        settings = ConfigRecord(dict(config) | {"server-round": server_round})
        content = RecordDict({"arrays": arrays, "config": settings})
        return [
            Message(content, dst_node_id=node, message_type=MessageType.EVALUATE)
            for node in sorted(grid.get_node_ids())
        ]

    @final
    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Average the metrics of the nodes, weighted by ``num-examples``.

        Parameters
        ----------
        server_round : int
            Round, from 1.
        replies : Iterable of Message
            Each holds one MetricRecord.

        Returns
        -------
        MetricRecord or None
            None without a valid reply.
        """
        metrics = [read_metrics(message) for message in without_errors(replies)]
        return mean_metrics(metrics) if metrics else None

    @final
    def summary(self) -> None:
        """Log the strategy's expression."""
        log.info("\t└──> %r", self)

    def _session_of(self) -> _Session:
        session = self.__dict__.get("_session")
        if session is None:
            raise RuntimeError(f"{self!r}: configure_train must be called for round 1 first")
        return session


@dataclass(frozen=True)
class MeanRule(Rule):
    """Base class of strategies that need only the weighted mean ``sum_i p_i theta_i`` of the rows.

    Parameters
    ----------
    weighting : {"samples", "uniform"}
        ``p_i`` proportional to the number of training rows of worker ``i``, or equal for all
        participants. Only the participants of the round count.

    Raises
    ------
    ValueError
        If ``weighting`` is something else.
    """

    weighting: Literal["samples", "uniform"] = field(default="samples", kw_only=True)
    upload: ClassVar[Literal["rows", "mean", "chosen"]] = "mean"

    def __post_init__(self) -> None:
        checks.one_of(self, "weighting", ("samples", "uniform"))

    def weight(self, samples: Tensor) -> Tensor:
        """Return the number of rows of each worker, or 1 for each."""
        samples = samples.to(torch.float64)
        return samples if self.weighting == "samples" else torch.ones_like(samples)


@dataclass
class _Session:
    """What Flower's interface leaves to the strategy to remember between its calls."""

    nodes: list[int]
    theta: Tree
    state: State
    broadcast: Broadcast
    rows: dict[int, Tree] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)

    def row(self, node: int) -> Tree:
        return self.rows.get(node, floating(self.theta))

    def workers(self, reply: Reply) -> list[int]:
        """Give each row of a reply its worker: rows of nodes with lower ids come first."""
        first = sum(self.sizes.get(n, 1) for n in self.nodes if n < reply.node)
        return [first + i for i in reply.position]

    def encode(self, x: Tree) -> ArrayRecord:
        """Encode a tree in the dtypes with which the session began."""
        return to_record(as_dtypes(x, self.theta))
