"""What all implementations are given: the same rows, the same shards, the same initial parameters.

Needs NumPy alone, so that a peer may live in an environment without fedsim.
"""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

PARAMETER = "theta/"
"""Prefix of the parameters' names in the file."""


@dataclass(frozen=True)
class Problem:
    """A workload as arrays.

    Attributes
    ----------
    name : str
        Workload: A, B or C.
    model : str
        ``linear``, ``mlp`` or ``cnn``; parameters have the names of the `torch.nn.Sequential` of `benchmarks.nets`.
    participants : int
        Workers of a round, drawn anew each round without replacement.
    steps, batch : int
        Local steps of a round; rows of a step, drawn with replacement from the worker's own.
    lr : float
        Step size of plain SGD.
    x, y : np.ndarray
        Rows to train on.
    order, offsets : np.ndarray
        Worker i owns rows ``order[offsets[i]:offsets[i + 1]]``.
    theta : dict of str to np.ndarray
        Initial parameters.
    """

    name: str
    model: str
    participants: int
    steps: int
    batch: int
    lr: float
    x: np.ndarray
    y: np.ndarray
    order: np.ndarray
    offsets: np.ndarray
    theta: dict[str, np.ndarray]

    @property
    def num_workers(self) -> int:
        """Number of workers."""
        return len(self.offsets) - 1

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each worker."""
        return np.diff(self.offsets)

    def rows(self, i: int) -> np.ndarray:
        """Row numbers of worker i."""
        return self.order[self.offsets[i] : self.offsets[i + 1]]

    def save(self, file: Path) -> None:
        """Write the problem as one ``.npz``."""
        about = {
            "name": self.name,
            "model": self.model,
            "participants": self.participants,
            "steps": self.steps,
            "batch": self.batch,
            "lr": self.lr,
        }
        arrays = {PARAMETER + k: v for k, v in self.theta.items()}
        np.savez(
            file,
            about=np.array(json.dumps(about)),
            x=self.x,
            y=self.y,
            order=self.order,
            offsets=self.offsets,
            **arrays,  # pyright: ignore[reportArgumentType]
        )

    @classmethod
    def load(cls, file: Path) -> Problem:
        """Read what `save` wrote."""
        with np.load(file) as arrays:
            about = json.loads(str(arrays["about"]))
            theta = {k.removeprefix(PARAMETER): arrays[k] for k in arrays.files if k.startswith(PARAMETER)}
            named = {k: arrays[k] for k in ("x", "y", "order", "offsets")}
        return cls(**about, **named, theta=theta)


@dataclass(frozen=True)
class Trained:
    """What an implementation gives back.

    Attributes
    ----------
    ends : list of float
        `time.monotonic` at the end of each round.
    model : dict of str to np.ndarray
        Final parameters.
    note : str
        What a reader of the table should know.
    losses : list of float
        Test loss after each round, from the one implementation that is the reference.
    """

    ends: list[float]
    model: dict[str, np.ndarray]
    note: str = ""
    losses: list[float] = field(default_factory=list)


def milliseconds_a_round(ends: list[float]) -> float:
    """Return the mean milliseconds of a round in the steady state.

    The first fifth of the rounds (at least one) is warm-up, and the last round is left out because some
    implementations evaluate there. Two rounds are the least.

    Examples
    --------
    >>> milliseconds_a_round([3.0, 3.5, 4.0, 4.5, 9.0])
    500.0
    """
    first = max(1, len(ends) // 5) - 1
    last = max(first + 1, len(ends) - 2)
    return 1000 * (ends[last] - ends[first]) / (last - first)


def peak_mb() -> float:
    """Return the largest resident memory of this process so far, in MB."""
    if sys.platform == "linux":  # ru_maxrss would begin at the size of the parent process
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM"):
                return round(int(line.split()[1]) * 1024 / 1e6, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1)
