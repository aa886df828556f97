"""Data sets of the Hugging Face hub, and folders in the same layouts."""

from __future__ import annotations

import importlib
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from fedsim.checks import at_least, nonnegative
from fedsim.data.cache import Decoded, find, fingerprint, keep
from fedsim.data.columns import Columns
from fedsim.data.dataset import Dataset, standardise

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Hub:
    """A data set of the Hugging Face hub: pictures, numbers or text.

    Pictures are scaled to [0, 1], then pictures and numbers are standardised per channel by the training rows.
    Text becomes windows of characters or pieces of words, see `fedsim.data.text.windows`. Decoded pictures and numbers are kept in the
    folder ``FEDSIM_CACHE`` (default ``~/.cache/fedsim``).

    Parameters
    ----------
    name : str
        E.g. ``"ylecun/mnist"``.
    config : str | None
        Configuration of the data set, where it has several.
    train : str
        Split to train on, slices such as ``"train[:10%]"`` included.
    test : str | None
        Split to test on; None for an empty test set (text: the last tenth of the training text).
    input : str | None
        Column of the inputs; None finds it.
    label : str | None
        Column of the labels, floats for a regression; None finds it.
    worker : str | None
        Column that names the natural worker of a row.
    rows : int | None
        Take the first rows (windows of text) of the training split only.
    context : int
        Tokens of a window of text.
    vocabulary : int
        0 for text in characters, or the size of a byte-pair vocabulary trained on it, which needs the extra
        ``fedsim[text]``.

    Raises
    ------
    ValueError
        If ``rows`` or ``context`` is below 1, or ``vocabulary`` below 0.
    """

    name: str
    config: str | None = None
    train: str = "train"
    test: str | None = "test"
    input: str | None = None
    label: str | None = None
    worker: str | None = None
    rows: int | None = None
    context: int = 64
    vocabulary: int = 0

    def __post_init__(self) -> None:
        at_least(self, 1, "context")
        nonnegative(self, "vocabulary")
        if self.rows is not None:
            at_least(self, 1, "rows")

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Read the data set, from the hub or from what was downloaded earlier.

        Parameters
        ----------
        seed : int
            Does not matter: the splits are given.
        num_workers : int
            Does not matter.

        Returns
        -------
        Dataset
            Of task ``"classes"``, ``"regression"`` or ``"tokens"``; a split or column that is not there is a
            ValueError.

        Raises
        ------
        ConnectionError
            If the hub cannot be reached and the data set was not downloaded earlier.
        """
        hf = _datasets("Hub")
        offline = hf.config.HF_HUB_OFFLINE
        # without this the library tries for half a minute before it looks at what it has on disk
        hf.config.HF_HUB_OFFLINE = offline or not _reachable(hf.config.HF_ENDPOINT)
        try:
            train = _open("Hub", self.name, self.config, self.train)
            test = None if self.test is None else _open("Hub", self.name, self.config, self.test)
        except ConnectionError:
            raise ConnectionError(
                f"Hub: the hub cannot be reached and {self.name!r} was not downloaded earlier: connect once to "
                "download it, or name a folder that holds it, Folder('...')"
            ) from None
        finally:
            hf.config.HF_HUB_OFFLINE = offline
        columns = Columns(self.name, self.input, self.label, self.worker)
        if columns.is_text(train):
            return columns.read_text(train, test, self.context, self.rows, self.vocabulary)
        content = (train._fingerprint, test and test._fingerprint, columns, self.rows)
        found = find(self.name, content)
        return to_dataset(found or _decode(columns, content, train, test, self.rows), self.name)


@dataclass(frozen=True)
class Folder:
    """A folder of pictures or of Parquet, CSV, JSON or text files, as ``datasets.load_dataset`` reads it.

    Pictures lie in ``train/<class>/*.png`` and ``test/<class>/*.png``, or in a Parquet file; files of a split carry
    its name, e.g. ``train-0.parquet``. Scaling, windows of text and the cache are those of `Hub`; the cache follows
    the contents of the files.

    Parameters
    ----------
    path : str
        The folder.
    train, test, input, label, worker, rows, context, vocabulary
        As for `Hub`; a folder of text without the split ``"test"`` gives the last tenth of its text.

    Raises
    ------
    ValueError
        If ``rows`` or ``context`` is below 1, or ``vocabulary`` below 0.
    """

    path: str
    train: str = "train"
    test: str | None = "test"
    input: str | None = None
    label: str | None = None
    worker: str | None = None
    rows: int | None = None
    context: int = 64
    vocabulary: int = 0

    def __post_init__(self) -> None:
        at_least(self, 1, "context")
        nonnegative(self, "vocabulary")
        if self.rows is not None:
            at_least(self, 1, "rows")

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Read the folder.

        Parameters
        ----------
        seed : int
            Does not matter: the splits are given.
        num_workers : int
            Does not matter.

        Returns
        -------
        Dataset
            Of task ``"classes"``, ``"regression"`` or ``"tokens"``, named like the folder.

        Raises
        ------
        ValueError
            If there is no such folder, it holds no data, or a split or a column is not there.
        """
        folder = Path(self.path).expanduser().resolve()
        if not folder.is_dir():
            raise ValueError(f"Folder: path = {self.path!r} is not a folder")
        columns = Columns(folder.name, self.input, self.label, self.worker)
        content = (fingerprint(folder), self.train, self.test, columns, self.rows)
        found = find(folder.name, content)
        if found is not None:
            return to_dataset(found, folder.name)
        _datasets("Folder")
        # the library copies the tables before it reads them: needed once only
        with tempfile.TemporaryDirectory() as copies:
            train = _open("Folder", str(folder), None, self.train, copies)
            text = columns.is_text(train)
            try:
                test = None if self.test is None else _open("Folder", str(folder), None, self.test, copies)
            except ValueError:
                if not text or self.test != "test":
                    raise
                test = None
            if text:
                return columns.read_text(train, test, self.context, self.rows, self.vocabulary)
            return to_dataset(_decode(columns, content, train, test, self.rows), folder.name)


def to_dataset(decoded: Decoded, name: str) -> Dataset:
    """Scale and standardise decoded tensors, see `Hub`.

    Parameters
    ----------
    decoded : Decoded
        uint8 pictures ``[N, C, H, W]`` or float32 numbers ``[N, F]``.
    name : str
        Name of the data set.

    Returns
    -------
    Dataset
        Of task ``"regression"`` if the labels are floats, else ``"classes"``.
    """
    t = decoded.tensors
    scale = 255 if t["x"].dtype == torch.uint8 else 1
    x, test_x = (t[k].to(torch.float32, copy=True).div_(scale) for k in ("x", "test_x"))
    x, test_x = standardise(x, test_x)
    regression = t["y"].is_floating_point()
    return Dataset(
        x,
        t["y"],
        test_x,
        t["test_y"],
        num_outputs=1 if regression else len(decoded.labels),
        task="regression" if regression else "classes",
        name=name,
        workers=t.get("workers"),
        labels=decoded.labels,
    )


def _decode(
    columns: Columns,
    content: tuple[object, ...],
    train: datasets.Dataset,
    test: datasets.Dataset | None,
    rows: int | None,
) -> Decoded:
    """Decode the tables, the first ``rows`` of the training one, and keep the tensors."""
    if rows is not None:
        if rows > len(train):
            raise ValueError(
                f"{columns.name}: rows = {rows:,} is larger than the {len(train):,} training rows"
            )
        train = train.select(range(rows))
    made = columns.decode(train, test)
    keep(columns.name, content, made)
    return made


def _datasets(source: str) -> ModuleType:
    """Import Hugging Face's datasets, or say which extra it is in."""
    try:
        return importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{source} needs Hugging Face datasets: install the extra fedsim[data]"
        ) from error


def _open(
    source: str, path: str, config: str | None, split: str, cache_dir: str | None = None
) -> datasets.Dataset:
    """Open one split."""
    import datasets

    try:
        table = datasets.load_dataset(path, config, split=split, cache_dir=cache_dir)
    except (ValueError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())
        hint = "; test=None goes without a test set" if split.startswith("test") else ""
        raise ValueError(f"{source}: split {split!r} of {path!r}: {reason}{hint}") from error
    if not isinstance(table, datasets.Dataset) or len(table) == 0:
        raise ValueError(f"{source}: split {split!r} of {path!r} has no rows")
    return table


def _reachable(endpoint: str) -> bool:
    """Whether the hub's host answers; taken for granted behind a proxy, which resolves names itself."""
    if getproxies():
        return True
    url = urlsplit(endpoint)
    try:
        socket.create_connection((url.hostname or "", url.port or 443), timeout=5).close()
    except OSError:
        return False
    return True
