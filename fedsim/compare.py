"""Runs side by side: what differs between their experiments, final and best values over seeds, and overlays."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tomli_w

from fedsim import pages, runs
from fedsim.groups import Group, group, held_out, leading, load, meaning, present, summarise
from fedsim.overlays import overlays
from fedsim.results import BETTER, DOMAINS, NAMES, PROBED, final, heading, plus_minus


def cells(table: pd.DataFrame, brief: bool = False) -> pages.Rows:
    """Write the table for people: mean +- standard deviation over seeds; the best of a column is marked.

    Parameters
    ----------
    table : pandas.DataFrame
        As `summarise` gives it.
    brief : bool
        Show two main figures only, those of probes before others, and no costs.

    Returns
    -------
    Rows
        For pages and terminals.
    """
    columns = present(table)
    if brief:
        probed = [c for c in columns if c in PROBED]
        columns = [c for c in columns if c not in PROBED][
            : 1 if probed and columns[0] not in DOMAINS else 2
        ] + probed
    header = ["", "runs", "rounds"]
    winners: dict[str, int] = {}
    for c in columns:
        for kind in ("final", "best"):
            values = table[f"{c}.{kind}"].to_numpy(dtype=float)
            header.append(heading(c, kind))
            if len(values) > 1:
                winners[f"{c}.{kind}"] = int(
                    np.nanargmax(values) if BETTER[c] is max else np.nanargmin(values)
                )
    header += [] if brief else ["gradients", "bytes", "simulated seconds", "ms a round"]
    body = []
    for i, row in enumerate(table.to_dict("records")):
        texts = [pages.Cell(str(row["label"])), pages.Cell(str(row["runs"])), pages.Cell(str(row["rounds"]))]
        for c in columns:
            for kind in ("final", "best"):
                text = plus_minus(row[f"{c}.{kind}"], row[f"{c}.{kind}_sd"])
                texts.append(pages.Cell(text, winners.get(f"{c}.{kind}") == i))
        if not brief:
            texts.append(pages.Cell(pages.number(int(row["gradients"]))))
            texts.append(pages.Cell(pages.num_bytes(row["bytes_up"] + row["bytes_down"])))
            texts.append(pages.Cell(pages.number(row["sim_time"])))
            texts.append(pages.Cell(pages.number(1000 * row["seconds_per_round"])))
        body.append(texts)
    return pages.Rows(header, body)


def write(directories: Sequence[Path], path: Path) -> pages.Rows:
    """Write the page that compares runs.

    Parameters
    ----------
    directories : sequence of Path
        Run directories.
    path : Path
        File of the page.

    Returns
    -------
    Rows
        A table for terminals, with two of the main figures.
    """
    found = load(directories)
    groups = group(found)
    table = summarise(groups)
    command = " ".join(["fedsim compare", *(shlex.quote(str(run.path)) for run in found)])
    content = {
        "title": f"{len(found)} runs compared" if len(found) > 1 else "1 run",
        "lead": f"{len(groups)} groups of runs that are equal but for their seeds.",
        "note": note(groups),
        "values": cells(table),
        "said": unfinished(found),
        "pictures": [pages.picture(d) for d in overlays(groups)],
        "runs": listed(groups),
        "toml": common(found),
        "commands": [("This page again:", f"{command} --out {shlex.quote(str(path))}")],
        "sections": SECTIONS,
    }
    pages.write(path, "compare.html", content)
    return cells(table, brief=True)


NOTE = "Mean ± standard deviation over seeds where there are several; the best of a column is bold."


def note(groups: Sequence[Group]) -> str:
    """Say how to read the table of groups of runs, and which domains they hold out."""
    names = held_out(groups)
    if not names:
        return NOTE
    return f"{NOTE} Held out: {names}. Who chooses by the held-out domain is an oracle: nobody who trains knows it."


SECTIONS = [
    ("table", "Table"),
    ("figures", "Figures"),
    ("runs", "Runs"),
    ("experiment", "What they have in common"),
    ("repeat", "How to repeat it"),
]


def unfinished(found: Sequence[runs.Run]) -> list[str]:
    """Say which runs have not ended."""
    return [
        f"{run.path} has not ended: {len(run.history)} of {run.experiment.rounds} rounds."
        for run in found
        if not run.summary or len(run.history) < run.experiment.rounds
    ]


def listed(groups: Sequence[Group]) -> pages.Rows:
    """List every run with its seed, leading figure and directory.

    Parameters
    ----------
    groups : sequence of Group
        As `group` gives them.

    Returns
    -------
    Rows
        For pages.
    """
    chief = leading(summarise(groups))
    body = [
        [
            pages.Cell(g.label),
            pages.Cell(str(run.experiment.seed)),
            pages.Cell(pages.number(final(run.history, chief))),
            pages.Cell(str(run.summary.get("device", ""))),
            pages.Cell(str(run.summary.get("plan", ""))),
            pages.Cell(str(run.path)),
        ]
        for g in groups
        for run in g.runs
    ]
    return pages.Rows(("", "seed", f"{NAMES[chief]}, final", "device", "plan", "directory"), body)


def common(found: Sequence[runs.Run]) -> Any:
    """Write the keys on which all runs agree, as TOML.

    Parameters
    ----------
    found : sequence of Run
        The runs.

    Returns
    -------
    Markup
        Highlighted.
    """
    meanings = [meaning(run.experiment) for run in found]
    written = found[0].experiment.to_mapping()
    same = {k: written[k] for k, v in meanings[0].items() if all(m[k] == v for m in meanings)}
    return pages.toml(tomli_w.dumps(same))
