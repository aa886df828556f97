"""Sweeps over optimisers: settings of each drawn at random, and how accuracy in the training domains goes with that in held-out ones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from fedsim import domain_plots, federation, pages, runs
from fedsim.analysis.generalisation import RANGES, Draw, boxes, compare, draw
from fedsim.canvas import style
from fedsim.errors import BadInput
from fedsim.experiment import Experiment
from fedsim.plots import Drawing
from fedsim.probes import Environments
from fedsim.results import final

TRAIN = "environments.accuracy.mean"
"""Column of the history that holds the accuracy on training rows."""

DIVERGED = "not finite"
"""What the error of a run says that diverged."""


class Search(NamedTuple):
    """Optimisers whose settings are drawn at random.

    Attributes
    ----------
    optimisers : tuple of str
        Of `fedsim.analysis.generalisation.RANGES`.
    number : int
        Settings of each.
    keep : float or None
        Least ID accuracy of the runs that are compared; None for half of that of guessing.
    """

    optimisers: tuple[str, ...]
    number: int
    keep: float | None = None

    @property
    def words(self) -> str:
        """The options of the command line that mean the same."""
        keep = "" if self.keep is None else f" --keep {self.keep:g}"
        return f"--optimisers {','.join(self.optimisers)} --draws {self.number}{keep}"

    def draws(self, seed: int) -> list[Draw]:
        """Draw all settings."""
        return [one for name in self.optimisers for one in draw(name, self.number, seed)]


class Place(NamedTuple):
    """A held-out domain: its name, and the accuracy of guessing."""

    name: str
    chance: float


def read_search(optimisers: str, number: int, keep: float | None) -> Search | None:
    """Read the options of the command line.

    Parameters
    ----------
    optimisers : str
        Names with commas between them, "all", or nothing.
    number : int
        Settings of each, >= 1.
    keep : float or None
        In [0, 1].

    Returns
    -------
    Search or None
        None if no optimiser is named.

    Raises
    ------
    BadInput
        If one is not admissible.

    Examples
    --------
    >>> read_search("sgd,adam", 2, None).words
    '--optimisers sgd,adam --draws 2'
    """
    if not optimisers:
        return None
    names = tuple(RANGES) if optimisers == "all" else tuple(name.strip() for name in optimisers.split(","))
    wrong = [name for name in names if name not in RANGES]
    if wrong or len(set(names)) < len(names):
        raise BadInput(f"--optimisers {optimisers!r}: must be different ones of {', '.join(RANGES)}, or all")
    if number < 1:
        raise BadInput(f"--draws {number}: must be >= 1")
    if keep is not None and not 0 <= keep <= 1:
        raise BadInput(f"--keep {keep}: must be in [0, 1]")
    return Search(names, number, keep)


def prepare(base: Experiment, grid: Mapping[str, Sequence[str]], search: Search) -> Experiment:
    """Add the probe for training accuracy, and check that the grid leaves alone what the search sets.

    Parameters
    ----------
    base : Experiment
        Of the sweep.
    grid : mapping
        Values of each key.
    search : Search
        Optimisers.

    Returns
    -------
    Experiment
        Measured in its last round.

    Raises
    ------
    BadInput
        If a key is set twice.
    """
    for key in search.draws(base.seed)[0].settings:
        if key in grid:
            raise BadInput(f"--grid {key}: is set by --optimisers")
    if any(isinstance(p, Environments) for p in base.parts.probes):
        return base
    return base.replace({
        "probes": "; ".join([*filter(None, [base.probes]), f"Environments(every={base.rounds})"])
    })


def place(experiment: Experiment) -> Place:
    """Name the domain that an experiment holds out.

    Parameters
    ----------
    experiment : Experiment
        Its data are loaded.

    Returns
    -------
    Place
        And the accuracy of guessing.

    Raises
    ------
    BadInput
        If it holds out none.
    """
    data = federation.load(experiment).dataset
    if data.domains is None:
        raise BadInput(
            f"data = {experiment.data!r}: --optimisers needs a held-out domain, as of 'ColoredDigits()' or 'RotatedDigits()'"
        )
    return Place(data.domains.held_out, 1 / max(2, data.num_outputs))


def collect(
    cells: Sequence[tuple[Experiment, str]], places: Mapping[str, Place], errors: Mapping[Path, str]
) -> pd.DataFrame:
    """Read what runs came to after their last step.

    Parameters
    ----------
    cells : sequence of tuple of Experiment and str
        Runs and their optimisers.
    places : mapping
        The held-out domain of each expression for data.
    errors : mapping
        Why runs failed, by directory.

    Returns
    -------
    pandas.DataFrame
        Columns ``held_out``, ``label``, ``train``, ``id``, ``ood`` and ``diverged``. A run that diverged has the accuracies that were measured
        last, or else those of guessing; others without accuracies are left out.
    """
    rows = []
    for experiment, optimiser in cells:
        path, (name, chance) = Path(experiment.out), places[experiment.data]
        diverged = DIVERGED in errors.get(path, "")
        there = (path / "experiment.toml").exists()
        history = runs.load(path).history if there else pd.DataFrame({"round": []})
        row = {
            k: final(history, c)
            for k, c in (("train", TRAIN), ("id", "id_accuracy"), ("ood", "ood_accuracy"))
        }
        if diverged:
            row = {k: chance if math.isnan(x) else x for k, x in row.items()}
        if not math.isnan(row["id"]):
            rows.append({"held_out": name, "label": optimiser, **row, "diverged": diverged})
    return pd.DataFrame(rows)


def threshold(search: Search, places: Mapping[str, Place]) -> float:
    """Return the least ID accuracy of runs that are compared."""
    return max(p.chance for p in places.values()) / 2 if search.keep is None else search.keep


def drawings(found: pd.DataFrame, keep: float) -> list[Drawing]:
    """Draw the scatter, the boxes and what so many trials reach.

    Parameters
    ----------
    found : pandas.DataFrame
        As `collect` gives it.
    keep : float
        Least ID accuracy of the runs that are compared.

    Returns
    -------
    list of Drawing
        For pages.
    """
    width = 0.1 if float(np.ptp(found["id"].to_numpy(dtype=float))) > 0.3 else 0.05
    kept = f"ID accuracy of at least {keep:g}"
    trials = max(Counter(zip(found["held_out"], found["label"], strict=True)).values())
    with style():
        return [
            Drawing(
                "domains-scatter",
                f"Every dot is a run after its last step; those without an {kept} are pale. Lines are means over bins of width {width:g}.",
                domain_plots.scatter(found, threshold=keep, width=width),
            ),
            Drawing(
                "domains-bins",
                f"Mean held-out accuracy of all runs by accuracy in the training domains, bins [lo, hi) of width {width:g}; how many runs on each bar.",
                domain_plots.binned(found, width=width),
            ),
            Drawing(
                "domains-boxes",
                f"Quartiles and extremes of all runs, of those with an {kept}, and of the 10 best by ID.",
                domain_plots.boxplots(found, threshold=keep),
            ),
            Drawing(
                "domains-budgets",
                "What so many trials reach. Who chooses by the held-out domain is an oracle.",
                domain_plots.budgets(found, step=10 if trials >= 30 else 1),
            ),
        ]


def box_table(table: pd.DataFrame, keep: float) -> pages.Rows:
    """Write the table of boxes for people: medians, with quartiles in brackets.

    Parameters
    ----------
    table : pandas.DataFrame
        As `fedsim.analysis.generalisation.boxes` gives it.
    keep : float
        Least ID accuracy of the runs that are kept.

    Returns
    -------
    Rows
        A row for each held-out domain, subset and optimiser.
    """
    subsets = {"all": "all", "kept": "kept", "top": "best"}
    body: dict[str, list[pages.Cell]] = {}
    for row in table.to_dict("records"):
        name = f"{row['held_out']}, {subsets[row['subset']]}, {row['label']}"
        known = not math.isnan(row["median"])
        text = "{median:.3f} ({q1:.3f}–{q3:.3f})".format(**row) if known else ""
        body.setdefault(name, [pages.Cell(name), pages.Cell(str(row["runs"]))]).append(pages.Cell(text))
    header = [f"held out, kept: ID >= {keep:g}", "runs", "training", "ID", "OOD", "ID - OOD"]
    return pages.Rows(header, list(body.values()))


def compared(found: pd.DataFrame, keep: float) -> pages.Rows:
    """Write for each held-out domain how optimisers compare, and how OOD accuracy goes with ID accuracy.

    Parameters
    ----------
    found : pandas.DataFrame
        As `collect` gives it.
    keep : float
        Least ID accuracy of the runs that are compared.

    Returns
    -------
    Rows
        A column a held-out domain.
    """
    names = list(dict.fromkeys(found["held_out"]))
    columns = [compare(found.loc[found["held_out"] == name], keep) for name in names]
    body = []
    for key in dict.fromkeys(k for column in columns for k in column):
        texts = []
        for column in columns:
            value = column.get(key, "")
            whole = isinstance(value, float) and key in ("runs", "kept")
            texts.append(f"{value:.0f}" if whole else f"{value:+.3f}" if isinstance(value, float) else value)
        body.append([pages.Cell(text) for text in (key, *texts)])
    return pages.Rows(["", *(f"held out: {name}" for name in names)], body)


def tables(found: pd.DataFrame, keep: float) -> tuple[pd.DataFrame, pages.Rows, pages.Rows]:
    """Return the table of boxes in full, and for people that table and the comparison."""
    full = boxes(found, keep)
    return full, box_table(full, keep), compared(found, keep)
