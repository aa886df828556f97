"""The page of a run: what came out, how it came about, and how to repeat it."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedsim import geometry_plots, pages, plots, runs, text_sample, workers
from fedsim.results import BETTER, NAMES, PROBED, best, final

MOST_SAID = 12
"""Rounds of one kind of trouble that are listed one by one."""

FILE = "report.html"


def write(directory: Path) -> Path:
    """Write the page of a run directory, finished or not.

    Parameters
    ----------
    directory : Path
        Run directory.

    Returns
    -------
    Path
        ``report.html`` in it.

    Raises
    ------
    BadInput
        If it is not a run directory.
    """
    done, known = runs.load(directory), workers.read(directory)
    experiment, summary, history = done.experiment, done.summary, done.history
    said, sample = warnings(done, known), text_sample.read(directory)
    figures = [pages.picture(d) for d in plots.drawings(history, known)]
    figures += [pages.picture(d) for d in geometry_plots.drawings(directory)]
    sections = [("figures", "Figures"), ("results", "Results")]
    sections += [("sample", "Sample")] * bool(sample) + [("experiment", "Experiment")]
    sections += [("repeat", "How to repeat it")]
    sections += [("machine", "Versions and machine")] if summary else []
    values = {
        "title": f"{experiment.strategy} on {experiment.data}",
        "lead": (
            f"{experiment.num_workers:,} workers, {experiment.partition}, {experiment.client}, {experiment.model}; "
            f"{len(history):,} rounds; run directory {directory}"
        ),
        "cards": _cards(history, summary),
        "said": said,
        "sections": [("warnings", f"Warnings ({len(said)})")] * bool(said) + sections,
        "pictures": figures,
        "values": _values(history),
        "costs": _costs(done),
        "sample": sample,
        "toml": pages.toml(experiment.replace({"out": ""}).to_toml()),
        "commands": _commands(directory),
        "machine": _machine(summary),
    }
    return pages.write(directory / FILE, "report.html", values)


def warnings(done: runs.Run, known: workers.Workers) -> list[str]:
    """Say what a reader of the figures should know: what is missing, and whom they leave out.

    Parameters
    ----------
    done : Run
        The run, finished or not.
    known : dict
        As `fedsim.workers.read` gives it.

    Returns
    -------
    list of str
        A sentence each.
    """
    history, said = done.history, []
    if not done.summary or len(history) < done.experiment.rounds:
        said.append(
            f"The run has not ended: {len(history)} of {done.experiment.rounds} rounds; "
            f"'fedsim resume {done.path}' continues it."
        )
    told: list[str] = []
    rounds = history["round"].tolist() if len(history) else []
    if "failures" in history:
        for number, failures in zip(rounds, history["failures"], strict=True):
            if isinstance(failures, dict):
                told += [f"Round {number}: {name} did not answer: {why}" for name, why in failures.items()]
    said += _shortened(told, "nodes that did not answer")
    told = []
    if "excluded" in history:
        for number, excluded in zip(rounds, history["excluded"], strict=True):
            if isinstance(excluded, list):
                some = ", ".join(map(str, excluded[:10])) + (", ..." if len(excluded) > 10 else "")
                told.append(f"Round {number}: not finite, left out of the average: workers {some}")
    said += _shortened(told, "rounds that left out workers")
    empty = sum(n == 0 for n in known.get("rows", []))
    if empty:
        said.append(f"{empty} of {len(known['rows'])} workers have no training rows.")
    accuracy = known.get("accuracy", [])
    without = sum(a is None for a in accuracy)
    if accuracy and without:
        said.append(
            f"{without} of {len(accuracy)} workers have no held-out rows; figures of workers' own accuracy leave them out."
        )
    for column in BETTER:
        bad = ~np.isfinite(history[column].dropna().astype(float)) if column in history else []
        if np.sum(bad):
            said.append(f"{NAMES[column]} is infinite in {int(np.sum(bad))} rounds.")
    return said


def _shortened(told: list[str], what: str) -> list[str]:
    more = len(told) - MOST_SAID
    return told[:MOST_SAID] + ([f"... and {more} more {what}; see history.jsonl"] if more > 0 else [])


def _cards(history: pd.DataFrame, summary: dict[str, Any]) -> list[tuple[str, str]]:
    cards = []
    chief = ("id_accuracy", "ood_accuracy") if "ood_accuracy" in history else ("test_accuracy",)
    for column in (
        *chief,
        "test_perplexity",
        "test_loss",
        "train_loss",
        *PROBED,
        "held_accuracy.p10",
    ):
        value = final(history, column)
        if not math.isnan(value):
            cards.append((NAMES[column], pages.number(value)))
    cards = cards[:4]
    if "seconds_per_round" in summary:
        cards.append(("ms a round", pages.number(1000 * summary["seconds_per_round"])))
    return cards


def _values(history: pd.DataFrame) -> pages.Rows:
    rows = []
    for column in BETTER:
        value, round = best(history, column)
        if round:
            name = NAMES[column] + (" (its best is an oracle's)" if column == "ood_accuracy" else "")
            texts = (name, pages.number(final(history, column)), pages.number(value), str(round))
            rows.append([pages.Cell(text) for text in texts])
    return pages.Rows(("", "final", "best", "in round"), rows)


def _costs(done: runs.Run) -> list[tuple[str, str]]:
    if not len(done.history):
        return []
    last = done.history.iloc[-1]
    found = [("rounds", pages.number(len(done.history)))]
    found += [("workers a round", pages.number(int(last["participants"])))]
    found += [
        (name, pages.number(int(last[name.replace(" ", "_")]))) for name in ("gradients", "local steps")
    ]
    found += [("bytes sent by workers", pages.num_bytes(last["bytes_up"]))]
    found += [("bytes received by workers", pages.num_bytes(last["bytes_down"]))]
    found += [("simulated seconds", pages.number(float(last["sim_time"])))]
    found += [("wall seconds", pages.number(float(last["wall_time"])))]
    if "parameters" in done.summary:
        found += [("parameters", pages.number(done.summary["parameters"]))]
    return found


def _machine(summary: dict[str, Any]) -> list[list[tuple[str, str]]]:
    if not summary:
        return []
    names = ("device", "plan", "threads", "peak_memory_mb", "peak_gpu_memory_mb")
    there = [
        (name.replace("_mb", " in MB").replace("_", " "), str(summary[name]))
        for name in names
        if name in summary
    ]
    return [[(name, str(value)) for name, value in summary.get("versions", {}).items()], there]


def _commands(directory: Path) -> list[tuple[str, str]]:
    here = shlex.quote(str(directory))
    file = shlex.quote(str(directory / "experiment.toml"))
    return [
        ("The same run again, in a new directory:", f"fedsim run {file} --out {here}-again"),
        ("The same run as a Flower app:", f"fedsim flower {file} --out {here}-flower"),
        (
            "Its history and model in Python:",
            f"import fedsim\n\nrun = fedsim.load({str(directory)!r})\nrun.history, run.model",
        ),
        ("This page again:", f"fedsim report {here}"),
    ]
