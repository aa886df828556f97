"""One measurement in a process of its own: ``python -m benchmarks.measure MODULE:FUNCTION ...``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.problem import peak_mb


def main() -> None:
    """Train once and write times, notes and final parameters."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("function", help="module:function of an implementation")
    parser.add_argument("file", type=Path, help="the problem, .npz")
    parser.add_argument("out", type=Path, help="stem of the results, .json and .npz")
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--torch", action="store_true", help="set the threads of torch")
    parser.add_argument("--cores", type=int, required=True)
    given = parser.parse_args()
    if sys.platform == "linux":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
    module, function = given.function.split(":")
    train = getattr(importlib.import_module(module), function)
    if given.torch:
        import torch

        torch.set_num_threads(given.threads)
    trained = train(given.file, given.rounds, given.device)
    np.savez(given.out.with_suffix(".npz"), **trained.model)
    measured = {
        "ends": trained.ends,
        "finished": time.monotonic(),
        "note": trained.note,
        "losses": trained.losses,
        "peak_mb": peak_mb(),
    }
    given.out.with_suffix(".json").write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    main()
