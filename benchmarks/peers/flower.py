"""Stock Flower: an ordinary app in its simulation engine, with Ray."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from safetensors.numpy import load_file

from benchmarks.problem import Problem, Trained
from fedsim.flower import run_flower

APP = Path(__file__).parent / "flower_app"
ROUND = re.compile(r"round (\d+) ended at ([0-9.]+)")


def train(file: Path, rounds: int, device: str) -> Trained:
    """Run the app, with one actor a core that this process may use."""
    problem = Problem.load(file)
    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fedsim-flower-") as folder:
        result = Path(folder) / "model.safetensors"
        outcome = run_flower(
            APP,
            {
                "shards": str(file.resolve()),
                "result": str(result),
                "num-server-rounds": rounds,
                "num-nodes": problem.num_workers,
                "fraction-train": problem.participants / problem.num_workers,
                "local-steps": problem.steps,
                "batch-size": problem.batch,
                "lr": problem.lr,
            },
            problem.num_workers,
            on_line=lines.append,
            gpus_per_supernode=0.0 if device == "cpu" else 0.1,
        )
        if not outcome.completed:
            raise RuntimeError(f"Flower: {outcome.status}: {outcome.details}\n" + "\n".join(lines[-20:]))
        model = load_file(result)
    found = [match for line in lines if (match := ROUND.search(line))]
    ends = [float(match[2]) for match in found if int(match[1]) > 0]
    return Trained(ends, model)
