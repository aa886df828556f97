"""Objectives: closed forms, derivatives against autograd, leading axes, extreme logits, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from fedsim.objectives import CrossEntropy, Exponential, Logistic, Objective, SquaredError, check_task

C, B, T, W = 4, 5, 3, 2
F64 = torch.float64


def _labels(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(1))


def _normal(*shape: int) -> Tensor:
    return 2 * torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(2))


def _case(objective: Objective, task: str, *lead: int) -> tuple[Tensor, Tensor]:
    """Outputs and targets of the shapes of a task, ``lead`` samples."""
    if task == "binary":
        return _normal(*lead, 1), _labels(2, *lead)
    if task == "regression":
        return _normal(*lead, C), _normal(*lead, C).flip(-1)
    if task == "tokens":
        return _normal(*lead, T, C), _labels(C, *lead, T)
    return _normal(*lead, C), _labels(C, *lead)


CASES: list[tuple[Objective, str]] = [
    (CrossEntropy(), "classes"),
    (CrossEntropy(label_smoothing=0.2), "classes"),
    (CrossEntropy(tokens=True), "tokens"),
    (CrossEntropy(label_smoothing=0.2, tokens=True), "tokens"),
    (SquaredError(), "classes"),
    (SquaredError(half=True), "classes"),
    (SquaredError(), "binary"),
    (SquaredError(), "regression"),
    (SquaredError(half=True), "regression"),
    (Logistic(), "binary"),
    (Exponential(), "binary"),
]
every = pytest.mark.parametrize(("objective", "task"), CASES, ids=[f"{o}-{t}" for o, t in CASES])


@every
def test_residual_is_the_derivative_of_the_loss(objective: Objective, task: str) -> None:
    z, y = _case(objective, task, W, B)
    z.requires_grad_()
    (expected,) = torch.autograd.grad(objective.loss(z, y).sum(), z)
    torch.testing.assert_close(objective.loss_and_residual(z, y)[1], expected, rtol=1e-12, atol=1e-12)


@every
def test_leading_axes_and_vmap_equal_a_loop(objective: Objective, task: str) -> None:
    z, y = _case(objective, task, W, B)

    def correct(output: Tensor, target: Tensor) -> Tensor:
        hit = objective.correct(output, target)
        assert (hit is None) == (task == "regression")
        return torch.zeros(output.shape[:-1]) if hit is None else hit

    def residual(output: Tensor, target: Tensor) -> Tensor:
        return objective.loss_and_residual(output, target)[1]

    def same_loss(output: Tensor, target: Tensor) -> Tensor:
        return objective.loss_and_residual(output, target)[0]

    torch.testing.assert_close(same_loss(z, y), objective.loss(z, y), rtol=1e-13, atol=1e-14)
    for method in (objective.loss, same_loss, residual, correct):
        loop = torch.stack([torch.stack([method(z[w, b], y[w, b]) for b in range(B)]) for w in range(W)])
        for batched in (method, vmap(method), vmap(vmap(method))):
            torch.testing.assert_close(batched(z, y), loop, rtol=1e-14, atol=1e-14)


@every
def test_second_derivative_under_vmap_is_the_derivative_of_the_residual(
    objective: Objective, task: str
) -> None:
    z, y = _case(objective, task, B)
    size = z[0].numel()

    def difference_quotient(z: Tensor, y: Tensor) -> Tensor:
        steps = 1e-5 * torch.eye(size, dtype=F64).reshape(size, *z.shape)
        rows = [
            (objective.loss_and_residual(z + h, y)[1] - objective.loss_and_residual(z - h, y)[1]) / 2e-5
            for h in steps
        ]
        return torch.stack(rows).reshape(size, size)

    curvature = vmap(jacrev(grad(objective.loss)))(z, y).reshape(B, size, size)
    expected = torch.stack([difference_quotient(z[b], y[b]) for b in range(B)])
    torch.testing.assert_close(curvature, expected, rtol=1e-6, atol=1e-6)


def test_cross_entropy_closed_form() -> None:
    z = torch.tensor([[0.0, math.log(2), math.log(5)]], dtype=F64)
    y = torch.tensor([1])
    assert CrossEntropy().loss(z, y).item() == pytest.approx(math.log(4), rel=1e-14)
    mean_log_p = (math.log(1 / 8) + math.log(2 / 8) + math.log(5 / 8)) / 3
    smooth = CrossEntropy(label_smoothing=0.3).loss(z, y).item()
    assert smooth == pytest.approx(0.7 * math.log(4) - 0.3 * mean_log_p, rel=1e-14)
    torch.testing.assert_close(
        CrossEntropy().loss_and_residual(z, y)[1], torch.tensor([[1, -6, 5]], dtype=F64) / 8
    )


def test_cross_entropy_agrees_with_torch() -> None:
    z, y = _normal(B, C), _labels(C, B)
    for smoothing in (0.0, 0.1, 1.0):
        reference = torch.nn.functional.cross_entropy(z, y, reduction="none", label_smoothing=smoothing)
        torch.testing.assert_close(CrossEntropy(smoothing).loss(z, y), reference, rtol=1e-13, atol=1e-13)


def test_tokens_are_a_mean_over_positions() -> None:
    z, y = _normal(B, T, C), _labels(C, B, T)
    each, whole = CrossEntropy(), CrossEntropy(tokens=True)
    torch.testing.assert_close(whole.loss(z, y), each.loss(z, y).mean(-1))
    torch.testing.assert_close(whole.correct(z, y), each.correct(z, y).mean(-1))
    torch.testing.assert_close(whole.loss_and_residual(z, y)[1], each.loss_and_residual(z, y)[1] / T)
    uniform = torch.zeros(B, T, C, dtype=F64)
    assert whole.loss(uniform, y).mean().exp().item() == pytest.approx(C)  # perplexity


def test_squared_error_closed_forms() -> None:
    z = torch.tensor([[1.0, 3.0, -2.0]], dtype=F64)
    y = torch.tensor([1])
    assert SquaredError().loss(z, y).tolist() == [1 + 4 + 4]
    assert SquaredError(half=True).loss(z, y).tolist() == [4.5]
    assert SquaredError().loss_and_residual(z, y)[1].tolist() == [[2, 4, -4]]
    one = torch.tensor([[0.5], [0.5]], dtype=F64)
    assert SquaredError().loss(one, torch.tensor([1, 0])).tolist() == [0.25, 2.25]
    assert SquaredError().loss(one, torch.tensor([1.0, 0.0], dtype=F64)).tolist() == [0.25, 0.25]
    hit = SquaredError().correct(one, torch.tensor([1, 0]))
    assert hit is not None
    assert hit.tolist() == [1, 0]


def test_regression_takes_targets_with_and_without_the_last_axis() -> None:
    z, y = _normal(B, 1), _normal(B, 1).flip(0)
    torch.testing.assert_close(SquaredError().loss(z, y), SquaredError().loss(z, y.squeeze(-1)))
    assert SquaredError().correct(z, y) is None


@pytest.mark.parametrize("y", [0, 1])
@pytest.mark.parametrize("z", [-700.0, -80.0, -30.0, 0.0, 30.0, 80.0, 700.0])
def test_binary_losses_at_large_logits(y: int, z: float) -> None:
    output, target = torch.tensor([[z]], dtype=F64), torch.tensor([y])
    margin = (2 * y - 1) * z
    logistic = math.log1p(math.exp(margin)) - margin if margin < 0 else math.log1p(math.exp(-margin))
    assert Logistic().loss(output, target).item() == pytest.approx(logistic, rel=1e-14, abs=0)
    slope = -(2 * y - 1) * (
        1 / (1 + math.exp(margin)) if margin < 0 else math.exp(-margin) / (1 + math.exp(-margin))
    )
    assert Logistic().loss_and_residual(output, target)[1].item() == pytest.approx(slope, rel=1e-13, abs=0)
    automatic = grad(lambda o: Logistic().loss(o, target).sum())(output).item()
    assert automatic == pytest.approx(slope, rel=1e-13, abs=0)
    assert Exponential().loss(output, target).item() == pytest.approx(math.exp(-margin), rel=1e-14, abs=0)
    # a two-class softmax over (0, z) is the same model
    both = torch.tensor([[0.0, z]], dtype=F64)
    assert CrossEntropy().loss(both, target).item() == pytest.approx(logistic, rel=1e-14, abs=1e-15)


def test_exponential_overflows_as_documented() -> None:
    target = torch.tensor([1])
    assert Exponential().loss(torch.tensor([[-710.0]], dtype=F64), target).isinf().all()
    assert Exponential().loss(torch.tensor([[-708.0]], dtype=F64), target).isfinite().all()
    assert Exponential().loss(torch.tensor([[-89.0]]), target).isinf().all()
    assert Exponential().loss_and_residual(torch.tensor([[746.0]], dtype=F64), target)[1].item() == 0


@pytest.mark.parametrize("size", [80.0, 700.0])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_cross_entropy_is_finite_at_large_logits(size: float, dtype: torch.dtype) -> None:
    z = torch.tensor([[size, -size, 0.0], [-size, size, size]], dtype=dtype)
    y = torch.tensor([1, 0])
    objective = CrossEntropy(label_smoothing=0.1)
    assert objective.loss(z, y).isfinite().all()
    assert objective.loss_and_residual(z, y)[1].isfinite().all()
    expected = torch.tensor([2 * size, 2 * size + math.log(2)], dtype=dtype)
    torch.testing.assert_close(CrossEntropy().loss(z, y), expected)


def test_correct() -> None:
    z = torch.tensor([[0.0, 1.0], [3.0, 2.0]])
    y = torch.tensor([1, 1])
    assert CrossEntropy().correct(z, y).tolist() == [1, 0]
    assert CrossEntropy(tokens=True).correct(z, y).item() == 0.5
    margin = torch.tensor([[2.0], [-2.0], [0.0]])
    assert Logistic().correct(margin, torch.tensor([1, 0, 1])).tolist() == [1, 1, 0]
    assert Exponential().correct(margin, torch.tensor([0, 1, 0])).tolist() == [0, 0, 0]


def test_check_task() -> None:
    assert check_task(CrossEntropy(0.1), "tokens") == CrossEntropy(0.1, tokens=True)
    assert check_task(CrossEntropy(tokens=True), "classes") == CrossEntropy()
    assert check_task(Logistic(), "binary") == Logistic()
    with pytest.raises(
        ValueError, match=r"^Exponential does not fit the task 'tokens' .*; use CrossEntropy$"
    ):
        check_task(Exponential(), "tokens")
    with pytest.raises(ValueError, match="use SquaredError or Logistic or Exponential"):
        check_task(CrossEntropy(), "binary")
    with pytest.raises(ValueError, match="task = 'images' must be one of classes, binary"):
        check_task(Logistic(), "images")


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_label_smoothing_is_a_share(value: float) -> None:
    with pytest.raises(ValueError, match=r"CrossEntropy: label_smoothing = \S+ must be in \[0, 1\]"):
        CrossEntropy(label_smoothing=value)


@pytest.mark.parametrize(
    ("objective", "output", "target"),
    [
        (CrossEntropy(), (B, C), (B, 1)),
        (SquaredError(), (B, C), (1,)),
        (Logistic(), (B, 1), (B, 1)),
        (Logistic(), (B, 2), (B,)),
        (Exponential(), (B,), (B,)),
    ],
)
def test_shapes_are_never_broadcast(
    objective: Objective, output: tuple[int, ...], target: tuple[int, ...]
) -> None:
    z, y = torch.zeros(output), torch.zeros(target, dtype=torch.int64)
    for method in (objective.loss, objective.loss_and_residual, objective.correct):
        with pytest.raises(ValueError, match="shape"):
            method(z, y)


def test_regression_shapes_are_never_broadcast() -> None:
    with pytest.raises(ValueError, match="must have the shape of the outputs"):
        SquaredError().loss(torch.zeros(B, C), torch.zeros(C))
