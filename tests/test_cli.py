"""The command line: what it says, where, and with which exit code."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest
import tomli_w
from rich.console import Console

import fedsim
from fedsim import cli, flower, plots, runs
from fedsim.experiment import Experiment
from fedsim.flower import FlowerOutcome
from fedsim.registry import KINDS, REGISTRY

TINY = {
    "data": "Synthetic(rows=120, features=4, classes=3)",
    "model": "Linear()",
    "num-workers": 4,
    "rounds": 5,
    "local-steps": 2,
}


class Said(NamedTuple):
    """What a command came to."""

    code: int
    out: str
    err: str


class Caller:
    """Calls the command line within this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(self, *arguments: str) -> Said:
        self.monkeypatch.setattr(sys, "argv", ["fedsim", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = self.capfd.readouterr()
        assert isinstance(caught.value.code, int)
        return Said(caught.value.code, out, err)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Caller:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(plots, "save_all", lambda *_: [])
    (tmp_path / "e.toml").write_text(tomli_w.dumps(TINY))
    return Caller(monkeypatch, capfd)


# --------------------------------------------------------------------------------------------- run


def test_run_prints_rounds_figures_and_the_directory(call: Caller) -> None:
    said = call("run", "e.toml", "--out", "here")
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    number = r"\d+\.\d{4}"
    for i, line in enumerate(lines[:5], 1):
        assert re.fullmatch(f"round {i}/5  loss {number}  test loss {number}  test accuracy {number}", line)
    summary = fedsim.load("here").summary
    assert f"test_accuracy      {summary['test_accuracy']:.4g}" in said.out
    assert "run directory: here" in lines
    assert "\x1b" not in said.out


def test_run_without_an_experiment_runs_the_defaults(call: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Experiment] = []

    def run(experiment: Experiment, progress: runs.Progress) -> runs.Run:
        asked.append(experiment)
        raise fedsim.BadInput("seen")

    monkeypatch.setattr(runs, "run", run)
    assert call("run") == Said(2, "", "fedsim: seen\n")
    assert asked[0].out.startswith("runs")
    assert asked[0].replace({"out": ""}) == Experiment()


def test_overrides_win_over_the_file(call: Caller) -> None:
    said = call("run", "e.toml", "-o", "rounds=2", "--override", "client=SGD(lr=0.5)", "-o", "out=there")
    assert said.code == 0
    e = fedsim.load("there").experiment
    assert (e.rounds, e.client, e.num_workers) == (2, "SGD(lr=0.5)", 4)


def test_long_runs_print_about_twenty_lines(call: Caller) -> None:
    said = call("run", "e.toml", "-o", "rounds=110", "--out", "here")
    shown = re.findall(r"^round +(\d+)/110", said.out, re.MULTILINE)
    assert shown == ["1", *(str(i) for i in range(5, 111, 5))]


def test_a_terminal_shows_speed_loss_and_time_left(call: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(cli, "console", Console(file=screen, force_terminal=True, width=120))
    said = call("run", "e.toml", "-o", "rounds=40", "--out", "here")
    assert (said.code, said.out, said.err) == (0, "", "")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert re.search(r"round 40/40 .*━ \d+\.\d/s loss \d\.\d{4}  test loss .* 0:00:00", shown)
    assert "run directory: here" in shown


def test_a_real_terminal(tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    (tmp_path / "e.toml").write_text(tomli_w.dumps(TINY))
    process = subprocess.Popen(
        [sys.executable, "-m", "fedsim.cli", "run", "e.toml", "--out", "here"],
        cwd=tmp_path,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100", "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    os.close(follower)
    shown, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline:
        if select.select([leader], [], [], 0.1)[0]:
            try:
                shown += os.read(leader, 65536)
            except OSError:  # the other end is closed
                break
    os.close(leader)
    assert process.wait() == 0
    assert b"5/5" in shown
    assert b"\x1b[" in shown
    assert b"run directory: here" in shown
    assert b"Traceback" not in shown


def test_diverging_workers_are_named(call: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    said = call("run", "e.toml", "-o", "client=SGD(lr=1e30)", "--out", "huge")
    assert re.search(r"^round 1/5  loss \d\.\d+e\+\d+  test loss", said.out)
    said = call("run", "e.toml", "-o", "client=SGD(lr=3e38)", "--out", "here")
    assert said.code == 1
    assert re.fullmatch(r"fedsim: round \d: .* not finite; .*\n", said.err)
    call("run", "e.toml", "--out", "other")
    monkeypatch.setattr(runs, "trouble", lambda snapshot: [f"round {snapshot.round}: trouble"])
    assert "round 6: trouble\nround 6/6  loss" in call("resume", "other", "-o", "rounds=6").out


# ---------------------------------------------------------------------------------------- resume


def test_resume_continues_and_says_the_same(call: Caller) -> None:
    assert call("run", "e.toml", "--out", "whole", "-o", "rounds=7").code == 0
    assert call("run", "e.toml", "--out", "here").code == 0
    said = call("resume", "here", "-o", "rounds=7")
    assert said.code == 0
    assert [line.split()[1] for line in said.out.splitlines() if line.startswith("round")] == ["6/7", "7/7"]
    assert Path("here/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


def test_ctrl_c_exits_with_130(call: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "line", interrupt)
        said = call("run", "e.toml", "--out", "here")
        assert said == Said(130, "", "fedsim: interrupted; 'fedsim resume here' continues\n")
        patch.setattr(runs, "run", interrupt)
        assert call("run", "e.toml", "--out", "new") == Said(130, "", "fedsim: interrupted\n")
        patch.setattr(cli, "_experiment", interrupt)
        assert call("run", "e.toml") == Said(130, "", "fedsim: interrupted\n")
    assert call("resume", "here").code == 0
    assert len(fedsim.load("here").history) == 5


@pytest.mark.filterwarnings("default:.*truncated")
def test_warnings_are_one_line(call: Caller) -> None:
    assert call("run", "e.toml", "--out", "here").code == 0
    with Path("here/history.jsonl").open("a") as file:
        file.write('{"round": 6, "los')
    said = call("resume", "here")
    assert said.code == 0
    warned = f"fedsim: warning: {Path('here/history.jsonl')}: line 6 is truncated and ignored"
    assert set(said.err.splitlines()) == {warned}


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run absent.toml", "absent.toml: cannot be read: No such file or directory"),
        ("run -o wheels=3", "unknown key 'wheels'; allowed: data, partition, "),
        ("run -o num-wrkers=3", "unknown key 'num-wrkers'; did you mean 'num-workers'? allowed: data, "),
        ("run e.toml -o rounds=0", "e.toml: rounds = 0 must be >= 1"),
        ("run -o rounds", "-o 'rounds': write KEY=VALUE, for instance -o rounds=10"),
        ("run -o client=SDG()", "client = 'SDG()': unknown name 'SDG'; did you mean 'SGD'? allowed: "),
        ("run -o device=cuda:99", "device = 'cuda:99': this machine has "),
        ("run e.toml -o partition=Dirichlet(min_size=99)", "partition = 'Dirichlet(min_size=99)': "),
        ("run e.toml -o model=SmallCNN()", "model = 'SmallCNN()' on "),
        ("resume absent", "absent: is not a run directory (no experiment.toml)"),
        ("list wheels", "kind = 'wheels': allowed: data, partition, model, "),
        ("list strategies", "kind = 'strategies': did you mean 'strategy'? allowed: "),
        ("flower --resume absent", "absent: is not a run directory (no experiment.toml)"),
        ("flower e.toml --resume absent", "--resume DIR takes the experiment of that directory; leave out "),
        ("runn", "No such command 'runn'. Did you mean 'run'?"),
        ("run --fast", "No such option"),
        ("run a.toml b.toml", "Got unexpected extra argument"),
        ("resume", "Missing argument 'DIR'."),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(call: Caller, arguments: str, message: str) -> None:
    said = call(*arguments.split(" "))
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("fedsim: ")
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not Path("runs").exists()


def test_a_directory_that_cannot_be_written_is_exit_code_1(call: Caller) -> None:
    said = call("run", "e.toml", "--out", "e.toml/run")
    assert said.code == 1
    assert said.err == (
        "fedsim: e.toml/run: cannot be written: Not a directory; what was written stays readable\n"
    )


def test_a_finished_run_is_not_overwritten(call: Caller) -> None:
    assert call("run", "e.toml", "--out", "here").code == 0
    said = call("run", "e.toml", "--out", "here")
    assert said == Said(
        2, "", "fedsim: out = 'here': holds a run already; take another directory, or 'fedsim resume here'\n"
    )


def test_an_unexpected_error_shows_where_it_comes_from(call: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(runs, "run", fail)
    monkeypatch.setattr(sys, "argv", ["fedsim", "run", "e.toml"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_a_reader_that_goes_away_ends_the_run_quietly(tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_text(tomli_w.dumps(TINY | {"rounds": 20}))
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "fedsim.cli",
            "run",
            str(tmp_path / "e.toml"),
            "--out",
            str(tmp_path / "here"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 1)
    process.stderr.close()


# ---------------------------------------------------------------------------------- deployments


def test_a_run_on_another_host_says_where_its_directory_is(
    call: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = FlowerOutcome("1", "finished:completed", "", 1.0)
    monkeypatch.setattr(flower, "run_flower", lambda *_, **__: done)
    said = call("flower", "e.toml", "--federation", "far", "--out", "there")
    assert said == Said(0, f"run directory: {Path('there').resolve()} on the host of the SuperLink\n", "")


@pytest.mark.parametrize(("begun", "end"), [(True, "; 'fedsim flower --resume there' goes on"), (False, "")])
def test_a_link_that_does_not_answer_is_one_line(
    begun: bool, end: str, call: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_: object, **__: object) -> None:
        if begun:
            Path("there").mkdir()
            Path("there/history.jsonl").write_text("{}\n")
        raise RuntimeError("flwr ls: no\nconnection")

    monkeypatch.setattr(flower, "run_flower", lose)
    said = call("flower", "e.toml", "--federation", "far", "--out", "there")
    assert said == Said(1, "", f"fedsim: flwr ls: no connection{end}\n")


def test_a_federation_is_a_folder_or_a_connection(call: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, object]] = []

    def see(*_: object, federation: str, home: Path | None, **__: object) -> FlowerOutcome:
        asked.append((federation, home))
        return FlowerOutcome("1", "finished:failed", "", 1.0)

    monkeypatch.setattr(flower, "run_flower", see)
    Path("mine").mkdir()
    state = {"host": "127.0.0.1", "port": 1, "data_folder": "", "link": [], "nodes": []}
    Path("mine/federation.json").write_text(json.dumps(state))
    for name in ("mine", "clinics"):
        assert call("flower", "e.toml", "--federation", name, "--out", "there").code == 1
    assert asked == [("fedsim", Path("mine/flower").resolve()), ("clinics", None)]


# ---------------------------------------------------------------------------------- help and lists


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (
            "--help",
            ["run", "resume", "flower", "list", "Exit codes: 0 done, 1 the run failed, 2 wrong input"],
        ),
        (
            "run --help",
            ["[EXPERIMENT.toml]", "--override", "KEY=VALUE", "--out", "fedsim list", "-o rounds=10"],
        ),
        ("resume --help", ["DIR", "-o rounds=100", "min-nodes"]),
        (
            "flower --help",
            ["--federation DIR|NAME", "--resume", "-o engine=flower -o nodes=2", "fedsim federation up"],
        ),
        ("federation --help", ["up", "status", "down", "keys", "fedsim federation up --nodes 3"]),
        (
            "federation up --help",
            ["--nodes", "--data", "--workers", "--node-config", "--listen", "Folder('b')"],
        ),
        ("federation down --help", ["--only node-1", "Keys, data and logs stay."]),
        ("federation keys --help", ["--host link.example.org", "--node clinic-a", "--days"]),
        ("list --help", ["KIND is data, partition, model,"]),
    ],
)
def test_help_says_what_one_needs(call: Caller, arguments: str, texts: list[str]) -> None:
    said = call(*arguments.split())
    assert (said.code, said.err) == (0, "")
    words = " ".join(said.out.split())
    for text in texts:
        assert text in words


def test_help_without_arguments_is_a_usage_error(call: Caller) -> None:
    said = call()
    assert said.code == 2
    assert "Usage: fedsim [OPTIONS] COMMAND" in said.out


def test_version(call: Caller) -> None:
    assert call("--version") == Said(0, f"fedsim {version('fedsim')}\n", "")


def test_list_names_everything(call: Caller) -> None:
    said = call("list")
    assert (said.code, said.err) == (0, "")
    for kind, named in REGISTRY.items():
        assert f"{kind}: {KINDS[kind]}\n" in said.out
        for name in named:
            assert f"\n  {name}(" in said.out
    assert "SGD(lr=0.1, momentum=0.0, nesterov=False," in said.out
    assert "Prox(inner=SGD(), mu=0.1)" in said.out
    assert "*" not in said.out.replace("**", "")
    assert max(map(len, said.out.splitlines())) <= cli.LIST_WIDTH


@pytest.mark.parametrize("kind", REGISTRY)
def test_list_of_one_kind(call: Caller, kind: str) -> None:
    said = call("list", kind)
    assert said.out.startswith(f"{kind}: ")
    assert all(f"\n  {name}(" in said.out for name in REGISTRY[kind])
    assert [k for k in REGISTRY if f"\n{k}: " in said.out] == []


def test_list_fits_a_narrow_terminal(call: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(cli, "console", Console(file=screen, force_terminal=True, width=60))
    assert call("list").code == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert max(map(len, shown.splitlines())) <= 60
    assert "FedAvg(" in shown


# ---------------------------------------------------------------------------------------- flower


class Flower:
    """Stands in for Flower: keeps what it is asked, runs the experiment in this process."""

    def __init__(self, status: str = "finished:completed", write: bool = True) -> None:
        self.status, self.write = status, write
        self.asked: dict[str, object] = {}

    def __call__(
        self, app_dir: Path, run_config: dict[str, object], **options: object
    ) -> flower.FlowerOutcome:
        self.asked = {"files": sorted(str(f.relative_to(app_dir)) for f in app_dir.rglob("*.*")), **options}
        self.config = run_config
        if self.write:
            e = Experiment.from_mapping(run_config)
            runs.resume(e.out) if (Path(e.out) / "history.jsonl").exists() else runs.run(e)
        return flower.FlowerOutcome("7", self.status, "told so", 1.0)


def test_flower_hands_the_experiment_to_flower(call: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Flower()
    monkeypatch.setattr(flower, "run_flower", stub)
    said = call("flower", "e.toml", "--out", "here", "-o", "nodes=2", "--federation", "remote")
    assert (said.code, said.err) == (0, "")
    path = Path("here").resolve()
    assert said.out.splitlines()[-1] == f"run directory: {path}" or "run directory: here" in said.out
    package = "fedsim_flower_app"
    assert stub.asked["files"] == [
        f"{package}/__init__.py",
        f"{package}/client_app.py",
        f"{package}/server_app.py",
        "pyproject.toml",
    ]
    assert (stub.asked["num_supernodes"], stub.asked["federation"]) == (2, "remote")
    assert Experiment.from_mapping(stub.config) == Experiment.from_toml(
        "e.toml", {"nodes": 2, "out": str(path)}
    )
    before = Path("here/model.safetensors").read_bytes()
    assert call("flower", "--resume", "here", "-o", "rounds=6").code == 0
    assert stub.config["out"] == str(path)
    assert Path("here/model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("stub", "message"),
    [
        (
            Flower("finished:failed"),
            "fedsim: Flower's run 7 is finished:failed: told so; 'fedsim flower --resume here' goes on\n",
        ),
        (Flower(write=False), "is not a run directory (no experiment.toml)\n"),
    ],
)
def test_a_run_that_failed_in_flower_has_failed_here(
    call: Caller, monkeypatch: pytest.MonkeyPatch, stub: Flower, message: str
) -> None:
    monkeypatch.setattr(flower, "run_flower", stub)
    said = call("flower", "e.toml", "--out", "here")
    assert said.code in {1, 2}
    assert said.err.endswith(message)
    assert said.err.count("\n") == 1
