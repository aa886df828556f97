"""What happens in a round: all workers together, or one after the other as they come."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedsim import tree
from fedsim.carriers import Answers, Carrier, LiveCarrier
from fedsim.cohort import Trained
from fedsim.curvature import answer
from fedsim.errors import RunFailed
from fedsim.experiment import Experiment
from fedsim.federation import Federation
from fedsim.probes import Clock
from fedsim.schedule import FreeRunning, participants
from fedsim.tree import Stack, Tree
from strategies import Broadcast, Report, Rule, State


class Server(NamedTuple):
    """What is known at the server between rounds.

    Attributes
    ----------
    state : dict of str to Tree
        The strategy's.
    broadcast : dict of str to Tree
        What was sent last.
    clock : Clock
        Counters.
    timetable : Tree
        When each worker comes next, and what it will bring, where workers come alone (see `_Line`).
    """

    state: State
    broadcast: Broadcast
    clock: Clock
    timetable: Tree


class Played(NamedTuple):
    """A round that has been played, up to its sync.

    Attributes
    ----------
    server : Server
        After the sync.
    sent : Broadcast
        What the workers had received when they began.
    rows, after : Stack
        Rows that reached the server, and with which the workers go on.
    told : Report
        One entry a row, with the losses that the strategy asks for.
    report : Report
        One entry a worker, or an arrival.
    before : Stack or None
        Rows at the start of the round, where they are at hand.
    excluded, lost : list of int
        Workers left out because they were not finite, and workers that had lost their rows.
    failures : dict of str to str
        Nodes that did not answer, and why.
    figures : dict of str to float
        Further entries of the line of history.
    """

    server: Server
    sent: Broadcast
    rows: Stack
    after: Stack
    told: Report
    report: Report
    before: Stack | None
    excluded: list[int]
    lost: list[int]
    failures: dict[str, str]
    figures: dict[str, float]


def play(
    experiment: Experiment, federation: Federation, carrier: Carrier, server: Server, round: int, whole: bool
) -> Played:
    """Play a round.

    Parameters
    ----------
    experiment : Experiment
        The run.
    federation : Federation
        Its data and model.
    carrier : Carrier
        Where the workers live.
    server : Server
        What is known before the round.
    round : int
        Round, from 1.
    whole : bool
        Whether every row is wanted at the server.

    Returns
    -------
    Played
        What happened.

    Raises
    ------
    RunFailed
        If no worker is left.
    """
    if isinstance(experiment.parts.schedule, FreeRunning):
        return _one_by_one(experiment, federation, carrier, server, round)
    return _together(experiment, federation, carrier, server, round, whole)


def _together(
    experiment: Experiment, federation: Federation, carrier: Carrier, server: Server, round: int, whole: bool
) -> Played:
    parts, strategy = experiment.parts, experiment.parts.strategy
    if round == 1 and strategy.ranks_first:
        server = _rank(experiment, federation, carrier, server)
    state, broadcast, clock, timetable = server
    if round == 1:
        state, broadcast = answer(experiment, federation, carrier, state, broadcast)
    device = next(iter(federation.theta.values())).device
    workers = participants(experiment, round)
    choosing = strategy.upload == "chosen"
    limit = experiment.max_update_norm
    upload = "reports" if choosing else "rows" if whole or limit or strategy.upload == "rows" else "mean"
    asked: dict[str, str] = {}
    if strategy.asks:
        broadcast, asked = _ask(carrier, strategy, broadcast, workers, device)
    answers = carrier.train(round, workers, broadcast, upload)
    if limit:
        answers = answers._replace(trained=[_within(t, broadcast["model"], limit) for t in answers.trained])
    told, report, excluded = _join(answers)
    if not len(told.worker):
        raise RunFailed(_nobody(round, excluded, answers.failures, limit))
    sent, failures = broadcast, asked | answers.failures
    if choosing:
        told, rows, merged = _chosen(carrier, experiment, state, told, whole, failures)
        if not len(told.worker):
            raise RunFailed(_nobody(round, excluded, failures))
    else:
        rows = merged = tree.concat([t.rows for t in answers.trained if len(t.told.worker)])
    state, broadcast = strategy.merge(state, merged, _on(told, device))
    if strategy.carries:
        rows = {k: rows[k] for k in federation.theta}
    state, broadcast = answer(experiment, federation, carrier, state, broadcast)
    carrier.adopt(broadcast)
    work = parts.schedule.work(experiment, round, report.worker, report.steps - report.idle)
    traffic = strategy.traffic(broadcast, len(report.worker))
    network = parts.network.among(report.worker, experiment.num_workers, experiment.seed)
    clock = network.tick(clock, report, federation.theta, broadcast, work, traffic)
    if choosing and not whole:
        leads = torch.isin(told.worker, strategy.choose(state, told))
        told = Report(*(x[leads] for x in told))
    after, before = rows, answers.before
    if strategy.keeps_rows:
        after = torch.vmap(strategy.adopt, in_dims=(0, None, 0))(rows, broadcast, told.worker.to(device))
    if before is not None and tree.num_rows(before) != tree.num_rows(rows):
        before = None
    return Played(
        Server(state, broadcast, clock, timetable), sent, rows, after, told, report, before, excluded,
        list(answers.lost), failures, {},
    )  # fmt: skip


def _within(trained: Trained, model: Tree, limit: float) -> Trained:
    """Leave out the workers whose update is longer than allowed, whatever they say of themselves."""
    rows = trained.rows
    if not rows:
        return trained
    squares = [(rows[k] - x).double().square().flatten(1).sum(1) for k, x in model.items()]
    good = (torch.stack(squares).sum(0).sqrt() <= limit).cpu()
    if bool(good.all()):
        return trained
    kept = good.to(next(iter(rows.values())).device)
    told, report = (Report(*(x[good] for x in r)) for r in (trained.told, trained.report))
    excluded = sorted([*trained.excluded, *trained.report.worker[~good].tolist()])
    before = None if trained.before is None else tree.take(trained.before, kept)
    return Trained(tree.take(rows, kept), told, report, excluded, before)


def _chosen(
    carrier: Carrier,
    experiment: Experiment,
    state: State,
    told: Report,
    whole: bool,
    failures: dict[str, str],
) -> tuple[Report, Stack, Stack]:
    """Fetch the rows of the chosen, choosing again without those whose node does not answer."""
    while len(told.worker):
        chosen = experiment.parts.strategy.choose(state, told)
        found = carrier.fetch(told.worker if whole else chosen)
        failures |= found.failures
        if not found.failures:
            if not whole:
                return told, found.rows, found.rows
            return told, found.rows, tree.take(found.rows, torch.isin(found.worker, chosen))
        asked = told.worker if whole else chosen
        gone = asked[~torch.isin(asked, found.worker)]
        told = Report(*(x[~torch.isin(told.worker, gone)] for x in told))
    return told, {}, {}


def _ask(
    carrier: Carrier, strategy: Rule, broadcast: Broadcast, workers: Tensor, device: torch.device
) -> tuple[Broadcast, dict[str, str]]:
    """Ask the workers, and return the broadcast with which they begin their steps; also name nodes that did not answer."""
    answers = carrier.train(0, workers, broadcast, "reports")
    told, _, excluded = _join(answers)
    if not len(told.worker):
        raise RunFailed(_nobody(0, excluded, answers.failures))
    return strategy.inform(broadcast, _on(told, device)), dict(answers.failures)


def _rank(experiment: Experiment, federation: Federation, carrier: Carrier, server: Server) -> Server:
    """Let the strategy choose among the workers before their first step."""
    strategy, (state, broadcast, clock, timetable) = experiment.parts.strategy, server
    answers = carrier.train(0, torch.arange(experiment.num_workers), broadcast, "reports")
    told, report, excluded = _join(answers)
    told, _, rows = _chosen(carrier, experiment, state, told, False, answers.failures)
    if answers.failures:
        raise RunFailed(_nobody(0, excluded, answers.failures))
    state, broadcast = strategy.merge(state, rows, _on(told, next(iter(federation.theta.values())).device))
    traffic = strategy.traffic(broadcast, len(report.worker))
    network = experiment.parts.network.among(report.worker, experiment.num_workers, experiment.seed)
    clock = network.tick(clock, report, federation.theta, broadcast, 0.0, traffic)
    return Server(state, broadcast, clock, timetable)


def _one_by_one(
    experiment: Experiment, federation: Federation, carrier: Carrier, server: Server, round: int
) -> Played:
    """Handle the arrivals of a round; before the first, all workers come once with the rows from which they start."""
    schedule = experiment.parts.schedule
    assert isinstance(schedule, FreeRunning)
    sent, line = server.broadcast, _Line(experiment, federation, carrier, server)
    for _ in range(schedule.arrivals or experiment.num_workers):
        line.next()
    if len(line.excluded) >= len(line.told):
        raise RunFailed(_nobody(round, line.excluded, line.failures))
    told = Report(*(torch.cat(column) for column in zip(*line.told, strict=True)))
    rows = tree.concat(line.rows)
    staleness = torch.tensor(line.staleness, dtype=torch.float64)
    # How often each worker has come with local steps, from the first round on.
    came = line.timetable["period"] - 1 + line.timetable.get("waits", 0)
    figures = {
        "staleness.mean": staleness.mean().item(),
        "staleness.max": staleness.max().item(),
        "arrivals.min": came.min().item(),
        "arrivals.max": came.max().item(),
    }
    server = Server(line.state, line.broadcast, line.clock, line.timetable)
    return Played(
        server, sent, rows, rows, told, told, None, line.excluded, line.lost, line.failures, figures
    )  # fmt: skip


class _Line:
    """Workers that come one after the other.

    The timetable holds for each worker: ``time`` of its next arrival in seconds, ``period``, how often it was sent off, ``seen``, the
    arrivals before it was sent off last; and of what it brings: ``loss``, ``steps``, ``gradients``, ``idle``, ``good``. Where workers wait
    for each other: ``waits``, and ``opened`` and ``last``, the times of the first and the last arrival of the window, -1 if none is open.
    """

    def __init__(
        self, experiment: Experiment, federation: Federation, carrier: Carrier, server: Server
    ) -> None:
        self.experiment, self.federation, self.carrier = experiment, federation, carrier
        schedule = experiment.parts.schedule
        assert isinstance(schedule, FreeRunning)
        self.grace = None if isinstance(carrier, LiveCarrier) else schedule.grace
        self.state, self.broadcast, self.clock = server.state, server.broadcast, server.clock
        self.timetable = {k: x.cpu() for k, x in server.timetable.items()}
        self.device = next(iter(federation.theta.values())).device
        self.durations = schedule.durations_of(experiment.num_workers, experiment.seed)
        self.told: list[Report] = []
        self.rows: list[Stack] = []
        self.staleness: list[int] = []
        self.excluded: list[int] = []
        self.lost: list[int] = []
        self.failures: dict[str, str] = {}
        if not self.timetable:
            self._open()
        elif (
            isinstance(carrier, LiveCarrier) and not carrier.away
        ):  # resumed: who was on the way is sent off again
            for worker in range(experiment.num_workers):
                carrier.begin(worker, int(self.timetable["period"][worker]), self.broadcast)

    def next(self) -> None:
        """Take in the next worker and send it off again."""
        if isinstance(self.carrier, LiveCarrier):
            if not self.carrier.away:
                return
            worker, trained, failure, lost = self.carrier.arrive()
            if failure is not None:
                self.failures[failure[0]] = failure[1]
                return
            if lost:
                self.lost.append(worker)
            assert trained is not None
            if not len(trained.report.worker):
                self.excluded.append(worker)
                self.carrier.begin(worker, int(self.timetable["period"][worker]), self.broadcast)
                return
            rows, report = trained.rows, trained.report
        else:
            worker = self._first()
            rows = self.carrier.fetch(torch.tensor([worker])).rows
            if not bool(self.timetable["good"][worker]):
                self.excluded.append(worker)
            report = self._report(worker)
        self.staleness.append(int(self.timetable["count"]) - int(self.timetable["seen"][worker]))
        self.told.append(report)
        self.rows.append(rows)
        self.clock = self.clock._replace(
            sim_time=max(self.clock.sim_time, float(self.timetable["time"][worker])),
            gradients=self.clock.gradients + int(report.gradients.sum()),
            local_steps=self.clock.local_steps + int(report.steps.sum()),
            pseudo_syncs=self.clock.pseudo_syncs + int(report.idle.sum()),
            syncs=self.clock.syncs + 1,
        )
        self._exchange(worker, rows, report)

    def _first(self) -> int:
        """Say who comes next, after sending off those that wait where it is time."""
        if self.grace is None:
            time = self.timetable["time"]
            return int((time == time.min()).nonzero()[0])
        limit = self.grace * self.experiment.parts.network.step
        while True:
            time = self.timetable["time"].where(self.timetable["waits"] == 0, torch.inf)
            opened, first = float(self.timetable["opened"]), float(time.min())
            if first < torch.inf and (opened < 0 or first - opened <= limit):
                return int((time == first).nonzero()[0])
            for worker in (self.timetable["waits"] == 1).nonzero().flatten().tolist():
                self._send_off(worker, self.timetable["last"])
            self.timetable["opened"] = torch.tensor(-1.0, dtype=torch.float64)

    def _open(self) -> None:
        """Let all workers come once, at time 0."""
        n = self.experiment.num_workers
        zeros, whole = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.int64)
        self.timetable = {
            "time": zeros, "loss": zeros, "period": whole, "seen": whole, "steps": whole, "gradients": whole,
            "idle": whole, "good": whole + 1, "count": whole.new_zeros(()),
        }  # fmt: skip
        if self.grace is not None:
            self.timetable |= {"waits": whole, "opened": zeros[0] - 1, "last": zeros[0]}
            for worker in range(n):
                self._send_off(worker, zeros[0])
            return
        starts, theta = self.federation.starts, self.federation.theta
        for worker in range(n):
            own = tree.tree_map(lambda x: x[None], theta)
            if starts is not None:
                own = tree.take(starts, slice(worker, worker + 1))
            self._exchange(worker, own, self._report(worker))

    def _exchange(self, worker: int, rows: Stack, report: Report) -> None:
        """Merge one worker's row, and send the worker off, or let it wait."""
        strategy, clock, time = self.experiment.parts.strategy, self.clock, self.timetable["time"][worker]
        there = Report(*(x.to(self.device) for x in report))
        self.state, self.broadcast = strategy.exchange(self.state, rows, there)
        _, up, down = self._costs(worker, 0.0)
        self.clock = clock._replace(bytes_up=clock.bytes_up + up, bytes_down=clock.bytes_down + down)
        self.timetable["count"] = self.timetable["count"] + 1
        if self.grace is None:
            self._send_off(worker, time)
            return
        opened = self.timetable["opened"]
        self.timetable |= {
            "waits": _with(self.timetable["waits"], worker, 1),
            "opened": time if opened < 0 else opened,
            "last": time,
        }

    def _costs(self, worker: int, work: float) -> tuple[float, int, int]:
        """Return the seconds of so much work and an exchange of a worker, and the bytes of the exchange."""
        e, broadcast = self.experiment, self.broadcast
        traffic = e.parts.strategy.traffic(broadcast, 1)
        network = e.parts.network.among(torch.tensor([worker]), e.num_workers, e.seed)
        return network.sync(work, 1, self.federation.theta, broadcast, traffic)

    def _send_off(self, worker: int, at: Tensor) -> None:
        """Let a worker begin its local steps with what the server has now."""
        e, table, one = self.experiment, self.timetable, torch.tensor([worker])
        self.state = e.parts.strategy.depart(self.state, worker)
        period = int(table["period"][worker]) + 1
        granted = e.parts.schedule.steps(e, period)
        steps = e.local_steps if granted is None else int(granted[worker])
        new: dict[str, Any] = {"period": period, "seen": table["count"], "waits": 0, "idle": 0}
        if isinstance(self.carrier, LiveCarrier):
            self.carrier.begin(worker, period, self.broadcast)
        else:
            self.carrier.adopt(self.broadcast, one)
            trained = self.carrier.train(period, one, self.broadcast, "reports").trained[0]
            new |= {"good": len(trained.report.worker), "steps": steps, "gradients": 0}
            if new["good"]:
                told = trained.report
                new |= {"loss": told.loss[0], "gradients": told.gradients[0], "idle": told.idle[0]}
        new["time"] = at + self._costs(worker, float(self.durations[worker]) * (steps - int(new["idle"])))[0]
        self.timetable = {k: _with(x, worker, new[k]) if k in new else x for k, x in table.items()}

    def _report(self, worker: int) -> Report:
        table = self.timetable
        one = torch.tensor([worker])
        weight = self.experiment.parts.strategy.weight(torch.ones(1))
        done = (table[k][one] for k in ("steps", "gradients", "idle"))
        return Report(one, table["loss"][one], weight, *done)


def _with(x: Tensor, index: int, value: float | int | Tensor) -> Tensor:
    x = x.clone()
    x[index] = value
    return x


def _join(answers: Answers) -> tuple[Report, Report, list[int]]:
    told = [t.told for t in answers.trained]
    reports = [t.report for t in answers.trained]
    excluded = [w for t in answers.trained for w in t.excluded]
    if len(told) == 1:
        return told[0], reports[0], excluded
    empty = torch.zeros(0, dtype=torch.int64)
    if not told:
        nothing = Report(empty, empty.double(), empty.double(), empty, empty)
        return nothing, nothing, excluded
    joined = [Report(*(torch.cat(c) for c in zip(*r, strict=True))) for r in (told, reports)]
    return joined[0], joined[1], excluded


def _on(report: Report, device: torch.device) -> Report:
    return report if device.type == "cpu" else Report(*(x.to(device) for x in report))


def _nobody(number: int, excluded: list[int], failures: dict[str, str], limit: float = 0.0) -> str:
    if failures:
        return f"round {number}: no node answered: " + "; ".join(f"{k}: {v}" for k, v in failures.items())
    if limit:
        return (
            f"round {number}: parameters or losses of all {len(excluded)} workers are not finite, or their updates are "
            f"longer than max-update-norm = {limit:g}; the last good model is that of round {number - 1}"
        )
    return (
        f"round {number}: parameters or losses of all {len(excluded)} workers are not finite; the last good "
        f"model is that of round {number - 1}; a smaller learning rate may help"
    )
