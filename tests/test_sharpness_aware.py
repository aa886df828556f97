"""Sharpness-aware and smoothness-adaptive rules: golden sequences, closed forms, federated forms, bad input."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_clients import assert_close, make_oracle, make_rows, walk
from torch import Tensor, nn
from toys import Remembering, blobs, registered

import fedsim
from clients import SAM, SASAM, SGD, AdamW, AdaptiveSGD, Guided, LocalRule, Oracle
from clients.adaptive_sgd import PRESETS
from fedsim import tree
from fedsim.carriers import InProcess
from fedsim.data import Dataset
from fedsim.experiment import BadInput, Experiment
from fedsim.federation import load
from fedsim.registry import REGISTRY
from fedsim.tree import Tree

F64 = torch.float64


def scalar(x: float) -> Tensor:
    return torch.tensor(x, dtype=F64)


# ------------------------------------------------------------------------------------- the two quadratics


@dataclass(frozen=True)
class Bowls:
    """``w' diag(1, 4) w / 2``, and for a second worker ``(w - 1)' diag(2, 0.5) (w - 1) / 2``: as two rows each."""

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Write the squares as a regression without bias."""
        a = torch.tensor([[1.0, 4.0], [2.0, 0.5]], dtype=F64)[:num_workers]
        x = torch.diag_embed((2 * a).sqrt())  # a mean over two rows
        y = x.sum(2, keepdim=True) * torch.arange(num_workers, dtype=F64)[:, None, None]
        x, y = x.reshape(-1, 2), y.reshape(-1, 1)
        owner = torch.arange(num_workers).repeat_interleave(2)
        return Dataset(x, y, x[:0], y[:0], 1, "regression", "bowls", workers=owner)


@dataclass(frozen=True)
class Plane:
    """The model ``x -> w . x``, from ``w = (2, 1)``."""

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        """Build the module."""
        linear = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            linear.weight.copy_(torch.tensor([[2.0, 1.0]]))
        return nn.Sequential(linear)


@pytest.fixture(autouse=True)
def ours() -> Iterator[None]:
    with registered():
        fedsim.register("data", Bowls)
        fedsim.register("model", Plane)
        yield
        del REGISTRY["data"]["Bowls"], REGISTRY["model"]["Plane"]


def bowls(workers: int = 1, **settings: object) -> Experiment:
    base = {
        "data": "Bowls()", "partition": "Owned()", "model": "Plane()", "objective": "SquaredError(half=True)",
        "strategy": "FedAvg()", "num_workers": workers, "rounds": 1, "local_steps": 5, "batch_size": 0,
        "device": "cpu", "dtype": "float64", "plan": "stacked",
    }  # fmt: skip
    return Experiment.from_mapping(base | settings)


def weights(experiment: Experiment) -> list[list[float]]:
    """Return the model after each round."""
    return [tree.flatten(s.model).tolist() for s, _ in fedsim.rounds(experiment)]


def steps(experiment: Experiment) -> list[list[float]]:
    """Return each worker's last step of each round, under a strategy whose workers keep their states."""
    federation = load(experiment)
    carrier = InProcess(experiment, federation)
    found = []
    for _ in fedsim.rounds(experiment, federation, carrier):
        state = carrier.cohorts[0].state
        assert state is not None
        found.append(state["eta"].tolist())
    return found


PLANS = pytest.mark.parametrize("plan", ["stacked", "vmap", "loop"])

ALONE = [
    (
        "SASAM(eta0=0.1, preset='transcription')",
        [0.1, 0.1347168823, 0.1484813433, 0.2152812171, 0.3369606561],
        [0.3162277660, 0.3670379848, 0.3853327695, 0.4639840699, 0.5804831230],
        [0.3795225914, -0.0671907469],
    ),
    (
        "AdaptiveSGD(eta0=0.1, preset='transcription')",
        [0.1, 0.1386750491, 0.1535737792, 0.2070490831, 0.3172790554],
        None,
        [0.7104248982, -0.0047646521],
    ),
    (
        "SASAM(eta0=0.1, preset='released')",
        [0.1009950494, 0.1020099600, 0.1030351691, 0.1040706825, 0.1051166028],
        [0.3162277660, 0.3177971828, 0.3193899811, 0.3209909174, 0.3225998799],
        [1.0488717146, 0.0014583996],
    ),
    (
        "AdaptiveSGD(eta0=0.1, preset='released')",
        [0.1009950494, 0.1020099600, 0.1030351691, 0.1040706825, 0.1051166028],
        None,
        [1.1611256333, 0.0701629327],
    ),
    (
        "SASAM(eta0=0.1)",
        [0.1, 0.1358901678, 0.1377244024, 0.1391132338, 0.1405113686],
        [0.2] * 5,
        [0.9054778490, 0.0000701721],
    ),
    (
        "AdaptiveSGD(eta0=0.1)",
        [0.1, 0.1386750491, 0.1405849736, 0.1420030338, 0.1434302159],
        None,
        [0.9792441340, 0.0215330892],
    ),
]
"""Five steps from (2, 1) on the first bowl: rule, steps, ascents and end."""


@PLANS
@pytest.mark.parametrize(("client", "eta", "rho", "end"), ALONE, ids=[c[0] for c in ALONE])
@pytest.mark.filterwarnings("ignore:client = .*collapse")
def test_golden_sequences(
    client: str, eta: list[float], rho: list[float] | None, end: list[float], plan: str
) -> None:
    assert weights(bowls(client=client, plan=plan))[-1] == pytest.approx(end, abs=1e-9)
    remembering: dict[str, Any] = {"client": client, "plan": plan, "strategy": "Remembering()"}
    found = [steps(bowls(**remembering, local_steps=n))[0][0] for n in range(1, 6)]
    assert found == pytest.approx(eta, abs=1e-9)
    rule = bowls(client=client).parts.client
    assert isinstance(rule, AdaptiveSGD | SASAM)
    if rho is not None:  # the ascent is a function of the step, or of the one before
        before = [0.1, *found[:-1]] if rule.switches.rho_lag else found
        assert [min(math.sqrt(x), rule.switches.rho_max) for x in before] == pytest.approx(rho, abs=1e-9)


@PLANS
def test_golden_sequence_of_sam(plan: str) -> None:
    client = "SAM(SGD(lr=0.1), rho=0.5)"
    expected = [[1.7776393202, 0.4211145618], [1.5635816165, 0.1151035012], [1.3592596418, 0.0125681870]]
    found = [weights(bowls(client=client, local_steps=n, plan=plan))[-1] for n in (1, 2, 3)]
    assert found == [pytest.approx(w, abs=1e-9) for w in expected]


@pytest.mark.parametrize(
    ("preset", "eta0", "eta", "theta", "rho"),
    [
        ("transcription", 0.1, [0.1, 0.125, 0.1875], [math.inf, 1.25, 1.5], [0.3162277660, 0.3535533906, 0.4330127019]),
        ("released", 0.09, [0.0908955444, 0.0918089650, 0.0927316542], None, [0.3, 0.3014888795, 0.3029999423]),
    ],
)  # fmt: skip
def test_golden_sequence_of_the_stepper(
    preset: str, eta0: float, eta: list[float], theta: list[float] | None, rho: list[float]
) -> None:
    found = advance(preset, eta0, [(0, 0), (1, 4), (1, 0.5)])
    assert [x[0] for x in found] == pytest.approx(eta, abs=1e-9)
    assert [x[2] for x in found] == pytest.approx(rho, abs=1e-9)
    assert theta is None or [x[1] for x in found] == pytest.approx(theta, abs=1e-9)


def advance(preset: str, eta0: float, moves: list[tuple[float, float]]) -> list[list[float]]:
    eta, theta, found = scalar(eta0), scalar(PRESETS[preset].theta0), []
    for i, (dw, dg) in enumerate(moves):
        eta, theta, rho = PRESETS[preset].advance(eta, theta, torch.tensor(i == 0), scalar(dw), scalar(dg))
        found.append([eta.item(), theta.item(), rho.item()])
    return found


@pytest.mark.parametrize("preset", PRESETS)
def test_without_a_difference_steps_stay_finite(preset: str) -> None:
    moves = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (1.0, 2.0), (0.0, 0.0)]
    found = advance(preset, 0.1, moves)
    assert all(math.isfinite(eta) for eta, _, _ in found)
    if PRESETS[preset].theta0 == math.inf:
        grown = 0.1 * math.sqrt(1 + PRESETS[preset].growth)  # the ratio is 1 then
        assert [eta for eta, _, _ in found[:3]] == pytest.approx([0.1, 0.1, grown], abs=1e-15)
    without = PRESETS[preset]._replace(growth=0.0)
    eta, _, _ = without.advance(scalar(0.3), scalar(math.inf), torch.tensor(False), scalar(0), scalar(0))
    assert eta.item() == 0.3


FEDERATED = [
    (
        {"client": "SAM(SGD(lr=0.1), rho=0.2)"},
        [[1.5835104616, 0.6280158865], [1.2803270391, 0.4003114387]],
        None,
    ),
    (
        {"client": "SAM(Guided(SGD(lr=0.1), alpha=0.5), rho=0.2)", "strategy": "FedCM()"},
        [[1.7837407810, 0.7886917462], [1.4939811376, 0.5227434383]],
        None,
    ),
    (
        {"client": "AdaptiveSGD(preset='federated')"},
        [[1.3632028990, 0.5445299804], [1.0290880798, 0.3392548896]],
        [[0.1386750491, 0.2097617696], [0.1456905276, 0.2097617696]],
    ),
    (
        {"client": "AdaptiveSGD(preset='federated', persistent=True)", "strategy": "Remembering()"},
        [[1.3632028990, 0.5445299804], [1.0618215546, 0.3703187175]],
        [[0.1386750491, 0.2097617696], [0.1434021728, 0.2204875482]],
    ),
    (
        {"client": "SASAM(preset='federated')"},
        [[1.2790799699, 0.5052450093], [0.9172609140, 0.3122567272]],
        [[0.1358901678, 0.2097617696], [0.1393954670, 0.2097617696]],
    ),
]


@PLANS
@pytest.mark.parametrize(
    ("settings", "expected", "eta"), FEDERATED, ids=[str(c[0]["client"]) for c in FEDERATED]
)
def test_golden_sequences_of_two_workers(
    settings: dict[str, str], expected: list[list[float]], eta: list[list[float]] | None, plan: str
) -> None:
    run: dict[str, Any] = {"workers": 2, "rounds": 2, "local_steps": 2, "plan": plan, **settings}
    assert weights(bowls(**run)) == [pytest.approx(w, abs=1e-9) for w in expected]
    if eta is not None:
        run["strategy"] = "Remembering()"
        found = steps(bowls(**run))
        assert found == [pytest.approx(x, abs=1e-9) for x in eta]


def test_a_strategy_that_keeps_states_changes_nothing_unless_asked_to() -> None:
    run = {"workers": 2, "rounds": 2, "local_steps": 2, "client": "SASAM(preset='federated')"}
    assert weights(bowls(**run)) == weights(bowls(**run, strategy="Remembering()"))
    assert Remembering.keeps_state


# -------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("inner", [SGD(0.1), SGD(0.1, 0.9, weight_decay=0.1), AdamW(0.01)], ids=repr)
@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_of_radius_0_is_its_inner_rule(inner: LocalRule, adaptive: bool) -> None:
    loss, rows, data = make_rows("mlp")
    theta = tree.take(rows, 0)
    found, alone = (walk(r, loss, theta, data[0]) for r in (SAM(inner, rho=0.0, adaptive=adaptive), inner))
    for a, b in zip(found[:3], alone[:3], strict=True):
        assert_close(a, b, tolerance=0.0)
    assert found[3].tolist() == [2.0] * len(data[0])


@pytest.mark.parametrize("w", [0.7, -1.3])
def test_sam_on_a_parabola(w: float) -> None:
    a, lr, rho = 3.0, 0.1, 0.2
    theta = {"w": scalar(w)}
    rule = SAM(SGD(lr), rho, norm_eps=0.0)
    after, _, _ = rule.step(theta, {}, make_oracle(lambda t, _: a / 2 * t["w"] ** 2, scalar(0), theta))
    assert after["w"].item() == pytest.approx(w - lr * a * (w + rho * math.copysign(1, w)), abs=1e-14)


def test_asam_scales_weights_and_not_biases() -> None:
    w, b, rho, eta = 0.5, -2.0, 0.3, 0.2
    theta = {"0.weight": scalar(w), "0.bias": scalar(b)}
    asked: list[Tree] = []

    def grad(x: Tree) -> tuple[Tree, Tensor]:
        asked.append(x)
        return {"0.weight": scalar(1.0), "0.bias": scalar(2.0)}, scalar(0.0)

    oracle = Oracle(grad, theta, {"model": theta}, torch.tensor(0), scalar(0.5))
    SAM(SGD(0.1), rho, adaptive=True, asam_eta=eta, norm_eps=0.0).step(theta, {}, oracle)
    scale = abs(w) + eta
    norm = math.hypot(scale, 2.0)
    assert asked[1]["0.weight"].item() == pytest.approx(w + rho * scale**2 / norm, abs=1e-14)
    assert asked[1]["0.bias"].item() == pytest.approx(b + rho * 2.0 / norm, abs=1e-14)


@pytest.mark.parametrize("rule", [SAM(SGD(0.1, weight_decay=0.5), 0.2), SASAM(weight_decay=0.5)], ids=repr)
def test_weight_decay_is_that_of_the_restored_point_and_outside_of_ascent_and_difference(
    rule: LocalRule,
) -> None:
    loss, rows, data = make_rows("mlp")
    theta = tree.take(rows, 0)
    oracle = make_oracle(loss, data[0, 0], theta)
    plain: LocalRule = SAM(SGD(0.1), 0.2) if isinstance(rule, SAM) else SASAM()
    rate = 0.1 if isinstance(rule, SAM) else 0.2
    (a, _, _), (b, _, _) = (r.step(theta, r.init(theta), oracle) for r in (rule, plain))
    assert_close(a, tree.axpy(-rate * 0.5, theta, b))


def test_guided_by_nothing_or_at_1_is_its_inner_rule() -> None:
    loss, rows, data = make_rows("mlp")
    theta = tree.take(rows, 0)
    alone = walk(SGD(0.1), loss, theta, data[0])[0]
    assert_close(walk(Guided(SGD(0.1), alpha=1.0), loss, theta, data[0])[0], alone, tolerance=0.0)


def test_steps_of_adgd_stay_between_the_inverse_curvatures_and_it_converges() -> None:
    curvature = torch.tensor([1.0, 3.0, 10.0], dtype=F64)
    theta: Tree = {"w": torch.ones(3, dtype=F64)}
    rule = AdaptiveSGD(eta0=1e-8, preset="transcription")
    state, count = rule.init(theta), 0
    while theta["w"].norm() > 1e-10:
        oracle = make_oracle(lambda t, _: (curvature * t["w"] ** 2).sum() / 2, scalar(0), theta, count)
        theta, state, _ = rule.step(theta, state, oracle)
        if count:
            assert 0.05 - 1e-9 <= state["eta"].item() <= 0.5 + 1e-9
        count += 1
        assert count < 500


@pytest.mark.parametrize(
    ("client", "gradients"), [("SGD()", 1), ("SAM()", 2), ("AdaptiveSGD()", 2), ("SASAM()", 3)]
)
@PLANS
def test_gradients_are_counted(client: str, gradients: int, plan: str) -> None:
    *_, (last, _) = fedsim.rounds(blobs(client=client, plan=plan, rounds=2))
    assert last.metrics["gradients"] == gradients * last.clock.local_steps
    assert last.clock.local_steps == 2 * 3 * 5


# ---------------------------------------------------------------------------------------------- all plans

RULES = [
    ("SAM(SGD(lr=0.3), rho=0.1)", "FedAvg()"),
    ("SAM(SGD(lr=0.3, momentum=0.9, weight_decay=0.01), rho=0.7, adaptive=True, asam_eta=0.2)", "FedAvg()"),
    ("SAM(Guided(SGD(lr=0.3), alpha=0.1), rho=0.1)", "FedCM(lr=0.7)"),
    ("AdaptiveSGD(preset='delta_released')", "FedAvg()"),
    ("AdaptiveSGD(persistent=True)", "Remembering()"),
    ("SASAM(preset='federated')", "FedAvg()"),
    ("SASAM(weight_decay=0.01, persistent=True)", "DiLoCo(lr=1.0, momentum=0.0)"),
]


@pytest.mark.parametrize("more", [{}, {"local_steps": 0, "local_epochs": 1}], ids=["steps", "epochs"])
@pytest.mark.parametrize(("client", "strategy"), RULES)
def test_all_plans_are_a_loop_over_workers(client: str, strategy: str, more: dict[str, int]) -> None:
    """Also with workers of different numbers of steps and partial last batches."""

    def model(plan: str) -> Tensor:
        *_, (last, _) = fedsim.rounds(blobs(client=client, strategy=strategy, plan=plan, **more))
        return tree.flatten(last.model)

    reference = model("loop")
    for plan in ("stacked", "vmap"):
        assert (model(plan) - reference).norm() / reference.norm() < 1e-10


@pytest.mark.parametrize(("client", "strategy"), RULES)
def test_workers_on_several_nodes_and_a_resumed_run_change_nothing(client: str, strategy: str) -> None:
    experiment = blobs(client=client, strategy=strategy, plan="stacked")
    straight = list(fedsim.rounds(experiment))
    *_, (spread, _) = fedsim.rounds(experiment.replace({"nodes": 3}))
    assert_close(spread.model, straight[-1][0].model)
    federation = load(experiment)
    carrier = InProcess(experiment, federation)
    half = fedsim.rounds(experiment, federation, carrier)
    next(half)
    _, position = next(half)
    kept = [tree.clone(c.checkpoint()) for c in carrier.cohorts]
    again = InProcess(experiment, federation)
    for cohort, saved in zip(again.cohorts, kept, strict=True):
        cohort.restore(saved)
    *_, (resumed, _) = fedsim.rounds(experiment, federation, again, position)
    assert_close(resumed.model, straight[-1][0].model, tolerance=0.0)


def test_mofedsam_divides_by_each_workers_own_steps() -> None:
    """A worker of twice the steps, each the same, tells the same displacement of a step."""
    rule = bowls(client="Guided()", strategy="FedCM()").parts.strategy
    theta = {"w": torch.zeros(2, dtype=F64)}
    state, _ = rule.init(theta, 2)
    report = fedsim_report(steps=[2, 4])
    rows = {"w": torch.tensor([[0.2, 0.4], [0.4, 0.8]], dtype=F64)}
    _, broadcast = rule.merge(state, rows, report)
    assert_close(broadcast["displacement"]["w"], torch.tensor([0.1, 0.2], dtype=F64))
    assert_close(broadcast["model"]["w"], torch.tensor([0.3, 0.6], dtype=F64))


def fedsim_report(steps: list[int]):
    from strategies import Report

    count, ones = torch.tensor(steps), torch.ones(len(steps), dtype=F64)
    return Report(torch.arange(len(steps)), ones, ones, count, count)


# ----------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"client": "AdaptiveSGD(persistent=True)"}, "persistent keeps a worker's step between rounds"),
        ({"client": "Prox(SASAM(persistent=True))"}, "persistent keeps a worker's step between rounds"),
        ({"client": "SAM(Guided())"}, "need each other"),
        ({"strategy": "FedCM()"}, "need each other"),
        ({"client": "PALSGD(AdaptiveSGD())"}, "has no learning rate lr"),
        ({"client": "WarmupCosine(AdaptiveSGD())"}, "adapts its step"),
        ({"strategy": "FedCM(lr=0.0)", "client": "Guided()"}, "lr = 0.0 must be > 0"),
    ],
)
def test_bad_experiments_are_one_line(settings: dict[str, str], text: str) -> None:
    with pytest.raises(BadInput, match=text) as error:
        blobs(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("preset", ["transcription", "released"])
def test_faithful_forms_warn_on_small_models_and_carry_their_name(preset: str) -> None:
    experiment = bowls(client=f"Prox(SASAM(preset='{preset}'), mu=0.0)")
    with pytest.warns(UserWarning, match=f"preset='{preset}'.* is known to collapse on small models"):
        next(fedsim.rounds(experiment))
    assert preset in experiment.to_mapping()["client"]
