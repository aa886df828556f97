"""Asynchronous Local SGD with and without Delayed Nesterov: the event clock, golden vectors, reductions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pseudo_sync_toys import column, over_messages, path
from toys import here, quadratics, registered, snapshots

from fedsim import tree
from fedsim.carriers import InProcess
from fedsim.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from fedsim.experiment import BadInput, Experiment
from fedsim.federation import load
from fedsim.probes import Snapshot
from fedsim.simulate import rounds
from strategies import AsyncDiLoCo, Report, State


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    with registered():
        yield


def alone(strategy: str, durations: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0), **settings: Any) -> Experiment:
    base = {"arrivals": 1, "grace": 0.0, "dynamic": False}
    options = {k: settings.pop(k, v) for k, v in base.items()}
    schedule = f"FreeRunning(durations={durations}, {', '.join(f'{k}={v}' for k, v in options.items())})"
    return quadratics(
        **({"strategy": strategy, "schedule": schedule, "rounds": 8, "eval_every": 0} | settings)
    )


def arrived(found: list[Snapshot]) -> list[int]:
    return [w for s in found for w in s.report.worker.tolist()]


# ------------------------------------------------------------------------------------------ golden vectors

NAIVE = [
    1.47296775,
    1.4348983867,
    1.3969839489,
    1.3453712087,
    1.2865994887,
    1.2323067790,
    1.1658343712,
    1.0962308388,
]
DISCOUNTED = [
    1.47296775, 1.4348983867, 1.4038418634, 1.3550291706, 1.2986619848, 1.2519322740, 1.2044975731, 1.1443446799,
]  # fmt: skip
DELAYED = [
    1.4288625, 1.3610986959, 1.3183986959, 1.0361599118, 0.9870200280, 0.9598287793, 0.8974303418, 0.4939661710,
]  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("AsyncDiLoCo(lr=0.07, how='naive')", NAIVE),
        ("AsyncDiLoCo(lr=0.07, how='naive', discount=True)", DISCOUNTED),
        ("AsyncDiLoCo(lr=0.7)", DELAYED),
    ],
)
def test_golden_vectors(strategy: str, expected: list[float]) -> None:
    found = snapshots(alone(strategy))
    assert [s.model["0.weight"].item() for s in found] == pytest.approx(expected, abs=1e-9, rel=0)
    assert arrived(found) == [0, 0, 1, 0, 0, 1, 2, 0]
    assert column(found, "sim_time") == [3, 6, 6, 9, 12, 12, 12, 15]
    assert column(found, "staleness.max") == [0, 0, 2, 0, 0, 2, 6, 0]
    assert column(found, "syncs") == [*range(1, 9)]


def test_the_event_clock_of_the_published_toy() -> None:
    settings = {"durations": (0.58, 0.75, 1.51, 3.33), "grace": 0.5, "local_steps": 20}
    found = snapshots(alone("AsyncDiLoCo(lr=0.07, how='naive')", **settings, rounds=12))
    times = [11.6, 15.0, 23.2, 30.0, 30.2, 34.8, 45.2, 46.4, 58.0, 60.2, 60.4, 66.6]
    assert arrived(found) == [0, 1, 0, 1, 2, 0, 1, 0, 0, 1, 2, 3]
    assert column(found, "sim_time") == pytest.approx(times, abs=1e-9)
    found = snapshots(alone("AsyncDiLoCo(lr=0.07, how='naive')", **settings, arrivals=40, rounds=10))
    times = [209.0, 406.4, 603.8, 801.4, 999.0, 1207.8, 1404.2, 1600.6, 1800.2, 1998.6]
    assert column(found, "sim_time") == pytest.approx(times, abs=1e-9)
    workers = arrived(found)
    assert [workers.count(w) for w in range(4)] == [172, 132, 66, 30]
    assert (found[-1].metrics["arrivals.min"], found[-1].metrics["arrivals.max"]) == (30, 172)
    assert max(column(found, "staleness.max")) == 14
    assert sum(column(found, "staleness.mean")) / 10 == pytest.approx(2.75, abs=0.005)


# A push is a row that differs from what the worker was sent by the pseudo-gradient.


def push(rule: AsyncDiLoCo, state: State, worker: int, gap: torch.Tensor) -> State:
    state = rule.depart(state, worker)
    one = torch.ones(1, dtype=torch.int64)
    report = Report(torch.tensor([worker]), one.double(), one.double(), one, one)
    return rule.exchange(state, {"x": (state["model"]["x"] - gap)[None]}, report)[0]


def test_golden_vector_of_delayed_nesterov() -> None:
    rule = AsyncDiLoCo(lr=0.7, momentum=0.9, every=4)
    state, _ = rule.init({"x": torch.zeros((), dtype=torch.float64)}, 3)
    found = []
    for i in range(8):
        state = push(rule, state, i % 3, torch.tensor(i + 1.0, dtype=torch.float64))
        found.append(state["model"]["x"].item())
    expected = [-0.175, -0.525, -1.05, -3.325, -4.2, -5.25, -6.475, -13.3875]
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("how", ["delayed", "buffered"])
@pytest.mark.parametrize("n", [1, 3, 5])
def test_every_n_pushes_are_one_step_of_nesterov_on_their_mean(how: Any, n: int) -> None:
    rule, g = AsyncDiLoCo(lr=0.7, momentum=0.9, how=how, every=n), torch.Generator().manual_seed(0)
    start = torch.randn(4, generator=g, dtype=torch.float64)
    leaf = start.clone().requires_grad_()
    reference = torch.optim.SGD([leaf], lr=0.7, momentum=0.9, nesterov=True)
    state, _ = rule.init({"x": start}, 2)
    for _ in range(6):
        gaps = torch.randn(n, 4, generator=g, dtype=torch.float64)
        for i, gap in enumerate(gaps):
            state = push(rule, state, i % 2, gap)
        leaf.grad = gaps.mean(0)
        reference.step()
        torch.testing.assert_close(state["model"]["x"], leaf.detach(), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------- reductions


@pytest.mark.parametrize("client", ["SGD(lr=0.1)", "AdamW(lr=0.02)", "PALSGD(SGD(lr=0.1), p=0.3, mix=0.5)"])
@pytest.mark.parametrize("how", ["buffered", "delayed"])
def test_an_endless_window_is_diloco(client: str, how: str) -> None:
    settings = {"arrivals": 0, "grace": "inf", "client": client}
    found = snapshots(alone(f"AsyncDiLoCo(how='{how}')", **settings))
    schedule = "Synchronous(durations=(1.0, 2.0, 4.0, 8.0))"
    together = snapshots(quadratics(strategy="DiLoCo()", client=client, rounds=8, schedule=schedule))
    for x, y in zip(found, together, strict=True):
        torch.testing.assert_close(x.model, y.model, rtol=0, atol=1e-12)
    for name in ("sim_time", "gradients", "optimiser_steps", "pseudo_syncs", "bytes_up", "bytes_down"):
        assert column(found, name) == column(together, name)


def test_all_at_once_is_diloco() -> None:
    for how in ("delayed", "buffered"):
        together = path(quadratics(strategy=f"AsyncDiLoCo(how='{how}')"))
        assert together == pytest.approx(path(quadratics(strategy="DiLoCo()")), abs=1e-13)


def test_no_window_is_one_of_no_length_where_nobody_comes_at_the_same_time() -> None:
    durations = (1.0, 1.37, 2.51, 3.13)
    a, b = (snapshots(alone("AsyncDiLoCo()", durations, grace=grace, rounds=30)) for grace in (None, 0.0))
    assert arrived(a) == arrived(b)
    assert column(a, "sim_time") == column(b, "sim_time")
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.model, y.model, rtol=0, atol=0)


def test_dynamic_steps_bring_workers_together() -> None:
    settings = {"durations": (0.58, 0.75, 1.51, 3.33), "local_steps": 20, "arrivals": 4, "grace": 5.0}
    found = snapshots(alone("AsyncDiLoCo()", **settings, dynamic=True, rounds=2))
    assert found[0].report.worker.tolist() == [3, 2, 1, 0]
    assert found[0].report.steps.tolist() == [3, 7, 15, 20]
    assert found[0].clock.sim_time == pytest.approx(11.6)


# ------------------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("grace", [None, 0.0, 4.0])
def test_an_interrupted_run_goes_on_bit_by_bit(grace: float | None, tmp_path: Any) -> None:
    client = "PALSGD(AdamW(lr=0.02), p=0.3)"
    experiment = alone("AsyncDiLoCo()", grace=grace, arrivals=3, client=client, plan="vmap")
    straight, carrier = snapshots(experiment), here(experiment)
    (tmp_path / "checkpoint").mkdir()
    for snapshot, position in rounds(experiment, carrier=carrier):
        if snapshot.round == 4:
            kept = Checkpoint(position, snapshot.model, carrier.checkpoint(), "vmap")
            write_checkpoint(tmp_path, experiment, kept)
            break
    saved = read_checkpoint(tmp_path, experiment, torch.device("cpu"))
    assert saved is not None
    carrier = InProcess(experiment, load(experiment))
    carrier.restore(saved.workers)
    again = rounds(experiment, carrier=carrier, position=saved.position)
    for (snapshot, _), expected in zip(again, straight[4:], strict=True):
        assert snapshot.metrics == expected.metrics
        torch.testing.assert_close(snapshot.model, expected.model, rtol=0, atol=0)


@pytest.mark.parametrize("grace", [None, 1.0])
def test_messages_bring_every_worker(grace: float | None) -> None:
    experiment = alone("AsyncDiLoCo(lr=0.3)", grace=grace, arrivals=0, rounds=6, plan="vmap")
    found = snapshots(experiment, over_messages(experiment))
    assert len(arrived(found)) == 24
    assert {*arrived(found)} == {0, 1, 2, 3}
    assert all(tree.flatten(s.model).isfinite().all() for s in found)
    assert found[-1].model["0.weight"].item() < 1.5


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"strategy": "Downpour()"}, "grace is for strategy = 'AsyncDiLoCo(...)', it is 'Downpour()'"),
        (
            {"strategy": "DiLoCo()", "grace": None},
            "use 'ElasticAveraging()', 'Downpour()' or 'AsyncDiLoCo()'",
        ),
        ({"strategy": "AsyncDiLoCo()", "grace": -1.0}, "FreeRunning: grace = -1.0 must be >= 0"),
        ({"strategy": "AsyncDiLoCo(every=-1)"}, "AsyncDiLoCo: every = -1 must be >= 0"),
        ({"strategy": "AsyncDiLoCo(discount=True)"}, "discount = True needs how = 'naive' (it is 'delayed')"),
    ],
)
def test_what_does_not_fit_is_one_line(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(BadInput) as caught:
        alone(**settings)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
