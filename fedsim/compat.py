"""The only door to Flower's private interfaces.

Flower 1.41 offers no public way to create a message outside its runtimes, to number a message, to
describe a run, or to tell its grids apart. What fedsim needs of these is gathered here, pinned by the
bounds on `flwr` in pyproject.toml and guarded by tests/test_compat.py.
"""

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import NUM_PARTITIONS_KEY, PARTITION_ID_KEY, SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "NUM_PARTITIONS_KEY",
    "PARTITION_ID_KEY",
    "SUPERLINK_NODE_ID",
    "ErrorCode",
    "Run",
    "current_run_id",
    "ensure_identity",
    "error_name",
    "is_for_one_message",
    "is_simulation",
    "new_run",
    "set_message_id",
    "with_content",
    "with_identity",
]

ConfigValue = bool | float | int | str

_IDENTITY = ("_task_id", "_run_id", "_node_id")


@contextmanager
def with_identity(run_id: int = 0, node_id: int = SUPERLINK_NODE_ID, task_id: int = 0) -> Iterator[None]:
    """Let `Message(...)` be created outside a Flower runtime, inside a `with` block.

    Parameters
    ----------
    run_id, node_id, task_id
        The run, the sender and the task which new messages name; the default sender is the server.

    Yields
    ------
    None
        The identity which was set before returns when the block ends.
    """
    before = [getattr(TaskIdentity, name) for name in _IDENTITY]
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task_id, run_id, node_id
    try:
        yield
    finally:
        for name, value in zip(_IDENTITY, before, strict=True):
            setattr(TaskIdentity, name, value)


def ensure_identity() -> None:
    """Let `Message(...)` be created from now on in this process, unless a Flower runtime already did.

    Flower keeps this identity for the whole process. One that is set, by `flwr run` or by an earlier
    call, is left alone.
    """
    for name, value in zip(_IDENTITY, (0, 0, SUPERLINK_NODE_ID), strict=True):
        if getattr(TaskIdentity, name) is None:
            setattr(TaskIdentity, name, value)


def current_run_id() -> int:
    """Run id that a message created now would carry.

    Returns
    -------
    int
        The id set by the Flower runtime, by `ensure_identity` or by `with_identity`.
    """
    return TaskIdentity.run_id


def new_run(run_id: int, run_config: Mapping[str, ConfigValue]) -> Run:
    """Describe a run that no SuperLink knows.

    Parameters
    ----------
    run_id
        Id of the run.
    run_config
        Its configuration, flat.

    Returns
    -------
    Run
        A run with this id and configuration; everything else is empty.
    """
    run = Run.create_empty(run_id)
    run.override_config = dict(run_config)
    return run


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message its id, in place, as a SuperLink does when it accepts the message.

    Parameters
    ----------
    message
        A message that is about to be sent.
    message_id
        Its id, unique in the run.
    """
    message.metadata.__dict__["_message_id"] = message_id


def with_content(message: Message, content: RecordDict) -> Message:
    """Copy a message and put another content into the copy.

    Parameters
    ----------
    message
        A message with or without content.
    content
        The content of the copy.

    Returns
    -------
    Message
        A message with a copy of the metadata, including the id.
    """
    return make_message(metadata=copy.copy(message.metadata), content=content)


def error_name(code: int) -> str:
    """Name of a Flower error code.

    Parameters
    ----------
    code
        The `code` of a `flwr.app.Error`.

    Returns
    -------
    str
        For example "node unavailable"; "error 99" for a code this Flower release does not name.

    Examples
    --------
    >>> error_name(2)
    'client app raised exception'
    """
    for name, value in vars(ErrorCode).items():
        if name.isupper() and value == code:
            return name.lower().replace("_", " ")
    return f"error {code}"


def is_simulation(grid: Grid) -> bool:
    """Tell whether a grid belongs to Flower's simulation engine.

    Parameters
    ----------
    grid
        The grid a ServerApp was given.

    Returns
    -------
    bool
        True for the in-memory grid of the simulation engine; False for the grid of a deployment and for
        fedsim's own `InProcessGrid`.
    """
    # Importing this module costs 0.7 s, and where nobody has imported it there is no such grid.
    module = sys.modules.get("flwr.superlink.grid.inmemory_grid")
    return module is not None and isinstance(grid, module.InMemoryGrid)


def is_for_one_message() -> bool:
    """Tell whether this process ends after one message, as those of a SuperNode do.

    Returns
    -------
    bool
        True in a process that runs Flower's command ``flwr-clientapp``; False in its simulation, whose processes
        stay, and everywhere else.
    """
    return Path(sys.argv[0]).stem == "flwr-clientapp"
