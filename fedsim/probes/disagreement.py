"""How workers disagree at a sync, and how much of the dominant Hessian eigenspace their disagreement reveals."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedsim import checks, tree
from fedsim.gaps import Buffer, Gaps, Subspace, from_trees, gaps, push, subspace, to_trees
from fedsim.probes.base import Memory, Probe, Snapshot

if TYPE_CHECKING:
    from fedsim.analysis.hessian import TrainingLoss
    from fedsim.experiment import Experiment
    from fedsim.federation import Federation
    from fedsim.tree import Tree

RANDOM_DRAWS = 20
"""Random vectors behind ``capture_random``; one alone scatters by 30 %."""


@dataclass(frozen=True)
class Disagreement(Probe):
    """Gaps of the workers, ``x_m - sum_j p_j x_j`` after the local steps, and the subspace of the newest ``capacity``.

    Every round, with the weights ``p`` of the strategy:

    * ``gap_mean``, ``gap_max``: mean and largest ``|gap_m|``;
    * ``consensus = sqrt(sum_m p_m |gap_m|^2)``;
    * ``effective_rank`` and ``top``, the largest share, of the eigenvalues of ``sum_m p_m gap_m gap_m^T``;
    * ``rank``, the dimension q of the buffered gaps, and ``buffered_rounds`` they come from.

    Every ``hessian_every`` rounds, at the workers' average, with the gradient ``g`` and the ``k`` dominant eigenvectors
    ``U`` of the Hessian of the whole training loss (see `fedsim.analysis.disagreement`):

    * ``capture``, ``overlap``, ``suppression``, ``suppression_sq`` of the span of the gaps, and the mean and the largest
      principal angle in degrees, ``angle_mean`` and ``angle_max``;
    * ``capture_random``, the mean over random subspaces of the same dimension, about q / P as their overlap is too;
    * ``capture_gradients``, ``overlap_gradients``, ``suppression_gradients`` of the span of q + 1 minibatch gradients at the
      average less their mean, a strong rival that costs these gradients; left out for full gradients;
    * ``chi = |U^T g| / |g|``, and the same for the first worker's full gradient at its own row, ``chi_worker``, and for
      minibatch gradients on average, ``chi_minibatch``: both are far larger, as averaging removes sharp noise;
    * ``lam_1``, ``lam_k``, ``lam_next`` (the eigenvalue after the k-th: without a drop the subspace is arbitrary) and
      ``residual``, the largest ``|H u - lambda u| / |lambda|``;
    * ``eta_lam1_tau``, step size times largest eigenvalue times mean local steps: above about 5 a low capture is what
      theory says. Left out for local rules without ``lr``.

    Gaps are kept in the parameters' precision, 4 c P bytes for c gaps in float32; with ``sketch`` it is
    4 c sketch, and captures and overlaps are estimates with an error of about ``sqrt(2 / sketch)``, without angles and
    suppressions. A round takes O(M^2 P) for M workers. A comparison takes some 2 k + 20 Hessian products, q + 1
    minibatch gradients, and for a while some 20 q P + 8 k P bytes. Rows must reach the server; the training's random
    streams are left alone.

    Parameters
    ----------
    capacity : int
        Gaps c in the buffer, >= 1.
    hessian_every : int
        Rounds between comparisons with the Hessian, >= 0; 0 for none.
    k : int
        Dimension of the dominant space, >= 0; 0 for the number of classes.
    sketch : int
        Numbers kept of each gap, larger than the capacity; 0 to keep gaps whole.

    Raises
    ------
    ValueError
        If a value is outside its range.

    References
    ----------
    Dimlioglu, Topollai, Choromanska 2026, arXiv 2605.27739.
    """

    capacity: int = 128
    hessian_every: int = 0
    k: int = 0
    sketch: int = 0

    def __post_init__(self) -> None:
        checks.at_least(self, 1, "capacity")
        checks.nonnegative(self, "hessian_every", "k", "sketch")
        if 0 < self.sketch <= self.capacity:
            raise ValueError(
                f"Disagreement: sketch = {self.sketch} must be 0 or > capacity = {self.capacity}"
            )

    @property
    def needs_rows(self) -> bool:
        """Gaps are differences of rows."""
        return True

    def begin(self, experiment: Experiment, federation: Federation) -> Memory:
        """Remember step size, seed and batch size; refuse a dominant space as large as the model.

        Parameters
        ----------
        experiment : Experiment
            The run.
        federation : Federation
            Its data and model.

        Returns
        -------
        dict of str to Tree
            The memory.

        Raises
        ------
        ValueError
            If ``k`` does not fit the model.
        """
        k, size = self._dimension(federation), tree.num_parameters(federation.theta)
        if self.hessian_every and k >= size:
            raise ValueError(f"Disagreement: k = {k} must be < {size}, the number of parameters")
        lr = _learning_rate(experiment.parts.client)
        settings = {
            "lr": torch.tensor(lr, dtype=torch.float64),
            "seed": torch.tensor(experiment.seed),
            "batch": torch.tensor(experiment.batch_size),
        }
        return {"settings": settings}

    def measure(self, snapshot: Snapshot, memory: Memory) -> tuple[dict[str, float], Memory]:
        """Return the figures of the round, and the memory with its gaps."""
        from fedsim.analysis import disagreement as D

        weight, seed = snapshot.told.weight, int(memory["settings"]["seed"])
        new = gaps(snapshot.rows, weight)
        eigenvalues, norms = D.spectrum(new), new.gram.diagonal().sqrt()
        figures = {
            "gap_mean": norms.mean().item(),
            "gap_max": norms.max().item(),
            "consensus": D.consensus_distance(new),
            "effective_rank": D.effective_rank(eigenvalues),
            "top": (eigenvalues[0] / eigenvalues.sum()).item() if eigenvalues[0] > 0 else 0.0,
        }
        if self.sketch:
            new = new._replace(values=D.sketch(new.values, self.sketch, seed))
        buffer = push(from_trees(memory), new, snapshot.round, snapshot.told.worker, self.capacity)
        figures |= {"rank": float(buffer.rank), "buffered_rounds": float(buffer.num_rounds)}
        if self.hessian_every and snapshot.round % self.hessian_every == 0 and buffer.rank:
            figures |= self._compare(snapshot, buffer, new, memory)
        return figures, {"settings": memory["settings"]} | to_trees(buffer)

    def _compare(self, snapshot: Snapshot, buffer: Buffer, new: Gaps, memory: Memory) -> dict[str, float]:
        from fedsim.analysis import disagreement as D
        from fedsim.analysis.hessian import dominant

        seed, batch = (int(memory["settings"][k]) for k in ("seed", "batch"))
        problem, theta = training_loss(snapshot.federation), average(snapshot, new.weight)
        gradient, _ = problem.gradient(theta)
        k = self._dimension(snapshot.federation)
        pairs = dominant(problem, theta, k, seed=seed)
        vectors, found = pairs.vectors.to(gradient.device), subspace(buffer)
        figures = {
            "capture_random": D.random_capture(found, RANDOM_DRAWS, seed, snapshot.round),
            "chi": D.chi(gradient, vectors),
            "chi_worker": D.chi(problem.gradient(tree.take(snapshot.rows, 0))[0], vectors),
            "lam_1": pairs.values[0].item(),
            "lam_k": pairs.values[k - 1].item(),
            "lam_next": pairs.values[k].item(),
            "residual": pairs.residuals.max().item(),
        }
        inside = torch.cat([(vectors @ (vectors.T @ gradient))[None], vectors.T])

        def against(span: Subspace, suffix: str = "") -> dict[str, float]:
            if self.sketch:
                small = D.sketch(inside, self.sketch, seed)
                captured, overlap = D.sketched_capture(small[0], small[1:], span)
                return {f"capture{suffix}": captured, f"overlap{suffix}": overlap}
            whole = D.capture(gradient, vectors, span)
            names = ("capture", "overlap", "suppression", *(() if suffix else ("suppression_sq",)))
            angles = {} if suffix else _degrees(whole.angles)
            return {f"{name}{suffix}": getattr(whole, name) for name in names} | angles

        figures |= against(found)
        if batch:
            rivals = D.minibatch_gradients(
                problem, theta, batch, found.rank + 1, seed, snapshot.round, self.sketch
            )
            figures |= against(D.span_of_centred(rivals), "_gradients")
            some = D.minibatch_gradients(problem, theta, batch, RANDOM_DRAWS, seed, snapshot.round)
            figures["chi_minibatch"] = sum(D.chi(v, vectors) for v in some) / len(some)
        tau = snapshot.report.steps.double().mean()
        scale = (memory["settings"]["lr"].cpu() * pairs.values[0] * tau).item()
        return figures if math.isnan(scale) else figures | {"eta_lam1_tau": scale}

    def _dimension(self, federation: Federation) -> int:
        return self.k or federation.dataset.num_outputs


def _degrees(angles: Tensor) -> dict[str, float]:
    degrees = angles.rad2deg()
    return {"angle_mean": degrees.mean().item(), "angle_max": degrees.max().item()}


def training_loss(federation: Federation) -> TrainingLoss:
    """Return the loss over all rows that any worker trains on, each once."""
    from fedsim.analysis.hessian import TrainingLoss

    x, y = federation.dataset.x, federation.dataset.y
    rows = federation.train.order.unique()
    if len(rows) < len(x):
        rows = rows.to(x.device)
        x, y = x[rows], y[rows]
    return TrainingLoss(federation.module, federation.objective, x, y)


def average(snapshot: Snapshot, weight: Tensor) -> Tree:
    """Return the weighted mean of a round's rows, computed in float64, in the rows' precision."""
    rows = next(iter(snapshot.rows.values()))
    p = weight.to(rows.device)
    return tree.tree_map(lambda x: torch.tensordot(p, x.double(), 1).to(x.dtype), snapshot.rows)


def _learning_rate(rule: Any) -> float:
    """Return the ``lr`` of a local rule or of the rule that it wraps; NaN if there is none."""
    fields = {f.name for f in dataclasses.fields(rule)} if dataclasses.is_dataclass(rule) else set()
    if "lr" in fields:
        return float(rule.lr)  # type: ignore[attr-defined]
    return _learning_rate(rule.inner) if "inner" in fields else math.nan  # type: ignore[attr-defined]
