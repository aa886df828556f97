"""A node's work: the cohorts that live in a process, and where what their workers keep survives it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from flwr.app import ConfigRecord, Context, RecordDict
from torch import Tensor

from fedsim import federation
from fedsim.checkpoints import Made, read_kept, read_made, write_kept
from fedsim.cohort import Cohort, Upload
from fedsim.errors import BadInput
from fedsim.experiment import Experiment
from fedsim.messages import (
    HELD,
    ROUND,
    ROWS,
    check_code,
    decode_broadcast,
    encode_evaluated,
    encode_rows,
    encode_trained,
)
from fedsim.registry import parse
from fedsim.schedule import participants
from fedsim.tree import Tree
from strategies import Broadcast, from_record, to_record

UPLOADS: dict[str, Upload] = {"rows": "rows", "mean": "mean", "reports": "reports"}


@dataclass
class Host:
    """A cohort that lives on in this process, what it was built from, and the last round that it made."""

    cohort: Cohort
    settings: tuple[Any, ...]
    made: int


class Keeper(Protocol):
    """Where what workers keep between rounds survives this process.

    The number of the last round and the plan always travel with the messages, in ``context.state["made"]``.
    """

    def made(self) -> Made | None:
        """Return the last round that this node made and of which all is there; None if there is none."""
        ...

    def read(self) -> Tree:
        """Return what its workers kept then."""
        ...

    def write(self, made: Made, kept: Tree) -> None:
        """Keep this instead."""
        ...


class InState:
    """Everything in ``context.state``, which Flower carries to whichever process gets the next message.

    Parameters
    ----------
    state : RecordDict
        The state of the message's context.
    """

    def __init__(self, state: RecordDict) -> None:
        self.state = state

    def made(self) -> Made | None:
        """Read what travels with the messages."""
        return _made(self.state) if "kept" in self.state else None

    def read(self) -> Tree:
        """Decode the record."""
        return from_record(self.state.array_records["kept"])

    def write(self, made: Made, kept: Tree) -> None:
        """Replace the record."""
        self.state["kept"] = to_record(kept)


class InFile:
    """In a file of this machine: large arrays in ``context.state`` cost seconds in each round.

    Parameters
    ----------
    state : RecordDict
        The state of the message's context.
    path : Path
        The file, which need not exist.
    """

    def __init__(self, state: RecordDict, path: Path) -> None:
        self.state, self.path = state, path

    def made(self) -> Made | None:
        """Read the file's; one that is older than the last answer of this node is as good as lost."""
        found, answered = read_made(self.path), _made(self.state)
        return None if found is None or (answered is not None and found.round < answered.round) else found

    def read(self) -> Tree:
        """Read the file."""
        return read_kept(self.path)

    def write(self, made: Made, kept: Tree) -> None:
        """Replace the file: at any moment the old or the new one is there."""
        write_kept(self.path, made, kept)


def answer(
    kind: str, content: RecordDict, context: Context, keeper: Keeper, hosts: dict[tuple[int, int], Host]
) -> RecordDict:
    """Do what a message asks for.

    Parameters
    ----------
    kind : str
        Type of the message: one of those in `fedsim.messages`, but not ``hello``.
    content : RecordDict
        Its content.
    context : Context
        The node's; ``state["made"]`` is brought up to date.
    keeper : Keeper
        What survives this process.
    hosts : dict
        Cohorts that live in this process by run and node, the one used last at the end; those that are missing are
        built.

    Returns
    -------
    RecordDict
        Content of the reply.

    Raises
    ------
    ValueError
        If there is no such type of message.
    """
    work = {ROUND: _round, ROWS: _rows, HELD: _held}.get(kind)
    if work is None:
        raise ValueError(f"{kind!r} must be one of {ROUND!r}, {ROWS!r}, {HELD!r}")
    check_code(content)
    about = content.config_records["about"]
    return work(content, about, _host(context, about, keeper, hosts), context, keeper)


def _round(
    content: RecordDict, about: ConfigRecord, host: Host, context: Context, keeper: Keeper
) -> RecordDict:
    """Make the local steps of this node's participants."""
    number, alone = _number(about, "round"), "worker" in about
    cohort, broadcast = host.cohort, _broadcast(content, host.cohort)
    fresh = bool(_number(about, "fresh")) if alone else number <= 1
    workers = torch.tensor([_number(about, "worker")]) if alone else _mine(cohort, number)
    known = keeper.made() if _keeps(cohort) else _made(context.state)
    lost = _lost(cohort, known, number, fresh, alone)
    made = 0 if fresh or known is None else known.round
    if lost:
        cohort.begin_again(broadcast)
    elif host.made != made and _keeps(cohort):
        cohort.restore(keeper.read() if made else {})
    host.made = -1  # until all is done, memory is half-way between two rounds
    if not lost and (number > 1 or alone):
        cohort.adopt(broadcast, workers if alone else None)
    trained = cohort.train(number, workers, broadcast, UPLOADS[str(about["upload"])])
    made = Made(made + 1 if alone else number, cohort.plan_name)
    if _keeps(cohort):
        keeper.write(made, cohort.checkpoint())
    host.made = made.round
    context.state["made"] = ConfigRecord(made._asdict())
    return encode_trained(trained, number, lost)


def _rows(
    content: RecordDict, about: ConfigRecord, host: Host, context: Context, keeper: Keeper
) -> RecordDict:
    """Send rows that workers of this node keep, as their last local steps left them."""
    made = keeper.made() if _keeps(host.cohort) else None
    if made is None:
        raise RuntimeError("the rows of its workers are lost")
    if host.made != made.round:
        host.cohort.restore(keeper.read())
        host.made = made.round
    wanted = about["workers"]
    if not isinstance(wanted, list):
        raise TypeError(f"workers = {wanted!r} must be a list of worker ids")
    return encode_rows(host.cohort.fetch(torch.tensor(wanted)))


def _held(
    content: RecordDict, about: ConfigRecord, host: Host, context: Context, keeper: Keeper
) -> RecordDict:
    """Evaluate a model on the held-out rows of this node's workers."""
    model = _broadcast(content, host.cohort)["model"]
    return encode_evaluated(host.cohort.evaluate(model))


def _host(context: Context, about: ConfigRecord, keeper: Keeper, hosts: dict[tuple[int, int], Host]) -> Host:
    """Find this node's cohort, or build it."""
    first, last, total = (_number(about, k) for k in ("first", "last", "num-workers"))
    settings = (dict(context.run_config), dict(context.node_config), first, last, total)
    name = context.run_id, context.node_id
    host = hosts.pop(name, None)
    if host is None or host.settings != settings:
        cohort = _build(context, first, last, total, hosts)
        made = keeper.made() or _made(context.state)
        if made is not None:  # the same plan as in the rounds before: choosing takes time
            cohort.use_plan(made.plan)
        host = Host(cohort, settings, 0)
    hosts[name] = host
    return host


def _keeps(cohort: Cohort) -> bool:
    return cohort.strategy.keeps_rows or cohort.strategy.keeps_state


def _made(state: RecordDict) -> Made | None:
    """Return the last round that this node answered."""
    if "made" not in state:
        return None
    record = state.config_records["made"]
    return Made(_number(record, "round"), str(record["plan"]))


def _lost(cohort: Cohort, made: Made | None, number: int, fresh: bool, alone: bool) -> bool:
    """Say whether workers have lost what they keep, or refuse where the strategy does not let them begin again."""
    if fresh or not _keeps(cohort) or made is not None:
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


def _broadcast(content: RecordDict, cohort: Cohort) -> Broadcast:
    """Decode what the server sends, and see that its model is this node's."""
    broadcast = decode_broadcast(content, cohort.device)
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


def _build(context: Context, first: int, last: int, total: int, hosts: dict[tuple[int, int], Host]) -> Cohort:
    experiment = Experiment.from_mapping({**context.run_config, "num-workers": total, "nodes": 1})
    if "data" not in context.node_config:
        return Cohort(experiment, _shared(experiment, hosts), first, last)
    text = context.node_config["data"]
    if not isinstance(text, str):
        raise BadInput(f"node-config: data = {text!r} must be a string")
    source = parse("data", text, "node-config: data")
    try:
        dataset = source.load(experiment.seed, last - first)
        shards = experiment.parts.partition.assign(dataset, last - first, experiment.seed)
    except (ValueError, OSError, ImportError) as error:
        raise BadInput(f"node-config: data = {text!r}: {error}") from error
    return Cohort(experiment, federation.assemble(experiment, dataset, shards, first), first, last)


def _shared(experiment: Experiment, hosts: dict[tuple[int, int], Host]) -> federation.Federation:
    """Load the experiment's data, unless another node of the same run has them in this process."""
    for host in hosts.values():
        if host.cohort.experiment == experiment and "data" not in host.settings[1]:
            return host.cohort.federation
    return federation.load(experiment)


def _number(record: ConfigRecord, name: str) -> int:
    value = record[name]
    if not isinstance(value, int):
        raise TypeError(f"{name} = {value!r} must be a whole number")
    return value
