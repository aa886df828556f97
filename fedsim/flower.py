"""Run a Flower app with `flwr run` and learn what really became of it.

`flwr run` exits with 0 though the run failed, leaves a daemon behind, and takes the client's code from
wherever that daemon was started. Here each run has its own SuperLink in an empty folder, which ends with it.
For POSIX systems.
"""

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from fedsim.processes import ProcessGroup, find_command, free_port

ConfigValue = bool | float | int | str

CONNECTION = "fedsim"
START_SECONDS = 60.0

# All that Flower takes into an app bundle.
APP_SUFFIXES = {".py", ".toml", ".md", ".yaml", ".yml", ".json", ".jsonl"}
STATUS_SECONDS = 0.5

# How long a SuperLink may not answer before its run is given up.
SILENT_SECONDS = 10.0

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class FlowerOutcome:
    """What became of a run.

    Parameters
    ----------
    run_id
        Flower's id of the run.
    status
        "finished:completed", "finished:failed" or "finished:stopped". A run in which clients raised is
        completed all the same: only its ServerApp can tell.
    details
        Flower's reason for the status, or "".
    seconds
        Wall time from the start of the SuperLink, or from the submission where none was started, to the
        end of the run.
    """

    run_id: str
    status: str
    details: str
    seconds: float

    @property
    def completed(self) -> bool:
        """Whether the ServerApp came to its end."""
        return self.status == "finished:completed"


def run_flower(
    app_dir: Path,
    run_config: Mapping[str, ConfigValue],
    num_supernodes: int,
    federation: str | None = None,
    on_line: Callable[[str], None] = print,
    timeout: float | None = None,
    gpus_per_supernode: float = 0.0,
    home: Path | None = None,
) -> FlowerOutcome:
    """Submit a Flower app, follow its log, and wait until it is finished.

    An exception on the way, such as `KeyboardInterrupt`, stops the run and is raised again. A SuperLink
    that does not start, or that refuses the run, is a `RuntimeError` with its reason.

    Parameters
    ----------
    app_dir
        Folder with the app's pyproject.toml.
    run_config
        Values for keys of `[tool.flwr.app.config]`; Flower refuses other keys.
    num_supernodes
        Number of simulated SuperNodes, at least 1; not used with `federation`.
    federation
        Name of a connection in the user's Flower configuration, to run on that deployment; None to
        simulate on this machine.
    on_line
        Called with every line of the log, without colours.
    timeout
        Seconds after which the run is stopped; None for no limit.
    gpus_per_supernode
        Share of a GPU for each simulated client process, at least 0.
    home
        Folder of the Flower configuration that knows `federation`; None for the user's own.

    Returns
    -------
    FlowerOutcome
        The run's status as the SuperLink knows it.

    Raises
    ------
    ValueError
        If `num_supernodes` or `gpus_per_supernode` is out of range, if `app_dir` is not a Flower app, or
        if the app has no such key in its configuration.
    """
    if num_supernodes < 1:
        raise ValueError(f"run_flower: num_supernodes = {num_supernodes} must be at least 1")
    if gpus_per_supernode < 0:
        raise ValueError(f"run_flower: gpus_per_supernode = {gpus_per_supernode} must be at least 0")
    _check_keys(app_dir / "pyproject.toml", run_config)
    start = time.monotonic()
    deadline = None if timeout is None else start + timeout
    with tempfile.TemporaryDirectory(prefix="fedsim-", ignore_cleanup_errors=True) as folder:
        here = Path(folder)
        # Ray puts the working directory before the app on sys.path: it must hold no code.
        (here / "work").mkdir()
        config = here / "run-config.toml"
        config.write_text(tomli_w.dumps(dict(run_config)), encoding="utf-8")
        _stage(app_dir.resolve(), here / "app")
        arguments = ["run", str(here / "app"), federation or CONNECTION, "--run-config", str(config)]
        if federation is not None:
            env = flower_environment() if home is None else flower_environment() | known_connection(home)
            outcome = _follow(FlowerCli(env, here / "work", federation), arguments, on_line, deadline)
        else:
            processes = min(num_supernodes, os.cpu_count() or 1)
            simulation = {
                "num-supernodes": num_supernodes,
                "client-resources-num-cpus": 1,
                "client-resources-num-gpus": float(gpus_per_supernode),
                "init-args-num-cpus": processes,
            }
            arguments += [
                "--federation-config",
                " ".join(f"{key}={value}" for key, value in simulation.items()),
            ]
            with simulation_link(here) as env:
                outcome = _follow(FlowerCli(env, here / "work", CONNECTION), arguments, on_line, deadline)
    run_id, status, details = outcome
    return FlowerOutcome(run_id, status, details, time.monotonic() - start)


def _check_keys(pyproject: Path, run_config: Mapping[str, ConfigValue]) -> None:
    # Flower refuses an unknown key too, but does not say which.
    try:
        known = tomllib.loads(pyproject.read_text(encoding="utf-8"))["tool"]["flwr"]["app"].get("config", {})
    except (FileNotFoundError, KeyError):
        raise ValueError(f"run_flower: {pyproject} must have a section [tool.flwr.app]") from None
    for key in run_config:
        values = known
        for part in key.split("."):
            if not isinstance(values, dict) or part not in values:
                raise ValueError(
                    f"run_flower: key {key!r} must be one of [tool.flwr.app.config] in {pyproject}"
                )
            values = values[part]


def _stage(app_dir: Path, target: Path) -> None:
    # Flower looks at every file of the folder, which takes seconds where it holds a virtual environment.
    for folder, names, files in os.walk(app_dir):
        names[:] = [
            name
            for name in names
            if not name.startswith(".")
            and name != "__pycache__"
            and not Path(folder, name, "pyvenv.cfg").exists()
        ]
        for name in files:
            source = Path(folder, name)
            if (
                source.suffix in APP_SUFFIXES or name in (".gitignore", "LICENSE")
            ) and not source.is_symlink():
                copy = target / source.relative_to(app_dir)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, copy)


def flower_environment() -> dict[str, str]:
    """Environment in which Flower's commands neither phone home nor install packages.

    Returns
    -------
    dict[str, str]
        This process's environment with Flower's switches set and this Python's commands first on PATH.
    """
    return os.environ | {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }


def write_connection(
    home: Path, name: str, address: str, root_certificates: Path | None = None
) -> dict[str, str]:
    """Write a Flower configuration that knows one connection.

    Parameters
    ----------
    home
        Folder for Flower's configuration and installed apps; made if it is not there.
    name
        Name of the connection, which is also the default.
    address
        The SuperLink, as "host:port".
    root_certificates
        Certificate of the authority that signed the SuperLink's; None for no encryption.

    Returns
    -------
    dict[str, str]
        What to add to the environment of Flower's commands, so that they use it without a proxy.
    """
    home.mkdir(mode=0o700, exist_ok=True)
    secured = (
        {"insecure": True} if root_certificates is None else {"root-certificates": str(root_certificates)}
    )
    config = {"superlink": {"default": name, name: {"address": address, **secured}}}
    (home / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
    return known_connection(home)


def known_connection(home: Path) -> dict[str, str]:
    """Return what makes Flower's commands use a configuration of `write_connection`, without a proxy.

    Parameters
    ----------
    home
        The folder.

    Returns
    -------
    dict[str, str]
        What to add to their environment.
    """
    links = tomllib.loads((home / "config.toml").read_text(encoding="utf-8"))["superlink"]
    host = links[links["default"]]["address"].rsplit(":", 1)[0].strip("[]")
    direct = ",".join(filter(None, [os.environ.get("NO_PROXY"), host]))
    return {"FLWR_HOME": str(home), "NO_PROXY": direct, "no_proxy": direct}


@contextmanager
def simulation_link(folder: Path) -> Iterator[dict[str, str]]:
    """Hold a SuperLink for simulations on this machine, and end it with all it has started.

    A SuperLink that does not start is a `RuntimeError`.

    Parameters
    ----------
    folder
        An empty folder for its configuration, log and apps.

    Yields
    ------
    dict[str, str]
        The environment in which Flower's commands know it as the connection "fedsim".
    """
    work = folder / "work"
    work.mkdir(exist_ok=True)
    address = f"127.0.0.1:{free_port()}"
    env = flower_environment() | write_connection(folder / "home", CONNECTION, address)
    group = ProcessGroup(env, work, folder / "superlink.log")
    try:
        start_link(group, address, "--simulation")
        yield env
    finally:
        group.end()


def start_link(group: ProcessGroup, address: str, *options: str) -> None:
    """Start a SuperLink without encryption and the SuperExec that runs its apps, and wait for them.

    A SuperLink left to itself starts its SuperExec in a session of its own, and when it ends it leaves
    running simulations behind, with their Ray. Here all of them are in one process group.

    Parameters
    ----------
    group
        An empty group.
    address
        Where the SuperLink listens, as "host:port".
    options
        Further options of `flower-superlink`.

    Raises
    ------
    RuntimeError
        If it ends at once or does not answer within a minute.
    """
    host, port = address.rsplit(":", 1)
    link = group.start(
        "flower-superlink", "--insecure", "--host", host, "--port", port, "--isolation", "process", *options
    )
    group.start(
        "flower-superexec", "--insecure", "--runtime-api-address", address, "--parent-pid", str(os.getpid())
    )
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if link.poll() is not None:
            raise RuntimeError(f"the SuperLink ended with code {link.returncode}: {group.last_line()}")
        request = http.client.HTTPConnection(address, timeout=1.0)
        try:
            request.request("GET", "/health")
            if request.getresponse().status == http.HTTPStatus.OK:
                return
        except OSError:
            time.sleep(0.05)
        finally:
            request.close()
    raise RuntimeError(f"the SuperLink at {address} did not answer within {START_SECONDS:g} s")


@dataclass(frozen=True)
class FlowerCli:
    """Flower's command line in one environment, folder and connection."""

    env: dict[str, str]
    cwd: Path
    connection: str

    def start(self, arguments: list[str]) -> subprocess.Popen[str]:
        """Start ``flwr`` with such arguments; what it prints comes through a pipe."""
        return subprocess.Popen(
            [find_command("flwr"), *arguments],
            env=self.env,
            cwd=self.cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            process_group=0,
        )

    def ask(self, arguments: list[str]) -> dict[str, object]:
        """Return the answer of a command of ``flwr``; a `RuntimeError` says why there is none."""
        process = self.start([*arguments, "--format", "json"])
        try:
            output, _ = process.communicate()
        finally:
            process.kill()
            process.wait()
        answer = _json_in(output)
        if not answer.get("success"):
            lines = _COLOUR.sub("", str(answer.get("error-message") or output)).split("\n")
            told = ("Using SuperLink", "Displaying information")
            reason = " ".join(line.strip() for line in lines if not line.strip().startswith(told))
            raise RuntimeError(f"flwr {arguments[0]}: {reason.strip()}")
        return answer


def _json_in(output: str) -> dict[str, object]:
    begin = output.find("{")
    try:
        return json.loads(output[begin:]) if begin >= 0 else {}
    except json.JSONDecodeError:
        return {}


def _follow(
    cli: FlowerCli, arguments: list[str], on_line: Callable[[str], None], deadline: float | None
) -> tuple[str, str, str]:
    run_id = str(cli.ask(arguments)["run-id"])
    try:
        _stream_log(cli, run_id, on_line, deadline)
        heard = time.monotonic()
        while True:
            try:
                status, details = _status(cli, run_id)
            except RuntimeError:  # the SuperLink may be gone for a moment
                if time.monotonic() - heard >= SILENT_SECONDS:
                    raise
                time.sleep(STATUS_SECONDS)
                continue
            heard = time.monotonic()
            if status.startswith("finished"):
                return run_id, status, details
            if deadline is not None and time.monotonic() >= deadline:
                with suppress(RuntimeError):  # it may have finished just now
                    cli.ask(["stop", run_id, cli.connection])
                return run_id, _status(cli, run_id)[0], "the time was over"
            time.sleep(STATUS_SECONDS)
    except BaseException:
        with suppress(RuntimeError):
            cli.ask(["stop", run_id, cli.connection])
        raise


def _stream_log(cli: FlowerCli, run_id: str, on_line: Callable[[str], None], deadline: float | None) -> None:
    process = cli.start(["log", run_id, cli.connection, "--stream"])
    timer = None
    if deadline is not None:
        timer = threading.Timer(max(0.0, deadline - time.monotonic()), process.kill)
        timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            on_line(_COLOUR.sub("", line.rstrip("\n")))
    finally:
        if timer is not None:
            timer.cancel()
        process.kill()
        process.communicate()


def _status(cli: FlowerCli, run_id: str) -> tuple[str, str]:
    runs = cli.ask(["ls", cli.connection, "--run-id", run_id])["runs"]
    assert isinstance(runs, list)
    details = runs[0]["status-details"]
    return runs[0]["status"], "" if details == "N/A" else details
