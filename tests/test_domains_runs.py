"""Domains: what is measured on a held-out domain, over many runs, and where invariance fails and holds."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from domains_toys import last, tiny
from scipy.stats import spearmanr
from torch.func import functional_call

import fedsim
from clients import IRM
from fedsim import Experiment, workers
from fedsim.analysis.generalisation import (
    ADAPTIVE,
    RANGES,
    bins,
    boxes,
    budget,
    compare,
    draw,
    pattern,
    rank_correlation,
)
from fedsim.domain_plots import binned, boxplots, budgets, scatter
from fedsim.invariance import penalty
from fedsim.objectives import Logistic
from fedsim.plots import drawings
from fedsim.registry import BadInput
from fedsim.simulate import RunFailed
from strategies import FedIRM

ROOT = Path(__file__).parents[1]


# ------------------------------------------------------------------------------------------------- figures


def test_id_accuracy_is_a_mean_over_domains_and_ood_accuracy_that_of_the_test_set() -> None:
    e = tiny(
        **{"data": "RotatedDigits()", "objective": "CrossEntropy()", "num_workers": 5}, rounds=2,
        client="SGD(lr=1.0)", strategy="FedSGD('adam', lr=0.01)",
    )  # fmt: skip
    snapshot = last(e)
    data = snapshot.federation.dataset
    assert data.domains is not None
    hit = (
        functional_call(snapshot.federation.module, snapshot.model, (data.domains.x,)).argmax(1)
        == data.domains.y
    )
    own = [hit[data.domains.domain == i].double().mean().item() for i in range(5)]
    assert snapshot.metrics["id_accuracy"] == pytest.approx(sum(own) / 5)
    assert snapshot.metrics["ood_accuracy"] == snapshot.metrics["test_accuracy"]
    assert snapshot.metrics["ood_loss"] == snapshot.metrics["test_loss"]


def test_risk_and_penalty_of_every_environment() -> None:
    snapshot = last(tiny(rounds=2, client=IRM(), strategy=FedIRM(), probes="Environments()"))
    data, found = snapshot.federation.dataset, []
    for i in (0, 1):
        own = data.workers == i
        z = functional_call(snapshot.federation.module, snapshot.model, (data.x[own],))
        found.append((
            Logistic().loss(z, data.y[own]).mean().item(),
            penalty(Logistic(), z, data.y[own]).item(),
        ))
    risks, penalties = zip(*found, strict=True)
    assert snapshot.metrics["environments.risk.mean"] == pytest.approx(sum(risks) / 2)
    assert snapshot.metrics["environments.penalty.mean"] == pytest.approx(sum(penalties) / 2)
    assert snapshot.metrics["environments.penalty.max"] == pytest.approx(max(penalties))
    own = [slice(0, 60), slice(60, 120)]  # as many rows each
    z = functional_call(snapshot.federation.module, snapshot.model, (data.x,))
    hits = [((z[part, 0] > 0) == (data.y[part] == 1)).double().mean().item() for part in own]
    assert snapshot.metrics["environments.accuracy.mean"] == pytest.approx(sum(hits) / 2)
    assert snapshot.metrics["environments.accuracy.min"] == pytest.approx(min(hits))
    later = last(tiny(rounds=3, client=IRM(), strategy=FedIRM(), probes="Environments(every=2)"))
    assert "environments.risk.mean" not in later.metrics
    with pytest.raises(BadInput, match="Exponential has no slope here"):
        last(tiny(**{"objective": "Exponential()"}, rounds=1, probes="Environments()"))


def test_the_run_directory_tells_both_accuracies_and_names_the_held_out_domain(tmp_path: Path) -> None:
    e = tiny(**{"eval_every": 1}, rounds=3, client=IRM(), strategy=FedIRM(), out=str(tmp_path / "run"))
    done = fedsim.run(e)
    assert {"id_accuracy", "ood_accuracy", "id_loss", "ood_loss"} <= {*done.history} & {*done.summary}
    assert workers.read(tmp_path / "run")["held_out"] == "colour flips 0.9"
    assert list((tmp_path / "run/figures").glob("domains.*"))
    titles = {
        d.name: d.figure.axes[0].get_title() for d in drawings(done.history, workers.read(tmp_path / "run"))
    }
    for name in ("loss", "accuracy", "domains", "costs"):
        assert titles[name] == "held out: colour flips 0.9"


# ------------------------------------------------------------------------------------------- many runs


def test_bins_filters_and_budgets_of_a_table_by_hand() -> None:
    inside = np.array([0.1, 0.2, 0.29, 0.3, 0.7, 0.7, 0.95, 1.0, 0.0, 0.9])
    outside = np.array([0.5, 0.1, 0.3, 0.6, 0.2, 0.4, 0.8, 0.6, 0.9, 0.1])
    found = bins(inside, outside)
    assert found.count.tolist() == [1, 1, 2, 1, 0, 0, 0, 2, 0, 3]
    wanted = [0.9, 0.5, 0.2, 0.6, np.nan, np.nan, np.nan, 0.3, np.nan, 0.5]
    np.testing.assert_allclose(found.mean, wanted, atol=1e-15)
    curve = budget(inside, outside, step=4, top=2)
    assert curve["trials"].tolist() == [4, 8, 10]
    assert curve["id"].tolist() == [0.3, 1.0, 1.0]
    assert curve["ood"].tolist() == [0.6, 0.6, 0.6]
    assert curve["oracle"].tolist() == [0.6, 0.8, 0.9]
    np.testing.assert_allclose(curve["top"], [0.45, 0.7, 0.7])
    np.testing.assert_allclose(curve["mean"], [0.375, 0.4375, 0.45])


def table_of(inside: np.ndarray, outside: np.ndarray, label: str = "one") -> pd.DataFrame:
    names = ["0 degrees", "75 degrees"]
    one = pd.DataFrame({"label": label, "train": 1.0, "id": inside, "ood": outside})
    return pd.concat([one.assign(held_out=name) for name in names], ignore_index=True)


def test_figures_name_the_held_out_domains_and_count_what_is_kept() -> None:
    inside = np.array([0.1, 0.2, 0.29, 0.3, 0.7, 0.7, 0.95, 1.0, 0.0, 0.9])
    outside = np.array([0.5, 0.1, 0.3, 0.6, 0.2, 0.4, 0.8, 0.6, 0.9, 0.1])
    runs = pd.concat([table_of(inside, outside), table_of(inside, inside, "two")])
    figures = [
        scatter(runs, threshold=0.3),
        binned(runs),
        boxplots(runs, threshold=0.3, top=3),
        budgets(runs, step=4),
    ]
    for figure in figures:
        titles = [axes.get_title() for axes in figure.axes]
        assert all(t.endswith(("held out: 0 degrees", "held out: 75 degrees")) for t in titles)
        assert sum(t.endswith("held out: 75 degrees") for t in titles) * 2 == len(titles)
    assert figures[0].axes[0].texts[0].get_text() == "kept\none 6 of 10\ntwo 6 of 10"
    assert [t.get_text() for t in figures[1].axes[0].texts[:6]] == ["1", "1", "2", "1", "2", "3"]
    assert "the best by OOD (oracle)" in figures[3].axes[0].get_legend_handles_labels()[1]


def test_boxes_of_a_table_by_hand() -> None:
    inside, outside = np.array([0.2, 0.8, 0.9, 1.0]), np.array([0.1, 0.4, 0.3, 0.7])
    found = boxes(table_of(inside, outside), threshold=0.8, top=2)
    five = ["low", "q1", "median", "q3", "high"]
    there = found.set_index(["held_out", "subset", "figure"])
    wanted = {
        ("all", "id"): (4, [0.2, 0.65, 0.85, 0.925, 1.0]),
        ("kept", "ood"): (3, [0.3, 0.35, 0.4, 0.55, 0.7]),
        ("kept", "gap"): (3, [0.3, 0.35, 0.4, 0.5, 0.6]),
        ("top", "ood"): (2, [0.3, 0.4, 0.5, 0.6, 0.7]),
        ("top", "train"): (2, [1.0] * 5),
    }
    for held_out in ("0 degrees", "75 degrees"):
        for (subset, figure), (number, values) in wanted.items():
            row = there.loc[(held_out, subset, figure)].to_dict()
            assert row["runs"] == number
            np.testing.assert_allclose([row[k] for k in five], values, atol=1e-12)
    nothing = boxes(table_of(inside, outside), threshold=1.1).query("subset == 'kept'")
    assert not nothing["runs"].to_numpy().any()
    assert np.isnan(nothing["median"].to_numpy(dtype=float)).all()


def test_optimisers_are_compared_over_the_runs_that_are_kept() -> None:
    runs = pd.DataFrame({
        "label": ["sgd", "sgd", "adam", "adam", "rmsprop"],
        "id": [0.9, 0.5, 0.8, 0.7, 0.1],
        "ood": [0.6, 0.9, 0.4, 0.3, 0.2],
    })
    found = compare(runs, threshold=0.7)
    assert (found["runs"], found["kept"]) == (5, 3)
    assert found["OOD, non-adaptive less adaptive, kept"] == pytest.approx(0.25)
    assert found["ID, non-adaptive less adaptive, kept"] == pytest.approx(0.15)
    assert found["rank correlation of ID and OOD, kept"] == pytest.approx(1)
    assert found["rank correlation of ID and OOD, all"] == pytest.approx(0.4)
    for x, y in (([1, 2, 2, 5.0], [3, 1, 4, 4.0]), ([1, 1, 1, 2.0], [0, 5, 5, 9.0])):
        assert rank_correlation(np.array(x), np.array(y)) == pytest.approx(spearmanr(x, y)[0])


@pytest.mark.parametrize("width", [0.1, 0.05, 0.2, 0.25])
def test_every_edge_falls_into_the_bin_that_begins_there(width: float) -> None:
    number = round(1 / width)
    edges = np.array([i / number for i in range(number + 1)])
    assert bins(edges, edges, width).count.tolist() == [1] * (number - 1) + [2]


@pytest.mark.parametrize(
    ("bend", "name"), [(1.5, "increasing returns"), (-1.5, "diminishing returns"), (0, "linear")]
)
def test_patterns(bend: float, name: str) -> None:
    rng = np.random.default_rng(0)
    inside = rng.random(200)
    outside = 0.3 * inside + bend * np.maximum(inside - 0.5, 0) + 0.02 * rng.standard_normal(200)
    found = pattern(inside, outside, draws=200)
    assert found.name == name
    assert found.high - found.low == pytest.approx(bend, abs=0.1)


def test_draws_of_optimisers_are_admissible_and_share_what_they_have_in_common() -> None:
    of = {name: draw(name, 20, seed=1) for name in RANGES}
    for name, found in of.items():
        assert found[:5] == draw(name, 5, seed=1)
        for one in found:
            e = Experiment.from_mapping(one.settings)
            assert 16 <= e.batch_size <= 128
            assert 1e-6 <= one.weight_decay <= 1e-2
            assert math.log10(one.arguments["lr"]) == pytest.approx(sum(RANGES[name]["lr"]) / 2, abs=1.5)
    assert [d.batch_size for d in of["sgd"]] == [d.batch_size for d in of["adam"]]
    with pytest.raises(ValueError, match="optimiser = 'adagrad' must be one of sgd, momentum"):
        draw("adagrad", 1)


def sweep(settings: dict, number: int, rounds: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found = {}
    for name in RANGES:
        runs = []
        for one in draw(name, number):
            e = Experiment.from_mapping(settings | one.settings | {"rounds": rounds})
            try:
                metrics = last(e).metrics
            except RunFailed:  # a run that diverged is a run, at chance
                metrics = {"id_accuracy": 0.1, "ood_accuracy": 0.1}
            runs.append((metrics["id_accuracy"], metrics["ood_accuracy"]))
        inside, outside = np.array(runs, dtype=float).T
        found[name] = (inside, outside)
    return found


SWEEP = {
    "partition": "Natural()",
    "eval-every": 0,
    "dtype": "float64",
    "device": "cpu",
    "plan": "stacked",
}
ROTATED = SWEEP | {"model": "MLP(hidden=(32,))", "objective": "CrossEntropy()", "num-workers": 5}


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [0, 75])
def test_optimisers_by_accuracy_in_a_held_out_angle(held_out: int) -> None:
    found = sweep(ROTATED | {"data": f"RotatedDigits(held_out={held_out}.0)"}, 30, 250)
    adaptive, others = (
        np.concatenate([np.array(points).T for name, points in found.items() if (name in ADAPTIVE) == kind])
        for kind in (True, False)
    )
    pooled = rank_correlation(*np.concatenate([adaptive, others]).T)
    adaptive, others = (runs[runs[:, 0] >= 0.8] for runs in (adaptive, others))
    kept = rank_correlation(*np.concatenate([adaptive, others]).T)
    gap = others[:, 1].mean() - adaptive[:, 1].mean()
    print(
        f"held out {held_out} degrees: non-adaptive minus adaptive {gap:+.3f}, rank correlation of all runs {pooled:.2f}, "
        f"of those that are kept {kept:.2f}"
    )
    if held_out == 0:  # at the other end of the range the sign is only recorded
        assert gap > 0
        assert abs(others[:, 0].mean() - adaptive[:, 0].mean()) < 0.04
        assert pooled > 0.45  # of all runs; among those of high accuracy it is no law


@pytest.mark.slow
def test_better_risk_minimisers_follow_the_colour_more() -> None:
    settings = SWEEP | {
        "data": "ColoredDigits(colours=(0.2, 0.1), rows=1000)",
        "model": "MLP(hidden=(32, 32), init='xavier')",
        "objective": "Logistic()",
        "num-workers": 2,
    }
    found = sweep(settings, 12, 250)
    inside, outside = (np.concatenate([points[i] for points in found.values()]) for i in (0, 1))
    assert rank_correlation(inside, outside) < -0.6


# ------------------------------------------------------------------------------- failure, repair, and failure


def outcome(name: str, **settings: object) -> tuple[float, float]:
    path = ROOT / f"experiments/domains_{name}.toml"
    metrics = last(Experiment.from_toml(path, {"plan": "stacked", "eval-every": 0, **settings})).metrics
    inside, outside = metrics["id_accuracy"], metrics["ood_accuracy"]
    assert isinstance(inside, float)
    assert isinstance(outside, float)
    return inside, outside


@pytest.mark.slow
@pytest.mark.parametrize(
    "data",
    ["ColoredDigits()", "ColoredDigits(colours=(0.7, 0.9), held_out=0.1)"],
    ids=["as is", "mirrored"],
)
def test_erm_fails_and_irm_holds_on_the_held_out_domain(data: str) -> None:
    repaired = []
    for seed in (0, 1, 2):
        erm, irm = (outcome(name, seed=seed, data=data) for name in ("erm", "irm"))
        assert erm[0] > 0.75
        assert erm[1] < 0.40
        assert irm[1] > 0.55
        assert irm[1] - erm[1] > 0.2
        assert abs(irm[0] - irm[1]) < 0.17
        repaired.append(irm[1])
    assert sum(repaired) / 3 > 0.60


@pytest.mark.slow
def test_the_classical_pair_of_colours_is_harder() -> None:
    for seed in (0, 1):
        (_, erm), (_, irm) = (
            outcome(name, seed=seed, data="ColoredDigits(colours=(0.2, 0.1))") for name in ("erm", "irm")
        )
        assert erm < 0.30
        assert irm - erm > 0.15


@pytest.mark.slow
def test_local_irm_steps_end_in_the_colour_rule() -> None:
    with pytest.warns(UserWarning, match="local IRM steps are known to fail"):
        _, outside = outcome(
            "irm",
            **{
                "client": "IRM(AdamW(lr=0.001, weight_decay=0.0), l2=0.001)",
                "strategy": "FedIRM('sgd', lr=1.0)",
                "local-steps": 5,
                "rounds": 101,  # 501 local steps in all; in further rounds it drifts towards a constant
            },
        )
    assert outside < 0.2
