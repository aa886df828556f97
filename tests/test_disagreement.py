"""Worker disagreement: closed forms, metrics, the reference protocol, and the probe."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from std_protocol import CAPACITIES, checkpoints, std

from fedsim import tree
from fedsim.analysis import disagreement as D
from fedsim.analysis.hessian import gradient_noise
from fedsim.carriers import InProcess
from fedsim.federation import load
from fedsim.gaps import gaps, subspace, subspace_of
from fedsim.probes import Disagreement
from fedsim.simulate import rounds

F64 = torch.float64
P5 = np.array([0.4, 0.25, 0.15, 0.1, 0.1])


# ---------------------------------------------------------------------------------------- closed forms


def quadratic(h, d=12):
    """Curvature ``[d, d]`` and noise ``curvature^h``, or noise that does not commute with it."""
    lam = np.logspace(1.2, -1.5, d)
    hessian = np.diag(lam * 1.2 / (0.05 * lam[0]))
    if h == "full":
        a = np.random.default_rng(0).standard_normal((d, d))
        return hessian, a @ a.T / d
    return hessian, np.diag(np.diag(hessian) ** h)


def simulate(hessian, noise, lr, steps, repetitions, rng):
    """Rows ``[repetitions, M, d]`` after ``steps[m]`` noisy steps from 0, by worker."""
    root, d = np.linalg.cholesky(noise), len(hessian)
    x = np.zeros((repetitions, len(steps), d))
    for t in range(max(steps)):
        active = np.array(steps) > t
        g = x @ hessian + rng.standard_normal(x.shape) @ root.T
        x[:, active] -= lr * g[:, active]
    return x


def covariance(x, p):
    """Empirical ``sum_m p_m gap_m gap_m^T``, mean over repetitions, gaps by the library."""
    r, m, d = x.shape
    total = np.zeros((d, d))
    rows = {"x": torch.from_numpy(np.swapaxes(x, 0, 1).reshape(m, r * d))}
    gap = gaps(rows, torch.from_numpy(p)).values.numpy().reshape(m, r, d)
    for q, g in zip(p, gap, strict=True):
        total += q * g.T @ g / r
    return total


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("tau", [1, 5, 20, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("h", [0, 1, 2, "full"])
def test_gap_covariance_of_a_quadratic(h, tau):
    """W1."""
    hessian, noise = quadratic(h)
    found = covariance(
        simulate(hessian, noise, 0.05, [tau] * 8, 4000, np.random.default_rng(1)), np.full(8, 1 / 8)
    )
    s = D.row_covariance(hessian, noise, 0.05, tau)
    assert relative(found, D.gap_covariance([s] * 8, np.ones(8))) < 0.05
    if h != "full":
        curve = D.gap_variance(np.diag(hessian), np.diag(noise), 0.05, tau, np.ones(8))
        np.testing.assert_allclose(curve, np.diag(s) * 7 / 8, rtol=1e-10)


def test_gap_covariance_with_unequal_weights():
    """W2."""
    hessian, noise = quadratic(1)
    found = covariance(simulate(hessian, noise, 0.05, [8] * 5, 20000, np.random.default_rng(2)), P5)
    s = D.row_covariance(hessian, noise, 0.05, 8)
    assert relative(found, D.gap_covariance([s] * 5, P5)) < 0.025
    np.testing.assert_allclose(D.gap_covariance([s] * 5, P5), (1 - np.sum(P5**2)) * s)


def test_gap_covariance_with_unequal_steps():
    """W2: no formula with equal steps fits."""
    hessian, noise = quadratic(1)
    tau = [3, 5, 8, 8, 20]
    found = covariance(simulate(hessian, noise, 0.05, tau, 20000, np.random.default_rng(3)), P5)
    each = [D.row_covariance(hessian, noise, 0.05, t) for t in tau]
    assert relative(found, D.gap_covariance(each, P5)) < 0.025
    assert relative(found, (1 - np.sum(P5**2)) * D.row_covariance(hessian, noise, 0.05, 8)) > 0.05


def test_drift_adds_to_the_covariance():
    means = np.random.default_rng(0).standard_normal((5, 3))
    found = D.gap_covariance([np.zeros((3, 3))] * 5, P5, means)
    np.testing.assert_allclose(found, covariance(means[None], P5), atol=1e-12)


def test_long_rounds_reach_the_limit():
    hessian, noise = quadratic("full")
    np.testing.assert_allclose(
        D.row_covariance(hessian, noise, 0.05, 5000), D.row_covariance(hessian, noise, 0.05, None), rtol=1e-4
    )


# --------------------------------------------------------------------------------------------- metrics


def example(size=30, k=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(size, k, generator=g, dtype=F64)).Q
    return torch.randn(size, generator=g, dtype=F64), u, torch.randn(7, size, generator=g, dtype=F64)


def test_metrics_are_their_definitions():
    g, u, d = example()
    found = D.capture(g, u, subspace_of(d))
    q = subspace_of(d).basis()
    inside = u @ (u.T @ g)
    assert found.chi == pytest.approx((inside.norm() / g.norm()).item())
    assert found.chi == pytest.approx(D.chi(g, u))
    assert found.capture == pytest.approx(((q.T @ inside).norm() / inside.norm()).item() ** 2)
    ratio = ((u.T @ (g - q @ (q.T @ g))).norm() / (u.T @ g).norm()).item()
    assert found.suppression == pytest.approx(1 - ratio)
    assert found.suppression_sq == pytest.approx(1 - ratio**2)
    assert found.overlap == pytest.approx(((u.T @ q).norm() ** 2 / 4).item())
    assert found.angles.cos().square().mean().item() == pytest.approx(found.overlap)
    with_q = D.capture(g, u, q)
    assert with_q[:5] == pytest.approx(found[:5])


def test_extreme_subspaces():
    g, u, _ = example()
    whole = D.capture(g, u, u)
    assert whole[1:5] == pytest.approx((1, 1, 1, 1))
    torch.testing.assert_close(whole.angles, torch.zeros(4, dtype=F64), rtol=0, atol=1e-6)
    outside = torch.linalg.qr(torch.cat([u, torch.eye(30, dtype=F64)], dim=1)).Q[:, 4:6]
    none = D.capture(g, u, outside)
    assert none[1:5] == pytest.approx((0, 0, 0, 0), abs=1e-12)
    assert none.angles.tolist() == pytest.approx([math.pi / 2] * 4)


def test_suppression_can_be_negative():
    u = torch.tensor([[1.0], [0.0]], dtype=F64)
    q = torch.tensor([[1.0], [1.0]], dtype=F64) / 2**0.5
    assert D.capture(torch.tensor([0.1, 1.0], dtype=F64), u, q).suppression < -3


def test_capture_is_invariant_to_order_and_scale_of_gaps():
    """W17."""
    g, u, d = example()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    one = D.capture(g, u, subspace_of(d))
    for other in (d[order], d * torch.arange(1, 8)[:, None]):
        found = D.capture(g, u, subspace_of(other))
        assert found[:5] == pytest.approx(one[:5], rel=1e-8)
        assert 0 <= found.capture <= 1


def test_random_subspaces_capture_their_share():
    """W12: two ways to draw."""
    size, q, k = 400, 20, 4
    g, u, _ = example(size, k)
    found = [D.capture(g, u, D.random_basis(size, q, 0, i)) for i in range(40)]
    assert np.mean([f.capture for f in found]) == pytest.approx(q / size, rel=0.5)
    assert np.mean([f.overlap for f in found]) == pytest.approx(q / size, rel=0.15)
    assert D.random_capture(subspace_of(torch.randn(q, size)), 40, 0) == pytest.approx(q / size, rel=0.3)


def test_effective_rank():
    assert D.effective_rank(torch.ones(5)) == pytest.approx(5)
    assert D.effective_rank(torch.tensor([3.0, 0.0])) == pytest.approx(1)
    assert D.effective_rank(torch.zeros(3)) == 0


def test_spectrum_and_consensus():
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=F64)
    found = gaps({"x": x}, torch.from_numpy(P5))
    sigma = (found.values.T * found.weight) @ found.values
    torch.testing.assert_close(D.spectrum(found)[:4], torch.linalg.eigvalsh(sigma).flip(0)[:4])
    assert D.consensus_distance(found) ** 2 == pytest.approx(sigma.trace().item())


# ---------------------------------------------------------------------------------------------- sketch


def test_sketches_keep_inner_products_on_average():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 500, generator=g, dtype=F64)
    found = []
    for seed in range(200):
        s = D.sketch(torch.stack([a, b]), 64, seed)
        found.append((s[0] @ s[1]).item())
    error = (2 / 64) ** 0.5 * (a.norm() * b.norm()).item()
    assert np.std(found) < error
    assert np.mean(found) == pytest.approx((a @ b).item(), abs=4 * error / 200**0.5)


def test_sketched_capture_is_near_the_true_one():
    g, u, d = example(2000, 4)
    d[:3] += 60 * u.T[:3]
    whole = D.capture(g, u, subspace_of(d))
    inside = u @ (u.T @ g)
    errors = []
    for seed in range(20):
        small = D.sketch(torch.cat([inside[None], u.T, d]), 400, seed)
        found = D.sketched_capture(small[0], small[1:5], subspace_of(small[5:]))
        errors.append([found[0] - whole.capture, found[1] - whole.overlap])
    assert np.abs(errors).max() < 4 * (2 / 400) ** 0.5
    assert np.abs(np.mean(errors, axis=0)).max() < 2 * (2 / 400) ** 0.5 / 20**0.5 + 0.01
    with pytest.raises(ValueError, match="cannot tell a span of dimension 7"):
        D.sketched_capture(g[:5], u.T[:, :5], subspace_of(d))


# ------------------------------------------------------------------------------------ one local step


def test_one_local_step_gives_centred_gradients():
    """W18, and the gradient baseline of the same rank."""
    experiment = std(
        rounds=1, local_steps=1, dtype="float64", model="MLP(hidden=(8,), activation='tanh')", num_workers=5
    )
    ((snapshot, _),) = rounds(experiment)
    found = gaps(snapshot.rows, snapshot.told.weight)
    carrier = InProcess(experiment, snapshot.federation)
    batches = carrier.cohorts[0].sampler.draw(1, torch.arange(5))
    from fedsim.probes.disagreement import training_loss

    problem = training_loss(snapshot.federation)
    g = torch.stack([problem.minibatch_gradient(snapshot.federation.theta, b[0]) for b in batches.rows])
    centred = g - g.mean(0)
    torch.testing.assert_close(found.values, -0.01 * centred)
    cosines = torch.linalg.svdvals(subspace_of(found.values).basis().T @ subspace_of(centred).basis())
    assert cosines.clamp(max=1).arccos().max() < 1e-4
    assert D.gradient_subspace(problem, snapshot.federation.theta, 50, 4, 0).rank == 4


# ------------------------------------------------------------------------------- the reference protocol


@pytest.fixture(scope="module")
def early():
    """The reference protocol after 25 rounds, of a shorter run."""
    return checkpoints(std(rounds=25), (25,))[0]


def check_capture(at, seed=0):
    """W8-W12 at one checkpoint."""
    found = at.captures()
    captured = [f.capture for f in found]
    assert all(a < b for a, b in pairwise(captured))  # W10
    for capacity, least, low, high, f in zip(
        (16, 32, 64, 128), (0.2, 0.4, 0.6, 0.8), (0.24, 0.38, 0.56, 0.73), (0.42, 0.6, 0.78, 0.9), found[1:],
        strict=True,
    ):  # fmt: skip
        assert f.capture >= least, capacity  # W8
        assert low <= f.overlap <= high, capacity  # W9
    size = tree.num_parameters(at.theta)
    assert captured[4] >= 10 * 120 / size  # W11
    assert captured[2] >= 30 * 30 / size
    assert D.random_capture(at.span(128), 20, seed) == pytest.approx(120 / size, rel=0.5)  # W12


def test_early_rounds_already_reveal_the_dominant_space(early):
    captured = [f.capture for f in early.captures()]
    assert all(a < b for a, b in pairwise(captured))
    size = tree.num_parameters(early.theta)
    assert captured[-1] > 0.7
    assert captured[-1] > 10 * early.span(128).rank / size
    assert [early.span(c).rank for c in CAPACITIES] == [8, 15, 30, 60, 120]
    assert early.pairs.residuals.max() < 1e-3  # W15
    assert D.chi(early.gradient, early.pairs.vectors) < 1
    truncated = D.capture(early.gradient, early.pairs.vectors, subspace(early.buffer, rank=10))
    assert truncated.capture < captured[-1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_reference_protocol(seed):
    for at in checkpoints(std(seed=seed), (100, 150, 200)):
        check_capture(at, seed)
        assert 15 < at.pairs.values[0] < 35
        assert at.pairs.residuals.max() < 1e-3


def repeated(at, experiment, repetitions):
    """Variance of gaps along the 40 dominant directions, many times from the same point."""
    carrier, total = InProcess(experiment, load(experiment)), torch.zeros(40, dtype=F64)
    workers = torch.arange(experiment.num_workers)
    for r in range(repetitions):
        (trained,) = carrier.train(1000 + r, workers, {"model": at.theta}, "rows").trained
        found = gaps(trained.rows, trained.told.weight)
        along = found.values.double() @ at.pairs.vectors
        total += found.weight @ along.square()
    return total.numpy() / repetitions


@pytest.fixture(scope="module")
def late():
    return checkpoints(std(rounds=150), (150,), k=40)[0]


def check_gap_variance(at, experiment, tau, lr, each, mean):
    noise = gradient_noise(at.problem, at.theta, at.pairs.vectors, 50).numpy()
    theory = D.gap_variance(at.pairs.values[:40].numpy(), noise, lr, tau, np.ones(32))
    ratio = repeated(at, experiment.replace({"num_workers": 32, "local_steps": tau}), 40) / theory
    assert each[0] < ratio[:10].min() <= ratio[:10].max() < each[1]
    assert mean[0] < ratio[:10].mean() < mean[1]
    assert mean[0] < ratio[10:].mean() < mean[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tau", "lr", "each", "mean"),
    [
        (8, 0.01, (0.75, 1.3), (0.9, 1.1)),
        (1, 0.01, (0.75, 1.35), (0.9, 1.15)),
        (32, 0.01, (0.75, 1.35), (0.9, 1.15)),
        (8, 0.03, (0.75, 1.35), (0.9, 1.15)),
    ],
)
def test_gap_variance_of_a_network(late, tau, lr, each, mean):
    """W5 and W6: no constant is fitted."""
    check_gap_variance(late, std(client=f"SGD(lr={lr})"), tau, lr, each, mean)


@pytest.mark.slow
def test_gap_variance_under_cross_entropy():
    """W6."""
    experiment = std(objective="CrossEntropy()", client="SGD(lr=0.1)", rounds=150)
    at = checkpoints(experiment, (150,), k=40)[0]
    check_gap_variance(at, experiment, 8, 0.1, (0.75, 1.35), (0.9, 1.15))


@pytest.mark.slow
def test_exponents_of_noise_and_gaps(late):
    """W7: long rounds lose the separation."""

    def slope(y):
        return np.polyfit(np.log(late.pairs.values[:40].numpy()), np.log(y), 1)[0]

    noise = gradient_noise(late.problem, late.theta, late.pairs.vectors, 50).numpy()
    assert 0.9 < slope(noise) < 1.4
    slopes = [slope(repeated(late, std(num_workers=32, local_steps=tau), 20)) for tau in (1, 8, 32)]
    assert slopes[0] > slopes[1] > slopes[2]


@pytest.mark.slow
def test_long_rounds_capture_less():
    """W13."""
    short, long = (
        checkpoints(std(client="SGD(lr=0.03)", local_steps=tau, rounds=n), (n,))[0]
        for tau, n in ((1, 400), (64, 100))
    )
    captured = [D.capture(at.gradient, at.pairs.vectors, at.span(64)).capture for at in (short, long)]
    assert captured[0] - captured[1] > 0.2


# ------------------------------------------------------------------------------------------- the probe


TINY = {
    "data": "Digits(test=0.5)",
    "model": "MLP(hidden=(6,), activation='tanh')",
    "num_workers": 5,
    "rounds": 6,
    "local_steps": 3,
    "batch_size": 8,
    "objective": "SquaredError()",
    "dtype": "float64",
}


def figures(**changes) -> list[dict[str, Any]]:
    return [
        {k.removeprefix("disagreement."): v for k, v in s.metrics.items() if k.startswith("disagreement.")}
        for s, _ in rounds(std(**TINY | changes))
    ]


def test_probe_reports_what_the_analysis_says():
    lines = figures(probes="Disagreement(capacity=12, hessian_every=3)", client="Prox(SGD(lr=0.05), mu=0.0)")
    assert [len(line) for line in lines] == [7, 7, 25, 7, 7, 25]
    assert [line["rank"] for line in lines] == [4, 8, 10, 10, 10, 10]
    assert [line["buffered_rounds"] for line in lines] == [1, 2, 3, 3, 3, 3]
    at = checkpoints(std(**TINY, probes="Disagreement(capacity=12)", client="SGD(lr=0.05)"), (6,))[0]
    whole, last = D.capture(at.gradient, at.pairs.vectors, subspace(at.buffer)), lines[-1]
    for name in ("capture", "overlap", "suppression", "suppression_sq", "chi"):
        assert last[name] == pytest.approx(getattr(whole, name), rel=1e-6)
    assert last["lam_1"] == pytest.approx(at.pairs.values[0].item(), rel=1e-4)
    assert last["eta_lam1_tau"] == pytest.approx(0.05 * last["lam_1"] * 3)
    assert last["gap_mean"] <= last["consensus"] <= last["gap_max"]
    assert last["angle_max"] == pytest.approx(math.degrees(whole.angles.max()), rel=1e-4)
    assert last["angle_mean"] == pytest.approx(math.degrees(whole.angles.mean()), rel=1e-4)
    assert last["residual"] < 1e-3
    rival = D.gradient_subspace(at.problem, at.theta, 8, 10, 0, 6)
    found = D.capture(at.gradient, at.pairs.vectors, rival)
    for name in ("capture", "overlap", "suppression"):
        assert last[f"{name}_gradients"] == pytest.approx(getattr(found, name), rel=1e-4)
    some = D.minibatch_gradients(at.problem, at.theta, 8, 20, 0, 6)
    assert last["chi_minibatch"] == pytest.approx(np.mean([D.chi(v, at.pairs.vectors) for v in some]))


def test_full_gradients_have_no_rival():
    (*_, last) = figures(probes="Disagreement(capacity=12, hessian_every=6)", partition="IID()", batch_size=0)
    assert "capture" in last
    assert not any("gradients" in name or "minibatch" in name for name in last)


def test_probe_takes_the_weights_of_the_strategy():
    changes = {"partition": "Dirichlet(alpha=0.5)", "strategy": "FedAvg()", "participation": 0.6}
    experiment = std(**TINY | changes, probes="Disagreement(capacity=9)")
    for snapshot, position in rounds(experiment):
        weight = snapshot.told.weight
        assert weight.min() < weight.max()
        block = position.memories[0]["gaps"][f"{snapshot.round:09d}"]
        assert (weight / weight.sum() @ block).norm() < 1e-12
        average = tree.flatten(snapshot.model)  # FedAvg's model is the mean that is subtracted
        torch.testing.assert_close(block + average, tree.flatten_rows(snapshot.rows))


def test_probe_with_a_lone_participant():
    lines = figures(participation=0.2, probes="Disagreement(capacity=4, hessian_every=1)")
    assert all(line["consensus"] == line["rank"] == line["effective_rank"] == 0 for line in lines)
    assert all("capture" not in line for line in lines)


def test_probe_leaves_training_alone():
    """R6."""
    plain = [s.model for s, _ in rounds(std(**TINY, probes=""))]
    for probe in ("Disagreement(capacity=12, hessian_every=2)", "Disagreement(hessian_every=3, k=2)"):
        state = torch.get_rng_state()
        measured = [s.model for s, _ in rounds(std(**TINY, probes=probe))]
        assert torch.equal(torch.get_rng_state(), state)
        for a, b in zip(plain, measured, strict=True):
            assert all(torch.equal(a[k], b[k]) for k in a)


def test_probe_resumes_exactly(tmp_path):
    import fedsim.runs

    experiment = std(**TINY, probes="Disagreement(capacity=7, hessian_every=2)", out=str(tmp_path / "whole"))
    whole = fedsim.runs.run(experiment)
    fedsim.runs.run(experiment.replace({"rounds": 3, "out": str(tmp_path / "cut")}))
    resumed = fedsim.runs.resume(tmp_path / "cut", changes={"rounds": 6})
    columns = [c for c in whole.history if c.startswith("disagreement.")]
    assert len(columns) == 25
    assert whole.history[columns].equals(resumed.history[columns])


def test_probe_with_sketches():
    (*_, exact) = figures(probes="Disagreement(capacity=12, hessian_every=6)")
    (*_, rough) = figures(probes="Disagreement(capacity=12, hessian_every=6, sketch=200)")
    assert rough["rank"] == exact["rank"]
    assert abs(rough["capture"] - exact["capture"]) < 4 * (2 / 200) ** 0.5
    assert abs(rough["overlap"] - exact["overlap"]) < 4 * (2 / 200) ** 0.5
    assert abs(rough["capture_gradients"] - exact["capture_gradients"]) < 4 * (2 / 200) ** 0.5
    assert abs(rough["overlap_gradients"] - exact["overlap_gradients"]) < 4 * (2 / 200) ** 0.5
    assert not any("suppression" in name or "angle" in name for name in rough)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity": 0}, "capacity = 0 must be >= 1"),
        ({"hessian_every": -1}, "hessian_every = -1 must be >= 0"),
        ({"sketch": 100}, "sketch = 100 must be 0 or > capacity = 128"),
    ],
)
def test_probe_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"Disagreement: {message}"):
        Disagreement(**arguments)


def test_probe_refuses_a_dominant_space_that_does_not_fit():
    from fedsim.experiment import BadInput

    with pytest.raises(BadInput, match=r"k = 5000 must be < 460, the number of parameters"):
        next(rounds(std(**TINY, probes="Disagreement(hessian_every=1, k=5000)")))
