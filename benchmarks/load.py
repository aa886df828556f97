"""Memory against rounds under load, in Flower's simulation engine: ``python -m benchmarks.load``.

Two runs of 200 rounds through messages (``engine = "flower"``): 50 nodes of ten workers each, and 10,000 workers over
eight nodes. Once a second the memory of all processes of the run is added up, shared pages once (Linux' proportional
set size), and noted with the number of rounds that are in the history by then.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console

from benchmarks import tables
from benchmarks.speed import WIDTH, processor
from fedsim import Experiment
from fedsim.cli import write_app
from fedsim.flower import run_flower
from fedsim.history import FILE, read

MARK = "FEDSIM_LOAD"
TIMEOUT = 3600.0
SETTLED = 0.5
"""Share of the rounds after which memory must be level."""

SAME = {"local-steps": 5, "batch-size": 10, "eval-every": 0, "device": "cpu", "engine": "flower"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "nodes": (
        "50 nodes, 500 workers",
        {
            "nodes": 50,
            "num-workers": 500,
            "data": "Synthetic(rows=25000, features=64)",
            "model": "MLP(hidden=(100,))",
        },
    ),
    "workers": (
        "8 nodes, 10,000 workers",
        {
            "nodes": 8,
            "num-workers": 10000,
            "data": "Synthetic(rows=200000, features=64)",
            "partition": "IID()",
        }
        | {"model": "Linear()"},
    ),
}


@dataclass
class Meter(threading.Thread):
    """Adds up the memory of marked processes once a second.

    Attributes
    ----------
    mark : str
        What the environment variable `MARK` of those processes holds.
    history : Path
        File with one line a round.
    rounds : int
        All rounds.
    samples : list of dict
        ``round``, ``mb`` of all processes, and ``client_mb`` of those that host workers.
    """

    mark: str
    history: Path
    rounds: int
    samples: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self.over = threading.Event()

    def run(self) -> None:
        """Measure until `over` is set."""
        while not self.over.wait(1.0):
            total = clients = 0.0
            for process in psutil.process_iter():
                try:
                    if process.environ().get(MARK) != self.mark or process.pid == os.getpid():
                        continue
                    mb = process.memory_full_info().pss / 2**20
                    total += mb
                    clients += mb * process.name().startswith("ray::")
                except psutil.Error:
                    continue
            lines = self.history.read_bytes().count(b"\n") if self.history.exists() else 0
            if 0 < lines < self.rounds:  # behind the last round processes end
                self.samples.append({"round": lines, "mb": total, "client_mb": clients})

    __hash__ = threading.Thread.__hash__


def measure(keys: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Run one experiment in Flower's simulation and return what it cost."""
    with tempfile.TemporaryDirectory(prefix="fedsim-") as folder:
        out, app = Path(folder) / "run", Path(folder) / "app"
        chosen = Experiment.from_mapping(SAME | keys | {"rounds": rounds, "out": str(out)})
        app.mkdir()
        write_app(app, chosen)
        os.environ[MARK] = uuid.uuid4().hex
        meter = Meter(os.environ[MARK], out / FILE, rounds)
        meter.start()
        start = time.monotonic()
        try:
            lines: list[str] = []
            done = run_flower(app, chosen.to_mapping(), chosen.nodes, on_line=lines.append, timeout=TIMEOUT)
        finally:
            meter.over.set()
            meter.join()
        if not done.completed:
            sys.exit("\n".join([*lines[-20:], f"{done.status}: {done.details}"]))
        ends = [line["wall_time"] for line in read(out)]
    return {
        "rounds": rounds,
        "seconds": time.monotonic() - start,
        "ms": 1000 * float(np.median(np.diff(ends))),
        "samples": meter.samples,
    }


def growth(found: dict[str, Any]) -> float:
    """Fit a line to the memory of the rounds in which it must be level: megabytes in 100 rounds."""
    late = [s for s in found["samples"] if s["round"] > SETTLED * found["rounds"]]
    if len(late) < 3:
        return float("nan")
    return 100 * float(np.polyfit([s["round"] for s in late], [s["mb"] for s in late], 1)[0])


def rows(results: dict[str, Any]) -> tuple[list[str], tables.Rows]:
    """Summarise what was measured."""
    lines = []
    for found in results["measurements"]:
        at = {
            share: float(
                np.mean([s["mb"] for s in found["samples"] if low < s["round"] / found["rounds"] <= share])
            )
            for low, share in ((0.4, 0.5), (0.9, 1.0))
        }
        first, last = (int(share * found["rounds"]) for share in at)
        lines.append([
            found["label"], f"{found['rounds']}", f"{at[0.5]:,.0f} (to {first})",
            f"{at[1.0]:,.0f} (to {last})", f"{growth(found):+.1f}",
        ])  # fmt: skip
    return [
        "",
        "rounds",
        "MB half-way",
        "MB at the end",
        "MB in 100 rounds, second half",
    ], lines


def markdown(results: dict[str, Any]) -> str:
    """Write the table of the README, and under which conditions it was measured."""
    return f"{tables.markdown(*rows(results))}\n\n{results['about']}\n"


def figure(results: dict[str, Any], path: Path) -> None:
    """Draw memory against rounds."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(7, 3.2), layout="constrained")
    axes = drawn.subplots()
    for i, found in enumerate(results["measurements"]):
        at = [s["round"] for s in found["samples"]]
        for key, label, style in (("mb", "all processes", "-"), ("client_mb", "nodes", "--")):
            axes.plot(
                at,
                [s[key] for s in found["samples"]],
                style,
                color=f"C{i}",
                label=f"{found['label']}: {label}",
            )
    axes.set(xlabel="round", ylabel="memory, MB", ylim=(0, None), xlim=(0, None))
    axes.legend(frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=150)


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--only", nargs="*", choices=[*CASES], default=[*CASES])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    found = []
    for name in given.only:
        label, keys = CASES[name]
        console.print(label)
        found.append({"case": name, "label": label} | measure(keys, given.rounds))
    cores = os.cpu_count()
    about = (
        "Flower's simulation engine with Ray: the nodes live in as many client processes as there are cores. Logistic "
        "regression or a perceptron of 7,510 parameters, 5 steps of 10 rows. Memory of all processes, SuperLink and Ray "
        f"included, shared pages counted once. {processor()}, {cores} cores."
    )
    results = {"about": about, "measurements": found}
    tables.print_table("Memory under load", *rows(results), console)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if given.figure:
        figure(results, given.figure)


if __name__ == "__main__":
    main()
