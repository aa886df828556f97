"""Differential privacy: clipping, noise, the accountant's figures, and Flower's strategy as a reference."""

import math
from typing import Any

import pytest
import torch

from fedsim import BadInput, Experiment, tree
from fedsim.probes import PrivacyLoss
from fedsim.simulate import rounds
from strategies import DPFedAvg, Report

TINY = {
    "data": "Synthetic(rows=120, features=4, classes=3)",
    "partition": "IID()",
    "model": "Linear()",
    "num-workers": 6,
    "rounds": 3,
    "local-steps": 3,
    "batch-size": 4,
    "dtype": "float64",
    "device": "cpu",
}


def theta() -> tree.Tree:
    g = torch.Generator().manual_seed(0)
    return {
        k: torch.randn(s, generator=g, dtype=torch.float64) for k, s in {"w": (30, 20), "b": (50,)}.items()
    }


def report(m: int) -> Report:
    ones = torch.ones(m, dtype=torch.int64)
    return Report(torch.arange(m), torch.zeros(m).double(), torch.arange(1.0, m + 1).double(), ones, ones)


def merge(rule: DPFedAvg, updates: torch.Tensor, times: int = 1) -> torch.Tensor:
    """Return by how much the model moves in the last of some rounds with the same updates ``[m, 650]``."""
    state, broadcast = rule.init(theta(), len(updates))
    moved = updates[0]
    for _ in range(times):
        before = broadcast["model"]
        rows = tree.stack([tree.add(before, tree.unflatten(u, before)) for u in updates])
        state, broadcast = rule.merge(state, rows, report(len(updates)))
        moved = tree.flatten(tree.sub(broadcast["model"], before))
    return moved


def updates(*norms: float) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    directions = torch.nn.functional.normalize(torch.randn(len(norms), 650, generator=g, dtype=torch.float64))
    return directions * torch.tensor(norms).double()[:, None]


def test_updates_are_clipped_and_count_the_same():
    given = updates(0.5, 2.0, 10.0, 0.0)
    expected = (given[0] + given[1] / 2 + given[2] / 10) / 4
    torch.testing.assert_close(merge(DPFedAvg(clip=1.0, noise=0.0), given), expected, rtol=1e-12, atol=1e-14)


def test_one_worker_moves_the_mean_by_no_more_than_the_clip():
    given = updates(3.0, 3.0, 3.0, 3.0)
    other = given.clone()
    other[2] = -1e6 * given[2]
    apart = merge(DPFedAvg(clip=0.7, noise=2.0), given) - merge(DPFedAvg(clip=0.7, noise=2.0), other)
    assert apart.norm() <= 2 * 0.7 / 4 + 1e-12


def test_the_noise_has_its_variance_and_is_new_in_each_round():
    given, rule = updates(0.0, 0.0, 0.0, 0.0, 0.0), DPFedAvg(clip=2.0, noise=3.0, seed=5)
    first, second = merge(rule, given) * 5 / 6, merge(rule, given, times=2) * 5 / 6
    for z in (first, second):
        assert z.mean().abs() < 4 / 650**0.5
        assert (z.var() - 1).abs() < 4 * (2 / 650) ** 0.5
    assert (first * second).mean().abs() < 4 / 650**0.5
    assert torch.equal(first, merge(rule, given) * 5 / 6)


def test_without_a_seed_the_noise_is_nobodys():
    given, rule = updates(0.0, 0.0), DPFedAvg(seed=None)
    assert not torch.equal(merge(rule, given), merge(rule, given))


def run(**changes: Any) -> list:
    e = Experiment.from_mapping(TINY | {k.replace("_", "-"): v for k, v in changes.items()})
    return [s for s, _ in rounds(e)]


def test_a_wide_clip_without_noise_is_uniform_averaging():
    for a, b in zip(
        run(strategy="DPFedAvg(clip=1e6, noise=0.0)"),
        run(strategy="FedAvg(weighting='uniform')"),
        strict=True,
    ):
        torch.testing.assert_close(a.model, b.model, rtol=1e-12, atol=1e-14)


def test_clipping_is_that_of_flowers_strategy():
    flowers = (
        "flwr.DifferentialPrivacyServerSideFixedClipping(strategy=flwr.FedAvg(), noise_multiplier=0.0, "
        "clipping_norm=0.05, num_sampled_clients=6)"
    )
    for a, b in zip(run(strategy="DPFedAvg(clip=0.05, noise=0.0)"), run(strategy=flowers), strict=True):
        torch.testing.assert_close(
            a.model, b.model, rtol=1e-6, atol=1e-7
        )  # which works in float32 on the way


@pytest.mark.parametrize(("noise", "T"), [(1.0, 1), (4.0, 10), (20.0, 100)])
def test_the_loss_of_all_workers_is_that_of_composed_gaussian_mechanisms(noise, T):
    # T releases of sensitivity 2 clip and deviation noise clip are one with mu = 2 sqrt(T) / noise: its exact
    # delta (Balle and Wang 2018, arXiv:1805.06530) at the accountant's epsilon is at most the one asked for.
    pytest.importorskip("dp_accounting")
    epsilon, mu = PrivacyLoss(delta=1e-5).epsilon(noise, 50, 50, T), 2 * T**0.5 / noise

    def phi(x: float) -> float:
        return math.erfc(-x / 2**0.5) / 2

    def delta(e: float) -> float:
        return phi(-e / mu + mu / 2) - math.exp(e) * phi(-e / mu - mu / 2)

    assert delta(epsilon) <= 1e-5
    assert delta(epsilon / 1.25) > 1e-5  # and not much more than needed
    assert epsilon <= mu**2 / 2 + mu * (2 * math.log(1e5)) ** 0.5


def test_fewer_participants_and_more_noise_tell_less():
    pytest.importorskip("dp_accounting")
    probe = PrivacyLoss()
    whole, part, noisy = (probe.epsilon(s, m, 100, 5) for s, m in ((2.0, 100), (2.0, 10), (4.0, 10)))
    assert whole > part > noisy > 0
    assert probe.epsilon(2.0, 10, 100, 50) > part
    assert probe.epsilon(0.0, 10, 100, 5) == math.inf


def test_a_run_says_what_it_gives_away():
    pytest.importorskip("dp_accounting")
    seen = run(strategy="DPFedAvg(noise=4.0)", probes="PrivacyLoss(delta=1e-3, per_decade=1)", rounds=3)
    told = [s.metrics.get("privacy_loss.epsilon") for s in seen]
    probe = PrivacyLoss(delta=1e-3)
    assert told == [probe.epsilon(4.0, 6, 6, t) for t in (1, 2, 3)]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"strategy": "DPFedAvg(clip=0.0)"}, "DPFedAvg: clip = 0.0 must be > 0"),
        ({"strategy": "DPFedAvg(noise=-1.0)"}, "DPFedAvg: noise = -1.0 must be >= 0"),
        ({"strategy": "DPFedAvg(seed=-1)"}, "DPFedAvg: seed = -1 must be >= 0"),
        ({"probes": "PrivacyLoss(delta=0.0)"}, r"PrivacyLoss: delta = 0.0 must be in \(0, 1\)"),
        ({"probes": "PrivacyLoss()"}, r"needs strategy = 'DPFedAvg\(...\)', it is 'FedAvg\(\)'"),
    ],
)
def test_bad_input_is_one_line(changes, text):
    with pytest.raises(BadInput, match=text):
        run(**changes)
