"""Pictures of which every use in a local step takes another part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsim import random


@dataclass(frozen=True, eq=False)
class Cuts:
    """Square parts of pictures, drawn for each use.

    Parameters
    ----------
    pictures : Tensor
        ``[N, C, H, W]``.
    side : int
        Side s of the parts, at most H and W.
    shift : bool
        Draw where a part begins, uniformly among the ``(H - s + 1) (W - s + 1)`` places; else it is in the middle.
    flip : bool
        Mirror a part, left and right, with probability 1/2.
    """

    pictures: Tensor
    side: int
    shift: bool = True
    flip: bool = True

    def middle(self) -> Tensor:
        """Return the middle parts, a view ``[N, C, s, s]``."""
        return middle(self.pictures, self.side)

    def convert(self, change: Callable[[Tensor], Tensor]) -> Cuts:
        """Return the same with changed pictures, as on another device."""
        return replace(self, pictures=change(self.pictures))

    def cut(self, stream: int, index: Tensor, worker: Tensor, step: Tensor) -> Tensor:
        """Cut the pictures of minibatches.

        Parameters
        ----------
        stream : int
            Key of the draws.
        index : Tensor
            ``[*, B]`` rows.
        worker, step : Tensor
            Who uses them, and in which local step of the round; their shapes broadcast to the ``*`` of ``index``.

        Returns
        -------
        Tensor
            ``[*, B, C, s, s]``; a function of the stream, worker, step and place in the minibatch alone.
        """
        s, device = self.side, index.device
        places = [n - s + 1 for n in self.pictures.shape[2:]]
        high = torch.tensor([*places, 2], device=device)
        slot, which = torch.arange(index.shape[-1], device=device)[:, None], torch.arange(3, device=device)
        drawn = random.integers(stream, high, worker[..., None, None], step[..., None, None], slot, which)
        top, left, mirrored = drawn.expand(*index.shape, 3).reshape(-1, 3).unbind(1)
        if not self.shift:
            top, left = (torch.full_like(x, (n - 1) // 2) for x, n in zip((top, left), places, strict=True))
        windows = self.pictures.unfold(2, s, 1).unfold(3, s, 1)  # [N, C, H - s + 1, W - s + 1, s, s], a view
        parts = windows[index.reshape(-1), :, top, left]
        if self.flip:
            parts = torch.where((mirrored == 1)[:, None, None, None], parts.flip(-1), parts)
        return parts.view(*index.shape, *parts.shape[1:])


def middle(pictures: Tensor, side: int) -> Tensor:
    """Return the middle parts of pictures ``[N, C, H, W]``, a view; one pixel up and left where it is not even."""
    top, left = ((n - side) // 2 for n in pictures.shape[2:])
    return pictures[:, :, top : top + side, left : left + side]
