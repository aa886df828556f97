"""One description of a run, read from TOML, Flower's run configuration and Python keywords alike."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from flwr.common.config import parse_config_args, validate_config

from clients import SGD, Prox
from fedsim import BadInput, Experiment
from fedsim.data import IID
from fedsim.experiment import parse_override
from fedsim.probes import Drift, WorkerLoss
from strategies import FedAvgM

ROOT = Path(__file__).parents[1]

CHANGED = {
    "data": "Synthetic(rows=100)",
    "partition": "IID()",
    "model": "Linear()",
    "objective": "SquaredError()",
    "client": "Prox(SGD(lr=0.5), mu=0.1)",
    "strategy": "FedAvgM(lr=0.5, momentum=0.5)",
    "network": "Network(latency=0.1)",
    "schedule": "Synchronous(sigma=0.5)",
    "attack": "LabelFlip(share=0.1)",
    "probes": "Drift(); WorkerLoss()",
    "precision": "full",  # others need dtype = "float32"
    "num-workers": 7,
    "participation": 0.5,
    "rounds": 3,
    "local-steps": 0,
    "local-epochs": 2,
    "batch-size": 0,
    "replacement": True,
    "holdout": 0.25,
    "eval-every": 0,
    "seed": 5,
    "device": "cpu",
    "dtype": "float64",
    "plan": "vmap",
    "nodes": 2,
    "min-nodes": 1,
    "max-update-norm": 2.5,
    "round-timeout": 1.5,
    "engine": "flower",
    "out": "somewhere \"else\" 'ü' \\",
}


def read(way: str, values: dict[str, Any], folder: Path) -> Experiment:
    """Make an experiment in one of the ways in which users do."""
    if way == "keywords":
        return Experiment(**{k.replace("-", "_"): v for k, v in values.items()})
    if way == "mapping":
        return Experiment.from_mapping(values)
    if way == "toml":
        (folder / "e.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
        return Experiment.from_toml(folder / "e.toml")
    if way == "overrides":
        (folder / "e.toml").write_text("")
        return Experiment.from_toml(folder / "e.toml", values)
    assert way == "flower"
    # As `flwr run --run-config FILE` does: the app's defaults, overridden by the file.
    (folder / "run-config.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
    with (ROOT / "pyproject.toml").open("rb") as file:
        defaults = tomllib.load(file)["tool"]["flwr"]["app"]["config"]
    return Experiment.from_mapping(defaults | parse_config_args([str(folder / "run-config.toml")]))


WAYS = ["keywords", "mapping", "toml", "overrides", "flower"]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_has_the_same_defaults(way: str, tmp_path: Path) -> None:
    assert read(way, {}, tmp_path).to_mapping() == Experiment().to_mapping()


@pytest.mark.parametrize("way", WAYS)
def test_every_way_reads_every_key(way: str, tmp_path: Path) -> None:
    assert sorted(CHANGED) == sorted(Experiment().to_mapping())
    assert read(way, CHANGED, tmp_path).to_mapping() == CHANGED


KEYS = ", ".join(Experiment().to_mapping())

BAD: list[tuple[dict[str, Any], str]] = [
    ({"num-wrkers": 3}, f"unknown key 'num-wrkers'; did you mean 'num-workers'? allowed: {KEYS}"),
    ({"xyzzy": 3}, f"unknown key 'xyzzy'; allowed: {KEYS}"),
    ({"num-workers": 0}, "num-workers = 0 must be >= 1"),
    (
        {"client": "Clipped(WarmupCosine(SGD(lr=0.1)))"},
        "client = 'Clipped(WarmupCosine(SGD(lr=0.1)))': WarmupCosine counts a worker's steps in all rounds, but strategy "
        "= 'FedAvg()' keeps nothing at workers; 'DiLoCo(lr=1.0, momentum=0.0)' averages and does",
    ),
    (
        {"client": "StepDecay(SGD(lr=0.1))"},
        "client = 'StepDecay(SGD(lr=0.1))': StepDecay counts a worker's steps in all rounds, but strategy = 'FedAvg()' "
        "keeps nothing at workers; 'DiLoCo(lr=1.0, momentum=0.0)' averages and does",
    ),
    ({"num-workers": 2.5}, "num-workers = 2.5 must be a whole number"),
    ({"num-workers": 2.0}, "num-workers = 2.0 must be a whole number"),
    ({"num-workers": "3"}, "num-workers = '3' must be a whole number"),
    ({"num-workers": True}, "num-workers = True must be a whole number"),
    ({"rounds": 0}, "rounds = 0 must be >= 1"),
    ({"seed": -1}, "seed = -1 must be >= 0"),
    ({"participation": 0}, "participation = 0 must be > 0"),
    ({"participation": 1.5}, "participation = 1.5 must be <= 1"),
    ({"participation": float("nan")}, "participation = nan must be a finite number"),
    ({"participation": "all"}, "participation = 'all' must be a number"),
    ({"holdout": 1.0}, "holdout = 1.0 must be < 1"),
    ({"holdout": -0.5}, "holdout = -0.5 must be >= 0"),
    ({"replacement": 1}, "replacement = 1 must be true or false"),
    ({"replacement": "yes"}, "replacement = 'yes' must be true or false"),
    ({"out": 3}, "out = 3 must be a string"),
    ({"round-timeout": float("inf")}, "round-timeout = inf must be a finite number"),
    ({"round-timeout": 0}, "round-timeout = 0 must be > 0"),
    ({"device": "gpu"}, "device = 'gpu' must be 'auto', 'cpu', 'cuda' or 'cuda:<number>'"),
    ({"dtype": "float46"}, "dtype = 'float46' must be 'float32' or 'float64'; did you mean 'float64'?"),
    ({"plan": "xyzzy"}, "plan = 'xyzzy' must be 'auto', 'stacked', 'graph', 'vmap', 'compiled' or 'loop'"),
    ({"plan": 3}, "plan = 3 must be 'auto', 'stacked', 'graph', 'vmap', 'compiled' or 'loop'"),
    ({"engine": "ray"}, "engine = 'ray' must be 'in-process' or 'flower'"),
    ({"client": "SDG()"}, "client = 'SDG()': unknown name 'SDG'; did you mean 'SGD'? allowed: SGD, "),
    ({"client": "SGD(lr=-1)"}, "client = 'SGD(lr=-1)': SGD: lr = -1.0 must be > 0"),
    ({"client": 3}, "client = '3': '3' is not a name; write for instance SGD()"),
    ({"probes": "Drft()"}, "probes = 'Drft()': unknown name 'Drft'; did you mean 'Drift'? allowed: "),
    ({"probes": "Drift(); Drift()"}, "probes = 'Drift(); Drift()': each probe may be named once"),
    (
        {"local-steps": 5, "local-epochs": 2},
        "local-steps = 5, local-epochs = 2: one of them must be > 0, the other 0",
    ),
    (
        {"local-steps": 0, "local-epochs": 0},
        "local-steps = 0, local-epochs = 0: one of them must be > 0, the other 0",
    ),
    ({"num-workers": 2, "nodes": 3}, "nodes = 3 must be <= num-workers = 2"),
    (
        {"strategy": "LocalGD()"},
        "strategy = 'LocalGD()': Local-GD uses full gradients; set batch-size = 0 (it is 16)",
    ),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("values", "message"), BAD, ids=[m.split(";")[0].split(":")[0] for _, m in BAD])
def test_every_way_says_what_is_wrong_in_one_line(
    way: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput) as caught:
        read(way, values, tmp_path)
    said = str(caught.value)
    assert message in said
    assert len(said.splitlines()) == 1
    assert said.startswith(f"{tmp_path / 'e.toml'}: " if way in {"toml", "overrides"} else message)


def test_files_that_are_not_experiments(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"absent\.toml: cannot be read: No such file or directory$"):
        Experiment.from_toml(tmp_path / "absent.toml")
    with pytest.raises(BadInput, match=r"cannot be read: Is a directory$"):
        Experiment.from_toml(tmp_path)
    for content in (b"rounds = = 3", b"\xff\xfe", b"rounds = 1\nrounds = 2"):
        (tmp_path / "bad.toml").write_bytes(content)
        with pytest.raises(BadInput, match=r"bad\.toml: is not TOML: ") as caught:
            Experiment.from_toml(tmp_path / "bad.toml")
        assert len(str(caught.value).splitlines()) == 1
    (tmp_path / "table.toml").write_text("[run]\nrounds = 3\n")
    with pytest.raises(BadInput, match=r"table\.toml: unknown key 'run'; "):
        Experiment.from_toml(tmp_path / "table.toml")


def test_writing_and_reading_gives_an_equal_experiment(tmp_path: Path) -> None:
    for e in (Experiment(), Experiment.from_mapping(CHANGED)):
        (tmp_path / "e.toml").write_text(e.to_toml(), encoding="utf-8")
        assert Experiment.from_toml(tmp_path / "e.toml") == e
        assert Experiment.from_mapping(json.loads(json.dumps(e.to_mapping()))) == e
        assert e.replace({}) == e


def test_components_may_be_objects() -> None:
    e = Experiment(
        partition=IID(),  # pyright: ignore[reportArgumentType]
        client=Prox(SGD(lr=0.5)),  # pyright: ignore[reportArgumentType]
        strategy=FedAvgM(momentum=0.5),  # pyright: ignore[reportArgumentType]
        probes=[Drift(), "WorkerLoss()"],  # pyright: ignore[reportArgumentType]
    )
    assert (e.client, e.probes) == ("Prox(inner=SGD(lr=0.5))", "Drift(); WorkerLoss()")
    assert e.parts.client == Prox(SGD(lr=0.5))
    assert e.parts.strategy == FedAvgM(momentum=0.5)
    assert e.parts.probes == (Drift(), WorkerLoss())


def test_equality_is_of_meaning() -> None:
    one, other = Experiment(client="SGD(lr=0.5)"), Experiment(client="SGD( 0.5 )")
    assert one == other
    assert hash(one) == hash(other)
    assert one.differing(other) == []
    third = other.replace({"client": "SGD(lr=0.4)", "seed": 1})
    assert one != third
    assert one.differing(third) == ["client", "seed"]
    assert one != "SGD(lr=0.5)"


def test_an_experiment_does_not_change() -> None:
    e = Experiment()
    with pytest.raises(ValueError, match="frozen"):
        e.rounds = 3
    changed = e.replace({"num_workers": 3, "rounds": 4})
    assert (e.num_workers, changed.num_workers, changed.rounds) == (100, 3, 4)


def test_epochs_replace_steps_unless_both_are_said(tmp_path: Path) -> None:
    for way in ("keywords", "mapping", "toml", "overrides"):
        e = read(way, {"local-epochs": 2}, tmp_path)
        assert (e.local_steps, e.local_epochs) == (0, 2)
    # Flower's run configuration always holds both: the app's default of the one that was not overridden.
    with pytest.raises(BadInput, match="local-steps = 10, local-epochs = 2: one of them must be > 0, the"):
        read("flower", {"local-epochs": 2}, tmp_path)
    assert read("flower", {"local-epochs": 2, "local-steps": 0}, tmp_path).local_epochs == 2


@pytest.mark.parametrize(
    ("workers", "share", "expected"), [(10, 1.0, 10), (10, 0.25, 2), (10, 0.01, 1), (1, 1.0, 1)]
)
def test_the_number_of_participants(workers: int, share: float, expected: int) -> None:
    assert Experiment(num_workers=workers, participation=share).num_participants == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rounds=10", ("rounds", 10)),
        (" rounds = 10", ("rounds", 10)),
        ("participation=0.5", ("participation", 0.5)),
        ("replacement=true", ("replacement", True)),
        ("client=SGD(lr=0.5)", ("client", "SGD(lr=0.5)")),
        ("client='SGD(lr=0.5)'", ("client", "SGD(lr=0.5)")),
        ('probes=["Drift()"]', ("probes", ["Drift()"])),
        ("out=2026-01-01", ("out", "2026-01-01")),
        ("out=3", ("out", "3")),
        ("out=", ("out", "")),
        ("out=a=b", ("out", "a=b")),
        ("num_workers=3", ("num_workers", 3)),
    ],
)
def test_overrides_of_the_command_line(text: str, expected: tuple[str, Any]) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["rounds", "", "=3"])
def test_an_override_needs_key_and_value(text: str) -> None:
    with pytest.raises(BadInput, match=r"^-o '.*': write KEY=VALUE, for instance -o rounds=10$"):
        parse_override(text)


def test_flowers_section_of_pyproject_holds_every_key_and_its_default() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    app = project["tool"]["flwr"]["app"]
    assert list(app["config"].items()) == list(Experiment().to_mapping().items())
    assert all(isinstance(v, bool | int | float | str) for v in app["config"].values())
    assert app["components"] == {"serverapp": "fedsim.server_app:app", "clientapp": "fedsim.client_app:app"}
    valid, errors, _ = validate_config(project, check_module=True, project_dir=ROOT)
    assert (valid, errors) == (True, [])


def test_an_experiment_file_is_a_run_configuration_for_flower(tmp_path: Path) -> None:
    for file in sorted((ROOT / "experiments").glob("*.toml")):
        written = parse_config_args([str(file)])
        assert Experiment.from_mapping(written) == Experiment.from_toml(file)
