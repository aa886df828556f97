"""A small federation of two colours, for the tests of domains."""

from __future__ import annotations

from typing import Any

import fedsim
from fedsim import Experiment
from fedsim.probes import Snapshot

TINY = {
    "data": "ColoredDigits(rows=60)",
    "partition": "Natural()",
    "model": "MLP(hidden=(6,), init='xavier')",
    "objective": "Logistic()",
    "num_workers": 2,
    "local_steps": 1,
    "batch_size": 0,
    "eval_every": 0,
    "dtype": "float64",
    "device": "cpu",
    "plan": "stacked",
}


def tiny(**settings: Any) -> Experiment:
    return Experiment.from_mapping(TINY | settings)


def last(experiment: Experiment) -> Snapshot:
    *_, (snapshot, _) = fedsim.rounds(experiment)
    return snapshot
