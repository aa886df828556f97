"""How each round moves towards the point where an earlier run ended."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedsim import tree
from fedsim.probes.base import Memory, Probe, Snapshot
from fedsim.stored import read_tree

if TYPE_CHECKING:
    from fedsim.experiment import Experiment
    from fedsim.federation import Federation
    from fedsim.tree import Tree


@dataclass(frozen=True)
class Geometry(Probe):
    """Secant inequality, error bound and their cosine of each round, against the end point of an earlier run.

    With the same experiment as that of ``reference``, but for its probes, this is a second, identical run with its end
    point known: ``distance`` ends at 0. With ``w`` the model before the round, ``w*`` the end point, ``d_k`` how far
    worker k moves from its row, and ``D = sum_k p_k d_k``:

    * ``rsi = <D, w - w*> / |w - w*|^2``, ``eb = |D| / |w - w*|`` and ``gamma = rsi / eb``, the cosine of ``-D`` and the
      way to the end;
    * ``lr = rsi / eb^2``, the server learning rate that would have come nearest, an oracle;
    * ``gamma_update``, the same cosine of the step that the server made of it;
    * ``agreement = |D| / sum_k p_k |d_k|``, 1 where all workers move the same way;
    * ``distance = |w+ - w*|`` after the round.

    A positive gamma alone proves nothing, as a random walk has one too. So there are always two controls: ``null = 1 /
    sqrt(R - r)``, that of independent equal steps before the r + 1st of R rounds, and ``gamma_other``, gamma against the
    end of another run. The last round is left out, where gamma is 1. Single rows must reach the server. `fedsim geometry`
    also looks at local steps, and finds its controls itself.

    Parameters
    ----------
    reference : str
        Run directory of the same experiment, or a ``model.safetensors``.
    other : str
        Run directory, or a ``model.safetensors``, of a run from another start, for instance with another seed.

    Raises
    ------
    ValueError
        When a run begins, if there is no such model, or it is not of this run's shape.

    References
    ----------
    Guille-Escuret, Naganuma, Fatras, Mitliagkas (2024), No Wrong Turns, arXiv:2306.11922.
    """

    reference: str
    other: str

    @property
    def needs_rows(self) -> bool:
        """Displacements of single workers are compared."""
        return True

    def begin(self, experiment: Experiment, federation: Federation) -> Memory:
        """Read the end points, and refuse those of another model."""
        theta = federation.theta
        return {
            "reference": _read("reference", self.reference, theta),
            "other": _read("other", self.other, theta),
            "model": theta,
            "settings": {"rounds": torch.tensor(experiment.rounds)},
        }

    def measure(self, snapshot: Snapshot, memory: Memory) -> tuple[dict[str, float], Memory]:
        """Compare the round with the way to both end points."""
        end = memory["reference"]
        before, after, other = (_flat(x, end) for x in (memory["model"], snapshot.model, memory["other"]))
        way, other = before - _flat(end, end), before - other
        figures = {"distance": (after - _flat(end, end)).norm().item()}
        remembered = memory | {"model": snapshot.model}
        left = int(memory["settings"]["rounds"]) - snapshot.round + 1
        if left <= 1:
            return figures, remembered
        began = snapshot.sent["model"] if snapshot.before is None else snapshot.before
        apart = [began[k].double() - snapshot.rows[k].double() for k in end]
        moved = torch.cat([x.reshape(len(x), -1) for x in apart], dim=1)
        p = (snapshot.told.weight / snapshot.told.weight.sum()).to(moved.device)
        proposed, length = p @ moved, (p @ moved.norm(dim=1)).item()
        dot, norm, distance = (proposed @ way).item(), proposed.norm().item(), way.norm().item()
        if distance > 0:
            figures |= {"rsi": dot / distance**2, "eb": norm / distance}
        if norm > 0:
            figures |= {"lr": dot / norm**2, "agreement": norm / length}
        cosines = {
            "gamma": _cosine(proposed, way),
            "gamma_update": _cosine(before - after, way),
            "gamma_other": _cosine(proposed, other),
            "null": 1 / math.sqrt(left),
        }
        return figures | {k: x for k, x in cosines.items() if not math.isnan(x)}, remembered


def _flat(theta: Tree, like: Tree) -> Tensor:
    """Join all leaves in the order of another tree, in float64."""
    return tree.flatten({k: theta[k].double() for k in like})


def _cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of two vectors, NaN where one is 0."""
    return (a @ b / (a.norm() * b.norm())).item()


def _read(name: str, path: str, theta: Tree) -> Tree:
    """Read a model in the order of ``theta``, and say in one line if it is not one of this run."""
    file = Path(path) if path.endswith(".safetensors") else Path(path) / "model.safetensors"
    if not file.exists():
        raise ValueError(f"Geometry: {name} = {path!r} must be a finished run: there is no {file}")
    try:
        found = read_tree(file)
    except ValueError as error:
        raise ValueError(f"Geometry: {name} = {path!r}: {error}") from None
    shapes = [{k: tuple(x.shape) for k, x in model.items()} for model in (found, theta)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"Geometry: {name} = {path!r} has other parameters than this run's model")
    return {k: found[k].to(x.device, x.dtype) for k, x in theta.items()}
