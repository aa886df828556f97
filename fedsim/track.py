"""Live curves: the figures of every round for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fedsim.experiment import BadInput, Experiment
from fedsim.runs import Progress

if TYPE_CHECKING:
    from fedsim.probes import Snapshot

FOLDER = "tensorboard"


@contextmanager
def tracking(name: str, path: Path, also: Progress) -> Iterator[Progress]:
    """Write the figures of every round as scalars, besides what else follows a run.

    Parameters
    ----------
    name : str
        ``tensorboard``, or empty to write nothing.
    path : Path
        Run directory; the curves are in its folder ``tensorboard``.
    also : callable
        Called first.

    Yields
    ------
    callable
        To be called after every round with the snapshot and the experiment.

    Raises
    ------
    BadInput
        If the name is unknown or TensorBoard is not installed.
    """
    if not name:
        yield also
        return
    if name != "tensorboard":
        raise BadInput(f"--track {name!r}: must be 'tensorboard'")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise BadInput(
            "--track tensorboard: TensorBoard is not installed; install fedsim with its extra 'track'"
        ) from None
    writer: SummaryWriter | None = None

    def tell(snapshot: Snapshot, experiment: Experiment) -> None:
        nonlocal writer
        also(snapshot, experiment)
        if writer is None:  # what an interrupted run wrote ahead of its checkpoint is replaced
            writer = SummaryWriter(str(path / FOLDER), purge_step=snapshot.round)
        for column, value in snapshot.metrics.items():
            if isinstance(value, int | float) and column != "round":
                writer.add_scalar(column.replace(".", "/"), value, snapshot.round)

    try:
        yield tell
    finally:
        if writer is not None:
            writer.close()
