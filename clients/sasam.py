"""SA-SAM: sharpness-aware steps whose ascent and descent both follow the local smoothness."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from clients.adaptive_sgd import First, Switches, begin, check, chosen, measure
from clients.base import LocalRule, Oracle, State, Told, told
from clients.sam import ascend
from fedsim import tree
from fedsim.tree import Tree

FAITHFUL = ("transcription", "released")
"""Presets that follow the method as it was published, in writing and in code."""

SMALL = 100_000
"""Parameters below which the faithful presets are known to collapse; seen up to 20,000, the threshold is ours."""


@dataclass(frozen=True)
class SASAM:
    """Sharpness-aware steps of adaptive radius and length (SA-SAM).

    With the step ``eta_t`` of `AdaptiveSGD`, from gradients at unperturbed points, and
    ``rho_t = min(rho_max, rho_scale sqrt(eta_t))``, or of ``eta_{t-1}`` with ``rho_lag``:
    ``w_{t+1} = w_t - eta_t (grad(w_t + rho_t g_t / (|g_t| + norm_eps)) + weight_decay w_t)``. Three gradients a step, all on the
    same batch. Rounds begin again, or go on with ``persistent``, as in `AdaptiveSGD`. Switches left at None are those of the preset:

    ============= ======= ====== ====== ===== ===== ======= ========
    preset        damping growth theta0 eps   first rho_max rho of
    ============= ======= ====== ====== ===== ===== ======= ========
    safe          2       0.02   inf    0     eta0  0.2     eta_t
    federated     2       0.1    1      0     eta0  0.2     eta_t
    transcription 2       1      inf    0     eta0  inf     eta_t
    released      1       0.02   1      1e-8  grow  inf     eta_{t-1}
    ============= ======= ====== ====== ===== ===== ======= ========

    with ``rho_scale = 1``, and ``norm_eps`` of 1e-12, 1e-12, 0 and 1e-8. ``transcription`` and ``released`` are the faithful
    forms, the algorithm as it is written and the authors' code, which differ. On small networks both collapse: long steps lead to
    a large ascent, where the network is flattened, so that steps grow further; they warn below 100,000 parameters.
    ``safe``, the default, and ``federated`` are ours. Fed-SA-SAM is ``SASAM(preset='federated')`` under
    ``strategy = "FedAvg()"``, a combination of ours too.

    Parameters
    ----------
    eta0 : float
        The first step, > 0.
    preset : {"safe", "federated", "transcription", "released"}
        Which form.
    damping, growth, theta0, eps, first, rho_scale, rho_max, rho_lag, norm_eps : float, {"eta0", "grow"}, bool or None
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
    Naganuma, Kim, Kyrillidis, Mitliagkas (2024), Smoothness-adaptive sharpness-aware minimization for finding flatter
    minima, ICLR 2024 workshop.
    """

    eta0: float = 0.2
    preset: str = "safe"
    damping: float | None = None
    growth: float | None = None
    theta0: float | None = None
    eps: float | None = None
    first: First | None = None
    rho_scale: float | None = None
    rho_max: float | None = None
    rho_lag: bool | None = None
    norm_eps: float | None = None
    weight_decay: float = 0.0
    persistent: bool = False

    def __post_init__(self) -> None:
        check(self, ("safe", "federated", *FAITHFUL))

    @property
    def switches(self) -> Switches:
        """All switches: those given, and the preset's."""
        return chosen(self)

    def init(self, theta: Tree) -> State:
        """Start at ``eta0`` and ``theta0``."""
        return begin(self.eta0, self.switches, theta)

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Climb, and make a step from below with the gradient of above."""
        gradient, loss = oracle.grad(theta)
        eta, rho, new = measure(self.eta0, self.switches, self.persistent, theta, gradient, state, oracle)
        uphill, _ = oracle.grad(ascend(theta, gradient, rho, self.switches.norm_eps))
        if self.weight_decay:
            uphill = tree.axpy(self.weight_decay, theta, uphill)
        return tree.axpy(-eta, uphill, theta), new, told(loss, gradients=3)


def collapses(rule: LocalRule, parameters: int) -> str:
    """Say why a rule is known to fail on so small a model, or nothing.

    Parameters
    ----------
    rule : LocalRule
        The rule; those that it wraps are looked at too.
    parameters : int
        Entries of the model.

    Returns
    -------
    str
        One line, empty if nothing is known.
    """
    each: Any = rule
    while dataclasses.is_dataclass(each):
        if isinstance(each, SASAM):
            if each.preset not in FAITHFUL or parameters >= SMALL:
                return ""
            return (
                f"SASAM(preset={each.preset!r}) is known to collapse on small models, and this one has {parameters:,} "
                f"parameters (< {SMALL:,}): the network is flattened and steps grow without bound; preset = 'safe' "
                f"trains ({', '.join(f'{k} = {v}' for k, v in each.switches._asdict().items())})"
            )
        each = each.inner if "inner" in {f.name for f in dataclasses.fields(each)} else None  # type: ignore[attr-defined]
    return ""
