"""Gradient descent whose step size is a share of what the data allow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clients.base import Oracle, State, Told
from fedsim import checks
from fedsim.tree import Tree


@dataclass(frozen=True)
class ScaledSGD:
    """Gradient descent with the step size ``c / beta``, or ``c / (beta L)`` for L local steps.

    ``beta = h max_i |X_i|_2^2 / n_i`` bounds the curvature of the workers' losses on a linear model: ``X_i`` ``[n_i, d]``
    are worker i's training rows and ``h`` the largest second derivative of the loss by the output, 1/4 for `Logistic`,
    1 for `Exponential` (at 0), 1/2 for `CrossEntropy`, 2 or 1 for `SquaredError`. Before the first round the run
    replaces the rule by ``SGD(lr)`` (`fedsim.step_sizes.settle`). Descent is stable up to ``c = 2``.

    Parameters
    ----------
    c : float
        Share of ``1 / beta``, > 0.
    mode : {"fixed", "scaled"}
        Whether the step size is the same for any number of local steps or is divided by it.

    Raises
    ------
    ValueError
        If ``c`` is not positive or the mode unknown; when a run begins, if the model is not linear, the objective has no such
        bound, or a node knows only its own rows.

    References
    ----------
    Zhu, Vardhan, Mazumdar (2024), arXiv:2412.07971, for steps that shrink with L.
    """

    c: float = 1.0
    mode: Literal["fixed", "scaled"] = "fixed"

    def __post_init__(self) -> None:
        checks.positive(self, "c")
        checks.one_of(self, "mode", ("fixed", "scaled"))

    def init(self, theta: Tree) -> State:
        """Remember nothing."""
        return {}

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Refuse: the step size is not known yet.

        Raises
        ------
        RuntimeError
            Always.
        """
        raise RuntimeError(f"{self!r} has no step size before fedsim.step_sizes.settle has seen the data")
