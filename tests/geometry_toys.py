"""Rules whose paths are traced, and how they are, for the tests of the geometry of paths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from fedsim.analysis.geometry import column
from fedsim.experiment import Experiment
from fedsim.federation import Federation
from fedsim.geometry import Trace, trace

RULES = {
    "sgd": {"client": "SGD(lr=0.3)"},
    "heavy ball": {"client": "SGD(lr=0.1, momentum=0.9, weight_decay=0.01)"},
    "adam": {"client": "AdamW(lr=0.02)", "strategy": "FedAdam(lr=0.05)"},
    "sam": {"client": "SAM(SGD(lr=0.3), rho=0.2)", "strategy": "FedAvgM(lr=0.7, momentum=0.5)"},
    "smooth": {"client": "SASAM(preset='federated')", "participation": 0.6},
    "prox": {"client": "Prox(Clipped(SGD(lr=0.3), norm=0.5), mu=0.3)", "strategy": "FedMedian()"},
    "controlled": {"client": "Controlled(SGD(lr=0.2))", "strategy": "Scaffold()"},
    "kept rows": {"strategy": "Elastic()", "client": "SGD(lr=0.2, momentum=0.5)"},
    "remembered": {"strategy": "Remembering()", "client": "AdamW(lr=0.02)"},
    "uneven": {"local_steps": 0, "local_epochs": 2},
    "idle": {"client": "PALSGD(SGD(lr=0.1), p=0.5, mix=0.5)"},
    "nodes": {"nodes": 2},
    "chosen": {"strategy": "LeaderSGD()"},
    "fragments": {"strategy": "StreamingDiLoCo(fragments=2)", "client": "AdamW(lr=0.02)"},
    "hostile": {"attack": "ScaledUpdate(share=0.4, scale=-1.0)"},
}


def plainly(experiment: Experiment, federation: Federation | None = None, **settings: Any) -> Trace:
    """Trace without the runs and orders of the controls."""
    return trace(experiment, federation, others=(), permutations=0, **settings)


def squares(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return squared distances after a step, those that its own numbers say, those before, and which rows these are."""
    distance = column(table, "norm_dist")
    there = np.ones(len(table) - 1, dtype=bool)
    if "client" in table:  # the last step of a worker in a round has none after it
        there = column(table, "local_step")[1:] > 0
    said = distance**2 + 2 * column(table, "dot_update") + column(table, "norm_update") ** 2
    return distance[1:][there] ** 2, said[:-1][there], distance[:-1][there] ** 2, np.flatnonzero(there)
