"""fedsim: federated learning with many workers in one batched call, on Flower and PyTorch."""

import importlib
import os
from typing import TYPE_CHECKING, Any

# Waiting threads of OpenMP spin by default. On a machine that also does something else this makes small
# operations up to 50 times slower; sleeping at once costs little. It counts only if torch is not yet imported.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

if TYPE_CHECKING:
    from fedsim.experiment import BadInput, Experiment
    from fedsim.registry import register
    from fedsim.runs import Run, load, resume, run
    from fedsim.simulate import RunFailed, rounds

_HOME = {
    "BadInput": "experiment",
    "Experiment": "experiment",
    "Run": "runs",
    "RunFailed": "simulate",
    "load": "runs",
    "register": "registry",
    "resume": "runs",
    "rounds": "simulate",
    "run": "runs",
}

__all__ = ["BadInput", "Experiment", "Run", "RunFailed", "load", "register", "resume", "rounds", "run"]


def __getattr__(name: str) -> Any:
    """Import on first use: ``strategies`` and ``clients`` need this package's tree arithmetic only."""
    if name not in _HOME:
        raise AttributeError(f"module 'fedsim' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fedsim.{_HOME[name]}"), name)
