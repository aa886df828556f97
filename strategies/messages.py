"""What Flower's messages carry: trees in array records, one or many rows in a reply."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from torch import Tensor

from fedsim import tree
from fedsim.tree import Stack, Tree

log = logging.getLogger("flwr")

T = TypeVar("T")


def to_record(x: Tree) -> ArrayRecord:
    """Encode a tree for a message; dtypes and key order are kept."""
    return ArrayRecord({k: Array(v.detach().cpu().contiguous().numpy()) for k, v in x.items()})


def from_record(record: ArrayRecord) -> Tree:
    """Decode a tree from a message; dtypes and key order are kept."""
    return {k: torch.from_numpy(np.asarray(v.numpy(), order="C")) for k, v in record.items()}


def floating(x: Tree) -> Tree:
    """Let counters, such as those of a batch normalisation, take part in means: as float64."""
    return {k: leaf if leaf.is_floating_point() else leaf.to(torch.float64) for k, leaf in x.items()}


def as_dtypes(x: Tree, like: Tree) -> Tree:
    """Give a tree the dtypes and the key order of another; counters are rounded."""

    def cast(leaf: Tensor, dtype: torch.dtype) -> Tensor:
        return leaf.to(dtype) if dtype.is_floating_point else leaf.round().to(dtype)

    return {k: cast(x[k], leaf.dtype) for k, leaf in like.items()}


class Reply(NamedTuple):
    """A decoded reply of ``m`` rows.

    Attributes
    ----------
    node : int
        Who sent it.
    rows : Stack
        Leaves ``[m, *]``.
    position : list of int
        Which of the node's rows these are.
    weight : list of float
        Number of samples of each row.
    loss : list of float
        Training loss of each row, NaN where the node told none.
    metrics : MetricRecord
        As sent.
    """

    node: int
    rows: Stack
    position: list[int]
    weight: list[float]
    loss: list[float]
    metrics: MetricRecord

    def finite(self) -> Reply:
        """Keep the rows without NaN and infinity."""
        mask = torch.stack([x.isfinite().reshape(x.shape[0], -1).all(dim=1) for x in self.rows.values()])
        keep = mask.all(dim=0).nonzero().flatten()
        m = len(self.weight)
        if len(keep) == m:
            return self
        position = keep.tolist()
        metrics = self.metrics.copy()
        for k, v in self.metrics.items():
            if isinstance(v, list) and len(v) == m:
                metrics[k] = [float(v[i]) for i in position]
        return Reply(
            node=self.node,
            rows=tree.take(self.rows, keep),
            position=position,
            weight=[self.weight[i] for i in position],
            loss=[self.loss[i] for i in position],
            metrics=metrics,
        )


def read_reply(message: Message, like: Tree) -> Reply:
    """Decode the reply of a node that trained.

    Parameters
    ----------
    message : Message
        Holds one ArrayRecord, a row or a stack of rows, and one MetricRecord.
    like : Tree
        A model; leaves ``[*]``.

    Returns
    -------
    Reply
        With rows in the dtypes of the model, counters as float64.

    Raises
    ------
    ValueError
        If a record is missing or has other keys, shapes or lengths.
    """
    node = message.metadata.src_node_id
    x = from_record(_only(message.content.array_records, message))
    if x.keys() != like.keys():
        raise ValueError(f"node {node}: arrays {sorted(x)} must be those of the model, {sorted(like)}")
    if all(x[k].shape == leaf.shape for k, leaf in like.items()):
        x = {k: leaf[None] for k, leaf in x.items()}
    first = next(iter(x.values()))
    m = first.shape[0] if first.ndim else 0
    for k, leaf in like.items():
        if x[k].shape != (m, *leaf.shape):
            allowed = [*leaf.shape]
            raise ValueError(
                f"node {node}: shape {[*x[k].shape]} of {k!r} must be {allowed}, or {[m, *allowed]} for {m} rows"
            )
    record = _only(message.content.metric_records, message)
    losses = [record[k] for k in ("train_loss", "train-loss", "loss") if k in record]
    return Reply(
        node=node,
        rows={k: x[k].to(leaf.dtype) for k, leaf in floating(like).items()},
        position=[*range(m)],
        weight=_samples(record, m, node),
        loss=_per_row(losses[0], m, "loss", node) if losses else [float("nan")] * m,
        metrics=record,
    )


def read_metrics(message: Message) -> tuple[MetricRecord, list[float]]:
    """Decode the reply of a node that evaluated: its metrics and the number of samples of each row."""
    record = _only(message.content.metric_records, message)
    samples = record.get("num-examples", 1)
    m = len(samples) if isinstance(samples, list) else 1
    return record, _samples(record, m, message.metadata.src_node_id)


def mean_metrics(metrics: Iterable[tuple[MetricRecord, list[float]]]) -> MetricRecord:
    """Average each metric over the rows that have it, weighted by their numbers of samples."""
    totals: dict[str, float] = {}
    sums: dict[str, float] = {}
    for record, weight in metrics:
        for k, v in record.items():
            values = v if isinstance(v, list) else [v] * len(weight)
            if k == "num-examples" or len(values) != len(weight):
                continue
            totals[k] = totals.get(k, 0.0) + sum(weight)
            sums[k] = sums.get(k, 0.0) + sum(w * x for w, x in zip(weight, values, strict=True))
    return MetricRecord({k: sums[k] / total for k, total in totals.items() if total > 0})


def without_errors(replies: Iterable[Message]) -> list[Message]:
    """Sort replies by node, and log those that are errors instead of passing them on."""
    valid = []
    for message in sorted(replies, key=lambda m: m.metadata.src_node_id):
        if message.has_error():
            log.warning("node %d failed: %s", message.metadata.src_node_id, message.error.reason)
        else:
            valid.append(message)
    return valid


def _only(records: Mapping[str, T], message: Message) -> T:
    if len(records) != 1:
        raise ValueError(
            f"node {message.metadata.src_node_id}: a reply must hold one record of metrics and, after "
            f"training, one of arrays; it holds {sorted(message.content)}"
        )
    return next(iter(records.values()))


def _samples(record: MetricRecord, m: int, node: int) -> list[float]:
    """Give each of ``m`` rows its number of samples; one number is shared equally."""
    samples = record.get("num-examples", 1)
    return _per_row(samples if isinstance(samples, list) else samples / m, m, "num-examples", node)


def _per_row(value: float | list[int] | list[float], m: int, name: str, node: int) -> list[float]:
    """Give each of ``m`` rows its entry of a list, or the same number."""
    values = [float(v) for v in value] if isinstance(value, list) else [float(value)] * m
    if len(values) != m:
        raise ValueError(f"node {node}: {name} has {len(values)} entries, must have one for each of {m} rows")
    return values
