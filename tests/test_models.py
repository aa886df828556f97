"""Models: parameter counts, functional use by many workers at once, initial values, causality, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedsim import tree
from fedsim.layers import CausalSelfAttention, Residual
from fedsim.models import (
    CNN7,
    MLP,
    Linear,
    ModelSpec,
    ResNet20,
    SmallCNN,
    Transformer,
    check_functional,
    check_output,
    initialise,
)
from fedsim.tree import Tree

F64 = torch.float64
W, B = 2, 3

CASES: list[tuple[ModelSpec, tuple[int, ...], int]] = [
    (Linear(), (2, 3), 4),
    (Linear(bias=False), (5,), 1),
    (MLP(hidden=(4, 3)), (5,), 2),
    *[(MLP(hidden=(4,), activation=a), (5,), 2) for a in ("tanh", "gelu", "silu", "identity")],
    (SmallCNN(channels=(2, 3)), (1, 5, 4), 3),
    (CNN7(), (1, 24, 24), 2),
    (ResNet20(groups=2, width=4), (2, 8, 8), 3),
    (Transformer(layers=2, width=8, heads=2, mlp=2), (4,), 5),
    (Transformer(layers=1, width=6, heads=3, mlp=1, tied=False), (4,), 5),
]
every = pytest.mark.parametrize(("spec", "shape", "outputs"), CASES, ids=[str(c[0]) for c in CASES])


def _inputs(spec: ModelSpec, shape: tuple[int, ...], outputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if isinstance(spec, Transformer):
        return torch.randint(outputs, (W, B, *shape), generator=generator)
    return torch.randn(W, B, *shape, dtype=F64, generator=generator)


def _workers(spec: ModelSpec, shape: tuple[int, ...], outputs: int) -> tuple[nn.Module, tree.Stack]:
    made = [initialise(spec, shape, outputs, seed, F64) for seed in range(W)]
    return made[0][0], tree.stack([theta for _, theta in made])


def _assert_rows(rows: tree.Stack, expected: list[Tree]) -> None:
    for name, leaf in tree.stack(expected).items():
        torch.testing.assert_close(rows[name], leaf, rtol=1e-10, atol=1e-10)


@every
def test_gradients_of_all_workers_equal_a_loop(spec: ModelSpec, shape: tuple[int, ...], outputs: int) -> None:
    module, rows = _workers(spec, shape, outputs)
    x = _inputs(spec, shape, outputs)

    def loss(theta: Tree, x: Tensor) -> Tensor:
        return functional_call(module, theta, (x,)).logsumexp(-1).square().mean()

    loop = [grad(loss)(tree.take(rows, w), x[w]) for w in range(W)]
    _assert_rows(vmap(grad(loss))(rows, x), loop)
    assert all(leaf.abs().max() > 0 for leaf in loop[0].values())


@every
def test_hessian_vector_products_of_all_workers_equal_a_loop(
    spec: ModelSpec, shape: tuple[int, ...], outputs: int
) -> None:
    module, rows = _workers(spec, shape, outputs)
    x = _inputs(spec, shape, outputs)[:, :1]

    def loss(theta: Tree, x: Tensor) -> Tensor:
        return functional_call(module, theta, (x,)).logsumexp(-1).square().mean()

    def product(theta: Tree, v: Tree, x: Tensor) -> Tree:
        return grad(lambda t: tree.dot(grad(loss)(t, x), v))(theta)

    v = tree.tree_map(torch.cos, rows)
    loop = [product(tree.take(rows, w), tree.take(v, w), x[w]) for w in range(W)]
    _assert_rows(vmap(product)(rows, v, x), loop)
    # a difference quotient of the gradient along v, a step short enough not to cross a kink of ReLU
    theta, direction = tree.take(rows, 0), tree.take(v, 0)
    h = 1e-6 / tree.norm(direction)
    up, down = (grad(loss)(tree.axpy(s * h, direction, theta), x[0]) for s in (1, -1))
    quotient = tree.scale(1 / (2 * h), tree.sub(up, down))
    assert tree.norm(tree.sub(quotient, loop[0])) < 1e-4 * tree.norm(quotient)


@every
def test_output_shape_and_template(spec: ModelSpec, shape: tuple[int, ...], outputs: int) -> None:
    module, theta = initialise(spec, shape, outputs, seed=0, dtype=F64)
    x = _inputs(spec, shape, outputs)[0]
    task = "tokens" if isinstance(spec, Transformer) else "binary" if outputs == 1 else "classes"
    check_output(module, theta, x, outputs, task)
    before = functional_call(module, theta, (x,))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    assert torch.equal(functional_call(module, theta, (x,)), before)


@every
def test_chains_of_standard_layers(spec: ModelSpec, shape: tuple[int, ...], outputs: int) -> None:
    module, _ = initialise(spec, shape, outputs, seed=0)
    chain = module.body if isinstance(spec, Transformer) else module
    assert isinstance(chain, nn.Sequential)
    standard = (nn.Flatten, nn.Linear, nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.Identity, nn.Conv2d)
    standard += (nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.GroupNorm, nn.LayerNorm, nn.Sequential)
    for layer in chain.modules():
        assert isinstance(layer, (*standard, Residual, CausalSelfAttention))


def _transformer_size(spec: Transformer, t: int, v: int) -> int:
    d, m = spec.width, spec.mlp
    block = 2 * 2 * d + (4 * d * d + 4 * d) + (2 * m * d * d + m * d + d)
    return v * d * (1 if spec.tied else 2) + t * d + spec.layers * block + 2 * d


@pytest.mark.parametrize(
    ("spec", "shape", "outputs", "size"),
    [
        (Linear(), (64,), 10, 650),
        (Linear(bias=False), (8, 8), 10, 640),
        (MLP(hidden=(200,)), (64,), 10, 15_010),
        (MLP(hidden=()), (64,), 10, 650),
        (MLP(hidden=(200, 200, 10)), (784,), 10, 784 * 200 + 200 + 200 * 200 + 200 + 2010 + 110),
        (SmallCNN(), (1, 28, 28), 10, 160 + 4640 + 32 * 7 * 7 * 10 + 10),
        (CNN7(), (3, 28, 28), 10, 351_946),
        (CNN7(), (3, 32, 32), 10, 351_946 + (9 - 4) * 64 * 256),
        (ResNet20(), (3, 32, 32), 10, 272_474),
        (Transformer(), (32,), 65, _transformer_size(Transformer(), 32, 65)),
        (Transformer(tied=False), (32,), 65, _transformer_size(Transformer(), 32, 65) + 65 * 64),
    ],
)
def test_parameter_counts(spec: ModelSpec, shape: tuple[int, ...], outputs: int, size: int) -> None:
    assert tree.num_parameters(initialise(spec, shape, outputs, seed=0)[1]) == size


@every
def test_initial_values_depend_on_the_seed_alone(
    spec: ModelSpec, shape: tuple[int, ...], outputs: int
) -> None:
    state = torch.get_rng_state()
    _, first = initialise(spec, shape, outputs, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng(devices=[]):
        torch.rand(7)
        _, again = initialise(spec, shape, outputs, seed=1)
    _, other = initialise(spec, shape, outputs, seed=2)
    _, double = initialise(spec, shape, outputs, seed=1, dtype=F64)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert all(torch.equal(first[k].double(), double[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)
    assert not any(leaf.requires_grad for leaf in first.values())


def test_parameters_are_not_the_template() -> None:
    module, theta = initialise(Linear(), (2,), 1, seed=0)
    theta["1.weight"].zero_()
    assert module.get_parameter("1.weight").abs().max() > 0


def test_zero_init() -> None:
    _, theta = initialise(Linear(zero_init=True), (3,), 2, seed=0)
    assert tree.norm(theta) == 0


def test_linear_closed_form() -> None:
    module, theta = initialise(Linear(), (2, 2), 1, seed=0, dtype=F64)
    x = torch.arange(4, dtype=F64).reshape(1, 2, 2)
    expected = theta["1.weight"][0] @ torch.arange(4, dtype=F64) + theta["1.bias"][0]
    assert functional_call(module, theta, (x,)).item() == pytest.approx(expected.item(), rel=1e-14)


def test_transformer_is_causal() -> None:
    context, vocabulary = 6, 5
    module, theta = initialise(Transformer(width=8, heads=2), (context,), vocabulary, seed=0, dtype=F64)
    tokens = torch.randint(vocabulary, (1, context), generator=torch.Generator().manual_seed(0))
    before = functional_call(module, theta, (tokens,))
    for t in range(context):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % vocabulary
        after = functional_call(module, theta, (changed,))
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-13)
        moved = (after[:, t:] - before[:, t:]).abs().amax(-1)
        assert (moved > 1e-9).all()
    shorter = functional_call(module, theta, (tokens[:, :3],))
    torch.testing.assert_close(shorter, before[:, :3], rtol=0, atol=1e-13)


def test_transformer_takes_a_worker_axis_before_the_batch() -> None:
    module, theta = initialise(Transformer(width=8, heads=2), (4,), 5, seed=0, dtype=F64)
    tokens = torch.randint(5, (W, B, 4), generator=torch.Generator().manual_seed(0))
    loop = torch.stack([functional_call(module, theta, (x,)) for x in tokens])
    torch.testing.assert_close(functional_call(module, theta, (tokens,)), loop, rtol=1e-12, atol=1e-12)


def test_attention_equals_torch() -> None:
    attention = CausalSelfAttention(width=6, heads=2)
    reference = nn.MultiheadAttention(6, 2, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(attention.qkv.weight)
        reference.in_proj_bias.copy_(attention.qkv.bias)
        reference.out_proj.load_state_dict(attention.out.state_dict())
    attention.double()
    reference.double()
    x = torch.randn(B, 5, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=F64)
    expected, _ = reference(x, x, x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(attention(x), expected, rtol=1e-12, atol=1e-12)


def test_tied_embedding_is_one_tensor() -> None:
    vocabulary = 5
    _, tied = initialise(Transformer(width=8, heads=2), (4,), vocabulary, seed=0)
    _, untied = initialise(Transformer(width=8, heads=2, tied=False), (4,), vocabulary, seed=0)
    assert sum(leaf.shape == (vocabulary, 8) for leaf in tied.values()) == 1
    assert set(untied) - set(tied) == {"head.weight"}


def test_transformer_starts_near_the_uniform_loss() -> None:
    module, theta = initialise(Transformer(), (16,), 65, seed=0)
    tokens = torch.randint(65, (4, 17), generator=torch.Generator().manual_seed(0))
    logits = functional_call(module, theta, (tokens[:, :-1],))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(65), abs=0.1)


def test_residual() -> None:
    layer = Residual(nn.Tanh(), nn.Identity())
    x = torch.linspace(-1, 1, 5)
    assert torch.equal(layer(x), x.tanh() + x)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.BatchNorm1d(4), "BatchNorm1d.*GroupNorm"),
        (nn.BatchNorm2d(4, track_running_stats=False), "BatchNorm2d.*GroupNorm"),
        (nn.SyncBatchNorm(4), "SyncBatchNorm.*GroupNorm"),
        (nn.InstanceNorm2d(4, track_running_stats=True), "InstanceNorm2d.*GroupNorm"),
        (nn.Dropout(0.1), "Dropout.*active dropout"),
        (nn.AlphaDropout(0.1), "AlphaDropout.*active dropout"),
        (nn.MultiheadAttention(4, 2, dropout=0.1), "MultiheadAttention.*active dropout"),
        (
            nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
            "_SpectralNorm.*floating-point buffer '_u'",
        ),
    ],
)
def test_refused_layers_are_named(layer: nn.Module, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^layer '1\S*' \({reason}") as caught:
        check_functional(nn.Sequential(nn.Flatten(), layer))
    assert "\n" not in str(caught.value)


def test_harmless_layers_pass() -> None:
    check_functional(nn.Sequential(nn.InstanceNorm2d(4), nn.Dropout(0.0), nn.GroupNorm(2, 4)))
    counter = nn.Module()
    counter.register_buffer("positions", torch.arange(3))
    check_functional(counter)


@dataclass(frozen=True)
class Frozen:
    """A user's own specification, with or without a frozen layer."""

    freeze: bool

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(input_shape[0], num_outputs).requires_grad_(not self.freeze))


def test_own_specifications() -> None:
    assert set(initialise(Frozen(False), (3,), 2, seed=0)[1]) == {"0.weight", "0.bias"}
    with pytest.raises(ValueError, match=r"parameter '0\.weight' is frozen"):
        initialise(Frozen(True), (3,), 2, seed=0)


@pytest.mark.parametrize(
    ("task", "outputs", "good"),
    [
        ("classes", 3, (2, 3)),
        ("regression", 3, (2, 3)),
        ("binary", 1, (2, 1)),
        ("binary", 2, (2, 1)),
        ("tokens", 3, (2, 4, 3)),
    ],
)
def test_check_output(task: str, outputs: int, good: tuple[int, ...]) -> None:
    class Constant(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.shape = shape

        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(self.shape)

    x = torch.zeros(2, 4)
    check_output(Constant(*good), {}, x, outputs, task)
    for bad in [(2,), (2, 4), (*good[:-1], good[-1] + 1)]:
        with pytest.raises(ValueError, match=rf"outputs of shape .* the task '{task}' needs") as caught:
            check_output(Constant(*bad), {}, x, outputs, task)
        assert "\n" not in str(caught.value)


def test_check_output_names_the_tasks() -> None:
    with pytest.raises(ValueError, match="task = 'images' must be one of classes, binary"):
        check_output(nn.Identity(), {}, torch.zeros(1, 2), 2, "images")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP(hidden=(4, 0)), r"MLP: hidden = \(4, 0\) must be a tuple of integers >= 1"),
        (lambda: MLP(activation="rely"), "MLP: activation = 'rely' must be one of 'relu', 'tanh'"),
        (lambda: SmallCNN(channels=(-1,)), r"SmallCNN: channels = \(-1,\) must be"),
        (lambda: SmallCNN(channels=()), r"SmallCNN: channels = \(\) must name"),
        (lambda: CNN7(dropout=0.5), "CNN7: dropout = 0.5 must be 0: .* generator"),
        (lambda: ResNet20(groups=3), "ResNet20: groups = 3 must divide width = 16"),
        (lambda: ResNet20(groups=0), "ResNet20: groups = 0 must be >= 1"),
        (lambda: Transformer(heads=5), "Transformer: heads = 5 must divide width = 64"),
        (lambda: Transformer(layers=0), "Transformer: layers = 0 must be >= 1"),
        (lambda: Linear().build((), 2), r"Linear: input_shape = \(\) must be a tuple of sizes >= 1"),
        (lambda: Linear().build((3,), 0), "Linear: num_outputs = 0 must be >= 1"),
        (lambda: SmallCNN().build((64,), 10), r"SmallCNN: input_shape = \(64,\) must be \(channels, "),
        (lambda: CNN7().build((1, 8, 8), 10), "CNN7: input_shape = .* both sides >= 24"),
        (lambda: Transformer().build((1, 8, 8), 10), r"Transformer: input_shape = .* must be \(context,\)"),
    ],
)
def test_bad_values_are_named_in_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
