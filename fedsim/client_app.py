r"""The Flower ClientApp: a node hosts a cohort, a range of workers.

A node's data are a part of the experiment's, by its ``partition-id``, or its own: a SuperNode started with

    --node-config "partition-id=0 num-partitions=3 num-workers=2 data=\"Folder('mine')\""

hosts two workers with the rows of that folder, shared out by ``partition``.

A SuperNode starts a new process for every message. There the cohort lives in the node's resident (`fedsim.resident`),
which this process starts and asks; it imports no PyTorch itself. ``resident-idle=600`` in the node's configuration is
the number of seconds without a message after which the resident ends; with 0 there is none, and every process builds
the cohort anew.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsim import frames, reach
from fedsim.compat import ErrorCode, is_for_one_message
from fedsim.errors import BadInput
from fedsim.source import code_hash

app = ClientApp()
log = logging.getLogger("flwr")

Setting = TypeVar("Setting", str, int)

IDLE_SECONDS = 600

_HOSTS: dict[tuple[int, int], Any] = {}
"""Cohorts by run and node, where Flower keeps the process; only a cache, as the next message may reach another one."""


@app.query("fedsim_hello")
def hello(message: Message, context: Context) -> Message:
    """Say which part of the data lives here, and which code; the server judges."""
    own = 0
    if "data" in context.node_config:
        own = _setting(context, "num-workers", 1)
        if own < 1:
            raise BadInput(f"node-config: num-workers = {own} must be >= 1")
    about = {
        "code": code_hash(),
        "partition-id": _setting(context, "partition-id", -1),
        "num-partitions": _setting(context, "num-partitions", 0),
        "num-workers": own,
    }
    if is_for_one_message() and _idle(context):
        with suppress(reach.NoResident):  # the next message says why
            reach.Resident(reach.home(context.node_id), _idle(context)).wake()
    return Message(content=RecordDict({"about": ConfigRecord(about)}), reply_to=message)


@app.train("fedsim_round")
def train(message: Message, context: Context) -> Message:
    """Make the local steps of this node's participants."""
    return _work(message, context)


@app.query("fedsim_rows")
def rows(message: Message, context: Context) -> Message:
    """Send rows that workers of this node keep, as their last local steps left them."""
    return _work(message, context)


@app.evaluate("fedsim_held")
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate a model on the held-out rows of this node's workers."""
    return _work(message, context)


def _work(message: Message, context: Context) -> Message:
    """Let the resident work where Flower ends this process after the message; else, or if there is none, work here."""
    if not is_for_one_message():
        return _work_here(message, context, None)
    folder = None
    try:
        folder = reach.home(context.node_id)
        if _idle(context):
            return _work_there(message, context, reach.Resident(folder, _idle(context)))
    except reach.NoResident as error:
        log.warning("fedsim: no resident, this process does the work itself, which is slower: %s", error)
    return _work_here(message, context, folder)


def _work_here(message: Message, context: Context, folder: Path | None) -> Message:
    from fedsim import hosting

    state, kind = context.state, message.metadata.message_type
    keeper = hosting.InState(state)
    if folder is not None:
        keeper = hosting.InFile(state, reach.kept_file(folder, context.run_id))
    return Message(hosting.answer(kind, message.content, context, keeper, _HOSTS), reply_to=message)


def _work_there(message: Message, context: Context, resident: reach.Resident) -> Message:
    content, tensors = frames.pack(message.content)
    header = {
        "kind": message.metadata.message_type,
        "content": content,
        "run": context.run_id,
        "node": context.node_id,
        "run-config": dict(context.run_config),
        "node-config": dict(context.node_config),
        "made": dict(context.state.config_records["made"]) if "made" in context.state else None,
    }
    try:
        answer, tensors = resident.ask(header, tensors)
    except reach.Raised as error:
        log.error("fedsim: the resident raised an exception\n%s", error.trace)
        # In Flower's words for an exception that this process would have raised.
        reason = f"<class '{error.kind}'>:<'{error.text}'>"
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
    if answer["made"] is not None:
        context.state["made"] = ConfigRecord(answer["made"])
    return Message(frames.unpack(answer["content"], tensors), reply_to=message)


def _idle(context: Context) -> int:
    idle = _setting(context, "resident-idle", IDLE_SECONDS)
    if idle < 0:
        raise BadInput(f"node-config: resident-idle = {idle} must be >= 0 seconds; 0 for no resident")
    return idle


def _setting(context: Context, name: str, default: Setting) -> Setting:
    value = context.node_config.get(name, default)
    if not isinstance(value, type(default)):
        kind = "a string" if isinstance(default, str) else "a whole number"
        raise BadInput(f"node-config: {name} = {value!r} must be {kind}")
    return value
