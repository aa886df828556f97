"""Laws of Local-GD on linear classifiers, as checks of any function that returns a trajectory."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
from reference_local_gd import Trajectory, step_size

from fedsim.analysis import direction as D
from fedsim.analysis.max_margin import MaxMargin, max_margin
from fedsim.analysis.separability import finite_minimiser, first_order_bias, mixed_limit
from fedsim.data.margin import margin_federation, mixed, non_separable, toy

FAMILIES: dict[str, tuple[str, int, int, int]] = {
    "skew": ("skew", 4, 10, 20),
    "two": ("skew", 2, 10, 20),
    "wide": ("skew", 4, 10, 100),
    "mix": ("mix", 10, 5, 60),
}

# (mode, L) -> k -> (cosd, margin ratio, F) on family "skew", seed 0
TABLE = {
    ("fixed", 1): {
        1: (0.149455, 0.226443, 0.487017),
        10: (0.0902882, 0.369062, 0.133910),
        100: (0.0389784, 0.683185, 0.0171749),
        1000: (0.0213619, 0.822116, 1.79478e-3),
    },
    ("fixed", 10): {
        1: (0.100258, 0.354222, 0.270152),
        10: (0.0434459, 0.647805, 0.0246849),
        100: (0.0216000, 0.817342, 1.92566e-3),
        1000: (0.0140203, 0.878592, 1.86053e-4),
    },
    ("fixed", 100): {
        1: (0.0864279, 0.446311, 0.129922),
        10: (0.0274210, 0.773348, 3.61979e-3),
        100: (0.0149275, 0.873013, 2.04511e-4),
        1000: (0.0104818, 0.908309, 1.90137e-5),
    },
    ("scaled", 10): {
        1: (0.129505, 0.252384, 0.533550),
        10: (0.0881043, 0.377566, 0.155895),
        100: (0.0387227, 0.680412, 0.0180721),
        1000: (0.0211372, 0.821910, 1.81148e-3),
    },
    ("scaled", 100): {
        1: (0.128435, 0.254872, 0.536463),
        10: (0.0879536, 0.378316, 0.157894),
        100: (0.0387166, 0.680116, 0.0181593),
        1000: (0.0211220, 0.821881, 1.81311e-3),
    },
}


def signed(nodes: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    return [y[:, None] * x for x, y in nodes]


@lru_cache
def problem(family: str, seed: int) -> tuple[list[np.ndarray], np.ndarray, MaxMargin]:
    zs = signed(margin_federation(*FAMILIES[family], seed=seed))
    z = np.vstack(zs)
    return zs, z, max_margin(z)


@lru_cache
def run(
    trajectory: Trajectory, family: str, seed: int, mode: str, local_steps: int, rounds: int
) -> np.ndarray:
    return trajectory(problem(family, seed)[0], local_steps, rounds, mode)


def check_table(trajectory: Trajectory, mode: str, local_steps: int) -> None:
    zs, z, answer = problem("skew", 0)
    w = run(trajectory, "skew", 0, mode, local_steps, 1000)
    for k, expected in TABLE[mode, local_steps].items():
        got = D.cosd(w[k], answer.w_hat), D.margin_ratio(z, w[k], answer.gamma), D.federated_loss(zs, w[k])
        np.testing.assert_allclose(got, expected, rtol=1e-4)


def check_one_step_is_gradient_descent(trajectory: Trajectory) -> None:
    zs = problem("mix", 0)[0]
    eta = step_size(zs, 1, "fixed")
    w = np.zeros(zs[0].shape[1])
    for k, averaged in enumerate(trajectory(zs, 1, 50)):
        np.testing.assert_allclose(averaged, w, atol=1e-12, err_msg=f"round {k}")
        w = w + eta * np.mean([z.T @ (0.5 * (1 - np.tanh(z @ w / 2))) / len(z) for z in zs], axis=0)


def check_late_phase(trajectory: Trajectory, family: str, seed: int) -> None:
    """Laws 1-3, monotone `cosd`, `cosd <= mgap`, and better than averaging the nodes' answers once."""
    zs, z, answer = problem(family, seed)
    eta = step_size(zs, 1, "fixed")
    late = {1: (0.84, 1.03), 10: (0.90, 1.06), 100: (0.92, 1.08)}
    slope = {1: (0.88, 1.03), 10: (0.93, 1.06), 100: (0.95, 1.07)}
    recorded = np.array([10, 100, 250, 500, 1000])
    last = {}
    for local_steps in (1, 10, 100):
        w = run(trajectory, family, seed, "fixed", local_steps, 1000)
        t = eta * local_steps * recorded
        loss, distance = D.federated_loss(zs, w[recorded]), D.cosd(w[recorded], answer.w_hat)
        gap = D.mgap(z, w[recorded], answer.gamma)
        low, high = late[local_steps]
        assert low <= D.late(loss, t, answer.gamma)[-1] <= high
        low, high = slope[local_steps]
        assert low <= D.slope_ratio(w[500], w[1000], answer.w_hat) <= high
        assert 0.92 <= D.loss_exponent(loss[2], loss[4], 4.0) <= 1.10
        assert (np.diff(distance) < 0).all()
        assert 1.1 <= distance[1] / distance[4] <= 2.7
        assert 0.3 <= gap[-1] * np.log(t[-1]) <= 1.6
        assert (distance <= gap).all()
        last[local_steps] = distance[-1]
    assert last[1] > last[10] > last[100]
    assert last[100] < D.reference_points(zs, answer.w_hat).mean


def check_scaled_steps_do_not_gain(trajectory: Trajectory, family: str, seed: int) -> None:
    w_hat = problem(family, seed)[2].w_hat
    few, many = (
        D.cosd(run(trajectory, family, seed, "scaled", steps, 500)[500], w_hat) for steps in (10, 100)
    )
    assert abs(few / many - 1) < 0.01


def check_fixed_budget_favours_few_local_steps(trajectory: Trajectory) -> None:
    zs, _, answer = problem("skew", 0)
    expected = {1: 0.0186, 10: 0.0186, 100: 0.0216, 500: 0.0357, 1000: 0.0539}
    for local_steps, distance in expected.items():
        w = trajectory(zs, local_steps, 2000 // local_steps)[-1]
        np.testing.assert_allclose(D.cosd(w, answer.w_hat), distance, atol=6e-5)


def check_loss_takes_the_weights_of_the_average(trajectory: Trajectory) -> None:
    """Law 1 holds with the loss of the average's weights, and fails by 30 % with other weights."""
    zs, _, answer = problem("skew", 0)
    p = (0.4, 0.3, 0.2, 0.1)
    w = trajectory(zs, 10, 1000, p=p)[-1]
    t = np.array(step_size(zs, 10, "fixed") * 10 * 1000)
    assert 0.9 <= D.late(D.federated_loss(zs, w, p), t, answer.gamma) <= 1.06
    assert D.late(D.federated_loss(zs, w), t, answer.gamma) > 1.2


def check_anchor_improves_modified(trajectory: Trajectory, family: str, seed: int) -> None:
    zs, _, answer = problem(family, seed)
    plain = D.cosd(run(trajectory, family, seed, "fixed", 100, 1000)[200], answer.w_hat)
    anchored = trajectory(zs, 100, 200, pull=1e-4, anchored=True)[-1]
    loose = trajectory(zs, 100, 200, pull=1e-4)[-1]
    assert D.cosd(anchored, answer.w_hat) < 0.95 * plain
    assert abs(D.cosd(loose, answer.w_hat) / plain - 1) < 0.01


def check_bias_of_finite_minimiser(trajectory: Trajectory) -> None:
    """The bias of Local-GD is linear in eta, zero for one local step, and as the first-order formula says."""
    zs = signed(non_separable())
    w_star = finite_minimiser(zs)
    assert np.linalg.norm(trajectory(zs, 1, 200, eta=0.05, start=w_star)[-1] - w_star) < 1e-8
    known = {2: (3.72e-4, 1.853e-4, 9.25e-5), 10: (3.388e-3, 1.678e-3, 8.35e-4)}
    for local_steps, biases in known.items():
        relative = []
        for eta in (0.05, 0.025, 0.0125):
            rounds = round(400 / (eta * local_steps))
            shift = trajectory(zs, local_steps, rounds, eta=eta, start=w_star)[-1] - w_star
            relative.append(np.linalg.norm(shift) / np.linalg.norm(w_star))
            if eta == 0.025:
                formula = first_order_bias(zs, w_star, eta, local_steps)
                assert np.linalg.norm(formula - shift) < 0.03 * np.linalg.norm(shift)
        np.testing.assert_allclose(relative, biases, rtol=2e-3)
        assert 1.9 <= relative[0] / relative[1] <= 2.1
        assert 1.9 <= relative[1] / relative[2] <= 2.1


def check_mixed_limit(trajectory: Trajectory, local_steps: int) -> None:
    zs = signed(mixed())
    limit = mixed_limit(zs)
    assert limit.direction is not None
    inside, outside = limit.parts(trajectory(zs, local_steps, 3000)[-1])
    assert D.cosd(outside, limit.direction) < 1e-2
    error = D.relative_error(inside, limit.finite)
    if local_steps == 1:
        assert error < 1e-2
    if local_steps == 10:
        assert error > 0.1


def check_large_steps(trajectory: Trajectory, local_steps: int, etas: tuple[float, ...]) -> None:
    """Any step converges; a large one is not monotone and yet ends lower."""
    zs = signed(toy(0.1))
    final = {}
    for eta in etas:
        loss = D.federated_loss(zs, trajectory(zs, local_steps, 2048, eta=eta))
        final[eta] = loss[-1]
        assert 0.85 <= loss[-1] * eta * local_steps * 2048 * 0.1**2 <= 1.2
        assert (loss.max() > 1) == (eta >= 64)
    assert all(final[a] > final[b] for a, b in pairwise(etas))


def check_local_sgd(trajectory: Trajectory, family: str, seed: int) -> None:
    zs, _, answer = problem(family, seed)
    count = min(len(z) for z in zs)
    indices = np.random.default_rng(seed).integers(0, count, size=(500, len(zs), 10, 2))
    noisy = trajectory(zs, 10, 500, c=0.25, indices=indices)[-1]
    full = trajectory(zs, 10, 500, c=0.25)[-1]
    assert 0.85 <= D.cosd(noisy, answer.w_hat) / D.cosd(full, answer.w_hat) <= 1.2
    t = np.array(step_size(zs, 10, "fixed", 0.25) * 10 * 500)
    assert 0.85 <= D.late(D.federated_loss(zs, noisy), t, answer.gamma) <= 1.0


def check_exponential_loss(trajectory: Trajectory, local_steps: int) -> None:
    zs, _, answer = problem("skew", 0)
    w = trajectory(zs, local_steps, 1000, c=0.25, loss="exponential")[-1]
    t = np.array(step_size(zs, local_steps, "fixed", 0.25) * local_steps * 1000)
    expected = {1: 0.871, 10: 0.933, 100: 0.964}[local_steps]
    np.testing.assert_allclose(
        D.late(D.federated_loss(zs, w, loss="exponential"), t, answer.gamma), expected, atol=1e-3
    )
