"""Files that survive an interruption: checkpoints, models, and whatever else is replaced as a whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from fedsim import tree
from fedsim.experiment import BadInput, Experiment
from fedsim.probes import Clock
from fedsim.simulate import Position, RunFailed
from fedsim.stored import pack, read_tree, unpack
from fedsim.tree import Tree

FREE = {"rounds", "out", "device", "plan", "nodes", "min-nodes", "round-timeout", "engine", "eval-every"}
"""Keys in which a resumed run may differ from its checkpoint."""


class Checkpoint(NamedTuple):
    """All that a run needs to go on.

    Attributes
    ----------
    position : Position
        Where the run stands.
    model : Tree
        The model that was evaluated last.
    workers : Tree
        What workers keep between rounds.
    plan : str
        The engine's plan.
    """

    position: Position
    model: Tree
    workers: Tree
    plan: str


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk or a directory that cannot be written into one line."""
    try:
        yield
    except OSError as error:
        raise RunFailed(
            f"{path}: cannot be written: {error.strerror or error}; what was written stays readable"
        ) from error


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that at any moment either the old or the new content is there."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_checkpoint(path: Path, experiment: Experiment, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint of a run directory.

    Parameters
    ----------
    path : Path
        Run directory.
    experiment : Experiment
        Written along, to refuse the checkpoint to other experiments.
    checkpoint : Checkpoint
        What is written; a tensor that it holds under several names is written once.
    """
    position = checkpoint.position
    nested = {
        "state": position.state,
        "broadcast": position.broadcast,
        "timetable": position.timetable,
        "memories": {str(i): memory for i, memory in enumerate(position.memories)},
        "workers": checkpoint.workers,
        "model": checkpoint.model,
    }
    about = {
        "round": position.round,
        "clock": position.clock._asdict(),
        "experiment": experiment.to_mapping(),
        "plan": checkpoint.plan,
    }
    content = pack(tree.flatten_nested(nested), {k: json.dumps(v) for k, v in about.items()})
    with writing(path):
        replace_file(_file(path), content)


def read_checkpoint(path: Path, experiment: Experiment, device: torch.device) -> Checkpoint | None:
    """Read the checkpoint of a run directory.

    Parameters
    ----------
    path : Path
        Run directory.
    experiment : Experiment
        What is to go on.
    device : torch.device
        Where tensors shall be.

    Returns
    -------
    Checkpoint or None
        None if there is none: the run was interrupted in its first round.

    Raises
    ------
    BadInput
        If the file is damaged, of another experiment, or beyond the last round.
    """
    if not _file(path).exists():
        return None
    try:
        flat, about = unpack(_file(path), device)
        number, theirs = json.loads(about["round"]), json.loads(about["experiment"])
        clock, plan = Clock(**json.loads(about["clock"])), json.loads(about["plan"])
        nested = tree.unflatten_nested(flat)
        state, broadcast, model = nested["state"], nested["broadcast"], nested["model"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"{_file(path)}: is damaged ({error}); delete it to start this run again from round 0"
        ) from None
    _check_same(_file(path), experiment, theirs)
    if number > experiment.rounds:
        raise BadInput(f"rounds = {experiment.rounds}: {path} has {number} rounds already")
    memories = [nested.get("memories", {}).get(str(i), {}) for i in range(len(experiment.parts.probes))]
    workers = tree.flatten_nested(nested.get("workers", {}))
    position = Position(number, state, broadcast, clock, tuple(memories), nested.get("timetable", {}))
    return Checkpoint(position, model, workers, plan)


def write_model(path: Path, model: Tree) -> None:
    """Write ``model.safetensors`` into a run directory."""
    with writing(path):
        replace_file(path / "model.safetensors", pack(model, {}))


def read_model(path: Path) -> Tree:
    """Read ``model.safetensors`` of a run directory.

    Parameters
    ----------
    path : Path
        Run directory.

    Returns
    -------
    Tree
        On the CPU, in the model's order of parameters; empty if there is no such file.

    Raises
    ------
    BadInput
        If the file is damaged.
    """
    file = path / "model.safetensors"
    if not file.exists():
        return {}
    try:
        return read_tree(file)
    except ValueError as error:
        raise BadInput(str(error)) from None


class Made(NamedTuple):
    """The last round that a node made, and the plan by which it did."""

    round: int
    plan: str


def write_kept(file: Path, made: Made, kept: Tree) -> None:
    """Replace the file of what a node's workers keep between rounds."""
    replace_file(file, pack(kept, {k: json.dumps(v) for k, v in made._asdict().items()}))


def read_made(file: Path) -> Made | None:
    """Read who wrote the file of `write_kept`: None if it is missing or damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata()
        made = Made(json.loads(about["round"]), json.loads(about["plan"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    return made if isinstance(made.round, int) and isinstance(made.plan, str) else None


def read_kept(file: Path) -> Tree:
    """Read what `write_kept` wrote, on the CPU."""
    return unpack(file, torch.device("cpu"))[0]


def _file(path: Path) -> Path:
    return path / "checkpoint" / "last.safetensors"


def _check_same(file: Path, experiment: Experiment, theirs: Mapping[str, Any]) -> None:
    ours = experiment.to_mapping()
    try:
        differing = experiment.differing(Experiment.from_mapping(theirs))
    except BadInput:  # of another version
        differing = [k for k in ours if theirs.get(k) != ours[k]]
    listed = [f"{k}: {theirs.get(k)!r} there, {ours[k]!r} here" for k in differing if k not in FREE]
    if listed:
        raise BadInput(f"{file}: is a checkpoint of another experiment: {'; '.join(listed)}")
