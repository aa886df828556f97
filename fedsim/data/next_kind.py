"""Text classification without a download of its own: the kind of the character that follows a window of Shakespeare."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fedsim.checks import at_least
from fedsim.data.dataset import Dataset
from fedsim.data.sources import TinyShakespeare
from fedsim.random import numpy_generator


@dataclass(frozen=True)
class NextKind:
    """Windows of characters of TinyShakespeare, ``x`` is ``[N, T]`` tokens, and the kind of the next character.

    Kinds are 0, space or line end; 1, vowel; 2, anything else. Windows begin at random characters of the training part,
    no two at the same one; the test set are as many windows of the test part, at most a ninth.

    Parameters
    ----------
    context : int
        Characters T of a window, >= 1.
    rows : int
        Windows N, >= 1.
    classes : int
        3 kinds, or 2: vowel or not.
    in_order : bool
        Whether rows come in the order of the text, so that ``Contiguous()`` gives each worker a part of its own.

    Raises
    ------
    ValueError
        If an argument is not admissible.
    """

    context: int = 32
    rows: int = 1000
    classes: int = 3
    in_order: bool = False

    def __post_init__(self) -> None:
        at_least(self, 1, "context", "rows")
        if self.classes not in (2, 3):
            raise ValueError(f"NextKind: classes = {self.classes} must be 2 or 3")

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Read the text and draw the windows; they do not depend on the seed, the parameters of a model do."""
        text = TinyShakespeare(context=1).load(seed, num_workers)
        kinds = torch.tensor([self._kind(character) for character in text.labels])
        x, y = [], []
        for name, tokens, wanted in (("train", text.x, self.rows), ("test", text.test_x, -(-self.rows // 9))):
            tokens = tokens.reshape(-1)
            starts = len(tokens) - self.context
            if wanted > starts:
                raise ValueError(
                    f"NextKind: rows = {self.rows:,} is larger than the {starts:,} windows there are"
                )
            drawn = numpy_generator(0, f"windows {name}").choice(starts, wanted, replace=False)
            begin = torch.from_numpy(np.sort(drawn) if self.in_order else drawn)[:, None]
            x.append(tokens[begin + torch.arange(self.context)])
            y.append(kinds[tokens[begin[:, 0] + self.context]])
        labels = ("space", "vowel", "other") if self.classes == 3 else ("other", "vowel")
        return Dataset(x[0], y[0], x[1], y[1], self.classes, "classes", "next kind", labels=labels)

    def _kind(self, character: str) -> int:
        if character.lower() in "aeiou":
            return 1
        return 2 if self.classes == 3 and not character.isspace() else 0
