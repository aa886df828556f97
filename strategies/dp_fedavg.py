"""Federated averaging with differential privacy of workers."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import torch

from fedsim import checks, random, tree
from fedsim.tree import Stack, Tree
from strategies.base import Broadcast, Report, Rule, State


@dataclass(frozen=True)
class DPFedAvg(Rule):
    """Average clipped updates, all with the same weight, and add noise.

    ``theta <- theta + (1 / m) (sum_i D_i min(1, clip / |D_i|) + noise clip z)`` with the updates
    ``D_i = theta_i - theta`` of the m participants, their Euclidean norms over all parameters, and a standard normal z. What
    this gives away of a single worker is told by the probe ``PrivacyLoss``.

    Parameters
    ----------
    clip : float
        Largest norm of an update, > 0.
    noise : float
        Noise multiplier, the standard deviation of the noise of the sum in units of ``clip``, >= 0.
    seed : int or None
        Of the noise, >= 0, so that a run can be repeated. Whoever knows the seed can take the noise off: for a
        model that is to be given away use None, which draws from the operating system.

    Raises
    ------
    ValueError
        If a value is outside its range.

    References
    ----------
    McMahan, Ramage, Talwar, Zhang (2018), Learning differentially private recurrent language models,
    arXiv:1710.06963; there the denominator is the expected number of participants.
    """

    clip: float = 1.0
    noise: float = 1.0
    seed: int | None = 0

    def __post_init__(self) -> None:
        checks.positive(self, "clip")
        checks.finite(self, "clip", "noise")
        checks.nonnegative(self, "noise")
        if self.seed is not None:
            checks.nonnegative(self, "seed")

    def init(self, theta: Tree, num_workers: int) -> tuple[State, Broadcast]:
        """Start at the initial model, in round 0."""
        return {"model": theta, "clock": {"round": torch.tensor(0)}}, {"model": theta}

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Clip, average, add noise."""
        # In the order of the rows' names: a state that was read from a file may have another one.
        theta = {k: state["model"][k] for k in rows}
        update = tree.flatten_rows(tree.sub(rows, theta))
        norm = torch.linalg.vector_norm(update, dim=1, dtype=torch.float64)
        share = (self.clip / norm.clamp(min=self.clip)).to(update) / len(update)
        round = int(state["clock"]["round"]) + 1
        seed = secrets.randbits(63) if self.seed is None else self.seed
        place = torch.arange(update.shape[1], device=update.device)
        z = random.normal(random.key(seed, "privacy", round), place).to(update)
        step = share @ update + self.noise * self.clip / len(update) * z
        model = tree.add(theta, tree.unflatten(step, theta))
        return {"model": model, "clock": {"round": torch.tensor(round)}}, {"model": model}
