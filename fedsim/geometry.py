"""A run repeated with its end point known: how each local step and each round moves towards it.

Runs repeat exactly, so nothing of the first has to be stored but where it ended. In the second, local rules are wrapped:
the gradient that a step asks for and the update that it makes are compared with the way to the end point, in float64, and
so are those of each round. Training is not changed, and without a wrapper nothing is computed.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from clients import Gaussian, LocalRule, LossNormalised, Oracle, Projection, State, Told
from clients.gaussian import without_direction
from fedsim import random, runs, tree
from fedsim.analysis.geometry import before_last, derive, measures, summarise
from fedsim.carriers import InProcess
from fedsim.checkpoints import replace_file, writing
from fedsim.cohort import Cohort, memory_budget
from fedsim.experiment import BadInput, Experiment
from fedsim.federation import DTYPES, Federation, assemble, load
from fedsim.plans import PLANS, Done, Plan, Work
from fedsim.probes import Snapshot
from fedsim.schedule import FreeRunning
from fedsim.simulate import RunFailed, rounds
from fedsim.stacked import Unsupported
from fedsim.tree import Tree

FOLDER = "geometry"
"""Folder of a run directory that `write` makes."""

CONTROLS = {
    "order": "same start, other minibatches",
    "longer": "run twice as long",
    "start": "other start",
}
"""Other points with which every step is compared: where runs end that differ from this one in one thing."""

PERMUTATIONS = 5
"""Random orders of the rounds, for the control that keeps the steps and forgets their order."""

TOLERANCE = 0.01
"""How far a repeated run may end from the model of the first, as a share of the way from the start.

The two differ by the order of their sums, as plain steps of the first are made in place; nothing else is compared with it.
"""

KEY = "geometry"
"""Channel of the broadcast in which a watched rule finds the points.

``end [P]``, ``others [P, n - 1]``, the ways from the other points to it, and the ``squares`` of their lengths.
"""


@dataclass(frozen=True)
class Watched:
    """Compare each step of a local rule with the way to some points, and write that into its state.

    Parameters
    ----------
    inner : LocalRule
        The rule, which makes its step as ever.
    names : tuple of str
        Parameters in the order of the points' entries.
    decay : float
        Coefficient of the weight decay within ``inner``.
    """

    inner: LocalRule
    names: tuple[str, ...]
    decay: float = 0.0

    def init(self, theta: Tree) -> State:
        """Start the inner rule; there is nothing to write yet."""
        return self.inner.init(theta)

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Make one inner step; where there are points, the state is ``inner`` beside ``seen``, ``[T, 5 + 3 n]``."""
        if KEY not in oracle.broadcast:
            return self.inner.step(theta, state, oracle)
        asked: list[Tree] = []
        inner = self.inner
        if isinstance(inner, Gaussian):  # its noise is the gradient
            inner, oracle = inner.inner, without_direction(oracle)

        def grad(x: Tree) -> tuple[Tree, Tensor]:
            gradient, loss = oracle.grad(x)
            asked.append(gradient)
            return gradient, loss

        new, kept, told = inner.step(theta, state.get("inner", {}), oracle._replace(grad=grad))
        w = _flat(theta, self.names)
        # The first gradient is the one on the minibatch itself: later ones are of perturbed points.
        g = _flat(asked[0], self.names) if asked else torch.full_like(w, math.nan)
        g = torch.where(told.gradients > 0, g, math.nan)
        u, decayed = _flat(new, self.names) - w, g + self.decay * w if self.decay else g
        points = oracle.broadcast[KEY]
        way = w - points["end"]
        # Ways to the other points are sums: nothing of the size of all points is made for each worker.
        apart, turned, moved = ((x[None] @ points["others"])[0] for x in (way, g, u))
        far, dot_g, dot_u = (way * way).sum(), (way * g).sum(), (way * u).sum()
        row = torch.cat([
            torch.stack([
                told.loss.double(),
                g.norm(),
                u.norm(),
                decayed.norm(),
                (way * decayed).sum(),
                far.sqrt(),
            ]),
            (far + 2 * apart + points["squares"]).clamp(min=0).sqrt(),
            dot_g[None],
            dot_g + turned,
            dot_u[None],
            dot_u + moved,
        ])
        seen = state["seen"]
        place = torch.arange(len(seen), device=seen.device)[:, None]
        return new, {"inner": kept, "seen": torch.where(place == oracle.step, row, seen)}, told


class Seen(NamedTuple):
    """What was seen of some workers in a round: ids ``[m]``, steps ``[m]``, numbers ``[m, T, .]``, displacements ``[m, P]``."""

    worker: Tensor
    steps: Tensor
    numbers: Tensor
    moved: Tensor


class Watching:
    """A plan whose local rule is watched while there are ``points``, ``[n, P]``.

    Parameters
    ----------
    plan : Plan
        For a `Watched` rule.
    names : tuple of str
        Parameters in the order of the points' entries.
    """

    def __init__(self, plan: Plan, names: tuple[str, ...]) -> None:
        self.plan, self.names = plan, names
        self.points: Tensor | None = None
        self.seen: list[Seen] = []

    def run(self, work: Work) -> Done:
        """Make all steps of all workers, as the plan does, and keep what was seen."""
        if self.points is None:
            return self.plan.run(work)
        end, others = self.points[0], (self.points[0] - self.points[1:]).T.contiguous()
        m, total, n = len(work.worker), len(work.batches.active), len(self.points)
        empty = torch.full((m, total, 5 + 3 * n), math.nan, dtype=torch.float64, device=work.worker.device)
        done = self.plan.run(
            work._replace(
                state={"inner": work.state, "seen": empty},
                broadcast=work.broadcast
                | {KEY: {"end": end, "others": others, "squares": others.square().sum(0)}},
            )
        )
        moved = torch.cat(
            [(work.anchor[k].double() - done.rows[k].double()).reshape(m, -1) for k in self.names], 1
        )
        self.seen.append(Seen(work.worker, work.batches.steps, done.state["seen"], moved))
        return done._replace(state=done.state.get("inner", {}))


def watch(cohort: Cohort) -> Watching:
    """Let a cohort run its local steps under a plan that can watch them.

    Parameters
    ----------
    cohort : Cohort
        Its plan is replaced: the stacked one, if nothing else is asked for or that cannot be watched.

    Returns
    -------
    Watching
        The new plan.
    """
    e, f = cohort.experiment, cohort.federation
    names = tuple(f.theta)
    rule = Watched(cohort.rule, names, _decay(cohort.rule))
    wished = e.plan if e.plan in ("stacked", "vmap", "loop") else "stacked"
    if isinstance(cohort.rule, Projection | LossNormalised):  # no batched form
        wished = "loop"
    try:
        plan = PLANS[wished](f.module, f.objective, rule, DTYPES[e.dtype])
    except Unsupported:
        plan = PLANS["vmap"](f.module, f.objective, rule, DTYPES[e.dtype])
    cohort.plan = watching = Watching(plan, names)
    return watching


def _decay(rule: Any) -> float:
    """Return the weight decay of a rule or of one that it wraps."""
    own = float(getattr(rule, "weight_decay", 0.0))
    return own or (_decay(rule.inner) if hasattr(rule, "inner") else 0.0)


@dataclass(frozen=True)
class Trace:
    """What a second run has seen; see `fedsim.analysis.geometry` for what the numbers say.

    Attributes
    ----------
    steps : pandas.DataFrame
        A row a local step: ``round``, ``client``, ``local_step``, ``step`` (from 0), ``weight`` (the worker's share of the
        average), ``loss``, ``norm_dist = |w - w*|``, ``norm_grad = |G|``, ``dot_grad = <G, w - w*>``, ``norm_update =
        |u|``, ``dot_update = <u, w - w*>``, all before the update ``u = w+ - w`` of the local rule; the same as
        ``norm_dist.<name>``, ``dot_grad.<name>``, ``dot_update.<name>`` for other points; ``norm_grad_wd``,
        ``dot_grad_wd`` of ``G + lambda w`` where there is weight decay. What a strategy does to rows behind a step is not
        in ``u``.
    rounds : pandas.DataFrame
        A row a round: the same with ``norm_D`` and ``dot_D`` of ``D = sum_k p_k d_k``, where ``d_k`` is the displacement
        of worker k from its row before its steps to that after them (attackers' too, as they trained it), ``u = w_{r+1} -
        w_r`` of the model; ``agreement = |D| / sum_k p_k |d_k|``, 1 where all move the same way; and ``permuted``,
        ``permuted_steps``: gamma of updates at this place in time with the rounds in random order, a mean over orders.
    clients : pandas.DataFrame
        A row a worker and round: ``weight``, ``norm_d = |d_k|`` and ``dot_d = <d_k, w_r - w*>``.
    end : Tree
        The end point ``w*``.
    summary : dict
        ``steps`` and ``rounds`` (see `fedsim.analysis.geometry.summarise`), ``reference`` (a hash of ``w*``), and how it
        was computed.
    """

    steps: pd.DataFrame
    rounds: pd.DataFrame
    clients: pd.DataFrame
    end: Tree
    summary: dict[str, Any]


def trace(
    experiment: Experiment,
    federation: Federation | None = None,
    *,
    further: Mapping[str, Tree] | None = None,
    others: tuple[str, ...] = tuple(CONTROLS),
    permutations: int = PERMUTATIONS,
) -> Trace:
    """Run an experiment twice, and compare every step and round of the second run with the end of the first.

    Parameters
    ----------
    experiment : Experiment
        The run; its probes are left out.
    federation : Federation or None
        Data and model, loaded if None.
    further : mapping or None
        Further points to compare with, by name; one called ``end`` takes the place of the own end point.
    others : tuple of str
        Of `CONTROLS`, those to compare with; each needs another run. One that ends where this run does is left out.
    permutations : int
        Random orders of the rounds, >= 0; they take ``8 R P`` bytes for R rounds and P parameters.

    Returns
    -------
    Trace
        Tables and summary.

    Raises
    ------
    BadInput
        If workers come alone, so that there are no rounds to repeat, or a control is unknown.
    RunFailed
        If the second run does not end where the first has, to the last bit.

    Examples
    --------
    >>> e = Experiment(num_workers=4, rounds=6, local_steps=3, model="Linear()", partition="IID()", dtype="float64")
    >>> found = trace(e, others=(), permutations=0)
    >>> len(found.steps), len(found.rounds), found.summary["rounds"]["positive"]
    (72, 6, 1.0)
    """
    if isinstance(experiment.parts.schedule, FreeRunning):
        raise BadInput(
            f"schedule = {experiment.schedule!r}: workers come alone, and there are no rounds to repeat; "
            "use 'Synchronous()'"
        )
    for name in others:
        if name not in CONTROLS:
            raise BadInput(f"others = {others!r}: {name!r} must be one of {', '.join(CONTROLS)}")
    experiment = experiment.replace({"probes": "", "eval-every": 0, "out": ""})
    federation = load(experiment) if federation is None else federation
    names = tuple(federation.theta)
    size, device = tree.num_parameters(federation.theta), next(iter(federation.theta.values())).device
    if permutations and 16 * experiment.rounds * size > memory_budget(device):
        warnings.warn(
            f"{experiment.rounds} rounds of {size:,} parameters do not fit into memory: no random orders",
            stacklevel=2,
        )
        permutations = 0
    model, passed, end, other_ends = federation.theta, [], federation.theta, {}
    for snapshot, _ in _first_pass(experiment, federation, others, other_ends):
        if permutations:
            passed.append(_flat(snapshot.model, names) - _flat(model, names))
        model = end = snapshot.model
    own = {"end": end} | other_ends | dict(further or {})
    # The end of the same run says nothing more.
    own = {k: x for k, x in own.items() if k not in CONTROLS or not _equal(x, end)}
    fixed = torch.stack([_flat(x, names) for x in own.values()])
    shuffles = _Shuffles(experiment.seed, torch.stack(passed), permutations) if passed else None
    tables, last = _Tables(experiment, names, tuple(own), shuffles), federation.theta
    for snapshot, seen, points in _second_pass(experiment, federation, fixed, shuffles):
        tables.add(snapshot, seen, points, _flat(last, names))
        last = snapshot.model
    if not _equal(last, end):
        raise RunFailed(
            "the second run did not end where the first has, so its steps cannot be compared with that point; the "
            "device may not repeat its sums in the same order: try -o device=cpu"
        )
    return tables.finish(own["end"])


def _first_pass(
    experiment: Experiment, federation: Federation, others: tuple[str, ...], ends: dict[str, Tree]
) -> Iterator[tuple[Snapshot, Any]]:
    """Run the experiment and yield its rounds; then find out where the other runs end."""
    carrier = InProcess(experiment, federation)
    for cohort in carrier.cohorts:
        watch(cohort)
    position = None
    for snapshot, position in rounds(experiment, federation, carrier):
        yield snapshot, position
    again = experiment.replace({"seed": experiment.seed + 1})
    for name in others:
        if name == "longer":
            more = experiment.replace({"rounds": 2 * experiment.rounds})
            *_, (snapshot, _) = rounds(more, federation, carrier, position)
        else:
            beginning = federation
            if name == "start":
                fresh = assemble(again, federation.dataset, federation.train)
                beginning = federation._replace(theta=fresh.theta, starts=fresh.starts)
            elsewhere = InProcess(again, beginning)
            for cohort in elsewhere.cohorts:
                watch(cohort)
            *_, (snapshot, _) = rounds(again, beginning, elsewhere)
        ends[name] = snapshot.model


def _second_pass(
    experiment: Experiment, federation: Federation, fixed: Tensor, shuffles: _Shuffles | None
) -> Iterator[tuple[Snapshot, list[Seen], Tensor]]:
    """Run the experiment again with the points known, and yield each round, what was seen in it, and its points."""
    carrier = InProcess(experiment, federation)
    plans = [watch(cohort) for cohort in carrier.cohorts]
    playing, model = rounds(experiment, federation, carrier), federation.theta
    for number in range(1, experiment.rounds + 1):
        points = (
            fixed
            if shuffles is None
            else torch.cat([fixed, shuffles.points(number, _flat(model, federation.theta))])
        )
        for plan in plans:
            plan.points, plan.seen = points, []
        snapshot, _ = next(playing)
        # Where workers are asked before they begin, the first half are their answers.
        half = experiment.parts.strategy.asks
        yield (
            snapshot,
            [seen for plan in plans for seen in plan.seen[len(plan.seen) // 2 if half else 0 :]],
            points,
        )
        model = snapshot.model


class _Shuffles:
    """Random orders of the rounds: a step is where it is when the others have changed places about it.

    In an order that brings a round to place j, the model before it is ``w* - sum_{i >= j} U_i``, the sum over the updates
    U of the rounds from that place on. Moving the end instead, steps of round r are compared with ``w_r + sum_{i >= j}
    U_i``.
    """

    def __init__(self, seed: int, updates: Tensor, number: int) -> None:
        self.updates, r = updates, len(updates)
        draws = [random.numpy_generator(seed, "geometry", i).permutation(r) for i in range(number)]
        self.place = np.argsort(np.stack(draws), axis=1)
        self.sums = np.zeros((2, number, r))
        self.counts = np.zeros((2, number, r))

    def points(self, number: int, model: Tensor) -> Tensor:
        """Return the reference points of a round, ``[n, P]``."""
        later = torch.from_numpy(self.place >= self.place[:, number - 1, None]).to(self.updates)
        return model + later @ self.updates

    def take(self, kind: int, number: int, gamma: np.ndarray) -> None:
        """Add gammas ``[., n]`` of the steps (0) of a round or of the round (1), where they are defined."""
        orders, there = np.arange(len(self.place)), np.isfinite(gamma)
        self.sums[kind, orders, self.place[:, number - 1]] += np.where(there, gamma, 0).sum(0)
        self.counts[kind, orders, self.place[:, number - 1]] += there.sum(0)

    def mean(self, kind: int) -> np.ndarray:
        """Return the mean over orders at each place, NaN where nothing is defined."""
        with np.errstate(invalid="ignore"):
            every = self.sums[kind] / self.counts[kind]
        known = np.isfinite(every)
        total = np.where(known, every, 0).sum(0)
        return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)


class _Tables:
    """Collects rows of the three tables."""

    def __init__(
        self,
        experiment: Experiment,
        leaves: tuple[str, ...],
        names: tuple[str, ...],
        shuffles: _Shuffles | None,
    ) -> None:
        self.experiment, self.leaves, self.names, self.shuffles = experiment, leaves, names, shuffles
        self.steps: list[np.ndarray] = []
        self.clients: list[tuple[float, ...]] = []
        self.rounds: list[dict[str, float]] = []
        self.began = 0

    def add(self, snapshot: Snapshot, seen: list[Seen], points: Tensor, model: Tensor) -> None:
        """Take in a round that began at ``model``."""
        number, report, n = snapshot.round, snapshot.report, len(self.names)
        weight = dict(
            zip(report.worker.tolist(), (report.weight / report.weight.sum()).tolist(), strict=True)
        )
        way, proposed, length = model - points, torch.zeros_like(model), 0.0
        parts: list[tuple[int, np.ndarray]] = []
        for some in seen:
            for i, worker in enumerate(some.worker.tolist()):
                if worker not in weight:  # left out, as it was not finite
                    continue
                p, moved = weight[worker], some.moved[i]
                norm, dot = moved.norm().item(), (moved @ way[0]).item()
                proposed, length = proposed + p * moved, length + p * norm
                self.clients.append((number, worker, p, norm, dot))
                parts.append((worker, some.numbers[i, : int(some.steps[i])].cpu().numpy()))
        parts.sort(key=lambda part: part[0])
        for worker, numbers in parts:
            place = np.arange(len(numbers))
            about = np.broadcast_to([number, worker, weight[worker]], (len(place), 3))
            own = np.split(numbers[:, 5:], 3, axis=1)
            kept = [numbers[:, :5], *(x[:, :n] for x in own)]
            self.steps.append(np.column_stack([about, place, self.began + place, *kept]))
        update = _flat(snapshot.model, self.leaves) - model
        distance, dots = way.norm(dim=1), way @ torch.stack([proposed, update], dim=1)
        found = {
            "round": number,
            "participants": len(weight),
            "step": self.began,
            "loss": float(report.weight @ report.loss / report.weight.sum()),
            "agreement": proposed.norm().item() / length if length else math.nan,
            "norm_D": proposed.norm().item(),
            "norm_update": update.norm().item(),
        }
        for i, name in enumerate(self.names):
            end = f".{name}" if i else ""
            found[f"norm_dist{end}"] = distance[i].item()
            found[f"dot_D{end}"], found[f"dot_update{end}"] = dots[i].tolist()
        self.rounds.append(found)
        self.began += max(len(numbers) for _, numbers in parts)
        if self.shuffles is not None:
            cosine = measures(-dots[n:, 1].cpu(), update.norm().item(), distance[n:].cpu()).gamma
            self.shuffles.take(1, number, cosine[None])
            numbers = np.concatenate([numbers for _, numbers in parts])
            dist, _, up = (x[:, n:] for x in np.split(numbers[:, 5:], 3, axis=1))
            self.shuffles.take(0, number, measures(-up, numbers[:, 2:3], dist).gamma)

    def finish(self, end: Tree) -> Trace:
        """Join the rows and summarise them."""
        ends = ["", *(f".{name}" for name in self.names[1:])]
        columns = ["round", "client", "weight", "local_step", "step", "loss", "norm_grad", "norm_update"]
        columns += ["norm_grad_wd", "dot_grad_wd"]
        columns += [f"{kind}{end}" for kind in ("norm_dist", "dot_grad", "dot_update") for end in ends]
        steps = pd.DataFrame(np.concatenate(self.steps), columns=columns)
        steps = steps.astype(dict.fromkeys(("round", "client", "local_step", "step"), int))
        if not _decay(self.experiment.parts.client):
            steps = steps.drop(columns=["norm_grad_wd", "dot_grad_wd"])
        clients = pd.DataFrame(self.clients, columns=["round", "client", "weight", "norm_d", "dot_d"])
        table = pd.DataFrame(self.rounds)
        if self.shuffles is not None:
            table["permuted_steps"], table["permuted"] = self.shuffles.mean(0), self.shuffles.mean(1)
        agreement = np.asarray(before_last(table)["agreement"], dtype=float)
        orders = [None if self.shuffles is None else self.shuffles.mean(kind) for kind in (0, 1)]
        summary = {
            "steps": summarise(derive(steps), orders[0]),
            "rounds": summarise(derive(table), orders[1])
            | {"agreement": float(agreement.mean()) if len(agreement) else math.nan},
            "reference": hashlib.blake2b(
                _flat(end, self.leaves).cpu().numpy().tobytes(), digest_size=16
            ).hexdigest(),
            "parameters": tree.num_parameters(end),
            "dtype": self.experiment.dtype,
            "device": str(next(iter(end.values())).device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        return Trace(steps, table, clients, end, summary)


def _flat(theta: Tree, names: Iterable[str]) -> Tensor:
    """Join the leaves of these names, in float64."""
    return torch.cat([theta[k].reshape(-1).double() for k in names])


def _without_nan(said: dict[str, Any]) -> dict[str, Any]:
    """Write None for what is undefined: JSON knows no NaN."""
    return {
        k: _without_nan(v) if isinstance(v, dict) else None if isinstance(v, float) and math.isnan(v) else v
        for k, v in said.items()
    }


def _equal(a: Tree, b: Tree) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def finished(directory: Path) -> runs.Run:
    """Read the directory of a finished run.

    Parameters
    ----------
    directory : Path
        Run directory.

    Returns
    -------
    Run
        With its model.

    Raises
    ------
    BadInput
        If it is no run directory, or the run has not ended.
    """
    done = runs.load(directory)
    if not done.model or not done.summary:
        raise BadInput(f"{directory}: the run has not ended; 'fedsim resume {directory}' continues it")
    return done


def write(directory: Path) -> Trace:
    """Repeat the run of a directory, and write what was seen into its folder ``geometry``.

    Parameters
    ----------
    directory : Path
        Run directory of a finished run.

    Returns
    -------
    Trace
        Its summary also says how far the repeated run ended from the directory's model, relative to the way from the start
        (``difference``).

    Raises
    ------
    BadInput
        If it is not the directory of a finished run.
    RunFailed
        If the run does not repeat itself, or ends elsewhere than the directory's.
    """
    done = finished(directory)
    federation = load(done.experiment)
    found = trace(done.experiment, federation)
    end, start, model = (_flat(x, found.end).cpu() for x in (found.end, federation.theta, done.model))
    difference = ((end - model).norm() / (end - start).norm()).item()
    if not difference <= TOLERANCE:
        raise RunFailed(
            f"{directory}: the repeated run ends {difference:.2g} of its way from the model of the first, more than "
            f"{TOLERANCE}; it must be repeated with the same data, versions and device"
        )
    found.summary["difference"] = difference
    folder = directory / FOLDER
    with writing(folder):
        folder.mkdir(exist_ok=True)
        for name, table in (("steps", found.steps), ("rounds", found.rounds), ("clients", found.clients)):
            replace_file(folder / f"{name}.csv", table.to_csv(index=False).encode())
        text = json.dumps(_without_nan(found.summary), indent=2)
        replace_file(folder / "summary.json", (text + "\n").encode())
    return found
