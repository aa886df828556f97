"""What is known of each worker: ``workers.json`` of a run directory, from which figures by worker are drawn."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from fedsim.carriers import Carrier, join_evaluations
from fedsim.checkpoints import replace_file, writing
from fedsim.federation import Federation
from fedsim.simulate import RunFailed
from fedsim.tree import Tree

FILE = "workers.json"

MOST_COUNTS = 1_000_000
"""Largest table of labels by worker that is kept."""

Workers = dict[str, Any]
"""Lists with an entry a worker: ``rows``; ``labels`` (counts of each class, called ``classes``); at the end of a
run with held-out rows ``loss`` and ``accuracy``, None for workers that have none."""


def describe(federation: Federation) -> Workers:
    """Count the training rows of every worker, and its labels where they are classes.

    Parameters
    ----------
    federation : Federation
        Data of all workers.

    Returns
    -------
    dict
        ``rows``, and of classes ``labels`` and ``classes``, their names; ``held_out``, the name of a domain that
        no worker has, where there is one.
    """
    data, shards = federation.dataset, federation.train
    found: Workers = {"rows": shards.sizes.tolist()}
    if data.domains is not None:
        found["held_out"] = data.domains.held_out
    w, c = shards.num_workers, max(2, data.num_outputs)
    if data.task in ("classes", "binary") and w * c <= MOST_COUNTS:
        owner = torch.repeat_interleave(torch.arange(w), shards.sizes)
        label = data.y[shards.order.to(data.y.device)].cpu().long()
        counts = torch.bincount(owner * c + label, minlength=w * c)
        found["labels"] = counts.reshape(w, c).tolist()
        found["classes"] = list(data.labels) or [str(i) for i in range(c)]
    return found


def evaluate(carrier: Carrier, model: Tree, num_workers: int) -> Workers:
    """Evaluate a model on each worker's held-out rows.

    Parameters
    ----------
    carrier : Carrier
        Where the workers live.
    model : Tree
        Parameters.
    num_workers : int
        Workers W.

    Returns
    -------
    dict
        ``loss`` and ``accuracy``; empty if no node answers any more.
    """
    try:
        parts, _ = carrier.evaluate(model)
    except RunFailed:
        return {}
    if not parts:
        return {}
    own = join_evaluations(parts)
    found: Workers = {}
    for name, values in (("loss", own.loss), ("accuracy", own.accuracy)):
        listed: list[float | None] = [None] * num_workers
        for worker, value in zip(own.worker.tolist(), values.tolist(), strict=True):
            listed[worker] = value if math.isfinite(value) else None
        found[name] = listed
    return found


def write(path: Path, workers: Workers) -> None:
    """Replace the file of a run directory."""
    with writing(path):
        replace_file(path / FILE, (json.dumps(workers) + "\n").encode())


def read(path: Path) -> Workers:
    """Read the file of a run directory.

    Parameters
    ----------
    path : Path
        Run directory.

    Returns
    -------
    dict
        Empty if there is no such file, as where nodes keep data of their own.
    """
    file = path / FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
