"""Figures of a run: from its history, and from what is known of each worker."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from fedsim.canvas import HEIGHT, PALE, WIDTH, canvas, finish, legend, marks, palette, points, style
from fedsim.workers import Workers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {
    "train_loss": "training loss",
    "test_loss": "test loss",
    "test_accuracy": "test accuracy",
    "test_perplexity": "test perplexity",
    "id_accuracy": "training domains",
    "ood_accuracy": "held-out domain",
    "held_loss.mean": "workers' own loss, mean",
    "held_accuracy.mean": "workers' own accuracy, mean",
}
"""How columns of the history are called in figures."""

MOST_BARS, MOST_COLUMNS, MOST_COLOURS = 24, 150, 10
"""Workers drawn as bars, workers drawn as columns of a map, and classes told apart by colour."""


class Drawing(NamedTuple):
    """A figure, the name of its file without suffix, and a sentence that says what it shows."""

    name: str
    caption: str
    figure: Figure


def curves(
    history: pd.DataFrame, columns: list[str], ylabel: str, x: str = "round", band: str = ""
) -> Figure | None:
    """Draw columns of a history, and the spread over workers as a band.

    Parameters
    ----------
    history : pandas.DataFrame
        As in `fedsim.Run`.
    columns : list of str
        Columns to draw; those without a finite value are left out.
    ylabel : str
        Label of the vertical axis.
    x : str
        One of `AXES`.
    band : str
        Prefix of the columns ``<band>.p10``, ``.p90``, ``.worst``, ``.min``, ``.max``; those that are there are drawn.

    Returns
    -------
    matplotlib.figure.Figure or None
        None if no column has a finite value.
    """
    with style():
        figure = canvas()
        axes = figure.add_subplot()
        drawn = []
        colours = dict(zip(columns, palette(len(columns)), strict=True))
        for column in columns:
            place, y = points(history, column, x)
            if not len(y):
                continue
            drawn.append(y)
            label = LABELS.get(column, column.partition(".")[2] or column)
            axes.plot(place, y, label=label, color=colours[column], marker=marks(y))
            if column in (f"{band}.mean", f"{band}.median"):
                drawn += _band(axes, history, column, band, x, colours[column])
        if not drawn:
            return None
        finish(axes, ylabel, x, np.concatenate(drawn))
        legend(figure, axes)
    return figure


def spread(history: pd.DataFrame, prefix: str) -> Figure | None:
    """Draw a figure of workers as its median, the band between its 10th and 90th percentiles, and its extremes."""
    return curves(history, [f"{prefix}.median"], prefix.replace("_", " "), band=prefix)


def lines(history: pd.DataFrame, prefix: str) -> Figure | None:
    """Draw all columns of a probe as lines: the figure of every probe that has no other.

    Parameters
    ----------
    history : pandas.DataFrame
        As in `fedsim.Run`.
    prefix : str
        Name of the probe in the history.

    Returns
    -------
    matplotlib.figure.Figure or None
        None if no column has a finite value.
    """
    own = [c for c in history if c.startswith(f"{prefix}.")]
    some = f" ({MOST_COLOURS} of {len(own)} figures)" if len(own) > MOST_COLOURS else ""
    return curves(history, own[:MOST_COLOURS], prefix.replace("_", " ") + some)


def panels(history: pd.DataFrame, prefix: str) -> Figure | None:
    """Draw the columns of a probe in panels, one below the other, as `PANELS` says.

    Parameters
    ----------
    history : pandas.DataFrame
        As in `fedsim.Run`.
    prefix : str
        Name of the probe in the history; ratios of ``direction`` tend to 1 on separable data, and those that do so
        for plain gradient steps alone are left out where there is no invariant.

    Returns
    -------
    matplotlib.figure.Figure or None
        None if no column has a finite value.
    """
    wanted = [(y, {c: points(history, f"{prefix}.{c}") for c in columns}) for y, columns in PANELS[prefix]]
    laws = () if prefix != "direction" or "direction.invariant" in history else LAWS
    there = [(y, {c: xy for c, xy in found.items() if len(xy[1]) and c not in laws}) for y, found in wanted]
    there = [(y, found) for y, found in there if found]
    if not there:
        return None
    with style():
        figure = canvas(1.3 * WIDTH, HEIGHT * (0.4 + 0.6 * len(there)))
        rows = figure.subplots(len(there), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (ylabel, found) in zip(rows, there, strict=True):
            for (column, (place, y)), colour in zip(found.items(), palette(len(found)), strict=True):
                label = column.replace("_", " ").replace(".", " ")
                axes.plot(place, y, label=label, color=colour, marker=marks(y))
            finish(axes, ylabel, "round", np.concatenate([y for _, y in found.values()]))
            axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
            if prefix == "direction":
                if ylabel == "tends to 1":
                    axes.axhline(1.0, color=PALE, linestyle=":", linewidth=1.2)
                elif all((y > 0).all() for _, y in found.values()):
                    axes.set_yscale("log")
                if len(history) >= 20:
                    axes.set_xscale("log")
        for axes in rows[:-1]:
            axes.set_xlabel("")
    return figure


def costs(history: pd.DataFrame, workers: Workers) -> Figure | None:
    """Draw the accuracy, or else the loss, against what it costs: gradients, bytes, simulated seconds."""
    columns = [c for c in ("test_accuracy", "test_loss", "train_loss") if len(points(history, c)[1]) > 1]
    if not columns:
        return None
    with style():
        figure = canvas(2 * WIDTH, HEIGHT)
        panels = figure.subplots(1, 3, sharey=True)
        for axes, x in zip(panels, ("gradients", "bytes", "sim_time"), strict=True):
            place, y = points(history, columns[0], x)
            axes.plot(place, y, color=palette(1)[0], marker=marks(y))
            finish(axes, LABELS[columns[0]] if axes is panels[0] else "", x, y)
    return figure


def accuracy_by_worker(history: pd.DataFrame, workers: Workers) -> Figure | None:
    """Draw each worker's accuracy on its own held-out rows, sorted, coloured by the number of its training rows."""
    found = np.array([np.nan if a is None else a for a in workers.get("accuracy", [])], dtype=float)
    known = np.flatnonzero(np.isfinite(found))
    if not len(known):
        return None
    order = known[np.argsort(found[known], kind="stable")]
    rows = np.asarray(workers.get("rows", np.zeros(len(found))), dtype=float)[order]
    with style():
        figure = canvas()
        axes = figure.add_subplot()
        size = float(np.clip(1500 / len(order), 6, 45))
        dots = axes.scatter(
            np.arange(1, len(order) + 1), found[order], c=rows, s=size, cmap="viridis", zorder=3
        )
        mean, low = found[order].mean(), np.quantile(found[order], 0.1)
        axes.axhline(mean, color=PALE, label=f"mean {mean:.3f}")
        axes.axhline(low, color=PALE, linestyle="--", label=f"10th percentile {low:.3f}")
        finish(axes, "accuracy on own rows", "round", found[order])
        axes.set_xlabel("workers, sorted")
        if "rows" in workers:
            _bar(figure, dots, axes, "training rows")
        legend(figure, axes)
    return figure


def partition(history: pd.DataFrame, workers: Workers) -> Figure | None:
    """Draw how many rows of each label every worker has: bars for few workers, a map for many, an even sample of more."""
    rows = np.asarray(workers.get("rows", []), dtype=float)
    if not len(rows) or not rows.sum():
        return None
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MOST_COLUMNS)).round().astype(int))
    labels = np.asarray(workers["labels"])[chosen] if "labels" in workers else None
    with style():
        if labels is None:
            figure = canvas(height=0.75 * HEIGHT)
            axes = figure.add_subplot()
            axes.bar(np.arange(len(chosen)), rows[chosen], width=1.0, color=palette(1)[0], linewidth=0)
            axes.set_ylabel("training rows")
        elif len(rows) <= MOST_BARS and labels.shape[1] <= MOST_COLOURS:
            figure = canvas()
            axes = figure.add_subplot()
            _stack(axes, labels, workers["classes"])
            legend(figure, axes, columns=5, title="label")
        else:
            figure = canvas(height=1.15 * HEIGHT)
            axes = _map(figure, labels, rows[chosen], workers["classes"])
        step = next(s for s in (1, 2, 5, 10, 20, 50) if len(chosen) <= 8 * s)
        axes.set_xticks(np.arange(0, len(chosen), step), chosen[::step].tolist())
        axes.set_xlabel("worker" if len(chosen) == len(rows) else f"worker ({len(chosen)} of {len(rows):,})")
        axes.grid(visible=False, axis="x")
        for each in figure.axes:
            each.spines[["top", "right"]].set_visible(False)
    return figure


def _loss(history: pd.DataFrame, workers: Workers) -> Figure | None:
    return curves(history, ["train_loss", "test_loss", "held_loss.mean"], "loss", band="held_loss")


def _accuracy(history: pd.DataFrame, workers: Workers) -> Figure | None:
    return curves(history, ["test_accuracy", "held_accuracy.mean"], "accuracy", band="held_accuracy")


def _domains(history: pd.DataFrame, workers: Workers) -> Figure | None:
    if "id_accuracy" not in history:
        return None
    return curves(history, ["id_accuracy", "ood_accuracy"], "accuracy")


FIGURES: dict[str, tuple[str, Callable[[pd.DataFrame, Workers], Figure | None]]] = {
    "loss": ("Loss after each round.", _loss),
    "accuracy": ("Accuracy after each round.", _accuracy),
    "domains": ("Accuracy within the training domains, and in the domain that no worker has.", _domains),
    "costs": ("What it costs: gradients and bytes of all workers, and the simulated clock.", costs),
    "workers": (
        "Accuracy of the final model on the rows that each worker has kept for itself.",
        accuracy_by_worker,
    ),
    "partition": ("Training rows by worker and label.", partition),
}
"""Figures of every run by name: caption and how to draw them from the history and what is known of each worker."""

OUTSIDE = ("loss", "accuracy", "domains", "costs")
"""Figures that show the central test set, and so name the domain that it is, where it is one."""

LAWS = ("slope_ratio", "norm_growth", "loss_exponent")
"""Columns of ``direction`` that tend to 1 for plain gradient steps alone."""

PANELS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "direction": (
        ("distance", ("cosine_distance", "margin_gap", "relative_error")),
        ("tends to 1", ("invariant", "slope_ratio", "norm_growth", "loss_exponent", "margin_ratio")),
    ),
    "disagreement": (
        ("distance", ("gap_mean", "gap_max", "consensus")),
        ("rank", ("rank", "effective_rank")),
        ("share", ("capture", "capture_gradients", "capture_random", "overlap", "chi", "top")),
        ("eigenvalue", ("lam_1", "lam_k", "lam_next")),
    ),
    "leaders": (
        ("distance", ("distance.mean", "distance.max")),
        ("share of syncs led", ("share.min", "share.max")),
        ("loss", ("spread",)),
    ),
    "sharpness": (
        ("loss", ("loss",)),
        ("largest eigenvalue", ("lambda_max",)),
        ("trace", ("trace",)),
        ("rise of the loss", ("rise", "m_sharpness")),
    ),
    "geometry": (
        ("gamma", ("gamma", "gamma_update", "gamma_other", "null")),
        ("ratio", ("rsi", "eb")),
        ("best rate, post hoc", ("lr",)),
        ("agreement", ("agreement",)),
        ("distance", ("distance",)),
    ),
    "normalised_margin": (("margin", ("value",)), ("norm", ("norm",))),
    "environments": (
        ("risk", ("risk.mean", "risk.max")),
        ("penalty", ("penalty.mean", "penalty.max")),
        ("accuracy", ("accuracy.mean", "accuracy.min")),
    ),
}
"""Panels of probes: label of the vertical axis, and columns without the prefix."""

PROBES: dict[str, tuple[str, Callable[[pd.DataFrame, str], Figure | None]]] = {
    "worker_loss": (
        "Training loss over workers: median, 10th to 90th percentile, lowest and highest.",
        spread,
    ),
    "drift": ("How far local steps carry workers from the model they received, relative to its norm.", lines),
    "direction": (
        "Distance of the model from the hard-margin solution, and ratios that tend to 1 on separable data; the "
        "relative error matters only where the limit has a length, as for projections.",
        panels,
    ),
    "disagreement": ("How far workers are from their average, and what their gaps span.", panels),
    "leaders": ("How far the other workers are from the best, and how evenly they lead.", panels),
    "sharpness": (
        "How flat the loss is around the model: largest eigenvalue and trace of the Hessian with the loss they belong to, "
        "and the rise of the loss within a radius, over all rows and over groups of rows.",
        panels,
    ),
    "geometry": (
        "Rounds against the point where an earlier run of the same experiment has ended: gamma, with the gamma of a random walk "
        "(null) and that against the end of another run; secant inequality, error bound, and the server learning rate that would have come nearest.",
        panels,
    ),
    "normalised_margin": ("Smallest normalised margin, and the norm of the parameters.", panels),
    "environments": (
        "Risk, invariance penalty and accuracy of the model over environments: mean and worst.",
        panels,
    ),
    "bias": ("Distance of the model from the limit of centralised training.", lines),
}
"""Figures of probes by the prefix of their columns; a probe that is not here has its columns drawn as lines."""


def drawings(history: pd.DataFrame, workers: Workers) -> Iterator[Drawing]:
    """Draw all figures of a run; one that cannot be drawn is left out with a warning.

    Parameters
    ----------
    history : pandas.DataFrame
        As in `fedsim.Run`.
    workers : mapping
        As `fedsim.workers.read` gives it.

    Yields
    ------
    Drawing
        Figures that have something to show.
    """
    prefixes = dict.fromkeys(c.partition(".")[0] for c in history if "." in c)
    jobs: list[tuple[str, str, Callable[[], Figure | None]]] = []
    for name, (caption, draw) in FIGURES.items():
        jobs.append((name, caption, lambda draw=draw: draw(history, workers)))
    for prefix in prefixes:
        if prefix not in ("held_loss", "held_accuracy"):
            caption, draw_probe = PROBES.get(prefix, (f"Probe {prefix}.", lines))
            jobs.append((prefix, caption, lambda draw=draw_probe, prefix=prefix: draw(history, prefix)))
    for name, caption, job in jobs:
        try:
            figure = job()
        except Exception as error:
            _excuse(name, error)
            continue
        if figure is not None:
            if name in OUTSIDE and "held_out" in workers:
                figure.axes[0].set_title(f"held out: {workers['held_out']}", fontsize="small")
            yield Drawing(name, caption, figure)


def save_all(history: pd.DataFrame, workers: Workers, folder: Path) -> list[Path]:
    """Draw all figures of a run and write them as PNG.

    Parameters
    ----------
    history : pandas.DataFrame
        As in `fedsim.Run`.
    workers : mapping
        As `fedsim.workers.read` gives it.
    folder : Path
        Made if absent.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, _, figure in drawings(history, workers):
        try:
            with style():
                figure.savefig(folder / f"{name}.png", dpi=200)
        except OSError:
            raise
        except Exception as error:
            _excuse(name, error)
            continue
        files.append(folder / f"{name}.png")
    return files


def _excuse(name: str, error: Exception) -> None:
    """Warn: a run that has ended well must not fail for a picture."""
    warnings.warn(f"figure {name} cannot be drawn: {type(error).__name__}: {error}", stacklevel=3)


def _band(
    axes: Axes, history: pd.DataFrame, centre: str, prefix: str, x: str, colour: Any
) -> list[np.ndarray]:
    """Shade from the 10th to the 90th percentile, or from the centre to the one that is known; dot the extremes."""
    drawn = []
    edges = {name: points(history, f"{prefix}.{name}", x) for name in ("p10", "p90")}
    place, middle = points(history, centre, x)
    low, high = (y if len(y) == len(place) else middle for _, y in edges.values())
    if low is not middle or high is not middle:
        ends = ("10th" if low is not middle else "mean", "90th percentile" if high is not middle else "mean")
        label = "10th percentile to mean" if ends[1] == "mean" else f"{ends[0]} to 90th percentile"
        axes.fill_between(place, low, high, color=colour, alpha=0.22, linewidth=0, label=label)
        drawn += [low, high]
    for name in ("min", "max", "worst"):
        place, y = points(history, f"{prefix}.{name}", x)
        if len(y):
            label = {"min": "lowest and highest", "worst": "worst worker"}.get(name)
            axes.plot(place, y, color=colour, linestyle=":", linewidth=1.2, label=label, marker=marks(y))
            drawn.append(y)
    return drawn


def _stack(axes: Axes, labels: np.ndarray, classes: list[str]) -> None:
    """Draw a bar a worker, with a part a label."""
    bottom = np.zeros(len(labels))
    for i, colour in enumerate(palette(labels.shape[1])):
        axes.bar(
            np.arange(len(labels)), labels[:, i], 0.85, bottom, color=colour, label=classes[i], linewidth=0
        )
        bottom += labels[:, i]
    axes.set_ylabel("training rows")


def _map(figure: Figure, labels: np.ndarray, rows: np.ndarray, classes: list[str]) -> Axes:
    """Draw a column a worker: its rows above, and the share of each label in them below."""
    above, axes = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3))
    above.bar(np.arange(len(rows)), rows, width=1.0, color=palette(1)[0], linewidth=0)
    above.set_ylabel("rows")
    above.grid(visible=False, axis="x")
    share = labels / np.maximum(rows, 1)[:, None]
    image = axes.imshow(
        share.T, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest", origin="lower"
    )
    axes.grid(visible=False)
    ticks = np.unique(np.linspace(0, len(classes) - 1, min(len(classes), 10)).astype(int))
    axes.set_yticks(ticks, [classes[i] for i in ticks])
    axes.set_ylabel("label")
    _bar(figure, image, axes, "share of the worker's rows")
    return axes


def _bar(figure: Figure, drawn: Any, axes: Axes, label: str) -> None:
    bar = figure.colorbar(drawn, ax=axes, label=label, aspect=28, pad=0.02)
    bar.outline.set_visible(False)
