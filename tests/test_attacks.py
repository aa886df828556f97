"""Attackers and what withstands them: who attacks, what they send, and what the server leaves out."""

from typing import Any

import pytest
import torch

from fedsim import BadInput, Experiment, tree
from fedsim.attacks import GaussianUpdate, LabelFlip, NoAttack, ScaledUpdate
from fedsim.client_app import app
from fedsim.federation import load
from fedsim.grid import InProcessGrid
from fedsim.over_grid import OverGrid, greet
from fedsim.probes import Snapshot
from fedsim.simulate import RunFailed, rounds

TINY = {
    "data": "Synthetic(rows=240, features=4, classes=3)",
    "partition": "IID()",
    "model": "Linear()",
    "num-workers": 8,
    "rounds": 2,
    "local-steps": 3,
    "batch-size": 4,
    "dtype": "float64",
    "device": "cpu",
}


def tiny(**changes: Any) -> Experiment:
    return Experiment.from_mapping(TINY | {k.replace("_", "-"): v for k, v in changes.items()})


def run(experiment: Experiment, nodes: int = 0) -> list[Snapshot]:
    carrier = None
    if nodes:
        grid = InProcessGrid(app, nodes, experiment.to_mapping())
        carrier = OverGrid(grid, experiment, load(experiment), greet(grid, nodes))
    return [snapshot for snapshot, _ in rounds(experiment, carrier=carrier)]


def models(experiment: Experiment, nodes: int = 0) -> list[torch.Tensor]:
    return [tree.flatten(s.model) for s in run(experiment, nodes)]


# ---------------------------------------------------------------------------------------------- who attacks


@pytest.mark.parametrize(("share", "number"), [(0.0, 0), (0.2, 2), (0.25, 2), (0.5, 5), (1.0, 10)])
def test_a_share_of_the_workers_attacks(share, number):
    chosen = LabelFlip(share=share).attackers(10, seed=3)
    assert chosen.dtype == torch.bool
    assert int(chosen.sum()) == number


def test_a_larger_share_keeps_the_attackers_of_a_smaller_one():
    few, many = (ScaledUpdate(share=s).attackers(50, seed=1) for s in (0.1, 0.4))
    assert bool((many | ~few).all())
    assert not torch.equal(few, ScaledUpdate(share=0.1).attackers(50, seed=2))


# -------------------------------------------------------------------------------------------- what they send


def test_flipped_labels_are_those_of_the_attackers_training_rows():
    honest, bad = (load(tiny(attack=a, holdout=0.25)) for a in ("NoAttack()", "LabelFlip(share=0.5)"))
    attackers = LabelFlip(share=0.5).attackers(8, seed=0)
    for worker in range(8):
        own, held = honest.train.rows(worker), honest.held.rows(worker)
        expected = 2 - honest.dataset.y[own] if attackers[worker] else honest.dataset.y[own]
        assert torch.equal(bad.dataset.y[own], expected)
        assert torch.equal(bad.dataset.y[held], honest.dataset.y[held])
    assert torch.equal(bad.dataset.test_y, honest.dataset.test_y)


def test_two_classes_are_exchanged():
    changes = {
        "data": "Separable(rows_per_worker=6, features=30)",
        "num-workers": 4,
        "model": "Linear(bias=False)",
    }
    changes |= {"partition": "Natural()", "objective": "Logistic()", "batch-size": 0}
    honest, bad = (load(tiny(**changes, attack=a)) for a in ("NoAttack()", "LabelFlip(share=1.0)"))
    assert torch.equal(bad.dataset.y, 1 - honest.dataset.y)


def test_scaled_updates_change_the_mean_by_their_share():
    # One round of FedAvg: the mean of honest updates, each attacker's times its scale.
    e = tiny(rounds=1, strategy="FedAvg(weighting='uniform')")
    start = tree.flatten(load(e).theta)
    rows = tree.flatten_rows(run(e.replace({"strategy": "FedMedian()"}))[0].rows) - start
    scaled = e.replace({"attack": "ScaledUpdate(share=0.25, scale=-3.0)"})
    attackers = ScaledUpdate(share=0.25).attackers(8, seed=0)
    factor = torch.where(attackers, -3.0, 1.0).double()
    (found,) = models(scaled)
    torch.testing.assert_close(found - start, (factor[:, None] * rows).mean(0), rtol=1e-12, atol=1e-14)


def test_a_scale_of_one_is_honest():
    for a, b in zip(models(tiny()), models(tiny(attack="ScaledUpdate(scale=1.0)")), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


def test_gaussian_updates_are_normal_and_differ_between_workers_and_rounds():
    zero = {"a": torch.zeros(4, 50, 20, dtype=torch.float64), "b": torch.zeros(4, 1000, dtype=torch.float64)}
    attack, ids = GaussianUpdate(std=2.0), torch.arange(4)
    drawn = tree.flatten_rows(attack.corrupt(zero, zero, 1, ids, seed=0)) / 2
    assert drawn.mean().abs() < 4 / 8000**0.5
    assert (drawn.var() - 1).abs() < 4 * (2 / 8000) ** 0.5
    assert torch.corrcoef(drawn).fill_diagonal_(0).abs().max() < 4 / 2000**0.5
    assert (drawn[:, :1000] * drawn[:, 1000:]).mean().abs() < 4 / 4000**0.5
    other = tree.flatten_rows(attack.corrupt(zero, zero, 2, ids, seed=0)) / 2
    assert (drawn * other).mean().abs() < 4 / 8000**0.5


@pytest.mark.parametrize("attack", ["LabelFlip()", "ScaledUpdate()", "GaussianUpdate()"])
@pytest.mark.parametrize("strategy", ["FedAvg()", "FedMedian()"])
def test_attackers_are_the_same_on_every_carrier(attack, strategy):
    e = tiny(attack=attack, strategy=strategy, participation=0.5)
    for a, b in zip(models(e), models(e, nodes=3), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


# ------------------------------------------------------------------------------------------ what withstands


@pytest.mark.parametrize(
    "strategy",
    ["FedMedian()", "TrimmedMean(share=0.25)", "flwr.Krum(num_malicious_nodes=2)", "flwr.FedMedian()"],
)
def test_robust_means_withstand_a_quarter_of_gaussian_attackers(strategy):
    attack = "GaussianUpdate(share=0.25, std=1000.0)"
    honest, hit = (models(tiny(strategy=strategy, attack=a))[-1] for a in ("NoAttack()", attack))
    mean = models(tiny(attack=attack))[-1]
    assert (hit - honest).norm() < 1.0
    assert (mean - honest).norm() > 100.0


def test_a_limit_leaves_out_long_updates_and_nobody_else():
    attack = "GaussianUpdate(share=0.25, std=1000.0)"
    bad = torch.nonzero(GaussianUpdate(share=0.25).attackers(8, 0)).flatten().tolist()
    for nodes in (0, 3):
        for snapshot in run(tiny(attack=attack, max_update_norm=50.0), nodes):
            assert snapshot.excluded == bad
            assert snapshot.metrics["excluded"] == bad
    for a, b in zip(models(tiny()), models(tiny(max_update_norm=50.0)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


def test_a_run_ends_where_all_updates_are_too_long():
    with pytest.raises(
        RunFailed, match=r"^round 1: .*of all 8 workers.* longer than max-update-norm = 1e-06"
    ):
        run(tiny(max_update_norm=1e-6))


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"attack": "LabelFlip(share=1.5)"}, r"LabelFlip: share = 1.5 must be in \[0, 1\]"),
        ({"attack": "NoAttack(share=0.5)"}, "NoAttack: share = 0.5 must be 0; name an attack"),
        ({"attack": "GaussianUpdate(std=0.0)"}, "GaussianUpdate: std = 0.0 must be > 0"),
        ({"attack": "ScaledUpdate(scale=inf)"}, "ScaledUpdate: scale = inf must be finite"),
        ({"attack": "LabelFlop()"}, "did you mean 'LabelFlip'"),
        ({"max-update-norm": -1.0}, "max-update-norm = -1.0 must be >= 0"),
        (
            {"attack": "LabelFlip()", "strategy": "ElasticAveraging()"},
            r"attack = 'LabelFlip\(\)': is for rounds whose workers start from the server's model",
        ),
        ({"max-update-norm": 1.0, "strategy": "LeaderSGD()"}, "max-update-norm = 1.0: is for rounds"),
    ],
)
def test_bad_input_is_one_line(changes, text):
    with pytest.raises(BadInput, match=text) as caught:
        tiny(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"partition": "Shared()"}, "gives rows to several workers"),
        (
            {
                "data": "LinearRegression(features=100)",
                "model": "Linear(bias=False)",
                "objective": "SquaredError()",
            },
            "needs classes, the task of .* is 'regression'",
        ),
    ],
)
def test_labels_that_cannot_be_flipped_are_refused(changes, text):
    with pytest.raises(BadInput, match=rf"^attack = 'LabelFlip\(\)': .*{text}"):
        load(tiny(attack="LabelFlip()", **changes))


def test_no_attack_is_the_default():
    assert Experiment().parts.attack == NoAttack()
