"""Crops and mirror images: closed forms, one draw for each use whatever the plan, and nothing where they are off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import fedsim
from fedsim import Experiment, random
from fedsim.batches import Sampler, Sampling
from fedsim.data import Cropped, Cuts, Dataset, Digits
from fedsim.experiment import BadInput
from fedsim.federation import load
from fedsim.registry import REGISTRY
from fedsim.simulate import rounds


@dataclass(frozen=True)
class Pictures:
    """Random pictures of 3 colours in three classes."""

    rows: int = 40
    side: int = 8

    def load(self, seed: int, num_workers: int) -> Dataset:
        """Draw them."""
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(self.rows, 3, self.side, self.side, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (self.rows,), generator=generator)
        return Dataset(x[10:], y[10:], x[:10], y[:10], 3, "classes", "pictures")


@pytest.fixture(autouse=True)
def _pictures() -> Iterator[None]:
    fedsim.register("data", Pictures)
    yield
    del REGISTRY["data"]["Pictures"]


def experiment(**settings: Any) -> Experiment:
    base = {
        "data": "Cropped(Pictures(), side=6)", "partition": "IID()", "model": "SmallCNN(channels=(2,))",
        "client": "SGD(lr=0.1, momentum=0.5)", "num_workers": 4, "rounds": 2, "local_steps": 3, "batch_size": 3,
        "dtype": "float64", "device": "cpu", "plan": "loop", "holdout": 0.25,
    }  # fmt: skip
    return Experiment.from_mapping(base | settings)


def history(e: Experiment) -> list[dict]:
    return [snapshot.metrics for snapshot, _ in rounds(e)]


def near(expected: list[dict]) -> list[Any]:
    return [pytest.approx(line, rel=1e-9, abs=1e-12) for line in expected]


PICTURE = torch.arange(12, dtype=torch.float64).view(1, 1, 3, 4)
"""``[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]``."""


def uses(cuts: Cuts, number: int) -> Tensor:
    """Use the first picture in as many minibatches of one row."""
    index, steps = torch.zeros(number, 1, dtype=torch.int64), torch.arange(number)
    return cuts.cut(3, index, torch.tensor(0), steps)[:, 0, 0]


def test_parts_are_those_of_the_picture_and_as_often() -> None:
    """A 2x2 part of a 3x4 picture begins at one of 6 places, and is mirrored or not: 12 equally likely parts."""
    expected = set()
    for top in range(2):
        for left in range(3):
            a = 4 * top + left
            expected |= {(a, a + 1, a + 4, a + 5), (a + 1, a, a + 5, a + 4)}
    found: dict[tuple, int] = {}
    for part in uses(Cuts(PICTURE, 2), 6000).flatten(1).tolist():
        found[tuple(part)] = found.get(tuple(part), 0) + 1
    assert set(found) == expected
    assert all(abs(count - 500) < 5 * 500**0.5 for count in found.values())


def test_each_of_the_two_can_be_left_out() -> None:
    plain, mirrored = [[1.0, 2], [5, 6]], [[2.0, 1], [6, 5]]
    for part in uses(Cuts(PICTURE, 2, shift=False), 50).tolist():
        assert part in (plain, mirrored)
    upright = uses(Cuts(PICTURE, 2, flip=False), 50)
    assert bool((upright[:, 0, 1] == upright[:, 0, 0] + 1).all())
    assert Cuts(PICTURE, 2).middle()[0, 0].tolist() == plain
    assert uses(Cuts(PICTURE, 2, shift=False, flip=False), 3).tolist() == [plain] * 3
    whole = Cuts(PICTURE[..., :3], 3)
    rows = torch.stack([PICTURE[0, 0, :, :3], PICTURE[0, 0, :, :3].flip(1)])
    assert all(any(torch.equal(part, row) for row in rows) for part in uses(whole, 20))


def test_a_part_depends_on_worker_step_and_place_alone() -> None:
    cuts = Cuts(torch.randn(9, 2, 5, 5, dtype=torch.float64), 3)
    index = torch.randint(9, (4, 6, 7))
    worker, step = torch.arange(10, 16), torch.arange(4)[:, None]
    together = cuts.cut(5, index, worker, step)
    assert together.shape == (4, 6, 7, 2, 3, 3)
    for t, i, b in ((0, 0, 3), (3, 5, 7), (2, 1, 1)):
        alone = cuts.cut(5, index[t, i, :b], worker[i], step[t, 0])
        assert torch.equal(together[t, i, :b], alone)
    assert not torch.equal(cuts.cut(6, index, worker, step), together)


@pytest.mark.parametrize("plan", ["stacked", "vmap"])
@pytest.mark.parametrize("settings", [{}, {"local_steps": 1}, {"local_steps": 0, "local_epochs": 2}], ids=str)
def test_plans_and_nodes_cut_alike(plan: str, settings: dict) -> None:
    expected = history(experiment(**settings))
    assert history(experiment(**settings, plan=plan)) == near(expected)
    assert history(experiment(**settings, nodes=3)) == near(expected)
    assert history(experiment(**settings, seed=1)) != near(expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_cut_alike() -> None:
    assert history(experiment(device="cuda")) == near(history(experiment()))


def test_local_steps_use_the_parts_that_are_drawn() -> None:
    """One step from the initial model: the loss of the first minibatch, cut by hand."""
    e = experiment(rounds=1, local_steps=1, client="SGD(lr=0.1)")
    federation = load(e)
    data = federation.dataset
    assert data.cuts is not None
    ((snapshot, _),) = rounds(e, federation)
    sampler = Sampler(federation.train, Sampling(3, 1, 0, False, e.seed), data.x.device)
    index = sampler.draw(1, torch.arange(4)).rows[:, 0]
    for i in range(4):
        worker, step = torch.tensor(i), torch.tensor(0)
        x = data.cuts.cut(random.key(e.seed, "cuts", 1), index[i], worker, step)
        output = torch.func.functional_call(federation.module, federation.theta, (x,))
        loss = torch.nn.functional.cross_entropy(output, data.y[index[i]]).item()
        assert snapshot.report.loss[i].item() == pytest.approx(loss, rel=1e-12)


def test_evaluation_sees_the_middle() -> None:
    whole = Pictures().load(0, 1)
    cropped = Cropped(Pictures(), side=6).load(0, 1)
    assert torch.equal(cropped.x, whole.x[:, :, 1:7, 1:7])
    assert torch.equal(cropped.test_x, whole.test_x[:, :, 1:7, 1:7])
    assert cropped.input_shape == (3, 6, 6)
    federation = load(experiment())
    assert torch.equal(federation.dataset.x, whole.x[:, :, 1:7, 1:7])


def test_without_draws_there_is_only_the_middle() -> None:
    """Numbers are those of the same pictures cut before; and without a crop those of the source itself."""
    off = Cropped(Pictures(), side=6, shift=False, flip=False).load(0, 1)
    assert off.cuts is None
    plain = history(experiment(data="Pictures()"))
    assert history(experiment(data="Cropped(Pictures(), side=8, shift=False, flip=False)")) == plain
    assert history(experiment(data="Cropped(Pictures(), side=8)")) != near(plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "Cropped(Pictures(), side=9)"}, r"Cropped: side = 9: rows of pictures are \(3, 8, 8\)"),
        ({"data": "Cropped(Pictures(), side=0)"}, "Cropped: side = 0 must be >= 1"),
        ({"data": "Cropped(Synthetic(), side=2)"}, "must be pictures"),
        ({"batch_size": 0}, "batch-size = 0: data = .* cuts pictures at random; set batch-size > 0"),
    ],
)
def test_bad_input_is_one_line(settings: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message) as raised:
        load(experiment(**settings))
    assert "\n" not in str(raised.value)


def test_a_data_set_and_its_pictures_belong_together() -> None:
    data = Digits().load(0, 1)
    with pytest.raises(ValueError, match="the middle parts of its pictures"):
        Dataset(data.x, data.y, data.test_x, data.test_y, 10, "classes", "digits", cuts=Cuts(data.x, 5))
