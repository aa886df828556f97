"""Data, partition and models of the experiments on worker disagreement."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fedsim import tree
from fedsim.data import Digits, NextKind, Shared, hold_out
from fedsim.experiment import Experiment
from fedsim.models import MLP, SmallCNN, initialise
from fedsim.text_classifier import TextClassifier

EXPERIMENTS = sorted((Path(__file__).parents[1] / "experiments").glob("disagreement_*.toml"))
needs_text = pytest.mark.skipif(
    not Path(os.environ.get("FEDSIM_DATA", "/nowhere"), "tinyshakespeare").is_dir(),
    reason="FEDSIM_DATA names no folder with tinyshakespeare/",
)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_experiments_are_valid(path):
    assert Experiment.from_toml(path).parts.probes[0].needs_rows


def test_every_worker_owns_all_rows():
    data = Digits(test=0.0).load(0, 3)
    shards = Shared().assign(data, 3, 0)
    assert shards.sizes.tolist() == [1797] * 3
    assert all(torch.equal(shards.rows(i), torch.arange(1797)) for i in range(3))
    train, held = hold_out(shards, 0.2, 0)
    assert all(torch.equal(held.rows(i), held.rows(0)) for i in range(3))
    assert torch.equal(torch.cat([train.rows(1), held.rows(1)]).sort().values, torch.arange(1797))


@pytest.mark.parametrize(
    ("spec", "shape", "classes", "size"),
    [
        (MLP(hidden=(32, 32), activation="tanh"), (1, 8, 8), 10, 3466),
        (MLP(hidden=(200, 200), activation="tanh"), (1, 28, 28), 10, 199_210),
        (SmallCNN(channels=(32, 32), pool="average"), (3, 32, 32), 10, 30_634),
        (TextClassifier(), (32,), 3, 73_475),
    ],
)
def test_numbers_of_parameters(spec, shape, classes, size):
    assert tree.num_parameters(initialise(spec, shape, classes, 0)[1]) == size


def test_layers_start_from_uniform_numbers():
    """Weights and biases are uniform in +-1 / sqrt(fan_in) of their layer."""
    _, theta = initialise(MLP(hidden=(200, 200), activation="tanh"), (64,), 10, 0)
    for (name, x), fan_in in zip(theta.items(), (64, 64, 200, 200, 200, 200), strict=True):
        assert x.abs().max() <= fan_in**-0.5, name
        assert x.numel() < 1000 or x.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.05)


def test_average_pooling():
    module, theta = initialise(SmallCNN(channels=(2,), pool="average"), (1, 2, 2), 3, 0)
    assert any(isinstance(layer, torch.nn.AvgPool2d) for layer in module.modules())
    assert theta["4.weight"].shape == (3, 2)
    with pytest.raises(ValueError, match="pool = 'min' must be one of 'max', 'average'"):
        SmallCNN(pool="min")


def test_text_classifier_sees_all_positions():
    module, _ = initialise(TextClassifier(vocabulary=7, layers=1, width=8, heads=2), (5,), 3, 0)
    x = torch.tensor([[0, 1, 2, 3, 4]])
    for position in range(5):
        other = x.clone()
        other[0, position] = 6
        assert not torch.equal(module(x), module(other))
    assert module(x).shape == (1, 3)
    with pytest.raises(ValueError, match="heads = 3 must divide width = 64"):
        TextClassifier(heads=3)
    with pytest.raises(ValueError, match="vocabulary = 0 must be >= 1"):
        TextClassifier(vocabulary=0)
    with pytest.raises(ValueError, match=r"input_shape = \(3, 4\) must be \(context,\)"):
        TextClassifier().build((3, 4), 2)


@needs_text
def test_kind_of_the_next_character():
    text = Path(os.environ["FEDSIM_DATA"], "tinyshakespeare", "input.txt").read_text()
    vocabulary = sorted(set(text))
    data = NextKind(context=20, rows=300).load(0, 1)
    assert (data.x.shape, data.test_x.shape, data.num_outputs) == ((300, 20), (34, 20), 3)
    assert len(torch.unique(data.x, dim=0)) > 290
    for x, y in zip(data.x[:50].tolist(), data.y[:50].tolist(), strict=True):
        window = "".join(vocabulary[i] for i in x)
        at, kinds = text.find(window), set()
        while at >= 0:
            follower = text[at + 20]
            kinds.add(0 if follower in " \n" else 1 if follower.lower() in "aeiou" else 2)
            at = text.find(window, at + 1)
        assert y in kinds
    ordered = NextKind(context=20, rows=300, in_order=True).load(0, 1)
    rows = {tuple(row) for row in data.x.tolist()}
    assert {tuple(row) for row in ordered.x.tolist()} == rows
    begin = [text.find("".join(vocabulary[i] for i in row)) for row in ordered.x[:30].tolist()]
    assert begin == sorted(begin)
    two = NextKind(context=20, rows=300, classes=2).load(5, 1)
    assert torch.equal(two.x, data.x)
    assert torch.equal(two.y, (data.y == 1).long())


def test_bad_input():
    with pytest.raises(ValueError, match="NextKind: classes = 4 must be 2 or 3"):
        NextKind(classes=4)
    with pytest.raises(ValueError, match="NextKind: rows = 0 must be >= 1"):
        NextKind(rows=0)
