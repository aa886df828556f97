"""The resident: a process of a node's user that keeps cohorts alive between messages.

Flower starts a new process for every message. The first of them starts this one, ``python -m fedsim.resident FOLDER``,
and all of them hand it their messages (`fedsim.reach` has the other side). It ends

* with its node: when one of the processes that it was told to watch is gone;
* when nobody has asked it anything for so many seconds;
* when its lock is stale: its folder was removed, or another lock lies in it, so that nobody could reach it.

It answers one request at a time, in the order in which they come.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fedsim import frames
from fedsim.reach import WINDOWS, address, kept_file, same_user
from fedsim.source import code_hash

if TYPE_CHECKING:
    from fedsim.hosting import Host

WATCH_SECONDS = 0.5
COHORTS = 2
"""Runs whose cohorts are kept at a time; rows of others are read from their files again."""

Answer = Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]


class Lock:
    """A file that one process at a time can hold; the system frees it when that one ends.

    Parameters
    ----------
    path : Path
        The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[bytes] = path.open("ab")

    def take(self) -> bool:
        """Hold it from now on, unless somebody does; on Windows the named pipe is there only once."""
        if sys.platform == "win32":
            return True
        import fcntl

        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    @property
    def stale(self) -> bool:
        """Whether the file at its place is another one, or none."""
        try:
            return not os.path.samestat(self.path.stat(), os.fstat(self.file.fileno()))
        except OSError:
            return True

    def touch(self) -> None:
        """Say that somebody still wants this folder."""
        os.utime(self.file.fileno() if os.utime in os.supports_fd else self.path)


class Watch:
    """Decides when a resident ends.

    Parameters
    ----------
    lock : Lock
        That it holds.
    idle : float
        Seconds without a request after which it ends.
    pids : list of int
        Processes with which it ends.
    end : callable
        What ends it, given why.
    """

    def __init__(self, lock: Lock, idle: float, pids: list[int], end: Callable[[str], None]) -> None:
        import psutil

        self.lock, self.idle, self.end = lock, idle, end
        self.gone = psutil.NoSuchProcess, psutil.ZombieProcess
        self.processes = [psutil.Process(pid) for pid in pids]  # an exception ends a resident that is late
        self.busy = threading.Lock()
        self.last = time.monotonic()

    def __enter__(self) -> None:
        """Begin to work on a request: being idle does not end it meanwhile."""
        self.busy.acquire()

    def __exit__(self, *_: object) -> None:
        """End a request."""
        self.last = time.monotonic()
        self.busy.release()

    def reason(self) -> str | None:
        """Say why it must end at once, if it must."""
        if any(self._dead(process) for process in self.processes):
            return "its node has ended"
        if self.lock.stale:
            return "its lock is stale"
        return None

    def _dead(self, process: Any) -> bool:
        try:
            return not process.is_running() or process.status() == "zombie"
        except self.gone:
            return True

    def run(self) -> None:
        """Look twice a second, for ever."""
        while True:
            time.sleep(WATCH_SECONDS)
            why = self.reason()
            if why is not None:
                self.end(why)
                return
            if self.busy.acquire(blocking=False):  # and keep it: nobody is greeted any more
                if time.monotonic() - self.last >= self.idle:
                    self.end(f"nobody asked anything for {self.idle:g} s")
                    return
                self.busy.release()


def serve(listener: Listener, watch: Watch, answer: Answer) -> None:
    """Answer requests, one after the other, until the process ends.

    Parameters
    ----------
    listener : Listener
        Where clients connect.
    watch : Watch
        Is told of every request.
    answer : callable
        Takes a frame and returns one; what it raises goes to the client.
    """
    while True:
        with listener.accept() as connection, watch:
            if same_user(connection):
                watch.lock.touch()
                try:
                    frames.send(connection, {"code": code_hash(), "pid": os.getpid()})
                    _serve_one(connection, answer)
                except (EOFError, OSError):
                    continue  # the client is gone


def _serve_one(connection: Connection, answer: Answer) -> None:
    try:
        header, tensors = frames.receive(connection)
        reply = answer(header, tensors)
    except (EOFError, ConnectionError):
        raise
    except Exception as error:  # whatever a request raises is its client's to know
        trace = traceback.format_exc()
        print(trace, flush=True)
        wrong = {"kind": type(error).__name__, "text": str(error), "trace": trace}
        reply = {"error": wrong}, b""
    frames.send(connection, *reply)


class Cohorts:
    """Answers requests with the cohorts of the last runs.

    Parameters
    ----------
    folder : Path
        Where files of runs are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hosts: dict[tuple[int, int], Host] = {}

    def answer(self, header: dict[str, Any], tensors: bytes) -> tuple[dict[str, Any], bytes]:
        """Do what a message asks for.

        Parameters
        ----------
        header : dict
            ``kind`` of message, ``content`` (see `frames.pack`), ``run`` and ``node``, ``run-config`` and ``node-config``,
            and what is ``made`` so far.
        tensors : bytes
            The content's arrays.

        Returns
        -------
        tuple of dict and bytes
            ``content`` of the reply and what is ``made`` now, and its arrays.
        """
        from flwr.app import ConfigRecord, Context, RecordDict

        from fedsim import hosting

        run, state = int(header["run"]), RecordDict()
        if header["made"] is not None:
            state["made"] = ConfigRecord(header["made"])
        context = Context(run, header["node"], header["node-config"], state, header["run-config"])
        keeper = hosting.InFile(state, kept_file(self.folder, run))
        content = frames.unpack(header["content"], tensors)
        reply = hosting.answer(header["kind"], content, context, keeper, self.hosts)
        while len({run for run, _ in self.hosts}) > COHORTS:
            del self.hosts[next(iter(self.hosts))]
        described, arrays = frames.pack(reply)
        made = {**state.config_records["made"]} if "made" in state else None
        return {"content": described, "made": made}, arrays


def main() -> None:
    """Hold the lock, listen, import PyTorch, and serve; one that is there already is left alone."""
    parser = argparse.ArgumentParser(prog="python -m fedsim.resident", description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder that only this user may enter")
    parser.add_argument("--code", default=code_hash(), help="the source that must be found, as a hash")
    parser.add_argument(
        "--idle", type=float, default=600.0, help="seconds without a request after which it ends"
    )
    parser.add_argument("--watch", type=int, action="append", default=[], help="a process with which it ends")
    given = parser.parse_args()
    if given.code != code_hash():
        sys.exit(f"finds other code (hash {code_hash()}, not {given.code}) among {sys.path}")
    run(given.folder, given.idle, given.watch, partial(cohorts, given.folder))


def cohorts(folder: Path) -> Answer:
    """Import PyTorch, and return what answers the requests."""
    from fedsim import hosting  # noqa: F401

    return Cohorts(folder).answer


def run(folder: Path, idle: float, pids: list[int], load: Callable[[], Answer]) -> None:
    """Be the resident of a folder, unless there is one.

    Parameters
    ----------
    folder : Path
        See `fedsim.reach.home`.
    idle : float
        Seconds.
    pids : list of int
        Processes with which it ends.
    load : callable
        Returns what answers requests; clients wait meanwhile for the first greeting.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.umask(0o077)
    lock = Lock(folder / "lock")
    if not lock.take():
        return
    if (folder / "log").exists():
        os.truncate(folder / "log", 0)  # what the one before has said
    print(f"resident {os.getpid()} of {folder}", flush=True)
    where = Path(address(folder))
    if not WINDOWS:
        where.unlink(missing_ok=True)  # left by one that was killed

    def end(why: str) -> None:
        print(f"resident {os.getpid()} ends: {why}", flush=True)
        if not WINDOWS and not lock.stale:
            where.unlink(missing_ok=True)
        os._exit(0)  # whatever the other thread is doing

    with Listener(str(where), "AF_PIPE" if WINDOWS else "AF_UNIX", backlog=16) as listener:
        watch = Watch(lock, idle, pids, end)
        threading.Thread(target=watch.run, daemon=True).start()
        with watch:
            answer = load()
        serve(listener, watch, answer)


if __name__ == "__main__":
    main()
