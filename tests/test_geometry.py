"""The geometry of paths: definitions, golden vectors on quadratics, and identities."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch
from geometry_toys import RULES, plainly, squares
from torch import nn
from toys import blobs, registered

import fedsim
from fedsim import geometry_plots, tree
from fedsim.analysis.geometry import before_last, column, contraction, controls, derive, measures
from fedsim.data import Dataset
from fedsim.experiment import Experiment
from fedsim.federation import load
from fedsim.probes.disagreement import training_loss
from fedsim.registry import REGISTRY
from fedsim.simulate import rounds
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


@pytest.fixture(autouse=True)
def ours() -> Iterator[None]:
    with registered():
        fedsim.register("data", Bowls)
        fedsim.register("model", From)
        yield
        del REGISTRY["data"]["Bowls"], REGISTRY["model"]["From"]


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
