"""Invariant risk minimisation, around any local rule."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clients.base import LocalRule, Oracle, State, Told, told
from clients.sgd import SGD
from fedsim import checks, tree
from fedsim.tree import Tree


@dataclass(frozen=True)
class IRM:
    """Step along the gradient of the IRMv1 objective of a worker that is an environment.

    ``J = (R + lam P + l2 |theta|^2) / c``, with R the mean loss of the batch and the penalty ``P = D^2``, or ``D_even D_odd`` with
    ``split``, for ``D = d/ds R(s z)`` at ``s = 1``. Its gradient is exact, since D is a mean over samples
    too: ``grad P = 2 D grad D``, or ``D_odd grad D_even + D_even grad D_odd``, in closed form under every plan. The channel ``irm`` of
    ``strategy = "FedIRM(...)"`` holds ``lam`` and ``c`` of the round. Told is the risk R, and one gradient more for each D.

    IRMv1 is a mean over environments, so with ``local-steps = 1``, ``batch-size = 0`` and ``SGD(lr=1.0)`` inside, the run is centralised
    training by the server's optimiser. With more local steps it is not: at a worker's own calibrated optimum its penalty
    vanishes, and what is left is risk minimisation.
    With several workers in an environment, the mean of their squares exceeds ``D^2`` by the variance of their D; the split
    form does not, on average. With ``strategy = "PooledIRM(...)"`` workers first tell their D, and D is then that of the
    whole environment.

    Parameters
    ----------
    inner : LocalRule
        The rule that makes the step.
    l2 : float
        Coefficient of the squared norm of all parameters, >= 0.
    split : bool
        Multiply the D of the rows at even and odd places of the batch; the order of rows should be random in every step.

    Raises
    ------
    ValueError
        If ``l2`` is negative.

    References
    ----------
    Arjovsky, Bottou, Gulrajani, Lopez-Paz 2019, arXiv 1907.02893; split: Gulrajani, Lopez-Paz 2020, arXiv 2007.01434.
    """

    inner: LocalRule = SGD(lr=1.0)  # noqa: RUF009 - it is frozen
    l2: float = 1e-3
    split: bool = False

    def __post_init__(self) -> None:
        checks.nonnegative(self, "l2")

    def init(self, theta: Tree) -> State:
        """Start the inner rule."""
        return self.inner.init(theta)

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Make one inner step with gradients of ``J``.

        Parameters
        ----------
        theta : Tree
            The worker's row.
        state : dict
            The inner rule's.
        oracle : Oracle
            With the channel ``irm`` in its broadcast.

        Returns
        -------
        tuple of Tree, dict and Told
            As the inner rule; the row as it is and D as loss, where the server asks for that first.

        Raises
        ------
        ValueError
            If the server sends no weight of the penalty.
        """
        if "irm" not in oracle.broadcast:
            raise ValueError("IRM: the strategy sends no channel 'irm'; use FedIRM()")
        weight, divisor = oracle.broadcast["irm"]["weight"], oracle.broadcast["irm"]["divisor"]
        pools = "pools" in oracle.broadcast["irm"]
        if pools and "slopes" not in oracle.broadcast:
            return theta, state, told(oracle.slope(theta, "all")[1], 0)

        def grad(x: Tree) -> tuple[Tree, Tensor]:
            gradient, loss = oracle.grad(x)
            if self.split:
                (even, d_even), (odd, d_odd) = oracle.slope(x, "even"), oracle.slope(x, "odd")
                change = tree.tree_map(lambda e, o: d_odd * e + d_even * o, even, odd)
            else:
                change, d = oracle.slope(x, "all")
                if pools:
                    of_all = oracle.broadcast["slopes"]["pooled"].to(d)
                    d = of_all.index_select(0, oracle.worker.reshape(1)).squeeze(0)
                change = tree.scale(2 * d, change)

            def total(g: Tensor, p: Tensor, w: Tensor) -> Tensor:
                return (g + weight * p + 2 * self.l2 * w) / divisor

            return tree.tree_map(total, gradient, change, x), loss

        theta, state, said = self.inner.step(theta, state, oracle._replace(grad=grad))
        return theta, state, said._replace(gradients=said.gradients * (3 if self.split else 2))
