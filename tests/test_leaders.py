"""Leaders and centres: golden vectors through whole runs, closed forms, reductions, schedules, interruption."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from toys import blobs, registered

import fedsim
from fedsim import Experiment, client_app, tree
from fedsim.carriers import Carrier, Fetched, InProcess
from fedsim.cohort import Cohort
from fedsim.data import Shards
from fedsim.experiment import BadInput
from fedsim.federation import load
from fedsim.grid import InProcessGrid
from fedsim.network import Network
from fedsim.over_grid import OverGrid, greet
from fedsim.plans import PLANS
from fedsim.probes import Clock, Snapshot
from fedsim.registry import REGISTRY
from fedsim.schedule import FreeRunning, grants
from fedsim.scores import Scorer
from fedsim.simulate import Position, rounds
from fedsim.trajectories import draw, follow
from strategies import Downpour, ElasticAveraging, FedAvg, LeaderGD, LeaderSGD, Report, Rule
from strategies.leader import best

GOLDEN = 1e-9
STARTS = "(3.0, -2.0, 1.0, 4.0)"


@dataclass(frozen=True)
class Short(FreeRunning):
    """Free-running workers whose second period is one step: the golden vectors end in the middle of a period."""

    def steps(self, experiment: Experiment, round: int) -> Tensor | None:
        """Shorten every period from the second on."""
        return torch.full((experiment.num_workers,), 1 if round > 1 else experiment.local_steps)


@pytest.fixture(autouse=True)
def _short() -> Iterator[None]:
    fedsim.register("schedule", Short)
    with registered():
        yield
    del REGISTRY["schedule"]["Short"]


def parabolas(**settings: Any) -> Experiment:
    base = {
        "data": "Parabolas()", "partition": "Natural()", "model": f"Scalar(starts_at={STARTS})",
        "objective": "SquaredError(half=True)", "client": "SGD(lr=0.1)", "num_workers": 4, "rounds": 1,
        "batch_size": 0, "device": "cpu", "dtype": "float64",
    }  # fmt: skip
    return Experiment.from_mapping(base | settings)


def here(experiment: Experiment) -> Carrier:
    return InProcess(experiment, load(experiment))


def over_messages(experiment: Experiment) -> Carrier:
    grid = InProcessGrid(client_app.app, experiment.num_workers, experiment.to_mapping())
    return OverGrid(grid, experiment, load(experiment), greet(grid, experiment.num_workers))


def snapshots(experiment: Experiment, carrier: Carrier | None = None) -> list[Snapshot]:
    return [snapshot for snapshot, _ in rounds(experiment, carrier=carrier)]


def figure(snapshot: Snapshot, name: str) -> float:
    value = snapshot.metrics[name]
    assert isinstance(value, int | float)
    return value


def values(rows: tree.Stack) -> list[float]:
    (leaf,) = rows.values()
    return leaf.flatten().tolist()


def near(expected: list[float]) -> Any:
    return pytest.approx(expected, abs=GOLDEN)


carriers = pytest.mark.parametrize("carrier", [here, over_messages])

LED = {
    "V1": (
        {"strategy": "LeaderSGD(pull=0.2, groups=2, pull_global=0.3, global_every=2, leader='full_batch')"},
        {1: [2.43, -0.25, 0.805, 2.917], 2: [1.92900775, 0.93875975, 1.5237613, 2.6625325]},
        {1: [0, 2], 2: [1, 3]},
    ),
    "V2": (
        {"strategy": "LeaderSGD(pull=0.2, groups=2, pull_global=0.3, global_every=1, leader='full_batch')"},
        {1: [1.9425, 0.0665, 0.805, 2.2834]},
        {1: [0, 2]},
    ),
    "V3": (
        {
            "strategy": "LeaderSGD(pull=0.2, groups=2, pull_global=0.3, global_every=2, leader='full_batch', "
            "prox=0.1, prox_global=0.2)"
        },
        {
            1: [1.6994525, -0.4799045, 1.3564979875, 3.0908141875],
            2: [1.6536962115, 1.0573946741, 1.9327072479, 2.6963342005],
            4: [1.2521410351, 1.2520169178, 1.7411795330, 2.0675094845],
        },
        {},
    ),
    "V4": (
        {
            "strategy": "LeaderSGD(pull=0.2, leader='full_batch')", "local_steps": 4,
            "schedule": "TotalSteps(durations=(1.0, 1.0, 2.0, 4.0))",
        },
        {
            1: [1.4184084, 0.156518, 0.71475, 2.89895],
            2: [0.7477618665, 0.7236078182, 0.5208685886, 2.2643146636],
        },
        {1: [2], 2: [1]},
    ),
    "V5": (
        {
            "strategy": "LeaderSGD(pull=0.2, groups=2, pull_global=0.3, global_every=2, leader='full_batch')",
            "schedule": "TotalSteps(durations=(1.0, 1.0, 2.0, 4.0))",
        },
        {1: [1.6424, -0.536, 0.9, 3.14], 2: [0.764463296, 0.213568, 0.9305304, 2.1423704]},
        {1: [1, 2], 2: [1, 3]},
    ),
}  # fmt: skip


@carriers
@pytest.mark.parametrize(("settings", "expected", "leaders"), LED.values(), ids=list(LED))
def test_leader_sgd(carrier: Any, settings: dict, expected: dict, leaders: dict) -> None:
    experiment = parabolas(**{"local_steps": 2, "rounds": max(expected)} | settings)
    found = snapshots(experiment, carrier(experiment))
    for r, rows in expected.items():
        assert values(found[r - 1].after) == near(rows)
        assert found[r - 1].model["0.weight"].item() == pytest.approx(sum(rows) / 4, abs=GOLDEN)
    for r, who in leaders.items():
        assert found[r - 1].broadcast["lead"]["worker"].tolist() == who


def test_the_best_of_all_leads_the_leaders() -> None:
    for name, r, who in (("V1", 2, 3), ("V2", 1, 2), ("V5", 2, 1)):
        found = snapshots(parabolas(**{"local_steps": 2, "rounds": r} | LED[name][0]))
        assert int(found[-1].broadcast["lead"]["best"]) == who


def test_steps_in_total() -> None:
    for name, steps, time in (("V4", [6, 5, 3, 2], 8.0), ("V5", [3, 3, 1, 1], 4.0)):
        found = snapshots(parabolas(**{"local_steps": 2, "rounds": 3} | LED[name][0]))
        for s in found:
            assert s.report.steps.tolist() == steps
            assert s.clock.sim_time == s.round * time


@carriers
def test_v6_leader_gradient_descent(carrier: Any) -> None:
    same = "Parabolas(a=(1.0, 1.0, 1.0, 1.0), b=(0.0, 0.0, 0.0, 0.0))"
    experiment = parabolas(data=same, strategy="LeaderGD(pull=0.1)", local_steps=1, rounds=3)
    found = snapshots(experiment, carrier(experiment))
    assert values(found[0].after) == near([2.5, -1.5, 0.9, 3.3])
    assert values(found[1].after) == near([2.09, -1.11, 0.81, 2.73])
    assert values(found[2].after) == near([1.753, -0.807, 0.729, 2.265])


@carriers
def test_v8_elastic_averaging(carrier: Any) -> None:
    experiment = parabolas(strategy="ElasticAveraging(beta=0.4)", local_steps=1, rounds=3)
    found = snapshots(experiment, carrier(experiment))
    assert [s.model["0.weight"].item() for s in found] == near([1.5, 1.49, 1.469])
    assert values(found[2].rows) == near([1.901, 0.0795, 0.870375, 2.727125])


def test_elastic_averaging_after_the_step() -> None:
    """The named variant: step, then both sides move towards the other's old place."""
    experiment = parabolas(strategy="ElasticAveraging(beta=0.4, after_step=True)", local_steps=1, rounds=3)
    a, b = torch.tensor([1, 2, 0.5, 1.5]).double(), torch.tensor([0, 1, -1, 2]).double()
    x, center = torch.tensor([3, -2, 1, 4]).double(), 1.5
    for s in snapshots(experiment):
        x = x - 0.1 * a * (x - b)
        x, center = x - 0.1 * (x - center), center + 0.4 * (x.mean().item() - center)
        assert values(s.after) == near(x.tolist())
        assert s.model["0.weight"].item() == pytest.approx(center, abs=GOLDEN)


ALONE = {"strategy": "ElasticAveraging(alpha=0.1)", "local_steps": 2}


@carriers
def test_v9_elastic_averaging_of_workers_that_come_alone(carrier: Any) -> None:
    """The rows after eight ticks are those that come back first; by then the centre has met each of them once more."""
    experiment = parabolas(**ALONE, schedule="FreeRunning()")
    (found,) = snapshots(experiment, carrier(experiment))
    assert values(found.rows) == near([2.295, -0.628, 0.832075, 3.2118025])
    center = 1.53085
    for x in values(found.rows):
        center += 0.1 * (x - center)
    assert found.model["0.weight"].item() == pytest.approx(center, abs=GOLDEN)


@carriers
def test_v10_eamsgd(carrier: Any) -> None:
    settings = ALONE | {"client": "Nesterov(lr=0.05, momentum=0.9)", "rounds": 2}
    experiment = parabolas(**settings, schedule="Short()")
    found = snapshots(experiment, carrier(experiment))
    assert found[0].model["0.weight"].item() == pytest.approx(1.52541601, abs=GOLDEN)
    assert values(found[1].rows) == near([1.99924375, -0.038691, 0.8049581312, 2.8295197119])


def test_v10_what_workers_keep() -> None:
    """After the first round every worker is in its second period, which is the third step of the vector."""
    experiment = parabolas(**ALONE, client="Nesterov(lr=0.05, momentum=0.9)", schedule="Short()")
    carrier = here(experiment)
    snapshots(experiment, carrier)
    kept = carrier.checkpoint()
    assert kept["0/rows/0.weight"].flatten().tolist() == near([
        1.99924375,
        -0.038691,
        0.8049581312,
        2.8295197119,
    ])
    velocity = kept["0/state/velocity/0.weight"].flatten().tolist()
    assert velocity == near([-0.34691625, 0.571815, -0.1290327188, -0.3022831781])


@carriers
def test_v11_downpour(carrier: Any) -> None:
    settings = {"strategy": "Downpour()", "local_steps": 2, "model": "Scalar(starts_at=(1.5, 1.5, 1.5, 1.5))"}
    experiment = parabolas(**settings, schedule="Short()", rounds=2)
    first, second = snapshots(experiment, carrier(experiment))
    assert first.model["0.weight"].item() == pytest.approx(0.93, abs=GOLDEN)
    assert values(second.rows) == near([1.0935, 1.028, 0.7016875, 1.0905])
    pending = [x - s for x, s in zip(values(second.rows), values(first.state["sent"]), strict=True)]
    assert pending == near([-0.1215, -0.007, -0.0895625, 0.1605])


# ------------------------------------------------------------------------------- who leads, and when


def test_v7_a_window_holds_only_losses_that_exist() -> None:
    experiment = parabolas(strategy="LeaderSGD(window=4)", num_workers=3, data="Parabolas(a=(1.0, 1.0, 1.0), b=(0.0, 0.0, 0.0))", model="Scalar(starts_at=(1.0, 1.0, 1.0))")  # fmt: skip
    scorer = Scorer(experiment, load(experiment), 0, 3)
    losses = torch.tensor(
        [[9, 1, 1, 1, 0.2], [9, 0.5, 0.5, 0.5, 0.5], [0.9, 0, 0, 0, 0]], dtype=torch.float64
    )
    scorer.remember(torch.arange(3), losses, torch.tensor([5, 5, 1]))
    score = scorer.of(1, torch.arange(3), {}, lambda rule: PLANS["loop"](*[None] * 4))  # type: ignore[arg-type]
    assert score.tolist() == pytest.approx([0.8, 0.5, 0.9])
    assert best(score) == 1
    scorer.remember(torch.tensor([2]), torch.tensor([[0.1, 7.0]], dtype=torch.float64), torch.tensor([1]))
    assert scorer.of(1, torch.tensor([2]), {}, lambda rule: PLANS["loop"](*[None] * 4)).item() == 0.5  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("score", "expected"),
    [([3.0, 1.0, 1.0], 1), ([math.nan, 2.0, -math.inf], 1), ([math.inf, math.nan], None), ([], None)],
)
def test_the_best_is_finite_and_the_first_of_equals(score: list[float], expected: int | None) -> None:
    assert best(torch.tensor(score, dtype=torch.float64)) == expected


def report(loss: list[float]) -> Report:
    m = len(loss)
    ones = torch.ones(m, dtype=torch.int64)
    return Report(torch.arange(m), torch.tensor(loss, dtype=torch.float64), ones.double(), ones, ones)


def test_nobody_leads_where_no_score_is_finite() -> None:
    rule, theta = LeaderSGD(groups=2), {"w": torch.zeros(3)}
    state, broadcast = rule.init(theta, 4)
    rows = {"w": torch.randn(4, 3)}
    state, broadcast = rule.merge(state, {"w": rows["w"][1:3]}, report([5.0, 1.0, 2.0, math.nan]))
    assert broadcast["lead"]["worker"].tolist() == [1, 2]
    nothing = report([math.nan] * 4)
    assert not len(rule.choose(state, nothing))
    with pytest.warns(UserWarning, match="sync 2: no worker has a finite score, nobody leads"):
        state, broadcast = rule.merge(state, tree.take(rows, slice(0)), nothing)
    adopt = torch.vmap(rule.adopt, in_dims=(0, None, 0))
    assert torch.equal(adopt(rows, broadcast, torch.arange(4))["w"], rows["w"])
    # a group of which no score is finite is not pulled; the others are, by its own leader only
    state, broadcast = rule.merge(state, {"w": rows["w"][1:2]}, report([5.0, 1.0, math.nan, math.nan]))
    moved = adopt(rows, broadcast, torch.arange(4))["w"]
    assert torch.equal(moved[1:], rows["w"][1:])
    torch.testing.assert_close(moved[0], 0.9 * rows["w"][0] + 0.1 * rows["w"][1])


BY = ["running_train", "fresh_batch", "full_batch", "shared_val"]


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("nodes", [1, 3])
def test_scores_are_the_losses_that_they_are_called(by: str, nodes: int) -> None:
    experiment = blobs(
        strategy=f"LeaderSGD(pull=0.0, leader='{by}', window=4)",
        holdout=0.4,
        rounds=2,
        batch_size=2,
        nodes=nodes,
    )
    federation = load(experiment)
    first, second = snapshots(experiment)
    data = federation.dataset
    for s in (first, second):
        for i in range(5):
            row, own = tree.take(s.rows, i), federation.train.rows(i)
            at = {"full_batch": own, "shared_val": federation.held.order}.get(by)
            if at is not None and (by == "full_batch" or len(at) <= 4):
                loss = cross_entropy(functional_call(federation.module, row, (data.x[at],)), data.y[at])
                assert s.told.loss[i].item() == pytest.approx(loss.item(), rel=1e-12)
        chosen = int(s.told.loss.argmin())
        assert int(s.broadcast["lead"]["worker"]) == chosen
    if by == "running_train":  # three losses, then the last of them and three more
        assert first.told.loss.tolist() == pytest.approx(first.report.loss.tolist(), rel=1e-12)
        single = blobs(strategy="LeaderSGD(pull=0.0, window=1)", holdout=0.4, rounds=2, batch_size=2)
        last = snapshots(single)[0].told.loss
        assert second.told.loss.tolist() == pytest.approx(
            ((3 * second.report.loss + last) / 4).tolist(), rel=1e-12
        )
    if by == "fresh_batch":
        assert first.told.loss.tolist() != pytest.approx(first.report.loss.tolist(), rel=1e-3)


def test_shared_rows_are_the_same_for_all() -> None:
    experiment = blobs(strategy="LeaderSGD(leader='shared_val', window=6)", holdout=0.4)
    federation, own = load(experiment), blobs(nodes=1)
    scorer = Scorer(experiment, federation, 0, 5)
    assert len(scorer.shared) == 6
    assert set(scorer.shared.tolist()) <= set(federation.held.order.tolist())
    assert torch.equal(scorer.shared, Scorer(experiment, federation, 2, 4).shared)
    part = federation._replace(held=Shards.from_assignment(np.array([0, 1]), 2), train=federation.train)
    with pytest.raises(BadInput, match="nodes with data of their own share no held-out rows"):
        Scorer(experiment, part, 0, 2)
    assert own


def test_own_losses_are_warned_of_where_data_differ() -> None:
    skewed = Experiment(strategy="LeaderSGD()", num_workers=4, rounds=1, model="Linear()", device="cpu")
    with pytest.warns(UserWarning, match="elects the one with the easiest under partition = 'Dirichlet"):
        next(rounds(skewed))
    fair = skewed.replace({"strategy": "LeaderSGD(leader='shared_val', window=100)", "holdout": 0.2})
    next(rounds(fair))


# ---------------------------------------------------------------------------------------- invariants

MOST = {"local_steps": 2, "rounds": 4}


@pytest.mark.parametrize(
    "strategy", ["LeaderSGD(pull=0.3, leader='full_batch')", "LeaderSGD(groups=5, global_every=2)"]
)
def test_a_leader_stays_bit_for_bit(strategy: str) -> None:
    for s in snapshots(blobs(strategy=strategy)):
        who = int(s.broadcast["lead"]["best"])
        for name, x in s.rows.items():
            assert torch.equal(x[who], s.after[name][who])
        moved = [not torch.equal(s.rows[k], s.after[k]) for k in s.rows]
        assert any(moved) or s.round % 2


def test_a_full_pull_copies_the_winner() -> None:
    for s in snapshots(blobs(strategy="LeaderSGD(pull=1.0)", local_steps=1)):
        for name, x in s.after.items():
            assert torch.equal(x, s.broadcast["model"][name].expand_as(x))


@pytest.mark.parametrize(
    "strategy",
    [
        "LeaderSGD(pull=0.0)",
        "ElasticAveraging(alpha=0.0, beta=0.5)",
        "ElasticAveraging(alpha=0.0, after_step=True)",
    ],
)
def test_without_a_pull_workers_are_alone(strategy: str) -> None:
    """E6: bit for bit what each of them does in a federation of its own."""
    experiment = blobs(strategy=strategy, client="SGD(lr=0.3, momentum=0.9)", plan="loop")
    federation = load(experiment)
    rows = snapshots(experiment)[-1].rows
    cohort = Cohort(experiment.replace({"strategy": "LeaderSGD(pull=0.0)"}), federation, 2, 3)
    alone = [cohort.train(r, torch.tensor([2]), {"model": federation.theta}).rows for r in range(1, 5)]
    for name, x in rows.items():
        assert torch.equal(x[2], alone[-1][name][0])


def test_one_group_knows_no_global_pull() -> None:
    a, b = (
        snapshots(blobs(strategy=f"LeaderSGD(pull_global={g}, global_every={k})"))[-1]
        for g, k in ((0.1, 1), (0.9, 3))
    )
    for name, x in a.after.items():
        assert torch.equal(x, b.after[name])


@pytest.mark.parametrize("client", ["SGD(lr=0.3)", "SGD(lr=0.3, momentum=0.9)"])
@pytest.mark.parametrize(
    "strategy", ["LeaderSGD(prox=0.4)", "LeaderSGD(groups=5, prox=0.4, prox_global=0.3)"]
)
def test_all_plans_make_the_same_stale_pulls(client: str, strategy: str) -> None:
    """In place or not, with workers that have finished cut off."""
    experiment = blobs(client=client, strategy=strategy, schedule="TotalSteps(durations=(1.0, 2.0))")
    expected = last(experiment.replace({"plan": "loop"}))
    for plan in ("stacked", "vmap"):
        found = last(experiment.replace({"plan": plan}))
        for name, leaf in expected.after.items():
            torch.testing.assert_close(found.after[name], leaf, rtol=1e-12, atol=1e-12)
    assert expected.metrics["train_loss"] != last(blobs(client=client, plan="loop")).metrics["train_loss"]


def test_permuting_workers_permutes_results() -> None:
    first = parabolas(**MOST, strategy="LeaderSGD(pull=0.2, leader='full_batch')")
    data = "Parabolas(a=(1.5, 0.5, 2.0, 1.0), b=(2.0, -1.0, 1.0, 0.0))"
    second = first.replace({"data": data, "model": "Scalar(starts_at=(4.0, 1.0, -2.0, 3.0))"})
    assert values(snapshots(first)[-1].after) == pytest.approx(
        values(snapshots(second)[-1].after)[::-1], rel=1e-14
    )


def test_what_is_sent_is_counted_as_in_the_paper() -> None:
    """One float is four bytes; a sync of 16 workers with 351,946 parameters."""
    p, theta = 16, {"w": torch.zeros(351_946)}
    some = report([1.0] * p)
    rows = tree.replicate(theta, p)

    def floats(rule: Rule, syncs: int = 1) -> float:
        state, broadcast = rule.init(theta, p)
        before = clock = Clock()
        for _ in range(syncs):
            before = clock
            chosen = torch.isin(some.worker, rule.choose(state, some))
            state, broadcast = rule.merge(state, tree.take(rows, chosen), some)
            clock = Network().tick(clock, some, theta, broadcast, 1.0, rule.traffic(broadcast, p))
        return (clock.bytes_up - before.bytes_up + clock.bytes_down - before.bytes_down) / 4

    d = 351_946
    assert floats(LeaderSGD()) == 5_983_098 == d + p * d + p
    assert floats(ElasticAveraging()) == floats(FedAvg()) == floats(Downpour()) == 11_262_272 == 2 * p * d
    assert floats(LeaderSGD(groups=4, global_every=2)) == 4 * d + p * d + p
    assert floats(LeaderSGD(groups=4, global_every=2), syncs=2) == 4 * d + 2 * p * d + p


@carriers
def test_runs_count_what_is_sent(carrier: Any) -> None:
    experiment = parabolas(strategy="LeaderSGD()", local_steps=3, rounds=3)
    for s in snapshots(experiment, carrier(experiment)):
        assert (s.clock.bytes_up, s.clock.bytes_down) == (8 * s.round * (1 + 4), 8 * s.round * 4)
        assert s.clock.gradients == s.clock.local_steps == 12 * s.round
    experiment = parabolas(**ALONE, schedule="FreeRunning()", rounds=3)
    for s in snapshots(experiment, carrier(experiment)):  # four came before the first round
        assert s.clock.bytes_up == s.clock.bytes_down == 8 * 4 * (s.round + 1)
        assert s.clock.gradients == s.clock.local_steps == 8 * s.round


# ------------------------------------------------------------------------------------- closed forms


def last(experiment: Experiment) -> Snapshot:
    *_, snapshot = snapshots(experiment)
    return snapshot


def test_e4_the_elastic_fixed_point_is_not_the_minimiser() -> None:
    s = last(parabolas(strategy="ElasticAveraging(beta=0.4)", local_steps=1, rounds=1200, eval_every=0))
    a, b = torch.tensor([1.0, 2.0, 0.5, 1.5]), torch.tensor([0.0, 1.0, -1.0, 2.0])
    center = float((a * b / (a + 1)).sum() / (a / (a + 1)).sum())
    assert center == pytest.approx(0.7301587302, abs=1e-7)
    assert s.model["0.weight"].item() == pytest.approx(0.7301587302, abs=1e-8)
    assert values(s.rows) == pytest.approx([0.3650793651, 0.9100529101, 0.1534391534, 1.4920634921], abs=1e-8)


def test_e5_the_sum_of_workers_and_centre_is_kept() -> None:
    experiment = parabolas(
        strategy="ElasticAveraging(beta=0.4, alpha=0.1)", client="SGD(lr=1e-300)", local_steps=1, rounds=20
    )
    for s in snapshots(experiment):
        assert sum(values(s.rows)) + s.model["0.weight"].item() == pytest.approx(7.5, abs=1e-12)
    experiment = parabolas(
        **ALONE | {"client": "SGD(lr=1e-300)", "local_steps": 1}, schedule="FreeRunning()", rounds=5
    )
    carrier = here(experiment)
    for s, _ in rounds(experiment, carrier=carrier):
        kept = carrier.checkpoint()["0/rows/0.weight"].sum().item()
        assert kept + s.model["0.weight"].item() == pytest.approx(7.5, abs=1e-12)


def _turn(p: int, eta: float, alpha: float) -> Tensor:
    """On ``x^2 / 2`` a turn of all workers is a linear map of rows and centre; its columns are run side by side."""
    rule, basis = ElasticAveraging(alpha=alpha), torch.eye(p + 1, dtype=torch.float64)
    state, _ = rule.init({"x": basis[p]}, p)
    found = []
    for i in range(p):
        s = {"x": basis[i]}
        state, broadcast = rule.exchange(state, {"x": s["x"][None]}, report([0.0]))
        found.append(rule.follow({"x": (1 - eta) * s["x"]}, s, broadcast, torch.tensor(i), 1)["x"])
    return torch.stack([*found, state["model"]["x"]])


@pytest.mark.parametrize("p", [3, 8])
@pytest.mark.parametrize("eta", [0.1, 0.5, 1.0, 1.5])
def test_e2_stability_of_workers_that_come_in_turn(p: int, eta: float) -> None:
    def growth(alpha: float) -> float:
        return torch.linalg.matrix_power(_turn(p, eta, alpha), 500).abs().max().item()

    limit = (4 - 2 * eta) / (4 - eta)
    assert growth(limit) <= 1 + GOLDEN  # on the boundary
    assert growth(0.5 * limit) < 1
    assert growth(1.05 * limit) > 1e4


@pytest.mark.parametrize(("p", "radius"), [(3, 0.999269748), (8, 0.999115698)])
def test_e3_workers_that_come_in_turn_settle_where_alternating_directions_do_not(
    p: int, radius: float
) -> None:
    turn = _turn(p, 0.001, 0.001 * 2.5)
    assert torch.linalg.eigvals(turn).abs().max().item() == pytest.approx(radius, abs=GOLDEN)


@pytest.mark.parametrize(
    ("rho", "elastic", "led"),
    [
        pytest.param(0.1, 0.9486832981, -0.8872983346, marks=pytest.mark.slow),
        (0.2, 0.8944271910, -0.7236067977),
    ],
)
def test_l4_two_wells(rho: float, elastic: float, led: float) -> None:
    """The centre holds both workers back from their minima; a leader reaches its own and holds back the other."""
    well = parabolas(
        data="Blank()", model="DoubleWell()", objective="Value()", num_workers=2, local_steps=1, eval_every=0,
        strategy=f"ElasticAveraging(beta={0.2 * rho}, alpha={0.1 * rho})", plan="loop", rounds=round(110 / rho),
    )  # fmt: skip
    s = last(well)
    assert values(s.rows) == pytest.approx([-elastic, elastic], abs=1e-9)
    assert s.model["position"].item() == pytest.approx(0, abs=1e-9)
    s = last(well.replace({"strategy": f"LeaderGD(pull={0.1 * rho})", "rounds": 400}))
    assert values(s.rows) == pytest.approx([led, 1.0], abs=1e-9)


def test_l5_one_step_towards_a_better_point_descends() -> None:
    """The bound of Teng et al. for one step with noise s: both sides in closed form, for 1000 random quadratics."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    worst = -math.inf
    for _ in range(1000):
        h = 0.1 + 5 * draw(4)
        m, big = float(h.min()), float(h.max())
        kappa, noise = big / m, float(draw(1))
        eta = (0.01 + 0.99 * float(draw(1))) / (2 * big)
        rho = float(draw(1)) * min(1 / (2 * kappa * eta), 1 / (2 * m * (eta * kappa) ** 2))
        x = 4 * draw(4) - 2
        z = 4 * draw(4) - 2

        def f(y: Tensor, h: Tensor = h) -> float:
            return float((h * y * y).sum() / 2)

        z = z * min(1.0, math.sqrt(f(x) / f(z)))
        rule = LeaderSGD(pull=eta * rho)
        state, _ = rule.init({"w": x}, 2)
        at = {"w": torch.stack([z, x])}
        _, broadcast = rule.merge(state, tree.take(at, slice(1)), report([f(z), f(x)]))
        pulled = rule.adopt({"w": x}, broadcast, torch.tensor(1))["w"]
        step = pulled - eta * h * x
        expected = f(step) + eta**2 * noise * float(h.sum()) / 2 / 4  # noise of covariance noise / 4 I
        bound = (1 - m * eta) * f(x) - eta * rho * (f(x) - f(z)) + eta**2 * big * noise / 2
        worst = max(worst, expected - bound)
    assert worst <= 1e-12


@pytest.mark.parametrize("doubt", [0.0, 0.3, 3.0])
def test_l6_a_wrong_leader_costs_no_more_than_the_doubt_about_losses(doubt: float) -> None:
    """The bound of Teng et al. for losses that are known up to noise; each group is a federation with a quadratic of its own.

    The long-run mean of f is at most ``eta kappa s^2 / 2 + 4 rho sqrt(p) doubt / m``, far above what is seen; without
    pulls its closed form is ``eta s^2 / 4`` over 3 dimensions, each with the share ``1 / (1 - eta h / 2)``.
    """
    generator = torch.Generator().manual_seed(2)
    problems, p, eta, rho, steps = 4, 4, 0.2, 0.5, 500
    h = 0.5 + 1.5 * torch.rand(problems, 3, generator=generator, dtype=torch.float64)
    curvature = h.repeat_interleave(p, dim=0)
    found = []
    for pull in (0.0, eta * rho):
        rule = LeaderSGD(pull=pull, groups=problems, global_every=10 * steps)
        state, _ = rule.init({"x": torch.zeros(3, dtype=torch.float64)}, problems * p)
        adopt = torch.vmap(rule.adopt, in_dims=(0, None, 0))
        worker, total = torch.arange(problems * p), torch.zeros(problems, dtype=torch.float64)
        x = torch.zeros(problems * p, 3, dtype=torch.float64)
        for step in range(steps):
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64) / math.sqrt(3)
            x = x - eta * (curvature * x + noise)
            value = (curvature * x * x).sum(1) / 2
            seen = value + doubt * torch.randn(len(x), generator=generator, dtype=torch.float64)
            state, broadcast = rule.merge(state, {"x": x}, report(seen.tolist()))
            x = adopt({"x": x}, broadcast, worker)["x"]
            if step >= steps // 5:
                total += (curvature * x * x).sum(1).view(problems, p).mean(1) / 2
        found.append(total / (steps - steps // 5))
    small, large = h.min(1).values, h.max(1).values
    bound = eta * large / small / 2 + 4 * rho * math.sqrt(p) * doubt / small
    assert found[0].tolist() == pytest.approx((eta / 12 / (1 - eta * h / 2)).sum(1).tolist(), rel=0.25)
    assert bool((found[1] <= bound).all())
    assert bool((found[1] > bound / 1e4).all())


def _pulled_steps(x: Tensor, h: Tensor, z: Tensor, pull: float) -> Tensor:
    """Steps of size 1 from ``x`` on ``sum h x^2 / 2``, each with one of the leaders ``z``."""
    rule = LeaderGD(pull=pull)
    state, broadcast = rule.init({"w": x}, 1)
    lead = state["lead"] | {"pull": torch.full_like(state["lead"]["pull"], pull)}

    def one(z: Tensor) -> Tensor:
        sent = {**broadcast, "model": {"w": z}, "lead": lead}
        return rule.follow({"w": x - h * x}, {"w": x}, sent, torch.tensor(0), 1)["w"] - x

    return torch.vmap(one)(z)


def test_l7_better_points_lie_where_newton_would_go() -> None:
    """On quadratics, a small pull to a point of lower value turns the step towards Newton's in at least half of cases."""
    generator = torch.Generator().manual_seed(1)
    for dimension in (2, 5, 20):
        for kappa in (2.0, 10.0, 100.0):
            h = torch.logspace(0, math.log10(kappa), dimension, dtype=torch.float64)
            x = torch.randn(dimension, generator=generator, dtype=torch.float64)
            direction = torch.randn(400, dimension, generator=generator, dtype=torch.float64)
            radius = torch.rand(400, 1, generator=generator, dtype=torch.float64) ** (1 / dimension)
            z = radius * direction / direction.norm(dim=1, keepdim=True) * (h * x * x).sum().sqrt() / h.sqrt()
            step = _pulled_steps(x, h, z, 1e-3)
            plain, newton = (
                torch.cosine_similarity(-h * x, -x, dim=0),
                torch.cosine_similarity(step, -x[None], dim=1),
            )
            share = (newton >= plain).double().mean().item()
            assert share >= 0.5 - 3 * 0.5 / math.sqrt(400)


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


# ----------------------------------------------------------------------------------- pictures' toys


def toy(name: str, **settings: Any) -> Experiment:
    return Experiment.from_toml(
        Path(__file__).parents[1] / "experiments" / name, {"device": "cpu"} | settings
    )


def test_l2_following_the_best_breaks_the_symmetry() -> None:
    found = snapshots(toy("symmetry_lgd.toml"))
    worst = [figure(s, "worker_loss.max") for s in found]
    first = [figure(s, "worker_loss.min") for s in found]
    assert worst[-1] < -0.215
    assert next(i for i, x in enumerate(first, 1) if x < -0.19) == 13
    assert next(i for i, x in enumerate(worst, 1) if x < -0.215) == 46
    assert last(toy("symmetry_lgd.toml")).model["position"].tolist() == pytest.approx([1.43, 0.06], abs=0.01)


def test_l2_a_centre_does_not() -> None:
    s = last(toy("symmetry_easgd.toml"))
    assert s.metrics["worker_loss.min"] == pytest.approx(-0.0913, abs=2e-3)
    assert s.metrics["worker_loss.max"] == pytest.approx(-0.0913, abs=2e-3)


@pytest.mark.parametrize(
    ("rank", "seeds", "crossing", "plateau"),
    [(1, 4, (25, 36), (1.0e-2, 1.4e-2)), (10, 1, (34, 42), (0.11, 0.13))],
)
def test_l3_factorisation(
    rank: int, seeds: int, crossing: tuple[int, int], plateau: tuple[float, float]
) -> None:
    for seed in range(seeds):
        settings = {"data": f"LowRank(rank={rank})", "seed": seed, "eval_every": 0, "plan": "vmap"}
        found = [s.report.loss.min().item() for s in snapshots(toy("factorisation_lgd.toml", **settings))]
        assert crossing[0] <= next(i for i, x in enumerate(found) if x < 1e-7) <= crossing[1]
        found = [s.report.loss.min().item() for s in snapshots(toy("factorisation_easgd.toml", **settings))]
        assert plateau[0] <= found[-1] <= plateau[1]


def test_the_models_are_evaluated_side_by_side() -> None:
    s = last(toy("symmetry_easgd.toml", rounds=3))
    sinc = [torch.sinc(x.norm()).item() for x in s.after["position"]]
    assert s.metrics["test_loss.leader"] == pytest.approx(sinc[int(s.report.loss.argmin())], rel=1e-12)
    assert s.metrics["test_loss.average"] == pytest.approx(
        torch.sinc(s.after["position"].mean(0).norm()).item(), rel=1e-12
    )
    assert s.metrics["test_loss.center"] == s.metrics["test_loss"]
    assert s.metrics["worker_loss.max"] == pytest.approx(max(sinc), rel=1e-12)


def test_who_leads() -> None:
    found = snapshots(parabolas(**{"local_steps": 2, "rounds": 2} | LED["V1"][0], probes="Leaders()"))
    scores = [s.told.loss for s in found]
    who = [int(x.argmin()) for x in scores]
    last_one = found[-1].metrics
    assert [s.metrics["leaders.who"] for s in found] == who == [2, 3]
    assert (last_one["leaders.switches"], last_one["leaders.share.2"], last_one["leaders.share.0"]) == (
        1,
        0.5,
        0.0,
    )
    rows = torch.tensor(values(found[-1].rows), dtype=torch.float64)
    away = (rows - rows[3]).abs()[:3]
    assert last_one["leaders.distance.mean"] == pytest.approx(away.mean().item())
    assert last_one["leaders.distance.max"] == pytest.approx(away.max().item())
    assert last_one["leaders.spread"] == pytest.approx((scores[1].max() - scores[1].min()).item())


# ---------------------------------------------------------------------------------------- bad input

BAD = [
    ({"strategy": "LeaderSGD(groups=3)"}, "groups = 3 must divide the number of workers 4"),
    ({"strategy": "LeaderSGD(pull=-0.1)"}, "LeaderSGD: pull = -0.1 must be >= 0"),
    ({"strategy": "LeaderSGD(leader='loudest')"}, "must be one of 'running_train'"),
    ({"strategy": "LeaderSGD(leader='shared_val')"}, "elects by held-out rows; set holdout > 0"),
    ({"strategy": "LeaderSGD()", "participation": 0.5}, "is defined for all workers; set it to 1.0"),
    ({"strategy": "LeaderSGD(prox=0.1)", "local_epochs": 1}, "needs local-steps"),
    ({"strategy": "LeaderGD()", "batch_size": 2}, "uses full gradients; set batch-size = 0"),
    ({"strategy": "LeaderSGD()", "schedule": "FreeRunning()"}, r"leader methods take 'TotalSteps\(...\)'"),
    ({"strategy": "FedAvg()", "schedule": "FreeRunning()"}, "cannot take workers one at a time"),
    ({"schedule": "TotalSteps()", "participation": 0.5}, "is defined for all workers"),
    ({"schedule": "TotalSteps()", "local_epochs": 1}, "needs local-steps"),
    ({"schedule": "TotalSteps(durations=(1.0, 0.0))"}, r"durations = \(1.0, 0.0\) must be numbers > 0"),
    ({"schedule": "FreeRunning(arrivals=-1)", "strategy": "Downpour()"}, "arrivals = -1 must be >= 0"),
    ({"strategy": "ElasticAveraging(beta=-1.0)"}, "beta = -1.0 must be >= 0"),
    ({"strategy": "ElasticAveraging(alpha=-1.0)"}, "alpha = -1.0 must be >= 0"),
    ({"client": "Nesterov(momentum=1.0)"}, r"momentum = 1.0 must be in \[0, 1\)"),
    ({"model": "Scalar(starts_at=(1.0, 2.0))"}, "starts has 2 points, for 4 workers"),
    ({"data": "Parabolas(a=(1.0,), b=(1.0,))"}, "a has 1 numbers, for 4 workers"),
    ({"data": "Parabolas(a=(1.0, -1.0), b=(1.0, 1.0))"}, "must be numbers > 0"),
    ({"data": "Parabolas(a=(1.0, 1.0), b=(1.0,))"}, "must have 2 numbers, as many as a"),
    ({"probes": "WorkerLoss(at='noon')"}, "must be one of 'steps', 'row'"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=lambda x: x if isinstance(x, str) else None)
def test_bad_input_is_one_line(settings: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message) as raised:
        next(rounds(parabolas(**settings)))
    assert "\n" not in str(raised.value)


def test_paths_are_drawn_over_level_lines() -> None:
    experiment = toy("symmetry_lgd.toml", rounds=4, probes="")
    paths = follow(experiment)
    assert paths.rows.shape == (5, 4, 2)
    assert paths.rows[0].tolist() == [[-6, -4], [-15, -18], [20, 11], [17, 8]]
    assert torch.equal(paths.rows[-1], last(experiment).after["position"])
    figure = draw({"leader": experiment, "centre": toy("symmetry_easgd.toml", rounds=4, probes="")}, size=20)
    assert [axes.get_title() for axes in figure.axes] == ["leader", "centre"]
    assert len(figure.axes[0].get_lines()) == 3 * 4 + 1
    with pytest.raises(ValueError, match="has 1 parameters, must have 2"):
        follow(parabolas(strategy="LeaderSGD()"))
    with pytest.raises(ValueError, match="keeps no rows of workers"):
        follow(experiment.replace({"strategy": "FedAvg()"}))


@pytest.mark.parametrize(
    "name",
    [
        "cnn7_leader_16", "cnn7_leader_16_small", "cnn7_leader_4", "cnn7_leader_small", "resnet20_leader_16",
        "resnet20_leader_small", "leader_skewed", "digits_at_different_speeds",
    ],
)  # fmt: skip
def test_experiments_are_well_formed(name: str) -> None:
    assert toy(f"{name}.toml").parts.strategy.keeps_rows


@pytest.mark.filterwarnings("ignore:strategy = 'LeaderSGD:UserWarning")
def test_following_the_easiest_worker_hurts() -> None:
    """Elected by their own losses, leaders of one label take everybody along; by shared rows they do not."""
    settings = {"eval-every": 0, "rounds": 12}
    own, fair, mean = (
        figure(last(toy("leader_skewed.toml", **settings, strategy=s)), "test_accuracy")
        for s in ("LeaderSGD(pull=0.3)", "LeaderSGD(pull=0.3, leader='shared_val', window=300)", "FedAvg()")
    )
    assert own < 0.4
    assert own + 0.1 < fair < mean
