"""The process of a resident: its folder, who may reach it, when it ends, and the process that asks it."""

from __future__ import annotations

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
from multiprocessing.connection import Client, Listener
from pathlib import Path

import pytest
from messages_toys import Explosive

from fedsim import frames, reach
from fedsim.source import code_hash

ROOT = Path(__file__).parents[1]
STUB = (str(Path(__file__).parent / "stub_resident.py"),)

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="the folder and its socket are those of POSIX"
)


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
