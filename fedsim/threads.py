"""How many threads work is worth: waking a sleeping thread costs more than a tiny product takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

TINY = 20e6
"""Floating-point operations of a step below which one thread is faster than two (measured: 2 MFLOP 2.4x faster, 144 slower)."""


@contextmanager
def enough_for(flops: float) -> Iterator[None]:
    """Use one thread of PyTorch for tiny work on a CPU, and as many as are set for other work.

    Parameters
    ----------
    flops : float
        Floating-point operations of one batched call, at least 0.
    """
    before = torch.get_num_threads()
    if flops >= TINY or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
