"""Federations of real processes: settings, states, and that `down` ends its own processes and no others."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedsim import cli, deploy_cli, deployment
from fedsim.deployment import Node, Process, State, Wanted
from fedsim.errors import BadInput, RunFailed
from fedsim.flower import write_connection


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a federation is to be; nothing of Flower's is started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    monkeypatch.setattr(deployment, "_start", lambda folder, state: [])
    return tmp_path / "federation"


@pytest.fixture
def launched(folder: Path) -> Iterator[State]:
    """A federation of sleeping processes, of which one has started another, and one an orphan in its own session."""
    folder.mkdir()
    for name in ("logs", "homes", "work", "nodes"):
        (folder / name).mkdir()
    for i in range(2):
        (folder / "nodes" / f"node-{i}.toml").write_text(f"partition-id = {i}\nnum-partitions = 2\n")
    write_connection(folder / "flower", "fedsim", "127.0.0.1:1")
    state = State("127.0.0.1", 1)
    child = "sleep 100 & wait"
    orphan = "import subprocess as s; s.Popen(['sleep', '100'], start_new_session=True)"
    link = deployment._launch(folder, state, "link", "sh", "-c", child)
    zero = deployment._launch(folder, state, "node-0", "sleep", "100")
    one = deployment._launch(
        folder, state, "node-1", sys.executable, "-c", f"{orphan}; import time; time.sleep(100)"
    )
    state = State("127.0.0.1", 1, "", (link,), (Node("node-0", "1", (zero,)), Node("node-1", "2", (one,))))
    deployment._write(folder, state)
    wait_for(lambda: (len(under(folder, "link")), len(under(folder, "node-1"))), (2, 2))
    yield state
    for process in under(folder, ""):
        process.kill()


def under(folder: Path, name: str) -> list[psutil.Process]:
    """Living processes with a home in the folder, by their environment alone."""
    found = []
    for process in psutil.process_iter():
        try:
            home = Path(process.environ().get("FLWR_HOME", "/"))
            if home.is_relative_to(folder / "homes" / name) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for(found, expected) -> None:
    deadline = time.monotonic() + 10
    while found() != expected and time.monotonic() < deadline:
        time.sleep(0.02)
    assert found() == expected


# ------------------------------------------------------------------------------------------------- processes


def test_down_ends_everything_that_was_started(folder: Path, launched: State) -> None:
    ended = deployment.down(folder)
    assert (
        sorted(ended) == sorted(["sh", "sleep", "sleep", psutil.Process().name(), "sleep"]) or len(ended) == 5
    )
    assert under(folder, "") == []
    assert deployment.down(folder) == []


def test_down_ends_one_part_only(folder: Path, launched: State) -> None:
    assert len(deployment.down(folder, ["node-1"])) == 2
    assert (len(under(folder, "link")), len(under(folder, "node-0")), under(folder, "node-1")) == (2, 1, [])
    assert [row.state for row in deployment.status(folder)[1]] == ["does not answer", "no link", "ended"]


def test_processes_of_a_part_come_with_their_main_one_first(folder: Path, launched: State) -> None:
    found = deployment.processes(folder, "node-1")
    assert found[0].pid == launched.nodes[1].processes[0].pid
    assert {p.pid for p in found} == {p.pid for p in under(folder, "node-1")}


def test_a_process_that_is_stopped_ends_too(folder: Path, launched: State) -> None:
    for process in under(folder, "node-0"):
        process.suspend()
    assert len(deployment.down(folder, ["node-0"])) == 1


def test_a_process_that_does_not_listen_is_killed(
    folder: Path, launched: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment, "GRACE_SECONDS", 0.2)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(99)"
    node = Node("node-0", "1", (deployment._launch(folder, launched, "node-0", sys.executable, "-c", deaf),))
    wait_for((folder / "logs" / "node-0.log").read_text, "1\n")
    deployment._write(folder, State("127.0.0.1", 1, "", (), (node,)))
    deployment.down(folder, ["node-0"])
    assert under(folder, "node-0") == []


def test_a_number_that_was_given_again_is_not_ours(folder: Path, launched: State) -> None:
    other = subprocess.Popen(["sleep", "100"])
    try:
        stale = Process(other.pid, psutil.Process(other.pid).create_time() - 60)
        deployment._write(folder, State("127.0.0.1", 1, "", (), (Node("node-0", "1", (stale,)),)))
        assert deployment.status(folder)[1][1].state == "ended"
        assert deployment.processes(folder, "node-0")[0].pid != other.pid
        deployment.down(folder)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_processes_outlive_the_command_in_sessions_of_their_own(folder: Path, launched: State) -> None:
    sessions = {os.getsid(p.pid) for p in deployment._recorded(launched)}
    assert len(sessions) == 3
    assert os.getsid(0) not in sessions


# -------------------------------------------------------------------------------------------------- settings


def test_up_writes_what_processes_need(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_DATA", "data")
    deployment.up(folder, Wanted(nodes=2, port=8123, node_config=["room='a' limit=3", "room='b b'"]))
    assert {entry.name for entry in folder.iterdir()} >= {"keys", "nodes", "flower", "federation.json"}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "federation.json").stat().st_mode) == 0o600
    configs = [tomllib.loads((folder / "nodes" / f"node-{i}.toml").read_text()) for i in range(2)]
    assert configs == [
        {"partition-id": 0, "num-partitions": 2, "room": "a", "limit": 3},
        {"partition-id": 1, "num-partitions": 2, "room": "b b"},
    ]
    connection = tomllib.loads((folder / "flower" / "config.toml").read_text())["superlink"]["fedsim"]
    assert connection == {"address": "127.0.0.1:8123", "root-certificates": str(folder / "keys" / "ca.crt")}
    assert json.loads((folder / "federation.json").read_text())["data_folder"] == str(folder.parent / "data")


def test_own_data_are_meant_from_where_the_user_is(folder: Path) -> None:
    (folder.parent / "a b").mkdir()
    deployment.up(folder, Wanted(nodes=2, data=["Folder('a b')", "Digits()"], workers=[4]))
    configs = [tomllib.loads((folder / "nodes" / f"node-{i}.toml").read_text()) for i in range(2)]
    assert [config["data"] for config in configs] == [
        f"Folder(path={str(folder.parent / 'a b')!r})",
        "Digits()",
    ]
    assert [config["num-workers"] for config in configs] == [4, 4]


def test_up_again_keeps_port_keys_and_configurations(folder: Path) -> None:
    deployment.up(folder, Wanted(nodes=2, node_config=["limit=3"]))
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    deployment.up(folder, Wanted())
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    deployment.up(folder, Wanted(nodes=3))
    assert [n.name for n in deployment._read(folder).nodes] == ["node-0", "node-1", "node-2"]
    assert tomllib.loads((folder / "nodes" / "node-0.toml").read_text())["num-partitions"] == 3
    key = folder / "keys" / "node-0.key"
    assert key.read_bytes() == before[key]


def test_the_same_settings_again_change_nothing(folder: Path, launched: State) -> None:
    for file in (folder / "nodes").iterdir():
        file.write_text(file.read_text() + "limit = 3\n")
    assert deployment.up(folder, Wanted(nodes=2, node_config=["limit=3"])) == []
    with pytest.raises(BadInput, match="runs already, with other settings"):
        deployment.up(folder, Wanted(nodes=2, node_config=["limit=4"]))


def test_own_data_are_not_forgotten(folder: Path) -> None:
    deployment.up(folder, Wanted(nodes=2, data=["Digits()", "Digits()"], workers=[4]))
    deployment.up(folder, Wanted(node_config=["limit=3"]))
    assert tomllib.loads((folder / "nodes" / "node-1.toml").read_text()) == {
        "partition-id": 1,
        "num-partitions": 2,
        "data": "Digits()",
        "num-workers": 4,
        "limit": 3,
    }
    with pytest.raises(
        BadInput, match="--nodes = 3: the 2 nodes here have data of their own; give --data for each"
    ):
        deployment.up(folder, Wanted(nodes=3))
    deployment.up(folder, Wanted(nodes=1, data=["Digits()"]))
    assert [file.name for file in (folder / "nodes").iterdir()] == ["node-0.toml"]


def test_another_address_needs_another_certificate(folder: Path) -> None:
    deployment.up(folder, Wanted(nodes=1))
    before = (folder / "keys" / "link.crt").read_bytes()
    deployment.up(folder, Wanted(names=["link.example.org"], host="0.0.0.0"))
    assert (folder / "keys" / "link.crt").read_bytes() != before
    assert "link.example.org" in deployment.keys.certificate_hosts(folder / "keys")
    assert deployment._read(folder).address.startswith("127.0.0.1:")


def test_a_failed_start_leaves_no_process_behind(
    folder: Path, launched: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path, state: State) -> list[str]:
        new = Node("node-2", "3", (deployment._launch(folder, state, "node-2", "sleep", "100"),))
        deployment._write(folder, State(state.host, state.port, "", state.link, (*state.nodes, new)))
        raise RunFailed("no")

    monkeypatch.setattr(deployment, "_start", fail)
    with pytest.raises(RunFailed):
        deployment.up(folder, Wanted())
    assert (len(under(folder, "link")), len(under(folder, "node-0")), under(folder, "node-2")) == (2, 1, [])


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (Wanted(nodes=0), "--nodes = 0 must be at least 1"),
        (Wanted(port=0), "--port = 0 must be from 1 to 65535"),
        (Wanted(nodes=2, data=["Digits()"]), "--data is given 1 times and must be once for each of 2 nodes"),
        (
            Wanted(nodes=1, data=["Digitz()"]),
            "--data = 'Digitz()': unknown name 'Digitz'; did you mean 'Digits'?",
        ),
        (Wanted(nodes=1, data=["Folder('absent')"]), "--data = \"Folder('absent')\": absent does not exist"),
        (
            Wanted(nodes=3, node_config=["a=1", "b=1"]),
            "--node-config is given 2 times and must be once, or once",
        ),
        (Wanted(workers=[2]), "--workers needs --data"),
        (Wanted(nodes=1, data=["Digits()"], workers=[0]), "--workers = 0 must be at least 1"),
        (Wanted(node_config=["a"]), "--node-config = 'a' must be settings such as"),
        (Wanted(node_config=["a=[1]"]), "--node-config = 'a=[1]' must be settings such as"),
        (Wanted(names=["a b"]), "--host = 'a b' must be a name such as"),
    ],
)
def test_wrong_settings_are_one_line(wanted: Wanted, text: str, folder: Path) -> None:
    with pytest.raises(BadInput) as caught:
        deployment.up(folder, wanted)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder / "federation.json").exists()


def test_a_running_federation_does_not_change(folder: Path, launched: State) -> None:
    with pytest.raises(
        BadInput, match=r"runs already, with other settings; 'fedsim federation down .*' first"
    ):
        deployment.up(folder, Wanted(nodes=3))


def test_other_folders_are_left_alone(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").write_text("")
    with pytest.raises(BadInput, match="holds other files"):
        deployment.up(folder, Wanted())
    for act in (deployment.down, deployment.status, deployment.connection_home):
        with pytest.raises(BadInput, match="is not the folder of a federation"):
            act(folder)
    assert [entry.name for entry in folder.iterdir()] == ["thesis.tex"]


def test_two_commands_do_not_work_on_one_folder(folder: Path) -> None:
    deployment.up(folder, Wanted())
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BadInput, match="another 'fedsim federation' is at work on it"):
            deployment.down(folder)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"host": 1, "port": "x"}'])
def test_a_broken_state_is_one_line(content: str, folder: Path) -> None:
    deployment.up(folder, Wanted())
    (folder / "federation.json").write_text(content)
    with pytest.raises(BadInput, match=r"federation\.json: cannot be read: "):
        deployment.status(folder)


# --------------------------------------------------------------------------------------------- the commands


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fedsim", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code if isinstance(ended.value.code, int) else -1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("federation status absent", "absent: is not the folder of a federation"),
        ("federation down absent", "absent: is not the folder of a federation"),
        ("federation up --nodes 0", "--nodes = 0 must be at least 1"),
        ("federation keys keys", "name the link with --host, or a node with --node, or both"),
        ("federation keys keys --node ../x", "--node = '../x' must be a name of letters"),
        ("flower --federation .", "is not the folder of a federation"),
        ("federation upp", "No such command 'upp'"),
        ("federation down --only node-9", "is not the folder of a federation"),
    ],
)
def test_errors_of_commands_are_one_line_and_exit_code_2(
    arguments: str,
    text: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, *arguments.split()) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("fedsim: ")
    assert text in said.err
    assert said.err.count("\n") == 1


def test_another_system_is_told_so_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy_cli.os, "name", "nt")
    with pytest.raises(BadInput, match="fedsim federation up: needs Linux or macOS; on Windows use WSL 2"):
        deploy_cli.check_platform("fedsim federation up")


def test_keys_says_what_goes_where(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        call(monkeypatch, "federation", "keys", "k", "--host", "link.example.org", "--node", "clinic-a") == 0
    )
    said = capsys.readouterr().out
    assert "made the authority: k/ca.crt, for all hosts, and ca.key, for none" in said
    assert "made the keys of clinic-a: k/clinic-a.key, which stays here, and clinic-a.pub" in said
    assert (
        call(monkeypatch, "federation", "keys", "k", "--host", "link.example.org", "--node", "clinic-a") == 0
    )
    said = capsys.readouterr().out
    assert "kept the authority" in said
    assert "kept the keys of clinic-a" in said


def test_status_and_down_of_what_has_ended(
    folder: Path, launched: State, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "federation", "down") == 0
    assert capsys.readouterr().out.splitlines()[0] == "ended 5 processes"
    assert call(monkeypatch, "federation", "status") == 1
    said = capsys.readouterr()
    assert [line.split()[:2] for line in said.out.splitlines()[2:]] == [
        ["link", "ended"],
        ["node-0", "ended"],
        ["node-1", "ended"],
    ]
    assert said.err == (
        "fedsim: not online: link, node-0, node-1; 'fedsim federation up federation' starts what has ended\n"
    )
    assert call(monkeypatch, "federation", "down") == 0
    assert capsys.readouterr().out.splitlines()[0] == "nothing was running"
