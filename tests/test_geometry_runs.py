"""The geometry of paths: the second run is the first; the probe, the command and the experiments."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from geometry_toys import RULES, plainly, squares
from test_carriers import over_messages
from toys import blobs, quadratics, registered

import fedsim
from clients import Oracle, State, Told, told
from fedsim import cli, geometry_plots, plots, tree
from fedsim.analysis.geometry import before_last, column, derive
from fedsim.checkpoints import write_model
from fedsim.experiment import BadInput, Experiment
from fedsim.federation import load
from fedsim.geometry import CONTROLS, trace
from fedsim.registry import REGISTRY
from fedsim.simulate import RunFailed, rounds
from fedsim.tree import Tree


@dataclass(frozen=True)
class Forgetful:
    """Gradient descent that is a little different in every run."""

    def init(self, theta: Tree) -> State:
        """Remember nothing."""
        return {}

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Make one step."""
        CALLS.append(1)
        gradient, loss = oracle.grad(theta)
        return tree.axpy(-0.1 - 1e-3 * len(CALLS), gradient, theta), state, told(loss)


CALLS: list[int] = []


@pytest.fixture(autouse=True)
def ours() -> Iterator[None]:
    with registered():
        fedsim.register("client", Forgetful)
        yield
        del REGISTRY["client"]["Forgetful"]


# ------------------------------------------------------------------------------------------ the second run


@pytest.mark.parametrize("name", RULES)
def test_the_second_run_is_the_first(name: str) -> None:
    """`trace` refuses an end that differs in a bit; and watching changes no more than the order of sums."""
    experiment = blobs(**RULES[name])
    *_, (snapshot, _) = rounds(experiment)
    end = plainly(experiment).end
    for k, x in snapshot.model.items():
        torch.testing.assert_close(end[k], x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("client", ["AdamW(lr=0.02)", "SGD(lr=0.3, momentum=0.5)"])
def test_what_is_not_computed_in_place_is_watched_to_the_last_bit(client: str) -> None:
    experiment = blobs(client=client, plan="stacked")
    *_, (snapshot, _) = rounds(experiment)
    end = plainly(experiment).end
    assert all(torch.equal(end[k], x) for k, x in snapshot.model.items())


@pytest.mark.parametrize(
    "settings",
    [
        {
            "strategy": "KnownLoss()",
            "client": "LossNormalised(ScaledSGD(mode='scaled'))",
            "objective": "Exponential()",
        },
        {"strategy": "LocalGD()", "client": "Projection()", "objective": "Logistic()", "local_steps": 1},
    ],
    ids=["asked", "projected"],
)
def test_rules_without_a_batched_form(settings: dict[str, Any]) -> None:
    """A rule that makes its own gradients has updates alone; where workers are asked first, answers are no steps."""
    base = {
        "data": "Separable(rows_per_worker=4, features=3)",
        "partition": "Natural()",
        "model": "Linear(bias=False)",
    }
    base |= {
        "num_workers": 3,
        "rounds": 4,
        "local_steps": 2,
        "batch_size": 0,
        "dtype": "float64",
        "device": "cpu",
    }
    found = trace(Experiment.from_mapping(base | settings), others=(), permutations=2)
    assert len(found.steps) == 3 * 4 * settings.get("local_steps", 2)
    assert np.isnan(column(found.steps, "norm_grad")).all() == ("LossNormalised" in settings["client"])
    assert np.isfinite([found.summary["steps"]["gamma_update"], found.summary["rounds"]["gamma"]]).all()
    assert geometry_plots.path(found.steps) is not None
    for table in (before_last(found.steps), before_last(found.rounds)):
        after, said, before, _ = squares(table)
        assert (np.abs(after - said) / before < 1e-12).all()


def test_a_run_that_does_not_repeat_is_refused() -> None:
    with pytest.raises(RunFailed, match=r"the second run did not end where the first has"):
        plainly(blobs(client="Forgetful()"))


@pytest.mark.parametrize("name", ["sgd", "heavy ball", "uneven", "kept rows", "smooth", "idle", "prox"])
def test_plans_see_the_same(name: str) -> None:
    one, *others = (
        trace(blobs(**RULES[name], plan=plan), others=("start",)) for plan in ("stacked", "vmap", "loop")
    )
    for other in others:
        for ours, theirs in (
            (one.steps, other.steps),
            (one.rounds, other.rounds),
            (one.clients, other.clients),
        ):
            assert list(ours) == list(theirs)
            scale = ours.abs().max().to_numpy()
            np.testing.assert_allclose(theirs / scale, ours / scale, rtol=1e-10, atol=1e-13)


def test_rounds_from_checkpoints_are_those_of_the_second_run(tmp_path: Path) -> None:
    """Also as a probe of a second run by `fedsim.run`, and with its rows sent through messages."""
    experiment = blobs(rounds=6)
    federation = load(experiment)
    models = [tree.flatten(federation.theta), *(tree.flatten(s.model) for s, _ in rounds(experiment))]
    found = derive(plainly(experiment).rounds)
    way = torch.stack(models[:-1]) - models[-1]
    down = torch.stack(models[:-1]) - torch.stack(models[1:])
    cosine = torch.nn.functional.cosine_similarity(down, way, dim=1)
    np.testing.assert_allclose(found["gamma"], cosine.numpy(), rtol=0, atol=1e-10)
    np.testing.assert_allclose(
        found["rsi"], ((down * way).sum(1) / (way * way).sum(1)).numpy(), rtol=0, atol=1e-10
    )
    first, other = (
        fedsim.run(experiment.replace(s), draw=False)
        for s in ({"out": str(tmp_path / "a")}, {"out": str(tmp_path / "b"), "seed": 1})
    )
    probes = f"Geometry({str(first.path)!r}, other={str(other.path / 'model.safetensors')!r})"
    second = fedsim.run(
        experiment.replace({"probes": probes, "out": str(tmp_path / "c")}), draw=False
    ).history
    assert second["geometry.distance"].iloc[-1] == 0  # the same run, to the last bit
    assert second["geometry.gamma"].isna().tolist() == [False] * 5 + [True]
    for name in ("gamma", "rsi", "eb", "lr", "agreement", "gamma_update"):
        np.testing.assert_allclose(second[f"geometry.{name}"][:-1], found[name][:-1], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(second["geometry.null"][:-1] ** -2, (6, 5, 4, 3, 2))
    away = torch.stack(models[:-1]) - tree.flatten({k: other.model[k] for k in federation.theta})
    cosine = torch.nn.functional.cosine_similarity(down, away, dim=1)
    np.testing.assert_allclose(second["geometry.gamma_other"][:-1], cosine[:-1].numpy(), rtol=0, atol=1e-10)
    far = experiment.replace({"probes": probes, "nodes": 2})
    messages = [s.metrics for s, _ in rounds(far, carrier=over_messages(far, 2))]
    for ours, theirs in zip(second.to_dict("records"), messages, strict=True):
        assert theirs["geometry.distance"] == pytest.approx(ours["geometry.distance"], abs=1e-12)
        assert theirs.get("geometry.gamma", math.nan) == pytest.approx(
            ours["geometry.gamma"], abs=1e-10, nan_ok=True
        )


def test_a_reference_that_is_no_model_of_this_run(tmp_path: Path) -> None:
    done = fedsim.run(blobs(rounds=1, out=str(tmp_path / "a")), draw=False)

    def said(reference: Path, **settings: object) -> str:
        probes = f"Geometry({str(reference)!r}, other={str(done.path)!r})"
        with pytest.raises(BadInput) as caught:
            next(rounds(blobs(probes=probes, **settings)))
        return str(caught.value)

    assert "must be a finished run: there is no" in said(tmp_path / "b")
    assert "has other parameters than this run's model" in said(done.path, model="MLP(hidden=(3,))")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    assert "is damaged" in said(tmp_path / "broken.safetensors")


def test_bad_input() -> None:
    with pytest.raises(
        BadInput, match=r"schedule = 'FreeRunning\(\)': workers come alone, and there are no rounds"
    ):
        trace(quadratics(strategy="ElasticAveraging()", schedule="FreeRunning()"))
    with pytest.raises(BadInput, match=r"others = \('none',\): 'none' must be one of order, longer, start"):
        trace(quadratics(), others=("none",))


# ------------------------------------------------------------------------------------------- command line


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedsim", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert isinstance(caught.value.code, int)
        said = capfd.readouterr()
        return caught.value.code, said.out, said.err

    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        fedsim.run(blobs(rounds=6, seed=seed, out=str(seed)), draw=False)
    code, out, err = call("geometry", "0", "1", "--out", "both.png")
    assert (code, err) == (0, "")
    for line in ("gamma.start", "over_permuted", "figure: 0/figures/geometry_steps.png", "figure: both.png"):
        assert line in out
    folder = tmp_path / "0" / "geometry"
    assert sorted(f.name for f in folder.iterdir()) == [
        "clients.csv",
        "rounds.csv",
        "steps.csv",
        "summary.json",
    ]
    found, said = trace(blobs(rounds=6)), geometry_plots.read(tmp_path / "0")
    for name in ("steps", "rounds", "clients"):
        pd.testing.assert_frame_equal(pd.read_csv(folder / f"{name}.csv"), getattr(found, name), rtol=1e-12)
    assert said["difference"] < 1e-12
    assert said["reference"] == found.summary["reference"]
    assert said["rounds"] == pytest.approx(found.summary["rounds"])
    # Every figure has the nulls and the other ends.
    drawn = list(geometry_plots.drawings(tmp_path / "0"))
    assert [d.name for d in drawn] == ["geometry_steps", "geometry_rounds"]
    for d in drawn:
        labels = d.figure.axes[0].get_legend_handles_labels()[1]
        assert {"own end point", "random walk", "rounds in random order"} <= set(labels)
        assert {f"end point: {what}" for what in CONTROLS.values()} <= set(labels)
    code, out, err = call("report", "0")
    page = (tmp_path / "0" / "report.html").read_text(encoding="utf-8")
    assert code == 0
    assert geometry_plots.CAPTIONS["steps"] in page
    assert geometry_plots.CAPTIONS["rounds"] in page
    write_model(tmp_path / "1", tree.scale(0.9, found.end))
    code, out, err = call("geometry", "1")
    assert code == 1
    assert "of its way from the model of the first" in err
    (tmp_path / "1" / "summary.json").unlink()
    code, out, err = call("geometry", "1")
    assert code == 2
    assert "the run has not ended; 'fedsim resume 1' continues it" in err
    assert call("geometry", "nowhere")[0] == 2
    assert "--out no/such.png: there is no folder no" in call("geometry", "0", "--out", "no/such.png")[2]


def test_a_probe_draws_its_controls(tmp_path: Path) -> None:
    first, other = (
        fedsim.run(blobs(rounds=6, seed=s, out=str(tmp_path / str(s))), draw=False) for s in (0, 1)
    )
    probe = REGISTRY["probe"]["Geometry"](str(first.path), other=str(other.path))
    history = pd.DataFrame([s.metrics for s, _ in rounds(blobs(rounds=6, probes=[probe]))])
    (figure,) = [d.figure for d in plots.drawings(history, {}) if d.name == "geometry"]
    assert figure.axes[0].get_legend_handles_labels()[1] == ["gamma", "gamma update", "gamma other", "null"]


EXPERIMENTS = sorted((Path(__file__).parents[1] / "experiments").glob("geometry_*.toml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_are_repeatable(path: Path) -> None:
    """Cut down to three rounds."""
    experiment = Experiment.from_toml(path, {"rounds": 3, "local-steps": 2, "local-epochs": 0, "probes": ""})
    assert experiment.dtype == "float64"
    assert len(trace(experiment).rounds) == 3
