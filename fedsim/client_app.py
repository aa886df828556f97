r"""The Flower ClientApp: a node hosts a cohort, a range of workers.

A node's data are a part of the experiment's, by its ``partition-id``, or its own: a SuperNode started with

    --node-config "partition-id=0 num-partitions=3 num-workers=2 data=\"Folder('mine')\""

hosts two workers with the rows of that folder, shared out by ``partition``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedsim import federation
from fedsim.cohort import Cohort, Upload
from fedsim.experiment import BadInput, Experiment
from fedsim.messages import (
    check_code,
    code_hash,
    decode_broadcast,
    encode_evaluated,
    encode_rows,
    encode_trained,
)
from fedsim.registry import parse
from fedsim.schedule import participants
from strategies import Broadcast, from_record, to_record

app = ClientApp()

Setting = TypeVar("Setting", str, int)


UPLOADS: dict[str, Upload] = {"rows": "rows", "mean": "mean", "reports": "reports"}


@dataclass
class _Host:
    """A cohort that lives on in this process, what it was built from, and the last round that it made."""

    cohort: Cohort
    settings: tuple[Any, ...]
    made: int


_HOSTS: dict[tuple[int, int], _Host] = {}
"""By run and node, so that data are loaded once where Flower keeps the process. Only a cache: what workers
keep between rounds is in ``context.state``, for the next message may reach another process."""


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
    return Message(content=RecordDict({"about": ConfigRecord(about)}), reply_to=message)


@app.train("fedsim_round")
def train(message: Message, context: Context) -> Message:
    """Make the local steps of this node's participants."""
    check_code(message.content)
    about = message.content.config_records["about"]
    number, alone = _number(about, "round"), "worker" in about
    host = _host(context, about)
    cohort, broadcast = host.cohort, _broadcast(message, host.cohort)
    fresh = bool(_number(about, "fresh")) if alone else number <= 1
    workers = torch.tensor([_number(about, "worker")]) if alone else _mine(cohort, number)
    lost = _lost(cohort, context, number, fresh, alone)
    made = 0 if fresh else _made(context)
    if lost:
        cohort.begin_again(broadcast)
    elif host.made != made and _keeps(cohort):
        cohort.restore(from_record(context.state.array_records["kept"]) if made else {})
    host.made = -1  # until all is done, memory is half-way between two rounds
    if not lost and (number > 1 or alone):
        cohort.adopt(broadcast, workers if alone else None)
    trained = cohort.train(number, workers, broadcast, UPLOADS[str(about["upload"])])
    host.made = made + 1 if alone else number
    context.state["made"] = ConfigRecord({"round": host.made, "plan": cohort.plan_name})
    kept = cohort.checkpoint()
    if kept:
        context.state["kept"] = to_record(kept)
    return Message(content=encode_trained(trained, lost), reply_to=message)


@app.query("fedsim_rows")
def rows(message: Message, context: Context) -> Message:
    """Send rows that workers of this node keep, as their last local steps left them."""
    check_code(message.content)
    about = message.content.config_records["about"]
    host, made = _host(context, about), _made(context)
    if "kept" not in context.state:
        raise RuntimeError("the rows of its workers are lost")
    if host.made != made:
        host.cohort.restore(from_record(context.state.array_records["kept"]))
        host.made = made
    wanted = about["workers"]
    if not isinstance(wanted, list):
        raise TypeError(f"workers = {wanted!r} must be a list of worker ids")
    return Message(content=encode_rows(host.cohort.fetch(torch.tensor(wanted))), reply_to=message)


@app.evaluate("fedsim_held")
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate a model on the held-out rows of this node's workers."""
    check_code(message.content)
    cohort = _host(context, message.content.config_records["about"]).cohort
    model = _broadcast(message, cohort)["model"]
    return Message(content=encode_evaluated(cohort.evaluate(model)), reply_to=message)


def _host(context: Context, about: ConfigRecord) -> _Host:
    """Find this node's cohort, or build it."""
    first, last, total = (_number(about, k) for k in ("first", "last", "num-workers"))
    settings = (dict(context.run_config), dict(context.node_config), first, last, total)
    name = context.run_id, context.node_id
    host = _HOSTS.get(name)
    if host is None or host.settings != settings:
        cohort = _build(context, first, last, total)
        if "made" in context.state:  # the same plan as in the rounds before: choosing takes time
            cohort.use_plan(str(context.state.config_records["made"]["plan"]))
        host = _HOSTS[name] = _Host(cohort, settings, 0)
    return host


def _keeps(cohort: Cohort) -> bool:
    return cohort.strategy.keeps_rows or cohort.strategy.keeps_state


def _made(context: Context) -> int:
    """Return the last round that this node made, 0 for none."""
    return _number(context.state.config_records["made"], "round") if "made" in context.state else 0


def _lost(cohort: Cohort, context: Context, number: int, fresh: bool, alone: bool) -> bool:
    """Say whether workers have lost what they keep, or refuse where the strategy does not let them begin again."""
    if fresh or not _keeps(cohort) or "made" in context.state:
        return False
    if not (alone and number > 1) and not any(len(_mine(cohort, earlier)) for earlier in range(1, number)):
        return False
    if cohort.strategy.recovers:
        return True
    raise RuntimeError(
        f"what its workers keep between rounds is lost: this is round {number}, and nothing of an earlier "
        "round is there (a SuperNode that is started again, or a run that is resumed, has nothing)"
    )


def _mine(cohort: Cohort, number: int) -> Tensor:
    """Participants of a round that live here."""
    workers = participants(cohort.experiment, number)
    return workers[(workers >= cohort.first) & (workers < cohort.last)]


def _broadcast(message: Message, cohort: Cohort) -> Broadcast:
    """Decode what the server sends, and see that its model is this node's."""
    broadcast = decode_broadcast(message.content, cohort.device)
    theirs, ours = (
        {k: tuple(x.shape) for k, x in theta.items()}
        for theta in (broadcast["model"], cohort.federation.theta)
    )
    if theirs != ours:
        wrong = next(k for k in {**theirs, **ours} if theirs.get(k) != ours.get(k))
        raise BadInput(
            f"data of this node need another model than the server's: {wrong} is {ours.get(wrong)} here and "
            f"{theirs.get(wrong)} there"
        )
    return broadcast


def _build(context: Context, first: int, last: int, total: int) -> Cohort:
    experiment = Experiment.from_mapping({**context.run_config, "num-workers": total, "nodes": 1})
    if "data" not in context.node_config:
        return Cohort(experiment, federation.load(experiment), first, last)
    source = parse("data", _setting(context, "data", ""), "node-config: data")
    try:
        dataset = source.load(experiment.seed, last - first)
        shards = experiment.parts.partition.assign(dataset, last - first, experiment.seed)
    except (ValueError, OSError, ImportError) as error:
        raise BadInput(f"node-config: data = {context.node_config['data']!r}: {error}") from error
    return Cohort(experiment, federation.assemble(experiment, dataset, shards, first), first, last)


def _setting(context: Context, name: str, default: Setting) -> Setting:
    value = context.node_config.get(name, default)
    if not isinstance(value, type(default)):
        kind = "a string" if isinstance(default, str) else "a whole number"
        raise BadInput(f"node-config: {name} = {value!r} must be {kind}")
    return value


def _number(record: ConfigRecord, name: str) -> int:
    value = record[name]
    if not isinstance(value, int):
        raise TypeError(f"{name} = {value!r} must be a whole number")
    return value
