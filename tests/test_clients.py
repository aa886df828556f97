"""Laws, references and golden vectors of the local rules: one table, a newcomer adds a row to `TABLE`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from clients import SGD, AdamW, LocalRule, Nesterov, Oracle, Prox, State, Told, told
from fedsim import tree
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

    u = torch.tensor(0.25 + 0.05 * t, dtype=torch.float64)
    return Oracle(grad, anchor, {"model": anchor}, torch.tensor(t), u)


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
    assert eval(repr(rule)) == rule


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


@every_rule
def test_a_step_tells_the_loss_before_it_and_one_gradient(rule: LocalRule) -> None:
    loss, rows, data = make_rows("mlp")
    theta = tree.take(rows, 0)
    _, _, said = rule.step(theta, rule.init(theta), make_oracle(loss, data[0, 0], tree.take(rows, 1)))
    assert_close(said.loss, loss(theta, data[0, 0]))
    assert said.gradients.item() == 1
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
        (lambda: Prox(mu=-0.1), r"Prox: mu = -0\.1 must be >= 0"),
    ],
)
def test_bad_arguments_are_one_line(make: Callable[[], LocalRule], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        make()
