"""Step sizes from the local smoothness: AdGD, and the stepper that it shares with SA-SAM."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from clients.base import LocalRule, Oracle, State, Told, told
from fedsim import checks, tree
from fedsim.tree import Tree

First = Literal["eta0", "grow"]


class Switches(NamedTuple):
    """Everything in which the published forms differ.

    Attributes
    ----------
    damping : float
        The bound on the step is ``dw / (damping dg)``, > 0.
    growth : float
        The step grows by ``sqrt(1 + growth theta)`` at most, >= 0.
    theta0 : float
        Ratio of the last two steps in the beginning, >= 0, or infinite.
    eps : float
        Added to the step behind the minimum, >= 0.
    first : {"eta0", "grow"}
        The first step is as long as the last one, or grows.
    rho_scale, rho_max : float
        The ascent is ``min(rho_max, rho_scale sqrt(eta))``, both >= 0.
    rho_lag : bool
        It knows the step before this one only.
    norm_eps : float
        Added to the gradient's norm in the ascent, >= 0.
    """

    damping: float
    growth: float
    theta0: float
    eps: float
    first: First
    rho_scale: float
    rho_max: float
    rho_lag: bool
    norm_eps: float

    def advance(
        self, eta: Tensor, theta: Tensor, first: Tensor, dw: Tensor, dg: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next step, its ratio to the last one, and the ascent; all arguments are scalars.

        Parameters
        ----------
        eta, theta : Tensor
            The last step, and its ratio to the one before.
        first : Tensor
            Whether there has been no step yet.
        dw, dg : Tensor
            Distances of the last two points, and of the gradients there on the same batch; where one is 0, as with
            the first step, the step grows freely, and if that has no bound it stays.

        Returns
        -------
        tuple of Tensor
            ``eta, theta, rho``.
        """
        gain = self.growth * theta if self.growth else torch.zeros_like(theta)
        free = eta * (1 + gain).sqrt()
        known = (dw > 0) & (dg > 0)
        bound = dw / (self.damping * torch.where(known, dg, 1.0))
        new = torch.where(
            known, torch.minimum(free, bound) + self.eps, torch.where(free.isfinite(), free, eta)
        )
        ratio = new / eta
        if self.first == "eta0":
            new, ratio = torch.where(first, eta, new), torch.where(first, theta, ratio)
        rho = (self.rho_scale * (eta if self.rho_lag else new).sqrt()).clamp(max=self.rho_max)
        return new, ratio, rho


PRESETS = {
    "safe": Switches(2.0, 0.02, math.inf, 0.0, "eta0", 1.0, 0.2, False, 1e-12),
    "federated": Switches(2.0, 0.1, 1.0, 0.0, "eta0", 1.0, 0.2, False, 1e-12),
    "transcription": Switches(2.0, 1.0, math.inf, 0.0, "eta0", 1.0, math.inf, False, 0.0),
    "released": Switches(1.0, 0.02, 1.0, 1e-8, "grow", 1.0, math.inf, True, 1e-8),
    "delta_released": Switches(1.0, 0.02, 1.0, 1e-8, "grow", 0.0, 0.0, False, 0.0),
    "delta_algorithm": Switches(1.0, 1.0, 1.0, 0.0, "eta0", 0.0, 0.0, False, 0.0),
}
"""The forms with a name. ``safe`` and ``federated`` are ours."""


@dataclass(frozen=True)
class AdaptiveSGD:
    """Gradient descent whose step follows the local smoothness (AdGD; with minibatches AdSGD or SA-SGD).

    ``eta_t = min(sqrt(1 + growth theta_{t-1}) eta_{t-1}, dw / (damping dg)) + eps``, ``theta_t = eta_t / eta_{t-1}``,
    ``w_{t+1} = w_t - eta_t (g_t + weight_decay w_t)`` with ``dw = |w_t - w_{t-1}|`` and ``dg = |g_t - g'_t|``, norms
    over all parameters of the worker, and the gradients at ``w_t`` and ``w_{t-1}`` on the same batch, without the decay. Where
    ``dw`` or ``dg`` is 0, the step grows, or stays if ``theta`` is infinite. Two gradients a step, in the first too.

    Every round begins again, at ``eta0`` and ``theta0``, and its first step has no difference to go by. With ``persistent``
    a worker goes on at the step with which it left, which needs a strategy that keeps states. Switches left at None
    are those of the preset:

    ================== ======= ====== ====== ===== =====
    preset             damping growth theta0 eps   first
    ================== ======= ====== ====== ===== =====
    safe               2       0.02   inf    0     eta0
    federated          2       0.1    1      0     eta0
    transcription      2       1      inf    0     eta0
    released           1       0.02   1      1e-8  grow
    delta_released     1       0.02   1      1e-8  grow
    delta_algorithm    1       1      1      0     eta0
    ================== ======= ====== ====== ===== =====

    ``transcription`` is the algorithm as written, ``released`` the authors' code; ``safe`` and ``federated`` are ours.
    ``delta_released`` is the step of the published code of Delta-SGD and ``delta_algorithm`` that of its Algorithm 1
    at ``gamma = 2`` (``damping = 2 / gamma``): Delta-SGD is this rule under ``strategy = "FedAvg()"``. Where a preset
    starts from ``theta0 = 1``, the step grows slowly: at ``growth = 0.02`` by a fifth in twenty steps, so that
    rounds of few steps depend on ``eta0``; ``theta0 = inf`` and ``persistent`` remove that.

    Rules around this one see both gradients alike: a clip applies to both. Schedules of the learning rate refuse it.

    Parameters
    ----------
    eta0 : float
        The first step, > 0.
    preset : {"safe", "federated", "transcription", "released", "delta_released", "delta_algorithm"}
        Which form.
    damping, growth, theta0, eps, first : float, float, float, float, {"eta0", "grow"} or None
        Switches that replace those of the preset (see `clients.adaptive_sgd.Switches`).
    weight_decay : float
        Coefficient of ``w`` in the step, >= 0.
    persistent : bool
        Keep step and ratio between rounds.

    Raises
    ------
    ValueError
        If a value is outside its range.

    References
    ----------
    Malitsky, Mishchenko (2020), Adaptive gradient descent without descent, arXiv:1910.09529. Kim, Toghani, Uribe,
    Kyrillidis (2024), Adaptive federated learning with auto-tuned clients, arXiv:2306.11201.
    """

    eta0: float = 0.2
    preset: str = "safe"
    damping: float | None = None
    growth: float | None = None
    theta0: float | None = None
    eps: float | None = None
    first: First | None = None
    weight_decay: float = 0.0
    persistent: bool = False

    def __post_init__(self) -> None:
        check(self, tuple(PRESETS))

    @property
    def switches(self) -> Switches:
        """All switches: those given, and the preset's."""
        return chosen(self)

    def init(self, theta: Tree) -> State:
        """Start at ``eta0`` and ``theta0``."""
        return begin(self.eta0, self.switches, theta)

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Make one step along the gradient, as long as the smoothness allows."""
        gradient, loss = oracle.grad(theta)
        eta, _, new = measure(self.eta0, self.switches, self.persistent, theta, gradient, state, oracle)
        if self.weight_decay:
            gradient = tree.axpy(self.weight_decay, theta, gradient)
        return tree.axpy(-eta, gradient, theta), new, told(loss, gradients=2)


def begin(eta0: float, switches: Switches, theta: Tree) -> State:
    """Return the state of a stepper before its first step: ``eta``, ``theta`` and the previous point."""
    like = next(iter(theta.values()))
    return {
        "eta": like.new_full((), eta0),
        "theta": like.new_full((), switches.theta0),
        "previous": tree.clone(theta),
    }


def measure(
    eta0: float,
    switches: Switches,
    persistent: bool,
    theta: Tree,
    gradient: Tree,
    state: State,
    oracle: Oracle,
) -> tuple[Tensor, Tensor, State]:
    """Compare two gradients of the batch, and return step, ascent and the new state.

    Parameters
    ----------
    eta0 : float
        With which a round begins, unless ``persistent``.
    switches : Switches
        Which form.
    persistent : bool
        Whether step and ratio of the last round go on.
    theta, gradient : Tree
        The point, and its gradient on the batch.
    state : dict
        What `begin` or the last call returned.
    oracle : Oracle
        Asked for the gradient at the previous point.

    Returns
    -------
    tuple of Tensor, Tensor and dict
        ``eta``, ``rho`` and the state.
    """
    first = oracle.step == 0
    # A round starts from a model that the server has moved: the point before it says nothing.
    previous = tree.where(first, theta, state["previous"])
    dw = tree.norm(tree.sub(theta, previous))
    dg = tree.norm(tree.sub(gradient, oracle.grad(previous)[0]))
    eta, ratio = state["eta"], state["theta"]
    if not persistent:
        eta = torch.where(first, torch.full_like(eta, eta0), eta)
        ratio = torch.where(first, torch.full_like(ratio, switches.theta0), ratio)
    eta, ratio, rho = switches.advance(eta, ratio, first, dw, dg)
    return eta, rho, {"eta": eta, "theta": ratio, "previous": tree.clone(theta)}


def check(rule: Any, presets: tuple[str, ...]) -> None:
    """Demand that the arguments of a rule with switches are within their ranges."""
    checks.one_of(rule, "preset", presets)
    checks.positive(rule, "eta0")
    checks.nonnegative(rule, "weight_decay")
    given = [f.name for f in dataclasses.fields(rule) if f.name in Switches._fields]
    for name in (k for k in given if getattr(rule, k) is not None):
        if name == "first":
            checks.one_of(rule, "first", ("eta0", "grow"))
        elif name == "damping":
            checks.positive(rule, "damping")
        elif name != "rho_lag":
            checks.nonnegative(rule, name)
    for name in ("eta0", *(k for k in given if k in ("damping", "growth", "eps"))):
        value = getattr(rule, name)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{type(rule).__name__}: {name} = {value!r} must be finite")


def chosen(rule: Any) -> Switches:
    """Return the switches of a rule: its own where they are not None, else those of its preset."""
    own = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule) if f.name in Switches._fields}
    return PRESETS[rule.preset]._replace(**{k: v for k, v in own.items() if v is not None})


def refuse_schedule(owner: object, inner: LocalRule) -> None:
    """Refuse to schedule the step of a rule that finds its own.

    Parameters
    ----------
    owner : object
        The schedule, for the message.
    inner : LocalRule
        What it wraps, at any depth.

    Raises
    ------
    ValueError
        If the rule, or one that it wraps, has an ``eta0``.
    """
    rule: Any = inner
    while dataclasses.is_dataclass(rule):
        fields = {f.name for f in dataclasses.fields(rule)}
        if "eta0" in fields:
            raise ValueError(
                f"{type(owner).__name__}: inner = {inner!r} must have a learning rate of its own; "
                f"{type(rule).__name__} adapts its step, which a schedule would spoil"
            )
        if "inner" not in fields:
            return
        rule = rule.inner  # type: ignore[attr-defined]
