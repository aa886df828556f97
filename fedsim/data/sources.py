"""Data sets by short names."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedsim.checks import at_least, nonnegative, unit
from fedsim.data.cache import cache_folder
from fedsim.data.dataset import Dataset, standardise
from fedsim.data.hub import Folder, Hub
from fedsim.data.text import windows
from fedsim.random import numpy_generator

_SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


@dataclass(frozen=True)
class Digits:
    """1,797 handwritten digits of 8x8 pixels, part of scikit-learn: ``x`` is ``[N, 1, 8, 8]``, 10 classes.

    Pixels are divided by 16, then standardised by the mean and std over all entries of the training rows.

    Parameters
    ----------
    test : float
        Share of the rows in the central test set, in ``[0, 1)``; N = int((1 - test) 1797).

    Raises
    ------
    ValueError
        If the share is not admissible.

    References
    ----------
    Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository.
    """

    test: float = 0.25

    def __post_init__(self) -> None:
        unit(self, "test")

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Read and split the digits; the split depends on the seed alone."""
        from sklearn.datasets import load_digits

        pixels, target = load_digits(return_X_y=True)
        order = torch.from_numpy(numpy_generator(seed, "split").permutation(len(target)))
        x = torch.from_numpy(pixels).to(torch.float32).view(-1, 1, 8, 8)[order] / 16
        y = torch.from_numpy(target).long()[order]
        train = max(1, int((1 - self.test) * len(y)))
        x, test_x = standardise(x[:train], x[train:])
        labels = tuple("0123456789")
        return Dataset(x, y[:train], test_x, y[train:], 10, "classes", "digits", labels=labels)


@dataclass(frozen=True)
class MNIST:
    """MNIST: 60,000 + 10,000 grey digits of 28x28 pixels, ``x`` is ``[N, 1, 28, 28]``, standardised.

    Read from the folder ``mnist`` in ``FEDSIM_DATA`` if it is there, else from the hub.

    Parameters
    ----------
    rows : int | None
        Take the first rows of the training set only.

    Raises
    ------
    ValueError
        If ``rows`` is below 1.

    References
    ----------
    LeCun, Bottou, Bengio, Haffner 1998, Gradient-based learning applied to document recognition.
    """

    rows: int | None = None

    def __post_init__(self) -> None:
        if self.rows is not None:
            at_least(self, 1, "rows")

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Read the pictures; neither argument matters."""
        return _load("MNIST", "mnist", Hub("ylecun/mnist", rows=self.rows), seed, num_workers)


@dataclass(frozen=True)
class CIFAR10:
    """CIFAR-10: 50,000 + 10,000 pictures of 32x32 pixels, ``x`` is ``[N, 3, 32, 32]``, standardised per colour.

    Read from the folder ``cifar10`` in ``FEDSIM_DATA`` if it is there, else from the hub.

    Parameters
    ----------
    rows : int | None
        Take the first rows of the training set only.

    Raises
    ------
    ValueError
        If ``rows`` is below 1.

    References
    ----------
    Krizhevsky 2009, Learning multiple layers of features from tiny images.
    """

    rows: int | None = None

    def __post_init__(self) -> None:
        if self.rows is not None:
            at_least(self, 1, "rows")

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Read the pictures; neither argument matters."""
        return _load("CIFAR10", "cifar10", Hub("uoft-cs/cifar10", rows=self.rows), seed, num_workers)


@dataclass(frozen=True)
class TinyShakespeare:
    """1.1 million characters of Shakespeare in windows, the first 9 / 10 to train on and the rest to test on.

    Read from ``tinyshakespeare/input.txt`` in ``FEDSIM_DATA`` if it is there, else downloaded once. See
    `fedsim.data.text.windows` for the tokens.

    Parameters
    ----------
    context : int
        Tokens T of a window, >= 1.
    rows : int | None
        Take the first windows only.
    vocabulary : int
        0 for tokens that are characters, 65 of them; else the size of a byte-pair vocabulary, trained on the training
        part, which needs the extra ``fedsim[text]``.

    Raises
    ------
    ValueError
        If ``context`` or ``rows`` is below 1, or ``vocabulary`` below 0.

    References
    ----------
    Karpathy 2015, The unreasonable effectiveness of recurrent neural networks.
    """

    context: int = 64
    rows: int | None = None
    vocabulary: int = 0

    def __post_init__(self) -> None:
        at_least(self, 1, "context")
        nonnegative(self, "vocabulary")
        if self.rows is not None:
            at_least(self, 1, "rows")

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Read the text; neither argument matters."""
        folder = _local("tinyshakespeare")
        path = folder / "input.txt" if folder else cache_folder() / "tinyshakespeare.txt"
        if not path.exists():
            _download(_SHAKESPEARE, path)
        text = path.read_text(encoding="utf-8")
        name, size = "tinyshakespeare", self.vocabulary
        return windows(text, None, context=self.context, rows=self.rows, name=name, vocabulary=size)


@dataclass(frozen=True)
class TinyStories:
    """Short stories in words of a small child, in windows of characters or of pieces of words.

    Read from the folder ``tinystories`` in ``FEDSIM_DATA`` if it is there, else from the hub (1 GB). See
    `fedsim.data.text.windows` for the tokens.

    Parameters
    ----------
    context : int
        Tokens T of a window, >= 1.
    rows : int | None
        Take the first windows only; None takes all, 1.9 billion characters.
    vocabulary : int
        0 for characters; else the size of a byte-pair vocabulary, trained on the training part, which needs the extra
        ``fedsim[text]``.

    Raises
    ------
    ValueError
        If ``context`` or ``rows`` is below 1, or ``vocabulary`` below 0.

    References
    ----------
    Eldan and Li 2023, arXiv 2305.07759.
    """

    context: int = 128
    rows: int | None = 100_000
    vocabulary: int = 0

    def __post_init__(self) -> None:
        at_least(self, 1, "context")
        nonnegative(self, "vocabulary")
        if self.rows is not None:
            at_least(self, 1, "rows")

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Read the text; neither argument matters."""
        hub = Hub("roneneldan/TinyStories", test="validation", rows=self.rows, context=self.context)
        hub = replace(hub, vocabulary=self.vocabulary)
        return _load("TinyStories", "tinystories", hub, seed, num_workers)


def _local(folder: str) -> Path | None:
    """Find a folder in ``FEDSIM_DATA``."""
    root = os.environ.get("FEDSIM_DATA")
    path = Path(root).expanduser() / folder if root else None
    return path if path and path.is_dir() else None


def _load(source: str, folder: str, hub: Hub, seed: int, num_workers: int) -> Dataset:
    """Load a data set from its folder in ``FEDSIM_DATA``, else from the hub."""
    path = _local(folder)
    if path is not None:
        local = Folder(str(path), hub.train, hub.test, rows=hub.rows, context=hub.context)
        local = replace(local, vocabulary=hub.vocabulary)
        return local.load(seed, num_workers)
    try:
        return replace(hub.load(seed, num_workers), name=folder)
    except ConnectionError:
        raise _unreachable(source, folder) from None


def _download(url: str, path: Path) -> None:
    """Fetch a text of 1 MB, whole or not at all."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            body = answer.read()
    except (urllib.error.URLError, OSError):
        raise _unreachable("TinyShakespeare", "tinyshakespeare") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.draft")
    draft.write_bytes(body)
    draft.replace(path)


def _unreachable(source: str, folder: str) -> ConnectionError:
    root = os.environ.get("FEDSIM_DATA")
    where = f"there is no folder {folder} in FEDSIM_DATA = {root}" if root else "FEDSIM_DATA is not set"
    return ConnectionError(
        f"{source}: {where} and the hub cannot be reached: set FEDSIM_DATA to a folder that holds {folder}/, "
        "or connect once to download it"
    )
