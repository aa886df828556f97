"""Many runs in a few processes: each imports once, has its share of the cores, and goes when its parent goes."""

# Nothing that imports NumPy or torch may be imported here: a process must first set its number of threads.
from __future__ import annotations

import multiprocessing
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

END_SECONDS = 5.0
"""How long an interrupted process may take to write its checkpoint."""


class Outcome(NamedTuple):
    """How a cell ended.

    Attributes
    ----------
    error : str
        One line; empty if the run has ended well.
    warnings : list of str
        What was warned about on the way.
    seconds : float
        How long it took.
    """

    error: str
    warnings: list[str]
    seconds: float


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if "sched_getaffinity" in dir(os) else os.cpu_count() or 1


def run_all(
    experiments: Sequence[Mapping[str, Any]], jobs: int, report: Callable[[int, Outcome], None]
) -> list[Outcome]:
    """Run or resume experiments, each in its directory ``out``; one that fails does not stop the others.

    Parameters
    ----------
    experiments : sequence of mapping
        Keys and values of each.
    jobs : int
        Processes, >= 1; the cores are divided among them.
    report : callable
        Called with the number of an experiment when it has ended.

    Returns
    -------
    list of Outcome
        One an experiment.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, num_cores() // jobs)
    waiting, idle = deque(range(len(experiments))), deque[tuple[Connection, BaseProcess]]()
    busy: dict[Connection, tuple[BaseProcess, int]] = {}
    outcomes: dict[int, Outcome] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < jobs:
                if not idle:
                    pipe, theirs = context.Pipe()
                    process = context.Process(target=_serve, args=(theirs, threads), daemon=True)
                    process.start()
                    theirs.close()
                    idle.append((pipe, process))
                pipe, process = idle.popleft()
                number = waiting.popleft()
                busy[pipe] = process, number
                pipe.send(dict(experiments[number]))
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                process, number = busy.pop(pipe)
                try:
                    outcomes[number] = pipe.recv()
                    idle.append((pipe, process))
                except (EOFError, ConnectionError):
                    process.join()
                    outcomes[number] = Outcome(f"its process ended with code {process.exitcode}", [], 0.0)
                report(number, outcomes[number])
    finally:
        _end([(pipe, process) for pipe, (process, _) in busy.items()] + list(idle))
    return [outcomes[i] for i in range(len(experiments))]


def _end(helpers: list[tuple[Connection, BaseProcess]]) -> None:
    """Let processes go: idle ones at once, others when Ctrl-C has reached them too, or else by force."""
    for pipe, _ in helpers:
        pipe.close()
    deadline = time.monotonic() + END_SECONDS
    for _, process in helpers:
        process.join(max(0.0, deadline - time.monotonic()))
        process.terminate()
        process.join()


def _serve(pipe: Connection, threads: int) -> None:
    """Run one experiment after another until the other end of the pipe is closed."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    threading.Thread(target=_follow, daemon=True).start()
    try:
        import torch

        torch.set_num_threads(threads)
        while True:
            pipe.send(_run(pipe.recv()))
    except (EOFError, OSError, KeyboardInterrupt):
        pipe.close()


def _follow() -> None:
    """End this process with its parent, even one that was killed: two sweeps must not write to one directory."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(settings: dict[str, Any]) -> Outcome:
    from fedsim import runs
    from fedsim.experiment import BadInput, Experiment
    from fedsim.simulate import RunFailed

    began, error = time.perf_counter(), ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            experiment = Experiment.from_mapping(settings)
            if (Path(experiment.out) / "experiment.toml").exists():
                runs.resume(experiment.out, draw=False)
            else:
                runs.run(experiment, draw=False)
        except (BadInput, RunFailed) as known:
            error = str(known)
        except Exception as unknown:  # whatever it is, the other cells go on
            error = " ".join(f"{type(unknown).__name__}: {unknown}".split())
    return Outcome(error, [str(w.message) for w in caught], time.perf_counter() - began)
