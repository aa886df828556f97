"""Which separating direction an averaged linear model approaches, against the certified hard-margin solution."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from clients import Projection
from fedsim import checks
from fedsim.probes.base import Memory, Probe, Snapshot
from fedsim.probes.linear import (
    check_step,
    matrix,
    need_linear,
    row_weights,
    scores,
    step_size,
)
from fedsim.step_sizes import features

if TYPE_CHECKING:
    from fedsim.analysis.max_margin import MaxMargin
    from fedsim.experiment import Experiment
    from fedsim.federation import Federation


def is_due(round: int, per_decade: int) -> bool:
    """Say whether a probe measures: every round (0), else about ``per_decade`` rounds a decade and powers of 2.

    Parameters
    ----------
    round : int
        From 1.
    per_decade : int
        >= 0.

    Returns
    -------
    bool
        Whether it is due.

    Examples
    --------
    >>> [k for k in range(1, 200) if is_due(k, 2)]
    [1, 2, 4, 8, 10, 16, 32, 64, 100, 128]
    """
    if per_decade == 0 or round & (round - 1) == 0:
        return True
    return math.floor(per_decade * math.log10(round)) > math.floor(per_decade * math.log10(round - 1))


@dataclass(frozen=True)
class Direction(Probe):
    """Distance of a linear classifier from the hard-margin solution of all workers' rows together.

    ``w_hat = argmin |w|`` subject to ``y_j x_j . w >= 1`` for every training row j of every worker, solved once with a
    certificate (`fedsim.analysis.max_margin`), and ``gamma = 1 / |w_hat|``. With C > 2 classes a row is ``x_j`` for
    class ``y_j`` minus ``x_j`` for a rival class, for each rival, and ``w`` is the matrix as one vector. A bias counts as the weight
    of a feature 1. Figures after k rounds of L steps of size eta, ``t = eta L k``:

    * ``cosine_distance = |w / |w| - w_hat / |w_hat||^2 / 2``, ``angle`` in radians;
    * ``margin = min_j y_j x_j . w / |w|``, ``margin_ratio = margin / gamma <= 1``, ``margin_gap = 1 - margin_ratio``,
      which is never below the cosine distance;
    * ``norm = |w|``; ``loss = F(w)``, weighted as the strategy averages;
    * ``relative_error = |w - w_hat| / |w_hat|`` of the client ``Projection()``, whose limit has a length;
    * ``time = t`` and ``invariant = F(w) t gamma^2`` where workers take plain gradient steps and the server averages;
    * at rounds 2, 4, 8, ...: ``slope_ratio = |w^k - w^{k/2}| / (log 2 |w_hat|)``, ``norm_growth``, the same for the
      difference of norms, and ``loss_exponent = -log2(F(w^k) / F(w^{k/2}))``;
    * with ``pairs``, for classes a and b: ``pair.a-b = min_{j: y_j = a} (W_a - W_b) . x_j / |W_a - W_b|``.

    On separable data invariant, slope ratio, norm growth and loss exponent tend to 1, and the cosine distance falls
    like ``1 / log^2 t`` only.

    Parameters
    ----------
    per_decade : int
        0 measures every round; else so many rounds a decade, and the powers of 2.
    pairs : bool
        Whether to add the margins of all ordered pairs of classes.

    Raises
    ------
    ValueError
        If ``per_decade`` is negative; when a run begins, if the model is not linear or the rows are not separable.

    References
    ----------
    Soudry, Hoffer, Nacson, Gunasekar, Srebro (2018), The implicit bias of gradient descent on separable data,
    arXiv:1710.10345. Zhu, Vardhan, Mazumdar (2024), arXiv:2412.07971, for Local-GD.
    """

    per_decade: int = 0
    pairs: bool = False

    def __post_init__(self) -> None:
        checks.at_least(self, 0, "per_decade")

    def begin(self, experiment: Experiment, federation: Federation) -> Memory:
        """Solve the hard-margin problem, and warn if the learning rate is beyond the stability bound.

        Parameters
        ----------
        experiment : Experiment
            The run.
        federation : Federation
            Its data and model.

        Returns
        -------
        dict of str to Tree
            The reference.

        Raises
        ------
        ValueError
            If there is no such direction, in one line that says why.
        """
        need_linear(experiment, federation, ("binary", "classes"))
        data, model = federation.dataset, federation.theta
        rows = federation.train.order.to(data.y.device)
        x, y = features(federation, model), data.y[rows].cpu().numpy()
        answer = reference(x, y, data.num_outputs, federation.train.order.numpy())
        check_step(experiment, federation)
        eta = step_size(experiment, federation)
        known = {
            "w": torch.from_numpy(answer.w_hat),
            "share": torch.from_numpy(row_weights(experiment, federation)),
            "rows": federation.train.order,
            "eta": torch.tensor(math.nan if eta is None else eta, dtype=torch.float64),
            "projected": torch.tensor(isinstance(experiment.parts.client, Projection)),
        }
        if torch.equal(known["rows"], torch.arange(len(data.y))):
            del known["rows"]  # all rows in their order: nothing has to be gathered
        return {"reference": {k: v.to(data.x.device) for k, v in known.items()}}

    def measure(self, snapshot: Snapshot, memory: Memory) -> tuple[dict[str, float], Memory]:
        """Compare the model with the reference, where a measurement is due."""
        k = snapshot.round
        if not is_due(k, self.per_decade):
            return {}, memory
        known, federation = memory["reference"], snapshot.federation
        rows, y = known.get("rows"), federation.dataset.y
        y = y if rows is None else y[rows]
        w = matrix(snapshot.model)
        output = scores(federation, w, rows)
        # A sum, as a dot product may depend on where memory begins, and so on whether a run was resumed.
        loss = (federation.objective.loss(output, y).double() * known["share"]).sum().item()
        v, w_hat = w.flatten().cpu().numpy(), known["w"].cpu().numpy()
        size, length = _norm(v), _norm(w_hat)
        figures = {"norm": size, "loss": loss}
        if known["projected"]:
            figures["relative_error"] = _norm(v - w_hat) / length
        if size > 0:
            distance = 0.5 * _norm(v / size - w_hat / length) ** 2
            least = margins(output, y).min().item() / size
            figures |= {
                "cosine_distance": distance,
                "angle": 2 * math.asin(min(1.0, math.sqrt(distance / 2))),
                "margin": least,
                "margin_ratio": least * length,
                "margin_gap": 1 - least * length,
            }
        time = known["eta"].item() * snapshot.clock.local_steps / len(snapshot.report.worker)
        if not math.isnan(time):
            figures |= {"time": time, "invariant": loss * time / length**2}
        if self.pairs and len(w) > 1:
            figures |= _pairs(w, output, y)
        if k & (k - 1) == 0:
            half = memory.get("half")
            if half is not None:
                before = half["w"].cpu().numpy()
                grown, moved = size - _norm(before), _norm(v - before)
                figures["slope_ratio"] = moved / (math.log(2) * length)
                figures["norm_growth"] = grown / (math.log(2) * length)
                if loss > 0:
                    figures["loss_exponent"] = -math.log2(loss / half["loss"].item())
            memory = memory | {"half": {"w": w.flatten(), "loss": torch.tensor(loss, dtype=torch.float64)}}
        return figures, memory


def reference(x: np.ndarray, y: np.ndarray, num_outputs: int, names: np.ndarray) -> MaxMargin:
    """Solve the hard-margin problem of labelled rows, or say in one line why there is none.

    Parameters
    ----------
    x : ndarray
        ``[N, d]``.
    y : ndarray
        ``[N]``, labels 0, 1, ...
    num_outputs : int
        1 for two classes and one output, else the number of classes.
    names : ndarray
        ``[N]``, numbers of the rows for messages.

    Returns
    -------
    MaxMargin
        Its status is "separable".

    Raises
    ------
    ValueError
        If a feature is not finite, all labels are equal or the rows are not separable.
    """
    from fedsim.analysis.max_margin import max_margin
    from fedsim.analysis.multiclass import multiclass_max_margin

    bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if len(bad):
        raise ValueError(f"row {names[bad[0]]} has a feature that is NaN or infinite")
    if len(np.unique(y)) < 2:
        raise ValueError(f"all {len(y)} training rows have label {y[0]}; a direction needs two classes")
    zero = np.flatnonzero(~x.any(axis=1))
    if len(zero):
        raise ValueError(f"row {names[zero[0]]} is zero, no direction separates it; drop such rows")
    answer = max_margin(x, y) if num_outputs == 1 else multiclass_max_margin(x, y, num_outputs)
    if answer.status != "separable":
        said = answer.status.replace("_", "-")
        twins = _contradiction(x, y, names)
        raise ValueError(
            f"the training rows are {said}: {twins or answer.reason}; Direction() needs separable rows, "
            "Bias() takes any"
        )
    if not answer.certified:
        warnings.warn(
            f"the hard-margin reference is not certified: margin {answer.gamma:.3g}, relative width {answer.width:.1e}",
            stacklevel=2,
        )
    return answer


def _contradiction(x: np.ndarray, y: np.ndarray, names: np.ndarray) -> str:
    """Name two equal rows with different labels, if there are any."""
    seen: dict[bytes, int] = {}
    for j, row in enumerate(x + 0.0):
        i = seen.setdefault(row.tobytes(), j)
        if y[i] != y[j]:
            return f"rows {names[i]} and {names[j]} are one point with contradicting labels"
    return ""


def margins(output: Tensor, y: Tensor) -> Tensor:
    """Return the output of the label minus that of the best rival, ``[N]``; of one output, its signed value."""
    if output.shape[1] == 1:
        return output[:, 0] * (2 * y - 1)
    own = output.gather(1, y[:, None])
    return (own - output.scatter(1, y[:, None], -math.inf).amax(1, keepdim=True)).squeeze(1)


def _norm(v: np.ndarray) -> float:
    return math.sqrt(float(np.square(v).sum()))


def _pairs(w: Tensor, output: Tensor, y: Tensor) -> dict[str, float]:
    figures = {}
    for a in range(len(w)):
        own = output[y == a]
        for b in range(len(w)):
            distance = (w[a] - w[b]).norm().item()
            if a != b and len(own) and distance > 0:
                figures[f"pair.{a}-{b}"] = (own[:, a] - own[:, b]).min().item() / distance
    return figures
