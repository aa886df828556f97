"""SCAFFOLD's correction of the gradient, around any local rule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clients.base import LocalRule, Oracle, State, Told
from clients.sgd import SGD
from fedsim import tree
from fedsim.tree import Tree


@dataclass(frozen=True)
class Controlled:
    """Correct every gradient by control variates, ``g - c_i + c``: the worker's own, and that of the server.

    ``c`` is the channel ``control`` of the broadcast of ``strategy = "Scaffold(...)"``. Behind a round of H steps ``c_i`` becomes the mean
    of the round's H gradients ``g``, uncorrected and each where it was taken; with several gradients in a step the
    first counts. Around ``SGD(lr)`` that is option II of the paper, since
    ``(theta - theta_i) / (H lr) = mean_h(g_h) - c_i + c``. The state holds ``c_i`` of the round and ``moved``, by how much it changes.

    Parameters
    ----------
    inner : LocalRule
        The rule that makes the step.

    References
    ----------
    Karimireddy, Kale, Mohri, Reddi, Stich, Suresh (2020), arXiv:1910.06378.
    """

    inner: LocalRule = SGD()  # noqa: RUF009 - it is frozen

    def init(self, theta: Tree) -> State:
        """Start the inner rule, and the worker's control variate at 0."""
        zero = tree.zeros_like(theta)
        return {"inner": self.inner.init(theta), "control": zero, "moved": tree.clone(zero)}

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Make one inner step with corrected gradients.

        Parameters
        ----------
        theta : Tree
            The worker's row.
        state : dict
            The inner rule's, ``control`` and ``moved``.
        oracle : Oracle
            With the channel ``control`` in its broadcast.

        Returns
        -------
        tuple of Tree, dict and Told
            As the inner rule.

        Raises
        ------
        ValueError
            If the server sends no control variate.
        """
        if "control" not in oracle.broadcast:
            raise ValueError("Controlled: the strategy sends no channel 'control'; use Scaffold()")
        begins = oracle.step == 0
        control, moved = state["control"], state["moved"]
        # What the last round has changed holds from the first step of this one on: no step knows that it is the last.
        control = tree.where(begins, tree.add(control, moved), control)
        seen: list[Tree] = []

        def grad(x: Tree) -> tuple[Tree, Tensor]:
            gradient, loss = oracle.grad(x)
            seen.append(gradient)
            return tree.tree_map(
                lambda g, c, s: g - c + s, gradient, control, oracle.broadcast["control"]
            ), loss

        inner = state.get("inner", {})  # an inner rule without a state leaves no entry behind
        theta, inner, said = self.inner.step(theta, inner, oracle._replace(grad=grad))

        def running(m: Tensor, g: Tensor, c: Tensor) -> Tensor:
            m = torch.where(begins, 0.0, m)
            return m + (g - c - m) / (oracle.step + 1)

        moved = tree.tree_map(running, moved, seen[0], control)
        return theta, {"inner": inner, "control": control, "moved": moved}, said
