"""The run directory: what is in it, and that a run which was interrupted is the run that was not."""

import json
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tomli_w
import torch
from safetensors.torch import load_file
from torch import Tensor

import fedsim
from fedsim import checkpoints, plots, runs, tree
from fedsim.carriers import InProcess
from fedsim.experiment import BadInput, Experiment
from fedsim.probes import Snapshot
from fedsim.registry import REGISTRY
from fedsim.simulate import RunFailed
from fedsim.tree import Stack, Tree
from strategies import Broadcast, Report, Rule, State

HARD: dict[str, Any] = {
    "data": "Synthetic(rows=300, features=6, classes=4)",
    "partition": "Dirichlet(alpha=0.3)",
    "model": "MLP(hidden=(5,))",
    "client": "SGD(lr=0.1)",
    "strategy": "FedAvgM(lr=0.7, momentum=0.8)",
    "network": "Network(step=0.1, latency=0.2, bandwidth=1000.0)",
    "probes": "Drift(); WorkerLoss()",
    "num-workers": 9,
    "participation": 0.5,
    "local-steps": 0,
    "local-epochs": 1,
    "batch-size": 8,
    "holdout": 0.2,
    "eval-every": 3,
    "rounds": 12,
}
"""Server momentum, uneven data and epochs, partial participation, probes: all that a checkpoint must hold."""


class Elastic(Rule):
    """Workers keep their rows and are pulled to their mean; nothing but the rows knows the model."""

    keeps_rows: ClassVar[bool] = True
    keeps_state: ClassVar[bool] = True

    def __repr__(self) -> str:
        return "Elastic()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Elastic)

    def init(self, theta: Tree, num_workers: int) -> tuple[State, Broadcast]:
        return {"count": {"rounds": torch.zeros(())}}, {"centre": theta}

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        return {"count": {"rounds": state["count"]["rounds"] + 1}}, {"centre": tree.mean(rows, report.weight)}

    def adopt(self, row: Tree, broadcast: Broadcast, worker: Tensor) -> Tree:
        return tree.lerp(row, broadcast["centre"], 0.3)

    def model(self, state: State, rows: Stack) -> Tree:
        return tree.mean(rows, torch.ones(tree.num_rows(rows)))


@pytest.fixture
def stateful(monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """Workers with rows and momenta of their own, spread over three nodes."""
    monkeypatch.setitem(REGISTRY["strategy"], "Elastic", Elastic)
    changes = {
        "strategy": "Elastic()",
        "client": "SGD(lr=0.1, momentum=0.5)",
        "participation": 1.0,
        "probes": "",
        "nodes": 3,
    }
    return Experiment.from_mapping(HARD | changes)


@pytest.fixture(autouse=True)
def without_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the seconds that figures take, but for the test that looks at them."""
    if "promises" not in request.node.name:
        monkeypatch.setattr(plots, "save_all", lambda *_: [])


def history(path: Path) -> list[dict[str, Any]]:
    """Read the history without what a clock on the wall says."""
    lines = [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "wall_time"} for line in lines]


def assert_same(path: Path, other: Path) -> None:
    assert history(path) == history(other)
    assert (path / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


class Stop(Exception):
    """Raised in the middle of a run."""


def stop_after(number: int, error: type[BaseException] = Stop) -> runs.Progress:
    def progress(snapshot: Snapshot, experiment: Experiment) -> None:
        if snapshot.round == number:
            raise error

    return progress


# ----------------------------------------------------------------------------------- the directory


def test_the_run_directory_holds_what_it_promises(tmp_path: Path) -> None:
    path = tmp_path / "a" / "run"
    done = fedsim.run(Experiment.from_mapping(HARD | {"out": str(path)}))
    files = {str(f.relative_to(path)) for f in path.rglob("*") if f.is_file()}
    figures = {file for file in files if file.startswith("figures/")}
    assert files - figures == {
        "checkpoint/last.safetensors",
        "experiment.toml",
        "history.jsonl",
        "model.safetensors",
        "summary.json",
        "workers.json",
    }
    assert {"figures/loss.png", "figures/accuracy.png"} <= figures
    summary = json.loads((path / "summary.json").read_text())
    assert summary == done.summary
    wanted = {"rounds", "test_accuracy", "test_loss", "seconds_per_round", "peak_memory_mb", "device", "plan"}
    assert wanted | {"train_loss", "wall_time", "sim_time", "versions", "threads"} <= set(summary)
    assert (summary["rounds"], summary["device"], summary["plan"]) == (12, "cpu", "stacked")
    assert 0 < summary["seconds_per_round"] * 11 < summary["wall_time"]
    assert summary["peak_memory_mb"] > 50
    assert set(summary["versions"]) == {"fedsim", "flwr", "torch", "python"}
    model = load_file(path / "model.safetensors")
    assert set(model) == set(done.model)
    assert all(torch.equal(model[k], done.model[k]) for k in model)


def test_the_history_has_a_line_a_round(tmp_path: Path) -> None:
    path = tmp_path / "run"
    fedsim.run(Experiment.from_mapping(HARD | {"out": str(path)}))
    lines = [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(1, 13))
    always = {"round", "sim_time", "gradients", "local_steps", "bytes_up", "bytes_down", "participants"}
    always |= {"train_loss", "wall_time", "drift.mean", "drift.max", "worker_loss.median"}
    evaluated = {"test_loss", "test_accuracy", "held_loss.mean", "held_accuracy.worst"}
    for line in lines:
        assert always <= set(line)
        assert (evaluated <= set(line)) == (line["round"] % 3 == 0)
        assert evaluated <= set(line) or not evaluated & set(line)
        assert line["participants"] == 4
    for name in ("wall_time", "sim_time", "gradients", "local_steps", "bytes_up", "bytes_down"):
        column = [line[name] for line in lines]
        assert column == sorted(set(column)), f"{name} must grow"


def test_the_experiment_of_a_directory_gives_the_same_run_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = fedsim.run(Experiment.from_mapping(HARD))
    assert first.path.parent == Path("runs")
    second = fedsim.run(Experiment.from_toml(first.path / "experiment.toml"))
    assert second.path != first.path
    assert_same(first.path, second.path)


def test_the_written_experiment_says_what_auto_has_become(tmp_path: Path) -> None:
    e = Experiment.from_mapping(HARD | {"plan": "auto", "device": "auto", "out": str(tmp_path / "run")})
    done = fedsim.run(e)
    written = fedsim.load(done.path).experiment
    assert (written.plan, written.device) == (
        done.summary["plan"],
        str(done.model[next(iter(done.model))].device),
    )
    assert done.experiment == written
    assert e.plan == "auto"


def test_load_returns_what_run_returned(tmp_path: Path) -> None:
    done = fedsim.run(Experiment.from_mapping(HARD | {"out": str(tmp_path / "run")}))
    read = fedsim.load(done.path)
    assert (read.experiment, read.path, read.summary) == (done.experiment, done.path, done.summary)
    assert read.history.equals(done.history)
    # The order of parameters too, or vectors made of them would not be comparable.
    assert list(read.model) == list(done.model)
    assert torch.equal(tree.flatten(read.model), tree.flatten(done.model))


def test_load_of_a_run_that_has_not_ended(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        fedsim.run(Experiment.from_mapping(HARD | {"out": str(tmp_path / "run")}), progress=stop_after(5))
    read = fedsim.load(tmp_path / "run")
    assert (len(read.history), read.model, read.summary) == (5, {}, {})


@pytest.mark.parametrize("verb", [fedsim.load, fedsim.resume])
def test_a_directory_without_a_run_is_refused(verb: Any, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(BadInput, match=r"is not a run directory \(no experiment\.toml\)$"):
            verb(path)


def test_a_finished_run_is_not_overwritten(tmp_path: Path) -> None:
    e = Experiment.from_mapping(HARD | {"rounds": 1, "out": str(tmp_path / "run")})
    fedsim.run(e)
    with pytest.raises(BadInput, match="holds a run already; take another directory, or 'fedsim resume "):
        fedsim.run(e)


def test_damaged_model(tmp_path: Path) -> None:
    fedsim.run(Experiment.from_mapping(HARD | {"rounds": 1, "out": str(tmp_path)}))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(BadInput, match=r"model\.safetensors: is damaged \("):
        fedsim.load(tmp_path)


# ------------------------------------------------------------------------------------------ resume


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody interrupts."""
    path = tmp_path_factory.mktemp("whole") / "run"
    return fedsim.run(Experiment.from_mapping(HARD | {"out": str(path)})).path


@pytest.mark.parametrize("share", [runs.CHECKPOINT_SHARE, 1e-9])
def test_stopping_again_and_again_changes_nothing(
    share: float, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "CHECKPOINT_SHARE", share)  # the small one: a checkpoint after round 1, no more
    e = Experiment.from_mapping(HARD | {"out": str(tmp_path / "run")})
    with pytest.raises(Stop):
        fedsim.run(e, progress=stop_after(1))
    for number in (2, 3, 7, 11):
        with pytest.raises(Stop):
            fedsim.resume(e.out, progress=stop_after(number))
        assert len(history(Path(e.out))) == number
    done = fedsim.resume(e.out)
    assert_same(done.path, whole)
    assert done.summary["rounds"] == len(done.history) == 12
    assert done.history["wall_time"].is_monotonic_increasing


def test_rounds_behind_the_checkpoint_are_run_again(whole: Path, tmp_path: Path) -> None:
    # As after a power cut: the checkpoint is of round 4, the history has reached round 6 and half of 7.
    e = Experiment.from_mapping(HARD | {"out": str(tmp_path / "run")})
    with pytest.raises(Stop):
        fedsim.run(e, progress=stop_after(4))
    lines = (whole / "history.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "history.jsonl").write_text("".join(lines[:6]) + lines[6][:50])
    with pytest.warns(UserWarning, match=r"history\.jsonl: line 7 is truncated and ignored$"):
        assert len(fedsim.load(e.out).history) == 6
    with pytest.warns(UserWarning, match="line 7 is truncated and ignored"):
        done = fedsim.resume(e.out)
    assert_same(done.path, whole)


def test_without_a_checkpoint_a_run_begins_again(whole: Path, tmp_path: Path) -> None:
    e = Experiment.from_mapping(HARD | {"out": str(tmp_path / "run")})
    with pytest.raises(Stop):
        fedsim.run(e, progress=stop_after(4))
    (tmp_path / "run" / "checkpoint" / "last.safetensors").unlink()
    assert_same(fedsim.resume(e.out).path, whole)


def test_more_rounds_after_the_end(whole: Path, tmp_path: Path) -> None:
    short = fedsim.run(Experiment.from_mapping(HARD | {"rounds": 6, "out": str(tmp_path / "run")}))
    done = fedsim.resume(short.path, changes={"rounds": 12})
    assert_same(done.path, whole)
    assert fedsim.load(done.path).experiment.rounds == 12
    again = fedsim.resume(done.path)
    assert_same(again.path, whole)
    with pytest.raises(BadInput, match=r"^rounds = 5: .*run has 12 rounds already$"):
        fedsim.resume(done.path, changes={"rounds": 5})


def test_resume_with_another_plan_uses_it(tmp_path: Path) -> None:
    e = Experiment.from_mapping(HARD | {"dtype": "float64", "out": str(tmp_path / "run")})
    with pytest.raises(Stop):
        fedsim.run(e, progress=stop_after(4))
    done = fedsim.resume(e.out, changes={"plan": "loop"})
    assert (done.summary["plan"], done.experiment.plan) == ("loop", "loop")


def test_rows_and_states_of_workers_are_resumed(stateful: Experiment, tmp_path: Path) -> None:
    whole = fedsim.run(stateful.replace({"out": str(tmp_path / "whole")}))
    path = tmp_path / "run"
    with pytest.raises(Stop):
        fedsim.run(stateful.replace({"out": str(path)}), progress=stop_after(5))
    for number in (6, 9):
        with pytest.raises(Stop):
            fedsim.resume(path, progress=stop_after(number))
    done = fedsim.resume(path)
    assert_same(done.path, whole.path)
    # Nothing is left to do, and the model is known all the same.
    (path / "model.safetensors").unlink()
    assert_same(fedsim.resume(path).path, whole.path)


class Interrupted(InProcess):
    """Ctrl-C strikes in round 5 when the workers have trained and adopted already."""

    adopted = 0

    def adopt(self, broadcast: Broadcast, workers: Tensor | None = None) -> None:
        super().adopt(broadcast, workers)
        self.adopted += 1
        if self.adopted == 5:
            raise KeyboardInterrupt


def test_an_interrupt_within_a_round_leaves_the_round_before(stateful: Experiment, tmp_path: Path) -> None:
    whole = fedsim.run(stateful.replace({"out": str(tmp_path / "whole")}))
    e = stateful.replace({"out": str(tmp_path / "run")})
    with pytest.raises(KeyboardInterrupt):
        fedsim.run(e, carrier=Interrupted(e, fedsim.federation.load(e)))
    assert len(history(tmp_path / "run")) == 4
    assert_same(fedsim.resume(e.out).path, whole.path)


def test_a_checkpoint_keeps_order_and_identity(tmp_path: Path) -> None:
    e = Experiment.from_mapping(HARD | {"out": str(tmp_path)})
    with pytest.raises(Stop):
        fedsim.run(e, progress=stop_after(2))
    found = checkpoints.read_checkpoint(tmp_path, e, torch.device("cpu"))
    assert found is not None
    theta = fedsim.federation.load(e).theta
    model = found.position.state["model"]
    assert list(model) == list(found.position.broadcast["model"]) == list(found.model) == list(theta)
    assert all(model[k] is found.position.broadcast["model"][k] is found.model[k] for k in theta)
    numbers = sum(x.numel() for x in load_file(tmp_path / "checkpoint" / "last.safetensors").values())
    assert numbers == 2 * tree.num_parameters(theta)  # model and velocity, each once


@pytest.mark.parametrize(
    ("changes", "listed"),
    [
        ({"seed": 1}, "seed: 0 there, 1 here"),
        (
            {"client": "SGD(lr=0.2)", "num-workers": 10},
            "client: 'SGD(lr=0.1)' there, 'SGD(lr=0.2)' here; num-workers: 9 there, 10 here",
        ),
        ({"dtype": "float64"}, "dtype: 'float32' there, 'float64' here"),
    ],
)
def test_a_checkpoint_of_another_experiment_is_refused(
    changes: dict[str, Any], listed: str, whole: Path
) -> None:
    before = (whole / "history.jsonl").read_bytes()
    with pytest.raises(BadInput) as caught:
        fedsim.resume(whole, changes=changes)
    file = whole / "checkpoint" / "last.safetensors"
    assert str(caught.value) == f"{file}: is a checkpoint of another experiment: {listed}"
    assert (whole / "history.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: b"\0" * len(content),
        lambda content: content.replace(b'\\"model\\"', b'\\"medol\\"', 1),
        lambda content: content.replace(b'"clock"', b'"clack"'),
    ],
)
def test_a_damaged_checkpoint_is_refused(damage: Any, whole: Path, tmp_path: Path) -> None:
    e = Experiment.from_mapping(HARD | {"out": str(tmp_path)})
    with pytest.raises(Stop):
        fedsim.run(e, progress=stop_after(2))
    file = tmp_path / "checkpoint" / "last.safetensors"
    before = file.read_bytes()
    after = damage(before)
    assert after != before
    file.write_bytes(after)
    with pytest.raises(BadInput) as caught:
        fedsim.resume(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{file}: is ")
    assert "is damaged (" in message or "another experiment" in message
    assert len(message.splitlines()) == 1
    assert len(history(tmp_path)) == 2


def test_diverged_runs_keep_the_last_good_model(tmp_path: Path) -> None:
    e = Experiment.from_mapping(HARD | {"client": "SGD(lr=1e20)", "out": str(tmp_path)})
    with pytest.raises(RunFailed, match="not finite; the last good model is that of round"):
        fedsim.run(e)
    assert len(fedsim.load(tmp_path).history) < 12


# ------------------------------------------------------------------------------- disks and processes


def test_a_place_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out, reason in (("file", "File exists"), ("file/run", "Not a directory")):
        with pytest.raises(RunFailed) as caught:
            fedsim.run(Experiment.from_mapping(HARD | {"out": str(tmp_path / out)}))
        assert reason in str(caught.value) or "Not a directory" in str(caught.value)
        assert str(caught.value).startswith(f"{tmp_path / out}: cannot be written: ")
        assert len(str(caught.value).splitlines()) == 1


def start_cli(*arguments: str, file_limit: int = resource.RLIM_INFINITY) -> subprocess.Popen[str]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))

    return subprocess.Popen(
        [sys.executable, "-m", "fedsim.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )


def wait_for_rounds(process: subprocess.Popen[str], path: Path, number: int) -> None:
    """Wait until the history has so many lines."""
    file = path / "history.jsonl"
    deadline = time.monotonic() + 120
    while not file.exists() or file.read_bytes().count(b"\n") < number:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


LONG = {"rounds": 120, "eval-every": 30}


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of many rounds that nobody interrupts."""
    path = tmp_path_factory.mktemp("long") / "run"
    return fedsim.run(Experiment.from_mapping(HARD | LONG | {"out": str(path)})).path


@pytest.mark.slow
def test_kill_9_at_any_moment_changes_nothing(long: Path, tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_text(tomli_w.dumps(HARD | LONG))
    path, draw = tmp_path / "run", random.Random(7)
    command = ["run", str(tmp_path / "e.toml"), "--out", str(path)]
    for number in sorted(draw.sample(range(1, 100), 3)):
        process = start_cli(*command)
        wait_for_rounds(process, path, number)
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        command = ["resume", str(path)]
    process = start_cli(*command)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert_same(path, long)


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(long: Path, tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_text(tomli_w.dumps(HARD | LONG))
    path = tmp_path / "run"
    process = start_cli("run", str(tmp_path / "e.toml"), "--out", str(path))
    wait_for_rounds(process, path, 3)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert stderr == f"fedsim: interrupted; 'fedsim resume {path}' continues\n"
    e = runs.read_experiment(path)
    found = checkpoints.read_checkpoint(path, e, torch.device("cpu"))
    assert found is not None
    # The signal may come between a line and its checkpoint; then the round of that line is run again.
    assert found.position.round in {len(history(path)), len(history(path)) - 1}
    assert_same(fedsim.resume(path).path, long)


def test_a_full_disk_is_one_line_and_what_was_written_stays(long: Path, tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_text(tomli_w.dumps(HARD | LONG))
    path = tmp_path / "run"
    process = start_cli("run", str(tmp_path / "e.toml"), "--out", str(path), file_limit=20_000)
    _, stderr = process.communicate()
    assert process.returncode == 1
    assert stderr.startswith(f"fedsim: {path}: cannot be written: ")
    assert stderr.endswith("; what was written stays readable\n")
    assert len(stderr.splitlines()) == 1
    assert not list(path.rglob("*.tmp"))
    with pytest.warns(UserWarning, match="is truncated and ignored"):
        read = fedsim.load(path)
    assert len(read.history) > 10
    with pytest.warns(UserWarning, match="is truncated and ignored"):
        done = fedsim.resume(path)
    assert_same(done.path, long)


def test_new_directories_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        names.append(runs.new_directory())
        names[-1].mkdir(parents=True)
    assert len(set(names)) == 3
