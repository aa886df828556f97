"""Accuracy within the training domains against accuracy in a held-out one, over many runs.

ID stands for in distribution and OOD for out of distribution. A run is chosen by ID; whatever is chosen by OOD is an oracle.

Tables of runs are frames with a row a run, in the order of the trials: ``held_out``, the name of the held-out domain; ``label``, for instance
the optimiser; ``id`` and ``ood``, accuracies after the last step; and for `boxes` ``train``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "sgd": {"lr": (-2.5, 0.3)},
    "momentum": {"lr": (-3.0, -0.3), "1-beta1": (-2.0, -0.3)},
    "nesterov": {"lr": (-3.0, -0.3), "1-beta1": (-2.0, -0.3)},
    "rmsprop": {"lr": (-4.5, -1.5), "1-beta2": (-3.0, -0.3), "eps": (-8.0, -3.0)},
    "adam": {"lr": (-4.5, -1.5), "1-beta1": (-2.0, -0.3), "1-beta2": (-3.0, -1.0), "eps": (-8.0, -3.0)},
}
"""Ranges of the decimal logarithms from which settings of each optimiser are drawn; ours."""

ADAPTIVE = ("rmsprop", "adam")
"""Optimisers that divide by a second moment."""


@dataclass(frozen=True)
class Draw:
    """Settings of one run: arguments of ``FedSGD``, weight decay of the gradient, and rows of a minibatch a worker."""

    optimiser: str
    arguments: dict[str, float]
    weight_decay: float
    batch_size: int

    @property
    def settings(self) -> dict[str, object]:
        """Keys of an experiment, with ``local-steps = 1``."""
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.arguments.items())
        return {
            "strategy": f"FedSGD({self.optimiser!r}, {arguments})",
            "client": f"SGD(lr=1.0, weight_decay={self.weight_decay!r})",
            "batch-size": self.batch_size,
            "local-steps": 1,
        }


def draw(optimiser: str, number: int, seed: int = 0) -> list[Draw]:
    """Draw settings of an optimiser, log-uniform within `RANGES`; weight decay ``10^U(-6, -2)``, batches ``floor(2^U(4, 7))``.

    Parameters
    ----------
    optimiser : str
        One of `RANGES`.
    number : int
        How many.
    seed : int
        The i-th draws of two optimisers share what they have in common.

    Returns
    -------
    list of Draw
        The first ones are the same for any number.

    Raises
    ------
    ValueError
        If the optimiser is unknown.

    Examples
    --------
    A run of a sweep is ``fedsim.Experiment.from_mapping(base | one.settings)``.

    >>> one = draw("momentum", 1)[0]
    >>> sorted(one.settings), sorted(one.arguments)
    (['batch-size', 'client', 'local-steps', 'strategy'], ['beta1', 'lr'])
    """
    if optimiser not in RANGES:
        raise ValueError(f"draw: optimiser = {optimiser!r} must be one of {', '.join(RANGES)}")
    found = []
    for i in range(number):
        rng = np.random.default_rng([seed, i])
        decay, batch = 10 ** rng.uniform(-6, -2), int(2 ** rng.uniform(4, 7))
        arguments = {}
        for name, (low, high) in RANGES[optimiser].items():
            value = float(10 ** rng.uniform(low, high))
            arguments[name.removeprefix("1-")] = 1 - value if name.startswith("1-") else value
        found.append(Draw(optimiser, arguments, float(decay), batch))
    return found


@dataclass(frozen=True)
class Bins:
    """Mean OOD accuracy of the runs in each bin of ID accuracy: ``edges`` ``[k + 1]``, ``mean`` and ``count`` ``[k]``; NaN for no run."""

    edges: np.ndarray
    mean: np.ndarray
    count: np.ndarray


def bins(inside: np.ndarray, outside: np.ndarray, width: float = 0.1) -> Bins:
    """Average OOD accuracy over bins ``[lo, hi)`` of ID accuracy; the last bin is closed.

    Parameters
    ----------
    inside, outside : ndarray
        ID and OOD accuracies, ``[n]`` in [0, 1].
    width : float
        Of a bin; 1 is a multiple of it.

    Returns
    -------
    Bins
        All runs are in one.

    Raises
    ------
    ValueError
        If an ID accuracy is not in [0, 1], or 1 is no multiple of the width.

    Examples
    --------
    >>> bins(np.array([0.1, 0.5, 1.0]), np.array([0.2, 0.4, 0.6]), width=0.5).count.tolist()
    [1, 2]
    """
    number = round(1 / width)
    if abs(number * width - 1) > 1e-9:
        raise ValueError(f"bins: width = {width} must divide 1")
    if not ((inside >= 0) & (inside <= 1)).all():
        raise ValueError("bins: ID accuracies must be in [0, 1]")
    edges = np.arange(number + 1) / number
    at = np.minimum(np.searchsorted(edges, inside, side="right") - 1, number - 1)
    count = np.bincount(at, minlength=number)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(at, outside, minlength=number) / np.where(count, count, np.nan)
    return Bins(edges, mean, count)


def budget(inside: np.ndarray, outside: np.ndarray, step: int = 10, top: int = 10) -> dict[str, np.ndarray]:
    """Say what is known after so many trials, in the order in which they were made.

    Parameters
    ----------
    inside, outside : ndarray
        ID and OOD accuracies, ``[n]``.
    step : int
        Trials between two points.
    top : int
        Runs that ``top`` averages, the best by ID.

    Returns
    -------
    dict of str to ndarray
        ``trials``; ``id`` of the best by ID so far and ``ood`` of the same run; ``oracle``, the best OOD so far;
        ``top``, mean OOD of the best by ID; ``mean``, mean OOD of all.
    """
    trials = np.unique([*range(step, len(inside) + 1, step), len(inside)])
    out: dict[str, list[float]] = {k: [] for k in ("id", "ood", "oracle", "top", "mean")}
    for n in trials:
        order = np.argsort(-inside[:n], kind="stable")
        out["id"].append(float(inside[order[0]]))
        out["ood"].append(float(outside[order[0]]))
        out["oracle"].append(float(outside[:n].max()))
        out["top"].append(float(outside[order[:top]].mean()))
        out["mean"].append(float(outside[:n].mean()))
    return {"trials": trials} | {k: np.array(v) for k, v in out.items()}


def boxes(runs: pd.DataFrame, threshold: float = 0.0, top: int = 10) -> pd.DataFrame:
    """Summarise training, ID and OOD accuracy and the gap ID - OOD by five numbers and their mean, for each label.

    Parameters
    ----------
    runs : pandas.DataFrame
        Columns ``held_out``, ``label``, ``train``, ``id`` and ``ood``.
    threshold : float
        Least ID accuracy of the runs that are kept.
    top : int
        How many of the best by ID are summarised on their own.

    Returns
    -------
    pandas.DataFrame
        A row for each held-out domain, subset ("all", "kept", "top"), label and figure ("train", "id", "ood", "gap"): ``runs``, ``mean``, ``low``,
        ``q1``, ``median``, ``q3`` and ``high``; NaN where no run is left.

    Examples
    --------
    >>> table = pd.DataFrame({"held_out": "far", "label": "sgd", "train": 1.0, "id": [0.5, 0.9], "ood": [0.4, 0.6]})
    >>> boxes(table, threshold=0.8).query("figure == 'ood'")[["subset", "runs", "median"]].values.tolist()
    [['all', 2, 0.5], ['kept', 1, 0.6], ['top', 2, 0.5]]
    """
    runs = runs.assign(gap=runs["id"] - runs["ood"])
    subsets = {
        "all": runs,
        "kept": runs[runs["id"] >= threshold],
        "top": runs
        .sort_values("id", ascending=False, kind="stable")
        .groupby(["held_out", "label"])
        .head(top),
    }
    labels, rows = dict.fromkeys(runs["label"]), []
    for held_out in dict.fromkeys(runs["held_out"]):
        for subset, some in subsets.items():
            for label in labels:
                own = some[(some["held_out"] == held_out) & (some["label"] == label)]
                for figure in ("train", "id", "ood", "gap"):
                    x = own[figure].to_numpy(dtype=float)
                    five = np.quantile(x, [0, 0.25, 0.5, 0.75, 1]) if len(x) else np.full(5, np.nan)
                    row = {"held_out": held_out, "subset": subset, "label": label, "figure": figure}
                    row |= {"runs": len(x), "mean": x.mean() if len(x) else np.nan}
                    rows.append(row | dict(zip(("low", "q1", "median", "q3", "high"), five, strict=True)))
    return pd.DataFrame(rows)


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Return Spearman's rank correlation, the correlation of ranks; equal values share their mean rank.

    Parameters
    ----------
    x, y : ndarray
        ``[n]``.

    Returns
    -------
    float
        In [-1, 1]; NaN where one of them is constant.

    Examples
    --------
    >>> round(rank_correlation(np.array([1.0, 2.0, 10.0]), np.array([0.0, 5.0, 6.0])), 12)
    1.0
    """
    if len(np.unique(x)) < 2 or len(np.unique(y)) < 2:
        return float("nan")
    return float(np.corrcoef(pd.Series(x).rank(), pd.Series(y).rank())[0, 1])


@dataclass(frozen=True)
class Pattern:
    """Slopes of OOD on ID below and above the median ID, and the bootstrap interval of their difference.

    ``name`` is "increasing returns" if the interval is above 0, "diminishing returns" if it is below, else "linear". It is a
    report and no test: the slopes are not stable at a few hundred runs.
    """

    low: float
    high: float
    interval: tuple[float, float]

    @property
    def name(self) -> str:
        """What the interval says."""
        if self.interval[0] > 0:
            return "increasing returns"
        return "diminishing returns" if self.interval[1] < 0 else "linear"


def pattern(inside: np.ndarray, outside: np.ndarray, draws: int = 1000, seed: int = 0) -> Pattern:
    """Compare the slope of OOD on ID among the better runs with that among the worse.

    Parameters
    ----------
    inside, outside : ndarray
        ID and OOD accuracies, ``[n]``, n >= 8.
    draws : int
        Bootstrap samples of the runs; the interval holds 95 % of them.
    seed : int
        Of the samples.

    Returns
    -------
    Pattern
        Slopes and interval.

    Raises
    ------
    ValueError
        If there are fewer than 8 runs.
    """
    if len(inside) < 8:
        raise ValueError(f"pattern: {len(inside)} runs must be >= 8")

    def slopes(at: np.ndarray) -> tuple[float, float]:
        x, y = inside[at], outside[at]
        upper = x >= np.median(x)
        return _slope(x[~upper], y[~upper]), _slope(x[upper], y[upper])

    rng = np.random.default_rng(seed)
    low, high = slopes(np.arange(len(inside)))
    sampled = np.array([slopes(rng.integers(len(inside), size=len(inside))) for _ in range(draws)])
    ends = np.nanquantile(sampled[:, 1] - sampled[:, 0], [0.025, 0.975])
    return Pattern(low, high, (float(ends[0]), float(ends[1])))


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    spread = ((x - x.mean()) ** 2).sum() if len(x) else 0.0
    return float(((x - x.mean()) * (y - y.mean())).sum() / spread) if spread > 0 else float("nan")


def compare(runs: pd.DataFrame, threshold: float = 0.0) -> dict[str, float | str]:
    """Compare optimisers in one held-out domain, over all runs and over those that are kept.

    Parameters
    ----------
    runs : pandas.DataFrame
        Columns ``label``, one of `RANGES`, ``id`` and ``ood``; of a single held-out domain.
    threshold : float
        Least ID accuracy of the runs that are kept.

    Returns
    -------
    dict of str to float or str
        How many runs there are and are kept; mean OOD, and mean ID, of the optimisers that are not adaptive, less that of those that are, over
        the runs that are kept; rank correlations of ID and OOD, and from 8 runs on what `pattern` reports of all of them.
    """
    kept = runs[runs["id"] >= threshold]
    adaptive = np.isin(np.asarray(kept["label"], dtype=str), ADAPTIVE)
    inside, outside = (runs[k].to_numpy(dtype=float) for k in ("id", "ood"))
    well = inside >= threshold
    found: dict[str, float | str] = {"runs": float(len(runs)), "kept": float(len(kept))}
    for name in ("ood", "id"):
        some, others = kept.loc[~adaptive, name], kept.loc[adaptive, name]
        known = len(some) and len(others)
        found[f"{name.upper()}, non-adaptive less adaptive, kept"] = (
            float(some.mean() - others.mean()) if known else float("nan")
        )
    found["rank correlation of ID and OOD, all"] = rank_correlation(inside, outside)
    found["rank correlation of ID and OOD, kept"] = rank_correlation(inside[well], outside[well])
    if len(runs) >= 8:
        seen = pattern(inside, outside)
        found["slope of OOD on ID below the median ID, all"] = seen.low
        found["slope above it"] = seen.high
        found["95 % interval of their difference"] = "{:.2f} to {:.2f}".format(*seen.interval)
        found["pattern"] = seen.name
    return found
