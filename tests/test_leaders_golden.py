"""Leaders and centres: golden vectors through whole runs, in one process and over messages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from leaders_toys import ALONE, GOLDEN, carriers, parabolas, values
from torch import Tensor
from toys import here, snapshots

import fedsim
from fedsim import Experiment
from fedsim.registry import REGISTRY
from fedsim.schedule import FreeRunning


@dataclass(frozen=True)
class Short(FreeRunning):
    """Free-running workers whose second period is one step: the golden vectors end in the middle of a period."""

    def steps(self, experiment: Experiment, round: int) -> Tensor | None:
        """Shorten every period from the second on."""
        return torch.full((experiment.num_workers,), 1 if round > 1 else experiment.local_steps)


@pytest.fixture(autouse=True)
def short() -> Iterator[None]:
    fedsim.register("schedule", Short)
    yield
    del REGISTRY["schedule"]["Short"]


def near(expected: list[float]) -> Any:
    return pytest.approx(expected, abs=GOLDEN)


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
