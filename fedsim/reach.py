"""Find a node's resident, or start it, and ask it: what a ClientApp's process does, without PyTorch.

The *resident* (`fedsim.resident`) is a process of the node's user that keeps cohorts alive between messages. It lives in
a folder of its own that only this user may enter:

=====================  ==================================================================================
``lock``               held by the resident as long as it lives; touched with every request
``socket``             where it listens; a named pipe on Windows
``log``                what it prints
``run-*.safetensors``  what workers keep between the rounds of a run, written before the round is answered
=====================  ==================================================================================
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

from fedsim import frames
from fedsim.source import code_hash

WINDOWS = sys.platform == "win32"
START_SECONDS = 60.0
POLL_SECONDS = 0.02
AGAIN_SECONDS = 0.3
WEEK = 7 * 24 * 3600.0
"""After so long without a request, what a node's workers kept is removed."""
MAX_GREETING = 2**16
LONGEST_ADDRESS = 100
"""Bytes; systems allow 104 to 108."""
COMMAND = ("-P", "-m", "fedsim.resident")
"""How Python starts a resident; without the working directory among the places of modules."""


class NoResident(Exception):
    """There is none, and none can be started; the message says why. No request has been sent."""


class Ended(Exception):
    """The resident ended while it worked on a request; the message is one line."""


class Raised(Exception):
    """The request raised an exception in the resident.

    Parameters
    ----------
    kind, text : str
        The exception's class and message.
    trace : str
        Its traceback.
    """

    def __init__(self, kind: str, text: str, trace: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind, self.text, self.trace = kind, text, trace


def home(node_id: int, base: Path | None = None) -> Path:
    """Make the folder of a node, which only its user may enter.

    Parameters
    ----------
    node_id : int
        Flower's id of the node.
    base : Path or None
        Folder of all nodes of this user; a folder named after the user where temporary files lie if None.

    Returns
    -------
    Path
        Of this node, this Python and this source: whoever installs another version meets another resident.

    Raises
    ------
    NoResident
        If it cannot be made, or is open to others, or is another user's.
    """
    name = f"fedsim-{'user' if WINDOWS else os.getuid()}"
    base = Path(tempfile.gettempdir()) / name if base is None else base
    key = hashlib.sha256(json.dumps([node_id, code_hash(), sys.executable]).encode()).hexdigest()[:16]
    for folder in (base, base / key):
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            about = folder.lstat()
        except OSError as error:
            raise NoResident(f"{folder}: cannot be made: {error.strerror}") from None
        if not stat.S_ISDIR(about.st_mode):
            raise NoResident(f"{folder}: is not a folder")
        if not WINDOWS and (about.st_uid != os.getuid() or about.st_mode & 0o077):
            mode = stat.filemode(about.st_mode)
            raise NoResident(f"{folder}: must be this user's alone, is {mode} of user {about.st_uid}")
    return base / key


def kept_file(folder: Path, run_id: int) -> Path:
    """Name the file of what workers keep between the rounds of a run."""
    return folder / f"run-{run_id}.safetensors"


def sweep(base: Path) -> None:
    """Remove what nobody has asked for in a week: files of runs, and folders of nodes."""
    longest = time.time() - WEEK
    for folder in base.iterdir():
        try:
            for file in folder.glob("run-*.safetensors"):
                if file.stat().st_mtime < longest:
                    file.unlink()
            if max(x.stat().st_mtime for x in (folder, *folder.iterdir())) < longest:
                shutil.rmtree(folder)
        except OSError:
            continue  # somebody else's, or just gone


def address(folder: Path) -> str:
    """Where the resident of a folder listens."""
    return rf"\\.\pipe\fedsim-{folder.name}" if WINDOWS else str(folder / "socket")


def same_user(connection: Connection) -> bool:
    """Whether the other end belongs to this user; where the system does not tell, the folder's permissions must do."""
    if sys.platform != "linux":
        return True
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        whole = struct.calcsize("3i")
        _, user, _ = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, whole))
    return user == os.getuid()


def watched() -> list[int]:
    """Name the processes with which the resident shall end: Flower's, from which this one descends."""
    import psutil

    found = []
    for process in psutil.Process().parents():
        try:
            command = process.cmdline()[:3]
        except psutil.Error:
            continue
        if any(Path(word).stem in {"flower-superexec", "flower-supernode"} for word in command):
            found.append(process.pid)
    return found


@dataclass(frozen=True)
class Resident:
    """A node's resident, as its clients see it.

    Parameters
    ----------
    folder : Path
        See `home`.
    idle : float
        Seconds without a request after which one that is started now ends, > 0.
    command : tuple of str
        How Python starts it.
    """

    folder: Path
    idle: float
    command: tuple[str, ...] = COMMAND

    def wake(self) -> None:
        """Start a resident unless one listens, and do not wait for it."""
        connection = self._call()
        if connection is None:
            self.start()
        else:
            connection.close()

    def start(self) -> subprocess.Popen[bytes]:
        """Start a resident, without waiting for it; where one lives, the new one ends at once.

        Returns
        -------
        subprocess.Popen
            In the process group of the node, so that it gets the node's signals.

        Raises
        ------
        NoResident
            If the operating system does not let it start.
        """
        sweep(self.folder.parent)
        arguments = [str(self.folder), "--code", code_hash(), "--idle", str(self.idle)]
        arguments += [x for pid in watched() for x in ("--watch", str(pid))]
        # Modules come from where this process has its own, which Flower may have put an app's folder among.
        env = os.environ | {"PYTHONPATH": os.pathsep.join(place for place in sys.path if place)}
        try:
            with (self.folder / "log").open("ab") as log:
                return subprocess.Popen(
                    [sys.executable, *self.command, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=env,
                )
        except OSError as error:
            raise NoResident(f"it cannot be started: {error}") from None

    def ask(self, header: dict[str, Any], tensors: bytes) -> tuple[dict[str, Any], bytes]:
        """Send a request to the resident, started if there is none, and wait for its answer.

        Parameters
        ----------
        header, tensors
            A frame.

        Returns
        -------
        tuple of dict and bytes
            The answer, a frame.

        Raises
        ------
        NoResident
            If there is none to be had; nothing was sent.
        Ended
            If it ended before it answered. The request is not sent again: workers may have made their steps.
        Raised
            If the request raised an exception there.
        """
        with self._meet() as connection:
            try:
                frames.send(connection, header, tensors)
                answer, tensors = frames.receive(connection)
            except (OSError, EOFError, frames.BadFrame) as error:
                raise Ended(
                    f"this node's resident process ended while it worked; the next message starts another. {error} "
                    f"Its last words: {self.last_words()}"
                ) from None
        if "error" in answer:
            wrong = answer["error"]
            raise Raised(str(wrong["kind"]), str(wrong["text"]), str(wrong["trace"]))
        return answer, tensors

    def last_words(self) -> str:
        """Last line of its log."""
        try:
            lines = (self.folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1][:200] if lines else "none"

    def _meet(self) -> Connection:
        """Connect and be greeted, which ends the resident's being idle."""
        connection = self._connect()
        if connection is not None:
            return connection
        process = self.start()
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            connection = self._connect()
            if connection is not None:
                return connection
            ended = process.poll()
            if ended == 0:  # another held the lock; it greets soon, or has gone
                time.sleep(AGAIN_SECONDS)
                process = self.start()
            elif ended is not None:
                break
            time.sleep(POLL_SECONDS)
        raise NoResident(f"it does not start; its last words: {self.last_words()}")

    def _call(self) -> Connection | None:
        """Connect; None where nobody listens."""
        if not WINDOWS and len(os.fsencode(address(self.folder))) > LONGEST_ADDRESS:
            raise NoResident(
                f"{address(self.folder)} is too long for a socket; set TMPDIR to a shorter folder"
            )
        try:
            return Client(address(self.folder), "AF_PIPE" if WINDOWS else "AF_UNIX")
        except OSError:
            return None

    def _connect(self) -> Connection | None:
        """Connect and wait to be greeted; None where nobody listens, or who did has just ended."""
        connection = self._call()
        if connection is None:
            return None
        try:
            if not same_user(connection):
                raise NoResident(f"{address(self.folder)} is another user's")
            greeting, _ = frames.receive(connection, MAX_GREETING, MAX_GREETING)
            if greeting.get("code") != code_hash():
                raise NoResident(f"it runs other code (hash {greeting.get('code')}, here {code_hash()})")
        except (OSError, EOFError, frames.BadFrame):
            connection.close()
            return None
        except NoResident:
            connection.close()
            raise
        return connection
