"""Local-GD: what probes measure, and figures of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from checks_local_gd import problem, signed
from engine_local_gd import Weighted, federation_of, linear, told
from reference_local_gd import reference, step_size

import fedsim
from clients import SGD, ScaledSGD
from fedsim import Experiment, compare, groups, overlays, runs, tree
from fedsim.analysis import direction as D
from fedsim.analysis.multiclass import multiclass_max_margin
from fedsim.analysis.projections import regression_limit, regression_trajectory
from fedsim.analysis.separability import finite_minimiser, first_order_bias
from fedsim.data import Dataset, Shards
from fedsim.data.margin import linear_regression, non_separable
from fedsim.federation import assemble, load
from fedsim.plots import panels
from fedsim.probes.direction import is_due
from fedsim.rate_plots import fitted, overlay
from fedsim.simulate import rounds
from strategies import LocalGD

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
