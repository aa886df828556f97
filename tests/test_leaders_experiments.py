"""Leaders and centres: the experiments that show what they are for, their pictures, and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from leaders_toys import figure, last, parabolas
from toys import snapshots

from fedsim import Experiment
from fedsim.experiment import BadInput
from fedsim.simulate import rounds
from fedsim.trajectories import draw, follow

# ----------------------------------------------------------------------------------- pictures' toys


def toy(name: str, **settings: Any) -> Experiment:
    return Experiment.from_toml(
        Path(__file__).parents[1] / "experiments" / name, {"device": "cpu"} | settings
    )


def test_l2_following_the_best_breaks_the_symmetry() -> None:
    found = snapshots(toy("symmetry_lgd.toml"))
    worst = [figure(s, "worker_loss.max") for s in found]
    first = [figure(s, "worker_loss.min") for s in found]
    assert worst[-1] < -0.215
    assert next(i for i, x in enumerate(first, 1) if x < -0.19) == 13
    assert next(i for i, x in enumerate(worst, 1) if x < -0.215) == 46
    assert last(toy("symmetry_lgd.toml")).model["position"].tolist() == pytest.approx([1.43, 0.06], abs=0.01)


def test_l2_a_centre_does_not() -> None:
    s = last(toy("symmetry_easgd.toml"))
    assert s.metrics["worker_loss.min"] == pytest.approx(-0.0913, abs=2e-3)
    assert s.metrics["worker_loss.max"] == pytest.approx(-0.0913, abs=2e-3)


@pytest.mark.parametrize(
    ("rank", "seeds", "crossing", "plateau"),
    [(1, 4, (25, 36), (1.0e-2, 1.4e-2)), (10, 1, (34, 42), (0.11, 0.13))],
)
def test_l3_factorisation(
    rank: int, seeds: int, crossing: tuple[int, int], plateau: tuple[float, float]
) -> None:
    for seed in range(seeds):
        settings = {"data": f"LowRank(rank={rank})", "seed": seed, "eval_every": 0, "plan": "vmap"}
        found = [s.report.loss.min().item() for s in snapshots(toy("factorisation_lgd.toml", **settings))]
        assert crossing[0] <= next(i for i, x in enumerate(found) if x < 1e-7) <= crossing[1]
        found = [s.report.loss.min().item() for s in snapshots(toy("factorisation_easgd.toml", **settings))]
        assert plateau[0] <= found[-1] <= plateau[1]


def test_the_models_are_evaluated_side_by_side() -> None:
    s = last(toy("symmetry_easgd.toml", rounds=3))
    sinc = [torch.sinc(x.norm()).item() for x in s.after["position"]]
    assert s.metrics["test_loss.leader"] == pytest.approx(sinc[int(s.report.loss.argmin())], rel=1e-12)
    assert s.metrics["test_loss.average"] == pytest.approx(
        torch.sinc(s.after["position"].mean(0).norm()).item(), rel=1e-12
    )
    assert s.metrics["test_loss.center"] == s.metrics["test_loss"]
    assert s.metrics["worker_loss.max"] == pytest.approx(max(sinc), rel=1e-12)


# ---------------------------------------------------------------------------------------- bad input

BAD = [
    ({"strategy": "LeaderSGD(groups=3)"}, "groups = 3 must divide the number of workers 4"),
    ({"strategy": "LeaderSGD(pull=-0.1)"}, "LeaderSGD: pull = -0.1 must be >= 0"),
    ({"strategy": "LeaderSGD(leader='loudest')"}, "must be one of 'running_train'"),
    ({"strategy": "LeaderSGD(leader='shared_val')"}, "elects by held-out rows; set holdout > 0"),
    ({"strategy": "LeaderSGD()", "participation": 0.5}, "is defined for all workers; set it to 1.0"),
    ({"strategy": "LeaderSGD(prox=0.1)", "local_epochs": 1}, "needs local-steps"),
    ({"strategy": "LeaderGD()", "batch_size": 2}, "uses full gradients; set batch-size = 0"),
    ({"strategy": "LeaderSGD()", "schedule": "FreeRunning()"}, r"leader methods take 'TotalSteps\(...\)'"),
    ({"strategy": "FedAvg()", "schedule": "FreeRunning()"}, "cannot take workers one at a time"),
    ({"schedule": "TotalSteps()", "participation": 0.5}, "is defined for all workers"),
    ({"schedule": "TotalSteps()", "local_epochs": 1}, "needs local-steps"),
    ({"schedule": "TotalSteps(durations=(1.0, 0.0))"}, r"durations = \(1.0, 0.0\) must be numbers > 0"),
    ({"schedule": "FreeRunning(arrivals=-1)", "strategy": "Downpour()"}, "arrivals = -1 must be >= 0"),
    ({"strategy": "ElasticAveraging(beta=-1.0)"}, "beta = -1.0 must be >= 0"),
    ({"strategy": "ElasticAveraging(alpha=-1.0)"}, "alpha = -1.0 must be >= 0"),
    ({"client": "Nesterov(momentum=1.0)"}, r"momentum = 1.0 must be in \[0, 1\)"),
    ({"model": "Scalar(starts_at=(1.0, 2.0))"}, "starts has 2 points, for 4 workers"),
    ({"data": "Parabolas(a=(1.0,), b=(1.0,))"}, "a has 1 numbers, for 4 workers"),
    ({"data": "Parabolas(a=(1.0, -1.0), b=(1.0, 1.0))"}, "must be numbers > 0"),
    ({"data": "Parabolas(a=(1.0, 1.0), b=(1.0,))"}, "must have 2 numbers, as many as a"),
    ({"probes": "WorkerLoss(at='noon')"}, "must be one of 'steps', 'row'"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=lambda x: x if isinstance(x, str) else None)
def test_bad_input_is_one_line(settings: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message) as raised:
        next(rounds(parabolas(**settings)))
    assert "\n" not in str(raised.value)


def test_paths_are_drawn_over_level_lines() -> None:
    experiment = toy("symmetry_lgd.toml", rounds=4, probes="")
    paths = follow(experiment)
    assert paths.rows.shape == (5, 4, 2)
    assert paths.rows[0].tolist() == [[-6, -4], [-15, -18], [20, 11], [17, 8]]
    assert torch.equal(paths.rows[-1], last(experiment).after["position"])
    figure = draw({"leader": experiment, "centre": toy("symmetry_easgd.toml", rounds=4, probes="")}, size=20)
    assert [axes.get_title() for axes in figure.axes] == ["leader", "centre"]
    assert len(figure.axes[0].get_lines()) == 3 * 4 + 1
    with pytest.raises(ValueError, match="has 1 parameters, must have 2"):
        follow(parabolas(strategy="LeaderSGD()"))
    with pytest.raises(ValueError, match="keeps no rows of workers"):
        follow(experiment.replace({"strategy": "FedAvg()"}))


@pytest.mark.parametrize(
    "name",
    [
        "cnn7_leader_16", "cnn7_leader_16_small", "cnn7_leader_4", "cnn7_leader_small", "resnet20_leader_16",
        "resnet20_leader_small", "leader_skewed", "digits_at_different_speeds",
    ],
)  # fmt: skip
def test_experiments_are_well_formed(name: str) -> None:
    assert toy(f"{name}.toml").parts.strategy.keeps_rows


@pytest.mark.filterwarnings("ignore:strategy = 'LeaderSGD:UserWarning")
def test_following_the_easiest_worker_hurts() -> None:
    """Elected by their own losses, leaders of one label take everybody along; by shared rows they do not."""
    settings = {"eval-every": 0, "rounds": 12}
    own, fair, mean = (
        figure(last(toy("leader_skewed.toml", **settings, strategy=s)), "test_accuracy")
        for s in ("LeaderSGD(pull=0.3)", "LeaderSGD(pull=0.3, leader='shared_val', window=300)", "FedAvg()")
    )
    assert own < 0.4
    assert own + 0.1 < fair < mean
