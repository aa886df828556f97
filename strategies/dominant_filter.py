"""A subspace for workers to filter their gradients with: the dominant eigenvectors of the Hessian."""

from __future__ import annotations

from dataclasses import dataclass

from fedsim import checks, tree
from fedsim.tree import Stack, Tree
from strategies.base import Broadcast, Report, State
from strategies.basis import BasisRule, Own


@dataclass(frozen=True)
class DominantFilter(BasisRule):
    """Wrap a strategy and send, as channel ``basis``, the k dominant eigenvectors U of the training loss's Hessian.

    With the client ``Filtered(...)`` this is Bulk-SGD, ``theta <- theta - eta (I - U U^T) g``, and with
    ``Filtered(..., keep=True)`` Dom-SGD, ``theta <- theta - eta U U^T g``; with ``update = "remove"`` or "keep" and any
    client the server filters the workers' updates instead. U belongs to the largest algebraic eigenvalues of
    the Hessian of the whole training loss at the model that is sent. It is renewed every ``refresh`` rounds,
    where the original does it every step, at some 2 k + 20 Hessian products on the server (see
    `fedsim.analysis.hessian.dominant`). The server must know the data, as in every simulation.

    Parameters
    ----------
    inner : Rule
        Strategy that averages; it keeps no rows and no states at the workers.
    k : int
        Dimension of the dominant space, 1 <= k < P; the number of classes is usual.
    warm_up : int
        Rounds without a filter, >= 0.
    refresh : int
        Rounds between new bases, >= 1.
    update : {"whole", "remove", "keep"}
        Which part of the updates the server merges; "whole" for ``Filtered`` clients.

    Raises
    ------
    ValueError
        If a value is outside its range or the inner strategy does not fit.

    References
    ----------
    Song, Ahn, Yun (2024), Does SGD really happen in tiny subspaces?, arXiv:2405.16002.
    """

    k: int = 10

    def __post_init__(self) -> None:
        checks.at_least(self, 1, "k")
        checks.nonnegative(self, "warm_up")
        super().__post_init__()

    def init(self, theta: Tree, num_workers: int) -> tuple[State, Broadcast]:
        """Start without a basis, and refuse a dominant space as large as the model."""
        size = tree.num_parameters(theta)
        if self.k >= size:
            raise ValueError(f"DominantFilter: k = {self.k} must be < {size}, the number of parameters")
        return super().init(theta, num_workers)

    def curvature(self, state: State) -> int:
        """Ask for k eigenvectors where they are due."""
        return self.k if self.is_due(self.split(state)[1].round) else 0

    def learn(self, state: State, broadcast: Broadcast, basis: Stack) -> tuple[State, Broadcast]:
        """Take the eigenvectors into state and broadcast."""
        inner, own = self.split(state)
        return self.join(inner, broadcast, own._replace(basis=basis))

    def renew(self, own: Own, rows: Stack, report: Report) -> Own:
        """Keep the basis: new eigenvectors are asked for after the merge."""
        if own.round > self.warm_up and not tree.num_rows(own.basis):
            raise ValueError("DominantFilter: only fedsim's own server computes the Hessian's eigenvectors")
        return own
