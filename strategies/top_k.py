"""The largest entries of an update alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.compressed import Compressed


@dataclass(frozen=True)
class TopK(Compressed):
    """Send the ``k = max(1, round(share P))`` entries of largest absolute value of the P in a worker's update.

    Around a strategy such as ``FedAvg()`` or ``DiLoCo()``, with error feedback (see
    `strategies.compressed.Compressed`). Entries of all tensors compete. An update takes the bytes of k values
    and of their places: 4 bytes a place, or one bit for each of the P entries where that is less.

    Parameters
    ----------
    inner : Rule
        Strategy whose workers start from its model and send their rows.
    share : float
        Share of the entries, in (0, 1]; 1 is the inner strategy.
    feedback : bool
        Whether workers remember what they have not sent.

    Raises
    ------
    ValueError
        If ``share`` is outside its range or the inner strategy does not fit.

    References
    ----------
    Stich, Cordonnier, Jaggi (2018), Sparsified SGD with memory, arXiv:1809.07847.
    """

    share: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"TopK: share = {self.share!r} must be in (0, 1]")

    def compress(self, update: Tensor, round: int, worker: Tensor) -> Tensor:
        """Put 0 in place of all other entries."""
        places = update.abs().topk(self._k(update.shape[1]), dim=1, sorted=False).indices
        return torch.zeros_like(update).scatter(1, places, update.gather(1, places))

    def num_bytes(self, entries: int, size: int) -> int:
        """Count values and places."""
        k = self._k(entries)
        return k * size + min(4 * k, -(-entries // 8))

    def _k(self, entries: int) -> int:
        return max(1, round(self.share * entries))
