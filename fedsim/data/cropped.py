"""Random crops and mirror images."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedsim import checks
from fedsim.data.cuts import Cuts, middle
from fedsim.data.dataset import Dataset, Source
from fedsim.data.sources import CIFAR10


@dataclass(frozen=True)
class Cropped:
    """Square parts of another source's pictures, ``x`` ``[N, C, side, side]``, drawn anew in every local step.

    Each use of a picture in a minibatch takes a part that begins at a random place, and mirrors it with probability
    1/2. The draw is a function of seed, round, worker, local step and place in the minibatch. All else, as evaluation,
    the election of a leader by other than minibatch losses, and probes, sees the middle part as it is.

    Parameters
    ----------
    data : Source
        Pictures ``[N, C, H, W]``.
    side : int
        Side of the parts, from 1 to H and W.
    shift : bool
        Draw the place; else it is the middle.
    flip : bool
        Mirror half of the parts.

    Raises
    ------
    ValueError
        If ``side`` is out of range or the source has no pictures.

    References
    ----------
    As for CIFAR-10 with ``side = 28`` in Teng et al. (2019), arXiv:1905.10395.
    """

    data: Source = CIFAR10()  # noqa: RUF009 - it is frozen
    side: int = 28
    shift: bool = True
    flip: bool = True

    def __post_init__(self) -> None:
        checks.at_least(self, 1, "side")

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Load the source and keep its pictures whole beside their middle parts."""
        data = self.data.load(seed, num_workers)
        if len(data.input_shape) != 3 or min(data.input_shape[1:]) < self.side:
            raise ValueError(
                f"Cropped: side = {self.side}: rows of {data.name} are {data.input_shape}, must be pictures (channels, "
                "height, width) with sides of at least as much"
            )
        cuts = Cuts(data.x, self.side, self.shift, self.flip)
        test_x = middle(data.test_x, self.side).contiguous()
        if not (self.shift or self.flip):
            return replace(data, x=cuts.middle().contiguous(), test_x=test_x)
        return replace(data, x=cuts.middle(), test_x=test_x, cuts=cuts)
