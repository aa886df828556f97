"""How exactly matrix products and convolutions are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["full", "tf32", "bfloat16"]
"""See `products`."""


@contextmanager
def products(precision: Precision, device: torch.device) -> Iterator[None]:
    """Compute matrix products and convolutions with rounded factors inside the context.

    Parameters, sums, losses and updates keep their own type. A factor is rounded to ``p`` bits, an error of at most
    ``2^-p`` of it: ``full`` rounds nothing, ``tf32`` has ``p = 11`` (on CUDA devices of compute capability 8 or newer;
    elsewhere it is ``full``), ``bfloat16`` has ``p = 8`` and rounds the results of products too.

    Parameters
    ----------
    precision : {"full", "tf32", "bfloat16"}
        Which.
    device : torch.device
        Where the products are computed.

    Yields
    ------
    None
        Nothing.
    """
    if precision == "bfloat16":
        # No cache: it would not see that a plan has exchanged the values of a parameter.
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            yield
        return
    if device.type != "cuda":
        yield
        return
    wanted = precision == "tf32"  # PyTorch's own default differs between products and convolutions
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = wanted
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
