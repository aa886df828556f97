"""Workers whose rows look different, or whose labels mean something else."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedsim.checks import nonnegative
from fedsim.data.dataset import Dataset, Source
from fedsim.data.sources import Digits
from fedsim.random import numpy_generator


@dataclass(frozen=True)
class Shifted:
    """Covariate or concept shift: deal the rows of another source to domains, then add noise or exchange labels in each.

    Rows are dealt at random and evenly, so that domains have alike labels and sizes (for skewed ones there are ``Dirichlet`` and
    ``ByQuantity``). Domain i of D, from 1, then has

    * covariate shift: ``x + sqrt(noise i / D) e``, ``e ~ N(0, I)``;
    * concept shift: labels ``pi_i(y)``, with ``pi_i`` a cyclic permutation of ``exchange`` classes drawn for this domain.

    The test set is left as it is. ``partition = "Natural()"`` makes each worker a domain.

    Parameters
    ----------
    inner : Source
        With features that are numbers; with classes, where labels are exchanged.
    noise : float
        Variance of the noise in the last domain, >= 0.
    exchange : int
        Classes whose labels are exchanged, 0 for none, else 2 to C.
    domains : int
        Number D; 0 for one a worker.

    Raises
    ------
    ValueError
        If an argument is not admissible; when loading, if the source has no such features or classes.

    References
    ----------
    Noise: Li, Diao, Chen, He 2021, arXiv 2102.02079 (feature skew). Exchanged labels: Sattler, Müller, Samek 2019, arXiv
    1910.01991.
    """

    inner: Source = Digits()  # noqa: RUF009 - it is frozen
    noise: float = 0.0
    exchange: int = 0
    domains: int = 0

    def __post_init__(self) -> None:
        nonnegative(self, "noise", "exchange", "domains")
        if self.exchange == 1:
            raise ValueError("Shifted: exchange = 1 must be 0 or at least 2")

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Load the inner source, deal its rows and shift them."""
        data, count = self.inner.load(seed, num_workers), self.domains or num_workers
        if not data.x.is_floating_point():
            raise ValueError(f"Shifted: rows of {data.name} are tokens, must be numbers")
        if self.exchange and (data.task != "classes" or self.exchange > data.num_outputs):
            raise ValueError(
                f"Shifted: exchange = {self.exchange} must be at most the classes of {data.name}, "
                f"{data.num_outputs if data.task == 'classes' else 'which has none'}"
            )
        n = len(data.y)
        if count > n:
            raise ValueError(f"Shifted: {count} domains are more than the {n:,} rows of {data.name}")
        domain = np.empty(n, dtype=np.int64)
        domain[numpy_generator(seed, "shifted domains").permutation(n)] = np.arange(n) * count // n
        x, y = data.x.clone(), data.y.clone()
        for i in range(count):
            rng, own = numpy_generator(seed, "shifted", i), torch.from_numpy(np.flatnonzero(domain == i))
            if self.noise:
                e = torch.from_numpy(rng.standard_normal((len(own), *x.shape[1:]))).to(x.dtype)
                x[own] += math.sqrt(self.noise * (i + 1) / count) * e
            if self.exchange:
                chosen = torch.from_numpy(rng.permutation(data.num_outputs)[: self.exchange])
                new = torch.arange(data.num_outputs)
                new[chosen] = chosen.roll(1)
                y[own] = new[y[own]]
        return replace(data, x=x, y=y, workers=torch.from_numpy(domain), name=f"shifted {data.name}")
