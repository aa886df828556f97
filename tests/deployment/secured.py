"""A federation as users start it, with TLS and registered keys, and a run on it that a test can watch and disturb."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from fedsim import deployment
from fedsim.processes import find_command

NUM_NODES = 3

PATIENCE = 240.0
"""Seconds after which what a test waits for is taken not to come."""

TINY = {
    "data": "Synthetic(rows=150, features=4, classes=3)",
    "partition": "Dirichlet(alpha=0.5)",
    "model": "MLP(hidden=(3,))",
    "num-workers": 6,
    "local-steps": 2,
    "batch-size": 4,
    "dtype": "float64",
    "device": "cpu",
    "min-nodes": 1,
}


def wait(what: str, done: Callable[[], Any]) -> Any:
    """Wait until something is true, and return it."""
    deadline = time.monotonic() + PATIENCE
    while not (found := done()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE:g} s for {what}")
        time.sleep(0.05)
    return found


class Secured:
    """Three SuperNodes and a SuperLink, by ``fedsim federation``.

    Parameters
    ----------
    folder
        A new folder.

    Attributes
    ----------
    round_timeout
        Seconds for a round: at least twice what one takes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.round_timeout = 15.0

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run ``fedsim federation`` on the folder."""
        return subprocess.run(self._call(*arguments), capture_output=True, text=True, check=False)

    def begin(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start ``fedsim federation`` on the folder, and do not wait for it."""
        return subprocess.Popen(self._call(*arguments), stdout=subprocess.DEVNULL)

    def _call(self, name: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "fedsim.cli", "federation", name, str(self.folder), *arguments]

    def begin_up(self) -> None:
        """Start all of it for the first time, and learn how busy this machine is."""
        began = time.monotonic()
        done = self.command("up", "--nodes", str(NUM_NODES))
        assert done.returncode == 0, done.stderr
        # Longer than 25 s, and Flower would miss the heartbeat of a node that hangs before a round is over.
        self.round_timeout = min(25.0, max(self.round_timeout, float(round(time.monotonic() - began))))

    def up(self) -> str:
        done = self.command("up")
        assert done.returncode == 0, done.stderr
        return done.stdout

    def processes(self, name: str) -> list[psutil.Process]:
        return deployment.processes(self.folder, name)

    def kill(self, name: str) -> None:
        """Kill a part with all that it has started, as a power failure would."""
        found = self.processes(name)
        assert len(found) >= 2
        for process in found:
            process.kill()
        psutil.wait_procs(found, timeout=10)

    def signal(self, name: str, number: signal.Signals) -> None:
        for process in self.processes(name):
            process.send_signal(number)

    def app(self, part: str, program: str) -> psutil.Process:
        """Wait for a process of Flower's that runs an app, and return it."""

        def find() -> psutil.Process | None:
            for process in self.processes(part):
                try:
                    if any(Path(word).name == program for word in process.cmdline()[:2]):
                        return process
                except psutil.Error:
                    continue
            return None

        return wait(f"{program} of {part}", find)

    def environment(self) -> dict[str, str]:
        return os.environ | {"FLWR_HOME": str(self.folder / "flower")}

    def nodes(self) -> dict[str, str]:
        """Status of the SuperNodes by their ids."""
        command = [find_command("flwr"), "supernode", "list", "fedsim", "--format", "json"]
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, check=True)
        return {node["node-id"]: node["status"] for node in json.loads(done.stdout)["nodes"]}


class Running:
    """An experiment on a federation, by ``fedsim flower`` in a process of its own.

    Parameters
    ----------
    federation
        Where.
    folder
        For the experiment, the run directory and the log of the command.
    settings
        Keys besides those of `TINY`.
    """

    def __init__(self, federation: Secured, folder: Path, **settings: Any) -> None:
        self.federation = federation
        self.path, self.log = folder / "run", folder / "log"
        experiment = TINY | {key.replace("_", "-"): value for key, value in settings.items()}
        (folder / "e.toml").write_text(tomli_w.dumps(experiment))
        self.process = self._start(str(folder / "e.toml"), "--out", str(self.path))

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        call = [sys.executable, "-m", "fedsim.cli", "flower", *arguments]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*call, "--federation", str(self.federation.folder)], stdout=log, stderr=log
            )

    def resume(self) -> None:
        self.process = self._start("--resume", str(self.path))

    def history(self) -> list[dict[str, Any]]:
        file = self.path / "history.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wait_round(self, number: int) -> None:
        """Wait until a round is in the history."""

        def reached() -> bool:
            assert self.process.poll() is None or self.recorded() >= number, self.log.read_text()
            return self.recorded() >= number

        wait(f"round {number}", reached)

    def recorded(self) -> int:
        return max((line["round"] for line in self.history()), default=0)

    def wait_missing(self, node: str, missing: bool) -> int:
        """Wait for a round without a node, or with all nodes, and return its number."""
        before = self.recorded()

        def seen() -> int:
            assert self.process.poll() is None, self.log.read_text()
            later = [line for line in self.history() if line["round"] > before]
            return next((x["round"] for x in later if (node in x.get("failures", {})) == missing), 0)

        return wait(f"a round {'without' if missing else 'with'} {node}", seen)

    def end(self) -> int:
        """Wait for the command, and return its exit code."""
        return self.process.wait(PATIENCE)

    def stop(self) -> None:
        """End the command if a test has left it running."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def failures(self) -> dict[int, dict[str, str]]:
        """Who was missing when, and why."""
        return {line["round"]: line["failures"] for line in self.history() if "failures" in line}

    def missed(self, node: str) -> list[int]:
        return [number for number, names in self.failures().items() if node in names]

    def assert_whole(self, rounds: int) -> None:
        """Demand that no round is missing and none is there twice."""
        assert [line["round"] for line in self.history()] == list(range(1, rounds + 1)), self.log.read_text()
        assert (self.path / "summary.json").exists()
