"""Local-GD: real data and frozen features, and bad input."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from engine_local_gd import LINEAR, linear, told

import fedsim
from clients import SGD, ScaledSGD
from fedsim import BadInput, Experiment
from fedsim.data import Dataset, Digits, FrozenFeatures, Pair, Shards
from fedsim.federation import assemble
from fedsim.simulate import rounds
from strategies import LocalGD

# ------------------------------------------------------------------------------------ real data


def test_pair_keeps_two_classes_in_order():
    whole, pair = Digits().load(1, 1), Pair(Digits(), classes=(8, 2), unit_norm=False).load(1, 1)
    kept = (whole.y == 8) | (whole.y == 2)
    assert torch.equal(pair.x, whole.x[kept].flatten(1).double())
    assert torch.equal(pair.y, (whole.y[kept] == 2).long())
    assert (pair.num_outputs, pair.task, pair.labels) == (1, "binary", ("8", "2"))
    assert Pair(Digits()).load(0, 1).x.norm(dim=1).max().item() == pytest.approx(1, abs=1e-12)


def test_two_digits_are_separable_and_local_gd_turns_to_their_margin():
    more = {
        "data": "Pair(Digits(), classes=(3, 5))",
        "partition": "Dirichlet(alpha=0.5)",
        "probes": "Direction(per_decade=3)",
    }
    e = linear(4, 20, 128, SGD(8.0), LocalGD(), **more)
    history = [told(s) for s, _ in rounds(e)]
    assert history[-1]["direction.cosine_distance"] < 0.5 * history[0]["direction.cosine_distance"]
    assert history[-1]["direction.margin_ratio"] > 0.3


def test_frozen_features_depend_on_the_seed_alone_and_train_the_last_layer():
    source = FrozenFeatures(Digits(), width=16, epochs=3)
    state = torch.get_rng_state()
    first, second, other = source.load(0, 1), source.load(0, 7), source.load(1, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.x, second.x)
    assert not torch.equal(first.x, other.x)
    assert first.x.dtype == torch.float64
    assert bool((first.x >= 0).all())
    e = Experiment(
        data="FrozenFeatures(Digits(), width=16, epochs=3)",
        partition="Dirichlet(alpha=1.0)",
        model="Linear(bias=False)",
        client="SGD(lr=2.0)",
        num_workers=5,
        rounds=30,
    )
    *_, (snapshot, _) = rounds(e)
    assert told(snapshot)["test_accuracy"] > 0.7  # a tenth by chance


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Random windows of 7 tokens; the class says whether the last token is odd."""

    def load(self, seed: int, num_workers: int) -> Dataset:
        x = torch.from_numpy(np.random.default_rng(0).integers(0, 9, (160, 7)))
        y = x[:, -1] % 2
        return Dataset(x[:120], y[:120], x[120:], y[120:], 2, "classes", "tokens")


def test_frozen_features_of_text_are_those_of_the_last_position():
    inner = FrozenFeatures(Tokens(), width=12, epochs=15, lr=3e-3)
    source = Pair(inner, classes=(0, 1))
    data = source.load(0, 1)
    assert (data.x.shape, data.x.dtype, data.task) == ((120, 12), torch.float64, "binary")
    assert torch.equal(data.x, source.load(0, 5).x)
    # A trained network has moved the two classes apart: least squares names nearly all test rows.
    w = np.linalg.lstsq(data.x.numpy(), 2.0 * data.y.numpy() - 1)[0]
    hits = (data.test_x.numpy() @ w > 0) == (data.test_y.numpy() == 1)
    assert hits.mean() > 0.9
    untrained = dataclasses.replace(inner, epochs=0).load(0, 1)
    assert np.linalg.matrix_rank(untrained.x.numpy()) == 12  # a norm at the end would cost a dimension


# -------------------------------------------------------------------------------------- bad input


def binary(x: np.ndarray, y: list[int]) -> Dataset:
    t = torch.from_numpy(x)
    return Dataset(t, torch.tensor(y), t[:0], torch.zeros(0).long(), 1, "binary", "rows")


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([[1.0, 0.0], [2.0, 1.0]], [1, 1], "all 2 training rows have label 1; a direction needs two classes"),
        ([[1.0, 0.0], [0.0, 0.0]], [1, 0], "row 1 is zero, no direction separates it"),
        ([[1.0, 2.0], [1.0, 2.0]], [1, 0], "rows 0 and 1 are one point with contradicting labels"),
        ([[1.0, math.nan], [1.0, 2.0]], [1, 0], "row 0 has a feature that is NaN or infinite"),
        ([[1.0], [2.0], [3.0]], [1, 0, 1], "are non-separable: .*Direction.. needs separable rows"),
    ],
)
def test_bad_rows_are_refused_before_the_first_round(x, y, message, tmp_path):
    e = linear(1, 1, 2, SGD(0.1), LocalGD(), probes="Direction()", out=str(tmp_path / "run"))
    rows = binary(np.array(x), y)
    federation = assemble(e, rows, Shards.from_assignment(np.zeros(len(x), dtype=int), 1))
    with pytest.raises(BadInput, match=rf"^probes = 'Direction\(\)': .*{message}.*$") as error:
        fedsim.run(e, federation=federation)
    assert "\n" not in str(error.value)
    good = binary(np.array([[1.0, 0.5], [-1.0, 0.2]]), [1, 0])
    fedsim.run(e, federation=assemble(e, good, Shards.from_assignment(np.zeros(2, dtype=int), 1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "NonSeparable()"}, "training rows are non-separable"),
        ({"model": "MLP(hidden=(4,))"}, "model = 'MLP.*' must be linear"),
        ({"model": "MLP(hidden=(4,))", "probes": "NormalisedMargin()"}, "must be homogeneous"),
        (
            {
                "probes": "Bias()",
                "objective": "CrossEntropy()",
                "data": "Synthetic(rows=40)",
                "partition": "IID()",
            },
            r"the task of the data is 'classes'",
        ),
        ({"data": "LinearRegression()", "objective": "SquaredError()"}, "task of the data is 'regression'"),
        ({"data": "Pair(Digits(), classes=(3, 12))"}, "no training row of class 12"),
        ({"data": "Pair(Separable())"}, "must be 'classes'"),
        ({"data": "Separable(nodes=3)"}, "num_workers = 4 must be <= 3"),
        ({"data": "Synthetic(rows=3, classes=2, test=0.0)", "partition": "IID()"}, "num-workers = 4"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    base = {"data": "Separable()", "partition": "Natural()", "probes": "Direction()"}
    e = linear(4, 1, 1, SGD(0.1), LocalGD(), **(base | settings))
    with pytest.raises(BadInput, match=message):
        next(rounds(e))


ASKING = {"client": "LossNormalised()", "strategy": "KnownLoss()", "objective": "Exponential()"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"local_steps": 2}, "local-steps = 2: .* needs local-steps = 1"),
        ({"batch_size": 4}, "batch-size = 4: .* needs batch-size = 0"),
        ({"model": "Linear()"}, r"needs 'Linear\(bias=False\)'"),
        ({"plan": "stacked"}, "plan = 'stacked': .* runs on 'loop'"),
        ({"client": "SGD(0.1)", "strategy": "LocalGD()", "batch_size": 4}, "set batch-size = 0"),
        ({"data": "Pair(Digits(), classes=(3, 3))"}, "must be two different classes"),
        ({"probes": "Direction(per_decade=-1)"}, "per_decade = -1 must be >= 0"),
        ({"client": "ScaledSGD(c=0)"}, "c = 0.0 must be > 0"),
        ({"client": "ScaledSGD(mode='none')"}, "mode = 'none' must be"),
        ({"client": "LossNormalised()"}, "need each other"),
        ({"strategy": "KnownLoss()"}, "need each other"),
        (ASKING | {"client": "Prox(LossNormalised())"}, "need each other"),
        (ASKING | {"objective": "Logistic()"}, r"needs 'Exponential\(\)'"),
        (ASKING | {"batch_size": 4}, "needs batch-size = 0"),
        (ASKING | {"participation": 0.5}, "participation = 0.5: .* needs participation = 1"),
        (ASKING | {"strategy": "DualAcceleration()", "local_steps": 2}, "needs local-steps = 1"),
        (ASKING | {"plan": "vmap"}, "runs on 'loop'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    base = {
        "client": "Projection()",
        "strategy": "AnchoredAverage()",
        "batch_size": 0,
        "local_steps": 1,
        "model": LINEAR,
    }
    with pytest.raises(BadInput, match=message):
        Experiment.from_mapping(base | settings)


@pytest.mark.parametrize(
    ("client", "settings", "message"),
    [
        (ScaledSGD(), {"model": "MLP(hidden=(4,))"}, "client = 'ScaledSGD.*no bound on the curvature"),
        (
            ScaledSGD(mode="scaled"),
            {"local_steps": 0, "local_epochs": 2},
            "divides by the local steps; set local-steps",
        ),
    ],
)
def test_a_step_size_that_cannot_be_known_is_refused(client, settings, message):
    e = linear(4, 1, 1, client, LocalGD(), data="Separable()", partition="Natural()").replace(settings)
    with pytest.raises(BadInput, match=message):
        next(rounds(e))


@pytest.mark.parametrize(
    ("client", "said"),
    [
        ("SGD(0.62)", ""),
        ("SGD(0.63)", "lr = 0.63 is beyond the stability bound 2 / beta = 0.626456"),
        ("ScaledSGD(c=1.99)", ""),
        ("ScaledSGD(c=2.01)", "lr = 0.629588 is beyond the stability bound 2 / beta = 0.626456"),
        ("Prox(SGD(0.62), mu=0.01)", ""),
        ("Prox(SGD(0.62), mu=0.1)", "lr = 0.62 is beyond the stability bound 2 / (beta + mu) = 0.60743"),
    ],
)
@pytest.mark.parametrize("probe", ["Direction", "Bias"])
def test_a_learning_rate_beyond_the_bound_is_said_once(probe, client, said, recwarn):
    settings = {"data": "Separable()", "partition": "Natural()", "probes": f"{probe}()"}
    e = linear(4, 1, 3, SGD(), LocalGD(), **settings).replace({"client": client})
    assert len(list(rounds(e))) == 3
    warned = [str(w.message) for w in recwarn]
    assert len(warned) == bool(said)
    assert all(f"{said}; the loss may rise" in text for text in warned)
