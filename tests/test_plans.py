"""The engine's plans give equal results, layers with a worker axis equal the layers, written gradients equal autograd."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import fedsim
from clients import SGD, AdamW, Clipped, LocalRule, Oracle, Prox, State, Told, WarmupCosine, told
from fedsim import random, threads, tree
from fedsim.batches import Sampler, Sampling
from fedsim.cohort import Cohort
from fedsim.data import Dataset, Shards
from fedsim.federation import assemble
from fedsim.layers import Residual
from fedsim.models import MLP, Linear, ModelSpec, ResNet20, SmallCNN, Transformer, initialise
from fedsim.objectives import CrossEntropy, Exponential, Logistic, Objective, SquaredError
from fedsim.plans import PLANS, Done, Stacked, Work
from fedsim.stacked import _LAYERS, Chain, Unsupported, laid_out, stack_module, weighted_loss
from fedsim.tree import Stack, Tree

F64 = torch.float64
CPU = torch.device("cpu")
SIZES = [5, 3, 9, 4]
W = len(SIZES)


# ------------------------------------------------------------------------------- rules of our own


@dataclass(frozen=True)
class TwoGradients:
    """Step along the gradient at a point uphill, ``g(theta + rho g / |g|)``, and count both gradients."""

    lr: float = 0.1
    rho: float = 0.2

    def init(self, theta: Tree) -> State:
        """Remember the last norm, and how often the gradient was computed."""
        zero = next(iter(theta.values())).new_zeros(())
        return {"last": {"norm": zero, "point": tree.clone(theta)}, "calls": torch.zeros(())}

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Make one step."""
        gradient, loss = oracle.grad(theta)
        norm = tree.norm(gradient)
        point = tree.axpy(self.rho / (norm + 1e-3), gradient, theta)
        uphill, _ = oracle.grad(point)
        kept = {"last": {"norm": norm, "point": point}, "calls": state["calls"] + 2}
        return tree.axpy(-self.lr, uphill, theta), kept, told(loss, 2)


@dataclass(frozen=True)
class AtTheServer:
    """Ask for gradients at the server's model, at the anchor and at a scaled point, and use the step's index."""

    def init(self, theta: Tree) -> State:
        """Remember nothing."""
        return {}

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Make one step."""
        server, loss = oracle.grad(oracle.broadcast["model"])
        anchor, _ = oracle.grad(oracle.anchor)
        scaled, _ = oracle.grad(tree.scale(0.5, theta))
        direction = tree.add(tree.sub(scaled, anchor), server)
        lr = 0.1 / (1 + oracle.step)
        return tree.axpy(-lr, direction, theta), state, told(loss, 3)


@dataclass(frozen=True)
class Coin:
    """Move towards the server with probability p, else along the gradient."""

    p: float = 0.5

    def init(self, theta: Tree) -> State:
        """Count the coins."""
        return {"heads": next(iter(theta.values())).new_zeros(())}

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Make one step."""
        gradient, loss = oracle.grad(theta)
        heads = oracle.u < self.p
        pulled = tree.lerp(theta, oracle.broadcast["model"], 0.3)
        new = tree.where(heads, pulled, tree.axpy(-0.1, gradient, theta))
        return new, {"heads": state["heads"] + heads}, Told(loss, 1 - heads.to(loss))


@dataclass(frozen=True)
class Restart:
    """Go to the server's model, without a gradient at all."""

    def init(self, theta: Tree) -> State:
        """Remember nothing."""
        return {}

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Make one step."""
        return oracle.broadcast["model"], state, told(oracle.u.new_zeros(()), 0)


# ----------------------------------------------------------------------------- models of our own


@dataclass(frozen=True)
class Built:
    """A module as it is, with a name for the table."""

    make: Callable[[], nn.Module]

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        """Make the module."""
        return self.make()


class Scale(nn.Module):
    """A factor that is one number, and a parameter that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return self.factor * x


def _tokens() -> nn.Module:
    body = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.SiLU())
    return nn.Sequential(nn.Embedding(5, 4), Residual(body, nn.Identity()), nn.Linear(4, 5))


def _reused_activation() -> nn.Module:
    act = nn.ReLU()
    return nn.Sequential(nn.Flatten(), nn.Linear(3, 4), act, nn.Linear(4, 4), act, nn.Linear(4, 2))


def _tied() -> nn.Module:
    linear = nn.Linear(3, 3)
    return nn.Sequential(nn.Flatten(), linear, nn.Tanh(), linear, nn.Tanh(), nn.Linear(3, 2))


def _named() -> nn.Module:
    return nn.Sequential(OrderedDict(first=nn.Linear(3, 4), act=nn.Tanh(), last=nn.Linear(4, 2)))


EPOCHS = Sampling(batch_size=2, local_steps=0, local_epochs=2, replacement=False, seed=1)
STEPS = Sampling(batch_size=2, local_steps=5, local_epochs=0, replacement=False, seed=1)  # masks, even steps
DRAWN = Sampling(batch_size=3, local_steps=3, local_epochs=0, replacement=True, seed=1)
ONE = Sampling(batch_size=3, local_steps=1, local_epochs=0, replacement=True, seed=1)
FULL = Sampling(batch_size=0, local_steps=3, local_epochs=0, replacement=False, seed=1)
MANY = Sampling(batch_size=0, local_steps=8, local_epochs=0, replacement=False, seed=1)

# name: model, objective, rule, sampling, shape of a sample, outputs, task
TABLE: dict[str, tuple[ModelSpec, Objective, LocalRule, Sampling, tuple[int, ...], int, str]] = {
    "relu, descent in place": (MLP((5, 4)), CrossEntropy(), SGD(0.3), EPOCHS, (3,), 2, "classes"),
    "tanh, descent in place": (MLP((5,), "tanh"), SquaredError(), SGD(0.1), FULL, (3,), 2, "classes"),
    "linear, logistic": (Linear(bias=False), Logistic(), SGD(0.5), STEPS, (2, 2), 1, "binary"),
    "linear, exponential": (Linear(), Exponential(), SGD(0.1), DRAWN, (3,), 1, "binary"),
    "span of the rows, logistic": (Linear(), Logistic(), SGD(0.3), MANY, (2, 6), 1, "binary"),
    "span of the rows, exponential": (Linear(bias=False), Exponential(), SGD(0.02), MANY, (12,), 1, "binary"),
    "one step": (MLP((3,), "identity"), CrossEntropy(), SGD(0.5), ONE, (3,), 2, "classes"),
    "momentum": (MLP((4,)), SquaredError(half=True), SGD(0.1, 0.9), EPOCHS, (3,), 1, "regression"),
    "nesterov, prox": (
        MLP((4,), "tanh"), CrossEntropy(), Prox(SGD(0.1, 0.8, True, 0.1), 0.3), STEPS, (3,), 2, "classes",
    ),
    "adamw": (MLP((4,)), CrossEntropy(0.1), AdamW(0.05), EPOCHS, (3,), 3, "classes"),
    "autograd": (MLP((4,), "gelu"), CrossEntropy(), SGD(0.3), EPOCHS, (3,), 2, "classes"),
    "autograd, full batch": (MLP((4,), "silu"), CrossEntropy(), AdamW(0.1), FULL, (3,), 2, "classes"),
    "convolutions": (SmallCNN((2,)), CrossEntropy(), SGD(0.2), STEPS, (1, 4, 4), 2, "classes"),
    "residual, group norm": (ResNet20(1, 1), CrossEntropy(), SGD(0.1), ONE, (1, 4, 4), 2, "classes"),
    "tokens": (Built(_tokens), CrossEntropy(tokens=True), AdamW(0.1), EPOCHS, (3,), 5, "tokens"),
    "transformer": (
        Transformer(1, 4, 2, 1), CrossEntropy(tokens=True), SGD(0.2), EPOCHS, (3,), 5, "tokens",
    ),
    # Not AdamW: the bias of keys has gradient 0, of which only the rounding would be normalised.
    "transformer, untied": (
        Transformer(2, 4, 2, 1, tied=False), CrossEntropy(tokens=True), SGD(0.2, 0.9), STEPS, (3,), 5, "tokens",
    ),
    "one activation, used twice": (
        Built(_reused_activation), CrossEntropy(), SGD(0.3), EPOCHS, (3,), 2, "classes",
    ),
    "one layer, used twice": (Built(_tied), CrossEntropy(), SGD(0.3), EPOCHS, (3,), 2, "classes"),
    "names": (Built(_named), CrossEntropy(), SGD(0.3), EPOCHS, (3,), 2, "classes"),
    "unused parameter": (
        Built(lambda: nn.Sequential(nn.Linear(3, 2), Scale())), CrossEntropy(), SGD(0.3), EPOCHS, (3,), 2,
        "classes",
    ),
    "two gradients": (MLP((4,)), CrossEntropy(), TwoGradients(), EPOCHS, (3,), 2, "classes"),
    "two gradients, autograd": (MLP((4,), "gelu"), CrossEntropy(), TwoGradients(), STEPS, (3,), 2, "classes"),
    "warm-up, clipped": (
        MLP((4,)), CrossEntropy(), WarmupCosine(Clipped(SGD(0.3), 0.2), 2, 9), EPOCHS, (3,), 2, "classes",
    ),
    "points that are not batched": (MLP((4,)), CrossEntropy(), AtTheServer(), EPOCHS, (3,), 2, "classes"),
    "coins": (MLP((4,), "tanh"), CrossEntropy(), Coin(), EPOCHS, (3,), 2, "classes"),
    "rows that are not batched": (MLP((4,)), CrossEntropy(), Restart(), STEPS, (3,), 2, "classes"),
}  # fmt: skip
NOT_STACKED = {"one layer, used twice", "unused parameter"}


def _data(shape: tuple[int, ...], outputs: int, task: str) -> tuple[Tensor, Tensor]:
    n, generator = sum(SIZES), torch.Generator().manual_seed(2)
    if task == "tokens":
        text = torch.randint(outputs, (n, shape[0] + 1), generator=generator)
        return text[:, :-1], text[:, 1:]
    x = torch.randn(n, *shape, dtype=F64, generator=generator)
    if task == "regression":
        return x, torch.randn(n, dtype=F64, generator=generator)
    return x, torch.randint(max(2, outputs), (n,), generator=generator)


def _work(
    spec: ModelSpec, rule: LocalRule, how: Sampling, shape: tuple[int, ...], outputs: int, task: str
) -> tuple[nn.Module, Work]:
    x, y = _data(shape, outputs, task)
    made = [initialise(spec, shape, outputs, seed, F64) for seed in range(W + 1)]
    shards = Shards(
        torch.randperm(len(x), generator=torch.Generator().manual_seed(4)),
        torch.tensor([0, *SIZES]).cumsum(0),
    )
    batches = Sampler(shards, how, CPU).draw(1, torch.arange(W))
    anchor = tree.take(tree.stack([theta for _, theta in made[:W]]), batches.order)
    state = vmap(rule.init)(anchor)
    server = {"model": made[W][1]}
    return made[0][0], Work(anchor, state, server, x, y, batches, batches.order, random.key(1, "steps", 1))


def _leaves(done: Done) -> Tree:
    return tree.flatten_nested({
        "rows": done.rows,
        "state": done.state,
        "loss": done.loss,
        "gradients": done.gradients,
    })


def _assert_equal(found: Tree, expected: Tree, tolerance: float = 1e-10) -> None:
    assert sorted(found) == sorted(expected)
    for name, x in expected.items():
        torch.testing.assert_close(
            found[name], x, rtol=tolerance, atol=tolerance, check_dtype=False, msg=name
        )


@pytest.fixture
def crew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let three threads share the workers of any work, however small it is."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(threads, "SHARE", 1.0)


@pytest.mark.parametrize("plan", ["stacked", "vmap"])
@pytest.mark.parametrize("name", list(TABLE))
def test_plans_are_equal(name: str, plan: str) -> None:
    spec, objective, rule, how, shape, outputs, task = TABLE[name]
    module, work = _work(spec, rule, how, shape, outputs, task)
    if plan == "stacked" and name in NOT_STACKED:
        with pytest.raises(Unsupported):
            PLANS[plan](module, objective, rule, F64)
        return
    before = tree.flatten_nested({"a": work.anchor, "s": work.state, "b": work.broadcast["model"]})
    copy = tree.clone(before)
    expected = PLANS["loop"](module, objective, rule, F64).run(work)
    engine = PLANS[plan](module, objective, rule, F64)
    for _ in range(2):  # a plan may keep what it has gathered, but nothing else
        done = engine.run(work)
        _assert_equal(_leaves(done), _leaves(expected))
        assert all(x.is_contiguous() for x in _leaves(done).values())
    _assert_equal(before, copy, 0)
    assert bool((expected.loss > 0).all()) == (not isinstance(rule, Restart))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("name", ["two gradients", "adamw"])
def test_the_compiled_plan_is_equal(name: str) -> None:
    spec, objective, rule, how, shape, outputs, task = TABLE[name]
    module, work = _work(spec, rule, how, shape, outputs, task)
    expected = PLANS["loop"](module, objective, rule, F64).run(work)
    _assert_equal(_leaves(PLANS["compiled"](module, objective, rule, F64).run(work)), _leaves(expected))


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("name", [name for name in TABLE if name not in NOT_STACKED])
def test_threads_that_share_the_workers_change_nothing(
    name: str, record: bool, request: pytest.FixtureRequest
) -> None:
    spec, objective, rule, how, shape, outputs, task = TABLE[name]
    module, work = _work(spec, rule, how, shape, outputs, task)
    times = torch.arange(W, dtype=F64)

    def follow(t: int, rows: Stack, at: slice, in_place: bool) -> Stack:
        new = {k: x * (1 - 0.01 * t * times[at].view(-1, *(1,) * (x.ndim - 1))) for k, x in rows.items()}
        return tree.tree_map(Tensor.copy_, rows, new) if in_place else new

    work = work._replace(record=record, follow=follow if record else None)
    whole = Stacked(module, objective, rule, F64)
    expected = whole.run(work)
    request.getfixturevalue("crew")
    engine = Stacked(module, objective, rule, F64)
    for _ in range(2):
        done = engine.run(work)
        _assert_equal(_leaves(done), _leaves(expected), 1e-12)
        for found, known in ((done.losses, expected.losses), (done.idle, expected.idle)):
            assert (found is None) == (known is None)
            torch.testing.assert_close(found, known, rtol=1e-12, atol=1e-12)
    assert (engine.crew is None) == (
        how is MANY and not record
    )  # steps within the span of the rows are one call
    assert whole.crew is None


def test_threads_that_share_the_workers_take_new_rows_in_each_round(crew: None) -> None:
    spec, objective, rule, how, shape, outputs, task = TABLE["autograd, full batch"]
    module, work = _work(spec, rule, how, shape, outputs, task)
    engine = Stacked(module, objective, rule, F64)
    engine.run(work)
    other = work._replace(batches=work.batches._replace(rows=work.batches.rows.flip(-1).contiguous()))
    expected = PLANS["loop"](module, objective, rule, F64).run(other)
    _assert_equal(_leaves(engine.run(other)), _leaves(expected))


def test_threads_of_the_loop_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, objective, rule, how, shape, outputs, task = TABLE["adamw"]
    module, work = _work(spec, rule, how, shape, outputs, task)
    found = []
    for n in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n: n)
        found.append(_leaves(PLANS["loop"](module, objective, rule, F64).run(work)))
    _assert_equal(found[1], found[0], 0)


def test_the_loop_is_what_it_says() -> None:
    """Plain gradient descent of one worker, written down."""
    module, work = _work(MLP((4,)), SGD(0.3), FULL, (3,), 2, "classes")
    done = PLANS["loop"](module, CrossEntropy(), SGD(0.3), F64).run(work)
    for i in range(W):
        rows = work.batches.rows[i, 0, : SIZES[int(work.worker[i])]]
        theta, losses = tree.take(work.anchor, i), []

        def loss(theta: Tree, rows: Tensor = rows) -> Tensor:
            output = functional_call(module, theta, (work.x[rows],))
            return nn.functional.cross_entropy(output, work.y[rows])

        for _ in range(3):
            losses.append(loss(theta))
            theta = tree.axpy(-0.3, grad(loss)(theta), theta)
        _assert_equal(tree.take(done.rows, i), theta, 1e-13)
        torch.testing.assert_close(done.loss[i], torch.stack(losses).sum())


@pytest.mark.parametrize("how", [FULL, MANY, STEPS, DRAWN], ids=["full", "many full", "shuffled", "drawn"])
@pytest.mark.parametrize("rule", [SGD(0.1), AdamW(0.1)], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["", "crew"])
def test_plans_are_equal_for_workers_with_unequal_steps(
    shared: bool, rule: LocalRule, how: Sampling, request: pytest.FixtureRequest
) -> None:
    module, work = _work(Linear(), rule, how, (12,), 1, "binary")
    shards = Shards(torch.arange(len(work.x)), torch.tensor([0, *SIZES]).cumsum(0))
    batches = Sampler(shards, how, CPU).draw(1, torch.arange(W), torch.tensor([2, 8, 1, 8]))
    work = work._replace(batches=batches, worker=batches.order)
    expected = _leaves(PLANS["loop"](module, Logistic(), rule, F64).run(work))
    if shared:
        request.getfixturevalue("crew")
    for plan in ("stacked", "vmap"):
        _assert_equal(_leaves(PLANS[plan](module, Logistic(), rule, F64).run(work)), expected)


def test_features_are_gathered_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, objective, rule, how, shape, outputs, task = TABLE["momentum"]
    module, work = _work(spec, rule, how, shape, outputs, task)
    whole = _leaves(PLANS["stacked"](module, objective, rule, F64).run(work))
    for block in (1, 500):
        monkeypatch.setattr("fedsim.plans.BLOCK", block)
        _assert_equal(_leaves(PLANS["stacked"](module, objective, rule, F64).run(work)), whole, 0)


@pytest.mark.parametrize("bias", [False, True])
def test_the_span_of_the_rows_is_remembered_and_worked_in_blocks(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, work = _work(Linear(bias=bias), SGD(0.1), MANY, (12,), 1, "binary")
    engine = Stacked(module, Logistic(), SGD(0.1), F64)
    whole = _leaves(engine.run(work))
    assert engine.span is not None
    known = engine.span._known
    assert known is not None
    for block in (1, 3 * 8 * W * max(SIZES)):
        monkeypatch.setattr("fedsim.span.BLOCK", block)
        _assert_equal(_leaves(engine.run(work)), whole, 1e-14)
        assert engine.span._known is known
    other = work._replace(batches=work.batches._replace(rows=work.batches.rows.flip(0)))
    _assert_equal(
        _leaves(engine.run(other)), _leaves(Stacked(module, Logistic(), SGD(0.1), F64).run(other)), 0
    )


def test_the_uniform_number_is_that_of_worker_and_step() -> None:
    class Tell:
        def init(self, theta: Tree) -> State:
            return {"sum": next(iter(theta.values())).new_zeros(())}

        def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
            return theta, {"sum": state["sum"] + oracle.u * (oracle.step + 1)}, told(oracle.u, 0)

    module, work = _work(Linear(), Tell(), DRAWN, (3,), 2, "classes")
    u = random.uniform(work.stream, torch.arange(3)[:, None], work.worker)
    expected = (u * torch.arange(1, 4)[:, None]).sum(0)
    for plan in ("stacked", "vmap", "loop"):
        done = PLANS[plan](module, CrossEntropy(), Tell(), F64).run(work)
        torch.testing.assert_close(done.state["sum"], expected)


# -------------------------------------------------------------------- layers with a worker axis

LAYERS: dict[type, list[tuple[Callable[[], nn.Module], tuple[int, ...]]]] = {
    nn.Linear: [
        (lambda: nn.Linear(3, 4), (3,)),
        (lambda: nn.Linear(3, 4, bias=False), (3,)),
        (lambda: nn.Linear(3, 2), (5, 3)),
        (lambda: nn.Linear(3, 2, bias=False), (2, 5, 3)),
    ],
    nn.Conv2d: [
        (lambda: nn.Conv2d(2, 4, 3), (2, 5, 6)),
        (lambda: nn.Conv2d(2, 4, (3, 1), stride=2, padding=(1, 0), bias=False), (2, 5, 6)),
        (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding="same"), (4, 6, 5)),
    ],
    nn.GroupNorm: [
        (lambda: nn.GroupNorm(2, 4), (4, 3, 2)),
        (lambda: nn.GroupNorm(2, 4, affine=False), (4, 3, 2)),
        (lambda: nn.GroupNorm(2, 4), (4,)),
        (lambda: nn.GroupNorm(1, 4, eps=0.1), (4, 5)),
    ],
    nn.LayerNorm: [
        (lambda: nn.LayerNorm(3), (5, 3)),
        (lambda: nn.LayerNorm(3, bias=False), (3,)),
        (lambda: nn.LayerNorm([5, 3], eps=0.1), (2, 5, 3)),
        (lambda: nn.LayerNorm(3, elementwise_affine=False), (5, 3)),
    ],
    nn.Embedding: [(lambda: nn.Embedding(7, 3), (4,)), (lambda: nn.Embedding(7, 3), (4, 2))],
    nn.Flatten: [(lambda: nn.Flatten(), (2, 3, 4)), (lambda: nn.Flatten(), (2,))],
    nn.MaxPool2d: [(lambda: nn.MaxPool2d(2), (2, 5, 4))],
    nn.AvgPool2d: [(lambda: nn.AvgPool2d(3, 1, 1), (2, 5, 4))],
    nn.AdaptiveAvgPool2d: [(lambda: nn.AdaptiveAvgPool2d(2), (2, 5, 4))],
    nn.ReLU: [(nn.ReLU, (3,))],
    nn.Tanh: [(nn.Tanh, (3, 2))],
    nn.GELU: [(nn.GELU, (3,)), (lambda: nn.GELU("tanh"), (3,))],
    nn.SiLU: [(nn.SiLU, (3,))],
    nn.Sigmoid: [(nn.Sigmoid, (3,))],
    nn.Identity: [(nn.Identity, (3,))],
    Residual: [
        (lambda: Residual(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Tanh())), (3,)),
        (lambda: Residual(Residual(nn.Linear(3, 3), nn.Identity()), nn.Identity()), (3,)),
    ],
}
MADE = [(make, shape) for cases in LAYERS.values() for make, shape in cases]


def _random_rows(module: nn.Module, generator: torch.Generator) -> Stack:
    return {k: torch.randn(W, *p.shape, dtype=F64, generator=generator) for k, p in module.named_parameters()}


def test_every_layer_of_the_table_is_tested() -> None:
    assert set(LAYERS) == {*_LAYERS, Residual}


@pytest.mark.parametrize(("make", "shape"), MADE, ids=[f"{make()}"[:40] for make, _ in MADE])
def test_a_layer_with_a_worker_axis_is_the_layer(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    generator, module = torch.Generator().manual_seed(0), make().double()
    rows = _random_rows(module, generator)
    if isinstance(module, nn.Embedding):
        x = torch.randint(7, (W, 3, *shape), generator=generator)
    else:
        x = torch.randn(W, 3, *shape, dtype=F64, generator=generator)
    leaves = {k: p.clone().requires_grad_() for k, p in rows.items()}
    found = stack_module(module)(leaves, x)
    expected = torch.stack([functional_call(module, tree.take(leaves, i), (x[i],)) for i in range(W)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if leaves:
        weight = torch.randn(found.shape, dtype=F64, generator=generator)
        pair = [torch.autograd.grad((out * weight).sum(), list(leaves.values())) for out in (found, expected)]
        for a, b in zip(*pair, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


class Doubled(nn.Sequential):
    """A chain with a forward pass of its own."""

    def forward(self, input: Tensor) -> Tensor:
        """Run the chain and double."""
        return 2 * super().forward(input)


class Skipped(Residual):
    """A sum of branches with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Subtract instead."""
        return self.body(x) - self.shortcut(x)


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (nn.Softmax(-1), "model: Softmax"),
        (nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Bilinear(1, 2, 3))), "1.0: Bilinear"),
        (Residual(nn.Linear(3, 3), nn.PReLU()), "shortcut: PReLU"),
        (nn.Sequential(nn.Flatten(2)), "0: Flatten of some axes only"),
        (nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")), "0: Conv2d with padding mode"),
        (nn.Sequential(nn.Embedding(3, 2, padding_idx=0)), "0: Embedding with"),
        (nn.Sequential(nn.Embedding(3, 2, scale_grad_by_freq=True)), "0: Embedding with"),
        (Doubled(nn.Linear(3, 3)), "model: Doubled"),
        (Skipped(nn.Linear(3, 3), nn.Identity()), "model: Skipped"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))), "0: ParametrizedLinear"),
        (_tied(), "3: shares parameters with another layer"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_layers_without_a_worker_axis_are_refused_by_name(module: nn.Module, says: str) -> None:
    with pytest.raises(Unsupported, match=says):
        stack_module(module)


def test_a_model_without_a_stacked_form_under_the_stacked_plan_is_bad_input() -> None:
    x, _ = _data((3,), 5, "tokens")
    dataset = Dataset(x, x[:, 0], x[:0], x[:0, 0], 5, "classes", "toy")
    experiment = fedsim.Experiment(
        model="TextClassifier(vocabulary=5, layers=1, width=4, heads=2)",
        plan="stacked", num_workers=W, device="cpu",
    )  # fmt: skip
    shards = Shards(torch.arange(len(x)), torch.tensor([0, *SIZES]).cumsum(0))
    federation = assemble(experiment, dataset, shards)
    with pytest.raises(
        fedsim.BadInput, match=r"plan = 'stacked': model = 'TextClassifier.*use 'vmap', 'loop'"
    ) as error:
        Cohort(experiment, federation, 0, W)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------- chains, written backward passes

CHAINS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: MLP((5, 4)).build((2, 3), 2),
    "tanh": lambda: MLP((5, 4), "tanh").build((6,), 2),
    "deep linear": lambda: MLP((5, 4), "identity").build((6,), 2),
    "without bias": lambda: nn.Sequential(
        nn.Identity(), nn.Linear(6, 4, bias=False), nn.Identity(), nn.Tanh(), nn.Linear(4, 2, bias=False)
    ),
    "linear": lambda: nn.Sequential(nn.Linear(6, 2)),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("make", CHAINS.values(), ids=list(CHAINS))
def test_the_written_gradient_is_autograds(make: Callable[[], nn.Module], weighted: bool) -> None:
    generator, module = torch.Generator().manual_seed(0), make().double()
    rows = _random_rows(module, generator)
    x = torch.randn(W, 3, *((2, 3) if "2, 3" in str(module) else (6,)), dtype=F64, generator=generator)
    y = torch.randint(2, (W, 3), generator=generator)
    weight = torch.rand(W, 3, dtype=F64, generator=generator) if weighted else None
    chain, objective = Chain(module), CrossEntropy()

    def loss(theta: Tree, x: Tensor, y: Tensor, p: Tensor) -> Tensor:
        return (objective.loss(functional_call(module, theta, (x,)), y) * p).sum()

    p = torch.full((W, 3), 1 / 3, dtype=F64) if weight is None else weight
    expected = vmap(grad(loss))(rows, x, y, p)
    output, inputs = chain.forward(rows, x)
    value = weighted_loss(objective, output, y, weight)
    torch.testing.assert_close(value, vmap(loss)(rows, x, y, p))
    delta = objective.loss_and_residual(output, y)[1] * p[..., None]
    _assert_equal(chain.gradient(rows, inputs, delta), expected, 1e-12)
    moved = tree.clone(rows)
    chain.descend(moved, inputs, delta, 0.7)
    _assert_equal(moved, tree.axpy(-0.7, expected, rows), 1e-12)


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (nn.Linear(2, 2), "not a plain chain"),
        (nn.Sequential(nn.Sequential(nn.Linear(2, 2))), "0: Sequential"),
        (Doubled(nn.Linear(2, 2)), "not a plain chain"),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "does not end with a Linear"),
        (nn.Sequential(nn.Flatten()), "does not end with a Linear"),
        (nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), "0: ReLU"),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Tanh(), nn.Linear(2, 2)), "2: Tanh"),
        (nn.Sequential(nn.Linear(2, 2), nn.Flatten(), nn.Linear(2, 2)), "1: Flatten"),
        (nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2)), "1: GELU"),
        (_tied(), "shares parameters"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_other_modules_are_no_chains(module: nn.Module, says: str) -> None:
    with pytest.raises(Unsupported, match=says):
        Chain(module)


def test_only_plain_gradient_descent_goes_in_place() -> None:
    """The rule is asked itself as soon as it could do anything else."""

    class Slower(SGD):
        def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
            return SGD(self.lr / 2).step(theta, state, oracle)

    module, work = _work(MLP((4,)), SGD(0.3), EPOCHS, (3,), 2, "classes")
    plain = [
        Stacked(module, CrossEntropy(), rule, F64).plain
        for rule in (SGD(0.3), SGD(0.3, 0.9), SGD(0.3, weight_decay=0.1), Prox(SGD(0.3), 0.0), Slower(0.3))
    ]
    assert plain == [True, False, False, False, False]
    half = Stacked(module, CrossEntropy(), SGD(0.15), F64).run(work)
    _assert_equal(_leaves(Stacked(module, CrossEntropy(), Slower(0.3), F64).run(work)), _leaves(half))


# ------------------------------------------------------------------------------- channels last


class Viewed(nn.Module):
    """A head that asks for a view, which features with their channels last do not have."""

    def forward(self, x: Tensor) -> Tensor:
        """Flatten all but the first axis."""
        return x.view(len(x), -1)


def test_kernels_are_laid_out_with_their_channels_last_and_nothing_else_is() -> None:
    module, theta = initialise(SmallCNN((2, 3)), (1, 4, 4), 2, 0, torch.float32)
    assert isinstance(module, nn.Sequential)
    found = laid_out(module, theta)
    for name, x in theta.items():
        assert torch.equal(found[name], x)
        assert (found[name] is x) == (x.ndim != 4)
    features = functional_call(
        module[:3], {k: found[k] for k in ("0.weight", "0.bias")}, torch.ones(2, 1, 4, 4)
    )
    assert features.is_contiguous(memory_format=torch.channels_last)
    doubles = {k: x.double() for k, x in theta.items()}
    assert all(laid_out(module, doubles)[k] is x for k, x in doubles.items())
    perceptron, rows = initialise(MLP((4,)), (3,), 2, 0, torch.float32)
    assert laid_out(perceptron, rows) is rows


@pytest.mark.parametrize("rule", [SGD(0.2), AdamW(0.01)], ids=str)
def test_a_layout_changes_no_result(rule: LocalRule, monkeypatch: pytest.MonkeyPatch) -> None:
    module, work = _work(SmallCNN((2, 3)), rule, EPOCHS, (1, 8, 8), 2, "classes")
    single = {k: x.float() for k, x in work.anchor.items()}
    state = vmap(rule.init)(single)
    server = {"model": {k: x.float() for k, x in work.broadcast["model"].items()}}
    work = work._replace(anchor=single, state=state, broadcast=server, x=work.x.float())
    loop = PLANS["loop"](module.float(), CrossEntropy(), rule, torch.float32)
    found = _leaves(loop.run(work))
    assert all(x.is_contiguous() for x in found.values())
    monkeypatch.setattr("fedsim.plans.laid_out", lambda module, theta: theta)
    _assert_equal(found, _leaves(loop.run(work)), 1e-5)


def test_layers_that_are_not_known_keep_their_order() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), Viewed(), nn.Linear(32, 2))

    module, work = _work(Built(make), SGD(0.1), STEPS, (1, 4, 4), 2, "classes")
    single = {k: x.float() for k, x in work.anchor.items()}
    work = work._replace(anchor=single, x=work.x.float())
    assert laid_out(module, single) is single
    done = PLANS["loop"](module.float(), CrossEntropy(), SGD(0.1), torch.float32).run(work)
    assert bool(torch.isfinite(done.loss).all())
