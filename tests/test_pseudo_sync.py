"""DiLoCo, PALSGD, SCAFFOLD and Streaming DiLoCo: fixed points, reductions, bad input, counters, interruption."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from flwr.app import Message
from pseudo_sync_toys import ADAMW, DILOCO, column, fixed_point, over_messages, path, weights_of
from torch import Tensor
from toys import A, B, blobs, here, quadratics, registered, snapshots

from fedsim import client_app, tree
from fedsim.batches import Sampler, Sampling
from fedsim.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from fedsim.experiment import BadInput, Experiment
from fedsim.federation import load
from fedsim.grid import InProcessGrid
from fedsim.over_grid import OverGrid, greet
from fedsim.probes import Snapshot
from fedsim.simulate import rounds
from fedsim.tree import Tree


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    with registered():
        yield


# ----------------------------------------------------------------------------------------------- fixed points


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"strategy": "FedAvg()"}, 0.8676699029),
        ({"strategy": DILOCO}, 0.8676699029),
        ({"strategy": "StreamingDiLoCo(fragments=1, delay=2, keep=0.3)"}, None),
        ({"strategy": "FedAvg()", "client": "Prox(SGD(lr=0.1), mu=0.4)"}, 0.8672486430),
        ({"strategy": "Scaffold()", "client": "Controlled(SGD(lr=0.1))"}, 0.9),
    ],
)
def test_fixed_points(settings: dict[str, Any], expected: float | None) -> None:
    long = "DiLoCo" in settings["strategy"]  # its momentum forgets a tenth a round
    experiment = quadratics(**settings, rounds=500 if long else 150, eval_every=0)
    carrier, last = here(experiment), None
    for last, _ in rounds(experiment, carrier=carrier):  # noqa: B007
        pass
    assert last is not None
    x = last.model["0.weight"].item()
    if expected is None:  # workers whose rows differ have no simple formula, but the model stops moving
        assert x == pytest.approx(last.sent["model"]["0.weight"].item(), abs=1e-10)
        return
    assert x == pytest.approx(expected, abs=1e-9, rel=0)
    if "Scaffold" in settings["strategy"]:
        assert x == pytest.approx(0.9, abs=1e-10)
        kept = carrier.checkpoint()
        own = kept["0/state/control/0.weight"] + kept["0/state/moved/0.weight"]
        assert own.flatten().tolist() == pytest.approx([0.9, -0.2, 0.95, -1.65], abs=1e-9)
    else:
        mu = 0.4 if "client" in settings else 0.0
        assert x == pytest.approx(fixed_point(weights_of(3, mu)), abs=1e-9)


# ------------------------------------------------------------------------------------------------- reductions


def same(
    a: dict[str, Any], b: dict[str, Any], tolerance: float, describe: Callable[..., Experiment] = blobs
) -> None:
    left, right = snapshots(describe(**a)), snapshots(describe(**b))
    for x, y in zip(left, right, strict=True):
        for k in x.model:
            torch.testing.assert_close(x.model[k], y.model[k], rtol=tolerance, atol=tolerance)


AVERAGE = "FedAvg(weighting='uniform')"


@pytest.mark.parametrize("plan", ["stacked", "vmap", "loop"])
@pytest.mark.parametrize(
    ("a", "b", "tolerance"),
    [
        ({"strategy": DILOCO, "client": "PALSGD(AdamW(lr=0.02), p=0.0)"}, {"strategy": DILOCO, "client": "AdamW(lr=0.02)"}, 0.0),
        ({"strategy": AVERAGE, "client": "PALSGD(SGD(lr=0.3), p=0.0)"}, {"strategy": AVERAGE}, 0.0),
        ({"strategy": "DiLoCo(lr=1.0, momentum=0.0)"}, {"strategy": AVERAGE}, 1e-12),
        ({"strategy": "DiLoCo(lr=0.7, momentum=0.0)"}, {"strategy": "FedAvgM(lr=0.7, momentum=0.0, weighting='uniform')"}, 1e-12),
        (
            {"strategy": "StreamingDiLoCo(lr=0.7, fragments=1, keep=0.0)", "client": "AdamW(lr=0.02)"},
            {"strategy": DILOCO, "client": "AdamW(lr=0.02)"},
            1e-12,
        ),
        (
            {"strategy": DILOCO, "client": "Fresh(AdamW(lr=0.02))", "rounds": 1},
            {"strategy": DILOCO, "client": "AdamW(lr=0.02)", "rounds": 1},
            0.0,
        ),
        (
            {"strategy": "DiLoCo(lr=1.0, momentum=0.0)", "client": "Fresh(AdamW(lr=0.02))"},
            {"strategy": AVERAGE, "client": "AdamW(lr=0.02)"},
            1e-12,
        ),
        ({"schedule": "PostLocal(until=0)"}, {}, 0.0),
        ({"schedule": "PostLocal(until=9, first=1)"}, {"local_steps": 1}, 0.0),
        ({"schedule": "DynamicSteps(durations=(2.0,))"}, {}, 0.0),
    ],
)  # fmt: skip
def test_reductions(a: dict[str, Any], b: dict[str, Any], tolerance: float, plan: str) -> None:
    if plan == "stacked" and b.get("client") is None:  # plain gradient descent has a path of its own
        tolerance = max(tolerance, 1e-14)
    same(a | {"plan": plan}, b | {"plan": plan}, tolerance)


def test_the_first_round_of_scaffold_is_federated_averaging() -> None:
    settings = {"strategy": "Scaffold()", "client": "Controlled(SGD(lr=0.3))", "rounds": 1}
    same(settings, {"strategy": AVERAGE, "rounds": 1}, 1e-12)


@pytest.mark.parametrize("plan", ["stacked", "vmap", "loop"])
@pytest.mark.parametrize(
    "client", ["PALSGD(AdamW(lr=0.02), p=0.4, mix=3.0)", "PALSGD(Prox(SGD(lr=0.1)), p=0.4, coin_seed=3)"]
)
def test_plans_agree(client: str, plan: str) -> None:
    for strategy in (DILOCO, AVERAGE):
        settings = {"strategy": strategy, "client": client}
        same(settings | {"plan": plan}, settings | {"plan": "loop", "nodes": 2}, 1e-12)


def large_batches(
    experiment: Experiment, optimiser: Callable[[list[Tensor]], torch.optim.Optimizer]
) -> list[Tree]:
    """Train one model on the union of all workers' minibatches: data-parallel training, in plain PyTorch."""
    federation = load(experiment)
    sampling = Sampling(experiment.batch_size, 1, 0, False, experiment.seed)
    sampler = Sampler(federation.train, sampling, torch.device("cpu"))
    module, models = federation.module, []
    module.load_state_dict(federation.theta)
    step = optimiser([*module.parameters()])
    for round in range(1, experiment.rounds + 1):
        rows = sampler.draw(round, torch.arange(experiment.num_workers)).rows.flatten()
        step.zero_grad()
        output = module(federation.dataset.x[rows])
        federation.objective.loss(output, federation.dataset.y[rows]).mean().backward()
        step.step()
        models.append({k: v.detach().clone() for k, v in module.named_parameters()})
    return models


@pytest.mark.parametrize(
    ("strategy", "client", "optimiser"),
    [
        (AVERAGE, "SGD(lr=0.3)", lambda p: torch.optim.SGD(p, lr=0.3)),
        (AVERAGE, "PALSGD(SGD(lr=0.3), p=0.0)", lambda p: torch.optim.SGD(p, lr=0.3)),
        (
            "DiLoCo(lr=1.0, momentum=0.9)",
            "SGD(lr=0.3)",
            lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, nesterov=True),
        ),
        (
            "FedAvgM(lr=1.0, momentum=0.9, weighting='uniform')",
            "SGD(lr=0.3)",
            lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
        ),
    ],
)
def test_one_local_step_is_data_parallel_training_with_a_large_batch(
    strategy: str, client: str, optimiser: Callable[[list[Tensor]], torch.optim.Optimizer]
) -> None:
    experiment = blobs(strategy=strategy, client=client, local_steps=1, rounds=6)
    for snapshot, model in zip(snapshots(experiment), large_batches(experiment, optimiser), strict=True):
        for k, x in model.items():
            torch.testing.assert_close(snapshot.model[k], x, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_outer_step_is_nesterov_of_torch(dtype: torch.dtype) -> None:
    from strategies import DiLoCo, Report

    g = torch.Generator().manual_seed(0)
    x = 0.1 * torch.randn(5, generator=g, dtype=dtype)
    leaf = x.clone().requires_grad_()
    optimiser = torch.optim.SGD([leaf], lr=0.7, momentum=0.9, nesterov=True)
    state, _ = DiLoCo().init({"x": x}, 3)
    ones = torch.ones(3, dtype=torch.float64)
    for _ in range(10):
        rows = 0.1 * torch.randn(3, 5, generator=g, dtype=dtype)
        report = Report(torch.arange(3), ones, ones, torch.ones(3, dtype=torch.int64), torch.ones(3))
        leaf.grad = (
            state["model"]["x"] - tree.mean({"x": rows}, report.weight)["x"]
        )  # the same pseudo-gradient
        optimiser.step()
        state, _ = DiLoCo().merge(state, {"x": rows}, report)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-7
        torch.testing.assert_close(state["model"]["x"], leaf.detach(), rtol=0, atol=tolerance)


def test_two_rounds_of_one_worker_are_one_twice_as_long() -> None:
    one = {"data": "Quadratics(a=(1.0,), b=(0.0,), rows=(1,))", "num_workers": 1, "client": ADAMW}
    one |= {"strategy": "DiLoCo(lr=1.0, momentum=0.0)"}
    twice = path(quadratics(**one, local_steps=3, rounds=2))[-1]
    assert twice == path(quadratics(**one, local_steps=6, rounds=1))[-1]


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"strategy": "Scaffold()"}, "'Controlled(...)' and 'Scaffold()' need each other"),
        ({"client": "Controlled(SGD(lr=0.1))"}, "'Controlled(...)' and 'Scaffold()' need each other"),
        ({"strategy": "Scaffold()", "client": "Prox(Controlled())"}, "need each other"),
        ({"strategy": "StreamingDiLoCo(fragments=1, delay=3)"}, "needs more local steps than its delay"),
        ({"schedule": "PostLocal()", "local_steps": 0, "local_epochs": 1}, "needs local-steps"),
        ({"schedule": "DynamicSteps()", "local_steps": 0, "local_epochs": 1}, "needs local-steps"),
        ({"schedule": "PostLocal(first=0)"}, "PostLocal: first = 0 must be >= 1"),
    ],
)
def test_what_does_not_fit_is_one_line(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(BadInput) as caught:
        quadratics(**settings)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_fragments_than_tensors_are_refused() -> None:
    with pytest.raises(BadInput, match="fragments = 2 must be <= 1, the number of the model's tensors"):
        snapshots(quadratics(strategy="StreamingDiLoCo(fragments=2)"))


# --------------------------------------------------------------------------------------- counters and the clock


def test_counters_are_kept_apart() -> None:
    h, k, n = 5, 4, 6
    settings = {"local_steps": h, "rounds": n, "strategy": DILOCO}
    found = snapshots(quadratics(**settings, client="PALSGD(SGD(lr=0.1), p=0.3)"))
    pseudo = torch.stack([s.report.idle.sum() for s in found]).cumsum(0).tolist()
    assert 0 < pseudo[-1] < h * k * n
    assert column(found, "pseudo_syncs") == pseudo
    assert column(found, "local_steps") == [h * k * (i + 1) for i in range(n)]
    assert column(found, "gradients") == [h * k * (i + 1) - pseudo[i] for i in range(n)]
    assert column(found, "optimiser_steps") == column(found, "gradients")
    assert column(found, "syncs") == [*range(1, n + 1)]
    plain = snapshots(quadratics(**settings))
    for name in ("bytes_up", "bytes_down", "syncs", "local_steps"):
        assert column(found, name) == column(plain, name)
    assert set(column(plain, "pseudo_syncs")) == {0}


def test_the_time_of_a_step() -> None:
    """A sync takes A, a gradient C: a step of data-parallel SGD C + A, of DiLoCo C + A / H, pseudo-syncs nothing."""
    c, a, h = 3.0, 1.0, 64
    network = f"Network(step={c}, latency={a / 2})"

    def seconds(**settings: Any) -> list[Snapshot]:
        return snapshots(quadratics(network=network, rounds=2, eval_every=0, **settings))

    assert seconds(local_steps=1)[-1].clock.sim_time / 2 == c + a
    assert seconds(local_steps=h, strategy=DILOCO)[-1].clock.sim_time / (2 * h) == pytest.approx(
        c + a / h, rel=1e-12
    )
    found = seconds(local_steps=h, strategy=DILOCO, client="PALSGD(SGD(lr=0.1), p=0.1)")
    waited = sum(int((s.report.steps - s.report.idle).max()) for s in found)
    assert found[-1].clock.sim_time == pytest.approx(c * waited + 2 * a, rel=1e-12)
    # In units of data-parallel SGD, for the share p of steps that is expected: what the method can save.
    per_step = [1, (c + a / h) / (c + a), ((1 - 0.1) * c + a / h) / (c + a)]
    assert per_step == pytest.approx([1, 0.754, 0.679], abs=5e-4)


def test_scaffold_sends_twice_as_much() -> None:
    plain = snapshots(quadratics(strategy=AVERAGE))[-1].clock
    twice = snapshots(quadratics(strategy="Scaffold()", client="Controlled(SGD(lr=0.1))"))[-1].clock
    assert (twice.bytes_up, twice.bytes_down) == (2 * plain.bytes_up, 2 * plain.bytes_down)


@pytest.mark.parametrize(
    ("durations", "steps"),
    [((0.58, 0.75, 1.51, 3.33), [20, 15, 7, 3]), ((0.1, 0.3, 0.1, 9.0), [20, 6, 20, 1])],
)
def test_slow_workers_make_fewer_steps(durations: tuple[float, ...], steps: list[int]) -> None:
    settings = {"schedule": f"DynamicSteps(durations={durations})", "local_steps": 20, "rounds": 2}
    for snapshot in snapshots(quadratics(**settings)):
        assert snapshot.report.steps.tolist() == steps
        waited = max(d * n for d, n in zip(durations, steps, strict=True))
        assert snapshot.clock.sim_time == pytest.approx(snapshot.round * waited)


def test_a_synchronous_round_waits_for_the_slowest() -> None:
    schedule = "Synchronous(durations=(0.58, 0.75, 1.51, 3.33))"
    found = snapshots(quadratics(schedule=schedule, local_steps=20, rounds=1, strategy=DILOCO))
    assert found[0].clock.sim_time == pytest.approx(66.6, abs=1e-9)


def test_partial_participation_of_scaffold_leaves_the_absent_alone() -> None:
    experiment = quadratics(
        strategy="Scaffold(lr=0.5)",
        client="Controlled(SGD(lr=0.1))",
        participation=0.5,
        rounds=8,
        local_steps=3,
    )
    carrier = here(experiment)
    x, c, own = 1.5, 0.0, [0.0] * 4
    for snapshot, _ in rounds(experiment, carrier=carrier):
        ends, changes = [], []
        for i in snapshot.report.worker.tolist():  # option II of the paper, in plain numbers
            y = x
            for _ in range(3):
                y = y - 0.1 * (A[i] * (y - B[i]) - own[i] + c)
            new = own[i] - c + (x - y) / (3 * 0.1)
            ends.append(y)
            changes.append(new - own[i])
            own[i] = new
        x += 0.5 * sum(y - x for y in ends) / 2
        c += 2 / 4 * sum(changes) / 2
        assert snapshot.model["0.weight"].item() == pytest.approx(x, abs=1e-13)
        assert snapshot.state["control"]["0.weight"].item() == pytest.approx(c, abs=1e-13)
        kept = carrier.checkpoint()
        found = kept["0/state/control/0.weight"] + kept["0/state/moved/0.weight"]
        assert found.flatten().tolist() == pytest.approx(own, abs=1e-13)


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": DILOCO, "client": "PALSGD(AdamW(lr=0.02), p=0.4, mix=2.0)"},
        {"strategy": DILOCO, "client": "WarmupCosine(PALSGD(AdamW(lr=0.02), p=0.4, coin_seed=1), total=99)"},
        {"strategy": "Scaffold()", "client": "Controlled(SGD(lr=0.3, momentum=0.5))", "participation": 0.6},
        {"strategy": "Scaffold()", "client": "Controlled(SGD(lr=0.3))"},
        {"strategy": "StreamingDiLoCo(fragments=3, delay=1)", "client": "Fresh(AdamW(lr=0.02))"},
    ],
)
def test_an_interrupted_run_goes_on_bit_by_bit(settings: dict[str, Any], tmp_path: Any) -> None:
    experiment = blobs(**settings, rounds=6, plan="vmap")
    straight = snapshots(experiment)
    carrier = here(experiment)
    (tmp_path / "checkpoint").mkdir()
    for snapshot, position in rounds(experiment, carrier=carrier):
        if snapshot.round == 3:
            write_checkpoint(
                tmp_path, experiment, Checkpoint(position, snapshot.model, carrier.checkpoint(), "vmap")
            )
            break
    saved = read_checkpoint(tmp_path, experiment, torch.device("cpu"))
    assert saved is not None
    carrier = here(experiment)
    carrier.restore(saved.workers)
    for (snapshot, _), expected in zip(
        rounds(experiment, carrier=carrier, position=saved.position), straight[3:], strict=True
    ):
        assert snapshot.metrics == expected.metrics
        torch.testing.assert_close(snapshot.model, expected.model, rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "Scaffold()", "client": "Controlled(SGD(lr=0.3))"},
        {"strategy": DILOCO, "client": "PALSGD(AdamW(lr=0.02), p=0.4, mix=2.0)"},
        {"strategy": "StreamingDiLoCo(fragments=3, delay=1)"},
    ],
)
def test_nodes_give_the_same_history(settings: dict[str, Any]) -> None:
    experiment = blobs(**settings, plan="vmap", probes="Drift(); WorkerLoss()")
    for found, expected in zip(
        snapshots(experiment, over_messages(experiment)), snapshots(experiment), strict=True
    ):
        assert list(found.metrics) == list(expected.metrics)
        assert found.metrics == pytest.approx(expected.metrics, rel=1e-12, abs=1e-12)


def test_a_node_that_has_lost_its_states_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = blobs(strategy="Scaffold()", client="Controlled(SGD(lr=0.3))", plan="vmap", min_nodes=1)

    def forgetful(message: Message, context: Any) -> Message:
        if context.node_config["partition-id"] == 0:
            context.state.clear()
        monkeypatch.setattr(client_app, "_HOSTS", {})
        return client_app.app(message, context)

    federation = load(experiment)
    grid = InProcessGrid(forgetful, 2, experiment.to_mapping())  # type: ignore[arg-type]
    carrier = OverGrid(grid, experiment, federation, greet(grid, 2))
    found = snapshots(experiment, carrier)
    assert "what its workers keep between rounds is lost" in found[1].metrics["failures"]["node 0"]  # type: ignore[index]


# ------------------------------------------------------------------------------------------------------ digits


def digits(**settings: Any) -> list[Snapshot]:
    base = {
        "data": "Digits()", "partition": "IID()", "model": "MLP(hidden=(64,))", "client": "SGD(lr=0.1)",
        "strategy": AVERAGE, "num_workers": 4, "batch_size": 16, "local_steps": 10, "rounds": 60, "eval_every": 0,
        "device": "cpu",
    }  # fmt: skip
    return snapshots(Experiment.from_mapping(base | settings))


@pytest.mark.slow
def test_all_methods_learn_digits_as_well_as_data_parallel_sgd() -> None:
    reference: dict[str, Any] = dict(digits(local_steps=1, rounds=600)[-1].metrics)
    pulled = {"strategy": DILOCO, "client": "PALSGD(SGD(lr=0.05), p=0.1)", "rounds": 67}  # 60 / (1 - p)
    for settings in (
        {},
        {"strategy": DILOCO, "client": "SGD(lr=0.05)"},
        {"strategy": DILOCO, "client": "AdamW(lr=0.001)"},
        pulled,
        {"strategy": "Scaffold()", "client": "Controlled(SGD(lr=0.1))"},
        {"strategy": "StreamingDiLoCo(fragments=2, delay=2)", "local_steps": 5, "rounds": 120},
        {
            "strategy": "AsyncDiLoCo()",
            "client": "SGD(lr=0.05)",
            "schedule": "FreeRunning(durations=(1, 2), grace=0.5)",
        },
    ):
        found: dict[str, Any] = dict(digits(**settings)[-1].metrics)
        assert found["gradients"] == pytest.approx(reference["gradients"], rel=0.05)
        assert found["test_accuracy"] > reference["test_accuracy"] - 0.02, settings


@pytest.mark.slow
def test_pulls_keep_workers_with_different_data_nearer() -> None:
    settings = {"strategy": DILOCO, "partition": "Dirichlet(alpha=0.3)", "local_steps": 100, "rounds": 10}
    settings |= {"probes": "Drift()"}
    free = digits(**settings, client="SGD(lr=0.05)")
    pulled = digits(**settings, client="PALSGD(SGD(lr=0.05), p=0.1)")
    assert sum(column(pulled, "drift.mean")) < sum(column(free, "drift.mean"))
