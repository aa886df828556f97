"""The invariance penalty of IRMv1 in closed form: how the risk changes when all outputs are scaled.

With a multiplier s on the outputs z, ``D = d/ds R(s z)`` at ``s = 1`` is a mean over samples, ``D = mean_i a_i`` with
``a_i = sum_c (d loss_i / d z_ic) z_ic``, and so are its gradients. The penalty is ``D^2``, or the product of the
D of two halves of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clients.base import Part
from fedsim.objectives import CrossEntropy, Logistic, Objective


@dataclass(frozen=True)
class Slope:
    """The samples' share ``a_i`` of D, as an objective.

    Softmax: ``a = sum_c (p_c - q_c) z_c``, ``d a / d z_c = (p_c - q_c) + p_c (z_c - sum_j p_j z_j)``. One logit: ``a = (p - y) z``,
    ``d a / d z = (p - y) + z p (1 - p)`` with ``p = sigmoid(z)``.

    Parameters
    ----------
    of : CrossEntropy | Logistic
        The loss.

    Raises
    ------
    ValueError
        If it is another one.
    """

    tasks: ClassVar[tuple[str, ...]] = ("classes", "binary", "tokens")

    of: CrossEntropy | Logistic

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return ``a`` of each sample, ``[...]``."""
        return self.loss_and_residual(output, target)[0]

    def loss_and_residual(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``a`` of each sample and its derivative by the outputs."""
        if isinstance(self.of, Logistic):
            # A difference of two probabilities would round to 0 where the loss is small.
            sign = (2 * target - 1).to(output.dtype).unsqueeze(-1)
            residual = -sign * torch.sigmoid(-sign * output)
            p = torch.sigmoid(output)
            return (residual * output).squeeze(-1), residual + output * p * (1 - p)
        p = F.softmax(output, dim=-1)
        e, classes = self.of.label_smoothing, torch.arange(output.shape[-1], device=output.device)
        q = (1 - e) * (classes == target.unsqueeze(-1)).to(output.dtype) + e / output.shape[-1]
        residual = p - q
        share = (residual * output).sum(-1)
        slope = residual + p * (output - (p * output).sum(-1, keepdim=True))
        return (share.mean(-1), slope / output.shape[-2]) if self.of.tokens else (share, slope)

    def correct(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the correctness of the loss."""
        return self.of.correct(output, target)


def slope_of(objective: Objective) -> Slope:
    """Return the objective whose mean is D, see `Slope`.

    Parameters
    ----------
    objective : Objective
        The loss.

    Returns
    -------
    Slope
        In closed form.

    Raises
    ------
    ValueError
        If the loss is not `CrossEntropy` or `Logistic`.
    """
    if not isinstance(objective, CrossEntropy | Logistic):
        raise ValueError(f"{type(objective).__name__} has no slope here; use CrossEntropy or Logistic")
    return Slope(objective)


def part_weights(weight: Tensor, part: Part) -> Tensor:
    """Restrict weights to every second row, and let them sum to 1 again.

    Parameters
    ----------
    weight : Tensor
        ``[..., B]``, with sum 1 over the last axis; rows that only fill up weigh 0.
    part : {"all", "even", "odd"}
        Which rows.

    Returns
    -------
    Tensor
        ``[..., B]``; all 0 where there is no such row.
    """
    if part == "all":
        return weight
    place = torch.arange(weight.shape[-1], device=weight.device) % 2
    kept = weight * (place == (part == "odd")).to(weight.dtype)
    return kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)


def penalty(objective: Objective, output: Tensor, target: Tensor, split: bool = False) -> Tensor:
    """Return the penalty of one environment, ``D^2``, or ``D_even D_odd`` where it is split.

    The square exceeds that of the population by ``Var(a) / n`` in expectation; the split form does not, if rows are in random
    order, and may be negative.

    Parameters
    ----------
    objective : Objective
        `CrossEntropy` or `Logistic`.
    output : Tensor
        ``[n, C]`` or ``[n, 1]``.
    target : Tensor
        ``[n]`` labels.
    split : bool
        Multiply the D of rows at even and odd places; n may be odd.

    Returns
    -------
    Tensor
        A scalar.

    Raises
    ------
    ValueError
        If the loss has no closed form here.

    References
    ----------
    Arjovsky, Bottou, Gulrajani, Lopez-Paz 2019, arXiv 1907.02893 (square); Gulrajani, Lopez-Paz 2020, arXiv
    2007.01434 (split).

    Examples
    --------
    >>> z = torch.tensor([[1.2], [-0.7], [0.3], [2.0], [-1.5], [0.4]], dtype=torch.float64)
    >>> round(penalty(Logistic(), z, torch.tensor([1, 0, 0, 1, 1, 0])).item(), 10)
    0.0219891762
    """
    share = slope_of(objective).loss(output, target)
    return share[0::2].mean() * share[1::2].mean() if split else share.mean().square()
