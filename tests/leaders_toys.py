"""Four workers on parabolas of their own, for the tests of leaders and centres."""

from __future__ import annotations

from typing import Any

import pytest
from toys import here, snapshots

from fedsim import Experiment, client_app, tree
from fedsim.carriers import Carrier
from fedsim.federation import load
from fedsim.grid import InProcessGrid
from fedsim.over_grid import OverGrid, greet
from fedsim.probes import Snapshot

GOLDEN = 1e-9
STARTS = "(3.0, -2.0, 1.0, 4.0)"
ALONE = {"strategy": "ElasticAveraging(alpha=0.1)", "local_steps": 2}


def parabolas(**settings: Any) -> Experiment:
    base = {
        "data": "Parabolas()", "partition": "Natural()", "model": f"Scalar(starts_at={STARTS})",
        "objective": "SquaredError(half=True)", "client": "SGD(lr=0.1)", "num_workers": 4, "rounds": 1,
        "batch_size": 0, "device": "cpu", "dtype": "float64",
    }  # fmt: skip
    return Experiment.from_mapping(base | settings)


def over_messages(experiment: Experiment) -> Carrier:
    """Give every worker a node of its own."""
    grid = InProcessGrid(client_app.app, experiment.num_workers, experiment.to_mapping())
    return OverGrid(grid, experiment, load(experiment), greet(grid, experiment.num_workers))


carriers = pytest.mark.parametrize("carrier", [here, over_messages])


def last(experiment: Experiment) -> Snapshot:
    *_, snapshot = snapshots(experiment)
    return snapshot


def figure(snapshot: Snapshot, name: str) -> float:
    value = snapshot.metrics[name]
    assert isinstance(value, int | float)
    return value


def values(rows: tree.Stack) -> list[float]:
    """Return the one parameter of every row."""
    (leaf,) = rows.values()
    return leaf.flatten().tolist()
