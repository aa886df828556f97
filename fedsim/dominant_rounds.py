"""Training inside or outside of the dominant Hessian eigenspace: Dom-SGD and Bulk-SGD for a federation."""

from __future__ import annotations

from collections.abc import Iterator

from fedsim import tree
from fedsim.analysis.hessian import dominant
from fedsim.carriers import InProcess
from fedsim.experiment import BadInput, Experiment
from fedsim.federation import Federation, load
from fedsim.probes import Snapshot
from fedsim.probes.disagreement import training_loss
from fedsim.simulate import Position, rounds, start
from fedsim.tree import Tree


def dominant_rounds(
    experiment: Experiment,
    k: int,
    *,
    federation: Federation | None = None,
    warm_up: int = 0,
    position: Position | None = None,
) -> Iterator[tuple[Snapshot, Position]]:
    """Run an experiment whose workers receive, each round, the k dominant eigenvectors of the Hessian.

    The experiment's client is ``Filtered(..., keep=True)`` for Dom-SGD, ``theta <- theta - eta U U^T g``, or
    ``Filtered(...)`` for Bulk-SGD, ``theta <- theta - eta (I - U U^T) g``. U belongs to the Hessian of the whole training
    loss at the model that is sent, so it is renewed once a round, where the original does it every step; some
    2 k + 20 Hessian products a round, and k P numbers more in every broadcast.

    Parameters
    ----------
    experiment : Experiment
        The run; its strategy keeps no rows at the workers.
    k : int
        Dimension of the dominant space, >= 1.
    federation : Federation or None
        Data and model, loaded if None.
    warm_up : int
        Rounds without a filter, >= 0.
    position : Position or None
        Where to go on; the start if None.

    Yields
    ------
    tuple of Snapshot and Position
        As `fedsim.rounds` yields them.

    Raises
    ------
    BadInput
        If the strategy keeps rows.

    References
    ----------
    Song, Ahn, Yun 2024, arXiv 2405.16002.
    """
    if experiment.parts.strategy.keeps_rows:
        raise BadInput(f"strategy = {experiment.strategy!r}: its workers do not start from one model")
    federation = load(experiment) if federation is None else federation
    carrier = InProcess(experiment, federation)
    problem = training_loss(federation)
    position = start(experiment, federation) if position is None else position
    while position.round < experiment.rounds:
        model = position.broadcast["model"]
        basis = tree.tree_map(lambda x: x.new_zeros(0, *x.shape), model)
        if position.round >= warm_up:
            u = dominant(problem, model, k, seed=experiment.seed).vectors
            basis = _like(tree.unflatten(u.T.contiguous(), model), model)
        position = position._replace(broadcast=position.broadcast | {"basis": basis})
        snapshot, position = next(rounds(experiment, federation, carrier, position))
        yield snapshot, position


def _like(a: Tree, b: Tree) -> Tree:
    """Move a tree to the types and devices of another."""
    return tree.tree_map(lambda x, y: x.to(y).contiguous(), a, b)
