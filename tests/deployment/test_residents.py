"""What workers keep lives in residents: the same numbers as in one process, also when a resident is killed."""

from pathlib import Path

import psutil
import pytest
from flwr.app import Context, RecordDict
from loopback import Federation

import fedsim
from fedsim import Experiment, client_app, server_app
from fedsim.cli import write_app
from fedsim.flower import run_flower
from fedsim.grid import InProcessGrid

pytestmark = [pytest.mark.deployment, pytest.mark.slow]


def residents(federation: Federation) -> list[psutil.Process]:
    """The residents of a federation's nodes."""
    found = []
    for process in psutil.process_iter():
        try:
            mine = process.environ().get("FLWR_HOME", "").startswith(str(federation.folder))
            if mine and "fedsim.resident" in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_killed_resident_is_started_again_and_no_number_changes(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(federation.home))
    chosen = Experiment(
        data="Synthetic(rows=150, features=4, classes=3)",
        partition="Dirichlet(alpha=0.5)",
        model="MLP(hidden=(3,))",
        client="Nesterov(lr=0.1, momentum=0.5)",
        strategy="ElasticAveraging()",
        num_workers=5,
        rounds=4,
        local_steps=3,
        batch_size=4,
        dtype="float64",
        device="cpu",
    )
    here = chosen.replace({"out": str(tmp_path / "here")}).to_mapping()
    server_app.app(InProcessGrid(client_app.app, 2, here), Context(0, 1, {}, RecordDict(), here))
    folder = tmp_path / "app"
    folder.mkdir()
    there = chosen.replace({"out": str(tmp_path / "there")})
    write_app(folder, there)
    lines: list[str] = []
    lived: list[list[int]] = []

    def follow(line: str) -> None:
        lines.append(line)
        if line.startswith("round "):
            found = residents(federation)
            lived.append(sorted(process.pid for process in found))
            if line.startswith("round 2/"):  # nodes wait for 3 s now
                found[0].kill()

    outcome = run_flower(
        folder, there.to_mapping(), 2, federation=federation.connection, on_line=follow, timeout=600.0
    )
    assert outcome.completed, lines
    # one process a node for all messages, and a new one where it was killed
    assert [len(pids) for pids in lived] == [2] * 4
    assert lived[0] == lived[1]
    assert len({*lived[1]} & {*lived[2]}) == 1
    assert lived[2] == lived[3]
    found, expected = (fedsim.load(tmp_path / name).history for name in ("there", "here"))
    assert found.drop(columns="wall_time").equals(expected.drop(columns="wall_time"))
