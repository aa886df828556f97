"""Main figures of runs: which there are, their final and best values, and their spread over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from fedsim import pages
from fedsim.canvas import points
from fedsim.plots import LABELS

BETTER = {
    "id_accuracy": max,
    "ood_accuracy": max,
    "test_accuracy": max,
    "test_loss": min,
    "test_perplexity": min,
    "held_accuracy.mean": max,
    "held_accuracy.p10": max,
    "held_loss.mean": min,
    "train_loss": min,
    "direction.cosine_distance": min,
    "bias.finite": min,
    "sharpness.lambda_max": min,
}
"""Main figures of a history in the order of tables, and whether more or less is better."""

DOMAINS = ("id_accuracy", "ood_accuracy")
"""Main figures of runs that hold out a domain; the central test set is this domain."""

PROBED = ("direction.cosine_distance", "bias.finite", "sharpness.lambda_max")
"""Main figures that a probe measures."""

NAMES = LABELS | {
    "id_accuracy": "accuracy in training domains",
    "ood_accuracy": "held-out accuracy",
    "held_accuracy.p10": "workers' own accuracy, 10th percentile",
    "direction.cosine_distance": "cosine distance",
    "bias.finite": "distance from minimiser",
    "sharpness.lambda_max": "largest Hessian eigenvalue",
}


def heading(column: str, kind: str) -> str:
    """Name a column of a table of final or best values; the best by a held-out domain is what nobody could have chosen."""
    return f"{NAMES[column]}, {kind}" + (" (oracle)" if column == "ood_accuracy" and kind == "best" else "")


class Value(NamedTuple):
    """Mean and standard deviation (of a sample, NaN for one run) over seeds, and their number."""

    mean: float
    sd: float
    n: int


def final(history: pd.DataFrame, column: str) -> float:
    """Return the last finite value of a column, NaN if there is none."""
    y = points(history, column)[1]
    return float(y[-1]) if len(y) else math.nan


def best(history: pd.DataFrame, column: str) -> tuple[float, int]:
    """Return the best value of a column and the first round that has it; NaN and 0 if there is none.

    Parameters
    ----------
    history : pandas.DataFrame
        As in `fedsim.Run`.
    column : str
        One of `BETTER`.

    Returns
    -------
    tuple of float and int
        Value and round.
    """
    if column not in history:
        return math.nan, 0
    y = np.asarray(history[column], dtype=float)
    there = np.flatnonzero(np.isfinite(y))
    if not len(there):
        return math.nan, 0
    i = there[y[there].argmax() if BETTER[column] is max else y[there].argmin()]
    return float(y[i]), int(history["round"].iloc[i])


def over_seeds(values: Sequence[float]) -> Value:
    """Average the values that are there.

    Parameters
    ----------
    values : sequence of float
        One a seed; NaN and infinite ones are left out.

    Returns
    -------
    Value
        NaN if none is there.

    Examples
    --------
    >>> over_seeds([1.0, 3.0, math.nan])
    Value(mean=2.0, sd=1.4142135623730951, n=2)
    """
    there = [v for v in values if math.isfinite(v)]
    if not there:
        return Value(math.nan, math.nan, 0)
    return Value(
        float(np.mean(there)), float(np.std(there, ddof=1)) if len(there) > 1 else math.nan, len(there)
    )


def plus_minus(mean: float, sd: float) -> str:
    """Write a mean with its standard deviation, the digits of which say how many the mean deserves.

    Parameters
    ----------
    mean, sd : float
        NaN for an ``sd`` that is not known.

    Returns
    -------
    str
        Empty if there is no mean.

    Examples
    --------
    >>> plus_minus(0.94512, 0.0123), plus_minus(0.94512, math.nan), plus_minus(0.5, 0.0)
    ('0.945 ± 0.012', '0.9451', '0.5 ± 0')
    """
    if not math.isfinite(mean):
        return ""
    if not math.isfinite(sd):
        return pages.number(mean)
    if sd == 0:
        return f"{pages.number(mean)} ± 0"
    digits = max(0, 1 - math.floor(math.log10(sd)))
    return f"{mean:.{digits}f} ± {sd:.{digits}f}" if digits <= 6 else f"{mean:.4g} ± {sd:.2g}"
