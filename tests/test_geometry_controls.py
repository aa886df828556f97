"""The geometry of paths: what chance gives, the other ends, and what local steps and rounds do on digits."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
import torch
from geometry_toys import plainly
from toys import blobs, quadratics, registered

import fedsim
from clients import Gaussian
from fedsim import tree
from fedsim.analysis.geometry import before_last, column, controls, derive, walk_null, worker_null
from fedsim.experiment import Experiment
from fedsim.federation import load
from fedsim.geometry import CONTROLS, trace
from fedsim.registry import REGISTRY
from fedsim.simulate import rounds


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    with registered():
        yield


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
