"""The normalised margin of homogeneous networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.func import functional_call

from fedsim import checks, tree
from fedsim.models import MLP, Linear
from fedsim.probes.base import Memory, Probe, Snapshot
from fedsim.probes.direction import is_due, margins

if TYPE_CHECKING:
    from fedsim.experiment import Experiment
    from fedsim.federation import Federation

ROWS = 8192
"""Rows evaluated at a time."""


@dataclass(frozen=True)
class NormalisedMargin(Probe):
    """Smallest margin of a homogeneous network, ``min_j q_j(theta) / |theta|^D``.

    ``q_j`` is the output of the label of training row j minus that of its best rival (of one output, the signed output), and D the
    degree of homogeneity, ``f(c theta) = c^D f(theta)``: the number of layers of a chain of ReLU or identity
    layers without biases.

    What is proven: for *one* learner with logistic, exponential or cross-entropy loss, once the loss is small enough,
    gradient flow never lowers a smoothed version of this margin, and the limit directions of ``theta`` satisfy the
    first-order conditions of its maximisation (Lyu and Li 2020). For D > 1 that is not a maximum, let alone a global
    one. What is not: anything about the *average* of networks that workers trained apart. Averaging does not commute with
    D > 1, so the figure may fall at a sync; it is a measurement.

    Figures: ``value``, and ``norm``, ``|theta|``.

    Parameters
    ----------
    per_decade : int
        0 measures every round; else so many rounds a decade, and the powers of 2.

    Raises
    ------
    ValueError
        If ``per_decade`` is negative; when a run begins, if the model is not homogeneous.

    References
    ----------
    Lyu, Li (2020), Gradient descent maximizes the margin of homogeneous neural networks, arXiv:1906.05890.
    """

    per_decade: int = 0

    def __post_init__(self) -> None:
        checks.at_least(self, 0, "per_decade")

    def begin(self, experiment: Experiment, federation: Federation) -> Memory:
        """Find the degree.

        Parameters
        ----------
        experiment : Experiment
            The run.
        federation : Federation
            Its data and model.

        Returns
        -------
        dict of str to Tree
            The degree.

        Raises
        ------
        ValueError
            If the model is not homogeneous or the task knows no margin.
        """
        model = experiment.parts.model
        hidden = model.hidden if isinstance(model, MLP) else ()
        bent = isinstance(model, MLP) and model.activation not in ("relu", "identity")
        if not isinstance(model, MLP | Linear) or model.bias or bent:
            raise ValueError(
                f"model = {experiment.model!r} must be homogeneous: Linear or MLP with bias=False and activation "
                "'relu' or 'identity'"
            )
        if federation.dataset.task not in ("binary", "classes"):
            raise ValueError(f"the task {federation.dataset.task!r} of the data knows no margin")
        return {"model": {"degree": torch.tensor(len(hidden) + 1)}}

    def measure(self, snapshot: Snapshot, memory: Memory) -> tuple[dict[str, float], Memory]:
        """Evaluate all training rows, where a measurement is due."""
        if not is_due(snapshot.round, self.per_decade):
            return {}, memory
        federation, model = snapshot.federation, snapshot.model
        norm = tree.norm(tree.tree_map(torch.Tensor.double, model)).item()
        least = []
        with torch.no_grad():
            for rows in federation.train.order.to(federation.dataset.x.device).split(ROWS):
                output = functional_call(federation.module, model, (federation.dataset.x[rows],))
                least.append(margins(output.double(), federation.dataset.y[rows]).min().item())
        degree = int(memory["model"]["degree"])
        return {"value": min(least) / norm**degree if norm > 0 else 0.0, "norm": norm}, memory
