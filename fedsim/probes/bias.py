"""Where centralised training of a linear model would have ended, and how far the federation stays from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedsim import checks
from fedsim.objectives import Exponential, Logistic, SquaredError
from fedsim.probes.base import Memory, Probe, Snapshot
from fedsim.probes.direction import is_due
from fedsim.probes.linear import check_step, matrix, need_linear, step_size, weights
from fedsim.step_sizes import features
from strategies import FedAvg, FedAvgM

if TYPE_CHECKING:
    from fedsim.experiment import Experiment
    from fedsim.federation import Federation


@dataclass(frozen=True)
class Bias(Probe):
    """Distance of a linear model from the limit of centralised gradient descent, on any data.

    Binary labels with `Logistic` or `Exponential`: the rows fall into a largest separable part and the rest; ``S`` is the span of the
    rest. Gradient descent tends to the rest's minimiser within ``S``, and orthogonally to ``S`` grows along the
    hard-margin direction of the separable part. Regression with `SquaredError`: the limit is the solution nearest to the initial
    model, which must fit all rows. Figures:

    * ``finite = |w_S - w*| / |w*|``, where the limit has a finite component ``w*``;
    * ``direction``, the cosine distance of the orthogonal part, where there is a separable part;
    * ``formula_error = |(w - w*) - b| / |w - w*|`` on data without a separable part, for L > 1 plain gradient steps: ``b`` is the
      bias of Local-GD to first order in the step size (`fedsim.analysis.separability.first_order_bias`).

    Parameters
    ----------
    per_decade : int
        0 measures every round; else so many rounds a decade, and the powers of 2.

    Raises
    ------
    ValueError
        If ``per_decade`` is negative; when a run begins, if the model is not linear or the objective another.

    References
    ----------
    Ji, Telgarsky (2018), Risk and parameter convergence of logistic regression, arXiv:1803.07300.
    """

    per_decade: int = 0

    def __post_init__(self) -> None:
        checks.at_least(self, 0, "per_decade")

    def begin(self, experiment: Experiment, federation: Federation) -> Memory:
        """Compute the limit.

        Parameters
        ----------
        experiment : Experiment
            The run.
        federation : Federation
            Its data and model.

        Returns
        -------
        dict of str to Tree
            The limit: ``finite``, ``basis`` of ``S``, ``direction``, and ``shift``, the bias to first order.

        Raises
        ------
        ValueError
            If there is no such limit, in one line.
        """
        from fedsim.analysis.max_margin import signed_rows
        from fedsim.analysis.projections import regression_limit
        from fedsim.analysis.separability import first_order_bias, mixed_limit

        need_linear(experiment, federation, ("binary", "regression"))
        if not isinstance(federation.objective, Logistic | Exponential | SquaredError):
            raise ValueError(
                f"objective = {experiment.objective!r} must be Logistic(), Exponential() or SquaredError()"
            )
        data, cuts = federation.dataset, federation.train.offsets[1:-1].numpy()
        x = features(federation, federation.theta)
        target = data.y[federation.train.order.to(data.y.device)].cpu().numpy()
        xs, ys = np.split(x, cuts), np.split(target, cuts)
        p = weights(experiment, federation)
        if isinstance(federation.objective, SquaredError):
            if data.task != "regression":
                raise ValueError("SquaredError() on labels has no limit known here; take Logistic()")
            start = matrix(federation.theta).flatten().cpu().numpy()
            known = {"finite": regression_limit(xs, ys, start), "basis": np.eye(x.shape[1])}
        else:
            nodes = np.split(signed_rows(x, target), cuts)
            loss = "exponential" if isinstance(federation.objective, Exponential) else "logistic"
            limit = mixed_limit(nodes, p, loss)
            known = {"finite": limit.finite, "basis": limit.basis}
            if limit.direction is not None:
                known["direction"] = limit.direction
            # Momentum on the server does not move the point at which the average of the rows is the model.
            eta, steps = step_size(experiment, federation, (FedAvg, FedAvgM)), experiment.local_steps
            if limit.direction is None and eta is not None and steps > 1 and experiment.batch_size == 0:
                known["shift"] = first_order_bias(nodes, limit.finite, eta, steps, p, loss)
        check_step(experiment, federation)
        return {"limit": {k: torch.from_numpy(v).to(data.x.device) for k, v in known.items()}}

    def measure(self, snapshot: Snapshot, memory: Memory) -> tuple[dict[str, float], Memory]:
        """Compare the model with the limit, where a measurement is due."""
        if not is_due(snapshot.round, self.per_decade):
            return {}, memory
        limit, w = memory["limit"], matrix(snapshot.model).flatten()
        inside = limit["basis"].T @ (limit["basis"] @ w)
        outside = w - inside
        figures = {}
        if len(limit["basis"]):
            error = inside - limit["finite"]
            figures["finite"] = (error.norm() / limit["finite"].norm()).item()
            if "shift" in limit:
                figures["formula_error"] = ((error - limit["shift"]).norm() / error.norm()).item()
        if "direction" in limit and outside.norm() > 0:
            gap = outside / outside.norm() - limit["direction"]
            figures["direction"] = 0.5 * gap.square().sum().item()
        return figures, memory
