"""The run directory: history, checkpoints, resume, and the `Run` that a user holds."""

from __future__ import annotations

import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedsim import history, text_sample, tree, workers
from fedsim.carriers import Carrier, InProcess
from fedsim.checkpoints import (
    Checkpoint,
    read_checkpoint,
    read_model,
    replace_file,
    write_checkpoint,
    write_model,
    writing,
)
from fedsim.experiment import BadInput, Experiment
from fedsim.federation import Federation
from fedsim.federation import load as load_federation
from fedsim.probes import Snapshot
from fedsim.simulate import rounds, start
from fedsim.tree import Tree

if TYPE_CHECKING:
    import pandas as pd  # takes long to import, and only finished runs need it

CHECKPOINT_SHARE = 0.05
"""Largest share of the wall time that checkpoints take; a round that is slower has one of its own."""

Progress = Callable[[Snapshot, Experiment], None]


@dataclass(frozen=True)
class Run:
    """A finished run, or what there is of it.

    Attributes
    ----------
    experiment : Experiment
        The resolved experiment.
    path : Path
        Run directory.
    history : pandas.DataFrame
        A row a round.
    model : Tree
        Final parameters.
    summary : dict
        Final figures, versions, device, seconds a round.
    """

    experiment: Experiment
    path: Path
    history: pd.DataFrame
    model: Tree
    summary: dict[str, Any]


def run(
    experiment: Experiment,
    *,
    federation: Federation | None = None,
    carrier: Carrier | None = None,
    progress: Progress | None = None,
    draw: bool = True,
) -> Run:
    """Run an experiment in a new run directory.

    Parameters
    ----------
    experiment : Experiment
        The run; ``out`` is its directory, ``runs/<time>`` if empty.
    federation : Federation or None
        Data and model, loaded if None.
    carrier : Carrier or None
        Where the workers live; this process if None.
    progress : callable or None
        Called after every round with the snapshot and the experiment.
    draw : bool
        Whether to draw figures at the end.

    Returns
    -------
    Run
        History, model and summary.

    Raises
    ------
    BadInput
        If the directory holds a run already or another process is running it.
    RunFailed
        If the run cannot go on; what was written stays.

    Examples
    --------
    >>> import tempfile, fedsim
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     e = fedsim.Experiment(num_workers=10, rounds=2, out=f"{folder}/run")
    ...     len(fedsim.run(e).history)
    2
    """
    path = Path(experiment.out or new_directory())
    check_new(path)
    experiment = experiment.replace({"out": str(path)})
    federation = load_federation(experiment) if federation is None else federation
    carrier = InProcess(experiment, federation) if carrier is None else carrier
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        _describe(path, experiment)
        found = _beginning(experiment, federation, carrier)
        return _go_on(experiment, path, federation, carrier, found, progress, draw)


def resume(
    path: str | Path,
    *,
    changes: Mapping[str, Any] | None = None,
    carrier: Callable[[Experiment, Federation], Carrier] | None = None,
    progress: Progress | None = None,
    draw: bool = True,
) -> Run:
    """Continue a run from its last checkpoint, as if it had not been interrupted.

    Parameters
    ----------
    path : str or Path
        Run directory.
    changes : mapping or None
        Keys to change, only those that leave the finished rounds as they are (``rounds``, ``device``, ...).
    carrier : callable or None
        Makes the carrier; this process if None.
    progress : callable or None
        Called after every round.
    draw : bool
        Whether to draw figures at the end.

    Returns
    -------
    Run
        The whole run.

    Raises
    ------
    BadInput
        If there is no run, another process is running it, or the checkpoint is of another experiment; the differing
        keys are listed.
    """
    path = Path(path)
    experiment = read_experiment(path).replace({**dict(changes or {}), "out": str(path)})
    federation = load_federation(experiment)
    device = next(iter(federation.theta.values())).device
    with _alone(path):
        found = read_checkpoint(path, experiment, device)
        host = (carrier or InProcess)(experiment, federation)
        if found is None:
            found = _beginning(experiment, federation, host)
        else:
            host.restore(found.workers)
            if experiment.plan == "auto":
                host.use_plan(found.plan)
        _describe(path, experiment)
        history.cut(path, found.position.round)
        return _go_on(experiment, path, federation, host, found, progress, draw)


def load(path: str | Path) -> Run:
    """Read a run directory.

    Parameters
    ----------
    path : str or Path
        Run directory.

    Returns
    -------
    Run
        What there is; ``model`` is empty and ``summary`` is empty for a run that has not ended.

    Raises
    ------
    BadInput
        If it is not a run directory.
    """
    path = Path(path)
    experiment, summary = read_experiment(path), path / "summary.json"
    return Run(
        experiment,
        path,
        _frame(history.read(path)),
        read_model(path),
        json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {},
    )


def read_experiment(path: Path) -> Experiment:
    """Read the experiment of a run directory; its ``out`` is that directory.

    Parameters
    ----------
    path : Path
        Run directory.

    Returns
    -------
    Experiment
        The resolved experiment.

    Raises
    ------
    BadInput
        If it is not a run directory.
    """
    if not (path / "experiment.toml").exists():
        raise BadInput(f"{path}: is not a run directory (no experiment.toml)")
    return Experiment.from_toml(path / "experiment.toml", {"out": str(path)})


def new_directory(folder: str = "runs") -> Path:
    """Name the directory of a run that has none: ``runs/<time>``, with a number if that one exists."""
    name = f"{folder}/{datetime.now():%Y-%m-%d-%H%M%S}"
    names = (Path(f"{name}-{i}" if i else name) for i in itertools.count())
    return next(path for path in names if not path.exists())


def check_new(path: Path) -> None:
    """Refuse a directory that holds a run already.

    Parameters
    ----------
    path : Path
        Where a new run is to be written.

    Raises
    ------
    BadInput
        If there is a history.
    """
    if (path / history.FILE).exists():
        raise BadInput(
            f"out = {str(path)!r}: holds a run already; take another directory, or 'fedsim resume {path}'"
        )


def figures(snapshot: Snapshot) -> str:
    """Say the main figures of a round."""
    shown = {
        "loss": snapshot.metrics["train_loss"],
        "test loss": snapshot.metrics.get("test_loss"),
        "test accuracy": snapshot.metrics.get("test_accuracy"),
    }
    known = {k: v for k, v in shown.items() if isinstance(v, float)}
    return "  ".join(f"{k} {v:.4f}" if abs(v) < 1e4 else f"{k} {v:.4g}" for k, v in known.items())


def trouble(snapshot: Snapshot) -> list[str]:
    """Say which workers and nodes were left out of a round, and why."""
    said = [f"round {snapshot.round}: {name}: {why}" for name, why in snapshot.failures.items()]
    if snapshot.excluded:
        workers = ", ".join(map(str, snapshot.excluded[:10])) + (
            ", ..." if len(snapshot.excluded) > 10 else ""
        )
        said.append(f"round {snapshot.round}: not finite, left out: workers {workers}")
    lost = snapshot.metrics.get("lost")
    if isinstance(lost, list):
        said.append(f"round {snapshot.round}: {len(lost)} workers had lost their rows and began again")
    return said


def line(snapshot: Snapshot, experiment: Experiment) -> str:
    """Say one round in plain text, with a line for each thing that went wrong."""
    width = len(str(experiment.rounds))
    return "\n".join([
        *trouble(snapshot),
        f"round {snapshot.round:>{width}}/{experiment.rounds}  {figures(snapshot)}",
    ])


def _frame(lines: list[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(lines)


def _beginning(experiment: Experiment, federation: Federation, carrier: Carrier) -> Checkpoint:
    return Checkpoint(start(experiment, federation), federation.theta, {}, carrier.plan)


def _resolve(experiment: Experiment, federation: Federation, carrier: Carrier) -> Experiment:
    """Write down what ``auto`` has become, so that running the experiment again gives the same run."""
    device = next(iter(federation.theta.values())).device
    return experiment.replace({"plan": carrier.plan, "device": str(device)})


def _describe(path: Path, experiment: Experiment) -> None:
    """Write the experiment without its directory, so that running the file again makes a new one."""
    with writing(path):
        (path / "checkpoint").mkdir(parents=True, exist_ok=True)
        replace_file(path / "experiment.toml", experiment.replace({"out": ""}).to_toml().encode())


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep a run directory for this process: a server whose link was lost may still be writing to it."""
    if os.name != "posix":
        yield
        return
    import fcntl  # absent on Windows

    folder = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{path}: another process is running it; wait for it or end it") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(folder)


def _go_on(
    experiment: Experiment,
    path: Path,
    federation: Federation,
    carrier: Carrier,
    found: Checkpoint,
    progress: Progress | None,
    draw: bool,
) -> Run:
    earlier = history.read(path)
    wall = earlier[-1]["wall_time"] if earlier else 0.0
    known = workers.describe(federation) if carrier.knows_data else {}
    workers.write(path, known)
    began, due, model = time.perf_counter(), 0.0, found.model
    unsaved: Checkpoint | None = None
    with writing(path):
        file = (path / history.FILE).open("ab", buffering=0)
    with file:
        try:
            for snapshot, position in rounds(experiment, federation, carrier, found.position):
                now = time.perf_counter()
                if experiment.plan == "auto" != carrier.plan:
                    experiment = _resolve(experiment, federation, carrier)
                    _describe(path, experiment)
                line = snapshot.metrics | {"wall_time": round(wall + now - began, 6)}
                with writing(path):
                    history.append(file, line)
                model = snapshot.model
                # What workers keep is taken now: an interruption may come when they are a round ahead.
                unsaved = Checkpoint(position, model, carrier.checkpoint(), carrier.plan)
                if now >= due:
                    with writing(path):
                        os.fsync(file.fileno())
                    write_checkpoint(path, experiment, unsaved)
                    unsaved, end = None, time.perf_counter()
                    due = end + (end - now) / CHECKPOINT_SHARE
                if progress is not None:
                    progress(snapshot, experiment)
        finally:
            if unsaved is not None:
                write_checkpoint(path, experiment, unsaved)
    write_model(path, model)
    text_sample.write(path, federation, model, experiment.seed)
    if experiment.holdout > 0:
        known |= workers.evaluate(carrier, model, experiment.num_workers)
        workers.write(path, known)
    lines = history.read(path)
    summary = _summary(experiment, federation, carrier, lines)
    with writing(path):
        replace_file(path / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    done = Run(experiment, path, _frame(lines), model, summary)
    if draw:
        from fedsim import plots  # takes long to import, and the run is safe by now

        with writing(path):
            plots.save_all(done.history, known, path / "figures")
    return done


def _summary(
    experiment: Experiment, federation: Federation, carrier: Carrier, lines: list[dict[str, Any]]
) -> dict[str, Any]:
    last: dict[str, Any] = {}
    for line in lines:
        last |= {k: v for k, v in line.items() if k not in {"round", "excluded", "failures", "lost"}}
    device = next(iter(federation.theta.values())).device
    gpu = {}
    if device.type == "cuda":
        gpu = {"peak_gpu_memory_mb": round(torch.cuda.max_memory_allocated(device) / 1e6, 1)}
    return {
        "rounds": experiment.rounds,
        **({"label": experiment.label} if experiment.label else {}),
        **last,
        "excluded": sum(len(line.get("excluded", [])) for line in lines),
        "failures": sum(len(line.get("failures", {})) for line in lines),
        "parameters": tree.num_parameters(federation.theta),
        "seconds_per_round": _seconds_per_round([line["wall_time"] for line in lines]),
        "peak_memory_mb": peak_memory_mb(),
        **gpu,
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "plan": carrier.plan,
        "threads": torch.get_num_threads(),
        "versions": {
            "fedsim": version("fedsim"),
            "flwr": version("flwr"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _seconds_per_round(wall_times: list[float]) -> float:
    """Leave out the first round, which chooses a plan and warms up, where there are others."""
    first, last = wall_times[0], wall_times[-1]
    return (last - first) / (len(wall_times) - 1) if len(wall_times) > 1 else last


def peak_memory_mb() -> float:
    """Return the largest resident memory of this process so far, in MB of a million bytes."""
    if sys.platform == "win32":
        import psutil

        return round(psutil.Process().memory_info().peak_wset / 1e6, 1)
    if sys.platform == "linux":  # ru_maxrss would begin at the size of the parent process
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return round(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6, 1)
    import resource  # absent on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)
