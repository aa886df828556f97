"""What a private strategy has given away of a single worker so far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fedsim import checks
from fedsim.probes.base import Memory, Probe, Snapshot
from fedsim.probes.direction import is_due
from strategies import DPFedAvg

if TYPE_CHECKING:
    from fedsim.experiment import Experiment
    from fedsim.federation import Federation


@dataclass(frozen=True)
class PrivacyLoss(Probe):
    """The ``epsilon`` of the (epsilon, delta)-differential privacy of one worker against all others, after each round.

    Neighbours differ in all data of one worker, which is replaced by another one, so that the sum of clipped updates changes
    by ``2 clip`` at most: `DPFedAvg` with noise multiplier ``noise`` counts as a Gaussian mechanism of ``noise / 2``,
    amplified by drawing ``m`` of ``W`` workers without replacement. Rounds are composed by the Renyi accountant of dp-accounting.
    It holds if the noise is secret (``seed=None``), if no worker is left out of a round, as the mean is over those that are
    not, if the history of the run is not given away, as losses and norms are not private, and if the server is trusted.

    Parameters
    ----------
    delta : float
        In (0, 1); less than one in the number of workers makes sense.
    per_decade : int
        0 computes it every round, which takes 0.2 s; else so many rounds a decade, the powers of 2, and the last round.

    Raises
    ------
    ValueError
        If ``delta`` is outside (0, 1) or ``per_decade`` is negative; when a run begins, if the strategy is another, or
        dp-accounting is not installed.

    References
    ----------
    Mironov (2017), Renyi differential privacy, arXiv:1702.07476. Wang, Balle, Kasiviswanathan (2019), Subsampled
    Renyi differential privacy and analytical moments accountant, arXiv:1808.00087.
    """

    delta: float = 1e-5
    per_decade: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.delta < 1:
            raise ValueError(f"PrivacyLoss: delta = {self.delta} must be in (0, 1)")
        checks.nonnegative(self, "per_decade")

    def begin(self, experiment: Experiment, federation: Federation) -> Memory:
        """Check that the strategy is private, and that the accountant is there."""
        strategy = experiment.parts.strategy
        if not isinstance(strategy, DPFedAvg):
            raise ValueError(f"PrivacyLoss: needs strategy = 'DPFedAvg(...)', it is {experiment.strategy!r}")
        try:
            self.epsilon(strategy.noise, experiment.num_participants, experiment.num_workers, 1)
        except ImportError:
            raise ValueError(
                "PrivacyLoss: needs the package dp-accounting: pip install 'fedsim[privacy]'"
            ) from None
        sizes = {"sample": experiment.num_participants, "rounds": experiment.rounds}
        return {"of": {k: torch.tensor(x) for k, x in sizes.items()}}

    def epsilon(self, noise: float, sample: int, population: int, rounds: int) -> float:
        """Return ``epsilon`` after some rounds.

        Parameters
        ----------
        noise : float
            Noise multiplier, >= 0; 0 is no privacy at all, ``inf``.
        sample, population : int
            Participants m of each round and workers W, ``1 <= m <= W``.
        rounds : int
            Number of rounds, >= 1.

        Returns
        -------
        float
            At least 0.

        Raises
        ------
        ImportError
            If dp-accounting is not installed.
        """
        if not noise:
            return math.inf
        from dp_accounting import GaussianDpEvent, NeighboringRelation, SampledWithoutReplacementDpEvent
        from dp_accounting.rdp import RdpAccountant

        event = GaussianDpEvent(noise / 2)
        if sample < population:
            event = SampledWithoutReplacementDpEvent(population, sample, event)
        accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
        return float(accountant.compose(event, rounds).get_epsilon(self.delta))

    def measure(self, snapshot: Snapshot, memory: Memory) -> tuple[dict[str, float], Memory]:
        """Return ``epsilon`` after the rounds so far."""
        strategy, sample = snapshot.strategy, int(memory["of"]["sample"])
        assert isinstance(strategy, DPFedAvg)
        if not is_due(snapshot.round, self.per_decade) and snapshot.round != int(memory["of"]["rounds"]):
            return {}, memory
        workers = snapshot.federation.train.num_workers
        return {"epsilon": self.epsilon(strategy.noise, sample, workers, snapshot.round)}, memory
