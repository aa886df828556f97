"""What an experiment's data, partition and model come to: loaded once, shared by every carrier."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from fedsim.data import Dataset, Shards, hold_out
from fedsim.experiment import BadInput, Experiment
from fedsim.landscapes import StartsApart
from fedsim.models import check_output, initialise
from fedsim.objectives import Objective, check_task
from fedsim.tree import Stack, Tree, tree_map

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Federation(NamedTuple):
    """Data of all workers and the model they start from.

    Attributes
    ----------
    dataset : Dataset
        On the device, features in the experiment's precision.
    train, held : Shards
        Which rows each worker trains on and evaluates itself on (``held`` is empty without a holdout).
    module : nn.Module
        Template of the model.
    theta : Tree
        Initial parameters.
    objective : Objective
        Made ready for the data's task.
    first : int
        Id of the first worker of the shards; 0 unless a node knows only its own.
    starts : Stack or None
        Initial rows of all workers where they start apart; ``theta`` is their mean.
    """

    dataset: Dataset
    train: Shards
    held: Shards
    module: nn.Module
    theta: Tree
    objective: Objective
    first: int = 0
    starts: Stack | None = None


def resolve_device(name: str) -> torch.device:
    """Turn ``auto`` into the machine's best device and refuse a device that is absent.

    Parameters
    ----------
    name : str
        ``auto``, ``cpu``, ``cuda`` or ``cuda:1`` ...

    Returns
    -------
    torch.device
        The device.

    Raises
    ------
    BadInput
        If a CUDA device is asked for and absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= found:
        raise BadInput(
            f"device = {name!r}: this machine has {found} CUDA devices; use 'cpu', or 'auto' to take what there is"
        )
    return device


def load(experiment: Experiment) -> Federation:
    """Load the data, share it out among the workers and initialise the model.

    Parameters
    ----------
    experiment : Experiment
        The run.

    Returns
    -------
    Federation
        On the experiment's device.

    Raises
    ------
    BadInput
        If data, partition, model and objective do not fit each other; one line.
    """
    parts, e = experiment.parts, experiment
    try:
        dataset = parts.data.load(e.seed, e.num_workers)
    except (ValueError, OSError, ImportError) as error:
        raise BadInput(f"data = {e.data!r}: {error}") from error
    try:
        shards = parts.partition.assign(dataset, e.num_workers, e.seed)
    except (ValueError, ImportError) as error:
        raise BadInput(f"partition = {e.partition!r}: {error}") from error
    return assemble(experiment, dataset, shards)


def assemble(experiment: Experiment, dataset: Dataset, shards: Shards, first: int = 0) -> Federation:
    """Join data that is already shared out with the experiment's model.

    Parameters
    ----------
    experiment : Experiment
        The run.
    dataset : Dataset
        The rows.
    shards : Shards
        Who owns which.
    first : int
        Id of the first worker of the shards.

    Returns
    -------
    Federation
        On the experiment's device.

    Raises
    ------
    BadInput
        If model or objective do not fit the data.
    """
    parts, e = experiment.parts, experiment
    device, dtype = resolve_device(e.device), DTYPES[e.dtype]
    train, held = hold_out(shards, e.holdout, e.seed)
    try:
        objective = check_task(parts.objective, dataset.task)
    except ValueError as error:
        raise BadInput(f"objective = {e.objective!r}: {error}") from None

    def convert(x: torch.Tensor) -> torch.Tensor:
        return x.to(device, dtype if x.is_floating_point() else x.dtype)

    if dataset.cuts is not None and e.batch_size == 0:
        raise BadInput(f"batch-size = 0: data = {e.data!r} cuts pictures at random; set batch-size > 0")
    cuts = None if dataset.cuts is None else dataset.cuts.convert(convert)
    dataset = Dataset(
        convert(dataset.x) if cuts is None else cuts.middle(),
        convert(dataset.y),
        convert(dataset.test_x),
        convert(dataset.test_y),
        dataset.num_outputs,
        dataset.task,
        dataset.name,
        dataset.workers,
        dataset.labels,
        cuts,
        dataset.domains
        and dataset.domains._replace(x=convert(dataset.domains.x), y=convert(dataset.domains.y)),
    )
    try:
        module, theta = initialise(parts.model, dataset.input_shape, dataset.num_outputs, e.seed, dtype)
        check_output(module, theta, dataset.x[:2].cpu(), dataset.num_outputs, dataset.task)
        starts = None
        if isinstance(parts.model, StartsApart):
            starts = parts.model.starts(e.num_workers, e.seed, dataset.input_shape)
            starts = tree_map(lambda x: x.to(device, dtype), starts)
            theta = tree_map(lambda x: x.mean(0), starts)
    except (ValueError, RuntimeError) as error:
        raise BadInput(f"model = {e.model!r} on {dataset.name}: {str(error).splitlines()[0]}") from None
    theta = tree_map(lambda x: x.to(device), theta)
    try:
        dataset = _poison(experiment, dataset, train, first)
    except ValueError as error:
        raise BadInput(f"attack = {e.attack!r}: {error}") from None
    return Federation(dataset, train, held, module.to(device), theta, objective, first, starts)


def _poison(experiment: Experiment, dataset: Dataset, train: Shards, first: int) -> Dataset:
    """Give attackers the labels on which they train."""
    attack, e = experiment.parts.attack, experiment
    if not attack.poisons:
        return dataset
    if dataset.task not in ("classes", "binary"):
        raise ValueError(f"needs classes, the task of {dataset.name} is {dataset.task!r}")
    bad = attack.attackers(e.num_workers, e.seed)[first : first + train.num_workers]
    mine = torch.repeat_interleave(bad, train.sizes)
    rows, others = train.order[mine], train.order[~mine]
    if bool(torch.isin(rows, others).any()) or len(rows.unique()) < len(rows):
        raise ValueError(
            f"partition = {e.partition!r} gives rows to several workers, whose labels it would flip too"
        )
    rows, y = rows.to(dataset.y.device), dataset.y.clone()
    y[rows] = attack.poison(y[rows], 2 if dataset.task == "binary" else dataset.num_outputs)
    return replace(dataset, y=y)
