"""Sweeps: every combination of some settings, each with several seeds; what is there already is not run again."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from fedsim import cells, compare, domain_sweep, federation, pages, runs
from fedsim.checkpoints import replace_file, writing
from fedsim.domain_sweep import Search
from fedsim.experiment import BadInput, Experiment, parse_override
from fedsim.groups import group, held_out, labels, leading, summarise
from fedsim.overlays import over_grid, overlays
from fedsim.plots import Drawing
from fedsim.results import BETTER, DOMAINS, PROBED, best, final

Grid = Mapping[str, Sequence[str]]
"""Values of each key, as they are written on a command line."""

DATA_KEYS = ("data", "partition", "model", "objective", "num_workers", "holdout", "dtype", "device")
"""Keys of which every combination is loaded once before anything runs."""


class Cell(NamedTuple):
    """One run of a sweep.

    Attributes
    ----------
    settings : dict of str to str
        Its values of the grid's keys, as written.
    experiment : Experiment
        With seed and directory.
    optimiser : str
        Whose settings were drawn at random; empty if none were.
    """

    settings: dict[str, str]
    experiment: Experiment
    optimiser: str = ""

    @property
    def path(self) -> Path:
        """Its run directory."""
        return Path(self.experiment.out)


def split(text: str) -> list[str]:
    """Split at commas outside brackets and quotes.

    Parameters
    ----------
    text : str
        Values.

    Returns
    -------
    list of str
        Without blanks around them.

    Raises
    ------
    BadInput
        If a bracket or quote is not closed, or a value is empty.

    Examples
    --------
    >>> split("SGD(lr=0.1), Prox(SGD(0.1), mu=0.5)")
    ['SGD(lr=0.1)', 'Prox(SGD(0.1), mu=0.5)']
    """
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    parts = [part.strip() for part in parts]
    if depth or quote:
        raise BadInput(f"{text!r}: a bracket or quote is not closed")
    if not all(parts):
        raise BadInput(f"{text!r}: a value between commas is empty")
    return parts


def read_grid(options: Sequence[str]) -> dict[str, list[str]]:
    """Read ``KEY=V1,V2`` of a command line.

    Parameters
    ----------
    options : sequence of str
        One a key.

    Returns
    -------
    dict of str to list of str
        Values of each key.

    Raises
    ------
    BadInput
        If there is no ``=``, a key is named twice or not for grids, or a value is named twice.

    Examples
    --------
    >>> read_grid(["client=SGD(lr=0.1),SGD(lr=0.01)", "local-steps=5,10"])
    {'client': ['SGD(lr=0.1)', 'SGD(lr=0.01)'], 'local-steps': ['5', '10']}
    """
    grid: dict[str, list[str]] = {}
    for option in options:
        name, equals, text = option.partition("=")
        key = name.strip().replace("_", "-")
        if not equals or not key:
            raise BadInput(f"--grid {option!r}: write KEY=V1,V2, for instance --grid local-steps=5,10")
        if key in ("seed", "out"):
            raise BadInput(
                f"--grid {option!r}: {key} is set by {'--seeds N' if key == 'seed' else '--out DIR'}"
            )
        if key in grid:
            raise BadInput(f"--grid {option!r}: {key} is named twice; write all its values in one --grid")
        try:
            grid[key] = split(text)
        except BadInput as error:
            raise BadInput(f"--grid {key}: {error}") from None
        if len(set(grid[key])) < len(grid[key]):
            raise BadInput(f"--grid {option!r}: a value is named twice")
    return grid


def plan(base: Experiment, grid: Grid, num_seeds: int, out: Path, search: Search | None = None) -> list[Cell]:
    """Make the experiments of all cells and check them, so that nothing runs if one is wrong.

    Parameters
    ----------
    base : Experiment
        Settings that the grid leaves as they are; seeds count from its seed.
    grid : mapping
        As `read_grid` gives it; empty for seeds alone.
    num_seeds : int
        Seeds of each combination, >= 1.
    out : Path
        Directory of the sweep.
    search : Search or None
        Optimisers whose settings are drawn at random and combined with the grid.

    Returns
    -------
    list of Cell
        The draws, the last key of the grid and the seed vary fastest.

    Raises
    ------
    BadInput
        In one line that names the cell, if settings are wrong, do not fit the data, or mean the same as those of
        another cell, or if its directory holds a run with other settings.
    """
    if num_seeds < 1:
        raise BadInput(f"--seeds {num_seeds}: must be >= 1")
    made: list[Cell] = []
    loaded: set[tuple[Any, ...]] = set()
    for settings, optimiser in _combinations(base, grid, search):
        name = _file_name(settings)
        changes = dict(parse_override(f"{k}={v}") for k, v in settings.items())
        if changes.get("local-epochs") and "local-steps" not in changes:
            changes["local-steps"] = 0
        try:
            first = base.replace(changes)
            own = tuple(getattr(first, k) for k in DATA_KEYS)
            if own not in loaded:
                federation.load(first)
                loaded.add(own)
        except BadInput as error:
            raise BadInput(f"cell {_write(settings)}: {error}" if settings else str(error)) from None
        for seed in range(base.seed, base.seed + num_seeds):
            own_seed = first.replace({"seed": seed, "out": str(out / f"{name}-seed{seed}")})
            cell = Cell(settings, own_seed, optimiser)
            _check_directory(cell)
            made.append(cell)
    names = labels([cell.experiment for cell in made[::num_seeds]])
    for i, name in enumerate(names):
        if name in names[:i]:
            twins = (_write(made[num_seeds * j].settings) for j in (names.index(name), i))
            raise BadInput("--grid: these cells mean the same: " + " and ".join(twins))
    return made


def _combinations(
    base: Experiment, grid: Grid, search: Search | None
) -> Iterator[tuple[dict[str, str], str]]:
    """Yield the settings of all cells but for seeds, and the optimiser whose settings were drawn."""
    draws = [] if search is None else search.draws(base.seed)
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        yield from ((settings | {k: str(v) for k, v in one.settings.items()}, one.optimiser) for one in draws)
        if not draws:
            yield settings, ""


def run(
    planned: Sequence[Cell], jobs: int, report: Callable[[Cell, cells.Outcome], None]
) -> dict[Path, cells.Outcome]:
    """Run the cells that have not ended; those that were interrupted go on from their last checkpoint.

    Parameters
    ----------
    planned : sequence of Cell
        As `plan` gives them.
    jobs : int
        Processes, >= 1; more than there are cores are not started.
    report : callable
        Called when a cell has ended.

    Returns
    -------
    dict of Path to Outcome
        Of the cells that were run.
    """
    due = [cell for cell in planned if not is_done(cell)]
    jobs = max(1, min(jobs, cells.num_cores(), len(due)))
    outcomes = cells.run_all(
        [cell.experiment.to_mapping() for cell in due], jobs, lambda i, outcome: report(due[i], outcome)
    )
    return {cell.path: outcome for cell, outcome in zip(due, outcomes, strict=True)}


def num_jobs(base: Experiment) -> int:
    """Return how many processes suit the machine: one a core, or one on a GPU."""
    return 1 if federation.resolve_device(base.device).type == "cuda" else cells.num_cores()


def is_done(cell: Cell) -> bool:
    """Say whether a cell has all its rounds and its summary."""
    file = cell.path / "summary.json"
    return file.exists() and json.loads(file.read_text(encoding="utf-8"))["rounds"] == cell.experiment.rounds


def tabulate(planned: Sequence[Cell], outcomes: Mapping[Path, cells.Outcome]) -> pd.DataFrame:
    """Return a row a cell.

    Parameters
    ----------
    planned : sequence of Cell
        As `plan` gives them.
    outcomes : mapping
        As `run` gives them.

    Returns
    -------
    pandas.DataFrame
        The grid's keys, ``seed``, ``directory``, ``error``, ``rounds``, and for each main figure ``<name>.final``
        and ``<name>.best``; then what it cost.
    """
    rows = []
    for cell in planned:
        there = (cell.path / "experiment.toml").exists()
        done = runs.load(cell.path) if there else None
        error = outcomes[cell.path].error if cell.path in outcomes else ""
        row: dict[str, Any] = {"optimiser": cell.optimiser} if cell.optimiser else {}
        row |= {**cell.settings, "seed": cell.experiment.seed, "directory": str(cell.path)}
        row |= {"error": error, "rounds": 0 if done is None else len(done.history)}
        if done is not None and len(done.history):
            for c in BETTER:
                if c in done.history:
                    row |= {f"{c}.final": final(done.history, c), f"{c}.best": best(done.history, c)[0]}
            names = ("gradients", "bytes_up", "bytes_down", "sim_time", "wall_time")
            row |= {name: done.history[name].iloc[-1] for name in names}
        rows.append(row)
    return pd.DataFrame(rows)


def write(
    base: Experiment,
    grid: Grid,
    num_seeds: int,
    out: Path,
    outcomes: Mapping[Path, cells.Outcome],
    search: Search | None = None,
) -> pages.Rows:
    """Write ``sweep.csv``, ``sweep.html`` and ``base.toml`` of a sweep, and ``boxes.csv`` of one over optimisers.

    Parameters
    ----------
    base : Experiment
        As for `plan`.
    grid : mapping
        As for `plan`.
    num_seeds : int
        As for `plan`.
    out : Path
        Directory of the sweep.
    outcomes : mapping
        As `run` gives them.
    search : Search or None
        As for `plan`.

    Returns
    -------
    Rows
        A table for terminals, with two of the main figures, or that of boxes.

    Raises
    ------
    BadInput
        If no cell has a round.
    """
    planned = plan(base, grid, num_seeds, out, search)
    table = tabulate(planned, outcomes)
    with writing(out):
        replace_file(out / "base.toml", base.replace({"out": ""}).to_toml().encode())
        replace_file(out / "sweep.csv", table.to_csv(index=False).encode())
    failed = [f"{cell}: {why}" for cell, why in zip(table["directory"], table["error"], strict=True) if why]
    found = [runs.load(cell.path) for cell in planned if (cell.path / "history.jsonl").exists()]
    found = [done for done in found if len(done.history)]
    if not found:
        raise BadInput(f"{out}: no cell has a round; " + "; ".join(failed[:1]))
    groups = group(found)
    summary = summarise(groups)
    terminal, special = compare.cells(summary, brief=True), {}
    if search is None:
        away, chief = held_out(groups), leading(summary)
        settings = [cell.settings for cell in planned]
        wanted = dict.fromkeys((chief, *(DOMAINS if away else ()), "train_loss", *PROBED))
        named = [(c, away if c in DOMAINS else "") for c in wanted if f"{c}.final" in table]
        charts = [over_grid(settings, table[f"{c}.final"].tolist(), c, name) for c, name in named]
        drawn = [c for c in charts if c] + overlays(groups)
    else:
        terminal, drawn, special = _over_optimisers(planned, search, out, outcomes)
    told = dict.fromkeys(text for o in outcomes.values() for text in o.warnings)
    options = " ".join(f"--grid {shlex.quote(f'{k}=' + ','.join(v))}" for k, v in grid.items())
    options += "" if search is None else f" {search.words}"
    command = f"fedsim sweep {shlex.quote(str(out / 'base.toml'))} {options} --seeds {num_seeds} --out "
    combinations = len(planned) // num_seeds
    content = {
        "title": f"Sweep over {' and '.join([*grid] + ['optimisers'] * (search is not None)) or 'seeds'}",
        "lead": (
            f"{len(planned)} runs: {combinations} combinations, {num_seeds} "
            f"{'seeds' if num_seeds > 1 else 'seed'} each; {len(failed)} failed."
        ),
        "note": compare.note(groups),
        "values": compare.cells(summary),
        "said": [*failed, *compare.unfinished(found), *told],
        "pictures": [pages.picture(d) for d in drawn],
        "runs": compare.listed(groups),
        "toml": compare.common(found),
        "commands": [
            ("The runs that are missing, and this page:", command + shlex.quote(str(out))),
            ("All of it again, in a new directory:", command + shlex.quote(f"{out}-again")),
        ],
        "sections": compare.SECTIONS,
    }
    pages.write(out / "sweep.html", "compare.html", content | special)
    return terminal


def _over_optimisers(
    planned: Sequence[Cell], search: Search, out: Path, outcomes: Mapping[Path, cells.Outcome]
) -> tuple[pages.Rows, list[Drawing], dict[str, Any]]:
    """Write ``boxes.csv``, and return the table of boxes, the figures and what the page has besides."""
    experiments = {cell.experiment.data: cell.experiment for cell in planned}
    places = {data: domain_sweep.place(e) for data, e in experiments.items()}
    errors = {path: outcome.error for path, outcome in outcomes.items()}
    runs_of = domain_sweep.collect([(cell.experiment, cell.optimiser) for cell in planned], places, errors)
    keep = domain_sweep.threshold(search, places)
    full, boxes, compared = domain_sweep.tables(runs_of, keep)
    with writing(out):
        replace_file(out / "boxes.csv", full.to_csv(index=False).encode())
    note = (
        f"Medians over runs after their last step, with quartiles in brackets: accuracy on training rows, on new rows of the "
        "training domains (ID), in the held-out domain (OOD), and the difference; of all runs, of those that are kept, with an ID accuracy of at least "
        f"{keep:g}, and of the (up to 10) best by ID. {runs_of['diverged'].sum()} of {len(runs_of)} runs diverged; they count with the "
        "accuracies that were measured last, or else with those of guessing. Who chooses by the held-out domain (OOD) is an oracle."
    )
    special = {"heading": "Optimisers", "note": note, "values": boxes, "compared": compared}
    return boxes, domain_sweep.drawings(runs_of, keep), special


def failures(outcomes: Mapping[Path, cells.Outcome], search: Search | None) -> int:
    """Count the runs that failed; where settings are drawn at random, one that diverged is a result.

    Parameters
    ----------
    outcomes : mapping
        As `run` gives them.
    search : Search or None
        As for `plan`.

    Returns
    -------
    int
        Runs.
    """
    errors = [outcome.error for outcome in outcomes.values() if outcome.error]
    return sum(search is None or domain_sweep.DIVERGED not in error for error in errors)


def _write(settings: Mapping[str, str]) -> str:
    return " ".join(f"{k}={v}" for k, v in settings.items())


def _file_name(settings: Mapping[str, str]) -> str:
    """Write settings as a file name: readable, and different for different settings."""
    text = "_".join(
        re.sub(r"[^A-Za-z0-9.=-]+", "-", v.removesuffix("()")).strip("-") for v in settings.values()
    )
    mark = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]
    return f"{text[:60]}-{mark}" if settings else "base"


def _check_directory(cell: Cell) -> None:
    if (cell.path / "experiment.toml").exists():
        free = {"out", "plan", "device"}  # of the last two, a run writes down what it has chosen
        differing = [k for k in runs.read_experiment(cell.path).differing(cell.experiment) if k not in free]
        if differing:
            raise BadInput(
                f"{cell.path}: holds a run with other settings ({', '.join(differing)}); take another --out, "
                "or the settings of that sweep"
            )
