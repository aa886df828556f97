"""A real deployment on the loopback interface: one SuperLink and some SuperNodes."""

import json
import os
import subprocess
import time
from collections.abc import Set
from pathlib import Path

import psutil

from fedsim.flower import flower_environment, start_link, write_connection
from fedsim.processes import ProcessGroup, find_command, free_port

ONLINE_SECONDS = 60.0


class Federation:
    """A SuperLink and its SuperNodes, each with the processes it starts in a process group of its own.

    Parameters
    ----------
    folder
        An empty folder.
    num_nodes
        Number of SuperNodes.

    Attributes
    ----------
    home
        Folder with Flower's configuration, for FLWR_HOME.
    env
        Environment of Flower's commands.
    connection
        Name of the connection in that configuration.
    nodes
        The process groups of the SuperNodes.
    """

    connection = "loopback"

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.address = f"127.0.0.1:{free_port()}"
        self.env = flower_environment() | write_connection(self.home, self.connection, self.address)
        self.link = self._group("superlink")
        self.nodes = [self._group(f"supernode-{i}") for i in range(num_nodes)]

    def _group(self, name: str) -> ProcessGroup:
        # Each machine of a federation has its own folder for apps.
        work, home = self.folder / name, self.folder / f"{name}-home"
        work.mkdir()
        return ProcessGroup(self.env | {"FLWR_HOME": str(home)}, work, self.folder / f"{name}.log")

    def start(self) -> None:
        start_link(self.link, self.address)
        for i in range(len(self.nodes)):
            self.start_node(i)
        self.wait_online(len(self.nodes))

    def start_node(self, i: int) -> None:
        port = free_port()
        self.nodes[i].start(
            "flower-supernode",
            "--insecure",
            "--superlink",
            self.address,
            "--port",
            str(port),
            "--isolation",
            "process",
            "--node-config",
            f"partition-id={i} num-partitions={len(self.nodes)}",
        )
        self.nodes[i].start(
            "flower-superexec",
            "--insecure",
            "--runtime-api-address",
            f"127.0.0.1:{port}",
            "--parent-pid",
            str(os.getpid()),
        )

    def kill_node(self, i: int) -> None:
        """Kill a SuperNode and its ClientApp at once, as a power failure would."""
        self.nodes[i].kill()

    def online(self) -> set[str]:
        """Ids of the SuperNodes which the SuperLink takes for online."""
        command = [find_command("flwr"), "supernode", "list", self.connection, "--format", "json"]
        answer = subprocess.run(
            command, env=self.env, cwd=self.folder, capture_output=True, text=True, check=True
        )
        return {node["node-id"] for node in json.loads(answer.stdout)["nodes"] if node["status"] == "online"}

    def wait_online(self, expected: int, besides: Set[str] = frozenset()) -> None:
        """Wait until so many SuperNodes are online, not counting those whose ids are in `besides`."""
        deadline = time.monotonic() + ONLINE_SECONDS
        while (online := len(self.online() - besides)) < expected:
            if time.monotonic() > deadline:
                logs = "\n".join(node.last_line() for node in self.nodes)
                raise TimeoutError(f"{online} of {expected} SuperNodes are online:\n{logs}")

    def end(self) -> None:
        for group in (*self.nodes, self.link):
            group.end()

    def remaining(self) -> list[str]:
        """Names of the processes with a FLWR_HOME in this federation's folder, whoever started them."""
        return remaining(self.folder)


def remaining(folder: Path) -> list[str]:
    """Names of the processes with a FLWR_HOME in a folder."""
    names = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME", "").startswith(str(folder)):
                names.append(process.name())
        except psutil.Error:
            continue
    return names
