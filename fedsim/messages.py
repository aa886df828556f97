"""What nodes and server say to each other, as Flower records: encoding, decoding, and checks of what comes in.

Four requests: ``hello`` (who are you, what code do you run), ``round`` (make your local steps), ``rows`` (send the
rows of some workers) and ``held`` (evaluate a model on your workers' own rows). Trees travel as arrays, everything else as lists of numbers;
nothing is unpickled or evaluated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedsim import tree
from fedsim.cohort import Evaluated, Trained, Upload
from fedsim.source import code_hash
from fedsim.tree import Stack, Tree
from strategies import Broadcast, Report, from_record, to_record

HELLO = "query.fedsim_hello"
ROUND = "train.fedsim_round"
ROWS = "query.fedsim_rows"
HELD = "evaluate.fedsim_held"


HEADER_BYTES = 4096
"""What an array's header may take; NumPy writes 128."""


class BadReply(Exception):
    """A reply that cannot be used; the message says what is wrong with it."""


def check_code(content: RecordDict) -> None:
    """Demand that the other side runs the same source.

    Parameters
    ----------
    content : RecordDict
        A request or a reply.

    Raises
    ------
    BadReply
        If it does not, or does not say.
    """
    about = content.config_records.get("about")
    theirs = about.get("code") if about is not None else None
    if theirs != code_hash():
        raise BadReply(
            f"runs other code (hash {theirs}, here {code_hash()}): install the same version of fedsim"
        )


def encode_broadcast(broadcast: Broadcast, about: dict[str, int | str]) -> RecordDict:
    """Encode what the server sends: one array record a channel, and settings."""
    content = RecordDict({f"broadcast.{k}": to_record(channel) for k, channel in broadcast.items()})
    content["about"] = ConfigRecord({"code": code_hash(), **about})
    return content


def decode_broadcast(content: RecordDict, device: torch.device) -> Broadcast:
    """Decode all channels onto a device."""
    return {
        k.removeprefix("broadcast."): tree.tree_map(lambda x: x.to(device), from_record(record))
        for k, record in content.array_records.items()
        if k.startswith("broadcast.")
    }


def encode_trained(trained: Trained, round: int, lost: bool = False) -> RecordDict:
    """Encode a node's answer to ``round``: every worker's report, and its row, or the mean of all rows, or its score."""
    report = {name: column.tolist() for name, column in trained.report._asdict().items()}
    content = RecordDict({"rows": to_record(trained.rows), "report": MetricRecord(report)})
    if not trained.rows:
        content["score"] = MetricRecord({"score": trained.told.loss.tolist()})
    about = {"code": code_hash(), "round": round, "excluded": list(trained.excluded), "lost": int(lost)}
    content["about"] = ConfigRecord(about)
    return content


def encode_rows(rows: Stack) -> RecordDict:
    """Encode a node's answer to ``rows``."""
    return RecordDict({"rows": to_record(rows), "about": ConfigRecord({"code": code_hash()})})


def decode_rows(content: RecordDict, theta: Tree, count: int) -> Stack:
    """Decode and check a node's answer to ``rows``.

    Parameters
    ----------
    content : RecordDict
        What came.
    theta : Tree
        A model of the expected names, shapes and dtypes.
    count : int
        Rows that were asked for.

    Returns
    -------
    Stack
        On the CPU.

    Raises
    ------
    BadReply
        If parameters are missing, of other types or shapes, or not finite.
    """
    check_code(content)
    rows = _decode_rows(content, theta, count)
    if not all(bool(torch.isfinite(x).all()) for x in rows.values()):
        raise BadReply("rows: not finite")
    return rows


def has_lost(content: RecordDict) -> bool:
    """Whether a node says that it had lost what its workers keep, and that they began again."""
    return bool(content.config_records["about"].get("lost", 0))


def decode_trained(
    content: RecordDict, theta: Tree, participants: Tensor, upload: Upload, round: int
) -> Trained:
    """Decode and check a node's answer to ``round``.

    Parameters
    ----------
    content : RecordDict
        What came.
    theta : Tree
        A model of the expected names, shapes and dtypes.
    participants : Tensor
        Ids of the participants that live at this node, ascending.
    upload : {"rows", "mean", "reports"}
        Whether a row a worker was asked for, or one weighted mean, or scores alone.
    round : int
        Round that was asked for.

    Returns
    -------
    Trained
        On the CPU; workers whose row or loss is not finite are moved to ``excluded``.

    Raises
    ------
    BadReply
        If the answer is that of another round, records, columns or parameters are missing, of other types, shapes or lengths, or longer in bytes than such arrays are, if workers are missing,
        strange or named twice, or if weights, counts or a mean of rows are not sensible numbers.
    """
    check_code(content)
    theirs = content.config_records["about"].get("round")
    if theirs != round:
        raise BadReply(f"answers round {theirs}, asked for round {round}")
    report, excluded = _decode_report(content)
    workers = report.worker.tolist()
    _check_workers([*workers, *excluded], participants.tolist())
    if workers != sorted(workers):
        raise BadReply("report: workers must ascend")
    if not (bool(torch.isfinite(report.weight).all()) and bool((report.weight >= 0).all())):
        raise BadReply("report: weights must be finite and >= 0")
    if workers and not bool(report.weight.sum() > 0):
        raise BadReply("report: weights must not all be 0")
    if any(bool((x < 0).any()) for x in (report.steps, report.gradients, report.idle)):
        raise BadReply("report: steps, gradients and idle must be >= 0")
    if upload == "reports":
        (score,) = _decode_columns(content, "score", ["score"])
        if len(score) != len(workers) or not bool(torch.isfinite(report.loss).all()):
            raise BadReply("score: must have one entry a worker, and losses must be finite")
        return Trained({}, report._replace(loss=score), report, excluded)
    count = len(workers) if upload == "rows" else min(1, len(workers))
    rows = _decode_rows(content, theta, count)
    finite = torch.stack([
        torch.isfinite(x).reshape(count, theta[k].numel()).all(1) for k, x in rows.items()
    ]).all(0)
    if upload == "mean":
        if not bool(finite.all()) or not bool(torch.isfinite(report.loss).all()):
            raise BadReply("the mean of its rows, or a loss, is not finite")
        return Trained(rows, report_of_mean(report), report, excluded)
    finite &= torch.isfinite(report.loss)
    if not bool(finite.all()):
        excluded = sorted([*excluded, *report.worker[~finite].tolist()])
        rows, report = tree.take(rows, finite), Report(*(x[finite] for x in report))
    return Trained(rows, report, report, excluded)


def report_of_mean(report: Report) -> Report:
    """Sum up the reports of workers in the one entry that belongs to the weighted mean of their rows."""
    if not len(report.worker):
        return report
    total = report.weight.sum()
    loss = (report.loss * report.weight).sum() / total
    return Report(
        report.worker[:1], loss[None], total[None], report.steps.max()[None], report.gradients.sum()[None],
        report.idle.sum()[None],
    )  # fmt: skip


def encode_evaluated(found: Evaluated) -> RecordDict:
    """Encode a node's answer to ``held``."""
    columns = {name: column.tolist() for name, column in found._asdict().items()}
    return RecordDict({"held": MetricRecord(columns), "about": ConfigRecord({"code": code_hash()})})


def decode_evaluated(content: RecordDict, first: int, last: int) -> Evaluated:
    """Decode a node's answer to ``held``.

    Parameters
    ----------
    content : RecordDict
        What came.
    first, last : int
        The node's workers are ``first .. last - 1``.

    Returns
    -------
    Evaluated
        One entry a worker with held-out rows.

    Raises
    ------
    BadReply
        If columns are missing or of different lengths, or workers are named that do not live there.
    """
    check_code(content)
    worker, loss, accuracy = _decode_columns(content, "held", Evaluated._fields)
    workers = worker.tolist()
    if workers != sorted(set(workers) & set(range(first, last))):
        raise BadReply(f"held: workers must ascend and be in {first}..{last - 1}")
    return Evaluated(worker.to(torch.int64), loss, accuracy)


def _decode_report(content: RecordDict) -> tuple[Report, list[int]]:
    worker, loss, weight, steps, gradients, idle = _decode_columns(content, "report", Report._fields)
    for name, x in (("worker", worker), ("steps", steps), ("gradients", gradients), ("idle", idle)):
        if not bool((x == x.round()).all()) or not bool((x.abs() < 2**53).all()):
            raise BadReply(f"report: {name} must be whole numbers")
    excluded = content.config_records["about"].get("excluded")
    if not isinstance(excluded, list) or not all(isinstance(w, int) for w in excluded):
        raise BadReply("about: excluded must be a list of worker ids")
    whole = torch.int64
    counts = [x.to(whole) for x in (steps, gradients, idle)]
    return Report(worker.to(whole), loss, weight, *counts), [*map(int, excluded)]


def _decode_columns(content: RecordDict, name: str, columns: Sequence[str]) -> list[Tensor]:
    """Decode lists of numbers of one length, as float64."""
    record = content.metric_records.get(name)
    if record is None:
        raise BadReply(f"record {name!r} is missing")
    found = []
    for column in columns:
        values = record.get(column)
        if not isinstance(values, list):
            raise BadReply(f"{name}: {column} must be a list of numbers")
        found.append(torch.tensor(values, dtype=torch.float64))
    if len({len(x) for x in found}) != 1:
        raise BadReply(f"{name}: columns have different lengths: {[len(x) for x in found]}")
    return found


def _check_workers(named: list[int], expected: list[int]) -> None:
    strange, missing = sorted({*named} - {*expected}), sorted({*expected} - {*named})
    if strange:
        raise BadReply(f"names workers {_few(strange)} that do not take part at this node")
    if missing:
        raise BadReply(f"leaves out workers {_few(missing)}")
    if len(named) != len(expected):
        raise BadReply(f"names workers twice: {_few(sorted((Counter(named) - Counter(expected)).keys()))}")


def _few(workers: list[int]) -> str:
    return ", ".join(map(str, workers[:5])) + (", ..." if len(workers) > 5 else "")


def _decode_rows(content: RecordDict, theta: Tree, count: int) -> Stack:
    record = content.array_records.get("rows", ArrayRecord())
    wrong = sorted(record.keys() ^ theta.keys())
    if wrong:
        raise BadReply(f"rows: missing or strange parameters: {', '.join(wrong[:4])}")
    for name, x in theta.items():  # before anything is decoded
        most = HEADER_BYTES + count * x.numel() * x.element_size()
        if len(record[name].data) > most:
            raise BadReply(f"rows: {name} has {len(record[name].data)} bytes, at most {most} are expected")
    try:
        found = from_record(record)
    except Exception as error:  # a foreign array may make the decoder raise anything, MemoryError included
        raise BadReply(f"rows: unreadable array: {str(error)[:100]}") from None
    for name, x in theta.items():
        expected, got = (count, *x.shape), tuple(found[name].shape)
        if got != expected or found[name].dtype != x.dtype:
            raise BadReply(f"rows: {name} is {found[name].dtype} {got}, must be {x.dtype} {expected}")
    return {name: found[name] for name in theta}
