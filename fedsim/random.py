"""Randomness as a function: every draw depends on (seed, purpose, round, worker, step) and nothing else.

There is no generator with a state. A *key* is a 64-bit number made from names and numbers; a *draw* hashes
a key with integer tensors (worker ids, slots). Hashing is integer arithmetic, so a draw is the same on
every device, for any order of evaluation and any spread of workers over nodes.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def key(seed: int, purpose: str, *numbers: int) -> int:
    """Make a 64-bit key, ``blake2b(seed, purpose, numbers)``, as a signed integer.

    Parameters
    ----------
    seed : int
        Seed of the run.
    purpose : str
        What the draw is for; different purposes are independent.
    *numbers : int
        Round, worker and whatever else names the draw.

    Returns
    -------
    int
        In ``[-2**63, 2**63)``.

    Examples
    --------
    >>> key(0, "batches", 3) == key(0, "batches", 3) != key(0, "batches", 4)
    True
    """
    text = "/".join([str(seed), purpose, *map(str, numbers)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def numpy_generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """Return a NumPy generator for draws that happen once a run or once a round on the host."""
    return np.random.default_rng(key(seed, purpose, *numbers) & (2**64 - 1))


def torch_generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """Return a CPU generator of torch for initial values of models."""
    return torch.Generator().manual_seed(key(seed, purpose, *numbers))


def _mix(x: Tensor) -> Tensor:
    """Finaliser of SplitMix64 (Steele, Lea, Flood 2014), on int64 with wrap-around; changes its argument."""
    x = x.bitwise_xor_((x >> 30).bitwise_and_(0x3FFFFFFFF)).mul_(_MIX1)
    x = x.bitwise_xor_((x >> 27).bitwise_and_(0x1FFFFFFFFF)).mul_(_MIX2)
    return x.bitwise_xor_((x >> 31).bitwise_and_(0x1FFFFFFFF))


def bits(stream: int | Tensor, *coordinates: Tensor) -> Tensor:
    """Hash integer coordinates into 64 random bits.

    Parameters
    ----------
    stream : int or Tensor
        A key.
    *coordinates : Tensor
        int64 tensors that broadcast against each other (worker, step, slot, ...).

    Returns
    -------
    Tensor
        int64 of the broadcast shape, uniform over all 64-bit numbers.
    """
    x = _mix(coordinates[0] * _GOLDEN + stream)
    for c in coordinates[1:]:
        x = _mix(x + c * _GOLDEN)
    return x


def uniform(stream: int | Tensor, *coordinates: Tensor) -> Tensor:
    """Draw float64 numbers in [0, 1), one for each combination of coordinates (see `bits`)."""
    return ((bits(stream, *coordinates) >> 11) & 0x1FFFFFFFFFFFFF).to(torch.float64) * 2.0**-53


def normal(stream: int | Tensor, *coordinates: Tensor) -> Tensor:
    """Draw standard normal float64 numbers by the method of Box and Muller, one for each combination of coordinates."""
    first, second = (uniform(stream, *coordinates, torch.full_like(coordinates[-1], i)) for i in (0, 1))
    return torch.sqrt(-2 * torch.log1p(-first)) * torch.cos(2 * torch.pi * second)


def integers(stream: int, high: Tensor, *coordinates: Tensor) -> Tensor:
    """Draw int64 numbers in ``[0, high)``; ``high`` broadcasts against the coordinates, 1 <= high < 2**31."""
    return (((bits(stream, *coordinates) >> 32) & 0xFFFFFFFF) * high) >> 32
