"""The geometry of paths: identities, golden vectors, controls, and what local steps and rounds do on digits."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch
from test_carriers import over_messages
from torch import nn
from toys import blobs, quadratics, registered

import fedsim
from clients import Gaussian, Oracle, State, Told, told
from fedsim import cli, geometry_plots, plots, tree
from fedsim.analysis.geometry import (
    before_last,
    column,
    contraction,
    controls,
    derive,
    measures,
    walk_null,
    worker_null,
)
from fedsim.checkpoints import write_model
from fedsim.data import Dataset
from fedsim.experiment import BadInput, Experiment
from fedsim.federation import Federation, load
from fedsim.geometry import CONTROLS, Trace, trace
from fedsim.probes.disagreement import training_loss
from fedsim.registry import REGISTRY
from fedsim.simulate import RunFailed, rounds
from fedsim.tree import Tree

F64 = torch.float64


# ------------------------------------------------------------------------------------------- quadratics


@dataclass(frozen=True)
class Bowls:
    """Worker k minimises ``(w - c_k)' diag(a_k) (w - c_k) / 2``, and owns as many rows a coordinate as its weight."""

    kind: Literal["one", "two", "wide"] = "one"

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Write the squares as a regression without bias."""
        wide = torch.linspace(1, 10, 20, dtype=F64).tolist()
        workers = {
            "one": [([1.0, 4.0], [0.0, 0.0], 1)],
            "two": [([1.0, 2.0], [1.0, 0.0], 1), ([3.0, 1.0], [0.0, 1.0], 3)],
            "wide": [(wide, [0.0] * 20, 1)],
        }[self.kind]
        x, y, owner = [], [], []
        for i, (a, c, n) in enumerate(workers):
            rows = torch.diag((len(a) * torch.tensor(a, dtype=F64)).sqrt()).repeat(n, 1)
            x.append(rows)
            y.append(rows @ torch.tensor(c, dtype=F64))
            owner.append(torch.full((len(rows),), i))
        xs, ys = torch.cat(x), torch.cat(y)
        return Dataset(xs, ys, xs[:0], ys[:0], 1, "regression", "bowls", workers=torch.cat(owner))


@dataclass(frozen=True)
class From:
    """The model ``x -> w . x`` from a starting point, cut or repeated to the features."""

    start: tuple[float, ...] = (2.0, 1.0)

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        """Build the module."""
        linear = nn.Linear(input_shape[0], 1, bias=False)
        with torch.no_grad():
            linear.weight.copy_(torch.tensor(self.start).repeat(input_shape[0])[: input_shape[0]])
        return nn.Sequential(linear)


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
        for kind, component in (("data", Bowls), ("model", From), ("client", Forgetful)):
            fedsim.register(kind, component)
        yield
        del REGISTRY["data"]["Bowls"], REGISTRY["model"]["From"], REGISTRY["client"]["Forgetful"]


def bowls(kind: str = "one", **settings: object) -> Experiment:
    base = {
        "data": f"Bowls({kind!r})", "partition": "Owned()", "model": "From()", "objective": "SquaredError(half=True)",
        "client": "SGD(lr=0.1)", "strategy": "FedAvg()", "num_workers": 2 if kind == "two" else 1, "rounds": 1,
        "local_steps": 4, "batch_size": 0, "device": "cpu", "dtype": "float64",
    }  # fmt: skip
    return Experiment.from_mapping(base | settings)


def zeros(experiment: Experiment) -> dict[str, Tree]:
    """Put the reference at 0."""
    return {"end": tree.zeros_like(load(experiment).theta)}


def plainly(experiment: Experiment, federation: Federation | None = None, **settings: Any) -> Trace:
    """Trace without the runs and orders of the controls."""
    return trace(experiment, federation, others=(), permutations=0, **settings)


def test_the_definitions_at_a_point() -> None:
    w, g = np.array([2.0, 1.0]), np.array([2.0, 4.0])
    found = measures(g @ w, np.linalg.norm(g), np.linalg.norm(w))
    np.testing.assert_allclose(found, (1.6, 2.0, 0.8, 0.4), rtol=0, atol=1e-12)
    after = w - found.lr * g
    np.testing.assert_allclose(after, (1.2, -0.6), rtol=0, atol=1e-12)
    factor = contraction(found.rsi, found.eb, found.lr)
    np.testing.assert_allclose(
        (factor, after @ after / (w @ w), 1 - found.gamma**2), 0.36, rtol=0, atol=1e-12
    )


def test_undefined_values_are_nan_and_counted() -> None:
    found = np.stack(measures([0.0, 0.0, 3.0], [0.0, 2.0, 1.0], [2.0, 0.0, 3.0]))
    np.testing.assert_equal(found[:, 0], [0, 0, np.nan, np.nan])
    assert np.isnan(found[:, 1]).all()
    assert np.isfinite(found[:, 2]).all()
    # At a point that is a minimum already no gradient has a direction.
    flat = plainly(
        bowls(model="From((0.0,))", rounds=3), further={"away": {"0.weight": torch.ones(1, 2, dtype=F64)}}
    )
    assert flat.summary["steps"]["n_undefined"] == 8
    assert math.isnan(flat.summary["steps"]["gamma"])
    table = derive(flat.steps)
    assert np.isnan(column(table, "rsi")).all()
    assert not column(table, "norm_grad").any()
    assert controls(table) == ["away"]


def test_golden_descent() -> None:
    experiment = bowls()
    found = derive(plainly(experiment, further=zeros(experiment)).steps)
    np.testing.assert_allclose(found["rsi"], (1.6, 1.3, 1.1411764706, 1.0644295302), rtol=0, atol=1e-9)
    np.testing.assert_allclose(
        found["gamma"], (0.8, 0.8221921916, 0.8737320573, 0.9257142214), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("plan", ["stacked", "vmap", "loop"])
def test_golden_federation(plan: str) -> None:
    experiment = bowls("two", model="From((2.0,))", rounds=3, local_steps=2, plan=plan)
    models = [tree.flatten(s.model).tolist() for s, _ in rounds(experiment)]
    golden = [(1.1875, 1.6775), (0.724375, 1.42998125), (0.46039375, 1.2400106094)]
    np.testing.assert_allclose(models, golden, rtol=0, atol=1e-9)
    found = plainly(experiment)
    table = derive(found.rounds)
    np.testing.assert_allclose(table["rsi"], (0.5074766730, 0.6180252490, 1), rtol=0, atol=1e-9)
    np.testing.assert_allclose(table["gamma"], (0.9967467934, 0.9987084822, 1), rtol=0, atol=1e-9)
    np.testing.assert_allclose(
        table["agreement"], (0.9065073649, 0.8530161437, 0.7872354869), rtol=0, atol=1e-9
    )
    first = derive(found.steps).query("round == 1")
    assert first[["client", "local_step"]].to_numpy().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    golden = (0.6469013095, 0.4961887911, 0.9572699783, 0.9205740279)
    np.testing.assert_allclose(first["gamma"], golden, rtol=0, atol=1e-9)
    np.testing.assert_allclose(first["weight"], (0.25, 0.25, 0.75, 0.75), rtol=0, atol=1e-15)


def test_contraction_on_a_quadratic() -> None:
    mu, top = 1.0, 10.0
    experiment = bowls(
        "wide", model="From((1.0, -0.5, 2.0))", client=f"SGD(lr={mu / top**2})", local_steps=800
    )
    found = derive(plainly(experiment, further=zeros(experiment)).steps)
    found = found.loc[
        column(found, "norm_dist") > 1e-6 * math.sqrt(20)
    ]  # below, differences lose their digits
    away = column(found, "norm_dist")
    assert len(away) > 500
    assert column(found, "rsi").min() >= mu - 1e-12
    assert column(found, "eb").max() <= top + 1e-12
    assert ((away[1:] / away[:-1]) ** 2).max() <= 1 - mu**2 / top**2 + 1e-12
    kappa = top / mu
    assert column(found, "gamma").min() >= 2 * math.sqrt(kappa) / (1 + kappa)


# -------------------------------------------------------------------------------------------- identities

RULES = {
    "sgd": {"client": "SGD(lr=0.3)"},
    "heavy ball": {"client": "SGD(lr=0.1, momentum=0.9, weight_decay=0.01)"},
    "adam": {"client": "AdamW(lr=0.02)", "strategy": "FedAdam(lr=0.05)"},
    "sam": {"client": "SAM(SGD(lr=0.3), rho=0.2)", "strategy": "FedAvgM(lr=0.7, momentum=0.5)"},
    "smooth": {"client": "SASAM(preset='federated')", "participation": 0.6},
    "prox": {"client": "Prox(Clipped(SGD(lr=0.3), norm=0.5), mu=0.3)", "strategy": "FedMedian()"},
    "controlled": {"client": "Controlled(SGD(lr=0.2))", "strategy": "Scaffold()"},
    "kept rows": {"strategy": "Elastic()", "client": "SGD(lr=0.2, momentum=0.5)"},
    "remembered": {"strategy": "Remembering()", "client": "AdamW(lr=0.02)"},
    "uneven": {"local_steps": 0, "local_epochs": 2},
    "idle": {"client": "PALSGD(SGD(lr=0.1), p=0.5, mix=0.5)"},
    "nodes": {"nodes": 2},
    "chosen": {"strategy": "LeaderSGD()"},
    "fragments": {"strategy": "StreamingDiLoCo(fragments=2)", "client": "AdamW(lr=0.02)"},
    "hostile": {"attack": "ScaledUpdate(share=0.4, scale=-1.0)"},
}


def squares(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return squared distances after a step, those that its own numbers say, those before, and which rows these are."""
    distance = column(table, "norm_dist")
    there = np.ones(len(table) - 1, dtype=bool)
    if "client" in table:  # the last step of a worker in a round has none after it
        there = column(table, "local_step")[1:] > 0
    said = distance**2 + 2 * column(table, "dot_update") + column(table, "norm_update") ** 2
    return distance[1:][there] ** 2, said[:-1][there], distance[:-1][there] ** 2, np.flatnonzero(there)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_one_step_identity(name: str, dtype: str, tolerance: float) -> None:
    """``|w+ - w*|^2 = |w - w*|^2 + 2 <u, w - w*> + |u|^2``, whatever made the step u."""
    found = plainly(blobs(**RULES[name], dtype=dtype, rounds=5))
    for table in (before_last(found.steps), before_last(found.rounds)):
        after, said, before, _ = squares(table)
        assert len(after) >= 3
        assert (np.abs(after - said) / before).max() < tolerance
    assert np.isnan(column(found.steps, "norm_grad")).any() == (name == "idle")


def test_one_step_identity_of_plain_steps() -> None:
    """The same with RSI and EB of the gradient itself, and of the round's displacement."""
    found = plainly(blobs(rounds=6))
    for table, lr in ((derive(found.steps), 0.3), (derive(found.rounds), 1.0)):
        after, _, before, which = squares(table)
        factor = contraction(column(table, "rsi"), column(table, "eb"), lr)[which]
        assert np.abs(after / before - factor).max() < 1e-12
    dots = column(found.steps, "dot_grad"), column(found.steps, "dot_update")
    np.testing.assert_allclose(dots[1], -0.3 * dots[0], rtol=1e-9, atol=1e-15)


def test_gamma_is_the_cosine() -> None:
    experiment = blobs(batch_size=0, local_steps=1, rounds=4)
    federation = load(experiment)
    found = plainly(experiment, federation)
    for table in (derive(found.steps), derive(found.rounds)):
        rsi, eb, gamma = (column(table, name) for name in ("rsi", "eb", "gamma"))
        assert np.abs(gamma - rsi / eb).max() < 1e-12
    models = [federation.theta, *(s.model for s, _ in rounds(experiment, federation))]
    problem = training_loss(federation)
    for worker in range(5):
        own = federation.train.rows(worker)
        gradient, _ = problem._replace(x=federation.dataset.x[own], y=federation.dataset.y[own]).gradient(
            models[1]
        )
        way = tree.flatten(models[1]) - tree.flatten(models[-1])
        cosine = torch.nn.functional.cosine_similarity(gradient, way, dim=0).item()
        row = derive(found.steps).query("round == 2 and client == @worker")
        assert column(row, "gamma").tolist() == pytest.approx([cosine], abs=1e-12)


def test_averages_at_a_common_point() -> None:
    """RSI of the mean is the mean of RSI, EB of the mean is at most the mean of EB, and displacements add up."""
    experiment = Experiment.from_mapping({
        "data": "Digits(test=0.25)", "partition": "Dirichlet(alpha=0.3)", "model": "MLP(hidden=(64,))", "num_workers": 20,
        "client": "SGD(lr=0.05)", "local_steps": 1, "batch_size": 0, "rounds": 3, "dtype": "float64", "device": "cpu",
    })  # fmt: skip
    found = plainly(experiment)
    steps, table = derive(found.steps).query("round == 1"), derive(found.rounds).query("round == 1")
    p, rsi, eb = (column(steps, name) for name in ("weight", "rsi", "eb"))
    whole = {name: float(column(table, name)[0]) for name in ("rsi", "eb", "gamma")}
    assert len(p) == 20
    assert p.sum() == pytest.approx(1)
    assert abs(p @ rsi - whole["rsi"] / 0.05) < 1e-12
    assert whole["eb"] / 0.05 <= p @ eb
    assert whole["gamma"] >= (p @ rsi) / (p @ eb) > 0
    parts = column(found.clients, "weight") * column(found.clients, "dot_d")
    every = np.bincount(found.clients["round"], parts)[1:]
    np.testing.assert_allclose(every, column(found.rounds, "dot_D"), rtol=1e-12, atol=0)


def test_minibatches_at_one_point_average_to_the_full_gradient() -> None:
    """Over one pass with steps of no length, weighted by the sizes of the batches."""
    settings: dict[str, Any] = {
        "partition": "IID()",
        "num_workers": 1,
        "rounds": 2,
        "client": "SGD(lr=1e-300)",
    }
    whole = blobs(**settings, batch_size=0, local_steps=1)
    far = {"end": tree.tree_map(lambda x: x + 0.1, load(whole).theta)}
    full = derive(plainly(whole, further=far).steps)["rsi"].iloc[0]
    parts = derive(plainly(blobs(**settings, batch_size=6, local_steps=0, local_epochs=1), further=far).steps)
    parts = parts.query("round == 1")
    sizes = np.array([6, 6, 6, 6, 6, 1])
    assert len(parts) == 6
    assert np.average(parts["rsi"], weights=sizes) == pytest.approx(full, abs=1e-12)
    assert abs(parts["rsi"].mean() - full) > 1e-6  # equal weights would be wrong


@pytest.mark.parametrize("lr", [1.0, 0.5])
def test_the_last_round_is_degenerate(lr: float) -> None:
    last = derive(plainly(blobs(strategy=f"FedAvgM(lr={lr}, momentum=0.0)")).rounds).iloc[-1]
    np.testing.assert_allclose((last["gamma"], lr * last["rsi"], lr * last["eb"]), 1, rtol=0, atol=1e-12)
    found = plainly(blobs(rounds=1))
    assert math.isnan(found.summary["rounds"]["gamma"])
    assert geometry_plots.path(found.rounds) is None


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


# ---------------------------------------------------------------------------------------------- controls


def test_null_of_workers_in_closed_form() -> None:
    p, steps, total = np.array([0.1, 0.2, 0.7]), 4, 6
    rows = [(r, k, h) for r in range(1, total + 1) for k in range(3) for h in range(steps)]
    table = pd.DataFrame(rows, columns=["round", "client", "local_step"]).assign(norm_update=2.0)
    table["weight"] = p[table["client"]]
    r, h, own = table["round"] - 1, table["local_step"], table["weight"]
    said = own / np.sqrt((total - r) * steps * (p @ p) + h * (1 - 2 * own))
    np.testing.assert_allclose(worker_null(table), said, rtol=1e-12)
    alone = table.query("client == 0").assign(weight=1.0, norm_update=np.geomspace(1, 9, total * steps))
    np.testing.assert_allclose(worker_null(alone), walk_null(alone["norm_update"]), rtol=1e-12)
    np.testing.assert_allclose(
        worker_null(alone, equal=True), 1 / np.sqrt(np.arange(total * steps, 0, -1)), rtol=1e-12
    )


@pytest.mark.parametrize(
    ("client", "update"),
    [
        ("Gaussian(SGD(lr=0.05))", 1.0),
        ("Gaussian(StepDecay(SGD(lr=0.05), at=(40, 80, 120), factor=0.7))", 1.0),
        ("Gaussian(SGD(lr=0.01, momentum=0.9))", 1 / math.sqrt(1 - 0.9**2)),
    ],
)
def test_what_chance_gives_a_worker_alone(client: str, update: float) -> None:
    """Random steps have the gamma of the null; heavy balls make that of updates, not of gradients, larger."""
    experiment = digits(client=client, strategy="DiLoCo(lr=1.0, momentum=0.0)", rounds=1, local_steps=300)
    found = derive(plainly(experiment).steps)
    early = slice(240)  # far from the end: momentum forgets
    over = column(found, "gamma_update") / column(found, "null")
    assert over[early].mean() == pytest.approx(update, rel=0.1)
    lengths = column(found, "norm_update" if update == 1 else "norm_grad")
    assert (column(found, "gamma") / walk_null(lengths))[early].mean() == pytest.approx(1, abs=0.1)


def test_what_chance_gives_workers_and_rounds() -> None:
    settings = {
        "client": "Gaussian(SGD(lr=0.05))",
        "partition": "Dirichlet(alpha=1.0)",
        "num_workers": 8,
        "local_steps": 5,
    }
    said = trace(digits(**settings, rounds=60), others=())
    early = before_last(derive(said.rounds))
    for null in ("null_equal", "null"):
        assert 0.85 <= (column(early, "gamma") / column(early, null)).mean() <= 1.15
    assert said.summary["steps"]["over_null"] == pytest.approx(1, abs=0.1)
    assert abs(said.summary["rounds"]["over_permuted"]) < 0.02


def test_noise_has_the_norm_of_the_gradient_and_no_direction() -> None:
    found = [
        plainly(blobs(client=rule, local_steps=1, batch_size=0))
        for rule in ("Gaussian(SGD(lr=0.3))", "SGD(lr=0.3)")
    ]
    first = [f.steps.query("round == 1")["norm_update"].to_numpy() for f in found]
    np.testing.assert_allclose(first[0], first[1], rtol=1e-12)
    assert Gaussian().inner == REGISTRY["client"]["SGD"]()


def test_a_single_order_of_the_rounds() -> None:
    """The control by its definition: walk the permuted updates and take the cosine with the rest of the way."""
    experiment = blobs(rounds=7)
    federation = load(experiment)
    models = torch.stack([
        tree.flatten(federation.theta),
        *(tree.flatten(s.model) for s, _ in rounds(experiment)),
    ])
    updates = models.diff(dim=0)
    draws = [fedsim.random.numpy_generator(0, "geometry", i).permutation(7) for i in range(3)]
    said = []
    for order in draws:
        moved = updates[torch.from_numpy(order)]
        path = models[0] + torch.cat([torch.zeros_like(moved[:1]), moved.cumsum(0)])
        said.append(torch.nn.functional.cosine_similarity(-moved, path[:-1] - path[-1], dim=1).numpy())
    found = trace(experiment, others=(), permutations=3)
    np.testing.assert_allclose(found.rounds["permuted"], np.mean(said, axis=0), rtol=0, atol=1e-10)
    once = trace(experiment.replace({"local-steps": 1, "num-workers": 1, "partition": "IID()"}), others=())
    np.testing.assert_allclose(once.rounds["permuted"], once.rounds["permuted_steps"], rtol=0, atol=1e-12)


def test_other_ends() -> None:
    """They are those of runs of their own; one that is no other is left out."""
    experiment = blobs()
    federation = load(experiment)
    found = trace(experiment, permutations=0)
    assert controls(found.steps) == controls(found.rounds) == list(CONTROLS)
    ends = {
        "order": [(experiment.replace({"seed": 1}), federation)],
        "longer": [(experiment.replace({"rounds": 8}), federation)],
        "start": [
            (
                experiment.replace({"seed": 1}),
                federation._replace(theta=load(experiment.replace({"seed": 1})).theta),
            )
        ],
    }
    for name, [(run, where)] in ends.items():
        *_, (snapshot, _) = rounds(run, where)
        distance = (tree.flatten(federation.theta) - tree.flatten(snapshot.model)).norm().item()
        assert found.steps[f"norm_dist.{name}"].iloc[0] == pytest.approx(distance, rel=1e-12)
    assert controls(trace(quadratics(), permutations=0).rounds) == ["longer"]  # full gradients, one start


def test_weight_decay_is_recorded_apart() -> None:
    found = plainly(blobs(client="Prox(SGD(lr=0.1, weight_decay=0.5), mu=0.1)", local_steps=1))
    table = derive(found.steps)
    assert np.abs(column(table, "gamma_wd") - column(table, "gamma")).max() > 1e-3
    # The proximal term is 0 in a round's first step: the update is that of the gradient with decay.
    np.testing.assert_allclose(table["norm_update"], 0.1 * column(table, "norm_grad_wd"), rtol=1e-12)
    np.testing.assert_allclose(table["gamma_update"], table["gamma_wd"], rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------ digits


def digits(**settings: object) -> Experiment:
    """Describe stochastic gradient descent on digits by one worker, 42 steps a pass."""
    base = {
        "data": "Digits(test=0.25)", "partition": "IID()", "model": "MLP(hidden=(64,))", "client": "SGD(lr=0.05)",
        "num_workers": 1, "rounds": 20, "local_steps": 42, "batch_size": 32, "dtype": "float64", "device": "cpu",
    }  # fmt: skip
    return Experiment.from_mapping(base | settings)


def test_one_worker_on_digits() -> None:
    said = plainly(digits())
    found = derive(said.steps)
    assert said.summary["steps"]["positive"] >= 0.97
    assert 0.17 <= said.summary["steps"]["gamma"] <= 0.24
    first = slice(42)  # its first pass
    assert (column(found, "gamma") / column(found, "null_equal"))[first].mean() > 5


@pytest.mark.slow
def test_larger_batches_point_better() -> None:
    sizes = {8: 168, 32: 42, 128: 10}
    means = [plainly(digits(batch_size=b, local_steps=h)).summary["steps"]["gamma"] for b, h in sizes.items()]
    assert means[0] < means[1] < means[2]
    assert means[2] > 0.5


@pytest.mark.slow
def test_the_end_of_another_start_is_behind() -> None:
    said = trace(digits(rounds=30), permutations=0).summary["steps"]
    assert said["gamma.start"] < 0
    assert said["positive.start"] < 0.15
    assert said["positive.order"] > 0.95


@pytest.mark.slow
def test_what_the_order_of_steps_adds() -> None:
    """Single steps as rounds: early the order counts, over the whole run it does not."""
    said = trace(digits(rounds=1260, local_steps=1), others=())
    gamma = derive(said.rounds)["gamma_update"].to_numpy()
    permuted = said.rounds["permuted"].to_numpy()
    assert gamma[:42].mean() - permuted[:42].mean() > 0.15
    assert abs(gamma[:-42].mean() - permuted[:-42].mean()) < 0.06


@pytest.mark.slow
def test_workers_take_wrong_turns_and_their_average_does_not() -> None:
    gammas = []
    for partition in ("IID()", "Dirichlet(alpha=1.0)", "Dirichlet(alpha=0.1)"):
        said = plainly(digits(partition=partition, num_workers=8, rounds=40, local_steps=5))
        gammas.append(said.summary["steps"]["gamma"])
        assert column(derive(said.rounds), "gamma").min() > 0.5
    assert gammas[0] - gammas[1] > 0.05
    assert gammas[1] - gammas[2] > 0.05


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
