"""Local-GD through the production engine: the laws of `checks_local_gd`, projections, regression."""

from __future__ import annotations

import math
from typing import Any

import checks_local_gd as check
import numpy as np
import pytest
import torch
from checks_local_gd import FAMILIES, TABLE, problem
from engine_local_gd import LINEAR, engine, federation_of, linear, models, told
from reference_local_gd import reference

from clients import SGD, LossNormalised, Projection, Prox, ScaledSGD
from fedsim import Experiment, tree
from fedsim.analysis import direction as D
from fedsim.analysis.projections import (
    halpern,
    loss_normalised_local_gd,
    parallel_projections,
    regression_trajectory,
)
from fedsim.cohort import Cohort
from fedsim.data.margin import linear_regression
from fedsim.federation import load
from fedsim.simulate import rounds
from fedsim.step_sizes import settle
from strategies import AnchoredAverage, DualAcceleration, FedAvg, KnownLoss, LocalGD

SETS = [(family, seed) for family in FAMILIES for seed in range(2)]
FIRST = [("skew", 0)]
MORE = [pytest.param(*s, marks=pytest.mark.slow) for s in SETS if s not in FIRST]


# ------------------------------------------------------------------------------------- the engine


@pytest.mark.parametrize(("mode", "local_steps"), TABLE)
def test_reference_trajectory(mode, local_steps):
    check.check_table(engine, mode, local_steps)


@pytest.mark.parametrize("loss", ["logistic", "exponential"])
@pytest.mark.parametrize("local_steps", [1, 2, 7, 30])
@pytest.mark.parametrize("family", FAMILIES)
def test_engine_is_the_plain_loop(family, local_steps, loss):
    zs = problem(family, 0)[0]
    uneven = [z[: len(z) - i % 3] for i, z in enumerate(zs)]
    p = np.linspace(1, 2, len(zs))
    expected = reference(uneven, local_steps, 20, c=0.25, p=p, loss=loss)
    found = engine(uneven, local_steps, 20, c=0.25, p=p, loss=loss)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-13)


def test_minibatches_replayed_in_the_plain_loop():
    zs = problem("mix", 0)[0]
    number, steps, size = 30, 4, 2
    e = linear(10, steps, number, SGD(0.02), FedAvg(), batch_size=size, replacement=True)
    federation = federation_of(e, zs)
    sampler = Cohort(e, federation, 0, 10).sampler
    first = torch.arange(0, 50, 5)[:, None, None]  # every node has five rows
    drawn = [sampler.draw(k, torch.arange(10)).rows - first for k in range(1, number + 1)]
    indices = torch.stack(drawn).numpy()
    expected = reference(zs, steps, number, eta=0.02, indices=indices)
    np.testing.assert_allclose(models(e, federation), expected, rtol=1e-12, atol=1e-14)


def test_one_local_step_is_gradient_descent():
    check.check_one_step_is_gradient_descent(engine)


def test_one_worker_is_the_centralised_baseline():
    """With one local step four equal workers and one with all the rows make the same gradient steps."""
    settings = {"partition": "Natural()", "model": LINEAR, "objective": "Logistic()", "client": "SGD(0.3)"}
    settings |= {
        "strategy": "LocalGD()",
        "batch_size": 0,
        "local_steps": 1,
        "rounds": 30,
        "dtype": "float64",
        "device": "cpu",
    }
    many = Experiment.from_mapping({**settings, "data": "Separable()", "num_workers": 4})
    one = Experiment.from_mapping({**settings, "data": "Separable(nodes=4)", "num_workers": 1})
    w = [models(e, load(e)) for e in (many, one)]
    np.testing.assert_allclose(*w, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("family", "seed"), FIRST + MORE)
def test_late_phase(family, seed):
    check.check_late_phase(engine, family, seed)


def test_scaled_steps_do_not_gain_from_local_steps():
    check.check_scaled_steps_do_not_gain(engine, "skew", 0)


@pytest.mark.slow
def test_fixed_budget():
    check.check_fixed_budget_favours_few_local_steps(engine)


@pytest.mark.slow
def test_loss_takes_the_weights_of_the_average():
    check.check_loss_takes_the_weights_of_the_average(engine)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "seed"), SETS)
def test_anchor_improves_modified(family, seed):
    check.check_anchor_improves_modified(engine, family, seed)


def test_modified_is_the_plain_loop():
    zs = problem("skew", 0)[0]
    for anchored in (True, False):
        more = {"pull": 1e-2, "anchored": anchored}
        expected = reference(zs, 5, 20, **more)
        np.testing.assert_allclose(engine(zs, 5, 20, **more), expected, rtol=1e-11, atol=1e-14)


@pytest.mark.slow
def test_bias_of_the_finite_minimiser():
    check.check_bias_of_finite_minimiser(engine)


@pytest.mark.slow
@pytest.mark.parametrize("local_steps", [1, 10, 100])
def test_mixed_limit(local_steps):
    check.check_mixed_limit(engine, local_steps)


@pytest.mark.slow
@pytest.mark.parametrize("local_steps", [1, 4, 16, 64])
def test_large_steps(local_steps):
    check.check_large_steps(engine, local_steps, (1.0, 4.0, 16.0, 64.0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "seed"), [s for s in SETS if s[0] != "mix"]
)  # those with ten rows a worker
def test_local_sgd(family, seed):
    check.check_local_sgd(engine, family, seed)


@pytest.mark.parametrize("local_steps", [1, 10, pytest.param(100, marks=pytest.mark.slow)])
def test_exponential_loss(local_steps):
    check.check_exponential_loss(engine, local_steps)


@pytest.mark.parametrize("anchored", [True, False])
def test_projections(anchored):
    zs, z, answer = problem("skew", 0)
    e = linear(len(zs), 1, 300, Projection(), AnchoredAverage(anchored=anchored))
    u = models(e, federation_of(e, zs))
    closed = (halpern if anchored else parallel_projections)(zs, 300)
    np.testing.assert_allclose(u, closed, rtol=1e-9, atol=1e-11)
    table = {True: (9.85950e-3, 0.388159, 0.526178), False: (7.74917e-3, 0.146157, 0.839591)}[anchored]
    found = D.cosd(u[10], answer.w_hat), D.relative_error(u[10], answer.w_hat), (z @ u[10]).min()
    np.testing.assert_allclose(found, table, rtol=1e-5)
    probed = e.replace({"rounds": 10, "probes": "Direction()"})
    *_, (snapshot, _) = rounds(probed, federation_of(probed, zs))
    figures = [told(snapshot)[f"direction.{name}"] for name in ("cosine_distance", "relative_error")]
    np.testing.assert_allclose(figures, table[:2], rtol=1e-5)
    assert told(snapshot)["direction.margin"] * told(snapshot)["direction.norm"] == pytest.approx(table[2])
    assert "direction.invariant" not in told(snapshot)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "seed"), SETS)
def test_projections_end_where_they_must(family, seed):
    zs, z, answer = problem(family, seed)
    u = {}
    for anchored in (True, False):
        e = linear(len(zs), 1, 1000, Projection(), AnchoredAverage(anchored=anchored))
        u[anchored] = models(e, federation_of(e, zs))
    assert (z @ u[False][-1]).min() >= 1 - 1e-6
    assert D.cosd(u[False][-1], answer.w_hat) > 1e-3
    assert D.cosd(u[True][-1], answer.w_hat) < 1e-3
    errors = D.relative_error(u[True][[300, 1000]], answer.w_hat) * [300, 1000]
    assert 0.97 <= errors[1] / errors[0] <= 1.5
    assert D.cosd(u[True][100], answer.w_hat) < D.cosd(u[False][100], answer.w_hat)


@pytest.mark.parametrize("local_steps", [1, 10, 100])
def test_regression_is_the_closed_form(local_steps):
    xs, ys = map(list, zip(*linear_regression(), strict=True))
    eta = float(1 / max(np.linalg.norm(x, 2) ** 2 / len(x) for x in xs))
    e = linear(5, local_steps, 200, SGD(eta), LocalGD(), objective="SquaredError(half=True)")
    found = models(e, federation_of(e, xs, np.concatenate(ys)))
    closed = regression_trajectory(xs, ys, eta, local_steps, 200)
    np.testing.assert_allclose(found, closed, atol=1e-9)


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("weighting", ["samples", "uniform"])
@pytest.mark.parametrize("local_steps", [1, 5])
def test_loss_normalised_steps_are_those_of_the_analysis(local_steps, weighting, nodes):
    uneven = [z[: len(z) - i] for i, z in enumerate(problem("skew", 0)[0])]
    client, strategy = LossNormalised(ScaledSGD(c=0.5, mode="scaled")), KnownLoss(weighting=weighting)
    e = linear(4, local_steps, 30, client, strategy, objective="Exponential()", nodes=nodes)
    p = [len(z) for z in uneven] if weighting == "samples" else "uniform"
    expected = loss_normalised_local_gd(uneven, local_steps, 30, p=p)
    np.testing.assert_allclose(models(e, federation_of(e, uneven)), expected, rtol=1e-11, atol=1e-13)


def test_loss_normalised_steps_go_on_where_the_loss_is_no_number_any_more():
    zs, z, answer = problem("skew", 0)
    e = linear(4, 3, 4, LossNormalised(SGD(0.02)), KnownLoss(), objective="Exponential()")
    federation = federation_of(e, zs)
    w = 800 * answer.w_hat  # all margins are 800 or more: exp(-800) is 0
    theta = tree.unflatten(torch.from_numpy(w), federation.theta)
    *_, (snapshot, _) = rounds(e, federation._replace(theta=theta))
    for _ in range(4):
        log_all = float(np.logaddexp.reduce(-(z @ w))) - math.log(40)
        rows = [w] * 4
        for _ in range(3):
            rows = [
                v + 0.02 * np.exp(-(part @ v) - log_all) @ part / 10 for v, part in zip(rows, zs, strict=True)
            ]
        w = np.mean(rows, axis=0)
    np.testing.assert_allclose(tree.flatten(snapshot.model), w, rtol=1e-9)
    assert np.linalg.norm(w - 800 * answer.w_hat) > 0.1


@pytest.mark.parametrize("nodes", [1, 3])
def test_dual_acceleration_is_the_method_on_all_rows(nodes):
    zs, z, answer = problem("skew", 0)
    uneven = [z[: len(z) - 2 * i] for i, z in enumerate(zs)]
    rows = np.vstack(uneven)
    rho = np.linalg.norm(rows, axis=1).max()
    client = LossNormalised(SGD(lr=float(1 / rho**2)))
    e = linear(4, 1, 60, client, DualAcceleration(), objective="Exponential()", nodes=nodes)
    w, g, q, expected = np.zeros(20), np.zeros(20), np.full(len(rows), 1 / len(rows)), [np.zeros(20)]
    for t in range(60):
        v = q @ rows / rho
        g = t / (t + 1) * (g + v)
        w = w + g + v
        expected.append(w / rho)
        q = np.exp(-(rows @ w) / rho)
        q /= q.sum()
    np.testing.assert_allclose(models(e, federation_of(e, uneven)), expected, rtol=1e-10, atol=1e-13)
    if nodes == 1:
        full = e.replace({"rounds": 1000, "probes": "Direction(per_decade=1)"})
        *_, (snapshot, _) = rounds(full, federation_of(full, zs))
        w = tree.flatten(snapshot.model).numpy()
        assert D.cosd(w, answer.w_hat) < 3e-6
        assert (z @ w).min() > 745  # where the loss itself is 0
        assert "direction.invariant" not in told(snapshot)


@pytest.mark.parametrize(("mode", "local_steps"), [("fixed", 1), ("fixed", 10), ("scaled", 10)])
def test_shares_of_the_stability_bound_give_the_reference_trajectory(mode, local_steps):
    zs = problem("skew", 0)[0]
    e = linear(4, local_steps, 50, ScaledSGD(mode=mode), LocalGD())
    expected = reference(zs, local_steps, 50, mode)
    np.testing.assert_allclose(models(e, federation_of(e, zs)), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("objective", "h"),
    [("Logistic()", 0.25), ("Exponential()", 1.0), ("SquaredError()", 2.0), ("SquaredError(half=True)", 1.0)],
)
def test_a_scaled_step_size_is_settled_within_any_rule(objective, h):
    zs = [z[: 10 - i] for i, z in enumerate(problem("skew", 0)[0])]
    beta = h * max(np.linalg.norm(z, 2) ** 2 / len(z) for z in zs)
    for rule, wrap in (
        (ScaledSGD(c=0.5, mode="scaled"), lambda x: x),
        (Prox(ScaledSGD(c=0.5, mode="scaled"), mu=0.1), lambda x: Prox(x, mu=0.1)),
    ):
        e = linear(4, 7, 1, rule, LocalGD(), objective=objective)
        settled: Any = settle(e, federation_of(e, zs))
        inner: Any = settled.inner if isinstance(settled, Prox) else settled
        assert inner.lr == pytest.approx(0.5 / (7 * beta), rel=1e-12)
        assert settled == wrap(SGD(lr=inner.lr))
    plain = linear(4, 7, 1, SGD(0.3), LocalGD())
    assert settle(plain, federation_of(plain, zs)) == SGD(0.3)
