"""What gaps capture of the dominant eigenspace in the experiments beyond digits; they take minutes each."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from std_protocol import CAPACITIES, Checkpoint, checkpoints

from fedsim import tree
from fedsim.experiment import Experiment

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def at_the_end(name: str, k: int, **changes: Any) -> Checkpoint:
    """Run an experiment with the probe's buffer alone, and look at its last round."""
    experiment = Experiment.from_toml(EXPERIMENTS / f"{name}.toml").replace({
        "probes": "Disagreement(capacity=128)",
        "eval_every": 0,
        **changes,
    })
    return checkpoints(experiment, (experiment.rounds,), k)[0]


def captures(at: Checkpoint) -> dict[int, float]:
    """Return the capture by capacity, which must grow."""
    found = [f.capture for f in at.captures()]
    assert all(a < b for a, b in pairwise(found))
    return dict(zip(CAPACITIES, found, strict=True))


def needs(folder: str) -> pytest.MarkDecorator:
    there = Path(os.environ.get("FEDSIM_DATA", "/nowhere"), folder).is_dir()
    return pytest.mark.skipif(not there, reason=f"FEDSIM_DATA names no folder with {folder}/")


@pytest.mark.slow
@needs("tinyshakespeare")
def test_text():
    at = at_the_end("disagreement_text", 3)
    captured = captures(at)
    assert captured[8] >= 0.25
    assert captured[16] >= 0.55
    assert captured[64] >= 0.75
    assert at.pairs.values[2] / at.pairs.values[3] > 3


@pytest.mark.slow
@needs("mnist")
def test_mnist():
    at = at_the_end("disagreement_mnist", 10)
    assert captures(at)[64] >= 50 * at.span(64).rank / tree.num_parameters(at.theta)


@pytest.mark.slow
@needs("cifar10")
def test_cifar():
    """As many local steps with four times the meetings: the shorter rounds capture more."""
    rows = {"data": "CIFAR10(rows=1000)"}
    short = at_the_end("disagreement_cifar", 10, **rows)
    long = at_the_end("disagreement_cifar", 10, **rows, local_steps=8, rounds=25)
    found = [captures(at)[64] for at in (short, long)]
    assert found[0] - found[1] > 0.15
    assert min(found) >= 50 * short.span(64).rank / tree.num_parameters(short.theta)
