"""fedsim's two apps on a real deployment: the same history as in one process, and no node with other code."""

import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
from loopback import Federation

import fedsim
from fedsim import Experiment
from fedsim.cli import write_app
from fedsim.flower import FlowerOutcome, run_flower

PROJECT = Path(__file__).parents[2]

pytestmark = [pytest.mark.deployment, pytest.mark.slow]


def experiment(out: Path) -> Experiment:
    return Experiment(
        data="Synthetic(rows=150, features=4, classes=3)",
        partition="Dirichlet(alpha=0.5)",
        model="MLP(hidden=(3,))",
        client="SGD(lr=0.1, momentum=0.5)",
        strategy="FedAvgM(lr=0.7, momentum=0.5)",
        probes="Drift()",
        num_workers=5,
        rounds=2,
        local_steps=3,
        batch_size=4,
        holdout=0.25,
        eval_every=2,
        dtype="float64",
        device="cpu",
        engine="in-process",  # says something about simulations only: here the nodes train all the same
        out=str(out),
    )


def deploy(chosen: Experiment, federation: Federation, folder: Path) -> tuple[FlowerOutcome, list[str]]:
    folder.mkdir()
    write_app(folder, chosen)
    lines: list[str] = []
    outcome = run_flower(
        folder, chosen.to_mapping(), 2, federation=federation.connection, on_line=lines.append, timeout=240.0
    )
    return outcome, lines


def test_two_supernodes_give_the_history_of_one_process(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(federation.home))
    expected = fedsim.run(experiment(tmp_path / "expected"))
    outcome, lines = deploy(experiment(tmp_path / "run"), federation, tmp_path / "app")
    assert outcome.completed, lines
    assert "2 nodes with 5 workers" in lines
    found = fedsim.load(tmp_path / "run")
    pd.testing.assert_frame_equal(
        found.history.drop(columns="wall_time"),
        expected.history.drop(columns="wall_time"),
        rtol=1e-12,
        atol=1e-12,
    )


def test_a_supernode_with_other_code_is_refused_by_name(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(federation.home))
    for package in ("fedsim", "strategies", "clients"):
        shutil.copytree(
            PROJECT / package, tmp_path / "other" / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    with (tmp_path / "other" / "strategies" / "fedavg.py").open("a") as file:
        file.write("# another version\n")
    path = os.pathsep.join([str(tmp_path / "other"), *filter(None, [os.environ.get("PYTHONPATH")])])
    before = federation.online()
    node = federation.nodes[1]
    node.end()
    monkeypatch.setattr(node, "env", node.env | {"PYTHONPATH": path})
    federation.start_node(1)
    federation.wait_online(1, besides=before)
    outcome, lines = deploy(experiment(tmp_path / "run"), federation, tmp_path / "app")
    assert outcome.status == "finished:failed"
    (reason,) = {line for line in lines if line.startswith("fedsim: ")}
    assert reason.startswith("fedsim: node 1 (SuperNode ")
    assert "runs other code (hash " in reason
    assert not (tmp_path / "run").exists()
