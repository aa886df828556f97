"""Laws, references and golden vectors of the local rules: one table, a newcomer adds a row to `TABLE`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import quadratics, registered

import fedsim
from clients import (
    PALSGD,
    SAM,
    SASAM,
    SGD,
    AdamW,
    AdaptiveSGD,
    Clipped,
    Controlled,
    Fresh,
    Gaussian,
    Guided,
    LocalRule,
    Nesterov,
    Oracle,
    Prox,
    State,
    StepDecay,
    Told,
    WarmupCosine,
    told,
)
from fedsim import tree
from fedsim.registry import parse
from fedsim.tree import Stack, Tree

TABLE: list[LocalRule] = [
    SGD(lr=0.1),
    SGD(lr=0.1, momentum=0.9),
    SGD(lr=0.1, momentum=0.9, nesterov=True),
    SGD(lr=0.1, weight_decay=0.3),
    SGD(lr=0.05, momentum=0.5, nesterov=True, weight_decay=0.3),
    AdamW(lr=0.01),
    AdamW(lr=0.02, beta1=0.5, beta2=0.8, eps=1e-3, weight_decay=0.2),
    Nesterov(lr=0.1, momentum=0.9),
    Nesterov(lr=0.05, momentum=0.5, weight_decay=0.3),
    Prox(SGD(lr=0.1), mu=0.4),
    Prox(AdamW(lr=0.01), mu=0.4),
    Prox(Prox(SGD(lr=0.1, momentum=0.9), mu=0.1), mu=0.3),
    PALSGD(SGD(lr=0.1), p=0.24, mix=0.5),
    PALSGD(AdamW(lr=0.01), p=0.24, mix=2.0, first_tensor_only=True, coin_seed=0),
    Fresh(SGD(lr=0.1, momentum=0.9)),
    Fresh(AdamW(lr=0.01)),
    Controlled(SGD(lr=0.1)),
    Controlled(AdamW(lr=0.01)),
    Clipped(SGD(lr=0.1), norm=0.5),
    Clipped(Prox(AdamW(lr=0.01), mu=0.4), norm=0.1),
    WarmupCosine(SGD(lr=0.1), warmup=3, total=8, floor=0.1),
    WarmupCosine(Clipped(AdamW(lr=0.01)), warmup=2, total=20),
    StepDecay(SGD(lr=0.1, weight_decay=0.2), at=(2, 5)),
    StepDecay(Prox(SGD(lr=0.1, momentum=0.9), mu=0.1), at=(3,), factor=0.5),
    WarmupCosine(WarmupCosine(SGD(lr=0.1, momentum=0.9), total=5), warmup=1, total=6),
    SAM(SGD(lr=0.1), rho=0.2),
    SAM(SAM(AdamW(lr=0.01), rho=0.1), rho=0.2, adaptive=True, asam_eta=0.2),
    Prox(SAM(Clipped(SGD(lr=0.1, momentum=0.9), norm=0.5)), mu=0.3),
    Guided(SGD(lr=0.1, momentum=0.9), alpha=0.3),
    SAM(Guided(SGD(lr=0.1), alpha=0.5), rho=0.2),
    AdaptiveSGD(eta0=0.1),
    AdaptiveSGD(eta0=0.1, preset="delta_algorithm", weight_decay=0.1, persistent=True),
    Clipped(AdaptiveSGD(preset="delta_released", first="eta0", growth=0.3), norm=0.5),
    SASAM(eta0=0.1),
    SASAM(eta0=0.1, preset="transcription"),
    SASAM(preset="released", rho_max=0.5, damping=2.0, weight_decay=0.1),
    SASAM(preset="federated", rho_lag=True, persistent=True),
    Gaussian(SGD(lr=0.1, momentum=0.9)),
    Prox(Gaussian(AdamW(lr=0.01)), mu=0.4),
]
every_rule = pytest.mark.parametrize("rule", TABLE, ids=repr)

NUM_WORKERS = 5
NUM_STEPS = 10

Loss = Callable[[Tree, Tensor], Tensor]


def quadratic(theta: Tree, x: Tensor) -> Tensor:
    return 0.5 * ((theta["w"] - x[:2]) ** 2).sum() + theta["b"] ** 2 * x[2].abs() + theta["w"].prod()


def mlp(theta: Tree, x: Tensor) -> Tensor:
    hidden = torch.tanh(theta["w"] @ x[:3] + theta["u"])
    return torch.nn.functional.cross_entropy(theta["v"] @ hidden, (x[3] > 0).long())


MODELS: dict[str, tuple[Loss, dict[str, tuple[int, ...]]]] = {
    "quadratic": (quadratic, {"w": (2,), "b": ()}),
    "mlp": (mlp, {"w": (4, 3), "u": (4,), "v": (2, 4)}),
}
every_model = pytest.mark.parametrize("name", MODELS)


def make_rows(name: str) -> tuple[Loss, Stack, Tensor]:
    """Make a loss, a row for each worker and its data ``[W, T, 4]``."""
    loss, shapes = MODELS[name]
    g = torch.Generator().manual_seed(0)
    rows = {k: torch.randn((NUM_WORKERS, *s), generator=g, dtype=torch.float64) for k, s in shapes.items()}
    return loss, rows, torch.randn((NUM_WORKERS, NUM_STEPS, 4), generator=g, dtype=torch.float64)


def make_oracle(loss: Loss, x: Tensor, anchor: Tree, t: int = 0) -> Oracle:
    def grad(theta: Tree) -> tuple[Tree, Tensor]:
        return torch.func.grad_and_value(loss)(theta, x)

    u = torch.tensor((0.25 + 0.37 * t) % 1, dtype=torch.float64)
    broadcast = {
        "model": anchor,
        "control": tree.scale(0.3, anchor),
        "displacement": tree.scale(0.02, anchor),
    }
    return Oracle(grad, anchor, broadcast, torch.tensor(t), u)


def walk(rule: LocalRule, loss: Loss, theta: Tree, data: Tensor) -> tuple[Tree, State, Tensor, Tensor]:
    """Make a round of ``T`` steps of one worker: parameters, state, losses ``[T]`` and gradients ``[T]``."""
    anchor, state, heard = theta, rule.init(theta), []
    for t in range(NUM_STEPS):
        theta, state, said = rule.step(theta, state, make_oracle(loss, data[t], anchor, t))
        heard.append(said)
    return theta, state, torch.stack([h.loss for h in heard]), torch.stack([h.gradients for h in heard])


def assert_close(a: Any, b: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# --------------------------------------------------------------------------------------------------- laws


@every_rule
def test_is_a_local_rule_that_its_repr_makes_again(rule: LocalRule) -> None:
    assert isinstance(rule, LocalRule)
    assert parse("client", repr(rule)) == rule


@every_model
@every_rule
def test_batched_workers_are_those_one_at_a_time(rule: LocalRule, name: str) -> None:
    loss, rows, data = make_rows(name)
    batched = torch.vmap(lambda theta, x: walk(rule, loss, theta, x))(rows, data)
    for i in range(NUM_WORKERS):
        alone = walk(rule, loss, tree.take(rows, i), data[i])
        of_worker = tree.map_nested(lambda x, i=i: x[i], dict(zip("tslg", batched, strict=True)))
        assert_close(of_worker, dict(zip("tslg", alone, strict=True)))


@every_rule
def test_nothing_is_changed_in_place(rule: LocalRule) -> None:
    loss, rows, data = make_rows("mlp")
    theta, anchor = tree.take(rows, 0), tree.take(rows, 1)
    state = rule.init(theta)
    for t in range(3):
        arguments = {"theta": theta, "anchor": anchor, "state": state}
        before = tree.map_nested(torch.clone, arguments)
        theta, state, _ = rule.step(theta, state, make_oracle(loss, data[0, t], anchor, t))
        assert_close(arguments, before, tolerance=0.0)


def cost(rule: Any) -> int:
    """Return the gradients of a step."""
    own = {AdaptiveSGD: 2, SASAM: 3}.get(type(rule), 1)
    inner = getattr(rule, "inner", None)
    return own if inner is None else cost(inner) * (2 if isinstance(rule, SAM) else 1)


@every_rule
def test_a_step_tells_the_loss_before_it_and_its_gradients(rule: LocalRule) -> None:
    loss, rows, data = make_rows("mlp")
    theta = tree.take(rows, 0)
    _, _, said = rule.step(theta, rule.init(theta), make_oracle(loss, data[0, 0], tree.take(rows, 1)))
    assert_close(said.loss, loss(theta, data[0, 0]))
    assert said.gradients.item() == cost(rule)
    assert said.loss.shape == said.gradients.shape == ()


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_and_the_shape_of_the_state_stay(rule: LocalRule, dtype: torch.dtype) -> None:
    loss, rows, data = make_rows("mlp")
    theta = {k: x[0].to(dtype) for k, x in rows.items()}
    start = rule.init(theta)
    after, state, _ = rule.step(theta, start, make_oracle(loss, data[0, 0].to(dtype), theta))
    assert {x.dtype for x in after.values()} == {dtype}
    shapes = [tree.map_nested(lambda x: torch.tensor(x.shape), s) for s in (start, state)]
    assert_close(*shapes, tolerance=0.0)


@every_rule
def test_without_a_gradient_and_a_decay_nothing_moves(rule: LocalRule) -> None:
    loss, rows, data = make_rows("quadratic")
    theta = tree.scale(0.0, tree.take(rows, 0))
    at_rest = make_oracle(lambda theta, x: 0.0 * loss(theta, x), data[0, 0], theta)
    after, _, _ = rule.step(theta, rule.init(theta), at_rest)
    assert_close(after, theta, tolerance=0.0)


# -------------------------------------------------------------------------------------------- references


@every_model
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_is_that_of_torch(name: str, momentum: float, nesterov: bool, decay: float) -> None:
    def reference(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=decay)

    compare(SGD(lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=decay), reference, name)


@every_model
@pytest.mark.parametrize("decay", [0.0, 0.01, 0.5])
@pytest.mark.parametrize(("beta1", "beta2", "eps"), [(0.9, 0.999, 1e-8), (0.0, 0.5, 1e-3)])
def test_adamw_is_that_of_torch(name: str, beta1: float, beta2: float, eps: float, decay: float) -> None:
    def reference(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=0.02, betas=(beta1, beta2), eps=eps, weight_decay=decay)

    compare(AdamW(lr=0.02, beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay), reference, name)


def compare(rule: LocalRule, make: Callable[[list[Tensor]], torch.optim.Optimizer], name: str) -> None:
    loss, rows, data = make_rows(name)
    theta = tree.take(rows, 0)
    leaves = {k: x.clone().requires_grad_() for k, x in theta.items()}
    optimizer = make([*leaves.values()])
    for t in range(NUM_STEPS):
        optimizer.zero_grad()
        loss(leaves, data[0, t]).backward()
        optimizer.step()
    assert_close(walk(rule, loss, theta, data[0])[0], tree.tree_map(torch.detach, leaves))


@every_model
@pytest.mark.parametrize("inner", [r for r in TABLE if not isinstance(r, Prox)], ids=repr)
def test_prox_of_0_is_its_inner_rule(inner: LocalRule, name: str) -> None:
    loss, rows, data = make_rows(name)
    for i in range(NUM_WORKERS):
        with_prox = walk(Prox(inner, mu=0.0), loss, tree.take(rows, i), data[i])
        alone = walk(inner, loss, tree.take(rows, i), data[i])
        for a, b in zip(with_prox, alone, strict=True):
            assert_close(a, b, tolerance=0.0)


@pytest.mark.parametrize("norm", [0.05, 0.5, 1e9])
def test_clipped_is_clip_grad_norm_of_torch(norm: float) -> None:
    loss, rows, data = make_rows("mlp")
    theta = tree.take(rows, 0)
    leaves = {k: x.clone().requires_grad_() for k, x in theta.items()}
    optimizer = torch.optim.AdamW([*leaves.values()], lr=0.02)
    for t in range(NUM_STEPS):
        optimizer.zero_grad()
        loss(leaves, data[0, t]).backward()
        torch.nn.utils.clip_grad_norm_(leaves.values(), norm)
        optimizer.step()
    found = walk(Clipped(AdamW(lr=0.02), norm=norm), loss, theta, data[0])[0]
    assert_close(found, tree.tree_map(torch.detach, leaves))


def test_a_clipped_step_is_as_long_as_the_norm_at_most() -> None:
    loss, rows, data = make_rows("mlp")
    theta = tree.take(rows, 0)
    oracle = make_oracle(loss, data[0, 0], theta)
    length = tree.norm(oracle.grad(theta)[0]).item()
    for norm in (0.5 * length, 2 * length):
        rule = Clipped(SGD(lr=1.0), norm=norm)
        step = tree.sub(rule.step(theta, rule.init(theta), oracle)[0], theta)
        assert tree.norm(step).item() == pytest.approx(min(norm, length), rel=1e-5)


def test_prox_outside_of_a_clip_is_clipped_and_inside_is_not() -> None:
    loss, rows, data = make_rows("mlp")
    theta = tree.take(rows, 0)
    oracle = make_oracle(loss, data[0, 0], tree.scale(0.0, theta))
    gradient = oracle.grad(theta)[0]

    def clip(g: Tree) -> Tree:
        return tree.scale(0.1 / (tree.norm(g) + 1e-6), g)

    inside = tree.axpy(0.4, theta, clip(gradient))
    outside = clip(tree.axpy(0.4, theta, gradient))
    for rule, direction in (
        (Clipped(Prox(SGD(lr=1.0), mu=0.4), norm=0.1), inside),
        (Prox(Clipped(SGD(lr=1.0), norm=0.1), mu=0.4), outside),
    ):
        assert_close(rule.step(theta, rule.init(theta), oracle)[0], tree.sub(theta, direction))


@every_model
@pytest.mark.parametrize("floor", [0.0, 0.2])
@pytest.mark.parametrize("warmup", [2, 4])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_warmup_and_cosine_are_those_of_torch(kind: str, warmup: int, floor: float, name: str) -> None:
    total, lr = 8, 0.05  # two steps are left for the end, where the factor stays as it is
    loss, rows, data = make_rows(name)
    theta = tree.take(rows, 0)
    leaves = {k: x.clone().requires_grad_() for k, x in theta.items()}
    inner: LocalRule = SGD(lr, 0.9, weight_decay=0.1) if kind == "SGD" else AdamW(lr, weight_decay=0.1)
    values = [*leaves.values()]
    optimizer = torch.optim.AdamW(values, lr, weight_decay=0.1)
    if kind == "SGD":
        optimizer = torch.optim.SGD(values, lr, momentum=0.9, weight_decay=0.1)
    rising = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
    for t in range(NUM_STEPS):
        if t == warmup:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"]
            rising = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - warmup, floor * lr)
        optimizer.zero_grad()
        loss(leaves, data[0, t]).backward()
        optimizer.step()
        if t < total:
            rising.step()
    found = walk(WarmupCosine(inner, warmup, total, floor), loss, theta, data[0])[0]
    assert_close(found, tree.tree_map(torch.detach, leaves))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_step_decay_is_that_of_torch(momentum: float) -> None:
    loss, rows, data = make_rows("quadratic")
    theta = tree.take(rows, 0)
    leaves = {k: x.clone().requires_grad_() for k, x in theta.items()}
    optimizer = torch.optim.SGD([*leaves.values()], 0.05, momentum=momentum, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 6], gamma=0.2)
    for t in range(NUM_STEPS):
        optimizer.zero_grad()
        loss(leaves, data[0, t]).backward()
        optimizer.step()
        schedule.step()
    inner = SGD(0.05, momentum, weight_decay=0.1)
    found = walk(StepDecay(inner, at=(3, 6), factor=0.2), loss, theta, data[0])[0]
    assert_close(found, tree.tree_map(torch.detach, leaves))


def test_factors_of_warmup_and_cosine() -> None:
    factor = WarmupCosine(warmup=2, total=6, floor=0.2).factor(torch.arange(9, dtype=torch.float64))
    falling = [0.2 + 0.4 * (1 + math.cos(math.pi * k / 4)) for k in range(5)]
    assert factor.tolist() == pytest.approx([0.5, 1.0, *falling, 0.2, 0.2], abs=1e-15)
    assert WarmupCosine(total=3).factor(torch.tensor(0.0)).item() == 1


def test_a_schedule_goes_on_in_the_next_round() -> None:
    loss, rows, data = make_rows("mlp")
    rule = WarmupCosine(AdamW(lr=0.05), warmup=3, total=2 * NUM_STEPS)
    theta, state = tree.take(rows, 0), rule.init(tree.take(rows, 0))
    for i in range(2):
        for t in range(NUM_STEPS):  # the oracle counts from 0 again
            theta, state, _ = rule.step(theta, state, make_oracle(loss, data[i, t], theta, t))
    assert state["count"].item() == 2 * NUM_STEPS
    still, _, _ = rule.step(theta, state, make_oracle(loss, data[0, 0], theta))
    assert_close(still, theta, tolerance=0.0)


def test_prox_is_sgd_with_weight_decay_towards_an_anchor_at_0() -> None:
    loss, rows, data = make_rows("mlp")
    theta, zero = tree.take(rows, 0), tree.scale(0.0, tree.take(rows, 0))
    oracle = make_oracle(loss, data[0, 0], zero)
    (a, _, _), (b, _, _) = (
        rule.step(theta, rule.init(theta), oracle)
        for rule in (Prox(SGD(lr=0.1), mu=0.3), SGD(0.1, weight_decay=0.3))
    )
    assert_close(a, b)


def relative_error(term: Callable[[Tensor], Tensor]) -> float:
    """Compare the gradient that `Prox` gives to its inner rule with differences of ``F + term(theta - anchor)``."""
    loss, rows, data = make_rows("mlp")
    theta, anchor, x = tree.take(rows, 0), tree.take(rows, 1), data[0, 0]
    flat, origin = tree.flatten(theta), tree.flatten(anchor)

    def regularised(v: Tensor) -> Tensor:
        return loss(tree.unflatten(v, theta), x) + term(v - origin)

    h = 1e-5
    differences = torch.stack([
        (regularised(flat + h * e) - regularised(flat - h * e)) / (2 * h)
        for e in torch.eye(len(flat), dtype=torch.float64)
    ])
    rule = Prox(SGD(lr=1.0), mu=0.4)
    after, _, _ = rule.step(theta, rule.init(theta), make_oracle(loss, x, anchor))
    gradient = flat - tree.flatten(after)
    return ((gradient - differences).norm() / differences.norm()).item()


def test_prox_has_the_gradient_of_the_squared_distance() -> None:
    assert relative_error(lambda gap: 0.4 / 2 * gap.square().sum()) < 1e-6
    assert relative_error(lambda gap: 0.4 / 2 * gap.norm()) > 1e-2


# ------------------------------------------------------------------------------------------ golden vectors


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # Plain local SGD, and FedProx: 4 workers with losses a (x - b)^2 / 2, 3 steps a round, from 1.5.
        (SGD(lr=0.1), [1.29646875, 1.1584491211, 1.0648545602]),
        (Prox(SGD(lr=0.1), mu=0.4), [1.30474875, 1.1697471545]),
    ],
    ids=repr,
)
def test_golden_vectors(rule: LocalRule, expected: list[float]) -> None:
    a = torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=torch.float64)
    b = torch.tensor([0.0, 1.0, -1.0, 2.0], dtype=torch.float64)

    def loss(theta: Tree, x: Tensor) -> Tensor:
        return x[0] / 2 * (theta["x"] - x[1]) ** 2

    server = {"x": torch.tensor(1.5, dtype=torch.float64)}
    path = []
    for _ in expected:
        rows = []
        for x in torch.stack([a, b], dim=1):
            theta, state = server, rule.init(server)
            for t in range(3):
                theta, state, _ = rule.step(theta, state, make_oracle(loss, x, server, t))
            rows.append(theta)
        server = tree.mean(tree.stack(rows), torch.ones(4, dtype=torch.float64))
        path.append(server["x"].item())
    assert path == pytest.approx(expected, abs=1e-9, rel=0)


# ------------------------------------------------------------------------------------------- composition


@dataclass(frozen=True)
class Twice:
    """A rule that asks for two gradients a step, as sharpness-aware ones do."""

    lr: float = 0.1

    def init(self, theta: Tree) -> State:
        return {}

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        gradient, loss = oracle.grad(theta)
        gradient, _ = oracle.grad(tree.axpy(-self.lr, gradient, theta))
        return tree.axpy(-self.lr, gradient, theta), state, told(loss, gradients=2)


def test_prox_regularises_every_gradient_that_is_asked_for() -> None:
    loss, rows, data = make_rows("mlp")
    theta, anchor, x = tree.take(rows, 0), tree.take(rows, 1), data[0, 0]

    def regularised(theta: Tree, x: Tensor) -> Tensor:
        gap = tree.sub(theta, anchor)
        return loss(theta, x) + 0.2 * tree.dot(gap, gap)

    after, _, said = Prox(Twice(), mu=0.4).step(theta, {}, make_oracle(loss, x, anchor))
    expected, _, _ = Twice().step(theta, {}, make_oracle(regularised, x, anchor))
    assert_close(after, expected)
    assert said.gradients.item() == 2
    assert_close(said.loss, loss(theta, x))


# ----------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SGD(lr=0.0), r"SGD: lr = 0\.0 must be > 0"),
        (lambda: SGD(lr=float("nan")), "SGD: lr = nan must be > 0"),
        (lambda: SGD(momentum=1.0), r"SGD: momentum = 1\.0 must be in \[0, 1\)"),
        (lambda: SGD(weight_decay=-0.1), r"SGD: weight_decay = -0\.1 must be >= 0"),
        (lambda: SGD(nesterov=True), "SGD: nesterov = True needs momentum > 0"),
        (lambda: AdamW(lr=-1.0), r"AdamW: lr = -1\.0 must be > 0"),
        (lambda: AdamW(beta1=1.0), r"AdamW: beta1 = 1\.0 must be in \[0, 1\)"),
        (lambda: AdamW(beta2=-0.5), r"AdamW: beta2 = -0\.5 must be in \[0, 1\)"),
        (lambda: AdamW(eps=0.0), r"AdamW: eps = 0\.0 must be > 0"),
        (lambda: AdamW(weight_decay=-1.0), r"AdamW: weight_decay = -1\.0 must be >= 0"),
        (lambda: SAM(rho=-0.1), r"SAM: rho = -0\.1 must be >= 0"),
        (lambda: SAM(asam_eta=-1.0), r"SAM: asam_eta = -1\.0 must be >= 0"),
        (lambda: Guided(alpha=0.0), r"Guided: alpha = 0\.0 must be > 0"),
        (lambda: Guided(alpha=2.0), r"Guided: alpha = 2\.0 must be in \(0, 1\]"),
        (lambda: Guided(AdaptiveSGD()), r"Guided: inner = AdaptiveSGD\(.*\) has no learning rate lr"),
        (lambda: AdaptiveSGD(eta0=0.0), r"AdaptiveSGD: eta0 = 0\.0 must be > 0"),
        (lambda: AdaptiveSGD(eta0=math.inf), "AdaptiveSGD: eta0 = inf must be finite"),
        (lambda: AdaptiveSGD(growth=-1.0), r"AdaptiveSGD: growth = -1\.0 must be >= 0"),
        (lambda: AdaptiveSGD(preset="sam"), "AdaptiveSGD: preset = 'sam' must be one of 'safe', .*"),
        (
            lambda: SASAM(preset="delta_released"),
            "SASAM: preset = 'delta_released' must be one of 'safe', .*",
        ),
        (lambda: SASAM(damping=0.0), r"SASAM: damping = 0\.0 must be > 0"),
        (
            lambda: SASAM(**dict[str, Any](first="last")),
            "SASAM: first = 'last' must be one of 'eta0', 'grow'",
        ),
        (
            lambda: WarmupCosine(Prox(AdaptiveSGD())),
            r"WarmupCosine: inner = .* must have a learning rate of its own; AdaptiveSGD adapts its step, .*",
        ),
        (lambda: StepDecay(SASAM()), r"StepDecay: inner = .* of its own; SASAM adapts its step, .*"),
        (lambda: Prox(mu=-0.1), r"Prox: mu = -0\.1 must be >= 0"),
        (lambda: Clipped(norm=0.0), r"Clipped: norm = 0\.0 must be > 0"),
        (lambda: StepDecay(at=()), r"StepDecay: at = \(\) must be ascending numbers of steps >= 1"),
        (lambda: StepDecay(at=(5, 5)), r"StepDecay: at = \(5, 5\) must be ascending numbers of steps >= 1"),
        (lambda: StepDecay(at=(0,)), r"StepDecay: at = \(0,\) must be ascending numbers of steps >= 1"),
        (lambda: StepDecay(factor=0.0), r"StepDecay: factor = 0\.0 must be > 0"),
        (lambda: StepDecay(factor=1.5), r"StepDecay: factor = 1\.5 must be in \(0, 1\]"),
        (lambda: WarmupCosine(warmup=-1), r"WarmupCosine: warmup = -1 must be >= 0"),
        (lambda: WarmupCosine(floor=1.5), r"WarmupCosine: floor = 1\.5 must be in \[0, 1\]"),
        (
            lambda: WarmupCosine(warmup=5, total=5),
            "WarmupCosine: total = 5 must be > warmup = 5, the steps of the whole run",
        ),
    ],
)
def test_bad_arguments_are_one_line(make: Callable[[], LocalRule], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        make()


# ------------------------------------------------------------------------------------ schedules and rounds


@pytest.mark.parametrize("plan", ["stacked", "vmap", "loop"])
def test_a_schedule_over_two_rounds_is_that_of_one_round_of_all_steps(plan: str) -> None:
    def model(rounds: int, steps: int) -> Tree:
        experiment = quadratics(
            data="Quadratics(a=(0.5,), b=(2.0,), rows=(1,))", num_workers=1, rounds=rounds, local_steps=steps,
            client="WarmupCosine(Clipped(AdamW(lr=0.2), norm=0.5), warmup=2, total=6)", plan=plan,
            strategy="DiLoCo(lr=1.0, momentum=0.0)",
        )  # fmt: skip
        *_, (last, _) = fedsim.rounds(experiment)
        return last.model

    with registered():
        assert_close(model(2, 3), model(1, 6))
