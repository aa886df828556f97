"""Hessian products, eigenpairs and noise against dense matrices and closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedsim import tree
from fedsim.analysis.hessian import TrainingLoss, dense_hessian, dominant, gradient_noise, trace
from fedsim.layers import Residual, SelfAttention
from fedsim.models import MLP, SmallCNN, initialise
from fedsim.objectives import CrossEntropy, SquaredError
from fedsim.text_classifier import TextClassifier

F64 = torch.float64


def problem(spec, shape, classes=3, n=20, objective=None, chunk=7, tokens=False):
    g = torch.Generator().manual_seed(0)
    x = (
        torch.randint(5, (n, *shape), generator=g)
        if tokens
        else torch.randn(n, *shape, generator=g, dtype=F64)
    )
    y = torch.randint(classes, (n,), generator=g)
    module, theta = initialise(spec, shape, classes, 0, F64)
    return TrainingLoss(module, objective or SquaredError(), x, y, chunk), theta


def reference(p, theta):
    """Hessian row by row; torch.func's reverse over reverse is wrong for weights of LayerNorm."""

    def loss(v):
        return p.losses(tree.unflatten(v, theta), slice(None)).mean()

    h = torch.autograd.functional.hessian(loss, tree.flatten(theta))
    assert isinstance(h, torch.Tensor)
    return h


CASES = {
    "mlp": (MLP(hidden=(5, 4), activation="tanh"), (6,), SquaredError(), False),
    "cross-entropy": (MLP(hidden=(5,), activation="gelu"), (6,), CrossEntropy(), False),
    "cnn": (SmallCNN(channels=(2, 3), pool="average"), (1, 4, 4), SquaredError(), False),
    "transformer": (
        TextClassifier(vocabulary=5, layers=1, width=4, heads=2, mlp=1),
        (3,),
        SquaredError(),
        True,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_products_and_dense_matrix(name):
    spec, shape, objective, tokens = CASES[name]
    p, theta = problem(spec, shape, objective=objective, tokens=tokens)
    h = reference(p, theta)
    torch.testing.assert_close(dense_hessian(p, theta, block=17), h, rtol=0, atol=1e-10)
    v = torch.randn(len(h), generator=torch.Generator().manual_seed(1), dtype=F64)
    torch.testing.assert_close(p.product(theta)(v), h @ v, rtol=0, atol=1e-10)


def test_linear_regression_has_a_constant_hessian():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 4, generator=g, dtype=F64), torch.randn(9, 1, generator=g, dtype=F64)
    p = TrainingLoss(nn.Linear(4, 1, bias=False), SquaredError(), x, y, chunk=4)
    theta = {"weight": torch.zeros(1, 4, dtype=F64)}
    torch.testing.assert_close(dense_hessian(p, theta), 2 * x.T @ x / 9)
    gradient, loss = p.gradient(theta)
    torch.testing.assert_close(gradient, (-2 * x.T @ y / 9).flatten())
    assert loss == pytest.approx(y.square().mean().item())


def test_lanczos_agrees_with_the_dense_hessian():
    """W15 and W16."""
    p, theta = problem(MLP(hidden=(24, 24), activation="tanh"), (16,), classes=10, n=60, chunk=0)
    pairs = dominant(p, theta, 10, tol=1e-9)
    values, vectors = torch.linalg.eigh(dense_hessian(p, theta))
    torch.testing.assert_close(pairs.values, values.flip(0)[:11], rtol=1e-6, atol=0)
    cosines = torch.linalg.svdvals(vectors.flip(1)[:, :10].T @ pairs.vectors)
    assert 1 - cosines.min() < 1e-6
    assert pairs.residuals.max() < 1e-3
    assert (pairs.vectors.T @ pairs.vectors - torch.eye(10, dtype=F64)).abs().max() < 1e-8


def test_float32_eigenpairs():
    p, theta = problem(MLP(hidden=(8,), activation="tanh"), (6,))
    exact = dominant(p, theta, 3, tol=1e-9)
    single = p._replace(x=p.x.float())
    pairs = dominant(single, tree.tree_map(torch.Tensor.float, theta), 3)
    torch.testing.assert_close(pairs.values, exact.values, rtol=1e-4, atol=0)
    assert pairs.residuals.max() < 1e-3
    assert pairs.vectors.dtype == F64


def test_largest_algebraic_not_largest_magnitude():
    class Saddle(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return x + (self.w.square() * torch.tensor([1.0, 2.0, -9.0, 0.5])).sum()

    class Itself:
        def loss(self, output, target):
            return output

    p = TrainingLoss(Saddle(), Itself(), torch.zeros(3, dtype=F64)[:, None].squeeze(1), torch.zeros(3))
    pairs = dominant(p, {"w": torch.zeros(4, dtype=F64)}, 2)
    torch.testing.assert_close(pairs.values, torch.tensor([4.0, 2.0, 1.0], dtype=F64))


def test_all_pairs_of_a_small_model():
    p, theta = problem(MLP(hidden=()), (1,), classes=2)
    pairs = dominant(p, theta, 3)
    torch.testing.assert_close(pairs.values, torch.linalg.eigvalsh(dense_hessian(p, theta)).flip(0))


@pytest.mark.parametrize("k", [0, 4])
def test_refuses_a_dominant_space_that_does_not_fit(k):
    p, theta = problem(MLP(hidden=()), (1,), classes=2)
    with pytest.raises(ValueError, match=rf"k = {k} must be in \[1, 3\]"):
        dominant(p, theta, k)


def test_trace():
    p, theta = problem(MLP(hidden=(5, 4), activation="tanh"), (6,))
    exact = dense_hessian(p, theta).trace().item()
    estimate, error = trace(p, theta, 400)
    assert abs(estimate - exact) < 4 * error
    assert error < 0.1 * exact
    assert trace(p, theta, 10) == trace(p, theta, 10) != trace(p, theta, 10, seed=1)
    with pytest.raises(ValueError, match="method = 'x' must be"):
        trace(p, theta, 10, method="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="products = 1 must be >= 2"):
        trace(p, theta, 1)


def test_xtrace():
    pytest.importorskip("curvlinops")
    p, theta = problem(MLP(hidden=(5, 4), activation="tanh"), (6,))
    before, state = tree.clone(dict(p.module.named_parameters())), torch.get_rng_state()
    estimate, _ = trace(p, theta, 60, method="xtrace")
    assert estimate == pytest.approx(dense_hessian(p, theta).trace().item(), rel=0.05)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[k]) for k, x in p.module.named_parameters())


def test_noise_along_directions():
    p, theta = problem(MLP(hidden=(5,), activation="tanh"), (6,))
    each = torch.stack([p.minibatch_gradient(theta, torch.tensor([j])) for j in range(len(p.x))])
    u = torch.linalg.qr(
        torch.randn(each.shape[1], 3, generator=torch.Generator().manual_seed(2), dtype=F64)
    ).Q
    wanted = (each @ u).var(dim=0, correction=0) / 4
    torch.testing.assert_close(gradient_noise(p, theta, u, 4), wanted)


def test_nothing_global_is_drawn():
    p, theta = problem(MLP(hidden=(5,), activation="tanh"), (6,))
    state = torch.get_rng_state()
    dominant(p, theta, 2)
    trace(p, theta, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_attention_without_a_mask_sees_all_positions():
    module = Residual(SelfAttention(4, 2), nn.Identity()).double()
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(module(x)[:, order], module(x[:, order]))
