"""How many threads work is worth: waking a sleeping thread costs more than a tiny product takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SHARE = 25e6
"""Floating-point operations of a step that are worth a thread.

Measured on two cores, rounds of ten steps of small networks: at 29 MFLOP a step one thread is 2.5 times faster than two of
OpenMP, which meet after every operation, and 1.6 times faster than two that each make all steps of their own workers;
at 72 MFLOP these are 1.4 times faster than one, and at 144 MFLOP 1.6 times faster than two of OpenMP.
"""


def shares(flops: float) -> int:
    """Return how many threads a step is worth, at least 1 and at most as many as torch uses.

    Parameters
    ----------
    flops : float
        Floating-point operations of the step, at least 0.

    Returns
    -------
    int
        Number of threads.
    """
    return int(max(1, min(torch.get_num_threads(), flops // SHARE)))


@contextmanager
def enough_for(flops: float) -> Iterator[None]:
    """Use one thread of PyTorch for work that is not worth two, and as many as are set for other work.

    Parameters
    ----------
    flops : float
        Floating-point operations of a step, at least 0.
    """
    before = torch.get_num_threads()
    if shares(flops) > 1 or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
