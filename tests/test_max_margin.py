"""The certified hard-margin reference: certificates, status, solvers against each other and against SVMs, bad input."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from checks_local_gd import FAMILIES, problem, signed
from scipy.optimize import minimize, nnls
from sklearn.svm import SVC, LinearSVC

from fedsim.analysis.direction import cosd, smoothness
from fedsim.analysis.max_margin import (
    MaxMargin,
    Solver,
    dual_acceleration,
    least_distance,
    max_margin,
    node_rows,
    signed_rows,
)
from fedsim.analysis.multiclass import lifted_rows, multiclass_max_margin, pair_margins
from fedsim.data.margin import (
    LinearRegression,
    Mixed,
    NearDegenerate,
    NonSeparable,
    Separable,
    Toy,
    linear_regression,
    margin_federation,
    mixed,
    near_degenerate,
    non_separable,
    toy,
)

GATHERED = [(family, seed) for family in FAMILIES for seed in range(5)]
SOME = [(family, 0) for family in FAMILIES]
HELD_OUT = [
    pytest.param(family, seed, marks=pytest.mark.slow) for family in FAMILIES for seed in range(5, 15)
]


def assert_certified(answer: MaxMargin, z: np.ndarray) -> None:
    """Recompute the certificate from the answer, trusting none of its own numbers."""
    w, a = answer.w_hat, answer.multipliers
    assert answer.status == "separable"
    assert answer.certified
    assert a.min() >= 0
    assert (z @ w).min() >= 1 - 1e-10
    assert np.linalg.norm(z.T @ a - w) <= 1e-10 * np.linalg.norm(w)
    assert abs(a.sum() - w @ w) <= 1e-10 * (w @ w)
    assert answer.lower <= answer.upper * (1 + 1e-12)
    assert answer.upper == pytest.approx(np.linalg.norm(z.T @ answer.simplex), rel=1e-14)
    assert answer.simplex.sum() == pytest.approx(1, abs=1e-12)
    assert answer.width <= 1e-10


@pytest.mark.parametrize(("family", "seed"), GATHERED + HELD_OUT)
def test_certificate(family, seed):
    _, z, answer = problem(family, seed)
    assert_certified(answer, z)
    both, label = np.vstack([z, -z]), np.repeat([1, -1], len(z))
    assert cosd(SVC(kernel="linear", C=1e10, tol=1e-10).fit(both, label).coef_[0], answer.w_hat) < 1e-10


@pytest.mark.parametrize(("family", "seed"), SOME)
def test_hinge_svc_without_intercept_agrees_and_with_intercept_differs(family, seed):
    nodes = margin_federation(*FAMILIES[family], seed=seed)
    x, y = np.vstack([x for x, _ in nodes]), np.concatenate([y for _, y in nodes])
    w_hat = max_margin(x, y).w_hat
    hinge = LinearSVC(loss="hinge", C=1e6, tol=1e-10, fit_intercept=False, max_iter=1_000_000, random_state=0)
    assert cosd(hinge.fit(x, y).coef_[0], w_hat) < 1e-8
    # A solver that is free to move the plane answers another question.
    assert cosd(SVC(kernel="linear", C=1e10).fit(x, y).coef_[0], w_hat) > 1e-4


def test_toy_is_known_in_closed_form():
    z = np.vstack(signed(toy(0.1)))
    answer = max_margin(z)
    assert_certified(answer, z)
    np.testing.assert_allclose(answer.w_hat, [10, 0], atol=1e-12)
    np.testing.assert_allclose(answer.multipliers, [100 / 3, 200 / 3], rtol=1e-12)
    assert answer.gamma == pytest.approx(0.1, rel=1e-12)


def test_small_problems_against_all_supports():
    """Every candidate support is solved exactly; the best feasible answer is the minimum."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        z = rng.standard_normal((6, 3)) + np.array([1.5, 0, 0])
        best = np.inf
        for size in (1, 2, 3):
            for rows in combinations(range(6), size):
                w = np.linalg.pinv(z[list(rows)]) @ np.ones(size)
                if (z @ w).min() >= 1 - 1e-9:
                    best = min(best, float(np.linalg.norm(w)))
        answer = max_margin(z)
        if np.isinf(best):
            assert answer.status == "non_separable"
        else:
            assert answer.gamma == pytest.approx(1 / best, rel=1e-9)


def test_least_distance_against_a_general_solver():
    rng = np.random.default_rng(0)
    g, h = rng.standard_normal((7, 4)) + np.array([2.0, 0, 0, 0]), rng.standard_normal(7)
    q, a = least_distance(g, h)
    constraint = {"type": "ineq", "fun": lambda v: g @ v - h}
    other = minimize(lambda v: v @ v / 2, np.ones(4), jac=lambda v: v, constraints=constraint, tol=1e-14)
    np.testing.assert_allclose(q, other.x, atol=1e-6)
    np.testing.assert_allclose(g.T @ a, q, atol=1e-12)
    assert (g @ q - h).min() > -1e-12
    np.testing.assert_array_equal(least_distance(g, -np.abs(h))[0], np.zeros(4))
    with pytest.raises(ValueError, match="no point satisfies"):
        least_distance(np.array([[1.0], [-1.0]]), np.ones(2))


@pytest.mark.parametrize(("family", "seed"), SOME)
def test_dual_acceleration_brackets_the_margin(family, seed):
    _, z, exact = problem(family, seed)
    loose = dual_acceleration(z, 3000)
    assert loose.status == "separable"
    assert loose.lower <= exact.gamma * (1 + 1e-12)
    assert exact.gamma <= loose.upper * (1 + 1e-12)
    assert 1 - loose.lower / exact.gamma < 1e-4
    assert cosd(loose.w_hat, exact.w_hat) < 1e-6
    assert cosd(loose.w_hat, exact.w_hat) <= loose.width
    assert loose.simplex.sum() == pytest.approx(1, abs=1e-13)


def test_working_set_and_direct_solver_agree_on_many_rows():
    z = np.vstack(signed(margin_federation("mix", 10, 2000, 50, sep=0.3, seed=1)))
    by_rows = max_margin(z)
    assert_certified(by_rows, z)
    assert cosd(by_rows.w_hat, max_margin(z, solver="ldp").w_hat) < 1e-12


@pytest.mark.parametrize("solver", ["ldp", "working_set"])
def test_non_separable_rows_give_evidence_and_never_a_direction(solver: Solver):
    rng = np.random.default_rng(7)
    sets = [np.vstack(signed(non_separable())), *(rng.standard_normal((n, 6)) for n in (20, 50, 400))]
    for z in sets:
        answer = max_margin(z, solver=solver)
        assert answer.status == "non_separable"
        assert answer.solution is None
        assert answer.dual is None
        assert not answer.certified
        # Gordan: a point of the simplex that all rows balance on excludes every separating direction.
        q = answer.simplex
        assert q.min() >= 0
        assert q.sum() == pytest.approx(1, abs=1e-12)
        assert np.linalg.norm(z.T @ q) <= 1e-11 * np.linalg.norm(z, axis=1).max()
        with pytest.raises(ValueError, match="rows are non_separable, there is no max-margin direction"):
            _ = answer.w_hat
        with pytest.raises(ValueError, match="rows are non_separable, there are no multipliers"):
            _ = answer.multipliers


@pytest.mark.parametrize("sep", [1e-3, 1e-5, 1e-7, 1e-9])
def test_tiny_margins_need_the_polished_support(sep):
    z = near_degenerate(sep)[0][0]
    answer = max_margin(z)
    assert answer.status == "separable"
    assert answer.gamma == pytest.approx(1.139225 * sep, rel=1e-5)
    assert answer.width < 1e-6
    assert answer.certified == (sep >= 1e-5)
    # The read-out of the textbook divides by the squared residual, which is gamma^2.
    system = np.vstack([z.T, np.ones(len(z))])
    target = np.eye(7)[6]
    r = system @ nnls(system, target)[0] - target
    textbook = (z @ (-r[:6] / r[6])).min()
    assert 1 - textbook > 10 * answer.infeasibility
    assert sep > 1e-9 or textbook < 0


def test_status_at_the_end_of_float64_follows_the_witness():
    """A margin of 1.6e-12 of the longest row is still witnessed; below 1e-12 a direction is never claimed."""
    z = near_degenerate(5e-12)[0][0]
    answer = max_margin(z)
    assert answer.status == "separable"
    assert (z @ answer.direction).min() > 1e-12 * np.linalg.norm(z, axis=1).max()
    for sep in (3e-12, 1e-13):
        assert max_margin(near_degenerate(sep)[0][0]).solution is None


def test_unfinished_solver_is_undecided():
    answer = dual_acceleration(near_degenerate(1e-3)[0][0], 5)
    assert answer.status == "undecided"
    assert answer.upper > 1e-3
    with pytest.raises(ValueError, match=r"rows are undecided, .* does not exclude zero"):
        _ = answer.w_hat


def test_duplicates_leave_the_answer_unchanged():
    _, z, answer = problem("skew", 0)
    more = np.vstack([z, z[:15], z[:5]])
    again = max_margin(more)
    assert_certified(again, more)
    np.testing.assert_allclose(again.w_hat, answer.w_hat, rtol=1e-10)


@pytest.mark.parametrize("factor", [1e-8, 1e6])
def test_units_of_the_rows_do_not_matter(factor):
    _, z, answer = problem("mix", 0)
    scaled = max_margin(factor * z)
    assert scaled.certified
    np.testing.assert_allclose(scaled.w_hat * factor, answer.w_hat, rtol=1e-10)


def test_wide_rows_and_one_row():
    z = np.random.default_rng(0).standard_normal((5, 300))
    answer = max_margin(z)
    assert_certified(answer, z)
    # With more features than rows every row is active: the answer is the pseudo-inverse.
    gram = np.linalg.solve(z @ z.T, np.ones(5))
    if (gram > 0).all():
        np.testing.assert_allclose(answer.w_hat, z.T @ gram, rtol=1e-10)
    np.testing.assert_allclose(max_margin(z[:1]).w_hat, z[0] / (z[0] @ z[0]), rtol=1e-12)


def test_labels_may_be_signs_or_bits_and_one_class():
    nodes = margin_federation("mix", 2, 10, 30, seed=0)
    x, y = np.vstack([x for x, _ in nodes]), np.concatenate([y for _, y in nodes])
    np.testing.assert_array_equal(max_margin(x, y).w_hat, max_margin(x, (y > 0).astype(int)).w_hat)
    positive = x[y > 0]
    np.testing.assert_array_equal(
        max_margin(positive, np.ones(len(positive))).w_hat, max_margin(positive).w_hat
    )
    np.testing.assert_array_equal(
        max_margin(positive, np.zeros(len(positive))).w_hat, max_margin(-positive).w_hat
    )


def test_bad_rows_are_named():
    x = np.arange(12.0).reshape(4, 3) + 1
    zero = x.copy()
    zero[2] = 0
    assert max_margin(zero).reason == "row 2 is zero"
    twice = np.vstack([x, x[1]])
    answer = max_margin(twice, np.array([1, 1, 1, 1, 0]))
    assert answer.status == "non_separable"
    assert answer.reason == "rows 1 and 4 are one point with contradicting labels"
    with pytest.raises(ValueError, match="no max-margin direction: rows 1 and 4 are one point"):
        _ = answer.direction
    x[3, 0] = np.nan
    with pytest.raises(ValueError, match="row 3 of x is NaN or infinite"):
        max_margin(x)
    with pytest.raises(ValueError, match=r"labels are \[0. 1. 2.\], must be in"):
        max_margin(np.ones((3, 2)), np.array([0, 1, 2]))
    with pytest.raises(ValueError, match=r"y has shape \(2,\), must be \(3,\)"):
        signed_rows(np.ones((3, 2)), np.ones(2))
    with pytest.raises(ValueError, match=r"x has shape \(0, 2\)"):
        max_margin(np.ones((0, 2)))
    with pytest.raises(ValueError, match="solver = 'simplex' must be one of"):
        max_margin(np.ones((1, 2)), solver="simplex")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="steps = 0 must be >= 1"):
        dual_acceleration(np.ones((1, 2)), 0)
    with pytest.raises(ValueError, match=r"node 1 has no row \(2 rows, 3 nodes\)"):
        node_rows(np.ones((2, 2)), np.ones(2), np.array([0, 2]))


def test_multiclass_constraints_stationarity_and_two_classes():
    rng = np.random.default_rng(0)
    y = np.arange(30) % 3
    x = rng.standard_normal((30, 4)) + 6 * np.eye(4)[y]
    answer = multiclass_max_margin(x, y, 3)
    assert_certified(answer, lifted_rows(x, y, 3))
    w = answer.w_hat.reshape(3, 4)
    scores = x @ w.T
    ahead = scores[np.arange(30), y][:, None] - scores
    assert np.sort(ahead, axis=1)[:, 1].min() == pytest.approx(1, abs=1e-10)
    np.testing.assert_allclose(w.sum(axis=0), 0, atol=1e-12)
    pairs = pair_margins(w, x, y)
    for a, b in [(0, 1), (2, 0)]:
        unit = (w[a] - w[b]) / np.linalg.norm(w[a] - w[b])
        assert pairs[a, b] == pytest.approx((x[y == a] @ unit).min())
    assert np.isnan(np.diag(pairs)).all()
    # For two classes W is +- half the binary answer.
    two = y < 2
    binary = max_margin(x[two], y[two]).w_hat
    both = multiclass_max_margin(x[two], y[two], 2).w_hat.reshape(2, 4)
    np.testing.assert_allclose(both, [-binary / 2, binary / 2], atol=1e-12)


def test_multiclass_bad_input():
    with pytest.raises(ValueError, match=r"y must hold 2 labels in 0\.\.1"):
        multiclass_max_margin(np.ones((2, 2)), np.array([0, 2]), 2)
    with pytest.raises(ValueError, match="num_classes = 1 must be >= 2"):
        multiclass_max_margin(np.ones((2, 2)), np.array([0, 0]), 1)
    answer = multiclass_max_margin(np.ones((2, 2)), np.array([0, 1]), 2)
    assert answer.status == "non_separable"
    assert "one point with contradicting labels" in answer.reason


FINGERPRINTS = [
    ("skew", 0, 0.032301, -18.126915, 3.192562316, 1.280257597, 17),
    ("skew", 1, 0.133605, -52.330792, 2.579736609, 1.255894099, 14),
    ("two", 0, 0.032301, 2.587734, 3.192562316, 1.779200528, 10),
    ("wide", 0, 0.013022, -75.587723, 9.329546843, 2.842440919, 28),
    ("wide", 1, 0.040432, -75.831966, 10.490950047, 2.779882951, 29),
    ("mix", 0, 0.018020, -56.991883, 8.908180292, 1.401058663, 33),
    ("mix", 1, 0.051597, 19.010259, 10.195193877, 1.454841831, 33),
]


@pytest.mark.parametrize(("family", "seed", "first", "total", "beta", "gamma", "support"), FINGERPRINTS)
def test_fingerprints(family, seed, first, total, beta, gamma, support):
    kind, num_nodes, rows, features = FAMILIES[family]
    nodes = margin_federation(kind, num_nodes, rows, features, seed=seed)
    zs, _, answer = problem(family, seed)
    w_star = np.random.default_rng(seed).standard_normal(features)
    assert w_star[0] / np.linalg.norm(w_star) == pytest.approx(first, abs=1e-6)
    assert sum(x.sum() for x, _ in nodes) == pytest.approx(total, abs=1e-6)
    assert smoothness(zs) == pytest.approx(beta, rel=1e-8)
    assert answer.gamma == pytest.approx(gamma, rel=1e-8)
    assert len(answer.support) == support
    data = Separable(kind, rows, features).load(seed, num_nodes)
    assert data.workers is not None
    np.testing.assert_array_equal(data.x.numpy(), np.vstack([x for x, _ in nodes]))
    assert all(
        np.array_equal(a, b)
        for a, b in zip(node_rows(data.x.numpy(), data.y.numpy(), data.workers.numpy()), zs, strict=True)
    )


@pytest.mark.parametrize(
    ("source", "seed", "workers", "nodes"),
    [
        (Toy(0.2), 0, 2, toy(0.2)),
        (NonSeparable(), 0, 4, non_separable()),
        (Mixed(), 2, 3, mixed()),
        (NearDegenerate(1e-3), 5, 7, near_degenerate(1e-3, 7)),
        (LinearRegression(), 0, 5, linear_regression()),
    ],
)
def test_sources_hold_the_rows_of_the_functions(source, seed, workers, nodes):
    data = source.load(seed, workers)
    x, y = np.vstack([x for x, _ in nodes]), np.concatenate([y for _, y in nodes])
    if data.task == "regression":
        np.testing.assert_array_equal(data.x.numpy(), x)
        np.testing.assert_array_equal(data.y.numpy(), y)
    else:
        np.testing.assert_array_equal(signed_rows(data.x.numpy(), data.y.numpy()), y[:, None] * x)
        assert len(np.unique(data.y)) == 2
    np.testing.assert_array_equal(np.bincount(data.workers.numpy()), [len(y) for _, y in nodes])
    assert data.x.numpy().dtype == np.float64


def test_test_rows_follow_the_law_of_the_training_rows():
    data = Separable("mix", 50, 8).load(3, 4)
    w = np.random.default_rng(3).standard_normal(8)
    along = data.test_x.numpy() @ (w / np.linalg.norm(w)) * (2 * data.test_y.numpy() - 1)
    assert along.min() >= 1
    assert not np.isin(data.test_x.numpy()[:, 0], data.x.numpy()[:, 0]).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Separable("stripes"), "kind = 'stripes' must be 'skew' or 'mix'"),
        (lambda: Separable(sep=0), "sep = 0 must be > 0"),
        (lambda: Separable(noise=-1), "noise = -1 must be >= 0"),
        (lambda: Separable(rows_per_worker=0), "rows must be >= 1|rows = 0 must be >= 1"),
        (lambda: margin_federation("skew", 0, 1, 1), "num_nodes = 0 must be >= 1"),
        (lambda: Toy(1.0), r"margin = 1.0 must lie in \(0, 1\)"),
        (lambda: Toy().load(0, 3), "num_workers = 3 must be <= 2"),
        (lambda: NearDegenerate(1e-3).load(0, 61), r"num_nodes = 61 must lie in 1\.\.60"),
        (lambda: linear_regression(8, 8, 60), "features = 60 must be >= 64"),
    ],
)
def test_bad_generators(make, message):
    with pytest.raises(ValueError, match=message):
        make()
