"""Domains: the invariance penalty and its federated form, colours and angles, and what is measured on a held-out domain."""

import math
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call

import fedsim
from clients import IRM, SGD
from fedsim import Experiment
from fedsim.data import ColoredDigits, RotatedDigits
from fedsim.data.domains import draw_environment, grey, rotate
from fedsim.federation import load
from fedsim.invariance import Slope, part_weights, penalty, slope_of
from fedsim.objectives import CrossEntropy, Exponential, Logistic, Objective
from fedsim.probes import Snapshot
from fedsim.registry import BadInput
from strategies import FedIRM

ROOT = Path(__file__).parents[1]
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
TINY = {
    "data": "ColoredDigits(rows=60)",
    "partition": "Natural()",
    "model": "MLP(hidden=(6,), init='xavier')",
    "objective": "Logistic()",
    "num_workers": 2,
    "local_steps": 1,
    "batch_size": 0,
    "eval_every": 0,
    "dtype": "float64",
    "device": "cpu",
    "plan": "stacked",
}


def last(experiment: Experiment) -> Snapshot:
    *_, (snapshot, _) = fedsim.rounds(experiment)
    return snapshot


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
    e = Experiment(
        **TINY, client=IRM(), rounds=30,
        strategy=FedIRM(optimiser, lr=0.01, anneal=12, on_anneal=on_anneal),  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    model, wanted = last(e).model, centralised(e)
    assert max((model[k] - wanted[k]).abs().max().item() for k in wanted) < 1e-9


def test_without_division_too() -> None:
    e = Experiment(
        **TINY, client=IRM(), rounds=10, strategy=FedIRM("adam", 0.01, penalty=100.0, anneal=4, divide=False)
    )
    model, wanted = last(e).model, centralised(e)
    assert max((model[k] - wanted[k]).abs().max().item() for k in wanted) < 1e-9


@pytest.mark.parametrize(("divide", "divisors"), [(True, [1, 1, 50, 50]), (False, [1, 1, 1, 1])])
def test_the_weight_switches_at_anneal(divide: bool, divisors: list[float]) -> None:
    rule = FedIRM(penalty=50.0, anneal=5, divide=divide)
    assert [rule.weights(t) for t in (0, 4, 5, 6)] == [
        (w, c) for w, c in zip([1, 1, 50, 50], divisors, strict=True)
    ]
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
        e = Experiment(
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
        snapshot = last(Experiment(**TINY, rounds=3, client=IRM(split=split), strategy=FedIRM()))
        assert snapshot.clock.gradients == gradients * 2 * 3
        assert snapshot.clock.local_steps == 2 * 3


def test_fedsgd_is_fedavg_for_plain_steps_of_1() -> None:
    a = last(Experiment(**TINY, rounds=3, client="SGD(lr=0.1)", strategy="FedSGD('sgd', lr=1.0)")).model
    b = last(Experiment(**TINY, rounds=3, client="SGD(lr=0.1)", strategy="FedAvg()")).model
    torch.testing.assert_close(a, b, atol=1e-13, rtol=0)


def test_local_irm_steps_warn_and_are_labelled(tmp_path: Path) -> None:
    e = Experiment(
        **{**TINY, "local_steps": 5}, rounds=1, client=IRM(), strategy=FedIRM(), out=str(tmp_path / "run")
    )
    with pytest.warns(UserWarning, match="local-steps = 5: local IRM steps are known to fail"):
        done = fedsim.run(e, draw=False)
    assert done.summary["label"].startswith("local IRM steps")
    assert Experiment(**TINY, client=IRM(), strategy=FedIRM()).label == ""
    compat = FedIRM("momentum", anneal=7, on_anneal="domainbed_compat")
    assert (
        Experiment(**TINY, client=IRM(), strategy=compat).label == "Adam in place of momentum from step 7 on"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"client": "IRM()"}, "'IRM\\(...\\)' and 'FedIRM\\(...\\)' need each other"),
        ({"strategy": "FedIRM()"}, "'IRM\\(...\\)' and 'FedIRM\\(...\\)' need each other"),
        (
            {"client": "IRM()", "strategy": "FedIRM()", "objective": "Exponential()"},
            "objective = 'Exponential\\(\\)': client = 'IRM\\(\\)' needs 'Logistic\\(\\)' or 'CrossEntropy\\(\\)'",
        ),
        ({"strategy": "FedSGD('adamw')"}, "optimiser = 'adamw' must be one of 'sgd', 'momentum'"),
        ({"strategy": "FedIRM(anneal=-1)", "client": "IRM()"}, "anneal = -1 must be >= 0"),
        ({"data": "ColoredDigits(colours=(0.3, 1.5))"}, "must be in \\[0, 1\\]"),
        ({"data": "RotatedDigits(held_out=10.0)"}, "held_out = 10 must be one of 0, 15, 30, 45, 60, 75"),
    ],
)
def test_bad_input(settings: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Experiment(**{**TINY, **settings})


def test_workers_are_whole_domains_or_equal_parts_of_them() -> None:
    with pytest.raises(
        BadInput, match="num-workers = 3 is larger than the 2 natural workers of colored digits"
    ):
        load(Experiment(**{**TINY, "num_workers": 3}))
    workers = ColoredDigits(rows=100).load(0, 4).workers
    assert workers is not None
    assert torch.bincount(workers).tolist() == [50] * 4
    assert workers.tolist() == sorted(workers.tolist())


# ------------------------------------------------------------------------------------------------- colours


def test_balanced_cells_are_exact() -> None:
    training, inside, outside = ColoredDigits().environments(seed=3)
    for e, environment in zip((0.3, 0.1, 0.3, 0.1, 0.9), (*training, *inside, outside), strict=True):
        cells = Counter(
            zip(
                environment.base,
                environment.y == environment.base,
                environment.colour == environment.y,
                strict=True,
            )
        )
        for base in (0, 1):
            for right, m in ((True, 750), (False, 250)):
                assert cells[base, right, False] == round(e * m)
                assert cells[base, right, True] == m - round(e * m)


def test_cells_of_the_training_domains() -> None:
    for e, wanted in ((0.3, [525, 225, 175, 75]), (0.1, [675, 75, 225, 25])):
        x, digit = grey("digits")
        found = draw_environment(np.random.default_rng(0), x, digit, 2000, e)
        one = found.base == 1
        counts = [
            int((one & ((found.y == 1) == label) & ((found.colour == found.y) == colour)).sum())
            for label in (True, False)
            for colour in (True, False)
        ]
        assert counts == wanted


def test_one_channel_is_empty_and_pools_are_disjoint() -> None:
    source = ColoredDigits(rows=200)
    training, inside, outside = source.environments(seed=0)
    for environment in (*training, *inside, outside):
        filled = environment.x.reshape(200, 2, 64).any(2)
        assert (filled.sum(1) == 1).all()
        assert (filled.argmax(1) == environment.colour).all()
    train, test = source.pools(seed=0)
    assert (len(train), len(test), len(np.intersect1d(train, test))) == (1347, 450, 0)
    assert not np.array_equal(training[0].y, training[1].y)


def test_coins_have_the_rates_of_the_domain() -> None:
    x, digit = grey("digits")
    for e in (0.1, 0.3, 0.9):
        found = draw_environment(np.random.default_rng(1), x, digit, 20_000, e, sampling="bernoulli")
        assert abs((found.y != found.base).mean() - 0.25) < 0.015
        assert abs((found.colour != found.y).mean() - e) < 0.015


def test_colored_digits_have_the_documented_form() -> None:
    data = ColoredDigits(rows=100).load(seed=0, num_workers=2)
    assert data.x.shape == (200, 2, 8, 8)
    assert (data.task, data.num_outputs, data.x.dtype) == ("binary", 1, torch.float64)
    assert 0 <= data.x.min() < data.x.max() == 1
    assert data.domains is not None
    assert data.domains.x.shape == (200, 2, 8, 8)
    assert data.domains.names == ("colour flips 0.3", "colour flips 0.1")
    assert data.domains.held_out == "colour flips 0.9"
    grey_data = ColoredDigits(rows=100, as_grey=True).load(seed=0, num_workers=2)
    torch.testing.assert_close(grey_data.x, data.x.sum(1, keepdim=True))


# -------------------------------------------------------------------------------------------------- angles


def test_rotation_has_the_golden_numbers() -> None:
    image = load_digits().images[:1] / 16
    assert image.sum() == pytest.approx(18.375)
    assert (image**2).sum() == pytest.approx(11.9921875)
    row = [
        0.0483532528, 0.3517210909, 0.6800198293, 0.0119894842, 0.0572147530, 0.5233458786, 0.4778879559, 0.0,
    ]  # fmt: skip
    at_15, at_30, at_75 = (rotate(image, a) for a in (15, 30, 75))
    assert at_15[0, 3].tolist() == pytest.approx(row, abs=1e-8)
    assert at_15.sum() == pytest.approx(15.7553141578, abs=1e-8)
    assert at_30.sum() == pytest.approx(16.9661094168, abs=1e-8)
    assert (at_30**2).sum() == pytest.approx(8.8012975038, abs=1e-8)
    assert at_75.sum() == pytest.approx(15.7087400339, abs=1e-8)


def test_rotation_by_0_is_the_identity_and_by_90_a_permutation() -> None:
    images = load_digits().images[:20] / 16
    assert np.array_equal(rotate(images, 0), images)
    turned = rotate(images, 90)
    np.testing.assert_allclose(np.sort(turned.reshape(20, -1)), np.sort(images.reshape(20, -1)), atol=1e-12)
    np.testing.assert_allclose(rotate(rotate(turned, 90), 180), images, atol=1e-12)


@pytest.mark.parametrize("held_out", [0.0, 75.0])
def test_rotated_digits_have_the_documented_form(held_out: float) -> None:
    data = RotatedDigits(held_out).load(seed=1, num_workers=5)
    sizes = [n for a, n in zip((0, 15, 30, 45, 60, 75), [300] * 3 + [299] * 3, strict=True) if a != held_out]
    assert data.domains is not None
    assert torch.bincount(data.domains.domain).tolist() == [n // 5 for n in sizes]
    assert data.workers is not None
    assert torch.bincount(data.workers).tolist() == [n - n // 5 for n in sizes]
    assert len(data.test_x) == (300 if held_out == 0 else 299)
    assert len(data.x) + len(data.test_x) + len(data.domains.x) == 1797
    assert f"{held_out:g} degrees" == data.domains.held_out


# ------------------------------------------------------------------------------------------------- figures


def test_id_accuracy_is_a_mean_over_domains_and_ood_accuracy_that_of_the_test_set() -> None:
    e = Experiment(
        **{**TINY, "data": "RotatedDigits()", "objective": "CrossEntropy()", "num_workers": 5}, rounds=2,
        client="SGD(lr=1.0)", strategy="FedSGD('adam', lr=0.01)",
    )  # fmt: skip
    snapshot = last(e)
    data = snapshot.federation.dataset
    assert data.domains is not None
    hit = (
        functional_call(snapshot.federation.module, snapshot.model, (data.domains.x,)).argmax(1)
        == data.domains.y
    )
    own = [hit[data.domains.domain == i].double().mean().item() for i in range(5)]
    assert snapshot.metrics["id_accuracy"] == pytest.approx(sum(own) / 5)
    assert snapshot.metrics["ood_accuracy"] == snapshot.metrics["test_accuracy"]
    assert snapshot.metrics["ood_loss"] == snapshot.metrics["test_loss"]


# ------------------------------------------------------------------------------- failure, repair, and failure


def outcome(name: str, **settings: object) -> tuple[float, float]:
    path = ROOT / f"experiments/domains_{name}.toml"
    metrics = last(Experiment.from_toml(path, {"plan": "stacked", "eval-every": 0, **settings})).metrics
    inside, outside = metrics["id_accuracy"], metrics["ood_accuracy"]
    assert isinstance(inside, float)
    assert isinstance(outside, float)
    return inside, outside


@pytest.mark.slow
@pytest.mark.parametrize(
    "data",
    ["ColoredDigits()", "ColoredDigits(colours=(0.7, 0.9), held_out=0.1)"],
    ids=["as is", "mirrored"],
)
def test_erm_fails_and_irm_holds_on_the_held_out_domain(data: str) -> None:
    repaired = []
    for seed in (0, 1, 2):
        erm, irm = (outcome(name, seed=seed, data=data) for name in ("erm", "irm"))
        assert erm[0] > 0.75
        assert erm[1] < 0.40
        assert irm[1] > 0.55
        assert irm[1] - erm[1] > 0.2
        assert abs(irm[0] - irm[1]) < 0.17
        repaired.append(irm[1])
    assert sum(repaired) / 3 > 0.60


@pytest.mark.slow
def test_the_classical_pair_of_colours_is_harder() -> None:
    for seed in (0, 1):
        (_, erm), (_, irm) = (
            outcome(name, seed=seed, data="ColoredDigits(colours=(0.2, 0.1))") for name in ("erm", "irm")
        )
        assert erm < 0.30
        assert irm - erm > 0.15


@pytest.mark.slow
def test_local_irm_steps_end_in_the_colour_rule() -> None:
    with pytest.warns(UserWarning, match="local IRM steps are known to fail"):
        _, outside = outcome(
            "irm",
            **{
                "client": "IRM(AdamW(lr=0.001, weight_decay=0.0), l2=0.001)",
                "strategy": "FedIRM('sgd', lr=1.0)",
                "local-steps": 5,
            },
        )
    assert outside < 0.2
