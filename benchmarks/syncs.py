"""What a sync of leaders or of a centre adds to a round of FedAvg: ``python -m benchmarks.syncs``.

All strategies run in one process and take turns round by round, so that what else the machine does hits them alike;
the ratio is the median over rounds of a round's time by that of the FedAvg round next to it. 256 workers of the
digits' MLP, 10 local steps of 16 rows, one thread.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.speed import WIDTH
from fedsim import Experiment
from fedsim.simulate import rounds

STRATEGIES = (
    "FedAvg()",
    "LeaderSGD()",
    "LeaderSGD(prox=0.1)",
    "LeaderSGD(groups=4)",
    "LeaderSGD(groups=4, prox=0.1, prox_global=0.1)",
    "ElasticAveraging()",
    "Downpour()",
)
WARM_UP = 3


def measure(strategies: tuple[str, ...], number: int, workers: int) -> dict[str, list[float]]:
    """Return the seconds of each round of each strategy, the first of which is the yardstick."""
    same = {"partition": "IID()", "num_workers": workers, "rounds": number + WARM_UP, "eval_every": 0}
    runs = {s: rounds(Experiment.from_mapping(same | {"strategy": s, "device": "cpu"})) for s in strategies}
    found: dict[str, list[float]] = {s: [] for s in strategies}
    for i in range(number + WARM_UP - 1):  # the last round is evaluated
        for strategy, run in runs.items():
            start = time.perf_counter()
            next(run)
            if i >= WARM_UP:
                found[strategy].append(time.perf_counter() - start)
    return found


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--workers", type=int, default=256)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(STRATEGIES, given.rounds, given.workers)
    yardstick = found[STRATEGIES[0]]
    table = Table("strategy", "ms a round", "x")
    for strategy, seconds in found.items():
        ratio = median(s / y for s, y in zip(seconds, yardstick, strict=True))
        table.add_row(strategy, f"{1e3 * median(seconds):.1f}", f"{ratio:.2f}")
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)


if __name__ == "__main__":
    main()
