"""Does a path move towards the point where it ends? Secant inequality, error bound, their cosine, and what chance gives.

For a direction ``G`` at a point ``w`` and a reference ``w*``, usually the end of the same path::

    RSI   = <G, w - w*> / |w - w*|^2          restricted secant inequality
    EB    = |G| / |w - w*|                    error bound
    gamma = RSI / EB = cos(G, w - w*)         > 0: -G points into the half space of w*
    lr    = RSI / EB^2 = <G, w - w*> / |G|^2  locally optimal learning rate; an oracle, as it needs the end

and for any step ``w+ = w - eta G`` exactly ``|w+ - w*|^2 = (1 - 2 eta RSI + eta^2 EB^2) |w - w*|^2``. A positive gamma alone
proves nothing: the end of a random walk lies in the direction of each of its steps too, with ``gamma = |u_t| / sqrt(sum_{s
>= t} |u_s|^2)`` for independent steps u. Tables here have a row a step or a round, with norms and inner products as
`fedsim.geometry` records them.

References
----------
Guille-Escuret, Naganuma, Fatras, Mitliagkas (2024), No Wrong Turns: The Simple Geometry of Neural Networks Optimization
Paths, arXiv:2306.11922. Guille-Escuret, Ibrahim, Goujaud, Mitliagkas (2022), Gradient Descent Is Optimal Under Lower
Restricted Secant Inequality and Upper Error Bound.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike


class Measures(NamedTuple):
    """RSI, EB, gamma and locally optimal learning rate; NaN where undefined."""

    rsi: np.ndarray
    eb: np.ndarray
    gamma: np.ndarray
    lr: np.ndarray


def measures(dot: ArrayLike, norm: ArrayLike, distance: ArrayLike) -> Measures:
    """Form RSI, EB, gamma and the locally optimal learning rate from three numbers a step.

    Parameters
    ----------
    dot : array_like
        ``<G, w - w*>``.
    norm, distance : array_like
        ``|G|`` and ``|w - w*|``, >= 0. At ``w = w*`` all four are undefined; at ``G = 0`` RSI and EB are 0, the others
        undefined.

    Returns
    -------
    Measures
        Of the shape of the arguments.

    Examples
    --------
    >>> w, g = np.array([2.0, 1.0]), np.array([2.0, 4.0])
    >>> [round(float(x), 12) for x in measures(g @ w, np.linalg.norm(g), np.linalg.norm(w))]
    [1.6, 2.0, 0.8, 0.4]
    """
    dot, norm, distance = (np.asarray(x, dtype=float) for x in (dot, norm, distance))
    away = np.where(distance > 0, distance, np.nan)
    moving = np.where((norm > 0) & (distance > 0), norm, np.nan)
    return Measures(dot / away**2, norm / away, dot / (moving * away), dot / moving**2)


def contraction(rsi: ArrayLike, eb: ArrayLike, lr: ArrayLike) -> np.ndarray:
    """Return ``1 - 2 lr RSI + lr^2 EB^2``, by which a step of length ``lr`` against G multiplies ``|w - w*|^2``, exactly.

    Parameters
    ----------
    rsi, eb : array_like
        Of the step's direction.
    lr : array_like
        Its length; ``1 - gamma^2`` is the least value, at the locally optimal one.

    Returns
    -------
    ndarray
        The factors.
    """
    rsi, eb, lr = (np.asarray(x, dtype=float) for x in (rsi, eb, lr))
    return 1 - 2 * lr * rsi + (lr * eb) ** 2


def walk_null(norms: ArrayLike) -> np.ndarray:
    """Return the gamma of independent steps in high dimension, ``|u_t| / sqrt(sum_{s >= t} |u_s|^2)``.

    Parameters
    ----------
    norms : array_like
        ``[T]``, lengths of the steps; of equal steps the null is ``1 / sqrt(T - t)``.

    Returns
    -------
    ndarray
        ``[T]``, 1 at the end.

    Examples
    --------
    >>> walk_null([1, 1, 1, 1]) ** -2
    array([4., 3., 2., 1.])
    """
    square = np.nan_to_num(np.asarray(norms, dtype=float)) ** 2
    with np.errstate(invalid="ignore"):
        return np.sqrt(square / _remaining(square))


def worker_null(table: pd.DataFrame, equal: bool = False) -> np.ndarray:
    """Return the gamma of independent local steps under plain averaging.

    ``p |u_h| / sqrt(A + (1 - 2 p) B)``, with ``A`` the sum of ``p_j^2 |u|^2`` over all steps of all workers j from this
    round to the last, ``B`` that of ``|u|^2`` over the worker's own earlier steps in the round, and ``p`` its weight among
    the participants. For steps of equal length and K workers that all take part this is ``p / sqrt((R - r) H sum_j p_j^2 +
    h (1 - 2 p))``, and for one worker `walk_null`.

    Parameters
    ----------
    table : pandas.DataFrame
        Steps with the columns ``round``, ``client``, ``local_step``, ``weight`` and ``norm_update``.
    equal : bool
        Take all steps as equally long.

    Returns
    -------
    ndarray
        A number a row. The server takes the mean of the workers' rows (learning rate 1, no momentum). Heavy-ball momentum at
        the workers makes gamma of their updates, not of their gradients, ``1 / sqrt(1 - beta^2)`` times as large by itself.
    """
    square = np.ones(len(table)) if equal else np.nan_to_num(column(table, "norm_update")) ** 2
    p, (number, worker) = column(table, "weight"), (column(table, name) for name in ("round", "client"))
    _, place = np.unique(number, return_inverse=True)
    after = _remaining(np.bincount(place, p**2 * square))
    own = (
        pd.Series(square).groupby([number, worker]).cumsum().to_numpy() - square
    )  # rows are in the order of steps
    with np.errstate(invalid="ignore", divide="ignore"):
        total = after[place] + (1 - 2 * p) * own
        return p * np.sqrt(square / np.maximum(total, 0.0))


def column(table: pd.DataFrame, name: str) -> np.ndarray:
    """Return a column as float64 numbers."""
    return np.asarray(table[name], dtype=float)


def _remaining(x: np.ndarray) -> np.ndarray:
    return x[::-1].cumsum()[::-1]


def controls(table: pd.DataFrame) -> list[str]:
    """Name the other reference points of a table, ``dot_update.<name>``."""
    return [c.partition(".")[2] for c in table if c.startswith("dot_update.")]


def derive(table: pd.DataFrame) -> pd.DataFrame:
    """Form the figures of a table of steps or of rounds.

    Parameters
    ----------
    table : pandas.DataFrame
        As `fedsim.geometry` records it: with ``norm_grad`` and ``dot_grad`` of steps, ``norm_D`` and ``dot_D`` of rounds.

    Returns
    -------
    pandas.DataFrame
        The same rows with ``rsi``, ``eb``, ``gamma``, ``lr`` and ``gamma_update`` (of the update with its sign changed)
        for the end of the path, ``gamma.<name>`` and ``gamma_update.<name>`` for the other references, the nulls ``null``
        and ``null_equal``, and ``gamma_wd`` where the gradient with weight decay was recorded.
    """
    table = table.copy()
    kind = "D" if "norm_D" in table else "grad"
    if kind == "D":
        table["null"] = walk_null(column(table, "norm_D"))
        table["null_equal"] = walk_null(np.ones(len(table)))
    else:
        table["null"], table["null_equal"] = worker_null(table), worker_null(table, equal=True)
    for name in ("", *(f".{c}" for c in controls(table))):
        distance = column(table, f"norm_dist{name}")
        found = measures(column(table, f"dot_{kind}{name}"), column(table, f"norm_{kind}"), distance)
        update = measures(-column(table, f"dot_update{name}"), column(table, "norm_update"), distance)
        table[f"gamma{name}"], table[f"gamma_update{name}"] = found.gamma, update.gamma
        if not name:
            table["rsi"], table["eb"], table["lr"] = found.rsi, found.eb, found.lr
    if "norm_grad_wd" in table:
        found = measures(*(column(table, name) for name in ("dot_grad_wd", "norm_grad_wd", "norm_dist")))
        table["gamma_wd"] = found.gamma
    return table


def before_last(table: pd.DataFrame) -> pd.DataFrame:
    """Leave out the last round, in which the way to the end is the step itself; of a single round nothing is left."""
    number = column(table, "round")
    return table.loc[number < number.max(initial=0)]


def summarise(table: pd.DataFrame, permuted: np.ndarray | None = None) -> dict[str, float]:
    """Summarise a derived table without its last round, where the end of the path is the end of the step.

    Parameters
    ----------
    table : pandas.DataFrame
        As `derive` returns it.
    permuted : ndarray or None
        ``gamma_update`` of the same updates with the rounds in random order, a number a place in time; the last is left out.

    Returns
    -------
    dict of str to float
        ``gamma``, its mean over steps, and ``positive``, the share of positive ones; the same as ``gamma.<name>`` and
        ``positive.<name>`` for other references, and as ``gamma_update`` and ``positive_update`` for updates; ``null``,
        the mean of the null, and ``over_null`` and ``over_null_update``, the other means divided by it; ``over_permuted``,
        mean ``gamma_update`` less that of the permuted rounds; ``n_undefined``, the rows without a gamma, which are in no
        mean.
    """
    early = before_last(table)

    def mean(x: np.ndarray) -> float:
        there = np.isfinite(x)
        return float(x[there].mean()) if there.any() else float("nan")

    found = {"n_undefined": float(np.isnan(column(early, "gamma")).sum())}
    for name in ("gamma", *(f"gamma.{c}" for c in controls(table)), "gamma_update"):
        values = column(early, name)
        positive = np.where(np.isnan(values), np.nan, values > 0)
        found |= {name: mean(values), name.replace("gamma", "positive"): mean(positive)}
    null = mean(column(early, "null"))
    found |= {
        "null": null,
        "over_null": found["gamma"] / null,
        "over_null_update": found["gamma_update"] / null,
    }
    if permuted is not None:
        found["over_permuted"] = found["gamma_update"] - mean(np.asarray(permuted, dtype=float)[:-1])
    return found
