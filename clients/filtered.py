"""Gradients without, or only with, their part in a subspace that the server sends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clients.base import LocalRule, Oracle, State, Told
from clients.sgd import SGD
from fedsim import tree
from fedsim.tree import Tree


@dataclass(frozen=True)
class Filtered:
    """Remove from every gradient its part in a subspace, ``g - Q Q^T g``, or keep only that part, ``Q Q^T g``.

    The rows of Q^T are the channel ``basis`` of the broadcast, leaves ``[q, *]``, orthonormal; a basis
    without rows leaves gradients as they are. With worker-average gaps (see ``GapFilter``) this is the gap
    filter; with dominant Hessian eigenvectors (see ``DominantFilter``) it is Bulk-SGD and, with ``keep``, Dom-SGD.

    If the channel is called ``raw_basis`` (``GapFilter(source='raw')``), the worker walks the same filtered path and tells
    the unfiltered steps: its row is ``theta = anchor - eta sum_s g_s`` for SGD, and gradients are
    taken where it really is, at ``anchor + (I - Q Q^T)(theta - anchor)``. For SGD without weight decay
    both are one walk; other rules see unfiltered gradients, and their whole step is filtered.

    Parameters
    ----------
    inner : LocalRule
        The rule that makes the step.
    keep : bool
        Keep the part in the subspace instead of removing it.

    References
    ----------
    Song, Ahn, Yun (2024), Does SGD really happen in tiny subspaces?, arXiv:2405.16002.
    """

    inner: LocalRule = SGD()  # noqa: RUF009 - it is frozen
    keep: bool = False

    def init(self, theta: Tree) -> State:
        """Start the inner rule."""
        return self.inner.init(theta)

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Make one inner step with filtered gradients, or unfiltered ones along the filtered path.

        Parameters
        ----------
        theta : Tree
            The worker's row.
        state : dict
            The inner rule's.
        oracle : Oracle
            With the channel ``basis`` or ``raw_basis`` in its broadcast.

        Returns
        -------
        tuple of Tree, dict and Told
            As the inner rule.

        Raises
        ------
        ValueError
            If the server sends no basis, or one for raw steps and ``keep`` is set.
        """
        raw = "raw_basis" in oracle.broadcast
        if not raw and "basis" not in oracle.broadcast:
            raise ValueError(
                "Filtered: the strategy sends no channel 'basis'; use for instance GapFilter(FedAvg())"
            )
        if raw and self.keep:
            raise ValueError("Filtered: keep = True must be False for GapFilter(source='raw')")
        basis = oracle.broadcast["raw_basis" if raw else "basis"]
        if not len(next(iter(basis.values()))):
            return self.inner.step(theta, state, oracle)

        def filtered(x: Tree) -> tuple[Tree, Tensor]:
            gradient, loss = oracle.grad(x)
            return project(gradient, basis, self.keep), loss

        def on_the_path(x: Tree) -> tuple[Tree, Tensor]:
            return oracle.grad(tree.add(oracle.anchor, project(tree.sub(x, oracle.anchor), basis, False)))

        return self.inner.step(theta, state, oracle._replace(grad=on_the_path if raw else filtered))


def project(gradient: Tree, basis: Tree, keep: bool) -> Tree:
    """Return ``Q Q^T g`` if ``keep``, else ``g - Q Q^T g``, for rows of Q^T in leaves ``[q, *]``."""
    parts = [torch.tensordot(basis[k], g, g.ndim) for k, g in gradient.items()]  # each [q]
    coordinates = torch.stack(parts).sum(0)
    inside = {k: torch.tensordot(coordinates, basis[k], 1) for k in gradient}
    return inside if keep else {k: g - inside[k] for k, g in gradient.items()}
