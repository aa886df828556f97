"""Seconds a round over SuperNodes, against the least that Flower takes: ``python -m benchmarks.nodes``.

A SuperLink and its SuperNodes run on the loopback interface, without encryption. Flower starts a process for every
message. The floor is an app whose clients reply at once, empty or with as many random numbers as the model has
parameters; its server looks for replies as often as fedsim's. All are measured in turns, over the same nodes, but for
the clients without a resident, whose nodes are configured so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks import tables
from benchmarks.speed import WIDTH, processor
from fedsim import Experiment, history
from fedsim.cli import write_app
from fedsim.federation import load
from fedsim.flower import flower_environment, run_flower, start_link, write_connection
from fedsim.processes import ProcessGroup, free_port
from fedsim.tree import num_parameters

IDLE_APP = Path(__file__).parent / "peers" / "idle_app"
TIMEOUT = 1800.0

SAME = {
    "data": "Synthetic(rows=3000, features=64, test=0.0)",
    "partition": "IID()",
    "model": "MLP(hidden=(13333,))",
    "local-steps": 5,
    "batch-size": 10,
    "eval-every": 0,
    "device": "cpu",
}


@dataclass(frozen=True)
class Kind:
    """Something that is measured.

    Attributes
    ----------
    label : str
        Name in tables.
    keys : dict or None
        Of the experiment; None for the idle app.
    loaded : bool
        Whether the idle app's messages are as long as the model.
    resident : bool
        Whether nodes have residents.
    """

    label: str
    keys: dict[str, Any] | None = None
    loaded: bool = False
    resident: bool = True


FLOOR = "floor"
KEEPING = {"strategy": "DiLoCo()", "client": "AdamW(lr=0.001)", "local-steps": 2}


def kinds(nodes: int) -> dict[str, Kind]:
    """Name what is measured over so many nodes."""
    one, many = {"num-workers": nodes}, {"num-workers": 13 * nodes}
    return {
        FLOOR: Kind("clients that do nothing (floor)"),
        "loaded": Kind("the same, a model's random numbers there and back", loaded=True),
        "fedsim": Kind("fedsim, FedAvg", one),
        "keeping": Kind("fedsim, DiLoCo, 13 workers a node that keep 104 MB", many | KEEPING),
        "alone": Kind("fedsim, FedAvg, without residents", one, resident=False),
        "alone-keeping": Kind("fedsim, DiLoCo as above, without residents", many | KEEPING, resident=False),
    }


@contextmanager
def federation(folder: Path, nodes: int, config: str) -> Iterator[Path]:
    """Hold a SuperLink and its SuperNodes, each with a process group of its own; yield the home of its connection."""
    home, address = folder / "home", f"127.0.0.1:{free_port()}"
    env = flower_environment() | write_connection(home, "fedsim", address)
    groups: list[ProcessGroup] = []
    try:
        for name in ("link", *(f"node-{i}" for i in range(nodes))):
            (folder / name).mkdir()
            own = env | {"FLWR_HOME": str(folder / f"{name}-home"), "TMPDIR": str(folder / name)}
            groups.append(ProcessGroup(own, folder / name, folder / f"{name}.log"))
        start_link(groups[0], address)
        for i, group in enumerate(groups[1:]):
            port, own = str(free_port()), f"partition-id={i} num-partitions={nodes} {config}"
            group.start("flower-supernode", "--insecure", "--superlink", address, "--port", port, "--isolation",
                        "process", "--node-config", own.strip())  # fmt: skip
            group.start("flower-superexec", "--insecure", "--runtime-api-address", f"127.0.0.1:{port}",
                        "--parent-pid", str(os.getpid()))  # fmt: skip
        yield home
    finally:
        for group in reversed(groups):
            group.end()


def measure(kind: Kind, home: Path, nodes: int, rounds: int, folder: Path) -> list[float]:
    """Run one kind over a federation and return the seconds of its rounds but the first, which starts residents."""
    lines: list[str] = []
    if kind.keys is None:
        size = num_parameters(load(Experiment.from_mapping(SAME)).theta) if kind.loaded else 0
        config: dict[str, Any] = {"nodes": nodes, "rounds": rounds, "numbers": size}
        app = IDLE_APP
    else:
        chosen = Experiment.from_mapping(SAME | kind.keys | {"rounds": rounds, "out": str(folder / "run")})
        config, app = chosen.to_mapping(), folder / "app"
        app.mkdir()
        write_app(app, chosen)
    done = run_flower(app, config, nodes, "fedsim", lines.append, TIMEOUT, home=home)
    if not done.completed:
        sys.exit("\n".join([*lines[-20:], f"{kind.label}: {done.status}: {done.details}"]))
    if kind.keys is None:
        (line,) = [line for line in lines if line.startswith("ends:")]
        ends = json.loads(line.removeprefix("ends:"))
    else:
        ends = [line["wall_time"] for line in history.read(folder / "run")]
    return [b - a for a, b in pairwise(ends)]


def measure_all(
    nodes: int, rounds: int, repeats: int, chosen: list[str], console: Console
) -> list[dict[str, Any]]:
    """Measure the chosen kinds in turns."""
    found: list[dict[str, Any]] = []
    known = kinds(nodes)
    for resident, config in ((True, ""), (False, "resident-idle=0")):
        names = [name for name in chosen if known[name].resident == resident]
        if not names:
            continue
        with tempfile.TemporaryDirectory(prefix="fedsim-") as folder:
            here = Path(folder)
            with federation(here, nodes, config) as home:
                for repeat in range(repeats):
                    for name in names:
                        console.print(f"repeat {repeat + 1}/{repeats}  {known[name].label}")
                        (own := here / f"{name}-{repeat}").mkdir()
                        seconds = measure(known[name], home, nodes, rounds + 1, own)
                        found.append({"kind": name, "label": known[name].label, "seconds": seconds})
                        console.print(f"  {median(seconds):.2f} s a round")
    return found


def rows(results: dict[str, Any]) -> tuple[list[str], tables.Rows]:
    """Summarise what was measured."""
    pooled: dict[str, list[float]] = {}
    for one in results["measurements"]:
        pooled.setdefault(one["label"], []).extend(one["seconds"])
    floors = [x for one in results["measurements"] if one["kind"] == FLOOR for x in one["seconds"]]
    floor = median(floors) if floors else float("nan")
    lines = [
        [label, f"{median(x):.2f}", f"{100 * (median(x) / floor - 1):+.0f}%", f"{min(x):.2f} to {max(x):.2f}"]
        for label, x in pooled.items()
    ]
    return ["", "s a round", "above the floor", "least to most"], lines


def markdown(results: dict[str, Any]) -> str:
    """Write the table of the README, and under which conditions it was measured."""
    return f"{tables.markdown(*rows(results))}\n\n{results['about']}\n"


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nodes", description=__doc__)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=8, help="rounds of each that count")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=[*kinds(1)], default=[*kinds(1)])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    found = measure_all(given.nodes, given.rounds, given.repeats, given.only, console)
    size = num_parameters(load(Experiment.from_mapping(SAME)).theta)
    about = (
        f"Medians of {given.rounds * given.repeats} rounds over {given.nodes} SuperNodes and a SuperLink on one machine, "
        f"in turns; perceptron of {size:,} parameters, {SAME['local-steps']} steps of {SAME['batch-size']} rows (DiLoCo "
        f"{KEEPING['local-steps']}); {processor()}, {os.cpu_count()} cores. Of the floor, 3 s are a SuperNode's wait "
        "after it found no message."
    )
    results = {"about": about, "measurements": found}
    tables.print_table("Seconds a round over SuperNodes", *rows(results), console)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
