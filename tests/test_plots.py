"""Figures: what they draw is what the history says, and nothing makes them fail a run."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import fedsim
from fedsim import canvas, plots, workers
from fedsim.federation import load


def history(n: int = 6) -> pd.DataFrame:
    k = np.arange(1, n + 1)
    return pd.DataFrame({
        "round": k,
        "local_steps": 11 * k,
        "gradients": 10 * k,
        "bytes_up": 100 * k,
        "bytes_down": 50 * k,
        "sim_time": 2.0 * k,
        "train_loss": 1.0 / k,
        "test_loss": 2.0 / k,
        "test_accuracy": 1 - 0.5 / k,
        "worker_loss.min": 0.5 / k,
        "worker_loss.p10": 0.8 / k,
        "worker_loss.median": 1.0 / k,
        "worker_loss.p90": 1.5 / k,
        "worker_loss.max": 3.0 / k,
        "held_accuracy.mean": 1 - 0.6 / k,
        "held_accuracy.p10": 1 - 0.8 / k,
        "held_accuracy.worst": 0.0 * k,
        "direction.cosine_distance": 0.1 / k,
        "direction.margin_ratio": 1 - 0.1 / k,
        "mine.value": k,
    })


KNOWN = {
    "rows": [3, 5],
    "labels": [[1, 2], [5, 0]],
    "classes": ["a", "b"],
    "loss": [0.1, None],
    "accuracy": [0.5, None],
}


def drawn(data: pd.DataFrame, known: workers.Workers) -> dict[str, plots.Drawing]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {d.name: d for d in plots.drawings(data, known)}
        for each in found.values():
            each.figure.draw_without_rendering()
        return found


def test_a_curve_is_its_column_and_a_band_its_percentiles() -> None:
    data = history()
    figure = plots.spread(data, "worker_loss")
    assert figure is not None
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), data[["round", "worker_loss.median"]])
    corners = axes.collections[0].get_paths()[0].vertices
    for name in ("p10", "p90"):
        for point in data[["round", f"worker_loss.{name}"]].to_numpy(float):
            assert (corners == point).all(axis=1).any()
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), data["worker_loss.min"])


@pytest.mark.parametrize("x", [*canvas.AXES])
def test_every_axis_is_what_its_name_says(x: str) -> None:
    data = history()
    expected = 150 * data["round"] if x == "bytes" else data[x]
    figure = plots.curves(data, ["test_loss"], "loss", x)
    assert figure is not None
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_xdata(), expected)
    assert figure.axes[0].get_xlabel() == canvas.AXES[x]


def test_an_unknown_axis_is_refused() -> None:
    with pytest.raises(
        ValueError, match="x = 'time' must be one of round, local_steps, gradients, bytes, sim_time"
    ):
        plots.curves(history(), ["test_loss"], "loss", "time")


def test_points_leave_out_what_is_not_finite_and_keep_the_last() -> None:
    data = pd.DataFrame({"round": range(1, 5001), "y": np.linspace(1, 2, 5000)})
    data.loc[[0, 7], "y"] = [math.nan, math.inf]
    place, y = canvas.points(data, "y")
    assert len(y) <= canvas.MOST_POINTS
    assert np.isfinite(y).all()
    assert (place[-1], y[-1]) == (5000, 2.0)


def test_every_run_has_its_figures_and_every_probe_one() -> None:
    found = drawn(history(), KNOWN)
    every = [name for name in plots.FIGURES if name != "domains"]  # for data with a held-out domain
    assert list(found) == [*every, "worker_loss", "direction", "mine"]
    assert all(d.caption.endswith(".") for d in found.values())


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf, None, 0.0, 1e-300, 1e300, -5.0])
def test_constant_missing_and_infinite_columns_do_no_harm(n: int, value: float | None) -> None:
    data = history(n)
    for column in data.columns[5:]:
        data[column] = pd.Series([value] * n, dtype=object)
    known = {"rows": [0, 0], "accuracy": [None, None]}
    found = drawn(data, known)
    there = value is not None and math.isfinite(value)
    assert ("loss" in found) == ("worker_loss" in found) == there
    assert not {"workers", "partition"} & found.keys()


def test_zeros_among_decades_are_drawn_on_a_logarithmic_axis() -> None:
    data = history(4)
    data["train_loss"] = [1.0, 1e-4, 0.0, 1e-8]
    axes = drawn(data, {})["loss"].figure.axes[0]
    assert axes.get_yscale() == "symlog"
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), data["train_loss"])


def test_there_is_nothing_to_draw_without_rounds() -> None:
    assert drawn(pd.DataFrame(), {}) == {}
    assert drawn(history(0), {}) == {}


def test_a_figure_that_fails_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(data: pd.DataFrame, known: workers.Workers) -> None:
        raise ZeroDivisionError("no")

    monkeypatch.setitem(plots.FIGURES, "loss", ("Loss.", fail))
    with pytest.warns(UserWarning, match="figure loss cannot be drawn: ZeroDivisionError: no"):
        files = plots.save_all(history(), {}, tmp_path / "figures")
    assert [f.name for f in files] == [
        "accuracy.png", "costs.png", "worker_loss.png", "direction.png", "mine.png",
    ]  # fmt: skip
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)


def test_few_workers_are_stacked_bars() -> None:
    figure = plots.partition(history(), KNOWN)
    assert figure is not None
    assert [[bar.get_height() for bar in part] for part in figure.axes[0].containers] == [[1, 5], [2, 0]]


def test_many_workers_are_a_map_of_an_even_sample() -> None:
    labels = np.random.default_rng(0).integers(0, 9, (400, 12))
    known = {"rows": labels.sum(1).tolist(), "labels": labels.tolist(), "classes": list("abcdefghijkl")}
    figure = plots.partition(history(), known)
    assert figure is not None
    above, axes = figure.axes[:2]
    shown = np.asarray(axes.images[0].get_array())
    assert shown.shape == (12, plots.MOST_COLUMNS)
    np.testing.assert_allclose(shown[:, [0, -1]].T, labels[[0, -1]] / labels[[0, -1]].sum(1, keepdims=True))
    assert len(above.patches) == plots.MOST_COLUMNS
    assert axes.get_xlabel() == "worker (150 of 400)"


def test_workers_are_sorted_by_accuracy_and_coloured_by_rows() -> None:
    known = {"rows": [4, 2, 9], "accuracy": [0.9, None, 0.3]}
    figure = plots.accuracy_by_worker(history(), known)
    assert figure is not None
    dots = figure.axes[0].collections[0]
    np.testing.assert_allclose(np.asarray(dots.get_offsets()), [[1, 0.3], [2, 0.9]])
    np.testing.assert_array_equal(dots.get_array(), [9, 4])


def test_svg_needs_no_font_and_follows_the_readers_colours() -> None:
    text = canvas.svg(drawn(history(), KNOWN)["loss"].figure)
    assert text.startswith("<svg")
    assert "<text" not in text
    assert "var(--ink)" in text
    assert "prefers-color-scheme: dark" in text
    assert canvas.INK not in text.partition("</style>")[2]


# --- what is known of each worker ------------------------------------------------------------------------------


def test_labels_are_counted_by_worker() -> None:
    e = fedsim.Experiment(num_workers=5, holdout=0.3, model="Linear()")
    federation = load(e)
    known = workers.describe(federation)
    for i in range(5):
        mine = federation.dataset.y[federation.train.rows(i)]
        assert known["labels"][i] == [int((mine == c).sum()) for c in range(10)]
        assert known["rows"][i] == len(mine)
    assert known["classes"] == [str(c) for c in range(10)]


def test_a_run_writes_what_each_worker_reaches(tmp_path: Path) -> None:
    e = fedsim.Experiment(num_workers=5, holdout=0.3, model="Linear()", rounds=2, out=str(tmp_path / "run"))
    done = fedsim.run(e)
    known = workers.read(done.path)
    reached = [a for a in known["accuracy"] if a is not None]
    assert np.mean(reached) == pytest.approx(done.history["held_accuracy.mean"].iloc[-1], abs=1e-12)
    assert min(reached) == pytest.approx(done.history["held_accuracy.worst"].iloc[-1], abs=1e-12)
    assert {f.stem for f in (done.path / "figures").iterdir()} == {
        "loss", "accuracy", "costs", "workers", "partition",
    }  # fmt: skip


def test_without_held_out_rows_there_is_no_accuracy_by_worker(tmp_path: Path) -> None:
    e = fedsim.Experiment(num_workers=3, model="Linear()", rounds=1, out=str(tmp_path / "run"))
    assert workers.read(fedsim.run(e).path).keys() == {"rows", "labels", "classes"}
    assert workers.read(tmp_path) == {}
