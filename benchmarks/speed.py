"""Milliseconds a round of fedsim, of other simulators and of limits: ``python -m benchmarks.speed``.

Every measurement is a process of its own, pinned to the same cores. Repeats are interleaved: each passes
through all workloads and implementations once. All implementations get the same rows, shards, initial
parameters, number of steps and batch size; none but ``fedsim-eval`` evaluates between rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks import ceilings, tables
from benchmarks.problem import Problem, milliseconds_a_round
from benchmarks.workloads import Workload, problem, workloads
from fedsim.cohort import evaluate
from fedsim.federation import Federation, load

ROOT = Path(__file__).parents[1]
WIDTH = 150
"""Columns of the tables where the output is not a terminal."""
SMALL = {"A", "B"}
"""Workloads whose operations are too small for threads where workers are trained one by one."""
FLOWER_ROUNDS = {"A": 10, "B": 8, "C": 6}
"""Rounds of the one run of stock Flower on each workload."""


@dataclass(frozen=True)
class Implementation:
    """Something that is measured.

    Attributes
    ----------
    label : str
        Name in tables.
    function : str
        ``module:function`` under ``benchmarks``.
    distribution : str
        Installed package that it needs, in the peers' environment where ``peer``.
    rounds : float
        Share of the workload's rounds that is run; slow implementations are steady sooner.
    sleeps : bool
        Whether waiting OpenMP threads sleep, as fedsim has it; otherwise the package's own default holds.
    peer : bool
        Whether it runs in the interpreter given by ``--peers-python``.
    torch : bool
        Whether it uses PyTorch in the measured process.
    single : bool
        Whether it runs on one thread on A and B, whose operations are too small to gain from more.
    once : bool
        Whether it runs in the first repeat only.
    often : bool
        Whether it runs `OFTEN` times in a repeat on A and B, which take it a fraction of a second.
    """

    label: str
    function: str
    distribution: str
    rounds: float = 1.0
    sleeps: bool = False
    peer: bool = False
    torch: bool = True
    single: bool = False
    once: bool = False
    often: bool = False


OFTEN = 3

IMPLEMENTATIONS = {
    "fedsim": Implementation("fedsim", "ours:train", "fedsim", sleeps=True, often=True),
    "fedsim-eval": Implementation(
        "fedsim, evaluated every round", "ours:train_and_evaluate", "fedsim", sleeps=True, once=True
    ),
    "fedsim-flwr": Implementation(
        "fedsim, Flower's FedAvg", "ours:train_with_flowers_strategy", "fedsim", sleeps=True, once=True
    ),
    "hand": Implementation("batched by hand (limit)", "hand:train", "torch", sleeps=True, often=True),
    "loop": Implementation("plain PyTorch loop", "loop:train", "torch", rounds=0.2, single=True),
    "fedjax": Implementation("FedJAX", "peers.fed_jax:train", "fedjax", rounds=0.2, peer=True, torch=False),
    "pfl": Implementation(
        "pfl-research", "peers.pfl_research:train", "pfl", rounds=0.2, single=True, peer=True
    ),
    "flower": Implementation("stock Flower + Ray", "peers.flower:train", "flwr", torch=False, once=True),
}


def main() -> None:
    """Measure, print, save."""
    given = _arguments()
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    chosen = {k: w for k, w in workloads().items() if k in given.workloads.split(",")}
    names = given.only.split(",") if given.only else list(IMPLEMENTATIONS)
    unknown = [n for n in names if n not in IMPLEMENTATIONS]
    if unknown or not chosen:
        sys.exit(
            f"--only: {', '.join(unknown) or given.workloads}: allowed: {', '.join(IMPLEMENTATIONS)}; A, B, C"
        )
    versions = {n: _version(IMPLEMENTATIONS[n], given.peers_python) for n in names}
    results: dict[str, Any] = {
        "about": about(given.device, given.threads, given.repeats),
        "implementations": {
            n: {"label": IMPLEMENTATIONS[n].label, "version": v} for n, v in versions.items()
        },
        "ceilings": _ceilings(given),
        "workloads": {},
        "measurements": [],
    }
    with tempfile.TemporaryDirectory(prefix="fedsim-speed-") as folder:
        prepared = {k: _prepare(k, w, Path(folder), given.rounds, results) for k, w in chosen.items()}
        for repeat in range(given.repeats):
            for k, (workload, federation, file) in prepared.items():
                often = [n for n in names if IMPLEMENTATIONS[n].often and k in SMALL]
                for name in names + (OFTEN - 1) * often:
                    if not versions[name] or (IMPLEMENTATIONS[name].once and repeat):
                        continue
                    rounds = _rounds(name, k, workload)
                    console.print(f"repeat {repeat + 1}/{given.repeats}  {k}  {IMPLEMENTATIONS[name].label}")
                    found = _measure(IMPLEMENTATIONS[name], file, rounds, given, federation, console)
                    if found is not None:
                        which = {"workload": k, "implementation": name, "repeat": repeat, "rounds": rounds}
                        results["measurements"].append(which | found)
    tables.print_speed(results, console)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if given.markdown:
        given.markdown.write_text(tables.speed_markdown(results), encoding="utf-8")
    if given.figure:
        tables.speed_figure(results, given.figure)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1 ...")
    parser.add_argument("--workloads", default="A,B,C")
    parser.add_argument(
        "--repeats", type=int, default=3, help="of all but stock Flower and fedsim's variants, which run once"
    )
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="and cores used")
    parser.add_argument("--only", default="", help=f"some of {','.join(IMPLEMENTATIONS)}")
    parser.add_argument("--rounds", type=int, default=0, help="rounds at most, for a quick look")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter that has the peers")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args()


def about(device: str, threads: int, repeats: int) -> dict[str, Any]:
    """Say where and how measurements are taken."""
    return {
        "device": processor() if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": threads,
        "cores": os.cpu_count(),
        "repeats": repeats,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def processor() -> str:
    """Return the name of the CPU."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(implementation: Implementation, peers_python: str) -> str:
    """Return the version of the package in the interpreter where it will run, empty if it is not installed."""
    if not implementation.peer:
        return version(implementation.distribution)
    asked = f"from importlib.metadata import version; print(version({implementation.distribution!r}))"
    done = subprocess.run([peers_python, "-c", asked], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _ceilings(given: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.ceilings", "--device", given.device]
    command += ["--threads", str(given.threads)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=environment(given.threads, sleeps=True),
    )
    return json.loads(done.stdout)


def environment(threads: int, sleeps: bool) -> dict[str, str]:
    """Return the environment of a measured process; waiting OpenMP threads sleep, or do what is their default."""
    env = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    env |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return env | ({"GOMP_SPINCOUNT": "0"} if sleeps else {})


def _prepare(
    name: str, workload: Workload, folder: Path, most: int, results: dict[str, Any]
) -> tuple[Workload, Federation, Path]:
    """Write the file that all implementations read; cut the rounds to ``most`` if that is not 0."""
    if most:
        e = workload.experiment
        workload = Workload(workload.title, workload.model, e.replace({"rounds": min(most, e.rounds)}))
    federation = load(workload.experiment.replace({"device": "cpu"}))
    arrays: Problem = problem(name, workload, federation)
    file = folder / f"{name}.npz"
    arrays.save(file)
    flops, moved = ceilings.demand(arrays)
    described = {
        "title": workload.title,
        "rounds": workload.experiment.rounds,
        "flops": flops,
        "bytes": moved,
    }
    results["workloads"][name] = described
    return workload, federation, file


def _rounds(name: str, workload_name: str, workload: Workload) -> int:
    whole = workload.experiment.rounds
    if name == "flower":
        return min(whole, FLOWER_ROUNDS[workload_name])
    return max(min(whole, 5), round(whole * IMPLEMENTATIONS[name].rounds))


def _measure(
    implementation: Implementation,
    file: Path,
    rounds: int,
    given: argparse.Namespace,
    federation: Federation,
    console: Console,
) -> dict[str, Any] | None:
    """Run one process and read what it has written; None, with its last words printed, if it failed."""
    out = file.parent / "measured"
    python = given.peers_python if implementation.peer else sys.executable
    command = [
        python,
        "-m",
        "benchmarks.measure",
        f"benchmarks.{implementation.function}",
        str(file),
        str(out),
    ]
    threads = 1 if implementation.single and file.stem in SMALL else given.threads
    command += ["--rounds", str(rounds), "--device", given.device]
    command += ["--threads", str(threads), "--cores", str(given.threads)]
    command += ["--torch"] if implementation.torch else []
    env = environment(threads, implementation.sleeps)
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        console.print(f"  failed: {' | '.join(done.stderr.strip().splitlines()[-3:])}", markup=False)
        return None
    told = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    device = next(iter(federation.theta.values())).device
    with np.load(out.with_suffix(".npz")) as arrays:
        model = {k: torch.from_numpy(arrays[k]).to(device) for k in federation.theta}
    return {
        "ms": milliseconds_a_round(told["ends"]),
        "start_s": told["ends"][0] - began,
        "total_s": told["finished"] - began,
        "peak_mb": told["peak_mb"],
        "note": told["note"],
        "test_loss": evaluate(federation, model)[0].mean().item(),
        "losses": told["losses"],
    }


if __name__ == "__main__":
    main()
