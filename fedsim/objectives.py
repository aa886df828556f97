"""Objectives: what a worker minimises, one number a sample, with the closed form of its derivative.

An objective compares an output with trailing axis C (classes, or 1) with a target and knows nothing of
batches or workers: all leading axes pass through. ``[B, C]`` gives losses ``[B]``, ``[W, B, C]`` gives
``[W, B]``, and inside `torch.vmap` it is the same code. Shapes are exact; nothing is broadcast.

Four tasks are distinguished:

* ``"classes"``: output ``[..., C]``, integer target ``[...]`` in 0..C-1;
* ``"binary"``: output ``[..., 1]``, integer target ``[...]`` in {0, 1};
* ``"regression"``: output ``[..., D]``, floating target ``[..., D]``, or ``[...]`` if D = 1;
* ``"tokens"``: output ``[..., T, V]``, integer target ``[..., T]``; a sample is a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Objective(Protocol):
    """What a worker minimises: the loss of one sample and its derivative with respect to the output.

    Any frozen dataclass with these members is an objective.
    """

    tasks: ClassVar[tuple[str, ...]]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Loss of each sample, ``[...]``."""
        ...

    def loss_and_residual(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Give the loss of each sample and its derivative by the sample's output, in the output's shape."""
        ...

    def correct(self, output: Tensor, target: Tensor) -> Tensor | None:
        """Correctness of each sample in [0, 1], ``[...]``, or None if the task has no such thing."""
        ...


def _check_labels(output: Tensor, target: Tensor) -> None:
    if target.shape != output.shape[:-1]:
        raise ValueError(
            f"target of shape {tuple(target.shape)} must have the shape {tuple(output.shape[:-1])} "
            f"for outputs of shape {tuple(output.shape)}"
        )


def _one_hot(output: Tensor, target: Tensor) -> Tensor:
    # A comparison instead of F.one_hot, which reads values and therefore fails under vmap.
    classes = torch.arange(output.shape[-1], device=output.device)
    return (classes == target.unsqueeze(-1)).to(output.dtype)


def _signs(output: Tensor, target: Tensor) -> Tensor:
    # s = 2 y - 1 of labels y in {0, 1}, [..., 1] like the output
    _check_labels(output, target)
    if output.shape[-1] != 1:
        raise ValueError(f"binary labels need outputs of shape [..., 1], got {tuple(output.shape)}")
    return (2 * target - 1).to(output.dtype).unsqueeze(-1)


def _positive_margin(output: Tensor, target: Tensor) -> Tensor:
    return (_signs(output, target) * output > 0).to(output.dtype).squeeze(-1)


@dataclass(frozen=True)
class CrossEntropy:
    """Negative log-likelihood of the label under a softmax, optionally with smoothed labels.

    ``loss = -sum_c q_c log p_c`` with ``p = softmax(z)`` for an output ``z`` ``[..., C]`` and
    ``q_c = (1 - e) 1[c = y] + e / C`` for ``e = label_smoothing``; ``d loss / d z = p - q``.
    With ``tokens`` the loss of a sample is the mean over the T positions of its sequence (and the
    derivative is divided by T), so that ``exp`` of the mean loss is the perplexity.

    Parameters
    ----------
    label_smoothing : float
        Share ``e`` of the label that is spread evenly over all classes, in [0, 1].
    tokens : bool
        Whether the last leading axis counts the positions of a sequence. Nobody needs to write it:
        `check_task` sets it from the data. The shapes alone cannot tell ``[B, T, V]`` from ``[W, B, C]``.

    Raises
    ------
    ValueError
        If ``label_smoothing`` is not in [0, 1].

    References
    ----------
    Label smoothing: Szegedy, Vanhoucke, Ioffe, Shlens, Wojna 2015, arXiv 1512.00567.

    Examples
    --------
    >>> z, y = torch.zeros(2, 3, 4), torch.tensor([[0, 1, 2], [3, 0, 1]])
    >>> CrossEntropy().loss(z, y).shape, CrossEntropy(tokens=True).loss(z, y).shape
    (torch.Size([2, 3]), torch.Size([2]))
    """

    tasks: ClassVar[tuple[str, ...]] = ("classes", "tokens")

    label_smoothing: float = 0.0
    tokens: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"CrossEntropy: label_smoothing = {self.label_smoothing} must be in [0, 1]")

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Loss of each sample: ``[..., C]``, ``[...]`` to ``[...]``; tokens ``[..., T, V]``, ``[..., T]`` to ``[...]``."""
        _check_labels(output, target)
        log_p = F.log_softmax(output, dim=-1)
        loss = -log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        if self.label_smoothing > 0:
            loss = (1 - self.label_smoothing) * loss - self.label_smoothing * log_p.mean(dim=-1)
        return loss.mean(dim=-1) if self.tokens else loss

    def loss_and_residual(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Give the loss of each sample and its derivative ``p - q``, for tokens ``(p - q) / T``."""
        _check_labels(output, target)
        # By hand: torch's softmax over a short last axis takes 5 times as long as the arithmetic.
        z = output - output.amax(dim=-1, keepdim=True)
        label = target.unsqueeze(-1)
        hit = z.gather(-1, label)
        mean = z.mean(dim=-1, keepdim=True) if self.label_smoothing > 0 else hit
        p = z.exp_()
        total = p.sum(dim=-1, keepdim=True)
        expected = hit if self.label_smoothing == 0 else torch.lerp(hit, mean, self.label_smoothing)
        loss = (total.log() - expected).squeeze(-1)
        p.div_(total)
        p.scatter_add_(-1, label, p.new_full((1,), self.label_smoothing - 1).expand(label.shape))
        if self.label_smoothing > 0:
            p.sub_(self.label_smoothing / output.shape[-1])
        return (loss.mean(dim=-1), p / output.shape[-2]) if self.tokens else (loss, p)

    def correct(self, output: Tensor, target: Tensor) -> Tensor:
        """Whether the largest output is the label's (of equal ones the first), for tokens the share of positions."""
        _check_labels(output, target)
        hit = (output.argmax(dim=-1) == target).to(output.dtype)
        return hit.mean(dim=-1) if self.tokens else hit


@dataclass(frozen=True)
class SquaredError:
    """Squared distance between output and target, summed over the outputs of a sample.

    ``loss = sum_c (z_c - t_c)^2`` and ``d loss / d z = 2 (z - t)``; ``half`` puts 1/2 before both, and
    so halves every curvature. The target ``t`` follows from the type of ``y``:

    * integer labels with C > 1 outputs (classes): ``t_c = 1[c = y]``, one-hot;
    * integer labels in {0, 1} with one output (binary): ``t = 2 y - 1``, so that the sign decides;
    * floating values (regression): ``t = y``.

    Parameters
    ----------
    half : bool
        Whether to multiply by 1/2.

    Examples
    --------
    >>> z, y = torch.tensor([[0.0, 2.0]]), torch.tensor([1])
    >>> SquaredError().loss(z, y), SquaredError(half=True).loss(z, y)
    (tensor([1.]), tensor([0.5000]))
    """

    tasks: ClassVar[tuple[str, ...]] = ("classes", "binary", "regression")

    half: bool = False

    def _difference(self, output: Tensor, target: Tensor) -> Tensor:
        if not target.is_floating_point():
            if output.shape[-1] == 1:
                return output - _signs(output, target)
            _check_labels(output, target)
            return output - _one_hot(output, target)
        if output.shape[-1] == 1 and target.shape == output.shape[:-1]:
            target = target.unsqueeze(-1)
        if target.shape != output.shape:
            raise ValueError(
                f"target of shape {tuple(target.shape)} must have the shape of the outputs, {tuple(output.shape)}"
            )
        return output - target

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Loss of each sample: ``[..., C]`` to ``[...]``."""
        square = self._difference(output, target).square().sum(dim=-1)
        return square / 2 if self.half else square

    def loss_and_residual(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Give the loss of each sample and ``2 (z - t)``, or ``z - t`` with ``half``."""
        difference = self._difference(output, target)
        square = difference.square().sum(dim=-1)
        return (square / 2, difference) if self.half else (square, 2 * difference)

    def correct(self, output: Tensor, target: Tensor) -> Tensor | None:
        """Whether the label is right: largest output or, with one output, its sign; None for regression."""
        if target.is_floating_point():
            return None
        if output.shape[-1] == 1:
            return _positive_margin(output, target)
        _check_labels(output, target)
        return (output.argmax(dim=-1) == target).to(output.dtype)


@dataclass(frozen=True)
class Logistic:
    """Logistic loss of one logit: ``loss = log(1 + exp(-s z))`` with ``s = 2 y - 1`` for labels y in {0, 1}.

    ``d loss / d z = -s / (1 + exp(s z))``. Neither overflows for any finite ``z`` ``[..., 1]``, and small
    losses keep their relative precision until ``exp`` underflows. A tie, z = 0, counts as an error.

    Examples
    --------
    >>> Logistic().loss(torch.tensor([[-800.0], [0.0]]), torch.tensor([1, 0]))
    tensor([8.0000e+02, 6.9315e-01])
    """

    tasks: ClassVar[tuple[str, ...]] = ("binary",)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Loss of each sample: ``[..., 1]`` and labels ``[...]`` to ``[...]``."""
        # Not F.softplus: it becomes linear beyond 20, an error of 2e-9.
        return -F.logsigmoid(_signs(output, target) * output).squeeze(-1)

    def loss_and_residual(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Give the loss of each sample and ``-s sigmoid(-s z)``, ``[..., 1]``."""
        s = _signs(output, target)
        margin = s * output
        return -F.logsigmoid(margin).squeeze(-1), -s * torch.sigmoid(-margin)

    def correct(self, output: Tensor, target: Tensor) -> Tensor:
        """Whether the margin ``s z`` is positive, ``[...]``."""
        return _positive_margin(output, target)


@dataclass(frozen=True)
class Exponential:
    """Exponential loss of one logit: ``loss = exp(-s z)`` with ``s = 2 y - 1`` for labels y in {0, 1}.

    ``d loss / d z = -s exp(-s z)``. It is what it says: a margin ``s z`` below -709 (float64) or -88
    (float32) gives inf, and one above 745 (float64) or 103 (float32) gives 0 and a zero gradient.
    A tie, z = 0, counts as an error.

    Examples
    --------
    >>> Exponential().loss(torch.tensor([[0.0], [1.0]]), torch.tensor([1, 1]))
    tensor([1.0000, 0.3679])
    """

    tasks: ClassVar[tuple[str, ...]] = ("binary",)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Loss of each sample: ``[..., 1]`` and labels ``[...]`` to ``[...]``."""
        return torch.exp(-_signs(output, target) * output).squeeze(-1)

    def loss_and_residual(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Give the loss of each sample and ``-s exp(-s z)``, ``[..., 1]``."""
        s = _signs(output, target)
        loss = torch.exp(-s * output)
        return loss.squeeze(-1), -s * loss

    def correct(self, output: Tensor, target: Tensor) -> Tensor:
        """Whether the margin ``s z`` is positive, ``[...]``."""
        return _positive_margin(output, target)


@dataclass(frozen=True)
class Value:
    """The output itself, for models that are functions to minimise (`fedsim.landscapes`); targets do not matter."""

    tasks: ClassVar[tuple[str, ...]] = ("regression",)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the output of each sample, ``[..., 1]`` to ``[...]``."""
        return output.squeeze(-1)

    def loss_and_residual(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output of each sample and ones, ``[..., 1]``."""
        return output.squeeze(-1), torch.ones_like(output)

    def correct(self, output: Tensor, target: Tensor) -> None:
        """Return None: there is nothing to hit."""
        return


_TASKS = ("classes", "binary", "regression", "tokens")
_ALL = (CrossEntropy, SquaredError, Logistic, Exponential)


def check_task(objective: Objective, task: str) -> Objective:
    """Return the objective made ready for a task, or say which objectives fit.

    The only thing that changes is ``CrossEntropy.tokens``: the loss of a sequence is a mean over positions.

    Parameters
    ----------
    objective : Objective
        What the user wrote.
    task : str
        Task of the data: "classes", "binary", "regression" or "tokens".

    Returns
    -------
    Objective
        To be used in place of the given one.

    Raises
    ------
    ValueError
        If the task is unknown or the objective does not fit it.

    Examples
    --------
    >>> check_task(CrossEntropy(), "tokens")
    CrossEntropy(label_smoothing=0.0, tokens=True)
    >>> check_task(Logistic(), "classes")
    Traceback (most recent call last):
    ValueError: Logistic does not fit the task 'classes' of the data; use CrossEntropy or SquaredError
    """
    if task not in _TASKS:
        raise ValueError(f"task = {task!r} must be one of {', '.join(_TASKS)}")
    if task not in objective.tasks:
        fitting = " or ".join(o.__name__ for o in _ALL if task in o.tasks)
        raise ValueError(
            f"{type(objective).__name__} does not fit the task {task!r} of the data; use {fitting}"
        )
    return replace(objective, tokens=task == "tokens") if isinstance(objective, CrossEntropy) else objective
