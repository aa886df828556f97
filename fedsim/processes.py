"""Processes of other programs, started together and ended together. For POSIX systems."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

GRACE_SECONDS = 3.0


class ProcessGroup:
    """Start processes in one process group of their own, and end them with all they have started.

    Ctrl-C in a terminal does not reach them. Signals do, also those whose parents are gone.

    Parameters
    ----------
    env
        Environment of the processes.
    cwd
        Their working directory.
    log
        File to which all of them write.
    """

    def __init__(self, env: dict[str, str], cwd: Path, log: Path) -> None:
        self.env = env
        self.cwd = cwd
        self.log = log
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start one more process of the group.

        Parameters
        ----------
        command
            Name of the program, then its arguments.

        Returns
        -------
        subprocess.Popen[bytes]
            The process, without pipes.
        """
        with self.log.open("ab") as output:
            process = subprocess.Popen(
                [find_command(command[0]), *command[1:]],
                env=self.env,
                cwd=self.cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=self._processes[0].pid if self._processes else 0,
            )
        self._processes.append(process)
        return process

    def last_line(self) -> str:
        """Last line of the log.

        Returns
        -------
        str
            The line, or "" if there is none.
        """
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def end(self) -> None:
        """Ask all processes to end, and kill those that are there after 3 s."""
        self._signal(signal.SIGTERM)
        self.kill()

    def kill(self) -> None:
        """Kill all processes at once, as a power failure would."""
        self._signal(signal.SIGKILL)
        for process in self._processes:
            process.wait()
        self._processes.clear()

    def _signal(self, number: int) -> None:
        deadline = time.monotonic() + GRACE_SECONDS
        try:
            while self._processes and time.monotonic() < deadline:
                # A group keeps its number, and no other process gets it, while one member is there.
                os.killpg(self._processes[0].pid, number)
                number = 0
                for process in self._processes:
                    process.poll()  # reap it, or it would count as a member
                time.sleep(0.02)
        except ProcessLookupError:
            for process in self._processes:
                process.wait()
            self._processes.clear()


def find_command(name: str) -> str:
    """Find a program that belongs to this Python, whether or not its environment is activated.

    Parameters
    ----------
    name
        For example "flwr".

    Returns
    -------
    str
        Its path beside this Python, or `name` if it is not there.
    """
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name


def free_port() -> int:
    """Find a TCP port of the loopback interface on which nobody listens.

    Returns
    -------
    int
        The port; another process could take it before it is used.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
