"""Leaders and centres: workers at different speeds, interrupted runs, and what is lost on the way over messages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict
from leaders_toys import ALONE, figure, last, over_messages, parabolas
from torch import Tensor
from toys import blobs, registered, snapshots

import fedsim
from fedsim import Experiment, client_app, tree
from fedsim.carriers import Fetched, InProcess
from fedsim.federation import load
from fedsim.grid import InProcessGrid
from fedsim.over_grid import OverGrid, greet
from fedsim.probes import Snapshot
from fedsim.schedule import FreeRunning, grants
from fedsim.simulate import Position, rounds


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    with registered():
        yield


# ------------------------------------------------------------------------------------------ schedules


def test_l9_equal_speeds_are_synchronous() -> None:
    """Minibatches too: with equal durations every worker is granted the same steps."""
    settings = {"strategy": "LeaderSGD(groups=5, global_every=2)", "client": "SGD(lr=0.3, momentum=0.5)"}
    a, b = snapshots(blobs(**settings)), snapshots(blobs(**settings, schedule="TotalSteps(durations=(2.5,))"))
    for x, y in zip(a, b, strict=True):
        for name, leaf in x.after.items():
            torch.testing.assert_close(leaf, y.after[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("total", "durations"), [(16, (1.0, 3.0)), (7, (2.0, 1.0, 1.0)), (100, (0.7, 0.9, 1.3, 5.0, 1.0))]
)
def test_l9_steps_in_total_are_exact_and_slow_workers_make_fewer(
    total: int, durations: tuple[float, ...]
) -> None:
    steps, end = grants(durations, total)
    assert sum(steps) == total
    order = sorted(range(len(durations)), key=durations.__getitem__)
    for fast, slow in pairwise(order):
        assert steps[fast] >= steps[slow] - (durations[fast] == durations[slow])
    assert end == max(s * d for s, d in zip(steps, durations, strict=True))
    # nobody asks for a step that ends later than the one before the last would have let another begin
    assert all((s - 1) * d <= end for s, d in zip(steps, durations, strict=True))


def test_speeds_are_drawn_once_a_run() -> None:
    schedule = FreeRunning(durations=(1.0, 2.0), sigma=0.5)
    speeds = schedule.durations_of(1000, 3)
    assert torch.equal(speeds, schedule.durations_of(1000, 3))
    noise = (speeds / torch.tensor([1.0, 2.0]).repeat(500)).log()
    assert abs(noise.mean().item()) < 3 * 0.5 / math.sqrt(1000)
    assert noise.std().item() == pytest.approx(0.5, rel=0.1)


def test_the_synchronous_schedule_waits_for_the_slowest() -> None:
    experiment = parabolas(
        local_steps=3, schedule="Synchronous(durations=(1.0, 4.0))", network="Network(step=0.5, latency=0.25)"
    )
    assert last(experiment).clock.sim_time == 3 * 4 * 0.5 + 0.5


def test_fast_workers_come_more_often() -> None:
    experiment = parabolas(**ALONE, schedule="FreeRunning(durations=(1.0, 1.0, 2.0, 4.0))", rounds=20)
    found = snapshots(experiment)
    came = torch.bincount(torch.cat([s.told.worker for s in found]), minlength=4)
    assert came.sum() == 80
    end = found[-1].clock.sim_time
    for i, d in enumerate((1, 1, 2, 4)):
        assert abs(int(came[i]) - end / (2 * d)) <= 1
    assert found[-1].clock.local_steps == 160
    assert figure(found[-1], "staleness.max") >= figure(found[-1], "staleness.mean") > 0
    assert (figure(found[-1], "arrivals.min"), figure(found[-1], "arrivals.max")) == (came.min(), came.max())


def test_downpour_counts_every_push() -> None:
    """The centre is the start plus all that workers have pushed."""
    experiment = parabolas(
        strategy="Downpour()", local_steps=2, rounds=6, schedule="FreeRunning(durations=(1.0, 3.0), sigma=0.3)",
        model="Scalar(starts_at=(1.5, 1.5, 1.5, 1.5))",
    )  # fmt: skip
    pushed, sent = 0.0, [1.5] * 4
    for s in snapshots(experiment):
        received = s.state["sent"]["0.weight"].flatten().tolist()
        for i, x in zip(s.told.worker.tolist(), s.rows["0.weight"].flatten().tolist(), strict=True):
            pushed += x - sent[i]
            sent[i] = 1.5 + pushed
        assert sent == pytest.approx(received, rel=1e-12)
        assert s.model["0.weight"].item() == pytest.approx(1.5 + pushed, rel=1e-12)


LASTING = {
    "leaders": {
        "strategy": "LeaderSGD(groups=5, global_every=2, prox=0.1, prox_global=0.2, window=7)",
        "client": "SGD(lr=0.3, momentum=0.9)", "schedule": "TotalSteps(durations=(1.0, 2.0))", "probes": "Leaders()",
    },
    "elastic": {"strategy": "ElasticAveraging()", "client": "Nesterov(lr=0.1)", "nodes": 2},
    "alone": {
        "strategy": "ElasticAveraging()", "client": "Nesterov(lr=0.1)",
        "schedule": "FreeRunning(durations=(1.0, 1.7), sigma=0.4, arrivals=3)",
    },
    "downpour": {"strategy": "Downpour()", "client": "SGD(lr=0.05)", "schedule": "FreeRunning(durations=(1.0, 3.0))"},
}  # fmt: skip


@pytest.mark.parametrize("settings", LASTING.values(), ids=list(LASTING))
def test_l10_interrupted_runs_go_on_bit_for_bit(settings: dict) -> None:
    experiment = blobs(**settings, rounds=6, eval_every=2)
    federation = load(experiment)
    carrier = InProcess(experiment, federation)
    history: list[Snapshot] = []
    saved: list[tuple[Position, tree.Tree]] = []
    for snapshot, position in rounds(experiment, federation, carrier):
        history.append(snapshot)
        saved.append((position, tree.clone(carrier.checkpoint())))
    for stop in (1, 3, 4):
        again = InProcess(experiment, federation)
        again.restore(saved[stop - 1][1])
        again.use_plan(carrier.plan)
        for x, (y, _) in zip(
            history[stop:], rounds(experiment, federation, again, saved[stop - 1][0]), strict=True
        ):
            assert x.metrics == y.metrics
            for name, leaf in (x.rows | x.model).items():
                assert torch.equal(leaf, (y.rows | y.model)[name])


@pytest.mark.parametrize(
    "name", [pytest.param(k, marks=pytest.mark.slow if k in ("elastic", "downpour") else ()) for k in LASTING]
)
def test_l10_checkpoints_hold_all_that_is_needed(name: str, tmp_path: Path) -> None:
    settings: dict = LASTING[name]
    whole = fedsim.run(blobs(**settings, rounds=5, out=str(tmp_path / "whole")))
    fedsim.run(blobs(**settings, rounds=2, out=str(tmp_path / "part")))
    rest = fedsim.runs.resume(tmp_path / "part", changes={"rounds": 5})
    for leaf, x in whole.model.items():
        assert torch.equal(x, rest.model[leaf])
    columns = [c for c in whole.history if c != "wall_time"]
    assert rest.history[columns].iloc[-1].equals(whole.history[columns].iloc[-1])


# ------------------------------------------------------------------------------------- over messages

OVER = {
    "leaders": {"strategy": "LeaderSGD(groups=5, global_every=2, prox=0.1)", "schedule": "TotalSteps(durations=(1.0, 2.0))"},
    "seldom evaluated": {"strategy": "LeaderSGD()", "eval_every": 2, "client": "SGD(lr=0.3, momentum=0.9)"},
    "elastic": {"strategy": "ElasticAveraging()", "client": "Nesterov(lr=0.1)"},
    "downpour": {"strategy": "Downpour()", "client": "SGD(lr=0.05)"},
    "shared": {"strategy": "LeaderSGD(leader='shared_val')", "holdout": 0.3},
    "exact": {"strategy": "LeaderGD()", "batch_size": 0, "local_steps": 1},
}  # fmt: skip


@pytest.fixture
def synthetic() -> dict[str, Any]:
    return {
        "data": "Synthetic(rows=150, features=4, classes=3)", "partition": "IID()", "model": "MLP(hidden=(3,))",
        "num_workers": 5, "rounds": 4, "local_steps": 3, "batch_size": 4, "dtype": "float64", "device": "cpu",
    }  # fmt: skip


@pytest.mark.parametrize("name", OVER)
@pytest.mark.parametrize("nodes", [2, 5])
def test_nodes_give_the_same_history(name: str, nodes: int, synthetic: dict[str, Any]) -> None:
    experiment = Experiment.from_mapping(synthetic | OVER[name])
    grid = InProcessGrid(client_app.app, nodes, experiment.to_mapping())
    far = OverGrid(grid, experiment, load(experiment), greet(grid, nodes))
    for x, y in zip(snapshots(experiment), snapshots(experiment, far), strict=True):
        assert list(x.metrics) == list(y.metrics)
        assert x.metrics == pytest.approx(y.metrics, rel=1e-12, abs=1e-12)


def test_only_the_leaders_rows_travel(synthetic: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    fetch = OverGrid.fetch

    def watched(self: OverGrid, workers: Tensor) -> Fetched:
        asked.append(workers.tolist())
        return fetch(self, workers)

    monkeypatch.setattr(OverGrid, "fetch", watched)
    experiment = Experiment.from_mapping(synthetic | {"strategy": "LeaderSGD()", "eval_every": 4})
    found = snapshots(experiment, over_messages(experiment))
    assert [len(a) for a in asked] == [1, 1, 1, 5]
    assert [a[0] for a in asked[:3]] == [int(s.broadcast["lead"]["best"]) for s in found[:3]]


class Losing(InProcessGrid):
    """Node 1 is started again before the third request of its kind."""

    def __init__(self, experiment: Experiment, nodes: int) -> None:
        super().__init__(client_app.app, nodes, experiment.to_mapping())
        self.requests = 0

    def push_messages(self, messages: Any) -> list[str]:
        messages = list(messages)
        mine = [m for m in messages if m.metadata.dst_node_id == 3]
        self.requests += any(m.metadata.message_type == "train.fedsim_round" for m in mine)
        if self.requests == 3:
            self.requests += 1
            self._nodes[3].context.state = RecordDict()
        return super().push_messages(messages)


@pytest.mark.parametrize("strategy", ["LeaderSGD()", "ElasticAveraging()"])
def test_a_node_that_lost_its_rows_begins_again(strategy: str, synthetic: dict[str, Any]) -> None:
    experiment = Experiment.from_mapping(synthetic | {"strategy": strategy})
    grid = Losing(experiment, 2)
    found = snapshots(experiment, OverGrid(grid, experiment, load(experiment), greet(grid, 2)))
    assert [s.metrics.get("lost") for s in found] == [None, None, [3, 4], None]
    assert not any(s.failures for s in found)
    healthy = snapshots(experiment)
    assert found[1].metrics == pytest.approx(healthy[1].metrics, rel=1e-12)
    assert found[2].metrics["test_loss.average"] != pytest.approx(
        healthy[2].metrics["test_loss.average"], rel=1e-9
    )


def test_a_worker_that_comes_alone_and_lost_its_row_begins_again() -> None:
    experiment = parabolas(**ALONE, schedule="FreeRunning()", rounds=4)
    grid = Losing(experiment, 4)
    found = snapshots(experiment, OverGrid(grid, experiment, load(experiment), greet(grid, 4)))
    lost = [s.metrics.get("lost") for s in found]
    assert [x for x in lost if x] == [[1]]


def test_several_workers_of_a_node_take_turns() -> None:
    experiment = parabolas(**ALONE, schedule="FreeRunning()", rounds=3)
    grid = InProcessGrid(client_app.app, 2, experiment.to_mapping())
    found = snapshots(experiment, OverGrid(grid, experiment, load(experiment), greet(grid, 2)))
    came = torch.bincount(torch.cat([s.told.worker for s in found]), minlength=4)
    assert came.tolist() == [3, 3, 3, 3]
    assert figure(found[-1], "arrivals.min") == figure(found[-1], "arrivals.max") == 3
    assert found[-1].clock.local_steps == 24


class Far(InProcessGrid):
    """Nodes that answer one message at a time, not in the order in which they got them, and note who is on the way."""

    def __init__(self, experiment: Experiment, nodes: int) -> None:
        super().__init__(client_app.app, nodes, experiment.to_mapping())
        self.most: dict[int, int] = {}
        self.first: dict[int, int] = {}
        self.before: dict[int, int] = {}

    def pull_messages(self, message_ids: Any) -> Iterator[Message]:
        waiting = [(i, self._pushed[i].metadata.dst_node_id) for i in message_ids if i in self._pushed]
        for node in sorted({node for _, node in waiting}):
            mine = [i for i, other in waiting if other == node]
            workers = [int(self._pushed[i].content["about"].get("worker", -1)) for i in mine]  # type: ignore[arg-type]
            assert len(set(workers)) == len(workers)  # a worker's messages come one after the other
            for i in mine:
                about = self._pushed[i].content["about"]
                if "worker" in about:
                    worker, period = int(about["worker"]), int(about["round"])  # type: ignore[arg-type]
                    if i == mine[-1]:
                        assert period == self.before.get(worker, 0) + 1
                        self.before[worker] = period
            self.first.setdefault(node, len(mine))
            self.most[node] = max(self.most.get(node, 0), len(mine))
            yield from super().pull_messages(mine[-1:])


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_several_messages_are_on_the_way_to_a_node(in_flight: int) -> None:
    experiment = parabolas(**ALONE, schedule="FreeRunning()", rounds=3)
    grid = Far(experiment, 1)
    carrier = OverGrid(grid, experiment, load(experiment), greet(grid, 1))
    carrier.live.in_flight = in_flight
    grid.most.clear()
    grid.first.clear()
    found = snapshots(experiment, carrier)
    # the first begins the node's run, and is alone
    assert (grid.first, grid.most) == ({2: 1}, {2: in_flight})
    assert not any(s.failures for s in found)
    assert not any(s.metrics.get("lost") for s in found)
    came = torch.cat([s.told.worker for s in found]).tolist()
    assert len(came) == 12
    assert all(grid.before[w] >= came.count(w) for w in set(came))
    assert found[-1].clock.local_steps == 24


def test_simulated_nodes_get_one_message_at_a_time() -> None:
    experiment = parabolas(**ALONE, schedule="FreeRunning()", rounds=3)
    carrier = over_messages(experiment)
    assert isinstance(carrier, OverGrid)
    assert carrier.live.in_flight == 1
