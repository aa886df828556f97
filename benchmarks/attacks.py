"""How much accuracy attackers take from averaging and from robust means: ``python -m benchmarks.attacks``.

`experiments/attacked.toml` with each strategy, attack, share of attackers and seed: digits, 20 workers, of which the robust
ones expect 6 attackers. A minute on two cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from rich.progress import track

from fedsim import Experiment
from fedsim.canvas import style
from fedsim.simulate import rounds

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "attacked.toml"
STRATEGIES = {
    "FedAvg": "FedAvg(weighting='uniform')",
    "median": "FedMedian()",
    "trimmed mean": "TrimmedMean(share=0.3)",
    "Krum": "flwr.Krum(num_malicious_nodes=6)",
    "update limit": "FedAvg(weighting='uniform')",
}
ATTACKS = {"flipped labels": "LabelFlip(share={})", "updates times -4": "ScaledUpdate(share={}, scale=-4.0)"}
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
LIMIT = 2.0
"""``max-update-norm`` of the last row."""


def measure(
    seeds: int, names: Sequence[str] = tuple(STRATEGIES), shares: Sequence[float] = SHARES
) -> list[dict[str, Any]]:
    """Return the final test accuracy of every strategy, attack, share and seed."""
    cells = list(product(names, ATTACKS.items(), shares, range(seeds)))
    found = []
    for name, (kind, attack), share, seed in track(cells, description="runs"):
        changes = {
            "strategy": STRATEGIES[name],
            "attack": attack.format(share),
            "seed": seed,
            "eval-every": 0,
        }
        changes["max-update-norm"] = LIMIT if name == "update limit" else 0.0
        last, _ = [*rounds(Experiment.from_toml(EXPERIMENT, changes))][-1]
        accuracy = last.metrics["test_accuracy"]
        found.append({"strategy": name, "attack": kind, "share": share, "seed": seed, "accuracy": accuracy})
    return found


def figure(found: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy against the share of attackers, mean and range over seeds."""
    table = pd.DataFrame(found)
    with style():
        fig, axes = plt.subplots(1, len(ATTACKS), figsize=(9, 3.6), sharey=True, layout="constrained")
        for ax, attack in zip(axes, ATTACKS, strict=True):
            sns.lineplot(
                table.query("attack == @attack"), x="share", y="accuracy", hue="strategy", style="strategy",
                markers=True, dashes=False, errorbar=("pi", 100), palette="colorblind", ax=ax,
            )  # fmt: skip
            ax.set(title=attack, xlabel="share of attackers", ylabel="test accuracy", ylim=(0, 1))
            if ax is not axes[0]:
                ax.get_legend().remove()
            else:
                ax.legend(title=None)
        fig.savefig(path, dpi=150)
        plt.close(fig)


def markdown(results: dict[str, Any]) -> str:
    """Write the table of mean accuracies."""
    table = pd.DataFrame(results["measurements"])
    means = table.pivot_table("accuracy", ["attack", "strategy"], "share", sort=False)
    lines = [
        "| attack | strategy | " + " | ".join(f"{s:.0%}" for s in means.columns) + " |",
        "| --- | --- |" + " ---: |" * len(means.columns),
    ]
    for (attack, strategy), row in means.iterrows():  # type: ignore[misc] - the index has two levels
        lines.append(f"| {attack} | {strategy} | " + " | ".join(f"{x:.2f}" for x in row) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, save, draw."""
    results = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attacks", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=results / "attacks.json")
    parser.add_argument("--figure", type=Path, default=results / "attacks.png")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {"seeds": given.seeds, "measurements": measure(given.seeds)}
    given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    figure(found["measurements"], given.figure)
    print(markdown(found))


if __name__ == "__main__":
    main()
