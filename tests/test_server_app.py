"""The ServerApp: over an in-process grid, and under `flwr run` in Flower's simulation."""

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from flwr.app import Context, Message, RecordDict

import fedsim
from fedsim import BadInput, Experiment, RunFailed, client_app, server_app
from fedsim.cli import write_app
from fedsim.flower import run_flower
from fedsim.grid import InProcessGrid
from fedsim.messages import ROUND

PROJECT = Path(__file__).parents[1]

TINY = {
    "data": "Synthetic(rows=150, features=4, classes=3)",
    "partition": "Dirichlet(alpha=0.5)",
    "model": "MLP(hidden=(3,))",
    "num-workers": 5,
    "rounds": 5,
    "local-steps": 3,
    "batch-size": 4,
    "holdout": 0.25,
    "probes": "Drift()",
    "strategy": "FedAvgM(lr=0.7, momentum=0.5)",
    "dtype": "float64",
    "device": "cpu",
}


class Counting(InProcessGrid):
    """A grid that counts the messages by which nodes train."""

    trained = 0

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        self.trained += sum(message.metadata.message_type == ROUND for message in messages)
        return super().push_messages(messages)


def experiment(out: Path, **changes: Any) -> Experiment:
    return Experiment.from_mapping(
        TINY | {"out": str(out)} | {k.replace("_", "-"): v for k, v in changes.items()}
    )


def serve(config: dict[str, Any], num_nodes: int = 2) -> Counting:
    grid = Counting(client_app.app, num_nodes, config)
    server_app.app(grid, Context(0, 1, {}, RecordDict(), config))
    return grid


def assert_same(found: pd.DataFrame, expected: pd.DataFrame, tolerance: float) -> None:
    pd.testing.assert_frame_equal(
        found.drop(columns="wall_time"), expected.drop(columns="wall_time"), rtol=tolerance, atol=tolerance
    )


# ----------------------------------------------------------------------------------------- an in-process grid


def test_the_app_runs_what_the_run_configuration_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = fedsim.run(experiment(tmp_path / "expected"))
    # Only Flower's own simulation is left out in favour of one process: any other grid is used.
    grid = serve(experiment(tmp_path / "run", engine="in-process").to_mapping())
    assert grid.trained == 5 * 2
    found = fedsim.load(tmp_path / "run")
    assert_same(found.history, expected.history, 1e-12)
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("round ")][-1].startswith("round 5/5  loss 0.")
    assert f"run directory: {tmp_path / 'run'}" in printed
    assert all(
        Path(line.removeprefix("figure: ")).exists() for line in printed if line.startswith("figure: ")
    )


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"rounds": 0}, BadInput, "rounds = 0 must be >= 1"),
        ({"roundz": 1}, BadInput, "unknown key 'roundz'; did you mean 'rounds'?"),
        ({"data": "Folder('absent')"}, BadInput, "data = \"Folder('absent')\": "),
        ({"nodes": 3}, RunFailed, "2 of 3 nodes answered within 0 s"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    changes: dict[str, Any],
    error: type[Exception],
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_app, "HELLO_SECONDS", 0.0)
    with pytest.raises(error, match=re.escape(text)):
        serve(TINY | {"out": str(tmp_path / "run")} | changes)
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith(f"fedsim: {text}")


def test_a_run_is_continued_where_its_directory_has_one(tmp_path: Path) -> None:
    whole = fedsim.run(experiment(tmp_path / "whole"))
    serve(experiment(tmp_path / "run", rounds=2).to_mapping())
    serve(experiment(tmp_path / "run").to_mapping(), num_nodes=3)
    assert_same(fedsim.load(tmp_path / "run").history, whole.history, 1e-12)
    with pytest.raises(
        BadInput, match=r"another experiment: client: 'SGD\(lr=0\.1\)' there, 'SGD\(lr=0\.2\)' here"
    ):
        serve(experiment(tmp_path / "run", client="SGD(lr=0.2)", rounds=6).to_mapping())


# ------------------------------------------------------------------------------- Flower's simulation, by flwr run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "dtype", "tolerance"),
    [("in-process", "float32", 1e-4), ("flower", "float64", 1e-12)],
)
def test_flwr_run_gives_the_same_history(engine: str, dtype: str, tolerance: float, tmp_path: Path) -> None:
    expected = fedsim.run(experiment(tmp_path / "expected", dtype=dtype))
    chosen = experiment(tmp_path / "run", dtype=dtype, engine=engine, nodes=2)
    (tmp_path / "app").mkdir()
    write_app(tmp_path / "app", chosen)
    lines: list[str] = []
    outcome = run_flower(tmp_path / "app", chosen.to_mapping(), 2, on_line=lines.append)
    assert outcome.completed, lines
    assert_same(fedsim.load(tmp_path / "run").history, expected.history, tolerance)
    assert f"run directory: {tmp_path / 'run'}" in lines


@pytest.mark.slow
def test_the_project_itself_is_a_flower_app(tmp_path: Path) -> None:
    expected = fedsim.run(experiment(tmp_path / "expected", dtype="float32"))
    chosen = experiment(tmp_path / "run", dtype="float32", engine="flower", nodes=2)
    lines: list[str] = []
    outcome = run_flower(PROJECT, chosen.to_mapping(), 2, on_line=lines.append)
    assert outcome.completed, lines
    assert_same(fedsim.load(tmp_path / "run").history, expected.history, 1e-4)


@pytest.mark.slow
def test_what_goes_wrong_under_flwr_run_is_the_last_line_of_the_command(tmp_path: Path) -> None:
    # The command cannot know what the ServerApp finds only when it loads the data.
    chosen = experiment(tmp_path / "run", data="Folder('absent')")
    (tmp_path / "experiment.toml").write_text(chosen.to_toml())
    command = [sys.executable, "-m", "fedsim.cli", "flower", str(tmp_path / "experiment.toml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in {1, 2}
    (line,) = done.stderr.splitlines()
    assert line.startswith("fedsim: ")
    assert "data = \"Folder('absent')\": Folder: path = 'absent'" in line
    assert [x for x in done.stdout.splitlines() if x.startswith("fedsim: ")] == [
        "fedsim: data = \"Folder('absent')\": Folder: path = 'absent' is not a folder"
    ]
