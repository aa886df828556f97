"""Digits in several domains, one of which nobody trains on: colours that mislead, and angles that are new.

A worker is a training domain (``partition = "Natural()"``, with ``num-workers`` the number of domains), or, with a multiple of it, several
workers share one. The central test set is the held-out domain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch

from fedsim.checks import at_least, one_of, unit
from fedsim.data.dataset import Dataset, Domains
from fedsim.data.sources import MNIST
from fedsim.random import numpy_generator

PICTURES = ("digits", "mnist")


class Environment(NamedTuple):
    """Rows of one domain.

    Attributes
    ----------
    x : ndarray
        ``[n, 2, side, side]``, the picture in one channel and 0 in the other.
    y : ndarray
        ``[n]`` labels in {0, 1}.
    base : ndarray
        ``[n]``, what the shape says: 1 for the digits 0 to 4.
    colour : ndarray
        ``[n]``, the channel.
    """

    x: np.ndarray
    y: np.ndarray
    base: np.ndarray
    colour: np.ndarray


@lru_cache(maxsize=2)
def grey(pictures: str) -> tuple[np.ndarray, np.ndarray]:
    """Return grey pictures in [0, 1] as float64, ``[n, side, side]``, and their digits; callers must not change them.

    Parameters
    ----------
    pictures : {"digits", "mnist"}
        1,797 digits of scikit-learn with side 8, or the 60,000 of MNIST with every second row and column, side 14.

    Returns
    -------
    tuple of ndarray and ndarray
        In the order of the source.
    """
    if pictures == "digits":
        from sklearn.datasets import load_digits

        pixels, digit = (np.asarray(part) for part in load_digits(return_X_y=True))
        return (pixels / 16).reshape(-1, 8, 8), digit.astype(np.int64)
    data = MNIST().load(0, 1)
    x = data.x[:, 0, ::2, ::2].double()
    # Standardising is undone: the darkest of all pixels is 0 and the brightest 255.
    levels = ((x - data.x.min()) / (data.x.max() - data.x.min()) * 255).round()
    return (levels / 255).numpy(), data.y.numpy()


def draw_environment(
    rng: np.random.Generator,
    x: np.ndarray,
    digit: np.ndarray,
    rows: int,
    colour: float,
    flip: float = 0.25,
    sampling: str = "balanced",
) -> Environment:
    """Draw one domain from a pool of grey pictures, with label noise and colours of its own.

    Parameters
    ----------
    rng : Generator
        Of NumPy.
    x, digit : ndarray
        The pool, ``[N, side, side]`` and ``[N]``.
    rows : int
        Rows n.
    colour : float
        Share e of the rows whose colour is not their label.
    flip : float
        Share of the labels that are not what the shape says.
    sampling : {"balanced", "bernoulli"}
        Exactly these shares: ``n // 2`` pictures of either class, then in each class ``round(flip n / 2)`` labels, and
        in each of the four cells of class and label ``round(e m)`` colours of m; or independent coins for every row.

    Returns
    -------
    Environment
        In random order. Pictures are drawn with replacement.
    """
    base = (digit < 5).astype(np.int64)
    if sampling == "balanced":
        picked, labels, colours = [], [], []
        for b in (0, 1):
            m = rows // 2 if b == 0 else rows - rows // 2
            picked.append(rng.choice(np.flatnonzero(base == b), m))
            y = np.full(m, b)
            y[rng.choice(m, round(flip * m), replace=False)] = 1 - b
            g = y.copy()
            for label in (0, 1):
                cell = np.flatnonzero(y == label)
                wrong = rng.choice(cell, round(colour * len(cell)), replace=False)
                g[wrong] = 1 - label
            labels.append(y)
            colours.append(g)
        order = rng.permutation(rows)
        at, y, g = (np.concatenate(part)[order] for part in (picked, labels, colours))
    else:
        at = rng.integers(len(x), size=rows)
        y = base[at] ^ (rng.random(rows) < flip)
        g = y ^ (rng.random(rows) < colour)
    out = np.zeros((rows, 2, *x.shape[1:]), dtype=x.dtype)
    out[np.arange(rows), g] = x[at]
    return Environment(out, y.astype(np.int64), base[at], g.astype(np.int64))


@dataclass(frozen=True)
class ColoredDigits:
    """Is the digit below five? The shape tells three times in four, the colour better, but not in the held-out domain.

    ``x`` is ``[N, 2, side, side]`` in float64, the picture in the channel of its colour and 0 in the other; labels are binary, for
    ``objective = "Logistic()"``. A label is what the shape says but for a share ``flip``, and a colour is the label but for
    a share e, one for each domain. A rule of shape alone is right in ``1 - flip`` of all cases anywhere, one of colour in ``1 - e``.
    Labels and colours are drawn anew for every domain, and the pictures of the training pool, three quarters, are in no
    test set. Each training domain has a second set from the test pool, on which ``id_accuracy`` is taken.

    Parameters
    ----------
    colours : tuple of float
        e of the training domains, in [0, 1]; (0.2, 0.1) is the classical pair, which needs more rows.
    held_out : float
        e of the test domain, in [0, 1].
    rows : int
        Rows of each domain, and of each test set, >= 2.
    flip : float
        Share of noisy labels, in [0, 1).
    sampling : {"balanced", "bernoulli"}
        Exact shares, or coins (see `draw_environment`).
    pictures : {"digits", "mnist"}
        As in `grey`.
    as_grey : bool
        Add up the channels, ``x`` is ``[N, 1, side, side]``: without the colour, an upper bound.

    Raises
    ------
    ValueError
        If an argument is not admissible.

    References
    ----------
    Arjovsky, Bottou, Gulrajani, Lopez-Paz 2019, arXiv 1907.02893, with MNIST and coins.
    """

    colours: tuple[float, ...] = (0.3, 0.1)
    held_out: float = 0.9
    rows: int = 2000
    flip: float = 0.25
    sampling: Literal["balanced", "bernoulli"] = "balanced"
    pictures: Literal["digits", "mnist"] = "digits"
    as_grey: bool = False

    def __post_init__(self) -> None:
        if not self.colours or not all(0 <= e <= 1 for e in (*self.colours, self.held_out)):
            raise ValueError(
                f"ColoredDigits: colours = {self.colours}, held_out = {self.held_out} must be in [0, 1]"
            )
        at_least(self, 2, "rows")
        unit(self, "flip")
        one_of(self, "sampling", ("balanced", "bernoulli"))
        one_of(self, "pictures", PICTURES)

    def pools(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the pictures of the training pool, ``int(0.75 N)`` of them, and those of the test pool."""
        order = numpy_generator(seed, "colored pools").permutation(len(grey(self.pictures)[1]))
        train = int(0.75 * len(order))
        return order[:train], order[train:]

    def environments(self, seed: int) -> tuple[list[Environment], list[Environment], Environment]:
        """Draw the training domains, their test sets and the held-out domain."""
        x, digit = grey(self.pictures)
        train, test = self.pools(seed)

        def draw(pool: np.ndarray, colour: float, number: int) -> Environment:
            rng = numpy_generator(seed, "colored rows", number)
            return draw_environment(rng, x[pool], digit[pool], self.rows, colour, self.flip, self.sampling)

        count = len(self.colours)
        training = [draw(train, e, i) for i, e in enumerate(self.colours)]
        inside = [draw(test, e, count + i) for i, e in enumerate(self.colours)]
        return training, inside, draw(test, self.held_out, 2 * count)

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Draw all domains; domain i is worker i, or the i-th block of workers with as many for each domain."""
        training, inside, outside = self.environments(seed)
        count = len(training)

        def pictures(parts: list[Environment]) -> torch.Tensor:
            x = torch.from_numpy(np.concatenate([e.x for e in parts]))
            return x.sum(1, keepdim=True) if self.as_grey else x

        def labels(parts: list[Environment]) -> torch.Tensor:
            return torch.from_numpy(np.concatenate([e.y for e in parts]))

        domain = torch.arange(count).repeat_interleave(self.rows)
        names = tuple(f"colour flips {e:g}" for e in self.colours)
        domains = Domains(pictures(inside), labels(inside), domain, names, f"colour flips {self.held_out:g}")
        return Dataset(
            pictures(training),
            labels(training),
            pictures([outside]),
            labels([outside]),
            1,
            "binary",
            "colored digits",
            _share(domain, num_workers),
            ("5-9", "0-4"),
            domains=domains,
        )


def rotate(x: np.ndarray, degrees: float) -> np.ndarray:
    """Rotate square pictures about their centre, bilinearly; what comes from outside is 0.

    Output pixel ``(r, q)`` samples the input at row ``c + cos(a)(r - c) + sin(a)(q - c)`` and column
    ``c - sin(a)(r - c) + cos(a)(q - c)``, with ``c = (side - 1) / 2``.

    Parameters
    ----------
    x : ndarray
        ``[n, side, side]``.
    degrees : float
        Angle a.

    Returns
    -------
    ndarray
        ``[n, side, side]`` float64.

    Examples
    --------
    >>> x = np.arange(9.0).reshape(1, 3, 3)
    >>> bool(np.allclose(rotate(x, 90), np.rot90(x, axes=(1, 2))))
    True
    """
    side = x.shape[-1]
    a, c = math.radians(degrees), (side - 1) / 2
    r, q = np.meshgrid(np.arange(side) - c, np.arange(side) - c, indexing="ij")
    row = c + math.cos(a) * r + math.sin(a) * q
    column = c - math.sin(a) * r + math.cos(a) * q
    tolerance = 1e-9  # of the sides: 90 degrees is not exact in floating point
    inside = (np.minimum(row, column) >= -tolerance) & (np.maximum(row, column) <= side - 1 + tolerance)
    row, column = np.clip(row, 0, side - 1), np.clip(column, 0, side - 1)
    top = np.minimum(row.astype(np.int64), side - 2)
    left = np.minimum(column.astype(np.int64), side - 2)
    down, right = row - top, column - left
    out = (1 - down) * (1 - right) * x[:, top, left] + (1 - down) * right * x[:, top, left + 1]
    out = out + down * (1 - right) * x[:, top + 1, left] + down * right * x[:, top + 1, left + 1]
    return np.where(inside, out, 0.0)


@dataclass(frozen=True)
class RotatedDigits:
    """Digits at several angles, one of which is held out; ``x`` is ``[N, 1, side, side]`` in [0, 1], float64, 10 classes.

    The pictures are dealt to the angles in turn from a random order, so that no picture has two. Of each training angle the first
    fifth, ``n // 5`` pictures, is for ``id_accuracy``, and all pictures of the held-out angle are the test set.

    Parameters
    ----------
    held_out : float
        An entry of ``angles``. 0 and the last one are the ends of the range: a ranking of optimisers may differ between them, so show
        both.
    angles : tuple of float
        Degrees, at least two different ones.
    pictures : {"digits", "mnist"}
        As in `grey`.

    Raises
    ------
    ValueError
        If an argument is not admissible.

    References
    ----------
    Gulrajani, Lopez-Paz 2020, arXiv 2007.01434 (on MNIST); Ghifary, Kleijn, Zhang, Balduzzi 2015, arXiv 1508.07680.
    """

    held_out: float = 0.0
    angles: tuple[float, ...] = (0.0, 15.0, 30.0, 45.0, 60.0, 75.0)
    pictures: Literal["digits", "mnist"] = "digits"

    def __post_init__(self) -> None:
        if len(self.angles) < 2 or len(set(self.angles)) < len(self.angles):
            raise ValueError(f"RotatedDigits: angles = {self.angles} must be at least two different ones")
        if self.held_out not in self.angles:
            raise ValueError(
                f"RotatedDigits: held_out = {self.held_out:g} must be one of {', '.join(f'{a:g}' for a in self.angles)}"
            )
        one_of(self, "pictures", PICTURES)

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Rotate all pictures; the i-th training angle is worker i, or the i-th block of workers."""
        pixels, digit = grey(self.pictures)
        order = numpy_generator(seed, "rotated order").permutation(len(digit))
        count = len(self.angles)
        parts = [
            (rotate(pixels[order[j::count]], a), digit[order[j::count]]) for j, a in enumerate(self.angles)
        ]
        away = self.angles.index(self.held_out)
        training = [part for j, part in enumerate(parts) if j != away]

        def join(pieces: list[np.ndarray]) -> torch.Tensor:
            return torch.from_numpy(np.concatenate(pieces))

        fifths = [len(y) // 5 for _, y in training]
        sizes = [len(y) - n for (_, y), n in zip(training, fifths, strict=True)]
        own = torch.repeat_interleave(torch.arange(len(training)), torch.tensor(sizes))
        domains = Domains(
            join([x[:n] for (x, _), n in zip(training, fifths, strict=True)])[:, None],
            join([y[:n] for (_, y), n in zip(training, fifths, strict=True)]),
            torch.repeat_interleave(torch.arange(len(training)), torch.tensor(fifths)),
            tuple(f"{a:g} degrees" for a in self.angles if a != self.held_out),
            f"{self.held_out:g} degrees",
        )
        return Dataset(
            join([x[n:] for (x, _), n in zip(training, fifths, strict=True)])[:, None],
            join([y[n:] for (_, y), n in zip(training, fifths, strict=True)]),
            torch.from_numpy(parts[away][0])[:, None],
            torch.from_numpy(parts[away][1]),
            10,
            "classes",
            "rotated digits",
            _share(own, num_workers),
            tuple("0123456789"),
            domains=domains,
        )


def _share(domain: torch.Tensor, num_workers: int) -> torch.Tensor:
    """Deal the rows of each domain, in runs of nearly equal length, to equally many natural workers, at most as many as asked for."""
    sizes = torch.bincount(domain)
    each = max(1, num_workers // len(sizes))
    place = torch.cat([torch.arange(n) * each // n for n in sizes.tolist()])
    return domain * each + place
