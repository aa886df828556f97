"""The carrier that reaches nodes with messages over any Flower grid."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedsim import tree
from fedsim.carriers import Answers, Arrival, Fetched, ranges
from fedsim.cohort import Evaluated, Trained, Upload
from fedsim.compat import ErrorCode, error_name, is_simulation
from fedsim.experiment import Experiment
from fedsim.federation import Federation
from fedsim.grid import POLL_SECONDS, InProcessGrid, exchange, is_from
from fedsim.messages import (
    HELD,
    HELLO,
    ROUND,
    ROWS,
    BadReply,
    check_code,
    decode_evaluated,
    decode_rows,
    decode_trained,
    encode_broadcast,
    has_lost,
)
from fedsim.simulate import RunFailed
from fedsim.tree import Stack, Tree
from strategies import Broadcast

HELLO_SECONDS = 120.0
"""How long to wait for nodes to come online and to answer the first question."""

JOIN_SECONDS = 15.0
"""How long to wait for the others once as many have answered as the run needs."""

IN_FLIGHT = 2
"""Messages on the way to a node: a SuperNode that finds none waits 3 s before it asks again."""

ABSENT = 0
"""Stands for the id of a node that has not come yet."""


class Greeting(NamedTuple):
    """A node's answer to ``hello``.

    Attributes
    ----------
    node_id : int
        Its id in this run, which is random.
    partition, num_partitions : int
        Its place among the nodes and their number; -1 and 0 where its configuration does not say.
    workers : int
        Workers that it hosts with data of its own, 0 if it takes a part of the experiment's.
    """

    node_id: int
    partition: int
    num_partitions: int
    workers: int


def greet(grid: Grid, expected: int, timeout: float = HELLO_SECONDS, enough: int = 0) -> list[Greeting]:
    """Wait for all nodes and learn who they are.

    Parameters
    ----------
    grid : Grid
        Any Flower grid.
    expected : int
        Number of nodes; 0 to believe the ``num-partitions`` that the nodes name.
    timeout : float
        Seconds to wait.
    enough : int
        Number of nodes with which the run may begin while others are missing; 0 for all.

    Returns
    -------
    list of Greeting
        In the order of partitions, which is the same in every run; of a missing node only the partition is known.

    Raises
    ------
    RunFailed
        If nodes are missing, run other code, cannot start, or do not have a partition each.
    """
    deadline = time.monotonic() + timeout
    answers: dict[int, Greeting] = {}
    lost: set[int] = set()  # online for Flower until it misses two heartbeats
    begin = deadline
    while True:
        fresh = sorted({*grid.get_node_ids()} - answers.keys() - lost)
        messages = [Message(encode_broadcast({}, {}), node, HELLO) for node in fresh]
        for node, reply in _exchange(grid, messages, max(POLL_SECONDS, begin - time.monotonic())):
            if not reply.has_error():
                answers[node] = _read_greeting(node, reply.content)
            elif reply.error.code == ErrorCode.NODE_UNAVAILABLE:
                lost.add(node)
            else:
                raise RunFailed(f"SuperNode {node} cannot start: {_reason(reply)}")
        wanted = expected or max([1, *(a.num_partitions for a in answers.values())])
        if len(answers) >= wanted:
            return _in_order([*answers.values()], expected)
        # Nodes with data of their own must all be there: nobody else knows how many workers they have.
        if 0 < enough <= len(answers) and not any(a.workers for a in answers.values()):
            begin = min(begin, time.monotonic() + JOIN_SECONDS)
            if time.monotonic() >= begin:
                here = {a.partition for a in answers.values()}
                absent = [Greeting(ABSENT, i, wanted, 0) for i in range(wanted) if i not in here]
                return _in_order([*answers.values(), *absent], expected)
        if time.monotonic() >= deadline:
            raise RunFailed(f"{len(answers)} of {wanted} nodes answered within {timeout:g} s")
        time.sleep(POLL_SECONDS)


def spread(num_workers: int, nodes: list[Greeting]) -> list[tuple[int, int]]:
    """Give every node its range of workers: its own number where it has its own data, else an equal part.

    Parameters
    ----------
    num_workers : int
        Workers of the run.
    nodes : list of Greeting
        In order.

    Returns
    -------
    list of tuple of int
        First worker, and last worker plus one, of each node.

    Raises
    ------
    RunFailed
        If only some nodes have data of their own, or there are more nodes than workers.

    Examples
    --------
    >>> spread(5, [Greeting(7, 0, 2, 0), Greeting(3, 1, 2, 0)])
    [(0, 3), (3, 5)]
    """
    own = [node.workers for node in nodes]
    if not any(own):
        if len(nodes) > num_workers:
            raise RunFailed(f"{len(nodes)} nodes for num-workers = {num_workers}; each needs a worker")
        return ranges(num_workers, len(nodes))
    if not all(own):
        raise RunFailed(
            "some nodes have data of their own and some have not; give all or none a 'data' setting"
        )
    return list(pairwise(accumulate(own, initial=0)))


@dataclass(frozen=True)
class _Node:
    """A node: its place in the order of partitions, its id in this run, and its range of workers."""

    place: int
    node_id: int
    first: int
    last: int

    @property
    def name(self) -> str:
        """Name for messages and history, the same in every run."""
        return f"node {self.place}"

    def mine(self, workers: Tensor) -> Tensor:
        """Those of the workers that live here."""
        return workers[(workers >= self.first) & (workers < self.last)]


class OverGrid:
    """Nodes reached through a Flower grid: in this process, in Flower's simulation, or on other machines.

    Parameters
    ----------
    grid : Grid
        Any Flower grid.
    experiment : Experiment
        The run; ``num-workers`` must be the sum over nodes where nodes have data of their own.
    federation : Federation
        The server's view: initial model and test set.
    nodes : list of Greeting
        What `greet` returned.
    """

    plan = "auto"

    def __init__(
        self, grid: Grid, experiment: Experiment, federation: Federation, nodes: list[Greeting]
    ) -> None:
        self.grid, self.experiment = grid, experiment
        self.theta = {k: x.cpu() for k, x in federation.theta.items()}
        carried = experiment.parts.strategy.carries
        self.sent = self.theta | {f"{name}/{k}": x for name in carried for k, x in self.theta.items()}
        self.device = next(iter(federation.theta.values())).device
        placed = zip(nodes, spread(experiment.num_workers, nodes), strict=True)
        self.nodes = [_Node(i, node.node_id, *workers) for i, (node, workers) in enumerate(placed)]
        self.num_nodes = len(self.nodes)
        self.knows_data = not any(node.workers for node in nodes)
        self.sizes = federation.train.sizes
        self.asked: dict[int, int] = {}  # the period of each worker that was sent off
        # Simulated nodes do not wait between messages, and take them in an order that is part of the result.
        here = isinstance(grid, InProcessGrid) or is_simulation(grid)
        self.live = _Live(grid, experiment.round_timeout, 1 if here else IN_FLIGHT)
        self.own = [node.workers for node in nodes]
        self.newcomers: dict[str, int] = {}  # nodes that were asked who they are, by message
        self.refused: set[int] = set()

    def use_plan(self, name: str) -> None:
        """Leave the choice to the nodes."""

    def train(self, round: int, workers: Tensor, broadcast: Broadcast, upload: Upload) -> Answers:
        """Send the broadcast to the nodes of the round's participants and collect their rows."""
        self._welcome()
        asked = [node for node in self.nodes if len(node.mine(workers))]
        replies, failures = self._ask(asked, ROUND, broadcast, {"round": round, "upload": upload})
        trained: list[Trained] = []
        lost: list[int] = []
        for node, content in replies:
            try:
                found = decode_trained(content, self.sent, node.mine(workers), upload, round)
                self._check_weights(found)
            except BadReply as error:
                failures[node.name] = str(error)
                continue
            trained.append(found._replace(rows=self._here(found.rows)))
            if has_lost(content):
                lost += range(node.first, node.last)
        return Answers(trained, failures, None, tuple(lost))

    def fetch(self, workers: Tensor) -> Fetched:
        """Ask the nodes of some workers for their rows."""
        asked = [node for node in self.nodes if len(node.mine(workers))]
        lists = {node: {"workers": node.mine(workers).tolist()} for node in asked}
        replies, failures = self._ask(asked, ROWS, {}, {}, lists)
        came: list[Tensor] = []
        rows: list[Stack] = []
        for node, content in replies:
            mine = node.mine(workers)
            try:
                rows.append(self._here(decode_rows(content, self.theta, len(mine))))
            except BadReply as error:
                failures[node.name] = str(error)
                continue
            came.append(mine)
        return Fetched(torch.cat(came) if came else workers[:0], tree.concat(rows) if rows else {}, failures)

    def adopt(self, broadcast: Broadcast, workers: Tensor | None = None) -> None:
        """Do nothing now: the broadcast travels with the next round's message, and nodes adopt it then."""

    @property
    def away(self) -> bool:
        """Whether there is a worker to wait for."""
        return self.live.away

    def begin(self, worker: int, period: int, broadcast: Broadcast) -> None:
        """Send one worker off; its node handles one message at a time, but the next ones are on their way."""
        node = next(n for n in self.nodes if n.first <= worker < n.last)
        self.asked[worker] = period
        about = {"round": period, "worker": worker, "upload": "rows", "first": node.first, "last": node.last}
        about |= {"num-workers": self.experiment.num_workers, "fresh": int(self.live.is_new(node, period))}
        self.live.send(node, worker, Message(encode_broadcast(broadcast, about), node.node_id, ROUND))

    def arrive(self) -> Arrival:
        """Wait for the next worker."""
        node, worker, reply = self.live.next()
        if reply.has_error():
            return Arrival(worker, None, (node.name, _reason(reply)))
        try:
            found = decode_trained(
                reply.content, self.sent, torch.tensor([worker]), "rows", self.asked[worker]
            )
            self._check_weights(found)
        except BadReply as error:
            return Arrival(worker, None, (node.name, str(error)))
        return Arrival(worker, found._replace(rows=self._here(found.rows)), lost=has_lost(reply.content))

    def _check_weights(self, found: Trained) -> None:
        """Demand the weights that follow from the rows of each worker, where the server knows them."""
        if not self.knows_data:
            return
        told = found.report
        known = self.experiment.parts.strategy.weight(self.sizes[told.worker])
        if not torch.equal(told.weight, known.to(told.weight)):
            raise BadReply("report: weights are not those of its workers' rows")

    def _here(self, rows: Stack) -> Stack:
        return tree.tree_map(lambda x: x.to(self.device), rows) if rows else {}

    def evaluate(self, model: Tree) -> tuple[list[Evaluated], dict[str, str]]:
        """Ask every node for its workers' own evaluation; nodes that fail are left out and named."""
        replies, failures = self._ask(self.nodes, HELD, {"model": model}, {})
        found = []
        for node, content in replies:
            try:
                found.append(decode_evaluated(content, node.first, node.last))
            except BadReply as error:
                failures[node.name] = str(error)
        return found, failures

    def checkpoint(self) -> Tree:
        """Return nothing: what workers keep stays at the nodes."""
        return {}

    def restore(self, saved: Tree) -> None:
        """Do nothing: what workers keep stays at the nodes."""

    def _ask(
        self,
        nodes: list[_Node],
        kind: str,
        broadcast: Broadcast,
        about: dict[str, int | str],
        lists: dict[_Node, dict[str, list[int]]] | None = None,
    ) -> tuple[list[tuple[_Node, RecordDict]], dict[str, str]]:
        """Send one request to many nodes; returns contents in the order of nodes, and failures by name."""
        online = {*self.grid.get_node_ids()}
        content = encode_broadcast(broadcast, about | {"num-workers": self.experiment.num_workers})
        settings = content.config_records["about"]
        messages = []
        for node in nodes:
            if node.node_id in online:
                further = {} if lists is None else lists[node]
                own = ConfigRecord({**settings, "first": node.first, "last": node.last, **further})
                messages.append(Message(RecordDict({**content, "about": own}), node.node_id, kind))
        replies = dict(_exchange(self.grid, messages, self.experiment.round_timeout))
        contents: list[tuple[_Node, RecordDict]] = []
        failures: dict[str, str] = {}
        for node in nodes:
            reply = replies.get(node.node_id)
            if reply is not None and not reply.has_error():
                contents.append((node, reply.content))
            elif reply is not None:
                failures[node.name] = _reason(reply)
            elif node.node_id in online:
                limit = self.experiment.round_timeout
                failures[node.name] = f"did not answer within round-timeout = {limit:g} s"
            else:
                failures[node.name] = "is offline"
        return contents, failures

    def _welcome(self) -> None:
        """Give the places of missing nodes to those that came since: late, or again under another id.

        A newcomer is asked who it is, and its answer is read before a later round: nobody waits for it.
        """
        online = {*self.grid.get_node_ids()}
        for reply in self.grid.pull_messages(list(self.newcomers)) if self.newcomers else ():
            name = reply.metadata.reply_to_message_id
            if name in self.newcomers and is_from(reply, self.newcomers[name]):
                node_id = self.newcomers.pop(name)
                if not reply.has_error():
                    self._seat(node_id, reply.content, online)
        known = {*self.newcomers.values(), *self.refused, *(node.node_id for node in self.nodes)}
        fresh = sorted(online - known)
        if fresh and any(node.node_id not in online for node in self.nodes):
            names = self.grid.push_messages([Message(encode_broadcast({}, {}), i, HELLO) for i in fresh])
            self.newcomers |= {name: i for name, i in zip(names, fresh, strict=True) if name}

    def _seat(self, node_id: int, content: RecordDict, online: set[int]) -> None:
        try:
            told = _read_greeting(node_id, content)
        except RunFailed as error:
            self.refused.add(node_id)
            print(f"not taken in: {error}", flush=True)
            return
        place = told.partition if told.num_partitions == self.num_nodes else -1
        if not 0 <= place < self.num_nodes or told.workers != self.own[place]:
            self.refused.add(node_id)
            print(
                f"not taken in: SuperNode {node_id}: its node-config names no place of this run", flush=True
            )
        elif self.nodes[place].node_id not in online:
            self.nodes[place] = replace(self.nodes[place], node_id=node_id)
            print(f"{self.nodes[place].name} has come: SuperNode {node_id}", flush=True)


class _Live:
    """Messages on the way to single workers, a few to each node, and replies as they come.

    No worker has two of them: it is sent off when it has come. A node's first is alone, as it begins the node's run.
    """

    def __init__(self, grid: Grid, timeout: float, in_flight: int) -> None:
        self.grid, self.timeout, self.in_flight = grid, timeout, in_flight
        self.sent: dict[str, tuple[_Node, int]] = {}
        self.queued: dict[_Node, deque[tuple[int, Message]]] = {}
        self.came: deque[tuple[_Node, int, Message]] = deque()
        self.known: set[_Node] = set()
        self.answered: set[_Node] = set()

    @property
    def away(self) -> bool:
        return bool(self.sent or self.came)

    def is_new(self, node: _Node, period: int) -> bool:
        """Whether a node hears of this run for the first time."""
        new = period == 1 and node not in self.known
        self.known.add(node)
        return new

    def send(self, node: _Node, worker: int, message: Message) -> None:
        """Send a message, or keep it until the node has answered one of those before."""
        if not self._free(node):
            self.queued.setdefault(node, deque()).append((worker, message))
            return
        (name,) = self.grid.push_messages([message])
        if not name:
            raise RunFailed("the grid does not accept a message")
        self.sent[name] = node, worker

    def _free(self, node: _Node) -> bool:
        """Whether a node may get one more message now."""
        busy = sum(other is node for other, _ in self.sent.values())
        return busy < (self.in_flight if node in self.answered else 1)

    def next(self) -> tuple[_Node, int, Message]:
        """Wait for a reply."""
        deadline = time.monotonic() + self.timeout
        while not self.came:
            for reply in self.grid.pull_messages(list(self.sent)):
                name = reply.metadata.reply_to_message_id
                if name not in self.sent or not is_from(reply, self.sent[name][0].node_id):
                    continue  # nobody answers twice, or for another node
                node, worker = self.sent.pop(name)
                self.came.append((node, worker, reply))
                self.answered.add(node)
                while self.queued.get(node) and self._free(node):
                    self.send(node, *self.queued[node].popleft())
            if not self.came:
                if time.monotonic() >= deadline:
                    raise RunFailed(f"no node answered within round-timeout = {self.timeout:g} s")
                time.sleep(POLL_SECONDS)
        return self.came.popleft()


def _exchange(grid: Grid, messages: list[Message], timeout: float) -> Iterator[tuple[int, Message]]:
    try:
        yield from exchange(grid, messages, timeout) if messages else ()
    except RuntimeError as error:
        raise RunFailed(str(error)) from None


def _read_greeting(node: int, content: RecordDict) -> Greeting:
    about = content.config_records.get("about", ConfigRecord())
    numbers = [about.get(name) for name in ("partition-id", "num-partitions", "num-workers")]
    partition, num_partitions, workers = (n if isinstance(n, int) else 0 for n in numbers)
    try:
        check_code(content)
    except BadReply as error:
        raise RunFailed(f"node {partition} (SuperNode {node}) {error}") from None
    return Greeting(node, partition, num_partitions, workers)


def _in_order(nodes: list[Greeting], expected: int) -> list[Greeting]:
    nodes = sorted(nodes, key=lambda node: node.partition)
    if len(nodes) == 1 and nodes[0].partition == -1:
        return nodes
    partitions, totals = [node.partition for node in nodes], {node.num_partitions for node in nodes}
    if partitions != list(range(len(nodes))) or totals != {len(nodes)} or expected not in {0, len(nodes)}:
        raise RunFailed(
            f"{len(nodes)} SuperNodes answered{f' for nodes = {expected}' if expected else ''}, with partition-id "
            f"{partitions} and num-partitions {sorted(totals)}; start each with a partition-id of its own: "
            f"--node-config 'partition-id=0 num-partitions={expected or len(nodes)}' and so on"
        )
    return nodes


def _reason(reply: Message) -> str:
    """Say an error in one line: Flower writes ``<class 'a.b.Name'>:<'text'>`` for exceptions of a ClientApp."""
    text = " ".join((reply.error.reason or error_name(reply.error.code)).split())
    match = re.search(r"<class '(?:[\w.]*\.)?(\w+)'>:<'(.*)'>", text)
    return (f"{match[1]}: {match[2]}" if match else text)[:300]
