"""Updates in few bits a number."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim import checks, random
from strategies.compressed import Compressed


@dataclass(frozen=True)
class LowBit(Compressed):
    """Send a worker's update as whole numbers of ``bits`` bits, with one scale for each ``block`` of entries.

    ``s = max |a| / L`` over the entries of a block, with ``L = 2^(bits - 1) - 1``, that is 127 for 8 and 7 for
    4 bits; an entry ``a`` is sent as ``q = round(a / s)``, from -L to L, and received as ``s q``. Around a
    strategy such as ``FedAvg()`` or ``DiLoCo()``, with error feedback (see `strategies.compressed.Compressed`).
    An update of P entries takes ``ceil(P bits / 8)`` bytes, and those of a number of the model's precision for
    each of the ``ceil(P / block)`` scales.

    Parameters
    ----------
    inner : Rule
        Strategy whose workers start from its model and send their rows.
    bits : int
        Bits of an entry, from 2 to 16.
    block : int
        Entries that share a scale, >= 1.
    stochastic : bool
        Round up with the probability of the fractional part, ``q = floor(a / s + u)`` with ``u`` uniform in [0,
        1), so that an update is received right on average, as in QSGD; that one needs no feedback.
    seed : int
        Of ``u``, >= 0.
    feedback : bool
        Whether workers remember what they have not sent.

    Raises
    ------
    ValueError
        If a value is outside its range or the inner strategy does not fit.

    References
    ----------
    Alistarh, Grubic, Li, Tomioka, Vojnovic (2017), QSGD: Communication-efficient SGD via gradient quantization and
    encoding, arXiv:1610.02132; there a scale is the Euclidean norm, and numbers are encoded further.
    """

    bits: int = 8
    block: int = 256
    stochastic: bool = field(default=False, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.bits <= 16:
            raise ValueError(f"LowBit: bits = {self.bits!r} must be from 2 to 16")
        checks.at_least(self, 1, "block")
        checks.nonnegative(self, "seed")

    def compress(self, update: Tensor, round: int, worker: Tensor) -> Tensor:
        """Round every entry to a multiple of its block's scale."""
        m, entries = update.shape
        blocks = F.pad(update, (0, -entries % self.block)).view(m, -1, self.block)
        most = 2 ** (self.bits - 1) - 1
        scale = blocks.abs().amax(-1, keepdim=True) / most
        steps = blocks / torch.where(scale > 0, scale, 1)
        if self.stochastic:
            place = torch.arange(steps[0].numel(), device=update.device)
            u = random.uniform(random.key(self.seed, "rounding", round), worker[:, None], place)
            whole = (steps + u.view_as(steps).to(update.dtype)).floor()
        else:
            whole = steps.round()
        return (whole.clamp(-most, most) * scale).view(m, -1)[:, :entries]

    def num_bytes(self, entries: int, size: int) -> int:
        """Count entries and scales."""
        return -(-entries * self.bits // 8) + size * -(-entries // self.block)
