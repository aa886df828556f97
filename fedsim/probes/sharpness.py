"""How flat the loss is around the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fedsim import checks, random
from fedsim.probes.base import Memory, Probe, Snapshot
from fedsim.probes.disagreement import training_loss

if TYPE_CHECKING:
    from fedsim.experiment import Experiment
    from fedsim.federation import Federation


@dataclass(frozen=True)
class Sharpness(Probe):
    """Top eigenvalue and trace of the training loss's Hessian, and how much the loss rises within a radius.

    Every ``every`` rounds, at the model that is evaluated, on the mean loss over ``rows`` training rows of all workers, the same in
    all rounds:

    * ``loss`` and ``gradient_norm``, without which the others say little: with cross-entropy the Hessian shrinks with
      the loss;
    * ``lambda_max``, the largest algebraic eigenvalue, by power iteration up to a relative change of 1e-4 or
      100 products, and ``products``, how many it took;
    * ``trace``, the mean of ``probes`` products with random signs, and its standard error ``trace_error``;
    * ``rise = L(w + rho g / |g|) - L(w)``, and ``m_sharpness``, its mean over groups of ``m`` rows, each with its own gradient.

    Parameters
    ----------
    every : int
        Rounds between measurements, >= 1.
    rows : int
        Rows, drawn once from all training rows, >= 0; 0 for all.
    rho : float
        Radius, > 0.
    m : int
        Rows of a group, >= 1.
    probes : int
        Products for the trace, >= 2.

    Raises
    ------
    ValueError
        If a value is outside its range.

    References
    ----------
    Foret, Kleiner, Mobahi, Neyshabur (2021), Sharpness-aware minimization, arXiv:2010.01412. Hutchinson (1989), A
    stochastic estimator of the trace of the influence matrix.
    """

    every: int = 10
    rows: int = 1024
    rho: float = 0.05
    m: int = 32
    probes: int = 20

    def __post_init__(self) -> None:
        checks.at_least(self, 1, "every", "m")
        checks.at_least(self, 2, "probes")
        checks.nonnegative(self, "rows")
        checks.positive(self, "rho")

    def begin(self, experiment: Experiment, federation: Federation) -> Memory:
        """Remember the seed."""
        return {"settings": {"seed": torch.tensor(experiment.seed)}}

    def measure(self, snapshot: Snapshot, memory: Memory) -> tuple[dict[str, float], Memory]:
        """Return the figures, where a measurement is due."""
        if snapshot.round % self.every:
            return {}, memory
        from fedsim.analysis.hessian import trace
        from fedsim.analysis.sharpness import m_sharpness, top_eigenvalue

        seed, theta, problem = (
            int(memory["settings"]["seed"]),
            snapshot.model,
            training_loss(snapshot.federation),
        )
        if 0 < self.rows < len(problem.x):
            order = torch.randperm(len(problem.x), generator=random.torch_generator(seed, "sharpness"))
            some = order[: self.rows].to(problem.x.device)
            problem = problem._replace(x=problem.x[some], y=problem.y[some])
        gradient, loss = problem.gradient(theta)
        top = top_eigenvalue(problem, theta, seed=seed)
        mean, error = trace(problem, theta, self.probes, seed=seed)
        return {
            "loss": loss,
            "gradient_norm": gradient.norm().item(),
            "lambda_max": top.value,
            "products": float(top.products),
            "trace": mean,
            "trace_error": error,
            "rise": m_sharpness(problem, theta, self.rho),
            "m_sharpness": m_sharpness(problem, theta, self.rho, self.m),
        }, memory
