"""Which runs belong together, and what to call them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from fedsim import runs, workers
from fedsim.experiment import COMPONENTS, BadInput, Experiment
from fedsim.registry import expression
from fedsim.results import BETTER, best, final, over_seeds

SILENT = ("out", "seed")
"""Keys that are not part of a label: the directory, and the seed over which runs are averaged."""


class Group(NamedTuple):
    """Runs that are equal but for their seeds.

    Attributes
    ----------
    label : str
        What sets them apart from the other groups.
    runs : list of Run
        One a seed.
    """

    label: str
    runs: list[runs.Run]


def load(directories: Sequence[Path]) -> list[runs.Run]:
    """Read run directories, each once.

    Parameters
    ----------
    directories : sequence of Path
        At least one.

    Returns
    -------
    list of Run
        Those that have a history.

    Raises
    ------
    BadInput
        If one is not a run directory, or none has a history.
    """
    unique = {path.resolve(): path for path in directories}
    found = [run for run in map(runs.load, unique.values()) if len(run.history)]
    if not found:
        raise BadInput("none of the directories holds a round of a run")
    return found


def group(found: Sequence[runs.Run]) -> list[Group]:
    """Put runs together that differ in their seeds only, and name the groups by what differs between them.

    Runs that are equal in their seeds too, as of two machines, are told apart by their directories.

    Parameters
    ----------
    found : sequence of Run
        The runs.

    Returns
    -------
    list of Group
        In the order in which the runs are given.
    """
    names = labels([run.experiment for run in found])
    seeds: dict[str, list[int]] = {}
    for run, name in zip(found, names, strict=True):
        seeds.setdefault(name, []).append(run.experiment.seed)
    groups: dict[str, list[runs.Run]] = {}
    for run, name in zip(found, names, strict=True):
        twins = len(set(seeds[name])) < len(seeds[name])
        groups.setdefault(f"{name}, {run.path.name}" if twins else name, []).append(run)
    return [Group(label, members) for label, members in groups.items()]


def labels(experiments: Sequence[Experiment]) -> list[str]:
    """Name experiments by the keys in which they differ; components are written without their key.

    Parameters
    ----------
    experiments : sequence of Experiment
        Seeds and directories do not count.

    Returns
    -------
    list of str
        Equal for experiments that mean the same; the strategy where none differ.

    Examples
    --------
    >>> labels([Experiment(local_steps=5), Experiment(client="SGD(0.5)", local_steps=5)])
    ['SGD(lr=0.1)', 'SGD(lr=0.5)']
    >>> labels([Experiment(seed=1), Experiment(rounds=7)])
    ['rounds=50', 'rounds=7']
    """
    meanings = [meaning(e) for e in experiments]
    every = [k for k in meanings[0] if len({m[k] for m in meanings}) > 1] or ["strategy"]
    # How it was computed is worth a label only where nothing else differs.
    differing = [k for k in every if k not in {"plan", "device"}] or every
    differing.sort(key=lambda k: k != "strategy")
    written: list[list[str]] = [[] for _ in experiments]
    for k in differing:
        parts = [getattr(e.parts, k) for e in experiments] if k in COMPONENTS else []
        for i, m in enumerate(meanings):
            written[i].append(_written(parts[i], parts) if parts else f"{k}={m[k]}")
    return [", ".join(texts) for texts in written]


def summarise(groups: Sequence[Group]) -> pd.DataFrame:
    """Return final and best values of every group.

    Parameters
    ----------
    groups : sequence of Group
        As `group` gives them.

    Returns
    -------
    pandas.DataFrame
        A row a group: ``label``, ``runs``, ``rounds``, and for each main figure ``<name>.final``, ``<name>.best`` as
        means over seeds and ``<name>.final_sd``, ``<name>.best_sd``; then means of what it cost.
    """
    rows = []
    columns = [c for c in BETTER if any(c in run.history for g in groups for run in g.runs)]
    for label, members in groups:
        row: dict[str, Any] = {"label": label, "runs": len(members)}
        row["rounds"] = min(len(run.history) for run in members)
        for c in columns:
            for kind, values in (
                ("final", [final(run.history, c) for run in members]),
                ("best", [best(run.history, c)[0] for run in members]),
            ):
                row[f"{c}.{kind}"], row[f"{c}.{kind}_sd"], _ = over_seeds(values)
        for c in ("gradients", "bytes_up", "bytes_down", "sim_time"):
            row[c] = float(np.mean([run.history[c].iloc[-1] for run in members]))
        row["seconds_per_round"] = over_seeds([
            run.summary.get("seconds_per_round", math.nan) for run in members
        ]).mean
        rows.append(row)
    return pd.DataFrame(rows)


def present(table: pd.DataFrame) -> list[str]:
    """Return the main figures that at least one group has; accuracies on test sets that all are held-out domains once only."""
    names = [c for c in BETTER if f"{c}.final" in table]
    found = [c for c in names if np.isfinite(table[f"{c}.final"].to_numpy(dtype=float)).any()]
    if "ood_accuracy" in found and table["ood_accuracy.final"].equals(table["test_accuracy.final"]):
        found.remove("test_accuracy")
    return found


def held_out(groups: Sequence[Group]) -> str:
    """Name the domains that the runs hold out; empty if there are none."""
    known = (workers.read(run.path).get("held_out", "") for g in groups for run in g.runs)
    return "; ".join(dict.fromkeys(name for name in known if name))


def leading(table: pd.DataFrame) -> str:
    """Return the main figure by which groups are ranked: the first that any of them has."""
    return next(iter(present(table)), "train_loss")


def meaning(experiment: Experiment) -> dict[str, Any]:
    """Return the keys of an experiment but seed and directory, with expressions written in one way."""
    values = {k: v for k, v in experiment.to_mapping().items() if k not in SILENT}
    for k in COMPONENTS:
        values[k] = expression(getattr(experiment.parts, k))
    values["probes"] = "; ".join(expression(p) for p in experiment.parts.probes)
    return values


def _written(component: Any, others: Sequence[Any]) -> str:
    """Write a component with the arguments that are not at their defaults, or that others of its class have otherwise."""
    if not expression(component).startswith(f"{type(component).__name__}("):
        return expression(component)
    shown = []
    for field in dataclasses.fields(component):
        value = getattr(component, field.name)
        differs = any(getattr(o, field.name) != value for o in others if type(o) is type(component))
        if field.init and field.repr and (value != field.default or differs):
            shown.append(f"{field.name}={expression(value)}")
    return f"{type(component).__name__}({', '.join(shown)})" if shown else type(component).__name__
