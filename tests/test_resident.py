"""The resident cohort: what it is told and says, who may reach it, when it ends, what it leaves, and runs through it."""

from __future__ import annotations

import ast
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedsim import Experiment, client_app, frames, hosting, reach, resident
from fedsim.federation import load
from fedsim.grid import InProcessGrid
from fedsim.over_grid import OverGrid, greet
from fedsim.simulate import rounds
from fedsim.source import code_hash

ROOT = Path(__file__).parents[1]
STUB = (str(Path(__file__).parent / "stub_resident.py"),)

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="the folder and its socket are those of POSIX"
)


# ------------------------------------------------------------------------------------------------------ frames


def content() -> RecordDict:
    return RecordDict({
        "about": ConfigRecord({"n": 2**63, "name": "a", "x": 1.0, "yes": True, "list": [3, 1], "none": []}),
        "arrays": ArrayRecord({
            "z": Array(np.arange(6, dtype=np.float32).reshape(2, 3) / 3),
            "a": Array(np.array(1 / 3)),
            "empty": Array(np.zeros((0, 4), dtype=np.int64)),
            "f": Array(np.asfortranarray(np.arange(6.0).reshape(2, 3))),
        }),
        "report": MetricRecord({"loss": [0.1, float("nan"), float("inf"), 5e-324], "count": 3, "mean": 2.0}),
    })


def test_records_arrive_bit_by_bit_and_in_their_order() -> None:
    sent = content()
    described, tensors = frames.pack(sent)
    got = frames.unpack(json.loads(json.dumps(described)), tensors)
    assert [*got] == [*sent]
    assert got["about"] == sent["about"]
    assert [type(v) for v in got["report"].values()] == [type(v) for v in sent["report"].values()]
    np.testing.assert_array_equal(got["report"]["loss"], sent["report"]["loss"])  # type: ignore[arg-type]
    assert [*got.array_records["arrays"]] == [*sent.array_records["arrays"]]
    for key, array in sent.array_records["arrays"].items():
        there, here = got.array_records["arrays"][key].numpy(), array.numpy()
        assert (there.dtype, there.shape) == (here.dtype, here.shape)
        np.testing.assert_array_equal(there, here)


def test_a_frame_is_what_was_sent() -> None:
    a, b = Pipe()
    with a, b:
        frames.send(a, {"kind": "x", "n": 2**63}, b"123")
        assert frames.receive(b) == ({"kind": "x", "n": 2**63}, b"123")


class Explosive:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize(
    "header", [b"", b"{", b"[1]", b"\xff", pickle.dumps(Explosive()), b"[" * 100_000], ids=str
)
def test_what_is_not_a_frame_is_refused(header: bytes) -> None:
    a, b = Pipe()
    with a, b:
        sender = threading.Thread(target=lambda: (a.send_bytes(header), a.send_bytes(b"")))
        sender.start()
        with pytest.raises(frames.BadFrame):
            frames.receive(b)
        sender.join()


@pytest.mark.parametrize("part", [0, 1])
def test_what_is_too_long_is_refused_before_it_is_read(part: int) -> None:
    a, b = Pipe()
    with a, b:
        if part:
            a.send_bytes(b"{}")
        os.write(
            a.fileno(), struct.pack("!i", -1) + struct.pack("!Q", 2**62)
        )  # a length, and nothing behind it
        with pytest.raises(frames.BadFrame, match="longer than"):
            frames.receive(b)


@pytest.mark.parametrize(
    "described",
    [
        None,
        3,
        [1],
        [["a", "arrays"]],
        [["a", "arrays", {"x": "7"}]],
        [["a", "arrays", ["x"]]],
        [["a", "object", {}]],
        [["a", "metrics", {"x": "text"}]],
        [["a", "config", {"x": {"y": 1}}]],
        [["a", "config", {"x": None}]],
    ],
)
def test_other_descriptions_are_refused(described: Any) -> None:
    with pytest.raises(frames.BadFrame, match="not a description"):
        frames.unpack(described, frames.pack(RecordDict())[1])


@pytest.mark.parametrize(
    "tensors", [b"", b"garbage", pickle.dumps(Explosive()), struct.pack("<Q", 2**60) + b"{}"]
)
def test_other_tensors_are_refused(tensors: bytes) -> None:
    with pytest.raises(frames.BadFrame, match="not a description"):
        frames.unpack([], tensors)


def test_objects_are_not_sent() -> None:
    with pytest.raises(TypeError, match="bytes"):
        frames.send(Pipe()[0], {"x": pickle.dumps(1)})


@pytest.mark.parametrize("name", ["frames", "reach", "resident", "client_app", "hosting"])
def test_nothing_is_pickled_or_evaluated(name: str) -> None:
    """Of a connection only the methods for bytes are used: the others pickle."""
    code = ast.parse((ROOT / "fedsim" / f"{name}.py").read_text())
    imported = {a.name for n in ast.walk(code) if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}
    assert not imported & {"pickle", "marshal", "shelve", "dill"}
    called = {ast.unparse(n.func) for n in ast.walk(code) if isinstance(n, ast.Call)}
    assert not called & {"eval", "exec", "connection.send", "connection.recv", "torch.load", "listener.recv"}


# ---------------------------------------------------------------------------------------------------- its folder


def test_the_folder_is_this_users_alone(tmp_path: Path) -> None:
    folder = reach.home(7, tmp_path / "base")
    assert folder == reach.home(7, tmp_path / "base")
    assert [oct(x.stat().st_mode & 0o777) for x in (folder, folder.parent)] == ["0o700"] * 2
    assert reach.home(8, tmp_path / "base") != folder


def test_other_code_has_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = reach.home(7, tmp_path / "base")
    monkeypatch.setattr(reach, "code_hash", lambda: "0" * 16)
    assert reach.home(7, tmp_path / "base") != folder


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_folder_open_to_others_is_refused(mode: int, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base").chmod(mode)
    with pytest.raises(reach.NoResident, match="must be this user's alone, is d"):
        reach.home(7, tmp_path / "base")


def test_another_users_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reach.home(7, tmp_path / "base")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(reach.NoResident, match="must be this user's alone, is drwx------ of user "):
        reach.home(7, tmp_path / "base")


def test_a_link_to_a_folder_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "file").touch()
    with pytest.raises(reach.NoResident, match="is not a folder"):
        reach.home(7, tmp_path / "link")
    with pytest.raises(reach.NoResident, match="cannot be made"):
        reach.home(7, tmp_path / "file")


def test_what_nobody_wants_any_more_is_removed(tmp_path: Path) -> None:
    old, new = (reach.home(i, tmp_path / "base") for i in (1, 2))
    ago = time.time() - 2 * reach.WEEK
    for folder in (old, new):
        for name in ("lock", "run-1.safetensors", "run-2.safetensors"):
            (folder / name).touch()
    for path in (old / "lock", *old.glob("run-*"), old, new / "run-1.safetensors"):
        os.utime(path, (ago, ago))
    os.utime(old, (ago, ago))
    reach.sweep(tmp_path / "base")
    assert not list(old.parent.glob(f"{old.name}/run-*"))
    assert sorted(x.name for x in new.iterdir()) == ["lock", "run-2.safetensors"]
    for path in (*old.iterdir(), old):
        os.utime(path, (ago, ago))
    reach.sweep(tmp_path / "base")
    assert [*(tmp_path / "base").iterdir()] == [new]


# ---------------------------------------------------------------------------------------------------- a process


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return reach.home(7, tmp_path / "b")


class Stub(reach.Resident):
    """A resident that answers what the kind of the request says; what it starts is ended after the test."""

    started: list[subprocess.Popen[bytes]]

    def start(self) -> subprocess.Popen[bytes]:
        self.started.append(super().start())
        return self.started[-1]


@pytest.fixture
def make(folder: Path) -> Iterator[Callable[..., Stub]]:
    started: list[subprocess.Popen[bytes]] = []

    def make(idle: float = 60.0) -> Stub:
        stub = Stub(folder, idle, STUB)
        object.__setattr__(stub, "started", started)
        return stub

    yield make
    for process in started:
        process.kill()
        process.wait()


def wait(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ended(process: subprocess.Popen[bytes]) -> Callable[[], bool]:
    return lambda: process.poll() is not None


def test_one_process_answers_one_request_after_the_other(make: Callable[..., Stub]) -> None:
    stub = make()
    answers = [stub.ask({"kind": "echo", "n": n}, bytes([n])) for n in range(3)]
    assert [(header["n"], tensors) for header, tensors in answers] == [(n, bytes([n])) for n in range(3)]
    assert {header["pid"] for header, _ in answers} == {stub.started[0].pid}
    assert oct((stub.folder / "socket").stat().st_mode & 0o777) == "0o700"

    # an exception is its client's, and the next request is served
    with pytest.raises(reach.Raised, match="no memory") as raised:
        stub.ask({"kind": "raise"}, b"")
    assert (raised.value.kind, raised.value.text) == ("ValueError", "no memory\nleft")
    assert "stub_resident.py" in raised.value.trace

    # so is something that is no request
    for bad in (b"{", pickle.dumps(Explosive())):
        with Client(str(stub.folder / "socket"), "AF_UNIX") as connection:
            assert frames.receive(connection)[0]["code"] == code_hash()
            connection.send_bytes(bad)
            connection.send_bytes(b"")
            assert frames.receive(connection)[0]["error"]["kind"] == "BadFrame"

    # or too long, which is not read
    with Client(str(stub.folder / "socket"), "AF_UNIX") as connection:
        frames.receive(connection)
        os.write(connection.fileno(), struct.pack("!i", -1) + struct.pack("!Q", 2**62))
        assert "longer than" in frames.receive(connection)[0]["error"]["text"]

    # a client that is gone is nobody's trouble
    Client(str(stub.folder / "socket"), "AF_UNIX").close()
    with Client(str(stub.folder / "socket"), "AF_UNIX") as connection:
        frames.send(connection, {"kind": "sleep", "seconds": 0.2})
    assert stub.ask({"kind": "echo"}, b"")[0]["pid"] == stub.started[0].pid
    assert len(stub.started) == 1


def test_one_that_dies_at_work_is_an_error_and_the_next_request_starts_another(
    make: Callable[..., Stub],
) -> None:
    stub = make()
    with pytest.raises(
        reach.Ended, match=r"ended while it worked; the next message starts another.*fatal: told to die$"
    ):
        stub.ask({"kind": "die"}, b"")
    assert len(stub.started) == 1  # what may have been done is not done again
    assert stub.ask({"kind": "echo"}, b"")[0]["pid"] == stub.started[1].pid


def test_one_that_was_killed_leaves_a_lock_and_a_socket_that_stop_nobody(make: Callable[..., Stub]) -> None:
    stub = make()
    stub.ask({"kind": "echo"}, b"")
    stub.started[0].send_signal(signal.SIGKILL)
    stub.started[0].wait()
    assert {"lock", "socket"} <= {x.name for x in stub.folder.iterdir()}
    assert stub.ask({"kind": "echo"}, b"")[0]["pid"] == stub.started[1].pid


def test_clients_that_come_at_once_meet_one_resident(make: Callable[..., Stub]) -> None:
    stub = make()
    pids: list[int] = []
    askers = [
        threading.Thread(target=lambda: pids.append(stub.ask({"kind": "echo"}, b"")[0]["pid"]))
        for _ in range(3)
    ]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert len(pids) == 3
    assert len(set(pids)) == 1
    wait(lambda: sum(process.poll() is None for process in stub.started) == 1)


def test_it_ends_when_nobody_asks(make: Callable[..., Stub]) -> None:
    stub = make(idle=0.2)
    # being asked is not being idle, however long it takes
    assert stub.ask({"kind": "sleep", "seconds": 1.2}, b"")[0]["pid"] == stub.started[0].pid
    wait(ended(stub.started[0]))
    assert stub.started[0].returncode == 0
    assert not (stub.folder / "socket").exists()
    assert stub.last_words().endswith("ends: nobody asked anything for 0.2 s")


def test_it_ends_with_its_node(make: Callable[..., Stub], monkeypatch: pytest.MonkeyPatch) -> None:
    node = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(reach, "watched", lambda: [node.pid])
    stub = make()
    stub.ask({"kind": "echo"}, b"")
    node.kill()  # not yet waited for: a zombie
    wait(ended(stub.started[0]))
    node.wait()
    assert stub.last_words().endswith("ends: its node has ended")
    with pytest.raises(reach.NoResident, match="it does not start"):
        stub.ask({"kind": "echo"}, b"")


@pytest.mark.parametrize("left", ["nothing", "another lock"])
def test_it_ends_when_its_lock_is_stale(left: str, make: Callable[..., Stub]) -> None:
    stub = make()
    stub.ask({"kind": "echo"}, b"")
    (stub.folder / "lock").unlink()
    if left == "another lock":  # that of a resident that has come since
        stub.ask({"kind": "echo"}, b"")
        (stub.folder / "socket").unlink()
        assert stub.ask({"kind": "echo"}, b"")[0]["pid"] == stub.started[1].pid
    wait(ended(stub.started[0]))
    if left == "another lock":
        assert stub.ask({"kind": "echo"}, b"")[0]["pid"] == stub.started[1].pid


def test_flowers_processes_are_watched(tmp_path: Path) -> None:
    """This test is started by something named as Flower's are, which a resident then watches."""
    for name in ("flower-superexec", "other"):
        script = tmp_path / name
        script.write_text("import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))")
        code = (
            "import os; from fedsim.reach import watched; print(watched() == [os.getppid()], watched() == [])"
        )
        command = [sys.executable, str(script), sys.executable, "-c", code]
        said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
        assert said == (["True", "False"] if name.startswith("flower") else ["False", "True"])


def test_one_that_does_not_start_says_why(make: Callable[..., Stub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_STUB_REFUSES", "1")
    with pytest.raises(reach.NoResident, match=r"it does not start; its last words: refuses to start$"):
        make().ask({"kind": "echo"}, b"")


def test_an_address_too_long_is_named(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir(mode=0o700)
    with pytest.raises(reach.NoResident, match="too long for a socket; set TMPDIR"):
        reach.Resident(deep, 1.0, STUB).ask({}, b"")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says who is at the other end")
def test_another_user_is_not_asked_and_not_answered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        Listener(str(folder / "socket"), "AF_UNIX") as listener,
        Client(listener.address, "AF_UNIX") as client,
    ):
        with listener.accept() as served:
            assert reach.same_user(client)
            assert reach.same_user(served)
            monkeypatch.setattr(os, "getuid", lambda: 12345)
            assert not reach.same_user(client)
            assert not reach.same_user(served)
        with pytest.raises(reach.NoResident, match="socket is another user's"):
            reach.Resident(folder, 1.0, STUB).ask({}, b"")


def test_other_code_is_not_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def greet_wrongly(listener: Listener) -> None:
        with listener.accept() as connection:
            frames.send(connection, {"code": "0" * 16})

    with Listener(str(folder / "socket"), "AF_UNIX") as listener:
        thread = threading.Thread(target=greet_wrongly, args=(listener,))
        thread.start()
        with pytest.raises(reach.NoResident, match=r"runs other code \(hash 0{16}, here"):
            reach.Resident(folder, 1.0, STUB).ask({}, b"")
        thread.join()


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


# ------------------------------------------------------------------------------------- the process of one message


def test_the_process_of_a_message_imports_no_pytorch(tmp_path: Path) -> None:
    """From Flower's message to its reply, by way of a resident: all that such a process does."""
    code = f"""
    import sys
    sys.argv = ["/somewhere/bin/flwr-clientapp"]
    import numpy as np
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
    from fedsim import client_app, reach
    from fedsim.grid import InProcessGrid

    reach.Resident.__init__.__defaults__ = ({STUB!r},)
    grid = InProcessGrid(client_app.app, 1, {{"rounds": 3}})
    (reply,) = grid.send_and_receive([Message(RecordDict(), 2, "query.fedsim_hello")])
    assert reply.content["about"]["partition-id"] == 0
    content = RecordDict({{"x": ArrayRecord({{"w": Array(np.arange(3.0))}}), "about": ConfigRecord({{"round": 1}})}})
    for kind in ("train.fedsim_round", "query.fedsim_rows", "evaluate.fedsim_held"):
        (reply,) = grid.send_and_receive([Message(content, 2, kind)])
        assert reply.content == content, reply.error
    heavy = {{"torch", "pandas", "pydantic_core", "sklearn", "scipy", "matplotlib"}} & sys.modules.keys()
    print(sorted(heavy - {{"pydantic_core"}}))
    import psutil
    for child in psutil.Process().children():
        child.kill()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "[]\n", done.stderr


def test_importing_the_client_app_imports_no_pytorch() -> None:
    code = "import sys, fedsim.client_app; print(sorted({'torch', 'strategies', 'clients'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


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
