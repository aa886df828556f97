"""Full-batch gradient descent of one linear output, within the span of the rows.

Full-batch steps never leave ``theta_0 + span(rows)``. With signed rows ``z_j = s_j x_j`` and a loss ``l(z_j . theta)``,
``theta_t = theta_0 + Z^T a_t``, the margins are ``m_t = Z theta_0 + (Z Z^T) a_t``, and a step is
``a_{t+1} = (1 - lr pull) a_t - (lr / B) l'(m_t)``, ``pull`` being the strength of a proximal term. It costs ``B^2`` products a worker instead of ``2 B d``, which pays where a worker
has fewer rows B than there are features d, and takes four calls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clients import SGD, LocalRule, Prox
from fedsim.objectives import Exponential, Logistic, Objective
from fedsim.stacked import Chain
from fedsim.tree import Stack

SLOPES: dict[type, Callable[[Tensor], Tensor]] = {Logistic: torch.sigmoid, Exponential: torch.exp}
"""``-l'(m)`` as a function of ``-m`` for losses of a margin."""

BLOCK = 2**22
"""Bytes of margins that are kept until their losses are computed at once."""


class Span:
    """Plain gradient descent of a chain of one layer, remembering ``Z Z^T`` as long as rows stay the same.

    Parameters
    ----------
    chain : Chain
        A chain; `fits` refuses those of several layers.
    objective : Objective
        A loss; `fits` refuses those that are not functions of a margin.
    rule : LocalRule
        What a worker does; `fits` refuses all but SGD without momentum or decay, alone or in Prox.
    """

    def __init__(self, chain: Chain, objective: Objective, rule: LocalRule) -> None:
        self.chain, self.objective = chain, objective
        inner, self.pull = (rule.inner, rule.mu) if type(rule) is Prox else (rule, 0.0)
        plain = type(inner) is SGD and not (inner.momentum or inner.weight_decay)
        self.lr = inner.lr if type(inner) is SGD else 0.0
        self.possible = plain and len(chain.layers) == 1 and type(objective) in SLOPES
        self._known: tuple[Tensor, Tensor, Tensor] | None = None

    def fits(self, x: Tensor, steps: int) -> bool:
        """Whether it is possible and worthwhile for rows ``[W, B, *]`` and so many steps."""
        size, features = x.shape[1], x[0, 0].numel()
        return self.possible and steps > 1 and size < features and size <= 2 * steps

    def descend(
        self, anchor: Stack, x: Tensor, y: Tensor, weight: Tensor | None, steps: int
    ) -> tuple[Stack, Tensor]:
        """Make all steps.

        Parameters
        ----------
        anchor : Stack
            Rows at the start, leaves ``[W, *]``; not changed.
        x, y : Tensor
            ``[W, B, *]`` inputs and ``[W, B]`` labels in {0, 1}.
        weight : Tensor or None
            ``[W, B]``, sums to 1 for each worker; None for ``1 / B``.
        steps : int
            Number of steps T.

        Returns
        -------
        tuple of Stack and Tensor
            New rows, and the losses summed over the steps, ``[W]``.
        """
        name, bias, _ = self.chain.layers[0]
        z, gram = self._signed(x, y, bias is not None)
        first = torch.bmm(z, anchor[name].mT)  # [W, B, 1]
        if bias is not None:
            first += _signs(y, first) * anchor[bias][:, None]
        share = first.new_full((), 1 / x.shape[1]) if weight is None else weight[..., None]
        rate, slope = self.lr * share, SLOPES[type(self.objective)]
        moved = torch.zeros_like(first)  # a_t
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        size = max(1, min(steps, BLOCK // (first.numel() * first.element_size())))
        margins, ones = first.new_empty(size, *first.shape), torch.ones_like(y).expand(size, *y.shape)
        for start in range(0, steps, size):
            block = margins[: steps - start]
            for margin in block:
                torch.baddbmm(first, gram, moved, out=margin)
                step = slope(-margin)
                if self.pull:
                    moved.mul_(1 - self.lr * self.pull)
                moved.addcmul_(step, rate)
            loss = self.objective.loss(block, ones[: len(block)])
            total += (loss * share.squeeze(-1)).sum((0, 2)) if weight is not None else loss.mean(2).sum(0)
        new = {name: torch.baddbmm(anchor[name], moved.mT, z)}
        if bias is not None:
            new[bias] = anchor[bias] + (moved * _signs(y, moved)).sum(1)
        return {k: new[k] for k in anchor}, total

    def _signed(self, x: Tensor, y: Tensor, biased: bool) -> tuple[Tensor, Tensor]:
        """Return signed rows ``[W, B, d]`` and their products ``[W, B, B]``; a bias counts as a feature 1."""
        if self._known is None or self._known[0] is not x:
            s = _signs(y, x)
            z = x.flatten(2) * s
            gram = torch.bmm(z, z.mT)
            self._known = (x, z, gram + s @ s.mT if biased else gram)
        return self._known[1:]


def _signs(y: Tensor, like: Tensor) -> Tensor:
    """``2 y - 1``, ``[W, B, 1]``."""
    return (2 * y - 1).to(like.dtype)[..., None]
