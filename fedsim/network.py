"""What rounds would cost on a network: the simulated clock."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsim import checks
from fedsim.probes import Clock
from fedsim.tree import Tree

if TYPE_CHECKING:
    from strategies import Broadcast, Report, Traffic


@dataclass(frozen=True)
class Network:
    """Costs of the simulated clock.

    A round lasts ``max_i step d_i steps_i + 2 latency + (bytes_up + bytes_down) / bandwidth`` seconds, with the workers'
    durations ``d_i`` of the schedule, the bytes being those of one worker: workers compute and communicate side by side,
    and the sync waits for the last one. What is sent for evaluation only is not counted.

    Parameters
    ----------
    step : float
        Seconds of one local step, >= 0.
    latency : float
        Seconds a message takes one way, >= 0.
    bandwidth : float
        Bytes a second of a worker's link, > 0.

    Raises
    ------
    ValueError
        If a value is outside its range.
    """

    step: float = 1.0
    latency: float = 0.0
    bandwidth: float = math.inf

    def __post_init__(self) -> None:
        checks.nonnegative(self, "step", "latency")
        checks.positive(self, "bandwidth")

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
            work = int(report.steps.max()) if len(report.worker) else 0
        seconds, up, down = self.sync(work, len(report.worker), theta, broadcast, traffic)
        return Clock(
            clock.sim_time + seconds,
            clock.gradients + int(report.gradients.sum()),
            clock.local_steps + int(report.steps.sum()),
            clock.bytes_up + up,
            clock.bytes_down + down,
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
        own = (row if traffic.up else 0) + traffic.numbers * number
        down = traffic.down * row
        seconds = self.step * work + 2 * traffic.trips * self.latency + (own + down) / self.bandwidth
        return seconds, traffic.up * row + m * traffic.numbers * number, m * down


def num_bytes(a: Tree) -> int:
    """Count the bytes of a tree's entries."""
    return sum(x.numel() * x.element_size() for x in a.values())
