"""Streaming DiLoCo: the model is sent a fragment at a time, while workers go on computing."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedsim import checks, tree
from fedsim.tree import Stack, Tree
from strategies.base import Broadcast, MeanRule, Report, State, Traffic
from strategies.diloco import nesterov


@dataclass(frozen=True)
class StreamingDiLoCo(MeanRule):
    """`DiLoCo` on one fragment of the model in each round, in turn, whose result arrives ``delay`` local steps later.

    Fragments f = 0 .. P - 1 are runs of the model's tensors, in their order, of nearly equal sizes. Round r sends the
    fragment ``f = (r - 1) mod P``: ``D = theta_f - sum_i p_i theta_i,f`` and a step of Nesterov's momentum on ``theta_f`` (see `DiLoCo`). Workers do
    not wait: ``delay`` steps into the next round each moves its own fragment as it is then,
    ``theta_i,f <- keep theta_i,f + (1 - keep) theta_f``. The rest of the model stays as it is.

    A round is the time between two fragments: with ``H`` local steps between two syncs of the same fragment, write
    ``local-steps = H / P``. What is sent hides behind ``delay`` steps of computation; only what takes longer is added to
    the simulated time. With ``fragments = 1, delay = 0, keep = 0`` this is `DiLoCo`. Bytes are those of the
    fragment, up and down.

    Parameters
    ----------
    lr : float
        Outer learning rate, > 0.
    momentum : float
        Outer momentum, in [0, 1).
    fragments : int
        Fragments P, from 1 to the number of the model's tensors.
    delay : int
        Local steps between sending a fragment and receiving it, in [0, local-steps).
    keep : float
        Share of a worker's own value in what it goes on with, in [0, 1].
    weighting : {"samples", "uniform"}
        Which ``p_i``: proportional to the number of training rows of worker ``i``, or equal (default).

    Raises
    ------
    ValueError
        If a value is outside its range.

    References
    ----------
    Douillard et al. (2025), Streaming DiLoCo with overlapping communication, arXiv:2501.18512.
    """

    keeps_rows: ClassVar[bool] = True
    keeps_state: ClassVar[bool] = True

    lr: float = 0.4
    momentum: float = 0.9
    fragments: int = 4
    delay: int = 0
    keep: float = 0.5
    weighting: Literal["samples", "uniform"] = field(default="uniform", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive(self, "lr")
        checks.unit(self, "momentum")
        checks.at_least(self, 1, "fragments")
        checks.nonnegative(self, "delay")
        if not 0 <= self.keep <= 1:
            raise ValueError(f"StreamingDiLoCo: keep = {self.keep!r} must be in [0, 1]")

    @property
    def follows(self) -> Literal["never"] | int:
        """The step behind which the fragment arrives, unless it arrives at once."""
        return self.delay or "never"

    def init(self, theta: Tree, num_workers: int) -> tuple[State, Broadcast]:
        """Start with velocity 0; there must be a tensor for each fragment."""
        turn = {k: torch.tensor(f) for f, names in enumerate(cut(theta, self.fragments)) for k in names}
        syncs = {"count": torch.zeros((), dtype=torch.int64)}
        state = {"model": theta, "velocity": tree.zeros_like(theta), "turn": turn, "syncs": syncs}
        return state, {"model": theta}

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Make the outer step on the fragment that is due."""
        count = int(state["syncs"]["count"])
        names = [k for k, f in state["turn"].items() if int(f) == count % self.fragments]
        own, velocity, sent = ({k: x[k] for k in names} for x in (state["model"], state["velocity"], rows))
        gap = tree.sub(own, tree.mean(sent, report.weight))
        fragment, velocity = nesterov(own, velocity, gap, self.lr, self.momentum)
        model = state["model"] | fragment
        velocity, syncs = state["velocity"] | velocity, {"count": torch.tensor(count + 1)}
        return state | {"model": model, "velocity": velocity, "syncs": syncs}, {
            "model": model,
            "fragment": fragment,
        }

    def adopt(self, row: Tree, broadcast: Broadcast, worker: Tensor) -> Tree:
        """Take the fragment in, if it arrives at once."""
        return row if self.delay else self._mixed(row, broadcast)

    def follow(self, row: Tree, anchor: Tree, broadcast: Broadcast, worker: Tensor, period: int) -> Tree:
        """Take the fragment in that has arrived by now."""
        return self._mixed(row, broadcast)

    def _mixed(self, row: Tree, broadcast: Broadcast) -> Tree:
        fragment = broadcast.get("fragment", {})
        return row | {k: self.keep * row[k] + (1 - self.keep) * x for k, x in fragment.items()}

    def traffic(self, broadcast: Broadcast, num_workers: int) -> Traffic:
        """Count the fragment up and down for each worker, behind ``delay`` steps."""
        entries = tree.num_parameters(broadcast["fragment"])
        return Traffic(num_workers, 1, entries=entries, overlap=self.delay)


def cut(theta: Tree, fragments: int) -> list[list[str]]:
    """Cut a model's tensors into runs of nearly equal numbers of entries.

    Parameters
    ----------
    theta : Tree
        The model.
    fragments : int
        Runs, >= 1.

    Returns
    -------
    list of list of str
        Names of the tensors of each run; no run is empty.

    Raises
    ------
    ValueError
        If there are more fragments than tensors.

    Examples
    --------
    >>> cut({"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(5), "d": torch.zeros(1)}, 2)
    [['a', 'b'], ['c', 'd']]
    """
    names = [*theta]
    if fragments > len(names):
        raise ValueError(
            f"fragments = {fragments} must be <= {len(names)}, the number of the model's tensors"
        )
    before = [0, *accumulate(x.numel() for x in theta.values())]
    ends = [0]
    for f in range(1, fragments):
        wanted = f * before[-1] / fragments
        possible = range(ends[-1] + 1, len(names) - (fragments - f) + 1)
        ends.append(min(possible, key=lambda i: abs(before[i] - wanted)))
    return [names[a:b] for a, b in pairwise([*ends, len(names)])]
