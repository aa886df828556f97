"""A Flower grid that runs a ClientApp in this process, and helpers for every grid."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedsim.compat import (
    NUM_PARTITIONS_KEY,
    PARTITION_ID_KEY,
    SUPERLINK_NODE_ID,
    ErrorCode,
    Run,
    current_run_id,
    ensure_identity,
    new_run,
    set_message_id,
    with_content,
)

ConfigValue = bool | float | int | str

FIRST_NODE_ID = 2  # Flower's server is node 1
POLL_SECONDS = 0.05


@dataclass
class _Node:
    context: Context
    run_config: dict[str, ConfigValue]


class InProcessGrid(Grid):
    """Run an unmodified ClientApp in this process, one node after the other.

    Node `i` has the id `2 + i` and the partition `i`; nodes answer in the order in which the messages
    were pushed. An exception in the client becomes an error reply, with the code that all of Flower's
    engines use and the words of a deployment. Unlike in the simulation engine, a node whose client raised
    keeps what the client had put into `context.state`.

    Parameters
    ----------
    client_app
        The app that every node runs.
    num_nodes
        Number of nodes, at least 1.
    run_config
        Configuration of the run, which clients find in `context.run_config`.
    node_configs
        What to add to each node's `{"partition-id": i, "num-partitions": num_nodes}`, one dictionary a
        node.
    reverse_replies
        Run the nodes and return their replies in reverse order, to show that order does not matter.

    Raises
    ------
    ValueError
        If `num_nodes` is not positive or `node_configs` has another length.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_nodes: int,
        run_config: Mapping[str, ConfigValue],
        node_configs: Sequence[Mapping[str, ConfigValue]] | None = None,
        reverse_replies: bool = False,
    ) -> None:
        if num_nodes < 1:
            raise ValueError(f"InProcessGrid: num_nodes = {num_nodes} must be at least 1")
        if node_configs is None:
            node_configs = [{}] * num_nodes
        if len(node_configs) != num_nodes:
            raise ValueError(
                f"InProcessGrid: node_configs has {len(node_configs)} entries, must have num_nodes = {num_nodes}"
            )
        ensure_identity()
        run_id = current_run_id()
        self.client_app = client_app
        self.reverse_replies = reverse_replies
        self._run = new_run(run_id, run_config)
        self._nodes: dict[int, _Node] = {}
        for i, extra in enumerate(node_configs):
            context = Context(
                run_id=run_id,
                node_id=FIRST_NODE_ID + i,
                node_config={PARTITION_ID_KEY: i, NUM_PARTITIONS_KEY: num_nodes, **extra},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            self._nodes[context.node_id] = _Node(context, dict(run_config))
        self._pushed: dict[str, Message] = {}
        self._num_pushed = 0

    def set_run(self, run: Run) -> None:
        """Set the run this grid operates in.

        Parameters
        ----------
        run
            The run.
        """
        self._run = run

    @property
    def run(self) -> Run:
        """The run this grid operates in."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message, as Flower's deprecated method does; new code writes `Message(...)`.

        Parameters
        ----------
        content, message_type, dst_node_id, group_id, ttl
            As for `flwr.app.Message`.

        Returns
        -------
        Message
            The message.
        """
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Node ids in the order of their partitions.

        Returns
        -------
        list[int]
            `[2, 3, ..., 1 + num_nodes]`.
        """
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Accept messages; a client runs when its reply is pulled.

        Parameters
        ----------
        messages
            Messages to nodes of this grid.

        Returns
        -------
        list[str]
            Their ids, in the same order.

        Raises
        ------
        ValueError
            If a message goes to a node that is not there.
        """
        ids = []
        for message in messages:
            node_id = message.metadata.dst_node_id
            if node_id not in self._nodes:
                last = FIRST_NODE_ID + len(self._nodes) - 1
                raise ValueError(f"InProcessGrid: dst_node_id = {node_id} must be in {FIRST_NODE_ID}..{last}")
            self._num_pushed += 1
            ids.append(str(self._num_pushed))
            set_message_id(message, ids[-1])
            self._pushed[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Run the clients and give their replies one at a time, so that only one need be held.

        Parameters
        ----------
        message_ids
            Ids that `push_messages` returned; those already answered are passed over.

        Yields
        ------
        Message
            The reply to each message, in the order of `message_ids`, or reversed.
        """
        order = list(message_ids)
        for message_id in reversed(order) if self.reverse_replies else order:
            message = self._pushed.pop(message_id, None)
            if message is not None:
                reply = self._answer(message)
                set_message_id(reply, f"{message_id}-reply")
                yield reply

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and hold all replies, as Flower's own grids do.

        Stock strategies need this list: some count the replies before they read them. `exchange` gives
        the replies one at a time.

        Parameters
        ----------
        messages
            Messages to nodes of this grid.
        timeout
            Seconds after which no further client is started; None for no limit.

        Returns
        -------
        list[Message]
            The replies.
        """
        return [reply for _, reply in exchange(self, messages, timeout)]

    def _answer(self, message: Message) -> Message:
        node = self._nodes[message.metadata.dst_node_id]
        message_id = message.metadata.message_id
        # Strategies send one RecordDict to all nodes: a client may change its own copy only.
        received = with_content(message, _copy(message.content))
        code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        try:
            reply = self.client_app(received, node.context)
            code = ErrorCode.UNKNOWN
            if node.context.run_config != node.run_config:
                node.context.run_config = dict(node.run_config)
                raise ValueError("a ClientApp must not change context.run_config")
            if not isinstance(reply, Message) or reply.metadata.reply_to_message_id != message_id:
                raise TypeError(
                    f"the ClientApp returned {reply!r:.80}, must return Message(..., reply_to=message)"
                )
        except Exception as error:
            reply = Message(Error(code=code, reason=f"{type(error)}:<'{error}'>"), reply_to=message)
        return reply


def _copy(content: RecordDict) -> RecordDict:
    copies = RecordDict()
    for name, record in content.items():
        copies[name] = record.copy()
    return copies


def is_from(reply: Message, node_id: int) -> bool:
    """Whether a reply is a node's own, or the SuperLink's word that the node is lost; nobody else answers for it.

    Parameters
    ----------
    reply
        What came.
    node_id
        The node that was asked.

    Returns
    -------
    bool
        Whether it counts as that node's.
    """
    return reply.metadata.src_node_id in {node_id, SUPERLINK_NODE_ID}


def exchange(
    grid: Grid, messages: Iterable[Message], timeout: float | None = None
) -> Iterator[tuple[int, Message]]:
    """Send messages over any grid and give the replies as they arrive.

    Flower's own `send_and_receive` looks for replies every 3 s in a deployment and returns them all at
    once; this looks every 50 ms. An `InProcessGrid` runs a client when its reply is asked for.

    Parameters
    ----------
    grid
        Any Flower grid.
    messages
        Messages to its nodes.
    timeout
        Seconds to wait for replies; None to wait for all.

    Yields
    ------
    tuple of int and Message
        The node that was asked, and its reply, or an error reply in its name from the SuperLink. After the timeout the missing ones are left out.

    Raises
    ------
    RuntimeError
        If the grid does not accept every message.
    """
    sent = list(messages)
    num_sent, addressed = len(sent), [message.metadata.dst_node_id for message in sent]
    accepted = [message_id for message_id in grid.push_messages(sent) if message_id]
    del sent
    if len(accepted) != num_sent:
        raise RuntimeError(f"exchange: the grid accepted {len(accepted)} of {num_sent} messages")
    deadline = None if timeout is None else time.monotonic() + timeout
    pending = dict(zip(accepted, addressed, strict=True))
    while pending:
        for reply in grid.pull_messages(list(pending)):
            asked = pending.get(reply.metadata.reply_to_message_id)
            if asked is not None and is_from(reply, asked):
                del pending[reply.metadata.reply_to_message_id]
                yield asked, reply
            if deadline is not None and time.monotonic() >= deadline:
                return
        if not pending or (deadline is not None and time.monotonic() >= deadline):
            return
        time.sleep(POLL_SECONDS)


def wait_for_nodes(grid: Grid, expected: int, timeout: float) -> list[int]:
    """Wait until all nodes are online, which Flower's strategies do not.

    A ServerApp starts before its nodes are registered, and FedAvg computes how many to sample before it
    waits for them, so that its first round may silently train a few of them only.

    Parameters
    ----------
    grid
        Any Flower grid.
    expected
        Number of nodes to wait for.
    timeout
        Seconds to wait at most.

    Returns
    -------
    list[int]
        The ids of all nodes that are online, ascending; at least `expected`.

    Raises
    ------
    TimeoutError
        If fewer nodes are online when the time is over.
    """
    deadline = time.monotonic() + timeout
    while True:
        nodes = sorted(grid.get_node_ids())
        if len(nodes) >= expected:
            return nodes
        if time.monotonic() >= deadline:
            raise TimeoutError(f"{len(nodes)} of {expected} nodes are online after {timeout:g} s")
        time.sleep(POLL_SECONDS)
