"""PALSGD: local steps of which some, drawn at random, are pulls to the server's model instead of gradient steps."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from clients.base import LocalRule, Oracle, State, Told
from clients.sgd import SGD
from fedsim import checks, random, tree
from fedsim.tree import Tree


@dataclass(frozen=True)
class PALSGD:
    """Pseudo-synchronise with probability ``p``, else make a step of the inner rule.

    With one coin ``b`` a worker and step, ``P(b) = p``, and the model ``anchor`` with which the worker began the round:
    ``theta <- theta - (lr mix / p) (theta - anchor)`` if ``b``, for all parameters, without a gradient or a message;
    otherwise a step of the inner rule at the learning rate ``lr / (1 - p)``, ``lr`` being its own. Its state advances with
    these steps only. Around ``SGD(lr)`` the expected step is ``theta - lr (grad(theta) + mix (theta - anchor))``, that of
    ``Prox(SGD(lr), mu=mix)``. The rate of ``AdamW`` scales its decoupled weight decay too, and there is no such identity.

    The paper's method is this rule around ``AdamW`` under ``strategy = "DiLoCo(...)"``. Minibatches belong to steps: one that is a
    pseudo-synchronisation skips its batch, whose loss is still told, so that data do not depend on coins. It counts as
    a local step of no gradient and no simulated time.

    For ablations, ``first_tensor_only`` and ``coin_seed`` reproduce two deviations of the authors' published code from their
    Algorithm 1: a loop over parameters is zipped with a list that has one entry, so that only the first tensor is
    pulled; and every process is seeded alike, so that all workers flip the same coins, while the very first step is
    always a gradient step. Further ones are not reproduced: further outer steps on a displacement of 0 within
    one sync, weight decay of the outer optimiser, and a minibatch that is drawn for a pseudo-synchronisation and thrown away.

    Parameters
    ----------
    inner : LocalRule
        The rule that makes the gradient steps; it, or the rule that it wraps, has a learning rate ``lr``.
    p : float
        Probability of a pseudo-synchronisation, in [0, 1); 0 is the inner rule.
    mix : float
        Strength of the pull, >= 0, called eta in the paper. The factor ``lr mix / p`` must be below 2; above 1
        the pull overshoots, with a warning: a small ``p`` at the same ``mix`` is less stable, not gentler.
    first_tensor_only : bool
        As in the published code: pull the model's first tensor only.
    coin_seed : int or None
        As in the published code: all workers flip the same coins, drawn from this seed and the number of steps
        made, which needs a strategy that keeps states; None for coins of their own.

    Raises
    ------
    ValueError
        If a value is outside its range, the pull diverges or the inner rule has no learning rate.

    References
    ----------
    Naganuma et al. (2025), Pseudo-asynchronous Local SGD, arXiv:2504.18454, Algorithm 1.
    """

    inner: LocalRule = SGD()  # noqa: RUF009 - it is frozen
    p: float = 0.1
    mix: float = 1.0
    first_tensor_only: bool = False
    coin_seed: int | None = None

    def __post_init__(self) -> None:
        checks.unit(self, "p")
        checks.nonnegative(self, "mix")
        if self.coin_seed is not None:
            checks.nonnegative(self, "coin_seed")
        if self._pull >= 2:
            raise ValueError(f"PALSGD: {self._told} must be < 2, or the pull diverges; raise p or lower mix")
        if self._pull > 1:
            warnings.warn(f"PALSGD: {self._told} is above 1: the pull overshoots the anchor", stacklevel=3)

    @property
    def _told(self) -> str:
        return f"lr mix / p = {learning_rate(self.inner):g} * {self.mix:g} / {self.p:g} = {self._pull:g}"

    @cached_property
    def _pull(self) -> float:
        """Factor of a pseudo-synchronisation."""
        return learning_rate(self.inner) * self.mix / self.p if self.p else 0.0

    @cached_property
    def _faster(self) -> LocalRule:
        """The inner rule at its higher rate."""
        return with_rate(self.inner, learning_rate(self.inner) / (1 - self.p))

    def init(self, theta: Tree) -> State:
        """Start the inner rule."""
        inner = self.inner.init(theta)
        if self.coin_seed is None or self.p == 0:
            return inner
        made = torch.zeros((), dtype=torch.int64, device=next(iter(theta.values())).device)
        return {"inner": inner, "made": made}

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Flip the coin, and make the one step or the other."""
        if self.p == 0:
            return self.inner.step(theta, state, oracle)
        if self.coin_seed is None:
            inner, coin = state, oracle.u < self.p
            oracle = oracle._replace(u=(oracle.u - self.p) / (1 - self.p))  # uniform again, where it is used
        else:
            inner, made = state.get("inner", {}), state["made"]
            coin = (random.uniform(random.key(self.coin_seed, "coins"), made) < self.p) & (made > 0)
        stepped, after, said = self._faster.step(theta, inner, oracle)
        kept = tree.where(coin, tree.flatten_nested(inner), tree.flatten_nested(after))
        theta = tree.where(coin, self._pulled(theta, oracle.anchor), stepped)
        gradients = torch.where(coin, torch.zeros_like(said.gradients), said.gradients)
        new: State = tree.unflatten_nested(kept)
        if self.coin_seed is not None:
            new = {"inner": new, "made": state["made"] + 1}
        return theta, new, Told(said.loss, gradients)

    def _pulled(self, theta: Tree, anchor: Tree) -> Tree:
        def pull(x: Tensor, a: Tensor) -> Tensor:
            return x - self._pull * (x - a)

        if self.first_tensor_only:
            first = next(iter(theta))
            return theta | {first: pull(theta[first], anchor[first])}
        return tree.tree_map(pull, theta, anchor)


def learning_rate(rule: LocalRule, owner: str = "PALSGD") -> float:
    """Return the learning rate ``lr`` of a rule, or of the one that it wraps.

    Parameters
    ----------
    rule : LocalRule
        A frozen dataclass.
    owner : str
        Who asks, for the message.

    Returns
    -------
    float
        The rate.

    Raises
    ------
    ValueError
        If there is none.

    Examples
    --------
    >>> learning_rate(SGD(lr=0.5))
    0.5
    """
    fields = _fields(rule)
    if "lr" in fields:
        return fields["lr"]
    if "inner" in fields:
        return learning_rate(fields["inner"], owner)
    raise ValueError(f"{owner}: inner = {rule!r} has no learning rate lr")


def with_rate(rule: LocalRule, lr: float) -> LocalRule:
    """Return a rule like this one with the learning rate ``lr`` (see `learning_rate`)."""
    if "lr" in _fields(rule):
        return dataclasses.replace(rule, lr=lr)  # type: ignore[type-var]
    return dataclasses.replace(rule, inner=with_rate(_fields(rule)["inner"], lr))  # type: ignore[type-var]


def _fields(rule: LocalRule) -> dict:
    if not dataclasses.is_dataclass(rule):
        return {}
    return {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)}
