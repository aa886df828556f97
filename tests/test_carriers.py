"""One experiment, one history: in this process or over messages, for any number of nodes, in any order."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedsim import Experiment, RunFailed, client_app, tree
from fedsim.carriers import Carrier, InProcess
from fedsim.federation import load
from fedsim.grid import InProcessGrid
from fedsim.over_grid import OverGrid, greet
from fedsim.registry import REGISTRY
from fedsim.simulate import rounds
from fedsim.tree import Stack, Tree
from strategies import Broadcast, FedAvg, Report, Rule, State

WORKERS = 5

TINY = {
    "data": "Synthetic(rows=150, features=4, classes=3)",
    "partition": "Dirichlet(alpha=0.5)",
    "model": "MLP(hidden=(3,))",
    "num-workers": WORKERS,
    "rounds": 4,
    "local-steps": 3,
    "batch-size": 4,
    "holdout": 0.25,
    "dtype": "float64",
    "device": "cpu",
}

ROWS_AT_NODES = {"strategy": "HalfWay()", "client": "SGD(lr=0.3)"}
STATES_AT_NODES = {"strategy": "FedAvgWithStates()", "client": "AdamW(lr=0.02)"}

CASES: dict[str, dict[str, Any]] = {
    "mean": {"probes": "WorkerLoss()"},
    "rows": {"probes": "WorkerLoss(); Drift()"},
    "server momentum": {"strategy": "FedAvgM(lr=0.7, momentum=0.5)"},
    "median": {"strategy": "FedMedian()"},
    "flwr": {"strategy": "flwr.FedAdam(eta=0.05)"},
    "raw gaps": {"strategy": "GapFilter(source='raw', capacity=6)", "client": "Filtered(SGD(lr=0.1))"},
    "dominant": {"strategy": "DominantFilter(k=3)", "client": "Filtered(SGD(lr=0.1), keep=True)"},
    "partial": {"participation": 0.4, "strategy": "FedAvgM()", "local-steps": 0, "local-epochs": 1},
    "rows at nodes": ROWS_AT_NODES,
    "asked": {
        "strategy": "KnownLoss()",
        "client": "LossNormalised(ScaledSGD(mode='scaled'))",
        "data": "Separable(rows_per_worker=4, features=3)",
        "model": "Linear(bias=False)",
        "objective": "Exponential()",
        "partition": "Natural()",
        "batch-size": 0,
    },
    "states at nodes": STATES_AT_NODES,
    "states at nodes, partial": {**STATES_AT_NODES, "participation": 0.4, "rounds": 8},
}


@dataclass(frozen=True)
class HalfWay(Rule):
    """Workers keep their rows and move a part of the way to the mean, each its own part."""

    keeps_rows: ClassVar[bool] = True

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        model = tree.mean(rows, report.weight)
        return {"model": model}, {"model": model}

    def adopt(self, row: Tree, broadcast: Broadcast, worker: Tensor) -> Tree:
        return tree.lerp(row, broadcast["model"], 0.5 + 0.05 * worker)

    def model(self, state: State, rows: Stack) -> Tree:
        return tree.mean(rows, torch.ones(tree.num_rows(rows)))


@dataclass(frozen=True)
class FedAvgWithStates(FedAvg):
    """Workers keep the moments of their optimiser."""

    keeps_state: ClassVar[bool] = True


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    for rule in (HalfWay, FedAvgWithStates):
        monkeypatch.setitem(REGISTRY["strategy"], rule.__name__, rule)


class Elsewhere(ClientApp):
    """Message by message in other processes: `processes` of them take turns, none of them never the same."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, processes: int = 0) -> None:
        self.memories: list[dict[Any, Any]] = [{} for _ in range(processes)]
        self.monkeypatch = monkeypatch
        self.calls = 0

    def __call__(self, message: Message, context: Context) -> Message:
        self.calls += 1
        memory = self.memories[self.calls % len(self.memories)] if self.memories else {}
        self.monkeypatch.setattr(client_app, "_HOSTS", memory)
        return client_app.app(message, context)


def over_messages(
    experiment: Experiment, num_nodes: int, app: ClientApp = client_app.app, **options: Any
) -> Carrier:
    federation = load(experiment)
    grid = InProcessGrid(app, num_nodes, experiment.to_mapping(), **options)
    return OverGrid(grid, experiment, federation, greet(grid, num_nodes))


def direct(experiment: Experiment, num_nodes: int) -> Carrier:
    experiment = experiment.replace({"nodes": num_nodes})
    return InProcess(experiment, load(experiment))


def history(experiment: Experiment, carrier: Carrier) -> list[dict[str, Any]]:
    return [snapshot.metrics for snapshot, _ in rounds(experiment, carrier=carrier)]


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float) -> None:
    assert [list(line) for line in found] == [list(line) for line in expected]
    for line, reference in zip(found, expected, strict=True):
        assert line == pytest.approx(reference, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_all_carriers_give_the_same_history(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment.from_mapping(TINY | CASES[name])
    expected = history(experiment, direct(experiment, 1))
    losses = [line["test_loss"] for line in expected]
    assert all(line["participants"] == experiment.num_participants for line in expected)
    assert len(set(losses)) == len(losses)
    carriers: list[Callable[[], Carrier]] = [
        lambda: direct(experiment, 3),
        lambda: over_messages(experiment, 1),
        lambda: over_messages(experiment, 3),
        lambda: over_messages(experiment, WORKERS),
        lambda: over_messages(experiment, 3, reverse_replies=True),
        lambda: over_messages(experiment, 3, Elsewhere(monkeypatch)),
        lambda: over_messages(experiment, 3, Elsewhere(monkeypatch, 2)),
    ]
    for make in carriers:
        assert_same(history(experiment, make()), expected, 1e-12)


@pytest.mark.parametrize("name", ["mean", "rows", "rows at nodes", "states at nodes"])
def test_single_precision_agrees_too(name: str) -> None:
    experiment = Experiment.from_mapping(TINY | CASES[name] | {"dtype": "float32"})
    expected = history(experiment, direct(experiment, 1))
    assert_same(history(experiment, direct(experiment, 3)), expected, 1e-4)
    assert_same(history(experiment, over_messages(experiment, 3)), expected, 1e-4)


@pytest.mark.parametrize("kept", [ROWS_AT_NODES, STATES_AT_NODES])
def test_what_nodes_keep_matters(kept: dict[str, Any]) -> None:
    # Or the tests above would hold for nodes that forget everything.
    experiment = Experiment.from_mapping(TINY | kept)
    plain = experiment.replace({"strategy": "FedAvg()"})
    losses = [[line["test_loss"] for line in history(e, direct(e, 1))] for e in (experiment, plain)]
    assert losses[0][1:] != pytest.approx(losses[1][1:], rel=1e-6)


@pytest.mark.parametrize("kept", [ROWS_AT_NODES, STATES_AT_NODES])
def test_the_same_nodes_can_begin_again(kept: dict[str, Any]) -> None:
    experiment = Experiment.from_mapping(TINY | kept)
    carrier = over_messages(experiment, 2)
    assert history(experiment, carrier) == history(experiment, carrier)


class LosingGrid(InProcessGrid):
    """From the third round on node 1 has been started again."""

    def __init__(self, app: ClientApp, experiment: Experiment) -> None:
        super().__init__(app, 2, experiment.to_mapping())
        self.rounds = 0

    def push_messages(self, messages: Any) -> list[str]:
        messages = list(messages)
        self.rounds += any(m.metadata.message_type == "train.fedsim_round" for m in messages)
        if self.rounds == 3:
            self._nodes[3].context.state = RecordDict()
        return super().push_messages(messages)


@pytest.mark.parametrize("kept", [ROWS_AT_NODES, STATES_AT_NODES])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_node_that_lost_what_it_kept_is_named(
    kept: dict[str, Any], fresh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = Experiment.from_mapping(TINY | kept)
    app = Elsewhere(monkeypatch) if fresh else client_app.app
    grid = LosingGrid(app, experiment)
    carrier = OverGrid(grid, experiment, load(experiment), greet(grid, 2))
    run = rounds(experiment, carrier=carrier)
    seen = [snapshot.failures for snapshot, _ in islice(run, 3)]
    with pytest.raises(RunFailed, match="1 of 2 nodes answered") as raised:
        next(run)
    assert seen[:2] == [{}, {}]
    assert list(seen[2]) == ["node 1"]
    assert seen[2]["node 1"].startswith(
        "RuntimeError: what its workers keep between rounds is lost: this is round 3, and nothing"
    )
    assert seen[2]["node 1"] in str(raised.value)


def test_a_node_without_what_it_kept_does_no_harm_where_nothing_is_kept() -> None:
    experiment = Experiment.from_mapping(TINY)
    grid = LosingGrid(client_app.app, experiment)
    carrier = OverGrid(grid, experiment, load(experiment), greet(grid, 2))
    assert_same(history(experiment, carrier), history(experiment, direct(experiment, 1)), 1e-12)
