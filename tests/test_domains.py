"""Domains: the invariance penalty and its federated form."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from domains_toys import TINY, last, tiny
from torch import Tensor, nn
from torch.func import functional_call

import fedsim
from clients import IRM, SGD
from fedsim import Experiment
from fedsim.data import ColoredDigits
from fedsim.federation import load
from fedsim.invariance import Slope, part_weights, penalty, slope_of
from fedsim.objectives import CrossEntropy, Exponential, Logistic, Objective
from fedsim.registry import BadInput
from strategies import FedIRM, PooledIRM, Report

BINARY = (
    Logistic(),
    torch.tensor([[1.2], [-0.7], [0.3], [2.0], [-1.5], [0.4]], dtype=torch.float64),
    torch.tensor([1, 0, 0, 1, 1, 0]),
)
CLASSES = (
    CrossEntropy(),
    torch.tensor([[0.5, -1, 0.2], [1.5, 0.3, -0.4], [0, 0.8, 0.1], [-0.6, 0.2, 1.1]], dtype=torch.float64),
    torch.tensor([0, 1, 1, 2]),
)


# --------------------------------------------------------------------------------------------- the penalty


@pytest.mark.parametrize(
    ("case", "risk", "d", "squared", "split"),
    [
        (BINARY, 0.7103633837, 0.1482874783, 0.0219891762, -0.0287952152),
        (CLASSES, 0.8440106432, -0.0794042983, 0.0063050426, -0.0532642359),
    ],
    ids=["binary", "classes"],
)
def test_golden_numbers(
    case: tuple[Objective, Tensor, Tensor], risk: float, d: float, squared: float, split: float
) -> None:
    objective, z, y = case
    found = [
        objective.loss(z, y).mean(), slope_of(objective).loss(z, y).mean(),
        penalty(objective, z, y), penalty(objective, z, y, split=True),
    ]  # fmt: skip
    assert [x.item() for x in found] == pytest.approx([risk, d, squared, split], abs=1e-9)


def test_golden_gradient_of_the_square() -> None:
    objective, z, y = BINARY
    a, slope = slope_of(objective).loss_and_residual(z, y)
    golden = [-0.0008898182, 0.0087298428, 0.0320192214, 0.0044873891, -0.0514702948, 0.0343429825]
    assert (2 * a.mean() * slope.squeeze(1) / len(z)).tolist() == pytest.approx(golden, abs=1e-9)


@pytest.mark.parametrize(
    "case", [BINARY, CLASSES, (CrossEntropy(0.2), *CLASSES[1:])], ids=lambda c: repr(c[0])
)
@pytest.mark.parametrize("split", [False, True])
def test_closed_form_is_what_autograd_finds(case: tuple[Objective, Tensor, Tensor], split: bool) -> None:
    objective, z, y = case
    logits = z.clone().requires_grad_()
    s = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = objective.loss(s * logits, y)
    parts = [loss[0::2].mean(), loss[1::2].mean()] if split else [loss.mean()] * 2
    d = [torch.autograd.grad(part, s, create_graph=True)[0] for part in parts]
    product = d[0] * d[1]
    torch.testing.assert_close(penalty(objective, z, y, split), product, atol=1e-12, rtol=0)
    wanted = torch.autograd.grad(product, logits)[0]
    a, slope = slope_of(objective).loss_and_residual(z, y)
    one = torch.full((len(z),), 1 / len(z), dtype=torch.float64)
    even, odd = ((part_weights(one, p) if split else one) for p in ("even", "odd"))
    found = ((a * odd).sum() * even + (a * even).sum() * odd)[:, None] * slope
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("case", [BINARY, CLASSES], ids=["binary", "classes"])
def test_slope_is_a_finite_difference_of_the_risk(case: tuple[Objective, Tensor, Tensor]) -> None:
    objective, z, y = case
    h = 1e-5
    difference = (objective.loss((1 + h) * z, y).mean() - objective.loss((1 - h) * z, y).mean()) / (2 * h)
    assert slope_of(objective).loss(z, y).mean().item() == pytest.approx(difference.item(), rel=1e-6)


def test_a_calibrated_constant_is_not_penalised() -> None:
    z = torch.full((8, 1), math.log(3), dtype=torch.float64)
    assert penalty(Logistic(), z, torch.tensor([1, 1, 1, 0] * 2)).item() < 1e-20


@pytest.mark.parametrize(
    ("colours", "odds", "wanted"), [((0.3, 0.1), 4.0, 0.019218), ((0.2, 0.1), 0.85 / 0.15, 0.007522)]
)
def test_a_pooled_colour_rule_is_penalised_in_each_domain(
    colours: tuple[float, float], odds: float, wanted: float
) -> None:
    for e in colours:
        wrong = round(e * 100)
        y = torch.tensor([1] * 100 + [0] * 100)
        colour = torch.tensor([0] * wrong + [1] * (100 - wrong) + [1] * wrong + [0] * (100 - wrong))
        z = ((2 * colour - 1) * math.log(odds)).double()[:, None]
        assert penalty(Logistic(), z, y).item() == pytest.approx(wanted, abs=1e-6)


def test_the_split_penalty_of_random_orders_is_the_u_statistic() -> None:
    g = torch.Generator().manual_seed(0)
    n = 50
    z = torch.randn(n, 1, generator=g, dtype=torch.float64) + 1
    a = slope_of(Logistic()).loss(z, (torch.rand(n, generator=g) < 0.4).long())
    u = (a.sum() ** 2 - (a**2).sum()) / (n * (n - 1))
    orders = torch.rand(40_000, n, generator=g).argsort(1)
    split = a[orders[:, 0::2]].mean(1) * a[orders[:, 1::2]].mean(1)
    assert split.mean().item() == pytest.approx(u.item(), rel=0.02)
    assert a.mean().item() ** 2 > u.item()  # the square is biased upwards


@pytest.mark.parametrize("objective", [Logistic(), CrossEntropy()], ids=repr)
def test_huge_outputs_are_finite(objective: Objective) -> None:
    z = torch.tensor([[80.0], [-80.0]] if objective == Logistic() else [[80.0, -80.0], [-80.0, 80.0]])
    y = torch.tensor([0, 0])
    a, slope = slope_of(objective).loss_and_residual(z, y)
    assert all(bool(x.isfinite().all()) for x in (objective.loss(z, y), a, slope))
    assert math.isfinite(penalty(objective, z, y).item())


def test_other_losses_have_no_slope() -> None:
    with pytest.raises(ValueError, match="Exponential has no slope here; use CrossEntropy or Logistic"):
        slope_of(Exponential())


# ----------------------------------------------------------------------------------------- federated form


def objective_by_autograd(
    module: nn.Module,
    parts: list[tuple[Tensor, Tensor]],
    theta: dict[str, Tensor],
    lam: float,
    divisor: float,
) -> Tensor:
    """Return J of all domains, from its definition."""
    found = []
    for x, y in parts:
        s = torch.ones((), dtype=torch.float64, requires_grad=True)
        risk = nn.functional.binary_cross_entropy_with_logits(
            s * functional_call(module, theta, (x,))[:, 0], y.double()
        )
        d = torch.autograd.grad(risk, s, create_graph=True)[0]
        found.append(risk + lam * d**2)
    return (torch.stack(found).mean() + 1e-3 * sum((w**2).sum() for w in theta.values())) / divisor


def centralised(experiment: Experiment) -> dict[str, Tensor]:
    federation = load(experiment)
    rule = experiment.parts.strategy
    assert isinstance(rule, FedIRM)
    data = federation.dataset
    parts = [(data.x[data.workers == i], data.y[data.workers == i]) for i in (0, 1)]
    theta = {k: x.clone().requires_grad_() for k, x in federation.theta.items()}

    def make(name: str) -> torch.optim.Optimizer:
        leaves, lr, eps = list(theta.values()), rule.lr, rule.eps
        if name == "adam":
            return torch.optim.Adam(leaves, lr, (rule.beta1, rule.beta2), eps)
        if name == "rmsprop":
            return torch.optim.RMSprop(leaves, lr, rule.beta2, eps)
        momentum = 0.0 if name == "sgd" else rule.beta1
        return torch.optim.SGD(leaves, lr, momentum, nesterov=name == "nesterov")

    optimiser = make(rule.optimiser)
    for t in range(experiment.rounds):
        if t == rule.anneal and rule.on_anneal != "keep":
            optimiser = make("adam" if rule.on_anneal == "domainbed_compat" else rule.optimiser)
        lam = rule.penalty if t >= rule.anneal else 1.0
        optimiser.zero_grad()
        objective_by_autograd(
            federation.module, parts, theta, lam, max(1.0, lam) if rule.divide else 1.0
        ).backward()
        optimiser.step()
    return {k: x.detach() for k, x in theta.items()}


@pytest.mark.parametrize("on_anneal", ["rebuild", "keep", "domainbed_compat"])
@pytest.mark.parametrize("optimiser", ["sgd", "momentum", "nesterov", "rmsprop", "adam"])
def test_one_step_a_round_is_centralised_training(optimiser: str, on_anneal: str) -> None:
    e = tiny(
        client=IRM(), rounds=30,
        strategy=FedIRM(optimiser, lr=0.01, anneal=12, on_anneal=on_anneal),  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    model, wanted = last(e).model, centralised(e)
    assert max((model[k] - wanted[k]).abs().max().item() for k in wanted) < 1e-9


def test_without_division_too() -> None:
    e = tiny(client=IRM(), rounds=10, strategy=FedIRM("adam", 0.01, penalty=100.0, anneal=4, divide=False))
    model, wanted = last(e).model, centralised(e)
    assert max((model[k] - wanted[k]).abs().max().item() for k in wanted) < 1e-9


def test_several_workers_of_a_domain_are_one_with_all_its_rows() -> None:
    rule: dict[str, Any] = {"optimiser": "adam", "lr": 0.01, "penalty": 30.0, "anneal": 4}
    data = "ColoredDigits(rows=61)"  # so that the three workers of a domain have 21, 20 and 20 rows

    def model(**settings: Any) -> dict[str, Tensor]:
        return last(tiny(**{"data": data, "rounds": 10, "client": IRM(), **settings})).model

    wanted = model(strategy=FedIRM(**rule))
    for plan in ("stacked", "vmap", "loop"):
        found = model(strategy=PooledIRM(**rule, per_domain=3), num_workers=6, plan=plan)
        assert max((found[k] - wanted[k]).abs().max().item() for k in wanted) < 1e-12
    apart = model(strategy=FedIRM(**rule), num_workers=6)
    assert max((apart[k] - wanted[k]).abs().max().item() for k in wanted) > 1e-6


def test_domains_weigh_the_same_whatever_their_workers_have() -> None:
    rule, n = PooledIRM(per_domain=2), torch.tensor([3.0, 1.0, 10.0, 30.0], dtype=torch.float64)
    d, whole = torch.tensor([1.0, 5.0, -2.0, 2.0], dtype=torch.float64), torch.ones(4, dtype=torch.int64)
    report = Report(torch.arange(4), d, n, whole, whole)
    assert rule.shares(report).tolist() == [0.75, 0.25, 0.25, 0.75]
    _, broadcast = rule.init({"w": torch.zeros(2)}, 4)
    assert rule.inform(broadcast, report)["slopes"]["pooled"].tolist() == [2, 2, 1, 1]
    some = Report(*(x[2:] for x in report))
    assert rule.inform(broadcast, some)["slopes"]["pooled"].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(("divide", "divisors"), [(True, [1, 1, 50, 50]), (False, [1, 1, 1, 1])])
def test_the_weight_switches_at_anneal(divide: bool, divisors: list[float]) -> None:
    rule = FedIRM(penalty=50.0, anneal=5, divide=divide)
    assert [rule.weights(t) for t in (0, 4, 5, 6)] == [
        (w, c) for w, c in zip([1, 1, 50, 50], divisors, strict=True)
    ]
    assert FedIRM(penalty=0.5, anneal=0, divide=divide).weights(3) == (
        0.5,
        1,
    )  # weights below 1 do not divide
    theta = {"w": torch.zeros(2)}
    _, broadcast = FedIRM(anneal=0, penalty=7.0).init(theta, 2)
    assert {k: x.item() for k, x in broadcast["irm"].items()} == {"weight": 7.0, "divisor": 7.0}


def test_several_workers_of_a_domain_can_pool_their_slopes() -> None:
    # sum_k (n_k / N) (grad R_k + 2 lam D grad D_k) with the pooled D is the gradient for one worker with all rows
    objective, z, y = BINARY

    def gradient(rows: slice, d: Tensor) -> Tensor:
        _, residual = objective.loss_and_residual(z[rows], y[rows])
        _, slope = Slope(Logistic()).loss_and_residual(z[rows], y[rows])
        out = torch.zeros_like(z)
        out[rows] = (residual + 2 * 30 * d * slope) / len(z[rows])
        return out

    shards = [slice(0, 1), slice(1, 4), slice(4, 6)]
    own = [slope_of(objective).loss(z[s], y[s]).mean() for s in shards]
    pooled = sum((d * len(z[s]) / len(z) for d, s in zip(own, shards, strict=True)), torch.zeros(()))
    total = sum((gradient(s, pooled) * len(z[s]) / len(z) for s in shards), torch.zeros_like(z))
    whole = gradient(slice(0, 6), slope_of(objective).loss(z, y).mean())
    torch.testing.assert_close(total, whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"partition": "ByQuantity(sigma=1.0)", "num_workers": 3},
        {"batch_size": 16, "local_epochs": 1, "local_steps": 0, "num_workers": 3, "partition": "IID()"},
        {
            "model": "SmallCNN(channels=(3,))",
            "data": "RotatedDigits()",
            "objective": "CrossEntropy()",
            "num_workers": 5,
        },
    ],
    ids=["full", "uneven", "short batches", "autograd"],
)
def test_all_plans_agree(settings: dict, split: bool) -> None:
    def model(plan: str) -> dict[str, Tensor]:
        given = {**TINY, "plan": plan, "rounds": 4, **settings}
        e = tiny(
            **given,
            client=IRM(SGD(lr=0.5), split=split),
            strategy=FedIRM("sgd", lr=1.0, anneal=2, penalty=20.0),
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "local-steps = 0")
            return last(e).model

    loop = model("loop")
    for plan in ("stacked", "vmap"):
        torch.testing.assert_close(model(plan), loop, atol=1e-10, rtol=1e-9)


def test_the_penalty_costs_gradients() -> None:
    for split, gradients in ((False, 2), (True, 3)):
        snapshot = last(tiny(rounds=3, client=IRM(split=split), strategy=FedIRM()))
        assert snapshot.clock.gradients == gradients * 2 * 3
        assert snapshot.clock.local_steps == 2 * 3


def test_fedsgd_is_fedavg_for_plain_steps_of_1() -> None:
    a = last(tiny(rounds=3, client="SGD(lr=0.1)", strategy="FedSGD('sgd', lr=1.0)")).model
    b = last(tiny(rounds=3, client="SGD(lr=0.1)", strategy="FedAvg()")).model
    torch.testing.assert_close(a, b, atol=1e-13, rtol=0)


def test_local_irm_steps_warn_and_are_labelled(tmp_path: Path) -> None:
    e = tiny(**{"local_steps": 5}, rounds=1, client=IRM(), strategy=FedIRM(), out=str(tmp_path / "run"))
    with pytest.warns(UserWarning, match="local-steps = 5: local IRM steps are known to fail"):
        done = fedsim.run(e, draw=False)
    assert done.summary["label"].startswith("local IRM steps")
    assert tiny(client=IRM(), strategy=FedIRM()).label == ""
    compat = FedIRM("momentum", anneal=7, on_anneal="domainbed_compat")
    assert tiny(client=IRM(), strategy=compat).label == "Adam in place of momentum from step 7 on"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"client": "IRM()"}, "'IRM\\(...\\)' and 'FedIRM\\(...\\)' need each other"),
        ({"strategy": "FedIRM()"}, "'IRM\\(...\\)' and 'FedIRM\\(...\\)' need each other"),
        (
            {"client": "IRM()", "strategy": "FedIRM()", "objective": "Exponential()"},
            "objective = 'Exponential\\(\\)': client = 'IRM\\(\\)' needs 'Logistic\\(\\)' or 'CrossEntropy\\(\\)'",
        ),
        (
            {"client": "IRM(split=True)", "strategy": "PooledIRM()"},
            "strategy = 'PooledIRM\\(\\)' needs 'IRM\\(...\\)', not split",
        ),
        (
            {"client": "IRM()", "strategy": "PooledIRM()", "batch_size": 8},
            "batch-size = 8: strategy = 'PooledIRM\\(\\)' needs batch-size = 0",
        ),
        ({"client": "IRM()", "strategy": "PooledIRM(per_domain=0)"}, "per_domain = 0 must be >= 1"),
        ({"strategy": "FedSGD('adamw')"}, "optimiser = 'adamw' must be one of 'sgd', 'momentum'"),
        ({"strategy": "FedIRM(anneal=-1)", "client": "IRM()"}, "anneal = -1 must be >= 0"),
        ({"data": "ColoredDigits(colours=(0.3, 1.5))"}, "must be in \\[0, 1\\]"),
        ({"data": "RotatedDigits(held_out=10.0)"}, "held_out = 10 must be one of 0, 15, 30, 45, 60, 75"),
    ],
)
def test_bad_input(settings: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        tiny(**settings)


def test_workers_must_be_whole_domains_to_be_pooled() -> None:
    with pytest.raises(BadInput, match="per_domain = 3 must divide the number of workers, 2"):
        last(tiny(rounds=1, client=IRM(), strategy=PooledIRM(per_domain=3)))


def test_workers_are_whole_domains_or_equal_parts_of_them() -> None:
    with pytest.raises(
        BadInput, match="num-workers = 3 is larger than the 2 natural workers of colored digits"
    ):
        load(tiny(**{"num_workers": 3}))
    workers = ColoredDigits(rows=100).load(0, 4).workers
    assert workers is not None
    assert torch.bincount(workers).tolist() == [50] * 4
    assert workers.tolist() == sorted(workers.tolist())
