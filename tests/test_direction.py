"""Metrics, rates and the laws of Local-GD in the late phase, on the plain reference implementation."""

from __future__ import annotations

import math

import checks_local_gd as check
import numpy as np
import pytest
from checks_local_gd import FAMILIES, TABLE, problem, signed
from reference_local_gd import reference

from fedsim.analysis import direction as D
from fedsim.analysis import rates
from fedsim.analysis.max_margin import max_margin
from fedsim.analysis.separability import (
    finite_minimiser,
    first_order_bias,
    gradients,
    hessians,
    mixed_limit,
    separable_part,
)
from fedsim.data.margin import margin_federation, mixed, non_separable, toy

SETS = [(family, seed) for family in FAMILIES for seed in range(2)]
MORE = [pytest.param(family, seed, marks=pytest.mark.slow) for family in FAMILIES for seed in range(2, 15)]


@pytest.mark.parametrize(("mode", "local_steps"), TABLE)
def test_reference_trajectory(mode, local_steps):
    check.check_table(reference, mode, local_steps)


def test_one_local_step_is_gradient_descent():
    check.check_one_step_is_gradient_descent(reference)


@pytest.mark.parametrize(("family", "seed"), SETS + MORE)
def test_late_phase(family, seed):
    check.check_late_phase(reference, family, seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_scaled_steps_do_not_gain_from_local_steps(family):
    check.check_scaled_steps_do_not_gain(reference, family, 0)


def test_fixed_budget():
    check.check_fixed_budget_favours_few_local_steps(reference)


def test_loss_takes_the_weights_of_the_average():
    check.check_loss_takes_the_weights_of_the_average(reference)


@pytest.mark.parametrize(("family", "seed"), SETS)
def test_anchor_improves_modified_local_gd(family, seed):
    check.check_anchor_improves_modified(reference, family, seed)


def test_bias_of_the_finite_minimiser():
    check.check_bias_of_finite_minimiser(reference)


@pytest.mark.parametrize("local_steps", [1, 10, pytest.param(100, marks=pytest.mark.slow)])
def test_mixed_limit(local_steps):
    check.check_mixed_limit(reference, local_steps)


@pytest.mark.parametrize("local_steps", [1, 4, 16, pytest.param(64, marks=pytest.mark.slow)])
def test_large_steps(local_steps):
    check.check_large_steps(reference, local_steps, (1.0, 4.0, 16.0, 64.0))


@pytest.mark.parametrize(
    ("family", "seed"), [(family, seed) for family in ("skew", "two", "wide") for seed in range(4)]
)
def test_local_sgd(family, seed):
    check.check_local_sgd(reference, family, seed)


@pytest.mark.parametrize("local_steps", [1, 10, 100])
def test_exponential_loss(local_steps):
    check.check_exponential_loss(reference, local_steps)


def test_replaying_all_rows_is_the_full_gradient():
    zs = problem("skew", 0)[0]
    indices = np.broadcast_to(np.arange(10), (5, 4, 3, 10))
    np.testing.assert_allclose(reference(zs, 3, 5, indices=indices), reference(zs, 3, 5), atol=1e-14)


def test_unequal_nodes_need_no_mask():
    """A padded node takes the steps it takes alone."""
    zs = [z[: i + 1] for i, z in enumerate(problem("skew", 0)[0])]
    alone = np.stack([reference([z], 7, 1, eta=0.1)[-1] for z in zs])
    np.testing.assert_allclose(
        reference(zs, 7, 1, eta=0.1, p="size")[-1], np.array([0.1, 0.2, 0.3, 0.4]) @ alone
    )


def test_cosd_and_angle_where_the_cosine_has_no_digits_left():
    u = np.array([1.0, 0.0])
    for theta in (1e-12, 1e-6, 0.3, math.pi / 2, 3.0):
        v = 7 * np.array([math.cos(theta), math.sin(theta)])
        assert D.cosd(u, v) == pytest.approx(2 * math.sin(theta / 2) ** 2, rel=1e-9)
        assert D.angle(u, v) == pytest.approx(theta, rel=1e-9)
    assert np.isnan(D.cosd(u, np.zeros(2)))


def test_metrics_take_a_vector_or_a_trajectory():
    zs, z, answer = problem("mix", 1)
    w = np.random.default_rng(0).standard_normal((5, z.shape[1]))
    for metric in (
        lambda w: D.cosd(w, answer.w_hat),
        lambda w: D.angle(w, answer.w_hat),
        lambda w: D.margin_ratio(z, w, answer.gamma),
        lambda w: D.federated_loss(zs, w, "size"),
        lambda w: D.federated_loss(zs, w, loss="exponential"),
        lambda w: D.support_weights(z, w),
        lambda w: D.support_distance(z, w, answer.multipliers),
        lambda w: D.relative_error(w, answer.w_hat),
        lambda w: D.slope_ratio(np.zeros_like(w), w, answer.w_hat),
        lambda w: D.slope_direction(np.ones_like(w), w),
    ):
        np.testing.assert_allclose(metric(w), np.stack([metric(row) for row in w]), rtol=1e-12)


def test_loss_against_its_definition():
    zs = [np.array([[1.0, 2.0], [0.5, -1.0]]), np.array([[-1.0, 1.0]])]
    w = np.array([0.3, 0.7])
    cases: tuple[tuple[D.Weights, tuple[float, float]], ...] = (
        ("uniform", (1 / 2, 1 / 2)),
        ("size", (2 / 3, 1 / 3)),
        ((1.0, 3.0), (1 / 4, 3 / 4)),
    )
    for p, weight in cases:
        logistic = sum(q * np.mean(np.log(1 + np.exp(-z @ w))) for q, z in zip(weight, zs, strict=True))
        exponential = sum(q * np.mean(np.exp(-z @ w)) for q, z in zip(weight, zs, strict=True))
        assert D.federated_loss(zs, w, p) == pytest.approx(logistic, rel=1e-14)
        assert D.federated_loss(zs, w, p, "exponential") == pytest.approx(exponential, rel=1e-14)
    assert D.log_federated_loss([np.ones((1, 1))], np.array([1e4]), loss="exponential") == pytest.approx(-1e4)


def test_margin_gap_bounds_the_distance_of_any_separating_vector():
    _, z, answer = problem("skew", 0)
    noise = np.random.default_rng(0).standard_normal((200, z.shape[1]))
    w = answer.w_hat + np.linspace(0, 1, 200)[:, None] * noise
    w = w[D.margin(z, w) > 0]
    assert len(w) > 10
    assert (D.cosd(w, answer.w_hat) <= D.mgap(z, w, answer.gamma) + 1e-15).all()


def test_support_weights_tend_to_the_multipliers():
    zs = signed(toy(0.3))
    z = np.vstack(zs)
    answer = max_margin(z)
    w = check.run(reference, "skew", 0, "fixed", 10, 1000)
    _, rows, known = problem("skew", 0)
    distance = D.support_distance(rows, w[[10, 100, 1000]], known.multipliers)
    assert (np.diff(distance) < 0).all()
    late = reference(zs, 10, 3000, eta=4.0)[-1]
    assert D.support_distance(z, late, answer.multipliers) < 1e-3


def test_bad_nodes_and_arguments():
    z = np.ones((2, 3))
    for call, message in (
        (lambda: D.node_weights([]), "nodes is empty"),
        (lambda: D.node_weights([z, z[:0]]), r"node 1 has shape \(0, 3\)"),
        (lambda: D.node_weights([z, z[:, :2]]), "node 1 has 2 features, node 0 has 3"),
        (lambda: D.node_weights([z, z], (1.0, -1.0)), "must be 2 nonnegative numbers"),
        (lambda: D.node_weights([z], "rows"), "p = 'rows' must be"),  # pyright: ignore[reportArgumentType]
        (lambda: D.federated_loss([z], np.ones(3), loss="hinge"), "loss = 'hinge'"),  # pyright: ignore[reportArgumentType]
        (lambda: D.slope_ratio(z, z, z[0], 1.0), "factor = 1.0 must be > 1"),
        (lambda: rates.fit_rate(np.ones(4), {"k": np.zeros(4)}), "k must be positive"),
        (lambda: rates.fit_rate(np.ones(4), {"k": np.ones(3)}), r"must have 4 like value"),
        (lambda: rates.fit_rate(np.ones(4), {"k": np.ones(4)}), "cannot be told apart"),
        (lambda: rates.fit_rate(np.ones(2), {"k": np.arange(1.0, 3)}), "2 points are too few"),
        (lambda: rates.fit_rate(np.ones(4), {}), "regressors is empty"),
        (
            lambda: rates.fit_rate(np.ones(4), {"k": np.arange(1.0, 5)}, confidence=1),
            "confidence = 1 must lie",
        ),
        (lambda: rates.fit_rate(np.ones(4), {"k": np.arange(1.0, 5)}, runs=np.zeros(4)), "at least 2 runs"),
        (lambda: rates.stable_loss_bound(3, 3, 1.0, 1, 1.0), "rounds = 3 must be > unstable = 3"),
        (lambda: finite_minimiser(problem("skew", 0)[0]), "no finite minimiser"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_fit_recovers_exponents_and_intervals_cover():
    rng = np.random.default_rng(0)
    k, steps, eta = (x.ravel() for x in np.meshgrid([10.0, 30, 100, 300], [1.0, 4, 16], [0.1, 0.2]))
    regressors = {"k": k, "L": steps, "eta": eta}
    exact = rates.fit_rate(5 * k**-1 * steps**-0.5 * eta**2, regressors)
    np.testing.assert_allclose(exact.exponents, [-1, -0.5, 2], atol=1e-10)
    assert exact.constant == pytest.approx(5)
    np.testing.assert_allclose(exact.band(regressors)[0], 5 * k**-1 * steps**-0.5 * eta**2, rtol=1e-9)
    covered, repeats = np.zeros(3), 400
    for _ in range(repeats):
        fit = rates.fit_rate(np.exp(0.3 * rng.standard_normal(24)) / k, regressors, confidence=0.9)
        covered += np.abs([-1, 0, 0] - fit.exponents) <= (fit.high - fit.low) / 2
    # 90 % +- 5 standard deviations of a binomial share.
    assert (np.abs(covered / repeats - 0.9) < 5 * math.sqrt(0.09 / repeats)).all()


def test_resampling_runs_sees_the_spread_between_runs_that_t_intervals_miss():
    rng = np.random.default_rng(1)
    k, runs = np.tile(np.arange(1.0, 101), 30), np.repeat(np.arange(30), 100)
    slopes = -1 + 0.2 * rng.standard_normal(30)
    value = k ** slopes[runs]
    by_run = rates.fit_rate(value, {"k": k}, runs=runs)
    naive = rates.fit_rate(value, {"k": k})
    np.testing.assert_allclose(by_run.exponents, slopes.mean(), rtol=1e-10)
    # The exponent is the mean of 30 slopes: its interval is known.
    known = 2 * 1.96 * slopes.std() / math.sqrt(30)
    assert by_run.high[0] - by_run.low[0] == pytest.approx(known, rel=0.1)
    assert naive.high[0] - naive.low[0] < 0.7 * known
    fit, low, high = by_run.band({"k": np.array([2.0, 50.0])})
    assert (low < fit).all()
    assert (fit < high).all()


def test_measured_rates_of_local_gd():
    """The loss falls like 1 / t; the direction like a power of log t near -2, far from any power of t."""
    zs, _, answer = problem("skew", 0)
    k = np.array([200, 300, 500, 700, 1000])
    t, loss, distance = [], [], []
    for local_steps in (1, 10, 100):
        w = check.run(reference, "skew", 0, "fixed", local_steps, 1000)[k]
        t.append(local_steps * k / D.smoothness(zs))
        loss.append(D.federated_loss(zs, w))
        distance.append(D.cosd(w, answer.w_hat))
    time = np.concatenate(t)
    falls = rates.fit_rate(np.concatenate(loss), {"t": time})
    assert -1.05 < falls.exponents[0] < -0.95
    turns = rates.fit_rate(np.concatenate(distance), {"log t": np.log(time)})
    assert -2.5 < turns.exponents[0] < -0.5


def test_large_step_bounds_hold_and_the_summary_counts():
    steps, rounds = 4, 2048
    for gamma, eta in ((0.1, 64.0), (0.5, 16.0)):
        loss = D.federated_loss(zs := signed(toy(gamma)), reference(zs, steps, rounds, eta=eta))
        summary = rates.large_step(loss, eta, steps, 2, gamma)
        rises = [r for r in range(1, rounds + 1) if loss[r] > loss[r - 1] + 1e-15]
        assert summary.max_loss == loss.max()
        assert summary.last_increase == (rises[-1] if rises else 0)
        assert summary.product == pytest.approx(loss[-1] * eta * steps * rounds * gamma**2)
        assert loss[:-1].mean() <= rates.average_loss_bound(rounds, eta, steps, gamma)
        threshold = rates.stable_threshold(eta, steps, 2, gamma)
        first = summary.first_stable
        if first is None:
            assert loss.min() >= threshold
        else:
            assert loss[first] < threshold <= loss[first - 1]
            assert loss[-1] <= rates.stable_loss_bound(rounds, first, eta, steps, gamma)
        # The small margin has an unstable phase and no certain stable one, the large margin the reverse.
        assert (bool(rises), first is None) == ((gamma == 0.1),) * 2
    assert rates.unstable_rounds(64.0, 4, 2, 0.5) == pytest.approx(512 / 0.125)
    # 26 (1 + log^2(1 + 1) + 1) / 1 by hand for K = eta = gamma = r = 1.
    assert rates.average_loss_bound(1, 1.0, 1, 1.0) == pytest.approx(26 * (2 + math.log(2) ** 2))


def test_partition_finds_exactly_the_separable_rows():
    zs = signed(mixed())
    expected = np.tile(np.repeat([False, True], [20, 10]), 3)
    np.testing.assert_array_equal(separable_part(np.vstack(zs)), expected)
    np.testing.assert_array_equal(separable_part(1e-4 * np.vstack(zs)), expected)
    limit = mixed_limit(zs)
    np.testing.assert_allclose(limit.basis[:, 3:], 0, atol=1e-12)
    assert separable_part(problem("mix", 0)[1]).all()
    assert not separable_part(np.vstack(signed(non_separable()))).any()


def test_mixed_limit_reduces_to_its_ends():
    zs, _, answer = problem("skew", 0)
    limit = mixed_limit(zs)
    assert limit.direction is not None
    assert D.cosd(limit.direction, answer.w_hat) < 1e-20
    np.testing.assert_array_equal(limit.finite, 0)
    noisy = signed(non_separable())
    limit = mixed_limit(noisy)
    assert limit.direction is None
    np.testing.assert_allclose(limit.finite, finite_minimiser(noisy), atol=1e-12)


@pytest.mark.parametrize("loss", ["logistic", "exponential"])
def test_derivatives_and_bias_formula(loss):
    zs = signed(non_separable())
    w, step = np.full(5, 0.2), 1e-5 * np.eye(5)

    def value(z: np.ndarray, at: np.ndarray) -> np.ndarray:
        return D.federated_loss([z], at, loss=loss)

    for i, z in enumerate(zs):
        slope = [(value(z, w + e) - value(z, w - e)) / 2e-5 for e in step]
        bend = [(gradients([z], w + e, loss) - gradients([z], w - e, loss))[0] / 2e-5 for e in step]
        np.testing.assert_allclose(gradients(zs, w, loss)[i], slope, atol=1e-8)
        np.testing.assert_allclose(hessians(zs, w, loss)[i], bend, atol=1e-8)
    for p in ("uniform", (0.4, 0.3, 0.2, 0.1)):
        star = finite_minimiser(zs, p, loss)
        assert np.linalg.norm(D.node_weights(zs, p) @ gradients(zs, star, loss)) < 1e-12
        np.testing.assert_array_equal(first_order_bias(zs, star, 0.1, 1, p, loss), 0)
    same = [zs[0]] * 3
    star = finite_minimiser(same, loss=loss)
    assert np.linalg.norm(first_order_bias(same, star, 0.1, 10, loss=loss)) < 1e-11


def test_reference_points_are_the_nodes_own_answers():
    zs, _, answer = problem("two", 0)
    points = D.reference_points(zs, answer.w_hat)
    own = [max_margin(z).w_hat for z in zs]
    np.testing.assert_allclose(points.nodes, [D.cosd(w, answer.w_hat) for w in own], rtol=1e-12)
    assert points.mean == pytest.approx(float(D.cosd(own[0] + own[1], answer.w_hat)), rel=1e-9)
    assert max_margin(np.vstack(signed(margin_federation("skew", 1, 3, 4)))).certified
