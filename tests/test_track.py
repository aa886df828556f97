"""Live curves for TensorBoard."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import fedsim
from fedsim import runs
from fedsim.track import FOLDER, tracking

E = fedsim.Experiment(num_workers=4, rounds=3, model="Linear()")


def nothing(*_: object) -> None:
    return None


def test_without_a_name_nothing_is_added(tmp_path: Path) -> None:
    with tracking("", tmp_path, nothing) as follow:
        assert follow is nothing


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(fedsim.BadInput, match="--track 'wandb': must be 'tensorboard'"),
        tracking("wandb", tmp_path, nothing),
    ):
        pass


def test_without_tensorboard_one_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(fedsim.BadInput, match="extra 'track'"), tracking("tensorboard", tmp_path, nothing):
        pass


def test_every_figure_of_every_round_is_a_scalar(tmp_path: Path) -> None:
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed"
    )
    told: list[int] = []
    e = E.replace({"out": str(tmp_path / "run")})
    with tracking("tensorboard", tmp_path / "run", lambda s, _: told.append(s.round)) as follow:
        done = runs.run(e, progress=follow, draw=False)
    read = events.EventAccumulator(str(done.path / FOLDER))
    read.Reload()
    assert told == [1, 2, 3]
    assert [s.step for s in read.Scalars("test_loss")] == [1, 2, 3]
    assert [s.value for s in read.Scalars("test_loss")] == pytest.approx(done.history["test_loss"].tolist())
