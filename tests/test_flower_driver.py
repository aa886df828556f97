"""The driver of `flwr run`: what it reports is what happened, and nothing is left running."""

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedsim.flower import flower_environment, run_flower

TINY_APP = Path(__file__).parent / "tiny_app"


def processes_with(mark: str) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FEDSIM_TEST_MARK") == mark:
                found.append(f"{process.pid} {process.name()}")
        except psutil.Error:
            continue
    return found


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Mark what a test starts; when it ends, nothing of that may be left."""
    value = uuid.uuid4().hex
    monkeypatch.setenv("FEDSIM_TEST_MARK", value)
    yield value
    assert processes_with(value) == []


@pytest.mark.slow
def test_a_run_is_completed_and_its_strings_arrive(mark: str, tmp_path: Path) -> None:
    lines: list[str] = []
    app = tmp_path / "app"
    shutil.copytree(TINY_APP, app)
    (app / ".gitignore").write_text("/runs/")
    for extra in (
        "env/pyvenv.cfg",
        "env/module.py",
        ".git/module.py",
        "runs/summary.json",
        "data.npz",
        "data/sources.py",
    ):
        (app / extra).parent.mkdir(exist_ok=True)
        (app / extra).write_text("{}")
    label = """LeaderSGD(pull=0.1, groups=4), "quoted" and 'it', a=1, b = [2]\\"""
    outcome = run_flower(app, {"label": label}, 2, on_line=lines.append)
    assert (outcome.status, outcome.details, outcome.completed) == ("finished:completed", "", True)
    assert f"label: {label}" in lines
    assert [f"node: {i} of 2, label {label}" in lines for i in range(2)] == [True, True]
    files = (
        "data/sources.py pyproject.toml tiny_app/__init__.py tiny_app/client_app.py tiny_app/server_app.py"
    )
    assert f"files: {files}" in lines
    assert not any("\x1b" in line for line in lines)
    assert any(outcome.run_id in line for line in lines)
    assert outcome.seconds > 0


@pytest.mark.slow
def test_a_run_whose_server_raises_has_failed(mark: str) -> None:
    lines: list[str] = []
    outcome = run_flower(TINY_APP, {"fail": True}, 2, on_line=lines.append)
    assert (outcome.status, outcome.completed) == ("finished:failed", False)
    assert "told to fail" in outcome.details
    assert "RuntimeError: told to fail" in lines


@pytest.mark.slow
def test_a_run_is_stopped_at_the_timeout(mark: str) -> None:
    outcome = run_flower(TINY_APP, {"seconds": 600.0}, 2, on_line=lambda line: None, timeout=8.0)
    assert (outcome.status, outcome.details) == ("finished:stopped", "the time was over")


@pytest.mark.slow
def test_an_interrupt_ends_everything_and_is_raised_again(mark: str) -> None:
    running: list[list[str]] = []

    def interrupt(line: str) -> None:
        if line.startswith("node: 1"):
            running.append(processes_with(mark))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_flower(TINY_APP, {"seconds": 600.0}, 2, on_line=interrupt)
    # The mark finds the simulation while it runs, or its absence afterwards would say nothing.
    assert any("simulation" in name for name in running[0])


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"labels": "x"}, "key 'labels' must be one of"),
        ({"label.inner": "x"}, r"key 'label\.inner' must be one of"),
    ],
)
def test_an_unknown_key_is_named(config: dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        run_flower(TINY_APP, config, 2)


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_supernodes = 0 must be at least 1"):
        run_flower(TINY_APP, {}, 0)
    with pytest.raises(ValueError, match=r"gpus_per_supernode = -0\.5 must be at least 0"):
        run_flower(TINY_APP, {}, 1, gpus_per_supernode=-0.5)
    with pytest.raises(ValueError, match=r"must have a section \[tool\.flwr\.app\]"):
        run_flower(tmp_path, {}, 1)


def test_an_unknown_connection_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="'absent' not found"):
        run_flower(TINY_APP, {}, 1, federation="absent")


def test_flower_neither_phones_home_nor_installs_packages() -> None:
    env = flower_environment()
    assert env["FLWR_TELEMETRY_ENABLED"] == env["RAY_USAGE_STATS_ENABLED"] == "0"
    assert env["FLWR_DISABLE_UPDATE_CHECK"] == env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert (Path(env["PATH"].split(os.pathsep)[0]) / "flower-superlink").exists()
