"""Leader SGD: every worker is pulled towards the one that does best, so that only its parameters travel."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedsim import checks, tree
from fedsim.tree import Stack, Tree
from strategies.base import Broadcast, Follower, Report, Rule, Score, State, Traffic

BY = ("running_train", "fresh_batch", "full_batch", "shared_val")


def best(score: Tensor) -> int | None:
    """Return the position of the lowest finite score, the first of equal ones; None if no score is finite."""
    usable = torch.where(score.isfinite(), score, torch.inf)
    if not len(score) or not bool(usable.isfinite().any()):
        return None
    return int((usable == usable.min()).nonzero()[0])


@dataclass(frozen=True)
class _Led(Rule):
    """What leader methods share: groups, the election, and what travels.

    Workers ``0 .. l - 1`` are the first of ``groups`` groups of ``l`` workers, and so on. The broadcast holds
    ``model``, the best worker's row, ``leaders``, the best row of each group (where there is more than one), and
    ``lead``: who they are and how strong they pull in this sync.
    """

    keeps_rows: ClassVar[bool] = True
    keeps_state: ClassVar[bool] = True
    upload: ClassVar[Literal["rows", "mean", "chosen"]] = "chosen"
    recovers: ClassVar[bool] = True
    reported: ClassVar[str] = "average"

    pull: float = 0.1
    groups: int = 1
    pull_global: float = 0.1

    def __post_init__(self) -> None:
        checks.nonnegative(self, "pull", "pull_global")
        checks.at_least(self, 1, "groups")

    def init(self, theta: Tree, num_workers: int) -> tuple[State, Broadcast]:
        """Start with the common initial model as every group's leader, which nobody is.

        Parameters
        ----------
        theta : Tree
            Initial parameters.
        num_workers : int
            A multiple of ``groups``.

        Returns
        -------
        tuple of State and Broadcast
            Pulls of the first broadcast are 0.

        Raises
        ------
        ValueError
            If ``groups`` does not divide ``num_workers``.
        """
        if num_workers % self.groups:
            raise ValueError(
                f"{type(self).__name__}: groups = {self.groups} must divide the number of workers {num_workers}"
            )
        device = next(iter(theta.values())).device
        nobody = torch.full((self.groups,), -1, device=device)
        none = torch.zeros(self.groups, dtype=torch.float64, device=device)
        size = torch.tensor(num_workers // self.groups, device=device)
        lead = {"worker": nobody, "pull": none, "best": nobody[0], "pull_global": none[0], "size": size}
        broadcast = {"model": theta, "lead": lead}
        if self.groups > 1:
            broadcast["leaders"] = tree.replicate(theta, self.groups)
        return {**broadcast, "syncs": {"count": torch.zeros((), dtype=torch.int64)}}, broadcast

    def weight(self, samples: Tensor) -> Tensor:
        """Weigh all workers equally."""
        return torch.ones_like(samples, dtype=torch.float64)

    def choose(self, state: State, report: Report) -> Tensor:
        """Name the worker of lowest finite score in each group, the lowest id among equals."""
        group = report.worker // state["lead"]["size"].to(report.worker.device)
        chosen = []
        for j in range(self.groups):
            mine = (group == j).nonzero().flatten()
            first = best(report.loss[mine])
            if first is not None:
                chosen.append(report.worker[mine[first]])
        return torch.stack(chosen) if chosen else report.worker[:0]

    def global_due(self, sync: int) -> bool:
        """Say whether the pull to the best of all happens in a sync, counted from 1."""
        return self.groups > 1

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Broadcast the leaders of all groups, ranked once; a group without a finite score is not pulled."""
        sync = int(state["syncs"]["count"]) + 1
        chosen, old = self.choose(state, report), state["lead"]
        state = {**state, "syncs": {"count": torch.tensor(sync)}}
        if not len(chosen):
            warnings.warn(f"sync {sync}: no worker has a finite score, nobody leads", stacklevel=2)
            lead = old | {k: torch.zeros_like(old[k]) for k in ("pull", "pull_global")}
            lead["worker"] = torch.full_like(old["worker"], -1)
            return self._send({**state, "lead": lead}, False)
        group = chosen // old["size"].to(chosen.device)
        position = torch.stack([(report.worker == w).nonzero()[0, 0] for w in chosen])
        first = best(report.loss[position])
        assert first is not None
        if tree.num_rows(rows) == len(report.worker):
            rows = tree.take(rows, position)
        worker, pull = torch.full_like(old["worker"], -1), torch.zeros_like(old["pull"])
        worker[group], pull[group] = chosen.to(worker), self.pull
        due = self.global_due(sync)
        lead = {
            "worker": worker,
            "pull": pull,
            "best": chosen[first].to(worker.device),
            "pull_global": torch.full_like(old["pull_global"], self.pull_global if due else 0.0),
            "size": old["size"],
        }
        state |= {"model": tree.take(rows, first), "lead": lead}
        if self.groups > 1:
            state["leaders"] = {
                k: state["leaders"][k].index_copy(0, group.to(x.device), x) for k, x in rows.items()
            }
        return self._send(state, due)

    def _send(self, state: State, due: bool) -> tuple[State, Broadcast]:
        """Say nothing of the pull to the best of all where there is none, so that workers need not make it."""
        lead = {k: x for k, x in state["lead"].items() if due or k != "pull_global"}
        return state, {k: v for k, v in state.items() if k != "syncs"} | {"lead": lead}

    def model(self, state: State, rows: Stack) -> Tree:
        """Evaluate the mean of the rows; between evaluations only the leaders' are known."""
        device = next(iter(rows.values())).device
        return tree.mean(rows, torch.ones(tree.num_rows(rows), dtype=torch.float64, device=device))

    def models(self, state: State, rows: Stack, report: Report) -> dict[str, Tree]:
        """Evaluate the best worker too."""
        return {"leader": state["model"]}

    def traffic(self, broadcast: Broadcast, num_workers: int) -> Traffic:
        """Count a score from each worker, the leaders' rows up, and down to each worker the rows that pull it."""
        lead = broadcast["lead"]
        return Traffic(int((lead["worker"] >= 0).sum()), 1 + ("pull_global" in lead), 1, 2)

    def _local(self, broadcast: Broadcast, worker: Tensor) -> tuple[Tree, Tensor, Tensor]:
        """Return the row, the pull and the id of the leader of a worker's group."""
        lead = broadcast["lead"]
        if self.groups == 1:
            return broadcast["model"], lead["pull"][0], lead["worker"][0]
        group = (worker // lead["size"])[None]
        row = tree.tree_map(lambda x: x[group][0], broadcast["leaders"])
        return row, lead["pull"][group][0], lead["worker"][group][0]


@dataclass(frozen=True)
class LeaderSGD(_Led):
    """Pull every worker towards its group's best worker and, less often, towards the best of all.

    After the local steps of a round, with leaders ``z_j`` and ``z`` ranked once, before any pull:
    ``x <- x - pull (x - z_j)`` for all but the group's leader, then, every ``global_every`` rounds,
    ``x <- x - pull_global (x - z)`` for all but the best of all. A leader stays bit for bit as it is. With
    one group there is only the first pull. Ties go to the lowest id; scores that are not finite never lead; momentum is
    not pulled. With ``schedule = "TotalSteps(...)"`` this is the asynchronous method of the paper.

    ``prox``, ``prox_global``: the stale pull of the paper's later version, after every local step and without communication,
    ``x <- x + (prox_global / T_g) (z' - x)``, then ``x <- x + (prox / T) (z_j - x)``, with the leaders of the last syncs,
    ``T`` local steps in a round and ``T_g = global_every T``. Needs ``local-steps``.

    Parameters
    ----------
    pull, pull_global : float
        Multiply the difference directly, outside of the learning rate, >= 0; 0 leaves workers alone.
    groups : int
        Groups of equal size, >= 1.
    global_every : int
        Rounds between pulls to the best of all, >= 1.
    prox, prox_global : float
        Strength of the stale pulls over a period, >= 0; with one group ``prox_global`` does nothing.
    leader : {"running_train", "fresh_batch", "full_batch", "shared_val"}
        Which loss elects (see `strategies.base.Score`). The first is the paper's, and costs nothing. Where workers have
        different data, a worker's own loss elects the one with the easiest data; "shared_val" is fair and needs ``holdout``.
    window : int
        Minibatch losses of "running_train", rows of "shared_val", >= 1.

    Raises
    ------
    ValueError
        If a value is outside its range.

    References
    ----------
    Teng, Gao, Chalus, Choromanska, Goldfarb, Weller (2019), Leader stochastic gradient descent for distributed
    training of deep learning models, arXiv:1905.10395.
    """

    global_every: int = 2
    prox: float = 0.0
    prox_global: float = 0.0
    leader: Literal["running_train", "fresh_batch", "full_batch", "shared_val"] = "running_train"
    window: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.nonnegative(self, "prox", "prox_global")
        checks.at_least(self, 1, "global_every", "window")
        checks.one_of(self, "leader", BY)

    @property
    def score(self) -> Score:
        """What elects."""
        return Score(self.leader, self.window)

    @property
    def follows(self) -> Literal["never", "first", "every"]:
        """Every step, where there is a stale pull."""
        return "every" if self.prox or (self.prox_global and self.groups > 1) else "never"

    def init(self, theta: Tree, num_workers: int) -> tuple[State, Broadcast]:
        """Start all copies of leaders from the initial model; ``groups`` must divide the number of workers."""
        state, broadcast = super().init(theta, num_workers)
        if self.prox_global and self.groups > 1:
            return state | {"stale": theta}, broadcast | {"stale": theta}
        return state, broadcast

    def global_due(self, sync: int) -> bool:
        """Every ``global_every`` syncs, where there is more than one group."""
        return self.groups > 1 and sync % self.global_every == 0

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Broadcast the leaders; the stale copy of the best of all changes with the pull to it."""
        state, broadcast = super().merge(state, rows, report)
        if "stale" in state and "pull_global" in broadcast["lead"]:
            return self._send(state | {"stale": state["model"]}, True)
        return state, broadcast

    def adopt(self, row: Tree, broadcast: Broadcast, worker: Tensor) -> Tree:
        """Pull to the group's leader, then to the best of all."""
        leader, pull, who = self._local(broadcast, worker)
        row = _towards(row, leader, pull, worker == who)
        lead = broadcast["lead"]
        if "pull_global" not in lead:
            return row
        return _towards(row, broadcast["model"], lead["pull_global"], worker == lead["best"])

    def follower(self, anchor: Stack, broadcast: Broadcast, worker: Tensor, period: int) -> Follower:
        """Make the stale pulls, first to the best of all; whose leader is whose is looked up once a round."""
        first, own = broadcast.get("stale"), broadcast["model"]
        if self.groups > 1:
            own = tree.take(broadcast["leaders"], worker // broadcast["lead"]["size"])

        def pulled(rows: Stack, at: slice) -> Stack:
            if first is not None:
                _draw(rows, first, self.prox_global / (self.global_every * period))
            if self.prox:
                _draw(rows, tree.take(own, at) if self.groups > 1 else own, self.prox / period)
            return rows

        return pulled


@dataclass(frozen=True)
class LeaderGD(_Led):
    """Leader gradient descent: gradient, exact losses and pulls all at the same point, in the first step of a round.

    ``x <- x - lr grad(x) - pull (x - z_j) - pull_global (x - z)`` with the best worker ``z_j`` of the group and ``z`` of all at
    the old ``x``; with one group without the last term. Workers are ranked before the first step too. Needs
    ``batch-size = 0``; with one local step a round it is the method of the paper.

    Parameters
    ----------
    pull, pull_global : float
        Multiply the difference directly, outside of the learning rate, >= 0.
    groups : int
        Groups of equal size, >= 1.

    Raises
    ------
    ValueError
        If a value is outside its range.

    References
    ----------
    Teng et al. (2019), arXiv:1905.10395.
    """

    ranks_first: ClassVar[bool] = True

    @property
    def score(self) -> Score:
        """The exact loss of the row."""
        return Score("full_batch")

    @property
    def follows(self) -> Literal["never", "first", "every"]:
        """The first step of a round."""
        return "first"

    def adopt(self, row: Tree, broadcast: Broadcast, worker: Tensor) -> Tree:
        """Stay: the pull comes with the next gradient."""
        return row

    def follow(self, row: Tree, anchor: Tree, broadcast: Broadcast, worker: Tensor, period: int) -> Tree:
        """Add the pulls at the point where the gradient was taken."""
        leader, pull, _ = self._local(broadcast, worker)
        row = _minus(row, pull, anchor, leader)
        if "pull_global" not in broadcast["lead"]:
            return row
        return _minus(row, broadcast["lead"]["pull_global"], anchor, broadcast["model"])


def _towards(row: Tree, leader: Tree, pull: Tensor, leads: Tensor) -> Tree:
    """Move a row towards a leader, and leave the leader itself exactly where it is."""
    share = torch.where(leads, 0.0, pull)
    return tree.tree_map(lambda x, z: torch.lerp(x, z, share.to(x.dtype)), row, leader)


def _draw(rows: Stack, leader: Tree, share: float) -> None:
    """Move all rows, in place, towards one leader or each towards its own."""
    for k, x in rows.items():
        x.lerp_(leader[k], share)


def _minus(row: Tree, pull: Tensor, at: Tree, leader: Tree) -> Tree:
    return tree.tree_map(lambda x, a, z: x - pull.to(x.dtype) * (a - z), row, at, leader)
