"""`rounds`, the generator that everything else consumes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from clients.sasam import collapses
from fedsim import tree
from fedsim.carriers import Carrier, InProcess, join_evaluations
from fedsim.cohort import Evaluated, evaluate
from fedsim.data import ByLabel, Dirichlet, Domains, Pathological
from fedsim.errors import RunFailed
from fedsim.experiment import BadInput, Experiment
from fedsim.federation import Federation, load
from fedsim.play import Server, play
from fedsim.probes import Clock, Memory, Snapshot
from fedsim.registry import expression
from fedsim.tree import Tree
from strategies import Broadcast, FedIRM, State


class Position(NamedTuple):
    """Where a run stands after a round: all that a checkpoint must hold."""

    round: int
    state: State
    broadcast: Broadcast
    clock: Clock
    memories: tuple[Memory, ...]
    timetable: Tree = {}  # noqa: RUF012 - never changed


def start(experiment: Experiment, federation: Federation) -> Position:
    """Return the position before the first round.

    Parameters
    ----------
    experiment : Experiment
        The run.
    federation : Federation
        Its data and model.

    Returns
    -------
    Position
        Round 0.

    Raises
    ------
    BadInput
        If the strategy does not fit the number of workers, or a probe cannot measure this experiment.
    """
    parts = experiment.parts
    try:
        state, broadcast = parts.strategy.init(federation.theta, experiment.num_workers)
    except ValueError as error:
        raise BadInput(f"strategy = {experiment.strategy!r}: {error}") from error
    score, skewed = parts.strategy.score, isinstance(parts.partition, Dirichlet | Pathological | ByLabel)
    if score is not None and score.by != "shared_val" and skewed:
        warnings.warn(
            f"strategy = {experiment.strategy!r} compares workers by losses on their own data, and so elects the one "
            f"with the easiest under partition = {experiment.partition!r}; leader='shared_val' is fair",
            stacklevel=2,
        )
    if known := collapses(parts.client, tree.num_parameters(federation.theta)):
        warnings.warn(f"client = {experiment.client!r}: {known}", stacklevel=2)
    if isinstance(parts.strategy, FedIRM) and experiment.local_steps != 1:
        warnings.warn(
            f"local-steps = {experiment.local_steps}: local IRM steps are known to fail, as a worker's penalty vanishes at its "
            "own optimum; set local-steps = 1",
            stacklevel=2,
        )
    memories = []
    for probe in experiment.parts.probes:
        try:
            memories.append(probe.begin(experiment, federation))
        except ValueError as error:
            raise BadInput(f"probes = {expression(probe)!r}: {error}") from error
    return Position(0, state, broadcast, Clock(), tuple(memories))


def rounds(
    experiment: Experiment,
    federation: Federation | None = None,
    carrier: Carrier | None = None,
    position: Position | None = None,
) -> Iterator[tuple[Snapshot, Position]]:
    """Run an experiment round by round; early stopping is ``break``.

    Parameters
    ----------
    experiment : Experiment
        The run.
    federation : Federation or None
        Data and model, loaded if None.
    carrier : Carrier or None
        Where the workers live; this process if None.
    position : Position or None
        Where to go on; the start if None.

    Yields
    ------
    tuple of Snapshot and Position
        After every round: what happened, and where the run stands.

    Raises
    ------
    RunFailed
        If no worker is finite any more, or fewer nodes answer than ``min-nodes``; the round in which nodes
        failed is yielded first.

    Examples
    --------
    >>> from fedsim import Experiment
    >>> e = Experiment(num_workers=4, rounds=3, partition="IID()", model="Linear()")
    >>> [round(s.metrics["test_accuracy"], 1) for s, _ in rounds(e)]
    [0.8, 0.8, 0.9]
    """
    federation = load(experiment) if federation is None else federation
    carrier = InProcess(experiment, federation) if carrier is None else carrier
    position = start(experiment, federation) if position is None else position
    parts, strategy = experiment.parts, experiment.parts.strategy
    needs_rows = any(p.needs_rows for p in parts.probes)
    server = Server(position.state, position.broadcast, position.clock, position.timetable)
    memories = position.memories
    for number in range(position.round + 1, experiment.rounds + 1):
        last = number == experiment.rounds
        due = last or bool(experiment.eval_every and number % experiment.eval_every == 0)
        whole = needs_rows or (due and strategy.upload == "chosen")
        played = play(experiment, federation, carrier, server, number, whole)
        server, report, failures = played.server, played.report, played.failures
        clock = server.clock
        metrics: dict = {
            "round": number,
            "sim_time": clock.sim_time,
            "gradients": clock.gradients,
            "local_steps": clock.local_steps,
            "optimiser_steps": clock.optimiser_steps,
            "pseudo_syncs": clock.pseudo_syncs,
            "syncs": clock.syncs,
            "bytes_up": clock.bytes_up,
            "bytes_down": clock.bytes_down,
            "participants": len(report.worker),
            "train_loss": _mean(report.loss, report.weight),
        }
        if played.excluded:
            metrics["excluded"] = played.excluded
        if played.lost:
            metrics["lost"] = played.lost
        metrics |= played.figures
        model = strategy.model(server.state, played.after)
        evaluated, silent = carrier.evaluate(model) if due and experiment.holdout > 0 else ([], {})
        named = failures | {f"{node} (evaluation)": why for node, why in silent.items()}
        if named:
            metrics["failures"] = named
        snapshot = Snapshot(
            number, model, played.rows, played.after, played.told, played.before, report, played.sent,
            server.broadcast, server.state, clock, played.excluded, named, metrics, federation, strategy,
        )  # fmt: skip
        if due:
            metrics |= _evaluate(federation, model, evaluated)
            others = strategy.models(server.state, played.after, played.told)
            metrics |= _evaluate_others(federation, others, metrics, strategy.reported)
        remembered = []
        for probe, memory in zip(parts.probes, memories, strict=True):
            figures, memory = probe.measure(snapshot, memory)
            remembered.append(memory)
            metrics |= {f"{_snake(type(probe).__name__)}.{k}": v for k, v in figures.items()}
        memories = tuple(remembered)
        yield snapshot, Position(number, server.state, server.broadcast, clock, memories, server.timetable)
        answered = carrier.num_nodes - len(failures)
        if answered < (experiment.min_nodes or carrier.num_nodes):
            raise RunFailed(
                f"round {number}: {answered} of {carrier.num_nodes} nodes answered, fewer than min-nodes = "
                f"{experiment.min_nodes or carrier.num_nodes}: "
                + "; ".join(f"{k}: {v}" for k, v in failures.items())
            )


def _mean(x: torch.Tensor, weight: torch.Tensor) -> float:
    return float((x * weight).sum() / weight.sum())


def _evaluate(federation: Federation, model: Tree, own: list[Evaluated]) -> dict[str, float | None]:
    """Evaluate centrally and on the workers' own held-out rows; NaN (regression accuracy) is left out."""
    metrics: dict[str, float | None] = {}
    if len(federation.dataset.test_x):
        loss, correct = evaluate(federation, model)
        metrics["test_loss"] = loss.mean().item()
        metrics["test_accuracy"] = correct.mean().item()
        if federation.dataset.task == "tokens":
            metrics["test_perplexity"] = math.exp(min(700.0, metrics["test_loss"]))
        if federation.dataset.domains is not None:
            metrics |= _evaluate_domains(federation, federation.dataset.domains, model, metrics)
    held = join_evaluations(own) if own else None
    if held is not None and len(held.worker):
        for name, x in (("held_loss", held.loss), ("held_accuracy", held.accuracy)):
            worst = (0.9, "p90", x.max()) if name == "held_loss" else (0.1, "p10", x.min())
            metrics[f"{name}.mean"] = x.mean().item()
            metrics[f"{name}.{worst[1]}"] = torch.quantile(x, worst[0]).item()
            metrics[f"{name}.worst"] = worst[2].item()
    return {k: v for k, v in metrics.items() if v is not None and not math.isnan(v)}


def _evaluate_domains(
    federation: Federation, domains: Domains, model: Tree, metrics: dict[str, float | None]
) -> dict[str, float | None]:
    """Evaluate within the training domains, each of equal weight, and name the figures of the held-out one."""
    inside = replace(federation.dataset, test_x=domains.x, test_y=domains.y)
    figures = {}
    for name, x in zip(
        ("loss", "accuracy"), evaluate(federation._replace(dataset=inside), model), strict=True
    ):
        own = torch.zeros(len(domains.names), dtype=torch.float64).index_add_(0, domains.domain, x.cpu())
        figures[f"id_{name}"] = (own / torch.bincount(domains.domain)).mean().item()
        figures[f"ood_{name}"] = metrics[f"test_{name}"]
    return figures


def _evaluate_others(
    federation: Federation, models: dict[str, Tree], metrics: dict[str, float], reported: str
) -> dict[str, float]:
    """Evaluate further models centrally, and name the reported one among them: columns ``test_loss.<name>``."""
    kinds = ("test_loss", "test_accuracy")
    found = {f"{k}.{reported}": metrics[k] for k in kinds if reported and k in metrics}
    for name, model in models.items():
        if len(federation.dataset.test_x):
            figures = [x.mean().item() for x in evaluate(federation, model)]
            found |= {f"{k}.{name}": x for k, x in zip(kinds, figures, strict=True) if not math.isnan(x)}
    return found


def _snake(name: str) -> str:
    """Turn ``WorkerLoss`` into ``worker_loss``."""
    return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))


__all__ = ["Position", "RunFailed", "rounds", "start"]
