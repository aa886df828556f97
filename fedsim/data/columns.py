"""From the columns of a table to tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedsim.data.cache import Decoded
from fedsim.data.dataset import Dataset
from fedsim.data.text import windows

if TYPE_CHECKING:
    import datasets

INPUTS = ("image", "img", "images", "picture", "features", "x", "text", "content", "story")
LABELS = ("label", "labels", "fine_label", "target", "class", "y")
LONGEST = 5
"""Characters read for each byte-pair token that is wanted; English pieces have three or four."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a table to read.

    Parameters
    ----------
    name : str
        Name of the data set.
    input : str | None
        Column of pictures, of text or of lists of numbers; None takes the first of `INPUTS` that is there, else any
        picture or text column, else all columns of numbers.
    label : str | None
        Column of labels; None takes the first of `LABELS` that is there. Text needs none.
    worker : str | None
        Column that names the natural worker.
    """

    name: str
    input: str | None
    label: str | None
    worker: str | None

    def is_text(self, table: datasets.Dataset) -> bool:
        """Whether the input is a column of strings."""
        names = self._inputs(table)
        return len(names) == 1 and getattr(table.features[names[0]], "dtype", "") in {
            "string",
            "large_string",
        }

    def read_text(
        self,
        train: datasets.Dataset,
        test: datasets.Dataset | None,
        context: int,
        rows: int | None,
        vocabulary: int = 0,
    ) -> Dataset:
        """Join the rows with line ends and cut the text into windows, see `fedsim.data.text.windows`.

        Parameters
        ----------
        train : datasets.Dataset
            Table to train on; with a worker column the rows are put in order of worker first.
        test : datasets.Dataset | None
            Table to test on; None takes the last tenth of the training text.
        context : int
            Tokens of a window.
        rows : int | None
            Number of windows; None takes all.
        vocabulary : int
            0 for characters, or the size of a byte-pair vocabulary.

        Returns
        -------
        Dataset
            Of task ``"tokens"``.

        Raises
        ------
        ValueError
            If a worker column is given without a test table: the last tenth would be the last workers' text.
        """
        column = self._inputs(train)[0]
        owner = None
        length = context * (LONGEST if vocabulary else 1)  # characters of a window
        if self.worker is not None:
            if test is None:
                raise ValueError(f"{self.name}: worker = {self.worker!r} for text needs a test split")
            of_row = np.unique(self._values(train, self.worker), return_inverse=True)[1]
            order = np.argsort(of_row, kind="stable")
            lines = [line + "\n" for line in self._values(train.select(order), column)]
            owner = np.repeat(of_row[order], [len(line) for line in lines])
            text = "".join(lines)
        else:
            # a tenth more than the windows need, in case the test text is cut off the end
            limit = None if rows is None else (rows + 1) * length * 10 // 9 + 10
            text = self._join(train, column, limit)
        test_text = None
        if test is not None:
            limit = None if rows is None else (-(-rows // 9) + 1) * length
            test_text = self._join(test, column, limit)
        return windows(
            text,
            test_text,
            context=context,
            rows=rows,
            name=self.name,
            vocabulary=vocabulary,
            worker_of_character=owner,
        )

    def decode(self, train: datasets.Dataset, test: datasets.Dataset | None) -> Decoded:
        """Turn pictures or numbers into tensors, pictures as uint8 ``[N, C, H, W]``.

        Parameters
        ----------
        train : datasets.Dataset
            Table to train on.
        test : datasets.Dataset | None
            Table to test on; None gives a test set without rows.

        Returns
        -------
        Decoded
            Tensors; labels are numbered in the order of their names, or of their values if they have no names.
            No label column, an empty cell, a label that only the test table has, or pictures of different sizes
            are a ValueError.
        """
        label = self._label(train)
        y, labels = self._encode_labels(train, label)
        tables = {"": train} if test is None else {"": train, "test_": test}
        tensors: dict[str, Tensor] = {"y": y}
        for part, table in tables.items():
            tensors[part + "x"] = self._encode_inputs(table, part)
        if test is not None:
            tensors["test_y"] = self._encode_labels(test, label, labels)[0]
        else:
            tensors["test_x"], tensors["test_y"] = tensors["x"][:0].clone(), y[:0].clone()
        if self.worker is not None:
            tensors["workers"] = torch.from_numpy(
                np.unique(self._values(train, self.worker), return_inverse=True)[1]
            )
        return Decoded(tensors, labels)

    def _inputs(self, table: datasets.Dataset) -> list[str]:
        """Names of the input columns: one, or several columns of numbers."""
        import datasets

        if self.input is not None:
            self._check(table, self.input, "input")
            return [self.input]
        features = table.features
        for name in INPUTS:
            if name in features and name not in {self.label, self.worker}:
                return [name]
        rest = [k for k in features if k not in {self.label, self.worker, *LABELS}]
        pictures = [k for k in rest if isinstance(features[k], datasets.Image)]
        texts = [k for k in rest if getattr(features[k], "dtype", "") in {"string", "large_string"}]
        numbers = [
            k for k in rest if str(getattr(features[k], "dtype", "")).startswith(("int", "float", "uint"))
        ]
        found = pictures[:1] or numbers or texts[:1]
        if not found:
            raise ValueError(
                f"{self.name}: no input column found, there are {', '.join(features)}: name one, input='...'"
            )
        return found

    def _label(self, table: datasets.Dataset) -> str:
        if self.label is not None:
            return self._check(table, self.label, "label")
        for name in LABELS:
            if name in table.features and name != self.worker:
                return name
        raise ValueError(
            f"{self.name}: no label column found, there are {', '.join(table.features)}: name one, label='...'"
        )

    def _check(self, table: datasets.Dataset, column: str, role: str) -> str:
        if column not in table.features:
            raise ValueError(
                f"{self.name}: {role} = {column!r} is not a column, there are {', '.join(table.features)}"
            )
        return column

    def _values(self, table: datasets.Dataset, column: str) -> list[Any]:
        """All cells of a column."""
        self._check(table, column, "column")
        values = list(table[column])
        if None in values:
            raise ValueError(f"{self.name}: row {values.index(None)} of column {column!r} is empty")
        return values

    def _join(self, table: datasets.Dataset, column: str, limit: int | None) -> str:
        """Join as many rows as give ``limit`` characters."""
        return "\n".join(_until(iter(table[column]), limit))

    def _encode_labels(
        self, table: datasets.Dataset, column: str, known: tuple[str, ...] | None = None
    ) -> tuple[Tensor, tuple[str, ...]]:
        """Labels as numbers and their names; floats stay as they are and have no names."""
        import datasets

        self._check(table, column, "label")
        values = np.asarray(self._values(table, column))
        feature = table.features[column]
        if isinstance(feature, datasets.ClassLabel):
            if len(values) and values.min() < 0:
                raise ValueError(
                    f"{self.name}: row {int(values.argmin())} of column {column!r} has no label (-1)"
                )
            return torch.from_numpy(values.astype(np.int64)), tuple(feature.names)
        if values.dtype.kind == "f":
            return torch.from_numpy(values.astype(np.float32)), ()
        if values.ndim != 1:
            raise ValueError(f"{self.name}: column {column!r} holds lists: one label a row is needed")
        names = np.unique(values)
        if known is not None:
            # in the order of the training labels, which are sorted by value and not by name
            new = sorted(set(map(str, names)) - set(known))
            if new:
                raise ValueError(
                    f"{self.name}: label {new[0]!r} of the test rows is not in the training rows"
                )
            position = {name: i for i, name in enumerate(known)}
            return torch.tensor([position[str(v)] for v in values], dtype=torch.int64), known
        return torch.from_numpy(np.searchsorted(names, values)), tuple(map(str, names))

    def _encode_inputs(self, table: datasets.Dataset, part: str) -> Tensor:
        """Return inputs ``[N, *]``: uint8 of pictures, float32 of numbers."""
        import datasets

        names = self._inputs(table)
        if isinstance(table.features[names[0]], datasets.Image):
            return self._pictures(table.select_columns(names), names[0], part)
        try:
            x = np.stack([np.asarray(self._values(table, k), dtype=np.float32) for k in names], axis=1)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{self.name}: column {names[0]!r} must hold pictures, text or lists of numbers of one length ({error})"
            ) from error
        return torch.from_numpy(x[:, 0] if x.ndim > 2 else x)

    def _pictures(self, table: Any, column: str, part: str) -> Tensor:
        """Decode pictures, ``[N, 1, H, W]`` if the first is grey, else ``[N, 3, H, W]``."""
        from tqdm import tqdm

        first = table[0][column]
        mode = "L" if first is None or first.mode in {"1", "L"} else "RGB"
        height, width = (1, 1) if first is None else (first.height, first.width)
        pixels = np.empty((len(table), height, width, len(mode)), dtype=np.uint8)
        for i, row in enumerate(tqdm(table, desc=f"decode {self.name} {part or 'train_'}x", leave=False)):
            picture = row[column]
            if picture is None:
                raise ValueError(f"{self.name}: row {i} of column {column!r} is empty")
            if picture.size != (width, height):
                raise ValueError(
                    f"{self.name}: picture {i} is {picture.width}x{picture.height}, the first is {width}x{height}: "
                    "make them one size first"
                )
            pixels[i] = np.asarray(picture.convert(mode)).reshape(pixels.shape[1:])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _until(lines: Iterator[str], limit: int | None) -> Iterator[str]:
    """Lines up to the one with which ``limit`` characters are reached."""
    total = 0
    for line in lines:
        yield line
        total += len(line) + 1
        if limit is not None and total > limit:
            return
