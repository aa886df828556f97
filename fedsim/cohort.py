"""The engine: local training of a range of workers, batched."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from clients import LocalRule, LossNormalised, Projection, State
from fedsim import random, threads, tree
from fedsim.batches import Sampler, Sampling
from fedsim.captured import Captured
from fedsim.experiment import BadInput, Experiment
from fedsim.federation import DTYPES, Federation
from fedsim.plans import PLANS, Cut, Done, Follow, Plan, Stacked, Work
from fedsim.precision import products
from fedsim.scores import Scorer
from fedsim.stacked import Unsupported, is_chain, laid_out
from fedsim.step_sizes import settle
from fedsim.tree import Stack, Tree
from strategies import Broadcast, Report

Upload = Literal["rows", "mean", "reports"]
"""What workers give back after their local steps: rows, weighted means, or only what they tell."""

EVALUATION_ROWS = 8192
"""Rows evaluated at a time."""

FEW_ROWS = 128
"""The same on a CPU for models with features at every position of a row, so that these stay in the cache.

A small CNN on 10,000 pictures takes 0.3 s, with 8,192 rows at a time 1.1 s.
"""


class Trained(NamedTuple):
    """What a cohort gives back after its local steps.

    Attributes
    ----------
    rows : Stack
        A row a worker, or one weighted mean a group of workers, or nothing.
    told : Report
        One entry a row, for `strategies.Rule.merge`.
    report : Report
        One entry a worker, for the history.
    excluded : list of int
        Workers whose parameters or loss are not finite; they are in neither.
    before : Stack or None
        Rows at the start of the round, one for each of ``rows`` if these are single workers.
    """

    rows: Stack
    told: Report
    report: Report
    excluded: list[int]
    before: Stack | None = None


class Evaluated(NamedTuple):
    """A model on the workers' own held-out rows: ids, mean loss and accuracy (NaN for regression), ``[m]``."""

    worker: Tensor
    loss: Tensor
    accuracy: Tensor


class Cohort:
    """Workers ``first .. last - 1`` of a federation: their data, and what they keep between rounds.

    Parameters
    ----------
    experiment : Experiment
        The run.
    federation : Federation
        Its data and model.
    first, last : int
        The range of workers.

    Raises
    ------
    BadInput
        If the plan cannot run the model, or a worker has no rows to train on.
    """

    def __init__(self, experiment: Experiment, federation: Federation, first: int, last: int) -> None:
        self.experiment, self.federation = experiment, federation
        self.first, self.last = first, last
        self.strategy = experiment.parts.strategy
        try:
            self.rule = settle(experiment, federation)
        except ValueError as error:
            raise BadInput(f"client = {experiment.client!r}: {error}") from None
        self.device = next(iter(federation.theta.values())).device
        sampling = Sampling(
            experiment.batch_size,
            experiment.local_steps,
            experiment.local_epochs,
            experiment.replacement,
            experiment.seed,
        )
        self.sampler = Sampler(federation.train, sampling, self.device, federation.first)
        self.sizes = federation.train.sizes
        empty = torch.nonzero(self.sizes == 0).flatten() + federation.first
        if len(empty):
            raise BadInput(
                f"partition = {experiment.partition!r}: {len(empty)} workers have no rows, the first is "
                f"{int(empty[0])}; each needs at least one"
            )
        self.attack = experiment.parts.attack
        self.attackers = self.attack.attackers(experiment.num_workers, experiment.seed)
        scored = self.strategy.score is not None
        self.scorer = Scorer(experiment, federation, first, last) if scored else None
        self.chained = is_chain(federation.module)
        self.plan: Plan | None = None
        self.use_plan(experiment.plan)
        self.remembers = bool(self.rule.init(federation.theta))
        self.rows: Stack | None = None
        self.state: State | None = None

    # ------------------------------------------------------------------------------------- training

    def train(self, round: int, workers: Tensor, broadcast: Broadcast, upload: Upload = "rows") -> Trained:
        """Make the local steps of a round.

        Parameters
        ----------
        round : int
            Round, from 1; in round 0 workers tell their scores, or what they are asked, and stay where they are.
        workers : Tensor
            Ids of the participants, ascending, all of this cohort.
        broadcast : Broadcast
            What the server last sent; rows that are kept have adopted it already (see `adopt`).
        upload : {"rows", "mean", "reports"}
            Give back every worker's row, one weighted mean, or no rows (see `fetch`).

        Returns
        -------
        Trained
            In the order of ``workers``.
        """
        if self.strategy.keeps_rows and self.rows is None:
            self.rows = self._everywhere()
        if round == 0 and not self.strategy.asks:
            return self._rank(workers)
        if self.strategy.keeps_state and self.state is None:
            self.state = torch.vmap(self.rule.init)(self._everywhere())
        with threads.enough_for(self._flops(len(workers))):
            parts = [self._chunk(round, chunk, broadcast, upload) for chunk in self._chunks(workers)]
        rows, told = tree.concat([p.rows for p in parts]), _join([p.told for p in parts])
        if upload == "mean" and len(told.worker) > 1:
            rows, told = _group(rows, told)
        report = _join([p.report for p in parts])
        known = [p.before for p in parts if p.before is not None]
        before = tree.concat(known) if len(known) == len(parts) else None
        return Trained(rows, told, report, [w for p in parts for w in p.excluded], before)

    def _chunk(self, round: int, workers: Tensor, broadcast: Broadcast, upload: str) -> Trained:
        m, e = len(workers), self.experiment
        granted = e.parts.schedule.steps(e, round)
        if round == 0:
            granted = torch.ones(e.num_workers, dtype=torch.int64)
        batches = self.sampler.draw(round, workers, None if granted is None else granted[workers])
        order = batches.order.to(self.device)
        identity = batches.active[-1] == m  # all make as many steps: sorting them changed nothing
        ids = workers.to(self.device)
        local = ids - self.first

        def sort(x: Tensor) -> Tensor:
            return x if identity else x[order]

        def restore(x: Tensor) -> Tensor:
            return x if identity else torch.empty_like(x).index_copy_(0, order, x)

        if self.rows is not None:
            whole = m == self.last - self.first
            anchor = self.rows if whole and identity else tree.take(self.rows, sort(local))
        else:
            # A view of one row: plans copy what they change.
            anchor = tree.tree_map(lambda x: x.expand(m, *x.shape), broadcast["model"])
        if self.state is None:
            state = torch.vmap(self.rule.init)(anchor) if self.remembers else {}
        else:
            state = tree.map_nested(lambda x: x[sort(local)], self.state)
        work = Work(
            anchor,
            state,
            broadcast,
            self.federation.dataset.x,
            self.federation.dataset.y,
            batches,
            sort(ids),
            random.key(e.seed, "steps", round),
            self._follow(anchor, broadcast, sort(ids)),
            self.scorer is not None and self.scorer.records,
            self._cut(round),
        )
        done = self._run(work)
        rows = tree.tree_map(restore, done.rows)
        steps = batches.steps
        if not identity:
            steps = torch.empty_like(steps).index_copy_(0, batches.order, steps)
        rows = self._attack(round, workers, anchor, restore, rows)
        weight = self.strategy.weight(self.sizes[workers - self.federation.first])
        # A mean is finite only if all rows are, and a sum only if all that is in it is (or nearly overflows).
        averaged = upload == "mean" and not self.strategy.carries
        mean = tree.mean(rows, weight.to(self.device)) if averaged else None
        total = _sums(rows) if mean is None else torch.stack([x.sum() for x in mean.values()]).sum()
        sums = [done.loss, done.gradients] if done.idle is None else [done.loss, done.gradients, done.idle]
        # The only moment of a round at which the host waits for the device.
        loss, gradients, *idle, total = torch.stack([*map(restore, sums), restore(done.loss) + total]).cpu()
        counts = [x.to(torch.int64) for x in (gradients, *idle)]
        report = Report(workers, loss / steps, weight, steps, *counts)
        after = {} if self.state is None else tree.map_nested(restore, tree.flatten_nested(done.state))
        losses = None if done.losses is None else restore(done.losses).cpu()
        excluded: list[int] = []
        finite = torch.ones_like(workers, dtype=torch.bool)
        if not math.isfinite(total.sum().item()):  # find out whose row it is
            mean, finite = None, torch.isfinite(loss + _sums(rows).cpu())
            excluded = workers[~finite].tolist()
        if excluded:  # the others keep the row and the state that they had
            good = finite.to(self.device)
            rows, after, local = tree.take(rows, good), tree.take(after, good), local[good]
            report = Report(*(x[finite] for x in report))
            losses = None if losses is None else losses[finite]
        told = report
        if self.scorer is not None:
            if losses is not None:
                self.scorer.remember(report.worker, losses, report.steps)
            told = report._replace(loss=self.scorer.of(round, report.worker, rows, self._beside))
        if self.rows is not None:
            self.rows = _put(self.rows, rows, local)
        if self.state is not None:
            self.state = tree.unflatten_nested(_put(tree.flatten_nested(self.state), after, local))
        if self.strategy.carries:
            rows = rows | {k: x for k, x in after.items() if k.partition("/")[0] in self.strategy.carries}
        if upload == "mean" and len(report.worker):
            rows, told = _group(rows, report, mean)
            return Trained(rows, told, report, excluded)
        before = tree.tree_map(restore, anchor)
        before = tree.take(before, finite) if excluded else before
        return Trained({} if upload == "reports" else rows, told, report, excluded, before)

    def _attack(
        self, round: int, workers: Tensor, anchor: Stack, restore: Callable[[Tensor], Tensor], rows: Stack
    ) -> Stack:
        """Replace the rows of attackers by what they send."""
        if not self.attack.corrupts:
            return rows
        bad = torch.nonzero(self.attackers[workers]).flatten().to(self.device)
        if not len(bad):
            return rows
        before = tree.take(tree.tree_map(restore, anchor), bad)
        sent = self.attack.corrupt(
            before, tree.take(rows, bad), round, workers.to(self.device)[bad], self.experiment.seed
        )
        return tree.tree_map(lambda x, y: x.index_copy(0, bad, y), rows, sent)

    def _cut(self, round: int) -> Cut | None:
        """Draw other parts of the pictures in each round, where the data wish for it."""
        cuts = self.federation.dataset.cuts
        return None if cuts is None else partial(cuts.cut, random.key(self.experiment.seed, "cuts", round))

    def _follow(self, anchor: Stack, broadcast: Broadcast, ids: Tensor) -> Follow | None:
        """Batch the strategy's part of local steps."""
        when, period = self.strategy.follows, self.experiment.local_steps
        if when == "never":
            return None
        batched = self.strategy.follower(anchor, broadcast, ids, period)

        def follow(t: int, rows: Stack, at: slice, own: bool) -> Stack:
            if (t and when == "first") or (isinstance(when, int) and t != when - 1):
                return rows
            return batched(rows if own else tree.clone(rows), at)

        return follow

    def _rank(self, workers: Tensor) -> Trained:
        """Score workers where they stand."""
        assert self.scorer is not None
        rows = self.fetch(workers)
        none = torch.zeros(len(workers), dtype=torch.int64)
        score = self.scorer.of(0, workers, rows, self._beside)
        weight = self.strategy.weight(self.sizes[workers - self.federation.first])
        report = Report(workers, score, weight, none, none)
        return Trained({}, report, report, [], rows)

    def fetch(self, workers: Tensor) -> Stack:
        """Return the kept rows of some workers of this cohort, in their order."""
        if self.rows is None:
            self.rows = self._everywhere()
        return tree.take(self.rows, workers.to(self.device) - self.first)

    def adopt(self, broadcast: Broadcast, workers: Tensor | None = None) -> None:
        """Move the kept rows, or those of some workers, as the strategy says; strategies that keep none have none."""
        if not self.strategy.keeps_rows:
            return
        if self.rows is None:
            self.rows = self._everywhere()
        if workers is None:
            workers = torch.arange(self.first, self.last)
        ids = workers.to(self.device)
        adopt = torch.vmap(self.strategy.adopt, in_dims=(0, None, 0))
        whole = len(workers) == self.last - self.first
        rows = self.rows if whole else tree.take(self.rows, ids - self.first)
        self.rows = _put(self.rows, adopt(rows, broadcast, ids), ids - self.first)

    def begin_again(self, broadcast: Broadcast) -> None:
        """Give all workers the row with which one begins that has lost its own; they remember nothing."""
        self.restore({})
        self.rows = tree.replicate(broadcast["model"], self.last - self.first)

    def _everywhere(self) -> Stack:
        """Give each worker of the cohort the initial model."""
        starts = self.federation.starts
        if starts is not None:
            return tree.tree_map(lambda x: x[self.first : self.last].clone(), starts)
        return tree.replicate(self.federation.theta, self.last - self.first)

    def checkpoint(self) -> Tree:
        """Return the kept rows, states and losses, flat, or nothing."""
        kept = {"rows": self.rows or {}, "state": self.state or {}}
        if self.scorer is not None and self.scorer.records:
            kept["score"] = {"recent": self.scorer.recent}
        return tree.flatten_nested(kept)

    def restore(self, saved: Tree) -> None:
        """Put back what `checkpoint` returned."""
        kept = tree.unflatten_nested({k: x.to(self.device) for k, x in saved.items()})
        self.rows, self.state = kept.get("rows"), kept.get("state")
        if self.scorer is not None:
            empty = torch.full_like(self.scorer.recent, torch.nan)
            self.scorer.recent = kept["score"]["recent"].cpu() if "score" in kept else empty

    # ----------------------------------------------------------------------------------- evaluation

    def evaluate(self, model: Tree) -> Evaluated:
        """Evaluate a model on the held-out rows of each worker.

        Parameters
        ----------
        model : Tree
            Parameters.

        Returns
        -------
        Evaluated
            Workers without held-out rows are left out.
        """
        held, first = self.federation.held, self.federation.first
        begin, end = held.offsets[self.first - first], held.offsets[self.last - first]
        rows = held.order[begin:end].to(self.device)
        sizes = held.sizes[self.first - first : self.last - first]
        loss, correct = evaluate(self.federation, model, rows)
        owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        total = torch.zeros(len(sizes), 2, dtype=torch.float64)
        total.index_add_(0, owner, torch.stack([loss, correct], dim=1).cpu())
        some = sizes > 0
        means = total[some] / sizes[some, None]
        return Evaluated(torch.arange(self.first, self.last)[some], means[:, 0], means[:, 1])

    # ---------------------------------------------------------------------------------------- plans

    def use_plan(self, name: str) -> None:
        """Use the named plan from now on; ``auto`` chooses at the next round."""
        self.plan_name = name
        self.plan = None if name == "auto" else self._make(name)

    def _make(self, name: str, rule: LocalRule | None = None) -> Plan:
        e, f = self.experiment, self.federation
        if name == "graph" and self.device.type != "cuda":
            raise BadInput(
                f"plan = 'graph': needs a CUDA device, and this is {str(self.device)!r}; use 'auto'"
            )
        make = Captured if name == "graph" else PLANS[name]
        try:
            return make(f.module, f.objective, rule or self.rule, DTYPES[e.dtype])
        except Unsupported as error:
            raise BadInput(
                f"plan = {name!r}: model = {e.model!r} has a layer without a stacked form ({error}); "
                "use 'vmap', 'loop' or 'auto'"
            ) from None

    def _flops(self, m: int) -> float:
        """Floating-point operations of one batched step of m workers, forward and backward; infinite where not known."""
        if not self.chained:
            return math.inf
        batch = self.experiment.batch_size or int(self.sizes.max())
        return 6.0 * tree.num_parameters(self.federation.theta) * batch * m

    def _beside(self, rule: LocalRule) -> Plan:
        """Make a plan for another rule; not the one in use, which a resumed run knows earlier than this one."""
        wished = self.experiment.plan
        return self._make("vmap" if wished == "auto" else wished, rule)

    def _run(self, work: Work) -> Done:
        if self.plan is None:
            self.plan_name, self.plan = self._fastest(work)
        with products(self.experiment.precision, self.device):
            return self.plan.run(work)

    def _fastest(self, work: Work) -> tuple[str, Plan]:
        """Choose a plan: chains of affine maps are always best stacked, others are timed for two steps."""
        e, f = self.experiment, self.federation
        if isinstance(self.rule, Projection | LossNormalised):  # no batched form
            return "loop", PLANS["loop"](f.module, f.objective, self.rule, DTYPES[e.dtype])
        candidates: dict[str, Plan] = {}
        try:
            stacked = Stacked(f.module, f.objective, self.rule, DTYPES[e.dtype])
            if stacked.chain is not None and self.device.type == "cpu":
                return "stacked", stacked
            candidates["stacked"] = stacked
        except Unsupported:
            candidates["vmap"] = PLANS["vmap"](f.module, f.objective, self.rule, DTYPES[e.dtype])
        candidates["loop"] = PLANS["loop"](f.module, f.objective, self.rule, DTYPES[e.dtype])
        if self.device.type == "cuda":
            candidates["graph"] = Captured(f.module, f.objective, self.rule, DTYPES[e.dtype])
        b = work.batches
        short = work._replace(batches=b._replace(steps=b.steps.clamp(max=2), active=b.active[:2]))
        first = short._replace(batches=b._replace(active=b.active[:1], steps=b.steps.clamp(max=1)))
        seconds: dict[str, float] = {}
        refused: dict[str, RuntimeError] = {}
        for name, plan in candidates.items():
            try:
                with products(e.precision, self.device):
                    plan.run(
                        short if name == "graph" else first
                    )  # a graph is recorded for one number of steps
                    self._synchronise()
                    start = time.perf_counter()
                    plan.run(short)
                    self._synchronise()
                seconds[name] = time.perf_counter() - start
            except RuntimeError as error:
                refused[name] = error
        if not seconds:
            raise next(iter(refused.values()))
        for name, error in refused.items():
            warnings.warn(f"plan = 'auto': {name!r} does not run this model: {error}", stacklevel=2)
        best = min(seconds, key=lambda name: seconds[name])
        return best, candidates[best]

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _chunks(self, workers: Tensor) -> Iterator[Tensor]:
        """Cut the participants where their copies of the model would not fit into memory."""
        if not len(workers):
            return
        e, f = self.experiment, self.federation
        element = next(iter(f.theta.values())).element_size()
        batch = e.batch_size or int(self.sizes[workers - f.first].max())
        features = f.dataset.x[0].numel() * batch * 3
        per_worker = element * (6 * tree.num_parameters(f.theta) + features)
        fitting = max(1, int(memory_budget(self.device) // per_worker))
        yield from (workers,) if len(workers) <= fitting else workers.split(fitting)


def memory_budget(device: torch.device) -> int:
    """Return the bytes that copies of the model may take: half of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 2
    if "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return 4 * 2**30


def evaluate(federation: Federation, model: Tree, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Evaluate a model on rows of the training data, or on the test set.

    Parameters
    ----------
    federation : Federation
        Data, module and objective.
    model : Tree
        Parameters.
    rows : Tensor or None
        Rows of the training data; None for the test set.

    Returns
    -------
    tuple of Tensor
        Loss and correctness of each row, float64; correctness is NaN for regression.
    """
    d, f = federation.dataset, federation
    x, y = (d.test_x, d.test_y) if rows is None else (d.x, d.y)
    n = len(x) if rows is None else len(rows)
    losses, hits, model = [], [], laid_out(f.module, model)
    wide = d.task == "tokens" or any(
        p.ndim > 2 for p in model.values()
    )  # features at every position of a row
    size = min(FEW_ROWS, EVALUATION_ROWS) if wide and d.x.device.type == "cpu" else EVALUATION_ROWS
    with torch.no_grad():
        for start in range(0, n, size):
            part = slice(start, start + size)
            at = part if rows is None else rows[part]
            output = functional_call(f.module, model, (x[at],))
            losses.append(f.objective.loss(output, y[at]).double())
            correct = f.objective.correct(output, y[at])
            hits.append(torch.full_like(losses[-1], torch.nan) if correct is None else correct.double())
    if not losses:
        empty = torch.zeros(0, dtype=torch.float64)
        return empty, empty
    return torch.cat(losses), torch.cat(hits)


def _put(kept: Stack, rows: Stack, local: Tensor) -> Stack:
    """Write rows into those that are kept, without changing the old ones."""
    if kept and len(local) == tree.num_rows(kept):
        return rows
    return {k: kept[k].index_copy(0, local, x) for k, x in rows.items()}


def _sums(rows: Stack) -> Tensor:
    """Add up each worker's parameters, ``[m]`` float64."""
    return torch.stack([x.reshape(len(x), -1).sum(1).double() for x in rows.values()]).sum(0)


def _group(rows: Stack, report: Report, mean: Tree | None = None) -> tuple[Stack, Report]:
    """Replace rows by their weighted mean, and their report by one entry that stands for all."""
    total = report.weight.sum()
    if mean is None:
        mean = tree.mean(rows, report.weight.to(next(iter(rows.values())).device))
    told = Report(
        report.worker[:1],
        ((report.loss * report.weight).sum() / total)[None],
        total[None],
        report.steps.max()[None],
        report.gradients.sum()[None],
        report.idle.sum()[None],
    )
    return tree.tree_map(lambda x: x[None], mean), told


def _join(reports: list[Report]) -> Report:
    if len(reports) == 1:
        return reports[0]
    return Report(*(torch.cat(column) for column in zip(*reports, strict=True)))
