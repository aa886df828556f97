"""Sweeps: the grid, its checks, and that runs which are missing, interrupted or failed are treated as they should."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
from typer.testing import CliRunner

import fedsim
from fedsim import cells, cli, compare, domain_sweep, runs, sweep
from fedsim.analysis.generalisation import draw
from fedsim.groups import group
from fedsim.overlays import over_grid, overlays
from fedsim.results import plus_minus

TINY: dict[str, Any] = {
    "data": "Synthetic(rows=200, features=4, classes=3)", "model": "Linear()", "num-workers": 4, "rounds": 3, "objective": "SquaredError()",
    "plan": "stacked",
}  # fmt: skip
BASE = fedsim.Experiment.from_mapping(TINY)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("1,2", ["1", "2"]),
        ("FedAvg()", ["FedAvg()"]),
        ("Prox(SGD(0.1), mu=0.5) , SGD(0.1)", ["Prox(SGD(0.1), mu=0.5)", "SGD(0.1)"]),
        ("MLP(hidden=(20, 10)),[1,2]", ["MLP(hidden=(20, 10))", "[1,2]"]),
        ("Hub('a,(b'),\"c,d\"", ["Hub('a,(b')", '"c,d"']),
    ],
)
def test_values_are_split_at_outer_commas(text: str, parts: list[str]) -> None:
    assert sweep.split(text) == parts


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["client"], "write KEY=V1,V2"),
        (["client=SGD(lr=0.1,SGD()"], "--grid client: 'SGD(lr=0.1,SGD()': a bracket or quote is not closed"),
        (["rounds=1,,2"], "a value between commas is empty"),
        (["rounds=1,1"], "a value is named twice"),
        (["rounds=1", "rounds=2"], "rounds is named twice"),
        (["seed=1,2"], "seed is set by --seeds N"),
        (["out=a,b"], "out is set by --out DIR"),
    ],
)
def test_bad_grids_are_refused_in_one_line(options: list[str], says: str) -> None:
    with pytest.raises(fedsim.BadInput) as error:
        sweep.read_grid(options)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_cells_are_all_combinations_and_seeds(tmp_path: Path) -> None:
    grid = sweep.read_grid(["strategy=FedAvg(),FedAvgM()", "local_steps=2,4"])
    planned = sweep.plan(BASE.replace({"seed": 5}), grid, 2, tmp_path)
    assert [(c.settings["strategy"], c.experiment.local_steps, c.experiment.seed) for c in planned] == [
        (s, t, seed) for s in ("FedAvg()", "FedAvgM()") for t in (2, 4) for seed in (5, 6)
    ]
    assert len({c.path for c in planned}) == 8
    assert [c.path for c in sweep.plan(BASE.replace({"seed": 5}), grid, 3, tmp_path)[:2]] == [
        c.path for c in planned[:2]
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["client=SGD(lr=0.1),SGD(lr=-1)"], "cell client=SGD(lr=-1): client = 'SGD(lr=-1)'"),
        (["nonsense=1"], "cell nonsense=1: unknown key 'nonsense'"),
        (["model=Linear(),SmallCNN()"], "cell model=SmallCNN(): model = 'SmallCNN()' on"),
        (
            ["client=SGD(0.5),SGD(lr=0.5)"],
            "these cells mean the same: client=SGD(0.5) and client=SGD(lr=0.5)",
        ),
    ],
)
def test_everything_is_checked_before_anything_runs(options: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(fedsim.BadInput) as error:
        sweep.plan(BASE, sweep.read_grid(options), 1, tmp_path / "sweep")
    assert says in str(error.value)
    assert not (tmp_path / "sweep").exists()


def test_a_directory_of_another_sweep_is_refused(tmp_path: Path) -> None:
    grid = {"local-steps": ["2"]}
    fedsim.run(sweep.plan(BASE, grid, 1, tmp_path)[0].experiment)
    with pytest.raises(fedsim.BadInput, match=r"holds a run with other settings \(rounds\)"):
        sweep.plan(BASE.replace({"rounds": 4}), grid, 1, tmp_path)


def figures(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "wall_time"} for line in lines]


@pytest.mark.slow
def test_a_sweep_skips_what_is_done_resumes_what_was_interrupted_and_survives_failures(
    tmp_path: Path,
) -> None:
    grid = {"client": ["SGD(lr=0.1)", "SGD(lr=0.2)", "SGD(lr=1e30)"]}
    done, half, bad = sweep.plan(BASE, grid, 1, tmp_path / "sweep")
    fedsim.run(done.experiment)
    touched = (done.path / "history.jsonl").stat().st_mtime_ns

    def interrupt(snapshot: Any, experiment: fedsim.Experiment) -> None:
        if snapshot.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.run(half.experiment, progress=interrupt)
    whole = fedsim.run(half.experiment.replace({"out": str(tmp_path / "whole")}))

    said: list[Path] = []
    outcomes = sweep.run([done, half, bad], 2, lambda cell, outcome: said.append(cell.path))
    assert sorted(said) == sorted([half.path, bad.path]) == sorted(outcomes)
    assert (done.path / "history.jsonl").stat().st_mtime_ns == touched
    assert figures(half.path) == figures(whole.path)
    assert outcomes[half.path].error == ""
    assert "not finite" in outcomes[bad.path].error

    sweep.write(BASE, grid, 1, tmp_path / "sweep", outcomes)
    table = pd.read_csv(tmp_path / "sweep" / "sweep.csv")
    assert table["client"].tolist() == grid["client"]
    assert [isinstance(e, str) for e in table["error"].tolist()] == [False, False, True]
    assert table["test_loss.final"].tolist()[1] == pytest.approx(whole.history["test_loss"].iloc[-1])
    page = (tmp_path / "sweep" / "sweep.html").read_text(encoding="utf-8")
    assert 'id="figure-grid-' in page
    assert "1 failed" in page


@pytest.mark.slow
def test_the_command_ends_with_1_where_a_cell_failed(tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_text(BASE.to_toml())
    words = ["sweep", str(tmp_path / "e.toml"), "--grid", "client=SGD(lr=0.1),SGD(lr=1e30)", "--jobs", "1"]
    result = CliRunner().invoke(cli.app, [*words, "--out", str(tmp_path / "sweep")])
    assert result.exit_code == 1
    assert "1 of 2 runs failed" in str(result.exception)
    assert "2 runs, 0 of them done" in result.output
    assert (tmp_path / "sweep" / "sweep.html").exists()


@pytest.mark.slow
def test_a_process_that_dies_costs_its_cell_only(tmp_path: Path) -> None:
    long = BASE.replace({"rounds": 100_000, "out": str(tmp_path / "long")})
    short = BASE.replace({"out": str(tmp_path / "short")})

    def kill() -> None:
        while not (tmp_path / "long" / "history.jsonl").exists():
            time.sleep(0.05)
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    outcomes = cells.run_all([long.to_mapping(), short.to_mapping()], 1, lambda *_: None)
    thread.join()
    assert [o.error for o in outcomes] == ["its process ended with code -9", ""]
    assert len(runs.load(tmp_path / "short").history) == 3


@pytest.mark.slow
def test_processes_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    long = BASE.replace({"rounds": 100_000, "out": str(tmp_path / "long")})
    code = f"from fedsim import cells\nif __name__ == '__main__': cells.run_all([{long.to_mapping()!r}], 1, print)"
    (tmp_path / "parent.py").write_text(code)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")])
    while not (tmp_path / "long" / "history.jsonl").exists():
        assert parent.poll() is None
        time.sleep(0.05)
    children = psutil.Process(parent.pid).children(recursive=True)
    assert children
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []


# ------------------------------------------------------------------------------------- held-out domains

DOMAINS = fedsim.Experiment.from_mapping({
    "data": "RotatedDigits()", "partition": "Natural()", "model": "Linear()", "num-workers": 5, "rounds": 2,
    "local-steps": 1, "dtype": "float64", "plan": "stacked", "device": "cpu", "strategy": "FedSGD()", "client": "SGD(lr=1.0)",
})  # fmt: skip


def test_optimisers_are_swept_over_drawn_settings_and_both_ends_are_shown(tmp_path: Path) -> None:
    search = domain_sweep.read_search("sgd,adam", 2, 0.05)
    assert search is not None
    grid = {"data": ["RotatedDigits(held_out=0.0)", "RotatedDigits(held_out=75.0)"]}
    base = domain_sweep.prepare(DOMAINS, grid, search)
    assert base.probes == "Environments(every=2)"
    planned = sweep.plan(base, grid, 1, tmp_path / "sweep", search)
    assert [c.optimiser for c in planned] == ["sgd", "sgd", "adam", "adam"] * 2
    wanted = [one.settings for name in search.optimisers for one in draw(name, 2)] * 2
    for cell, settings in zip(planned, wanted, strict=True):
        assert cell.experiment == cell.experiment.replace(settings)
    *ended, lost = planned
    for cell in ended:
        fedsim.runs.run(cell.experiment, draw=False)
    error = "round 1: parameters or losses of all 5 workers are not finite"
    outcomes = {cell.path: cells.Outcome("", [], 1.0) for cell in ended} | {
        lost.path: cells.Outcome(error, [], 1.0)
    }
    assert (sweep.failures(outcomes, search), sweep.failures(outcomes, None)) == (0, 1)

    rows = sweep.write(base, grid, 1, tmp_path / "sweep", outcomes, search)
    assert [row[0].text for row in rows.body[:3]] == [
        "0 degrees, all, sgd",
        "0 degrees, all, adam",
        "0 degrees, kept, sgd",
    ]
    full = pd.read_csv(tmp_path / "sweep" / "boxes.csv").set_index(["held_out", "subset", "label", "figure"])
    ids = [runs.load(cell.path).history["id_accuracy"].iloc[-1] for cell in planned[:2]]
    row = full.loc[("0 degrees", "all", "sgd", "id")]
    assert (row["runs"], row["low"], row["high"]) == (2, min(ids), max(ids))
    assert full.loc[("75 degrees", "all", "adam", "ood"), "low"] <= 0.1  # the one that diverged is at chance
    table = pd.read_csv(tmp_path / "sweep" / "sweep.csv")
    assert table["optimiser"].tolist() == [c.optimiser for c in planned]
    page = (tmp_path / "sweep" / "sweep.html").read_text(encoding="utf-8")
    for name in ("scatter", "bins", "boxes", "budgets"):
        assert f'id="figure-domains-{name}' in page
    for words in (
        "1 of 8 runs diverged", "held out: 75 degrees", "oracle", "--optimisers sgd,adam --draws 2 --keep 0.05",
        "rank correlation of ID and OOD, kept",
    ):  # fmt: skip
        assert words in page


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--optimisers", "sgd,adamw"],
            "must be different ones of sgd, momentum, nesterov, rmsprop, adam, or all",
        ),
        (["--optimisers", "sgd,sgd"], "must be different ones of"),
        (["--optimisers", "all", "--draws", "0"], "--draws 0: must be >= 1"),
        (["--optimisers", "all", "--keep", "1.5"], "--keep 1.5: must be in [0, 1]"),
        (["--optimisers", "sgd", "--grid", "strategy=FedSGD()"], "--grid strategy: is set by --optimisers"),
        (
            ["--optimisers", "sgd", "--draws", "1", "-o", "data=Digits()", "-o", "partition=IID()"],
            "--optimisers needs a held-out domain",
        ),
    ],
)
def test_bad_searches_are_refused_in_one_line(words: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_text(DOMAINS.to_toml())
    line = ["sweep", str(tmp_path / "e.toml"), *words, "--out", str(tmp_path / "sweep")]
    result = CliRunner().invoke(cli.app, line)
    assert isinstance(result.exception, fedsim.BadInput)
    assert says in str(result.exception)
    assert not (tmp_path / "sweep").exists()


def test_tables_of_runs_that_hold_out_a_domain_name_it_and_call_an_oracle_so(tmp_path: Path) -> None:
    for seed in (0, 1):
        fedsim.runs.run(DOMAINS.replace({"seed": seed, "out": str(tmp_path / f"run{seed}")}), draw=False)
    brief = compare.write([tmp_path / "run0", tmp_path / "run1"], tmp_path / "compare.html")
    assert list(brief.header[3:]) == [
        "accuracy in training domains, final",
        "accuracy in training domains, best",
        "held-out accuracy, final",
        "held-out accuracy, best (oracle)",
    ]
    best = [max(runs.load(tmp_path / f"run{seed}").history["id_accuracy"]) for seed in (0, 1)]
    assert brief.body[0][4].text == plus_minus(float(np.mean(best)), float(np.std(best, ddof=1)))
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "Held out: 0 degrees." in page
    assert "test accuracy" not in page  # it is the accuracy in the held-out domain
    groups = group([runs.load(tmp_path / f"run{seed}") for seed in (0, 1)])
    drawn = {d.name: d.figure.axes[0].get_title() for d in overlays(groups)}
    assert drawn["ood_accuracy-round"] == drawn["id_accuracy-round"] == "held out: 0 degrees"
    chart = over_grid([{"client": "a"}, {"client": "b"}], [0.1, 0.2], "ood_accuracy", "0 degrees")
    assert chart is not None
    assert chart.figure.axes[0].get_title() == "held out: 0 degrees"
