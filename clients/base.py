"""What a local rule is: one step of one worker, written without a worker axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fedsim.tree import Tree

State = dict[str, Any]
"""What a rule remembers between steps: nested dictionaries with tensors as leaves."""


Part = Literal["all", "even", "odd"]
"""Rows of a batch: all, or those at even or odd places."""


def _no_slope(theta: Tree, part: Part) -> tuple[Tree, Tensor]:
    raise ValueError("this oracle gives gradients of the loss alone, no slopes")


_NOBODY = torch.tensor(-1)


class Oracle(NamedTuple):
    """All that a worker may ask during one step.

    Attributes
    ----------
    grad : callable
        ``theta -> (gradient, loss)`` on this step's batch; may be called more than once.
    anchor : Tree
        The row that the worker held when the round began.
    broadcast : dict of str to Tree
        What the server last sent, by channel; the channel ``model`` is the server's model.
    step : Tensor
        Index of the step within the round, from 0, a scalar.
    u : Tensor
        Uniform number in [0, 1) of this worker, round and step, a scalar.
    batch : tuple of Tensor
        Features and targets of this step's batch, for rules that need more than gradients. Plans that batch workers
        fill up short batches by repeating rows, which weigh nothing in ``grad``; the plan ``loop`` does not.
    slope : callable
        ``(theta, part) -> (gradient of D, D)`` with ``D = d/ds R(s z)`` at ``s = 1``, R the mean loss over all rows of this
        step's batch or every second one, z their outputs (see `fedsim.invariance`).
    worker : Tensor
        Id of this worker, a scalar, by which it finds what a broadcast holds for it.
    """

    grad: Callable[[Tree], tuple[Tree, Tensor]]
    anchor: Tree
    broadcast: dict[str, Tree]
    step: Tensor
    u: Tensor
    batch: tuple[Tensor, ...] = ()
    slope: Callable[[Tree, Part], tuple[Tree, Tensor]] = _no_slope
    worker: Tensor = _NOBODY


class Told(NamedTuple):
    """What a step tells besides the new parameters.

    Attributes
    ----------
    loss : Tensor
        Loss of the batch before the step, a scalar.
    gradients : Tensor
        Gradients that the step needed, a scalar.
    """

    loss: Tensor
    gradients: Tensor


def told(loss: Tensor, gradients: int = 1) -> Told:
    """Make a `Told` from a loss and a number of gradients."""
    return Told(loss, torch.full_like(loss, gradients))


@runtime_checkable
class LocalRule(Protocol):
    """A local rule: frozen dataclasses with these two verbs and nothing else.

    The engine batches them over workers, so they must not branch on values of tensors (use
    ``torch.where``) and must not change their arguments in place.
    """

    def init(self, theta: Tree) -> State:
        """Return the state before the first step at parameters ``theta``."""
        ...

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Make one local step from ``theta`` and return the new parameters, state and report."""
        ...
