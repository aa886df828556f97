"""What a probe is: a pure function of a snapshot. No rule knows that they exist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from fedsim.tree import Stack, Tree

if TYPE_CHECKING:
    from fedsim.experiment import Experiment
    from fedsim.federation import Federation
    from strategies import Broadcast, Report, Rule, State

Memory = dict[str, Tree]
"""What a probe remembers between rounds: trees by name, saved with every checkpoint."""


class Clock(NamedTuple):
    """Sums since the start of the run.

    Attributes
    ----------
    sim_time : float
        Simulated seconds (see `fedsim.network.Network`).
    gradients : int
        Gradients computed, over all workers.
    local_steps : int
        Local steps made, over all workers.
    bytes_up, bytes_down : int
        Bytes that workers would send and receive, were each a machine of its own.
    pseudo_syncs : int
        Those of the local steps that computed no gradient, over all workers; the others are optimiser steps.
    syncs : int
        Times that the server merged.
    """

    sim_time: float = 0.0
    gradients: int = 0
    local_steps: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    pseudo_syncs: int = 0
    syncs: int = 0

    @property
    def optimiser_steps(self) -> int:
        """Local steps that made use of gradients."""
        return self.local_steps - self.pseudo_syncs


@dataclass(frozen=True)
class Snapshot:
    """One round, after its sync.

    Attributes
    ----------
    round : int
        Rounds done, from 1.
    model : Tree
        The model that is evaluated.
    rows : Stack
        What the server merged: the rows after the local steps, or weighted means of groups of them.
    after : Stack
        The rows with which workers go on, where the strategy keeps rows; else the same as ``rows``.
    told : Report
        One entry a row of ``rows``.
    before : Stack or None
        Rows at the start of the round, where ``rows`` are single workers of this process.
    report : Report
        One entry a worker.
    sent : Broadcast
        What the workers had received when they began.
    broadcast : Broadcast
        What the server sends now.
    state : State
        The server's state.
    clock : Clock
        Counters.
    excluded : list of int
        Workers left out because they were not finite.
    failures : dict of str to str
        Nodes that did not answer properly, and why.
    metrics : dict of str to float
        The line of history.
    federation : Federation
        Data and model.
    strategy : Rule
        The strategy.
    """

    round: int
    model: Tree
    rows: Stack
    after: Stack
    told: Report
    before: Stack | None
    report: Report
    sent: Broadcast
    broadcast: Broadcast
    state: State
    clock: Clock
    excluded: list[int]
    failures: dict[str, str]
    metrics: dict[str, float | int | list[int] | dict[str, str] | None]
    federation: Federation
    strategy: Rule


class Probe(Protocol):
    """A measurement: frozen dataclasses that inherit from this and say how to `measure`."""

    @property
    def needs_rows(self) -> bool:
        """Whether single workers' rows must reach the server."""
        return False

    def begin(self, experiment: Experiment, federation: Federation) -> Memory:
        """Return what to remember before the first round, for instance a reference solution; nothing by default.

        Parameters
        ----------
        experiment : Experiment
            The run.
        federation : Federation
            Its data and model.

        Returns
        -------
        dict of str to Tree
            Saved with every checkpoint.
        """
        return {}

    def measure(self, snapshot: Snapshot, memory: Memory) -> tuple[dict[str, float], Memory]:
        """Return figures by name, and what to remember; the run writes them as ``<probe>.<name>``.

        Parameters
        ----------
        snapshot : Snapshot
            The round.
        memory : dict of str to Tree
            What was remembered last.

        Returns
        -------
        tuple of dict and dict
            The figures, possibly none, and the new memory.
        """
        ...
