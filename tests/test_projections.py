"""Projections, anchoring, loss-normalised steps, and least squares in closed form."""

from __future__ import annotations

import numpy as np
import pytest
from checks_local_gd import FAMILIES, problem, run, signed
from reference_local_gd import reference

from fedsim.analysis.direction import cosd, node_weights, relative_error, smoothness
from fedsim.analysis.projections import (
    anchor_factor,
    halpern,
    loss_normalised_local_gd,
    modified_step_size,
    parallel_projections,
    project,
    regression_contraction,
    regression_limit,
    regression_maps,
    regression_trajectory,
)
from fedsim.data.margin import linear_regression, toy

SETS = [("skew", 0), ("two", 0)]
MORE = [
    pytest.param(family, seed, marks=pytest.mark.slow)
    for family in FAMILIES
    for seed in range(5)
    if (family, seed) not in SETS
]


def test_projection_is_the_nearest_feasible_point():
    zs = problem("skew", 0)[0]
    rng = np.random.default_rng(0)
    for _ in range(10):
        v = rng.standard_normal(20)
        u = project(zs[0], v)
        assert (zs[0] @ u).min() >= 1 - 1e-12
        np.testing.assert_allclose(project(zs[0], u), u, atol=1e-12)
        # Variational inequality: no feasible point lies on the side of v.
        for _ in range(10):
            feasible = problem("skew", 0)[2].w_hat * (1 + rng.random()) + 0.02 * rng.standard_normal(20)
            if (zs[0] @ feasible).min() >= 1:
                assert (v - u) @ (feasible - u) <= 1e-10
    inside = 2 * problem("skew", 0)[2].w_hat
    assert project(zs[0], inside) is inside


def test_projection_of_one_row_in_closed_form():
    rng = np.random.default_rng(1)
    for _ in range(10):
        z, v = rng.standard_normal(5), rng.standard_normal(5)
        expected = v + max(0.0, 1 - z @ v) * z / (z @ z)
        np.testing.assert_allclose(project(z[None], v), expected, atol=1e-12)


def test_reference_table():
    zs, z, answer = problem("skew", 0)
    plain, anchored = parallel_projections(zs, 1000), halpern(zs, 1000)
    for u, expected in (
        (plain[10], (7.74917e-3, 0.146157, 0.839591)),
        (plain[1000], (4.84665e-3, 0.100114, 1.0)),
        (anchored[10], (9.85950e-3, 0.388159, 0.526178)),
        (anchored[100], (3.85011e-4, 0.0606329, 0.930712)),
        (anchored[1000], (9.13904e-6, 7.02042e-3, 0.992469)),
    ):
        got = cosd(u, answer.w_hat), relative_error(u, answer.w_hat), (z @ u).min()
        np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.mark.parametrize(("family", "seed"), SETS + MORE)
def test_plain_projections_stop_short_and_halpern_arrives(family, seed):
    zs, z, answer = problem(family, seed)
    plain, anchored = parallel_projections(zs, 1000), halpern(zs, 1000)
    assert (z @ plain[-1]).min() >= 1 - 1e-6
    assert cosd(plain[-1], answer.w_hat) > 1e-3
    assert cosd(anchored[-1], answer.w_hat) < 1e-3
    late = (
        1000
        * relative_error(anchored[1000], answer.w_hat)
        / (300 * relative_error(anchored[300], answer.w_hat))
    )
    assert 0.97 <= late <= 1.5
    assert cosd(anchored[100], answer.w_hat) < cosd(plain[100], answer.w_hat)


def test_two_points_cannot_tell_plain_from_anchored():
    assert cosd(parallel_projections(signed(toy(0.1)), 1000)[-1], np.array([10.0, 0.0])) < 1e-20


def test_infeasible_nodes_are_refused():
    with pytest.raises(ValueError, match="no point satisfies"):
        project(np.array([[1.0, 0.0], [-1.0, 0.0]]), np.zeros(2))


def test_anchor_starts_at_one_half():
    assert [anchor_factor(k) for k in (1, 2, 3)] == [1 / 2, 2 / 3, 3 / 4]
    assert anchor_factor(5, anchored=False) == 1
    with pytest.raises(ValueError, match="k = 0 must be >= 1"):
        anchor_factor(0)


def test_modified_step_size_does_not_depend_on_local_steps_and_is_bounded():
    zs = problem("skew", 0)[0]
    assert modified_step_size(zs, 1e-4) == 1 / smoothness(zs)
    with pytest.raises(ValueError, match="pull = -1"):
        modified_step_size(zs, -1)
    with pytest.raises(ValueError, match=r"must have pull >= 0 and c"):
        modified_step_size(zs, 2 * smoothness(zs))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_normalised_steps_beat_plain_local_gd(family):
    zs, _, answer = problem(family, 0)
    w = loss_normalised_local_gd(zs, 10, 1000)
    plain = run(reference, family, 0, "fixed", 10, 1000)
    assert cosd(w[-1], answer.w_hat) < 0.6 * cosd(plain[-1], answer.w_hat)
    assert cosd(w[-1], answer.w_hat) < 1e-2


def test_loss_normalised_step_by_hand_on_unequal_nodes():
    zs = [np.array([[1.0, 0.5], [0.5, 1.0]]), np.array([[2.0, -0.5]])]
    p = (0.25, 0.75)
    start = np.zeros(2)
    for w in loss_normalised_local_gd(zs, 3, 4, c=0.5, p=p):
        np.testing.assert_allclose(w, start, rtol=1e-13, atol=1e-15)
        loss = sum(q * np.exp(-z @ w).mean() for q, z in zip(p, zs, strict=True))
        eta = 0.5 / (max(np.linalg.norm(z, 2) ** 2 / len(z) for z in zs) * 3 * loss)
        ends = []
        for z in zs:
            v = w.copy()
            for _ in range(3):
                v = v + eta * z.T @ np.exp(-z @ v) / len(z)
            ends.append(v)
        start = np.array(p) @ np.stack(ends)


@pytest.mark.parametrize("local_steps", [1, 10, 100])
@pytest.mark.parametrize("p", ["uniform", (0.4, 0.3, 0.1, 0.1, 0.1)])
def test_regression_closed_form_is_the_loop(local_steps, p):
    xs, ys = zip(*linear_regression(), strict=True)
    eta = 1 / smoothness(xs, "exponential")  # beta = max_i ||X_i||^2 / n_i
    start = np.random.default_rng(9).standard_normal(60)
    closed = regression_trajectory(xs, ys, eta, local_steps, 200, p, start)
    w = start
    for k in range(201):
        np.testing.assert_allclose(closed[k], w, atol=1e-9)
        ends = []
        for x, y in zip(xs, ys, strict=True):
            v = w
            for _ in range(local_steps):
                v = v - eta * x.T @ (x @ v - y) / len(x)
            ends.append(v)
        w = node_weights(xs, p) @ np.stack(ends)


def test_regression_limit_is_minimum_norm_and_the_contraction_is_the_rate():
    xs, ys = zip(*linear_regression(), strict=True)
    x, y = np.vstack(xs), np.concatenate(ys)
    limit = regression_limit(xs, ys, np.zeros(60))
    np.testing.assert_allclose(limit, np.linalg.pinv(x) @ y, atol=1e-12)
    eta = 1 / smoothness(xs, "exponential")  # beta = max_i ||X_i||^2 / n_i
    for local_steps in (1, 10, None):
        w = regression_trajectory(xs, ys, eta, local_steps, 3000)
        rate = regression_contraction(xs, eta, local_steps)
        assert rate < 1
        error = np.linalg.norm(w - limit, axis=1)
        late = 400 if local_steps is None else 2000
        assert error[late + 1] / error[late] == pytest.approx(rate, rel=2e-2)
    assert regression_contraction(xs, eta, 10) < regression_contraction(xs, eta, 1)


def test_exact_local_solutions_are_the_limit_of_many_steps():
    xs, _ = zip(*linear_regression(), strict=True)
    np.testing.assert_allclose(regression_maps(xs, 0.05, 20_000), regression_maps(xs, 0.05, None), atol=1e-9)


def test_regression_needs_interpolation():
    x = np.array([[1.0], [1.0]])
    with pytest.raises(ValueError, match="no vector fits all nodes"):
        regression_limit([x], [np.array([0.0, 1.0])], np.zeros(1))
