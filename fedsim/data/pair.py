"""Two classes of a data set as a binary problem."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedsim.checks import at_least
from fedsim.data.dataset import Dataset, Source
from fedsim.data.sources import Digits


@dataclass(frozen=True)
class Pair:
    """Two classes of another source as labels 0 and 1, ``x`` ``[N, d]`` flattened, in float64.

    Parameters
    ----------
    inner : Source
        A source with classes.
    classes : tuple of int
        The class that becomes label 0, and the one that becomes 1.
    rows : int | None
        Take the first rows of the two classes only.
    unit_norm : bool
        Whether to divide all rows, those of the test set too, by the norm of the longest training row.

    Raises
    ------
    ValueError
        If the classes are not two different ones, or ``rows`` is below 2; when loading, if a class is absent.

    Examples
    --------
    >>> data = Pair(Digits(), classes=(3, 5), rows=100).load(seed=0, num_workers=1)
    >>> data.task, tuple(data.x.shape), round(data.x.norm(dim=1).max().item(), 12)
    ('binary', (100, 64), 1.0)
    """

    inner: Source = Digits()  # noqa: RUF009 - it is frozen
    classes: tuple[int, int] = (3, 5)
    rows: int | None = None
    unit_norm: bool = True

    def __post_init__(self) -> None:
        if len(self.classes) != 2 or self.classes[0] == self.classes[1]:
            raise ValueError(f"Pair: classes = {self.classes} must be two different classes")
        if self.rows is not None:
            at_least(self, 2, "rows")

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Load the inner source and keep the rows of the two classes, in their order."""
        data = self.inner.load(seed, num_workers)
        if data.task != "classes":
            raise ValueError(f"Pair: the task of {data.name} is {data.task!r}, must be 'classes'")
        x, y, workers = self._keep(data, data.x, data.y, self.rows)
        test_x, test_y, _ = self._keep(data, data.test_x, data.test_y, None)
        for label in (0, 1):
            if not bool((y == label).any()):
                raise ValueError(
                    f"Pair: {data.name} has no training row of class {self.classes[label]} among those taken"
                )
        if self.unit_norm:
            longest = x.norm(dim=1).max()
            x, test_x = x / longest, test_x / longest
        names = tuple(data.labels[c] for c in self.classes) if data.labels else ()
        return Dataset(x, y, test_x, test_y, 1, "binary", f"{data.name} pair", workers, names)

    def _keep(
        self, data: Dataset, x: torch.Tensor, y: torch.Tensor, rows: int | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        kept = torch.nonzero((y == self.classes[0]) | (y == self.classes[1])).squeeze(1)[:rows]
        owners = None if data.workers is None or x is not data.x else data.workers[kept]
        return x[kept].flatten(1).double(), (y[kept] == self.classes[1]).long(), owners
