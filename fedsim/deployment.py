"""A federation of real processes on this machine: one SuperLink and its SuperNodes, with TLS and registered keys.

All of it lies in one folder: ``keys/``, ``logs/``, ``link.db`` (what the SuperLink knows), ``flower/`` (the
configuration of the command ``flwr``), ``nodes/*.toml`` (each node's configuration), and ``federation.json``, which
names the processes. These outlive the command that starts them. For POSIX systems.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import ssl
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil
import tomli_w

from fedsim import keys
from fedsim.errors import BadInput, RunFailed
from fedsim.flower import (
    CONNECTION,
    START_SECONDS,
    FlowerCli,
    flower_environment,
    known_connection,
    write_connection,
)
from fedsim.processes import GRACE_SECONDS, find_command, free_port

STATE = "federation.json"
ONLINE_SECONDS = 120.0
EVERYWHERE = ("0.0.0.0", "::")
NUM_NODES = 3
POLL_SECONDS = 2.0

_SETTING = re.compile(r"""([\w.-]+)=('[^']*'|"[^"]*"|[^\s'"]+)(?=\s|$)""")
"""As Flower reads ``--node-config``."""

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_WRONG = re.compile(r"\bERROR\b|Errno|Error:|\[code:|Failed to")

NodeConfig = dict[str, bool | int | float | str]


@dataclass(frozen=True)
class Process:
    """A process by its number and its start time, so that a number that was given again is not mistaken for it."""

    pid: int
    started: float

    def find(self) -> psutil.Process | None:
        """Return it if it runs."""
        try:
            process = psutil.Process(self.pid)
            dead = process.status() == psutil.STATUS_ZOMBIE
            return None if dead or abs(process.create_time() - self.started) > 1.0 else process
        except psutil.Error:
            return None


@dataclass(frozen=True)
class Node:
    """A SuperNode: its name, the id by which the link knows its key ("" if it is not registered), its processes."""

    name: str
    id: str = ""
    processes: tuple[Process, ...] = ()


@dataclass(frozen=True)
class State:
    """What ``federation.json`` holds.

    Attributes
    ----------
    host, port : str, int
        Where the link listens.
    data_folder : str
        Where data sets lie (``FEDSIM_DATA``), "" for nowhere.
    link : tuple of Process
        The SuperLink and its SuperExec.
    nodes : tuple of Node
        In the order of partitions.
    """

    host: str
    port: int
    data_folder: str = ""
    link: tuple[Process, ...] = ()
    nodes: tuple[Node, ...] = ()

    @property
    def address(self) -> str:
        """Where this machine reaches the link."""
        host = self.host if self.host not in EVERYWHERE else "127.0.0.1"
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


@dataclass(frozen=True)
class Wanted:
    """What the user asks of a federation; None leaves a choice as it was, or to us.

    Parameters
    ----------
    nodes : int or None
        Number of SuperNodes.
    host : str or None
        Address at which the link listens.
    port : int or None
        Its port; a free one by default.
    names : list of str
        Further names and addresses by which the link is reached, for its certificate.
    data : list of str
        Expressions for each node's own data, as many as nodes; empty to share out the experiment's.
    workers : list of int
        Workers that each node hosts with its own data: one number for all, or one a node.
    node_config : list of str
        Further settings of nodes, ``"key=value ..."``: one for all, or one a node.
    """

    nodes: int | None = None
    host: str | None = None
    port: int | None = None
    names: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    workers: list[int] = field(default_factory=list)
    node_config: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """A line of the status: what, its state, its main process's number if it runs, and its log."""

    name: str
    state: str
    pid: int | None
    log: Path


def up(folder: Path, wanted: Wanted) -> list[str]:
    """Start what does not run of a federation, with new keys if it has none, and wait until all of it is online.

    A node that was killed waits until the link misses its heartbeat, for up to a minute: before that, Flower refuses
    its key.

    Parameters
    ----------
    folder : Path
        New, empty, or of an earlier call.
    wanted : Wanted
        What it shall be like; only settings that differ from the earlier ones' need be given.

    Returns
    -------
    list of str
        Names of what was started.

    Raises
    ------
    BadInput
        If the folder holds other files, or a setting is wrong or cannot change now.
    RunFailed
        If a process does not start; what this call started is ended then.
    """
    folder = folder.resolve()
    found = folder / STATE
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder}: is not a folder")
    others = {entry.name for entry in folder.iterdir()} - {"keys", ".lock"} if folder.is_dir() else set()
    if others and not found.exists():
        raise BadInput(f"{folder}: holds other files; name a new folder, or that of an earlier federation")
    keys.make_folder(folder)
    with _locked(folder):
        before = _read(folder) if found.exists() else None
        state = _plan(folder, before, wanted)
        _write_keys(folder, state, wanted.names)
        write_connection(folder / "flower", CONNECTION, state.address, folder / "keys" / "ca.crt")
        _write(folder, state)
        try:
            return _start(folder, state)
        except BaseException:
            earlier = set(_recorded(before)) if before else set()
            _end(p for p in _recorded(_read(folder)) if p not in earlier)
            raise


def status(folder: Path) -> tuple[str, list[Row]]:
    """Say what runs of a federation, and which nodes its link takes for online.

    Parameters
    ----------
    folder : Path
        That of `up`.

    Returns
    -------
    tuple of str and list of Row
        The link's address, and a row for the link and for each node, whose state is "online", "starting" (it runs, but
        the link has not heard of it), "ended" or, with its link gone, "no link".

    Raises
    ------
    BadInput
        If the folder is not that of a federation.
    """
    folder = folder.resolve()
    state = _read(folder)
    answers = _alive(state.link) and _answers(folder, state)
    link = "online" if answers else ("does not answer" if _alive(state.link) else "ended")
    rows = [Row("link", link, _pid(state.link), _log(folder, "link"))]
    listed = _listed(folder) if answers else {}
    for node in state.nodes:
        said = "ended"
        if _alive(node.processes):
            said = "no link" if not answers else "online" if listed.get(node.id) == "online" else "starting"
        rows.append(Row(node.name, said, _pid(node.processes), _log(folder, node.name)))
    return state.address, rows


def down(folder: Path, names: Iterable[str] = ()) -> list[str]:
    """End a federation, or some of its parts, with everything that they have started.

    Parameters
    ----------
    folder : Path
        That of `up`.
    names : iterable of str
        Nodes to end, or "link"; all by default.

    Returns
    -------
    list of str
        Names of the processes that were ended.

    Raises
    ------
    BadInput
        If the folder is not that of a federation, or there is no such node.
    """
    folder = folder.resolve()
    with _locked(folder, must_exist=True):
        state = _read(folder)
        parts = {node.name: node.processes for node in state.nodes} | {"link": state.link}  # the link last
        for name in (names := list(names)):
            if name not in parts:
                raise BadInput(f"{name!r}: must be one of {', '.join(parts)}")
        ended = []
        for name in names or parts:
            ended += _end(parts[name], folder / "homes" / name)
        if not names:
            ended += _end((), folder / "homes")
        gone = {"link": ()} if "link" in (names or parts) else {}
        nodes = tuple(replace(n, processes=()) if not names or n.name in names else n for n in state.nodes)
        _write(folder, replace(state, nodes=nodes, **gone))
        return ended


def connection_home(folder: Path) -> Path:
    """Return the folder of Flower's configuration that knows a federation as the connection "fedsim".

    Parameters
    ----------
    folder : Path
        That of `up`.

    Returns
    -------
    Path
        For FLWR_HOME.

    Raises
    ------
    BadInput
        If the folder is not that of a federation.
    """
    _read(folder)
    return folder.resolve() / "flower"


def processes(folder: Path, name: str) -> list[psutil.Process]:
    """List the living processes of the link or of a node, with all that they have started.

    Parameters
    ----------
    folder : Path
        That of `up`.
    name : str
        A node's name, or "link".

    Returns
    -------
    list of psutil.Process
        The SuperLink or SuperNode first.
    """
    folder = folder.resolve()
    state = _read(folder)
    recorded = {node.name: node.processes for node in state.nodes} | {"link": state.link}
    return _find(recorded[name], folder / "homes" / name)


@contextmanager
def _locked(folder: Path, must_exist: bool = False) -> Iterator[None]:
    if must_exist:
        _read(folder)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(f"{folder}: another 'fedsim federation' is at work on it") from None
        yield


def _read(folder: Path) -> State:
    try:
        found = json.loads((folder / STATE).read_text(encoding="utf-8"))
        nodes = tuple(Node(n["name"], n["id"], _read_processes(n["processes"])) for n in found["nodes"])
        link = _read_processes(found["link"])
        return State(str(found["host"]), int(found["port"]), str(found["data_folder"]), link, nodes)
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(
            f"{folder}: is not the folder of a federation (no {STATE}); 'fedsim federation up {folder}' makes one"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder / STATE}: cannot be read: {error!r}") from None


def _read_processes(found: list[dict[str, float]]) -> tuple[Process, ...]:
    return tuple(Process(int(p["pid"]), float(p["started"])) for p in found)


def _write(folder: Path, state: State) -> None:
    keys.write_private(folder / STATE, (json.dumps(asdict(state), indent=2) + "\n").encode())


def _recorded(state: State) -> list[Process]:
    return [*state.link, *(p for node in state.nodes for p in node.processes)]


def _alive(recorded: tuple[Process, ...]) -> bool:
    """Say whether all processes of a part run."""
    return bool(recorded) and all(p.find() is not None for p in recorded)


def _pid(recorded: tuple[Process, ...]) -> int | None:
    return recorded[0].pid if recorded and recorded[0].find() is not None else None


def _log(folder: Path, name: str) -> Path:
    return folder / "logs" / f"{name}.log"


def _plan(folder: Path, before: State | None, wanted: Wanted) -> State:
    """Check what is asked for against what there is, and write the nodes' configurations."""
    count = wanted.nodes if wanted.nodes is not None else (len(before.nodes) if before else NUM_NODES)
    if count < 1:
        raise BadInput(f"--nodes = {count} must be at least 1")
    if wanted.port is not None and not 1 <= wanted.port <= 65535:
        raise BadInput(f"--port = {wanted.port} must be from 1 to 65535")
    if wanted.data and len(wanted.data) != count:
        raise BadInput(f"--data is given {len(wanted.data)} times and must be once for each of {count} nodes")
    for option, given in (("--workers", wanted.workers), ("--node-config", wanted.node_config)):
        if len(given) not in {0, 1, count}:
            raise BadInput(
                f"{option} is given {len(given)} times and must be once, or once for each of {count} nodes"
            )
    if wanted.workers and not wanted.data:
        raise BadInput(
            "--workers needs --data; else the workers of an experiment are shared out over the nodes"
        )
    if any(number < 1 for number in wanted.workers):
        raise BadInput(f"--workers = {min(wanted.workers)} must be at least 1")
    earlier = _earlier_configs(folder)
    if earlier and len(earlier) != count and not wanted.data and any("data" in c for c in earlier):
        raise BadInput(
            f"--nodes = {count}: the {len(earlier)} nodes here have data of their own; give --data for each"
        )
    configs = [
        (earlier[i] if i < len(earlier) else {}) | config
        for i, config in enumerate(_node_configs(count, wanted))
    ]
    if before is None:
        port = wanted.port if wanted.port is not None else free_port()
        state = State(wanted.host or "127.0.0.1", port, _data_folder(""))
    else:
        state = replace(
            before,
            host=wanted.host or before.host,
            port=wanted.port if wanted.port is not None else before.port,
            data_folder=_data_folder(before.data_folder),
        )
        running = any(p.find() for p in _recorded(before))
        moved = (state.host, state.port) != (before.host, before.port)
        named = {*wanted.names} <= {*keys.certificate_hosts(folder / "keys")}
        if running and (configs != earlier or moved or not named):
            raise BadInput(
                f"{folder}: runs already, with other settings; 'fedsim federation down {folder}' first"
            )
    known = {node.name: node for node in state.nodes}
    names = [f"node-{i}" for i in range(count)]
    if configs != earlier:
        keys.make_folder(folder / "nodes")
        for i in range(count, len(earlier)):
            _node_file(folder, f"node-{i}").unlink()
        for name, config in zip(names, configs, strict=True):
            keys.write_private(_node_file(folder, name), tomli_w.dumps(config).encode())
    return replace(state, nodes=tuple(known.get(name, Node(name)) for name in names))


def _node_file(folder: Path, name: str) -> Path:
    return folder / "nodes" / f"{name}.toml"


def _earlier_configs(folder: Path) -> list[NodeConfig]:
    found: list[NodeConfig] = []
    while (file := _node_file(folder, f"node-{len(found)}")).exists():
        try:
            found.append(tomllib.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise BadInput(f"{file}: cannot be read: {error}") from None
    return found


def _data_folder(before: str) -> str:
    return str(Path(os.environ["FEDSIM_DATA"]).resolve()) if os.environ.get("FEDSIM_DATA") else before


def _node_configs(count: int, wanted: Wanted) -> list[NodeConfig]:
    configs: list[NodeConfig] = [{"partition-id": i, "num-partitions": count} for i in range(count)]
    for i, config in enumerate(configs):
        if wanted.data:
            config["data"] = _own_data(wanted.data[i])
            if wanted.workers:
                config["num-workers"] = wanted.workers[i if len(wanted.workers) > 1 else 0]
        if wanted.node_config:
            text = wanted.node_config[i if len(wanted.node_config) > 1 else 0]
            try:
                further = tomllib.loads("\n".join(f"{k}={v}" for k, v in _SETTING.findall(text)))
            except tomllib.TOMLDecodeError:
                further = {}
            if (
                not further
                or _SETTING.sub("", text).strip()
                or not all(isinstance(value, bool | int | float | str) for value in further.values())
            ):
                raise BadInput(
                    f"--node-config = {text!r} must be settings such as 'room=\"a\" limit=3', of a word and a "
                    "string, a number, true or false"
                )
            config |= further
    return configs


def _own_data(text: str) -> str:
    """Check an expression for data; folders in it are meant from where the user is, not from where the node starts."""
    from fedsim.registry import expression, parse  # takes long to import

    source = parse("data", text, "--data")
    path = getattr(source, "path", None)
    if isinstance(path, str):
        if not Path(path).expanduser().exists():
            raise BadInput(f"--data = {text!r}: {path} does not exist")
        source = replace(source, path=str(Path(path).expanduser().resolve()))
    return expression(source)


def _write_keys(folder: Path, state: State, names: list[str]) -> None:
    at = folder / "keys"
    new = keys.make_authority(at)
    hosts = [*([] if state.host in EVERYWHERE else [state.host]), *names]
    known = keys.certificate_hosts(at)
    if new or not set(hosts) <= set(known) or keys.certificate_days_left(at) < 1:
        keys.make_certificate(at, list(dict.fromkeys([*hosts, *known])))
    for node in state.nodes:
        keys.make_node_key(at, node.name)
    keys.make_secret(at)


def _start(folder: Path, state: State) -> list[str]:
    for name in ("logs", "homes", "work"):
        keys.make_folder(folder / name)
    started: list[str] = []
    at = folder / "keys"
    if not _alive(state.link):
        _end(state.link, folder / "homes" / "link")
        state = replace(state, link=_start_link(folder, state))
        _write(folder, state)
        started.append("link")
    _wait_link(folder, state)
    listed = _listed(folder)
    for i, node in enumerate(state.nodes):
        if node.id not in listed:
            answer = _ask(folder, "register", str(at / f"{node.name}.pub"), CONNECTION)
            node = replace(node, id=str(answer["node-id"]))
        if not _alive(node.processes):
            _end(node.processes, folder / "homes" / node.name)
            _wait_forgotten(folder, node)
            node = replace(node, processes=_start_node(folder, state, node))
            started.append(node.name)
        state = replace(state, nodes=(*state.nodes[:i], node, *state.nodes[i + 1 :]))
        _write(folder, state)
    _wait_online(folder, state)
    return started


def _start_link(folder: Path, state: State) -> tuple[Process, ...]:
    at = folder / "keys"
    link = _launch(
        folder, state, "link", "flower-superlink",
        "--host", state.host, "--port", str(state.port),
        "--ssl-ca-certfile", str(at / "ca.crt"),
        "--ssl-certfile", str(at / "link.crt"), "--ssl-keyfile", str(at / "link.key"),
        "--enable-supernode-auth", "--database", str(folder / "link.db"), "--isolation", "process",
        "--superexec-auth-secret-file", str(at / "superexec"),
    )  # fmt: skip
    runner = _launch(
        folder, state, "link", "flower-superexec",
        "--runtime-api-address", state.address, "--root-certificates", str(at / "ca.crt"),
        "--parent-pid", str(link.pid), "--superexec-auth-secret-file", str(at / "superexec"),
    )  # fmt: skip
    return link, runner


def _start_node(folder: Path, state: State, node: Node) -> tuple[Process, ...]:
    at, port = folder / "keys", free_port()
    supernode = _launch(
        folder, state, node.name, "flower-supernode",
        "--superlink", state.address, "--root-certificates", str(at / "ca.crt"),
        "--auth-supernode-private-key", str(at / f"{node.name}.key"),
        "--port", str(port), "--isolation", "process",
        "--superexec-auth-secret-file", str(at / "superexec"),
        "--node-config", str(_node_file(folder, node.name)),
    )  # fmt: skip
    # The node's own runtime API is for this machine's loopback interface only; the secret keeps other users out.
    runner = _launch(
        folder, state, node.name, "flower-superexec", "--insecure",
        "--runtime-api-address", f"127.0.0.1:{port}", "--parent-pid", str(supernode.pid),
        "--superexec-auth-secret-file", str(at / "superexec"),
    )  # fmt: skip
    return supernode, runner


def _launch(folder: Path, state: State, name: str, *command: str) -> Process:
    """Start a process in a session of its own, which nobody waits for."""
    home, work = folder / "homes" / name, folder / "work" / name
    keys.make_folder(home)
    keys.make_folder(work)  # empty: what lies in the working directory could be imported
    environment = flower_environment() | known_connection(folder / "flower") | {"FLWR_HOME": str(home)}
    if state.data_folder:
        environment["FEDSIM_DATA"] = state.data_folder
    program = shutil.which(find_command(command[0]))
    if program is None:
        raise RunFailed(f"{command[0]}: there is no such program; is flwr installed in this environment?")
    log, flags = str(_log(folder, name)), os.O_WRONLY | os.O_CREAT | os.O_APPEND
    pid = os.posix_spawn(
        "/bin/sh",
        ["sh", "-c", 'cd "$0" && exec "$@"', str(work), program, *command[1:]],
        environment,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log, flags, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    return Process(pid, psutil.Process(pid).create_time())


def _answers(folder: Path, state: State) -> bool:
    """Say whether the link answers over TLS, with a certificate of our authority."""
    try:
        context = ssl.create_default_context(cafile=str(folder / "keys" / "ca.crt"))
        secure = urllib.request.HTTPSHandler(context=context)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), secure)
        with opener.open(f"https://{state.address}/health", timeout=2.0) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False


def _wait_link(folder: Path, state: State) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _answers(folder, state):
        if not _alive(state.link):
            raise RunFailed(f"the SuperLink ended at once: {_last_line(folder, 'link')}")
        if time.monotonic() >= deadline:
            raise RunFailed(
                f"the SuperLink at {state.address} does not answer after {START_SECONDS:g} s; see {_log(folder, 'link')}"
            )
        time.sleep(0.1)


def _wait_forgotten(folder: Path, node: Node) -> None:
    """Wait until the link misses a node that was killed: before that it refuses the same key."""
    deadline = time.monotonic() + ONLINE_SECONDS
    while _listed(folder).get(node.id) == "online":
        if time.monotonic() >= deadline:
            raise RunFailed(
                f"{node.name}: the SuperLink still takes it for online; does another one use its key?"
            )
        time.sleep(POLL_SECONDS)


def _wait_online(folder: Path, state: State) -> None:
    deadline = time.monotonic() + ONLINE_SECONDS
    while True:
        listed = _listed(folder)
        for node in state.nodes:
            if not _alive(node.processes):
                raise RunFailed(f"{node.name} ended at once: {_last_line(folder, node.name)}")
        missing = [node.name for node in state.nodes if listed.get(node.id) != "online"]
        if not missing:
            return
        if time.monotonic() >= deadline:
            raise RunFailed(
                f"not online after {ONLINE_SECONDS:g} s: {', '.join(missing)}; see {folder / 'logs'}"
            )
        time.sleep(0.2)


def _last_line(folder: Path, name: str) -> str:
    """Return what a log says last about an error, or its last line."""
    lines = _COLOUR.sub("", _log(folder, name).read_text(encoding="utf-8", errors="replace")).splitlines()
    said = [line.strip() for line in lines[-40:] if any(c.isalnum() for c in line)]
    wrong = [line for line in said if _WRONG.search(line)]
    return f"{(wrong or said or ['it said nothing'])[-1]} (see {_log(folder, name)})"


def _ask(folder: Path, *arguments: str) -> dict[str, object]:
    home = folder / "flower"
    flwr = FlowerCli(flower_environment() | known_connection(home), home, CONNECTION)
    try:
        return flwr.ask(["supernode", *arguments])
    except RuntimeError as error:
        raise RunFailed(f"{' '.join(str(error).split())} (see {_log(folder, 'link')})") from None


def _listed(folder: Path) -> dict[str, str]:
    """Status of the SuperNodes that the link knows, by their ids."""
    nodes = _ask(folder, "list", CONNECTION)["nodes"]
    assert isinstance(nodes, list)
    return {node["node-id"]: node["status"] for node in nodes if node["status"] != "unregistered"}


def _find(recorded: Iterable[Process], home: Path | None) -> list[psutil.Process]:
    """List processes that are recorded, those of their sessions, their descendants, and all with such a FLWR_HOME."""
    # A process may hide its environment, as Flower's SuperExec does; its session still tells whose it is.
    found = {p.pid: p for known in recorded if (p := known.find()) is not None}
    sessions = set(found)
    for process in list(found.values()):
        found |= {child.pid: child for child in _children(process)}
    for process in psutil.process_iter():
        if process.pid in found or process.pid == os.getpid():
            continue
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            ours = os.getsid(process.pid) in sessions
            if not ours and home is not None:
                ours = Path(process.environ().get("FLWR_HOME", "/")).is_relative_to(home)
            if ours:
                found[process.pid] = process
        except (psutil.Error, OSError):
            continue
    return list(found.values())


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _end(recorded: Iterable[Process], home: Path | None = None) -> list[str]:
    """End processes, by force where they do not listen, and return their names."""
    recorded = list(recorded)
    ended: dict[int, str] = {}
    number, deadline = signal.SIGTERM, time.monotonic() + GRACE_SECONDS
    while alive := _find(recorded, home):
        for process in alive:
            try:
                if number == signal.SIGKILL or process.pid not in ended:
                    ended.setdefault(process.pid, process.name())
                    process.send_signal(number)
                    if number == signal.SIGTERM:
                        process.send_signal(signal.SIGCONT)  # one that is stopped does not hear it otherwise
            except psutil.Error:
                continue
        psutil.wait_procs(alive, timeout=0.5)
        if time.monotonic() >= deadline:
            number = signal.SIGKILL
        if time.monotonic() >= deadline + ONLINE_SECONDS:
            raise RunFailed(f"{len(alive)} processes cannot be ended: {', '.join(str(p.pid) for p in alive)}")
    return list(ended.values())
