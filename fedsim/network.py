"""What rounds would cost on a network: the simulated clock."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from fedsim import checks
from fedsim.probes import Clock
from fedsim.random import numpy_generator
from fedsim.tree import Tree

if TYPE_CHECKING:
    from strategies import Broadcast, Report, Traffic


@dataclass(frozen=True)
class Network:
    """Costs of the simulated clock.

    A round lasts ``max_i step d_i steps_i + 2 latency + (bytes_up + bytes_down) / bandwidth`` seconds, with the workers'
    durations ``d_i`` of the schedule, the bytes being those of one worker: workers compute and communicate side by side,
    and the sync waits for the last one. Steps without a gradient, such as pseudo-synchronisations, cost no time; nor does
    what is sent while workers go on computing (see `strategies.Traffic`). What is sent for evaluation only is not counted.

    Parameters
    ----------
    step : float
        Seconds of one local step, >= 0.
    latency : float
        Seconds a message takes one way, >= 0.
    bandwidth : float
        Bytes a second of a worker's link, > 0.
    sigma : float
        Spread of the links, >= 0: worker i has ``latency exp(sigma z_i)`` and ``bandwidth exp(-sigma z_i)``, ``z_i`` normal, drawn
        once a run. A round then lasts as long as over the slowest link of its workers.

    Raises
    ------
    ValueError
        If a value is outside its range.
    """

    step: float = 1.0
    latency: float = 0.0
    bandwidth: float = math.inf
    sigma: float = 0.0

    def __post_init__(self) -> None:
        checks.nonnegative(self, "step", "latency", "sigma")
        checks.positive(self, "bandwidth")

    def among(self, worker: Tensor, num_workers: int, seed: int) -> Network:
        """Return the network with the slowest link of some of the run's workers as everybody's.

        Parameters
        ----------
        worker : Tensor
            ``[m]`` ids.
        num_workers : int
            Workers of the run.
        seed : int
            Seed of the run.

        Returns
        -------
        Network
            Without a spread.
        """
        if self.sigma == 0 or not len(worker):
            return self
        noise = numpy_generator(seed, "links").standard_normal(num_workers)
        slower = math.exp(self.sigma * noise[worker.cpu().numpy()].max())
        return replace(self, latency=self.latency * slower, bandwidth=self.bandwidth / slower, sigma=0.0)

    def tick(
        self,
        clock: Clock,
        report: Report,
        theta: Tree,
        broadcast: Broadcast,
        work: float | None = None,
        traffic: Traffic | None = None,
    ) -> Clock:
        """Add one round.

        Parameters
        ----------
        clock : Clock
            Before it.
        report : Report
            One entry a worker.
        theta : Tree
            A row.
        broadcast : dict of str to Tree
            What the workers receive.
        work : float or None
            How long they compute, in local steps; None for as many as the most that one has made.
        traffic : Traffic or None
            What the sync sends; None for a row up and the broadcast down for each worker.

        Returns
        -------
        Clock
            After it.
        """
        if work is None:
            work = int((report.steps - report.idle).max()) if len(report.worker) else 0
        seconds, up, down = self.sync(work, len(report.worker), theta, broadcast, traffic)
        return Clock(
            clock.sim_time + seconds,
            clock.gradients + int(report.gradients.sum()),
            clock.local_steps + int(report.steps.sum()),
            clock.bytes_up + up,
            clock.bytes_down + down,
            clock.pseudo_syncs + int(report.idle.sum()),
            clock.syncs + (1 if len(report.worker) else 0),
        )

    def sync(
        self, work: float, m: int, theta: Tree, broadcast: Broadcast, traffic: Traffic | None
    ) -> tuple[float, int, int]:
        """Return how long so many steps and a sync of m workers take, in seconds, and the bytes sent up and down."""
        row, number = num_bytes(theta), next(iter(theta.values())).element_size()
        if traffic is None:
            down = sum(num_bytes(channel) for channel in broadcast.values())
            seconds = self.step * work + 2 * self.latency + (row + down) / self.bandwidth
            return seconds, m * row, m * down
        row = row if traffic.entries is None else traffic.entries * number
        sent = row if traffic.row is None else traffic.row
        own = (sent if traffic.up else 0) + traffic.numbers * number
        down = traffic.down * row
        sending = 2 * traffic.trips * self.latency + (own + down) / self.bandwidth
        seconds = self.step * work + max(0.0, sending - self.step * traffic.overlap)
        return seconds, traffic.up * sent + m * traffic.numbers * number, m * down


def num_bytes(a: Tree) -> int:
    """Count the bytes of a tree's entries."""
    return sum(x.numel() * x.element_size() for x in a.values())
