"""Local-GD through the production engine: the laws of `checks_local_gd`, projections, regression, probes, bad input."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import checks_local_gd as check
import numpy as np
import pandas as pd
import pytest
import torch
from checks_local_gd import FAMILIES, TABLE, problem, signed
from engine_local_gd import Weighted, engine, federation_of, linear, models
from reference_local_gd import reference, step_size

import fedsim
from clients import SGD, LossNormalised, Projection, Prox, ScaledSGD
from fedsim import BadInput, Experiment, compare, groups, overlays, runs, tree
from fedsim.analysis import direction as D
from fedsim.analysis.multiclass import multiclass_max_margin
from fedsim.analysis.projections import (
    halpern,
    loss_normalised_local_gd,
    parallel_projections,
    regression_limit,
    regression_trajectory,
)
from fedsim.analysis.separability import finite_minimiser, first_order_bias
from fedsim.cohort import Cohort
from fedsim.data import Dataset, Digits, FrozenFeatures, Pair, Shards
from fedsim.data.margin import linear_regression, non_separable
from fedsim.federation import assemble, load
from fedsim.plots import panels
from fedsim.probes import Snapshot
from fedsim.probes.direction import is_due
from fedsim.rate_plots import fitted, overlay
from fedsim.simulate import rounds
from fedsim.step_sizes import settle
from strategies import AnchoredAverage, DualAcceleration, FedAvg, KnownLoss, LocalGD

SETS = [(family, seed) for family in FAMILIES for seed in range(2)]
FIRST = [("skew", 0)]
MORE = [pytest.param(*s, marks=pytest.mark.slow) for s in SETS if s not in FIRST]
LINEAR = "Linear(bias=False, zero_init=True)"


def told(snapshot: Snapshot) -> dict[str, Any]:
    return dict(snapshot.metrics)


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


# ------------------------------------------------------------------------------------- the probes


def test_direction_figures_are_those_of_the_analysis(tmp_path):
    zs, z, answer = problem("skew", 0)
    eta = step_size(zs, 1, "fixed")
    e = linear(
        4, 10, 64, SGD(eta), LocalGD(), probes="Direction()", data="Separable()", partition="Natural()"
    )
    history = fedsim.run(e.replace({"out": str(tmp_path / "run")})).history
    w = reference(zs, 10, 64)
    loss, k = D.federated_loss(zs, w[1:]), np.arange(1, 65)
    expected = {
        "cosine_distance": D.cosd(w[1:], answer.w_hat),
        "angle": D.angle(w[1:], answer.w_hat),
        "margin": D.margin(z, w[1:]),
        "margin_ratio": D.margin_ratio(z, w[1:], answer.gamma),
        "margin_gap": D.mgap(z, w[1:], answer.gamma),
        "norm": np.linalg.norm(w[1:], axis=1),
        "loss": loss,
        "invariant": D.late(loss, eta * 10 * k, answer.gamma),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(history[f"direction.{name}"], values, rtol=1e-9, err_msg=name)
    assert np.all(history["direction.cosine_distance"] <= history["direction.margin_gap"])
    last = history.iloc[-1].to_dict()
    assert last["direction.slope_ratio"] == pytest.approx(D.slope_ratio(w[32], w[64], answer.w_hat))
    assert last["direction.loss_exponent"] == pytest.approx(D.loss_exponent(loss[31], loss[63], 2.0))
    assert np.isfinite(history["direction.slope_ratio"]).sum() == 6


def test_direction_weighs_rows_as_the_average_does():
    zs = problem("skew", 0)[0]
    p = (0.4, 0.3, 0.2, 0.1)
    e = linear(4, 2, 3, SGD(0.1), Weighted(p=p), probes="Direction()")
    *_, (snapshot, _) = rounds(e, federation_of(e, zs))
    w = reference(zs, 2, 3, eta=0.1, p=p)[-1]
    assert told(snapshot)["direction.loss"] == pytest.approx(float(D.federated_loss(zs, w, p)), rel=1e-12)


def test_direction_with_a_bias_is_that_of_a_feature_1():
    zs = [np.hstack([z, np.ones((len(z), 1))]) for z in problem("skew", 0)[0]]
    plain = linear(4, 3, 5, SGD(0.1), LocalGD(), probes="Direction()")
    biased = plain.replace({"model": "Linear(zero_init=True)"})
    features, y = np.vstack(zs), np.ones(40)
    features[1::2, :-1], y[1::2] = -features[1::2, :-1], 0
    owner = np.repeat(np.arange(4), 10)

    def of(e: Experiment, columns: int):
        t = torch.from_numpy(features[:, :columns].copy())
        data = Dataset(
            t, torch.from_numpy(y.astype(np.int64)), t[:0], torch.zeros(0).long(), 1, "binary", "rows"
        )
        *_, (snapshot, _) = rounds(e, assemble(e, data, Shards.from_assignment(owner, 4)))
        return {k: v for k, v in told(snapshot).items() if k.startswith("direction.")}

    left, right = of(plain, 21), of(biased, 20)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name] == pytest.approx(right[name], rel=1e-9), name


def test_direction_of_many_classes_is_that_of_the_lifted_rows():
    rng = np.random.default_rng(0)
    means, y = 6 * np.eye(3, 5), np.arange(24) % 3
    x = means[y] + 0.3 * rng.standard_normal((24, 5))
    data = Dataset(
        torch.from_numpy(x),
        torch.from_numpy(y),
        torch.zeros(0, 5).double(),
        torch.zeros(0).long(),
        3,
        "classes",
        "x",
    )
    e = linear(2, 5, 4, SGD(0.05), LocalGD(), objective="CrossEntropy()", probes="Direction(pairs=True)")
    federation = assemble(e, data, Shards.from_assignment(np.arange(24) % 2, 2))
    *_, (snapshot, _) = rounds(e, federation)
    w = snapshot.model["1.weight"].numpy()
    answer = multiclass_max_margin(x, y, 3)
    figures = told(snapshot)
    assert figures["direction.cosine_distance"] == pytest.approx(float(D.cosd(w.ravel(), answer.w_hat)))
    own = np.sort(x @ w.T, axis=1)
    assert (own.argmax(1) == 2).all()
    scores = x @ w.T
    rivals = np.where(np.eye(3, dtype=bool)[y], -np.inf, scores).max(1)
    least = (scores[np.arange(24), y] - rivals).min() / np.linalg.norm(w)
    assert figures["direction.margin"] == pytest.approx(least)
    pair = (scores[y == 0, 0] - scores[y == 0, 2]).min() / np.linalg.norm(w[0] - w[2])
    assert figures["direction.pair.0-2"] == pytest.approx(pair)
    assert sum(name.startswith("direction.pair.") for name in figures) == 6


def test_geometric_spacing_and_resuming_give_the_same_figures(tmp_path):
    assert [k for k in range(1, 1001) if is_due(k, 1)] == [
        1,
        2,
        4,
        8,
        10,
        16,
        32,
        64,
        100,
        128,
        256,
        512,
        1000,
    ]
    settings = {"data": "Separable()", "partition": "Natural()", "probes": "Direction(per_decade=2)"}
    whole = linear(4, 2, 40, SGD(0.1), LocalGD(), **settings)
    full = fedsim.run(whole.replace({"out": str(tmp_path / "a")})).history
    fedsim.run(whole.replace({"out": str(tmp_path / "b"), "rounds": 20}))
    again = fedsim.resume(tmp_path / "b", changes={"rounds": 40}).history
    columns = [c for c in full if c.startswith("direction.")]
    assert columns
    np.testing.assert_array_equal(full[columns], again[columns])


@pytest.mark.parametrize(("loss", "eta"), [("logistic", 0.05), ("exponential", 0.01)])
def test_bias_measures_the_first_order_formula(loss, eta):
    zs = signed(non_separable())
    w_star = finite_minimiser(zs, loss=loss)
    settings = {"data": "NonSeparable()", "partition": "Natural()", "probes": "Bias(per_decade=1)"}
    settings["objective"] = f"{loss.capitalize()}()"
    e = linear(4, 5, 1000, SGD(eta), LocalGD(), **settings)
    *_, (snapshot, _) = rounds(e)
    shift = tree.flatten(snapshot.model).numpy() - w_star
    relative = np.linalg.norm(shift) / np.linalg.norm(w_star)
    assert told(snapshot)["bias.finite"] == pytest.approx(relative, rel=1e-8)
    formula = first_order_bias(zs, w_star, eta, 5, loss=loss)
    error = np.linalg.norm(shift - formula) / np.linalg.norm(shift)
    assert told(snapshot)["bias.formula_error"] == pytest.approx(error, rel=1e-6)
    assert error < 0.03
    assert "bias.direction" not in told(snapshot)
    faster = e.replace({"strategy": "FedAvgM(momentum=0.5, weighting='uniform')"})
    *_, (other, _) = rounds(faster)
    # Momentum on the server does not move the point at which the run stops.
    assert told(other)["bias.finite"] == pytest.approx(relative, rel=1e-3)
    assert told(other)["bias.formula_error"] < 0.03


@pytest.mark.parametrize("loss", ["Logistic()", "Exponential()"])
def test_one_local_step_ends_at_the_minimiser(loss):
    settings = {"data": "NonSeparable()", "partition": "Natural()", "probes": "Bias()", "objective": loss}
    *_, (snapshot, _) = rounds(linear(4, 1, 4000, ScaledSGD(c=0.5), LocalGD(), **settings))
    assert told(snapshot)["bias.finite"] < 1e-8


def test_bias_on_mixed_rows_and_on_regression():
    mixed = linear(
        3, 1, 500, SGD(0.5), LocalGD(), data="Mixed()", partition="Natural()", probes="Bias()", seed=2
    )
    history = [told(s) for s, _ in rounds(mixed)]
    assert history[-1]["bias.finite"] < history[0]["bias.finite"]
    assert history[-1]["bias.direction"] < 0.05
    more = {
        "objective": "SquaredError(half=True)",
        "data": "LinearRegression()",
        "partition": "Natural()",
        "probes": "Bias()",
    }
    *_, (snapshot, _) = rounds(linear(5, 10, 20, SGD(0.06), LocalGD(), **more))
    xs, ys = map(list, zip(*linear_regression(), strict=True))
    limit = regression_limit(xs, ys, np.zeros(60))
    error = D.relative_error(regression_trajectory(xs, ys, 0.06, 10, 20)[-1], limit)
    assert told(snapshot)["bias.finite"] == pytest.approx(float(error), rel=1e-9)


def test_normalised_margin_is_homogeneous():
    more = {"data": "Separable(kind='mix')", "partition": "Natural()", "probes": "NormalisedMargin()"}
    e = linear(4, 5, 3, SGD(0.1), LocalGD(), **more).replace({"model": "MLP(hidden=(8, 8), bias=False)"})
    federation = load(e)
    *_, (snapshot, _) = rounds(e, federation)
    probe, memory = e.parts.probes[0], e.parts.probes[0].begin(e, federation)
    value = probe.measure(snapshot, memory)[0]["value"]
    doubled = dataclasses.replace(snapshot, model=tree.scale(2.0, snapshot.model))
    assert probe.measure(doubled, memory)[0]["value"] == pytest.approx(value, rel=1e-12)
    assert told(snapshot)["normalised_margin.value"] == value
    linear_model = linear(
        4, 5, 3, SGD(0.1), LocalGD(), **(more | {"probes": "NormalisedMargin(); Direction()"})
    )
    *_, (snapshot, _) = rounds(linear_model)
    margin = told(snapshot)["direction.margin"]
    assert told(snapshot)["normalised_margin.value"] == pytest.approx(margin, rel=1e-12)


# ---------------------------------------------------------------------------------------- figures


def made_up(power: float, rounds: int = 200) -> pd.DataFrame:
    k = np.arange(1, rounds + 1)
    t = 5.0 * k
    return pd.DataFrame({"round": k, "direction.time": t, "direction.margin_gap": 2 * np.log(t) ** power})


def test_fitted_finds_the_power_of_log_t_and_draws_every_run():
    figure, rates = fitted({"a": made_up(-1.0), "b": made_up(-2.0)}, "direction.margin_gap")
    assert rates["a"].exponents == pytest.approx([-1])
    assert rates["b"].exponents == pytest.approx([-2])
    assert len(figure.axes[0].lines) == 4
    assert figure.axes[0].get_ylabel() == "margin gap"


@pytest.mark.parametrize("plain", [True, False])
def test_the_laws_of_gradient_descent_are_drawn_for_it_alone(plain):
    history = made_up(-1.0).assign(**{"direction.slope_ratio": 1.0, "direction.margin_ratio": 0.5})
    if plain:
        history["direction.invariant"] = 1.0
    figure = panels(history, "direction")
    assert figure is not None
    said = [line.get_label() for line in figure.axes[1].lines]
    assert ("slope ratio" in said, "margin ratio" in said) == (plain, True)


def test_runs_over_each_other_show_the_direction_and_sweeps_map_it(tmp_path):
    settings = {"data": "Separable()", "partition": "Natural()", "probes": "Direction()"}
    e = linear(4, 1, 30, ScaledSGD(), LocalGD(), **settings)
    for steps in (1, 5):
        fedsim.run(e.replace({"local_steps": steps, "out": str(tmp_path / str(steps))}))
    found = groups.group(groups.load([tmp_path / "1", tmp_path / "5"]))
    drawings = {d.name: d for d in overlays.overlays(found)}
    axes = drawings["direction.cosine_distance-round"].figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale(), len(axes.lines)) == ("log", "log", 2)
    assert [line.get_label() for line in axes.lines] == ["local-steps=1", "local-steps=5"]
    history = runs.load(tmp_path / "5").history
    drawn = np.asarray(axes.lines[1].get_ydata(), dtype=float)
    np.testing.assert_allclose(drawn, history["direction.cosine_distance"])
    header = compare.cells(groups.summarise(found), brief=True).header
    assert "cosine distance, final" in header
    grid = overlays.over_grid(
        [{"local-steps": "1"}, {"local-steps": "5"}], [0.2, 0.1], "direction.cosine_distance"
    )
    assert grid is not None
    assert grid.name == "grid-direction.cosine_distance"


def test_overlay_leaves_out_what_a_logarithm_cannot_show():
    history = made_up(-1.0)
    history.loc[3, "direction.margin_gap"] = 0.0
    axes = overlay({"a": history}, "direction.margin_gap").axes[0]
    assert len(np.asarray(axes.lines[0].get_xdata())) == 199
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    with pytest.raises(ValueError, match=r"run 'a' has no column 'direction\.angle'"):
        overlay({"a": history}, "direction.angle")


# ------------------------------------------------------------------------------------ real data


def test_pair_keeps_two_classes_in_order():
    whole, pair = Digits().load(1, 1), Pair(Digits(), classes=(8, 2), unit_norm=False).load(1, 1)
    kept = (whole.y == 8) | (whole.y == 2)
    assert torch.equal(pair.x, whole.x[kept].flatten(1).double())
    assert torch.equal(pair.y, (whole.y[kept] == 2).long())
    assert (pair.num_outputs, pair.task, pair.labels) == (1, "binary", ("8", "2"))
    assert Pair(Digits()).load(0, 1).x.norm(dim=1).max().item() == pytest.approx(1, abs=1e-12)


def test_two_digits_are_separable_and_local_gd_turns_to_their_margin():
    more = {
        "data": "Pair(Digits(), classes=(3, 5))",
        "partition": "Dirichlet(alpha=0.5)",
        "probes": "Direction(per_decade=3)",
    }
    e = linear(4, 20, 128, SGD(8.0), LocalGD(), **more)
    history = [told(s) for s, _ in rounds(e)]
    assert history[-1]["direction.cosine_distance"] < 0.5 * history[0]["direction.cosine_distance"]
    assert history[-1]["direction.margin_ratio"] > 0.3


def test_frozen_features_depend_on_the_seed_alone_and_train_the_last_layer():
    source = FrozenFeatures(Digits(), width=16, epochs=3)
    state = torch.get_rng_state()
    first, second, other = source.load(0, 1), source.load(0, 7), source.load(1, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.x, second.x)
    assert not torch.equal(first.x, other.x)
    assert first.x.dtype == torch.float64
    assert bool((first.x >= 0).all())
    e = Experiment(
        data="FrozenFeatures(Digits(), width=16, epochs=3)",
        partition="Dirichlet(alpha=1.0)",
        model="Linear(bias=False)",
        client="SGD(lr=2.0)",
        num_workers=5,
        rounds=30,
    )
    *_, (snapshot, _) = rounds(e)
    assert told(snapshot)["test_accuracy"] > 0.7  # a tenth by chance


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Random windows of 7 tokens; the class says whether the last token is odd."""

    def load(self, seed: int, num_workers: int) -> Dataset:
        x = torch.from_numpy(np.random.default_rng(0).integers(0, 9, (160, 7)))
        y = x[:, -1] % 2
        return Dataset(x[:120], y[:120], x[120:], y[120:], 2, "classes", "tokens")


def test_frozen_features_of_text_are_those_of_the_last_position():
    inner = FrozenFeatures(Tokens(), width=12, epochs=15, lr=3e-3)
    source = Pair(inner, classes=(0, 1))
    data = source.load(0, 1)
    assert (data.x.shape, data.x.dtype, data.task) == ((120, 12), torch.float64, "binary")
    assert torch.equal(data.x, source.load(0, 5).x)
    # A trained network has moved the two classes apart: least squares names nearly all test rows.
    w = np.linalg.lstsq(data.x.numpy(), 2.0 * data.y.numpy() - 1)[0]
    hits = (data.test_x.numpy() @ w > 0) == (data.test_y.numpy() == 1)
    assert hits.mean() > 0.9
    untrained = dataclasses.replace(inner, epochs=0).load(0, 1)
    assert np.linalg.matrix_rank(untrained.x.numpy()) == 12  # a norm at the end would cost a dimension


# -------------------------------------------------------------------------------------- bad input


def binary(x: np.ndarray, y: list[int]) -> Dataset:
    t = torch.from_numpy(x)
    return Dataset(t, torch.tensor(y), t[:0], torch.zeros(0).long(), 1, "binary", "rows")


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([[1.0, 0.0], [2.0, 1.0]], [1, 1], "all 2 training rows have label 1; a direction needs two classes"),
        ([[1.0, 0.0], [0.0, 0.0]], [1, 0], "row 1 is zero, no direction separates it"),
        ([[1.0, 2.0], [1.0, 2.0]], [1, 0], "rows 0 and 1 are one point with contradicting labels"),
        ([[1.0, math.nan], [1.0, 2.0]], [1, 0], "row 0 has a feature that is NaN or infinite"),
        ([[1.0], [2.0], [3.0]], [1, 0, 1], "are non-separable: .*Direction.. needs separable rows"),
    ],
)
def test_bad_rows_are_refused_before_the_first_round(x, y, message, tmp_path):
    e = linear(1, 1, 2, SGD(0.1), LocalGD(), probes="Direction()", out=str(tmp_path / "run"))
    rows = binary(np.array(x), y)
    federation = assemble(e, rows, Shards.from_assignment(np.zeros(len(x), dtype=int), 1))
    with pytest.raises(BadInput, match=rf"^probes = 'Direction\(\)': .*{message}.*$") as error:
        fedsim.run(e, federation=federation)
    assert "\n" not in str(error.value)
    good = binary(np.array([[1.0, 0.5], [-1.0, 0.2]]), [1, 0])
    fedsim.run(e, federation=assemble(e, good, Shards.from_assignment(np.zeros(2, dtype=int), 1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "NonSeparable()"}, "training rows are non-separable"),
        ({"model": "MLP(hidden=(4,))"}, "model = 'MLP.*' must be linear"),
        ({"model": "MLP(hidden=(4,))", "probes": "NormalisedMargin()"}, "must be homogeneous"),
        (
            {
                "probes": "Bias()",
                "objective": "CrossEntropy()",
                "data": "Synthetic(rows=40)",
                "partition": "IID()",
            },
            r"the task of the data is 'classes'",
        ),
        ({"data": "LinearRegression()", "objective": "SquaredError()"}, "task of the data is 'regression'"),
        ({"data": "Pair(Digits(), classes=(3, 12))"}, "no training row of class 12"),
        ({"data": "Pair(Separable())"}, "must be 'classes'"),
        ({"data": "Separable(nodes=3)"}, "num_workers = 4 must be <= 3"),
        ({"data": "Synthetic(rows=3, classes=2, test=0.0)", "partition": "IID()"}, "num-workers = 4"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    base = {"data": "Separable()", "partition": "Natural()", "probes": "Direction()"}
    e = linear(4, 1, 1, SGD(0.1), LocalGD(), **(base | settings))
    with pytest.raises(BadInput, match=message):
        next(rounds(e))


ASKING = {"client": "LossNormalised()", "strategy": "KnownLoss()", "objective": "Exponential()"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"local_steps": 2}, "local-steps = 2: .* needs local-steps = 1"),
        ({"batch_size": 4}, "batch-size = 4: .* needs batch-size = 0"),
        ({"model": "Linear()"}, r"needs 'Linear\(bias=False\)'"),
        ({"plan": "stacked"}, "plan = 'stacked': .* runs on 'loop'"),
        ({"client": "SGD(0.1)", "strategy": "LocalGD()", "batch_size": 4}, "set batch-size = 0"),
        ({"data": "Pair(Digits(), classes=(3, 3))"}, "must be two different classes"),
        ({"probes": "Direction(per_decade=-1)"}, "per_decade = -1 must be >= 0"),
        ({"client": "ScaledSGD(c=0)"}, "c = 0.0 must be > 0"),
        ({"client": "ScaledSGD(mode='none')"}, "mode = 'none' must be"),
        ({"client": "LossNormalised()"}, "need each other"),
        ({"strategy": "KnownLoss()"}, "need each other"),
        (ASKING | {"client": "Prox(LossNormalised())"}, "need each other"),
        (ASKING | {"objective": "Logistic()"}, r"needs 'Exponential\(\)'"),
        (ASKING | {"batch_size": 4}, "needs batch-size = 0"),
        (ASKING | {"participation": 0.5}, "participation = 0.5: .* needs participation = 1"),
        (ASKING | {"strategy": "DualAcceleration()", "local_steps": 2}, "needs local-steps = 1"),
        (ASKING | {"plan": "vmap"}, "runs on 'loop'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    base = {
        "client": "Projection()",
        "strategy": "AnchoredAverage()",
        "batch_size": 0,
        "local_steps": 1,
        "model": LINEAR,
    }
    with pytest.raises(BadInput, match=message):
        Experiment.from_mapping(base | settings)


@pytest.mark.parametrize(
    ("client", "settings", "message"),
    [
        (ScaledSGD(), {"model": "MLP(hidden=(4,))"}, "client = 'ScaledSGD.*no bound on the curvature"),
        (
            ScaledSGD(mode="scaled"),
            {"local_steps": 0, "local_epochs": 2},
            "divides by the local steps; set local-steps",
        ),
    ],
)
def test_a_step_size_that_cannot_be_known_is_refused(client, settings, message):
    e = linear(4, 1, 1, client, LocalGD(), data="Separable()", partition="Natural()").replace(settings)
    with pytest.raises(BadInput, match=message):
        next(rounds(e))


@pytest.mark.parametrize(
    ("client", "said"),
    [
        ("SGD(0.62)", ""),
        ("SGD(0.63)", "lr = 0.63 is beyond the stability bound 2 / beta = 0.626456"),
        ("ScaledSGD(c=1.99)", ""),
        ("ScaledSGD(c=2.01)", "lr = 0.629588 is beyond the stability bound 2 / beta = 0.626456"),
        ("Prox(SGD(0.62), mu=0.01)", ""),
        ("Prox(SGD(0.62), mu=0.1)", "lr = 0.62 is beyond the stability bound 2 / (beta + mu) = 0.60743"),
    ],
)
@pytest.mark.parametrize("probe", ["Direction", "Bias"])
def test_a_learning_rate_beyond_the_bound_is_said_once(probe, client, said, recwarn):
    settings = {"data": "Separable()", "partition": "Natural()", "probes": f"{probe}()"}
    e = linear(4, 1, 3, SGD(), LocalGD(), **settings).replace({"client": client})
    assert len(list(rounds(e))) == 3
    warned = [str(w.message) for w in recwarn]
    assert len(warned) == bool(said)
    assert all(f"{said}; the loss may rise" in text for text in warned)
