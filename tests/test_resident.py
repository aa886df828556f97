"""Runs through residents: the same history, whatever becomes of the processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsim import Experiment, client_app, frames, hosting, reach, resident
from fedsim.federation import load
from fedsim.grid import InProcessGrid
from fedsim.over_grid import OverGrid, greet
from fedsim.simulate import rounds
from fedsim.source import code_hash

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="the folder and its socket are those of POSIX"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return reach.home(7, tmp_path / "b")


# ------------------------------------------------------------------------------------------- a process per message

TINY = {
    "data": "Synthetic(rows=150, features=4, classes=3)",
    "partition": "Dirichlet(alpha=0.5)",
    "model": "MLP(hidden=(3,))",
    "num-workers": 5,
    "rounds": 4,
    "local-steps": 3,
    "batch-size": 4,
    "holdout": 0.25,
    "dtype": "float64",
    "device": "cpu",
}
CASES: dict[str, dict[str, Any]] = {
    "mean": {"strategy": "FedAvgM(lr=0.7, momentum=0.5)", "probes": "Drift()"},
    "some take part": {"strategy": "FedMedian()", "participation": 0.6, "eval-every": 2},
    "rows at nodes": {"strategy": "ElasticAveraging()", "client": "Nesterov(lr=0.1, momentum=0.5)"},
    "rows are asked for": {
        "strategy": "LeaderSGD(pull=0.1)",
        "client": "SGD(lr=0.1, momentum=0.5)",
        "partition": "IID()",
    },
    "states at nodes": {"strategy": "DiLoCo()", "client": "AdamW(lr=0.01)"},
    "one by one": {
        "strategy": "ElasticAveraging()",
        "client": "Nesterov(lr=0.1, momentum=0.5)",
        "schedule": "FreeRunning()",
        "holdout": 0.0,
    },
}


class Mortal(resident.Watch):
    """Ends the thread that serves."""

    killed = False

    def __enter__(self) -> None:
        if self.killed:
            raise SystemExit
        super().__enter__()


class Here(reach.Resident):
    """A resident that is a thread of this process, with the cohorts that a process would have."""

    def start(self) -> Any:
        listener = Listener(reach.address(self.folder), "AF_UNIX", backlog=16)
        watch = Mortal(resident.Lock(self.folder / "lock"), self.idle, [], pytest.fail)
        answer = resident.Cohorts(self.folder).answer

        def serve() -> None:
            with suppress(SystemExit):
                resident.serve(listener, watch, answer)

        thread = threading.Thread(target=serve)
        thread.start()
        RESIDENTS[self.folder] = listener, watch, thread
        return Alive()


class Alive:
    def poll(self) -> None:
        return None


RESIDENTS: dict[Path, tuple[Listener, Mortal, threading.Thread]] = {}


def kill(folder: Path) -> None:
    """What the system does to a resident, its memory and its lock."""
    listener, watch, thread = RESIDENTS.pop(folder)
    watch.killed = True
    Client(reach.address(folder), "AF_UNIX").close()
    thread.join()
    listener.close()
    watch.lock.file.close()


@pytest.fixture
def deployed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Flower starts a process for every message; residents are threads."""
    monkeypatch.setattr(client_app, "is_for_one_message", lambda: True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(reach, "Resident", Here)
    yield
    for folder in [*RESIDENTS]:
        kill(folder)


class Forgetful(ClientApp):
    """Message by message in other processes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def __call__(self, message: Message, context: Context) -> Message:
        self.monkeypatch.setattr(client_app, "_HOSTS", {})
        return client_app.app(message, context)


def history(
    experiment: Experiment,
    app: ClientApp = client_app.app,
    grid: type[InProcessGrid] = InProcessGrid,
    idle: int = 60,
) -> list[dict[str, Any]]:
    made = grid(app, 2, experiment.to_mapping(), [{"resident-idle": idle}] * 2)
    carrier = OverGrid(made, experiment, load(experiment), greet(made, 2))
    return [snapshot.metrics for snapshot, _ in rounds(experiment, carrier=carrier)]


def chosen(name: str, **changes: Any) -> Experiment:
    return Experiment.from_mapping(TINY | CASES[name] | changes)


@pytest.mark.parametrize("name", CASES)
def test_a_resident_gives_the_same_history_to_the_last_bit(
    name: str, deployed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = chosen(name)
    found = history(experiment, Forgetful(monkeypatch))
    assert len(RESIDENTS) == 2
    assert client_app._HOSTS == {}  # nothing was done here
    monkeypatch.undo()
    assert found == history(experiment)


@pytest.mark.parametrize("name", CASES)
def test_without_a_resident_the_history_is_the_same_too(
    name: str, deployed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = chosen(name)
    found = history(experiment, Forgetful(monkeypatch), idle=0)
    assert not RESIDENTS
    monkeypatch.undo()
    assert found == history(experiment)


class Counting(InProcessGrid):
    """Looks at what nodes' contexts hold after every message."""

    def pull_messages(self, message_ids: Any) -> Iterator[Message]:
        for reply in super().pull_messages(message_ids):
            for node in self._nodes.values():
                assert "kept" not in node.context.state
            yield reply


@pytest.mark.parametrize("idle", [0, 60])
def test_what_workers_keep_does_not_travel_through_the_context(
    idle: int, deployed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = chosen("rows at nodes")
    history(experiment, Forgetful(monkeypatch), Counting, idle)
    files = [*tmp_path.glob("fedsim-*/*/run-*.safetensors")]
    assert len(files) == 2
    assert {hosting.read_made(file).round for file in files} == {experiment.rounds}  # type: ignore[union-attr]


def interrupted(harm: Callable[[Path], None]) -> type[InProcessGrid]:
    """Make a grid on which something happens to node 1 before its third round."""

    class Interrupted(InProcessGrid):
        rounds = 0

        def push_messages(self, messages: Any) -> list[str]:
            messages = list(messages)
            self.rounds += any(m.metadata.message_type == "train.fedsim_round" for m in messages)
            if self.rounds == 3:
                self.rounds += 1
                harm(reach.home(3))
            return super().push_messages(messages)

    return Interrupted


def lose(folder: Path) -> None:
    kill(folder)
    for file in folder.glob("run-*"):
        file.unlink()


def damage(folder: Path) -> None:
    kill(folder)
    for file in folder.glob("run-*"):
        file.write_bytes(file.read_bytes()[:-8])


def turn_back(folder: Path) -> None:
    """Put the file of an earlier round in place."""
    kill(folder)
    for file in folder.glob("run-*"):
        made = hosting.read_made(file)
        assert made is not None
        hosting.write_kept(file, made._replace(round=made.round - 1), hosting.read_kept(file))


@pytest.mark.parametrize("name", CASES)
def test_a_resident_that_is_started_again_finds_what_its_workers_kept(
    name: str, deployed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = chosen(name)
    found = history(experiment, Forgetful(monkeypatch), interrupted(kill))
    monkeypatch.undo()
    assert found == history(experiment)


@pytest.mark.parametrize("harm", [lose, damage, turn_back])
def test_what_is_lost_is_lost(
    harm: Callable[[Path], None], deployed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Forgetful(monkeypatch)
    # a strategy whose workers may begin again says who did
    lost = [line.get("lost") for line in history(chosen("rows at nodes"), app, interrupted(harm))]
    assert lost == [None, None, [3, 4], None]


@pytest.mark.parametrize("harm", [lose, damage, turn_back])
def test_what_must_not_be_lost_is_a_failure(
    harm: Callable[[Path], None], deployed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = chosen("states at nodes", **{"min-nodes": 1})
    found = [
        line.get("failures", {}) for line in history(experiment, Forgetful(monkeypatch), interrupted(harm))
    ]
    assert found[:2] == [{}, {}]
    assert found[2]["node 1"].startswith(
        "RuntimeError: what its workers keep between rounds is lost: this is round 3"
    )


def test_a_resident_without_states_needs_no_file(
    deployed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = chosen("mean")
    found = history(experiment, Forgetful(monkeypatch), interrupted(kill))
    assert not [*tmp_path.glob("fedsim-*/*/run-*")]
    monkeypatch.undo()
    assert found == history(experiment)


def test_where_no_resident_starts_the_process_works_itself_and_says_why(
    deployed: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def cannot(self: Any) -> Any:
        raise reach.NoResident("it cannot be started: no processes left")

    monkeypatch.setattr(Here, "start", cannot)
    monkeypatch.setattr(client_app.log, "propagate", True)
    experiment = chosen("rows at nodes")
    found = history(experiment, Forgetful(monkeypatch), Counting)
    assert (
        "no resident, this process does the work itself, which is slower: it cannot be started: no processes"
        in (caplog.text)
    )
    monkeypatch.undo()
    assert found == history(experiment)


def test_where_the_folder_is_not_safe_rows_travel_again(
    deployed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / f"fedsim-{os.getuid()}").mkdir()
    (tmp_path / f"fedsim-{os.getuid()}").chmod(0o777)
    monkeypatch.setattr(client_app.log, "propagate", True)
    experiment = chosen("rows at nodes")
    found = history(experiment, Forgetful(monkeypatch))
    assert "must be this user's alone, is drwxrwxrwx" in caplog.text
    assert not RESIDENTS
    monkeypatch.undo()
    assert found == history(experiment)


def test_an_exception_in_the_resident_is_told_as_flower_tells_those_of_an_app(
    deployed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = chosen("mean", **{"min-nodes": 1})
    wrong = {"data": "Digitz()", "num-workers": 2}
    grid = InProcessGrid(
        client_app.app,
        2,
        experiment.to_mapping(),
        [wrong, {"data": "Synthetic(rows=40, features=4, classes=3)", "num-workers": 3}],
    )
    with monkeypatch.context() as inside:
        inside.setattr(client_app, "is_for_one_message", lambda: False)
        carrier = OverGrid(grid, experiment, load(experiment), greet(grid, 2))
        one, *_ = (s.failures["node 0"] for s, _ in rounds(experiment, carrier=carrier))
    carrier = OverGrid(grid, experiment, load(experiment), greet(grid, 2))
    other, *_ = (s.failures["node 0"] for s, _ in rounds(experiment, carrier=carrier))
    assert one == other
    assert other.startswith("BadInput: node-config: data = 'Digitz()': unknown name 'Digitz'")


@pytest.mark.parametrize("idle", [-1, "long", 1.5])
def test_a_strange_idle_time_is_named(idle: Any, deployed: None) -> None:
    experiment = chosen("mean")
    grid = InProcessGrid(client_app.app, 1, experiment.to_mapping(), [{"resident-idle": idle}])
    with pytest.raises(Exception, match=r"node-config: resident-idle = .* must be "):
        greet(grid, 1)


def test_only_the_cohorts_of_the_last_runs_are_held(deployed: None, folder: Path) -> None:
    """A third run's cohort takes the first one's place."""
    experiment = chosen("mean")
    cohorts = resident.Cohorts(folder)
    broadcast = {"model": {k: x.numpy() for k, x in load(experiment).theta.items()}}
    content = RecordDict({
        f"broadcast.{k}": ArrayRecord({n: Array(x) for n, x in v.items()}) for k, v in broadcast.items()
    })
    about = {"code": code_hash(), "round": 1, "first": 0, "last": 5, "num-workers": 5, "upload": "mean"}
    content["about"] = ConfigRecord(about)
    described, tensors = frames.pack(content)
    header = {"kind": "train.fedsim_round", "content": described, "node": 2, "made": None}
    header |= {"run-config": experiment.to_mapping(), "node-config": {}}
    for run in (1, 2, 1, 3):
        answer, _ = cohorts.answer(header | {"run": run}, tensors)
        assert answer["made"]["round"] == 1
    assert [run for run, _ in cohorts.hosts] == [1, 3]


@pytest.mark.slow
def test_processes_give_the_same_history_also_when_they_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_app, "is_for_one_message", lambda: True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    children: list[subprocess.Popen[bytes]] = []
    start = reach.Resident.start
    monkeypatch.setattr(reach.Resident, "start", lambda self: children.append(start(self)) or children[-1])

    def harm(folder: Path) -> None:
        greeted = psutil.Process(int((folder / "log").read_text().split()[1]))
        greeted.kill()
        greeted.wait()

    experiment = chosen("rows at nodes")
    try:
        found = history(experiment, Forgetful(monkeypatch), interrupted(harm))
        assert client_app._HOSTS == {}
        assert len(children) >= 3
    finally:
        for child in children:
            child.kill()
            child.wait()
    monkeypatch.undo()
    assert found == history(experiment)
