"""Faults: things are really killed, and the run ends, with every round once and the missing named.

With ``FEDSIM_FAULTS=FILE`` what was seen is written for the table of the README.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import pytest
from secured import NUM_NODES, Running, Secured

pytestmark = [pytest.mark.deployment, pytest.mark.slow]


@dataclass(frozen=True)
class Survived:
    """A line of the table: the fault, who was missing in which rounds by the history, and how the run went on."""

    fault: str
    missing: str
    then: str


class Start(Protocol):
    def __call__(self, **settings: Any) -> Running: ...


@pytest.fixture(scope="module")
def survived() -> Iterator[list[Survived]]:
    rows: list[Survived] = []
    yield rows
    if os.environ.get("FEDSIM_FAULTS"):
        about = {"flwr": version("flwr"), "nodes": NUM_NODES, "date": f"{date.today():%Y-%m-%d}"}
        content = {"about": about, "faults": [asdict(row) for row in rows]}
        Path(os.environ["FEDSIM_FAULTS"]).write_text(json.dumps(content, indent=2) + "\n")


@pytest.fixture
def start(secured: Secured, tmp_path: Path) -> Iterator[Start]:
    runs: list[Running] = []

    def begin(**settings: Any) -> Running:
        runs.append(Running(secured, tmp_path, round_timeout=secured.round_timeout, **settings))
        return runs[-1]

    yield begin
    for run in runs:
        run.stop()


def rounds(numbers: list[int]) -> str:
    return f"round {numbers[0]}" if len(numbers) == 1 else f"rounds {numbers[0]} to {numbers[-1]}"


def test_nodes_come_late_are_killed_hang_and_leave(
    secured: Secured, start: Start, survived: list[Survived]
) -> None:
    """Node 0 is there all the time; node 1 comes late, hangs and leaves; node 2 is killed and started again."""
    last = 20
    late, cut = "is offline", f"did not answer within round-timeout = {secured.round_timeout:g} s"
    assert secured.command("down", "--only", "node-1").returncode == 0
    run = start(rounds=last)
    run.wait_round(1)
    assert run.failures()[1] == {"node 1": late}
    secured.up()
    came = run.wait_missing("node 1", False)
    before = run.missed("node 1")
    assert before == list(range(1, came))

    secured.app("node-2", "flwr-clientapp")
    secured.kill("node-2")
    again = secured.begin("up")  # waits until Flower has noticed, and would refuse the node's key before that

    run.wait_missing("node 2", True)
    secured.app("node-1", "flwr-clientapp")
    secured.signal("node-1", signal.SIGSTOP)
    run.wait_missing("node 1", True)
    secured.signal("node-1", signal.SIGCONT)
    awake = run.wait_missing("node 1", False)
    hung = [number for number in run.missed("node 1") if number > came]
    assert hung == list(range(hung[0], awake))
    assert run.failures()[hung[0]]["node 1"] == cut

    back = run.wait_missing("node 2", False)
    assert again.wait() == 0
    killed = run.missed("node 2")
    assert killed == list(range(killed[0], back))
    assert run.failures()[killed[0]]["node 2"] == cut

    assert secured.command("down", "--only", "node-1").returncode == 0
    assert run.end() == 0, run.log.read_text()
    run.assert_whole(last)
    left = [number for number in run.missed("node 1") if number > awake]
    assert left == list(range(left[0], last + 1))
    assert run.failures()[last] == {"node 1": late}
    assert run.missed("node 0") == []
    assert run.missed("node 2") == killed
    cut_off = f"waits for round-timeout = {secured.round_timeout:g} s"
    survived += [
        Survived("a node joins late", f"node 1 in {rounds(before)}", "goes on with it"),
        Survived(
            "SuperNode killed in a round, and started again",
            f"node 2 in {rounds(killed)}",
            f"{cut_off} until Flower misses the node's heartbeat; takes it back",
        ),
        Survived("a node hangs, and later goes on", f"node 1 in {rounds(hung)}", f"{cut_off}; takes it back"),
        Survived("a node leaves", f"node 1 in {rounds(left)}", "ends without it; no round waits"),
    ]


def test_the_server_app_and_the_link_are_killed(
    secured: Secured, start: Start, survived: list[Survived]
) -> None:
    secured.up()
    run = start(rounds=4)
    run.wait_round(1)
    secured.app("link", "flwr-serverapp").kill()
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130
    before = run.recorded()
    assert f"interrupted; 'fedsim flower --resume {run.path}' continues" in run.log.read_text()
    run.resume()
    run.wait_round(before + 1)

    known = secured.nodes()
    secured.processes("link")[0].kill()  # its ServerApp outlives it for a while
    assert run.end() == 1
    assert run.log.read_text().rstrip().endswith(f"'fedsim flower --resume {run.path}' goes on")
    again = run.recorded()
    assert f"started link; {NUM_NODES} nodes are online" in secured.up()
    assert secured.nodes().keys() == known.keys()
    run.resume()
    assert run.end() == 0, run.log.read_text()
    run.assert_whole(4)
    assert run.failures() == {}
    survived += [
        Survived("ServerApp process killed", "nobody", f"`--resume` goes on behind round {before}"),
        Survived(
            "SuperLink killed, started again",
            "nobody",
            f"Flower has lost its run; `--resume` goes on behind round {again}",
        ),
    ]


def test_a_client_app_is_killed(secured: Secured, start: Start, survived: list[Survived]) -> None:
    """The last of them, for Flower gives the node no work until it misses the process, up to a minute later."""
    secured.up()
    run = start(rounds=3)
    run.wait_round(1)
    secured.app("node-1", "flwr-clientapp").kill()
    assert run.end() == 0, run.log.read_text()
    run.assert_whole(3)
    missed = run.missed("node 1")
    assert missed[0] == 2
    assert run.missed("node 0") == []
    then = "goes on; the node gets work again once Flower misses the process"
    survived.append(Survived("ClientApp process killed", f"node 1 in {rounds(missed)}", then))
