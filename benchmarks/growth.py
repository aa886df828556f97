"""How costs grow with workers, parameters and rounds: ``python -m benchmarks.growth``.

Every point is a process of its own that calls `fedsim.run` with history, and tells its peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fedsim
from benchmarks import tables
from benchmarks.problem import milliseconds_a_round, peak_mb
from benchmarks.speed import ROOT, WIDTH, about, environment
from fedsim.federation import assemble
from fedsim.tree import num_parameters

SAME = {"client": "SGD(lr=0.1)", "strategy": "FedAvg()", "eval-every": 0}


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes
    ----------
    series : str
        ``workers``, ``parameters``, ``rounds`` or ``registered``.
    at : int
        Where on the series' axis.
    keys : dict
        The experiment.
    """

    series: str
    at: int
    keys: dict[str, Any]


def points(largest: float = float("inf")) -> Iterator[Point]:
    """Yield all points; those with more workers, parameters or rounds than ``largest`` are left out."""
    for workers in (10, 100, 1_000, 10_000):
        keys = {"data": f"Synthetic(rows={50 * workers}, features=64, test=0.0)", "partition": "IID()"}
        keys |= {"model": "Linear()", "local-steps": 5, "batch-size": 10, "replacement": True}
        keys |= {"num-workers": workers, "rounds": 100 if workers <= 1_000 else 30}
        yield from _unless(workers > largest, Point("workers", workers, keys))
    for parameters in (10**3, 10**4, 10**5, 10**6, 10**7):
        keys = {"data": "Synthetic(rows=800, features=64, test=0.0)", "partition": "IID()"}
        keys |= {"model": f"MLP(hidden=({parameters // 75},))", "local-steps": 5, "batch-size": 10}
        keys |= {
            "num-workers": 16,
            "rounds": 100 if parameters <= 10**5 else 20 if parameters <= 10**6 else 5,
        }
        yield from _unless(
            parameters > largest, Point("parameters", parameters, keys | {"replacement": True})
        )
    for rounds in (10**2, 10**3, 10**4, 10**5):
        keys = {"data": "Synthetic(rows=40, features=20, classes=2, test=0.0)", "partition": "IID()"}
        keys |= {"model": "Linear(bias=False)", "local-steps": 1, "batch-size": 0}
        yield from _unless(
            rounds > largest, Point("rounds", rounds, keys | {"num-workers": 4, "rounds": rounds})
        )
    registered = 10**6
    keys = {"data": f"Synthetic(rows={2 * registered}, test=0.0)", "partition": "Dirichlet(alpha=0.3)"}
    keys |= {"model": "Linear()", "local-steps": 5, "batch-size": 10, "replacement": True}
    keys |= {"num-workers": registered, "participation": 100 / registered, "rounds": 100}
    yield from _unless(registered > largest, Point("registered", registered, keys))


def _unless(left_out: bool, point: Point) -> Iterator[Point]:
    if not left_out:
        yield point


def measure(keys: dict[str, Any]) -> dict[str, Any]:
    """Run an experiment in this process and tell what it cost."""
    ends: list[float] = []

    def note(snapshot: Any, experiment: fedsim.Experiment) -> None:
        ends.append(time.monotonic())

    with tempfile.TemporaryDirectory(prefix="fedsim-") as folder:
        e = fedsim.Experiment.from_mapping(SAME | keys | {"out": f"{folder}/run"})
        start = time.monotonic()
        dataset = e.parts.data.load(e.seed, e.num_workers)
        loaded = time.monotonic()
        shards = e.parts.partition.assign(dataset, e.num_workers, e.seed)
        shared = time.monotonic()
        federation = assemble(e, dataset, shards)
        began = time.monotonic()
        fedsim.run(e, federation=federation, progress=note)
        finished = time.monotonic()
    return {
        "parameters": num_parameters(federation.theta),
        "participants": e.num_participants,
        "rounds": e.rounds,
        "load_s": loaded - start,
        "partition_s": shared - loaded,
        "ms": milliseconds_a_round(ends),
        "ms_with_start_and_end": 1000 * (finished - began) / e.rounds,
        "peak_mb": peak_mb(),
    }


def main() -> None:
    """Measure, print, save; or one point, if the experiment comes as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1 ...")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--repeats", type=int, default=3, help="of points that take less than half a minute")
    parser.add_argument(
        "--largest", type=float, default=float("inf"), help="skip points beyond, for a quick look"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--point", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point:
        torch.set_num_threads(given.threads)
        print(json.dumps(measure(json.loads(given.point))))
        return
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    results: dict[str, Any] = {"about": about(given.device, given.threads, given.repeats), "measurements": []}
    slow: set[int] = set()
    chosen = list(points(given.largest))
    for repeat in range(given.repeats):
        for i, point in enumerate(chosen):
            if i in slow:
                continue
            console.print(f"repeat {repeat + 1}/{given.repeats}  {point.series} {point.at:,}")
            start = time.monotonic()
            found = _in_process(point, given, console)
            if found is not None:
                where = {"series": point.series, "at": point.at, "repeat": repeat}
                results["measurements"].append(where | found)
            if time.monotonic() - start > 30:
                slow.add(i)
    tables.print_growth(results, console)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if given.markdown:
        given.markdown.write_text(tables.growth_markdown(results), encoding="utf-8")
    if given.figure:
        tables.growth_figure(results, given.figure)


def _in_process(point: Point, given: argparse.Namespace, console: Console) -> dict[str, Any] | None:
    command = [sys.executable, "-m", "benchmarks.growth", "--threads", str(given.threads)]
    command += ["--point", json.dumps(point.keys | {"device": given.device})]
    env = environment(given.threads, sleeps=True)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        console.print(f"  failed: {' | '.join(done.stderr.strip().splitlines()[-3:])}", markup=False)
        return None
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
