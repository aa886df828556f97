"""What the machine can do at most, and how much of it a workload asks for.

``python -m benchmarks.ceilings --device cpu --threads 2`` measures both ceilings in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.nets import build
from benchmarks.problem import Problem

SIZES = {"cpu": (2**26, 2048), "cuda": (2**29, 8192)}
"""Entries of the copied vector and side of the multiplied matrices, float32, by type of device."""


def demand(problem: Problem) -> tuple[float, float]:
    """Return floating-point operations and bytes of a round.

    Operations are those of the matrix products and convolutions, counted by PyTorch. Bytes are the traffic if
    every step reads the parameters twice (forward, backward), writes them once and reads its batch, and the
    merge reads every row; what stays in a cache does not reach the memory, so CPUs can be above 100 %.

    Parameters
    ----------
    problem : Problem
        The workload.

    Returns
    -------
    tuple of float
        Operations, bytes.
    """
    net = build(problem)
    x, y = torch.from_numpy(problem.x[: problem.batch]), torch.from_numpy(problem.y[: problem.batch])
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(net(x), y).backward()
    steps = problem.participants * problem.steps
    parameters = sum(v.size for v in problem.theta.values())
    numbers = steps * (3 * parameters + x.numel()) + problem.participants * parameters
    return float(counter.get_total_flops() * steps), 4.0 * numbers


def measure(device: str) -> dict[str, float]:
    """Measure a large copy (bytes read and written a second) and a large float32 matrix product (FLOP/s)."""
    length, side = SIZES[torch.device(device).type]
    source = torch.ones(length, device=device)
    target = torch.empty_like(source)
    a = torch.ones(side, side, device=device) / side
    out = torch.empty_like(a)
    copied = _fastest(lambda: target.copy_(source), device)
    multiplied = _fastest(lambda: torch.mm(a, a, out=out), device)
    return {"bytes": 8 * length / copied, "flops": 2 * side**3 / multiplied}


def _fastest(call: Callable[[], object], device: str, repeats: int = 7) -> float:
    """Return the seconds of the fastest of some calls."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return float(np.min(seconds))


def main() -> None:
    """Print the ceilings as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(json.dumps(measure(given.device)))


if __name__ == "__main__":
    main()
