"""Minibatches: which rows are drawn, that draws depend on nothing but their names, and the numbers behind them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fedsim import random
from fedsim.batches import Batches, Sampler, Sampling
from fedsim.data import Shards

SIZES = [7, 3, 12, 5, 1, 8]
CPU = torch.device("cpu")
HOW = {
    "steps": Sampling(batch_size=4, local_steps=7, local_epochs=0, replacement=False, seed=3),
    "epochs": Sampling(batch_size=4, local_steps=0, local_epochs=3, replacement=False, seed=3),
    "with replacement": Sampling(batch_size=4, local_steps=7, local_epochs=0, replacement=True, seed=3),
    "epochs with replacement": Sampling(
        batch_size=4, local_steps=0, local_epochs=2, replacement=True, seed=3
    ),
    "full batch": Sampling(batch_size=0, local_steps=2, local_epochs=0, replacement=False, seed=3),
    "full batch epochs": Sampling(batch_size=0, local_steps=0, local_epochs=2, replacement=False, seed=3),
}
every = pytest.mark.parametrize("how", HOW.values(), ids=list(HOW))


def _independent(table: Tensor | np.ndarray) -> bool:
    """Whether two uniform draws are independent: all cells of their table are equally likely."""
    return float(stats.chisquare(np.asarray(table).ravel()).pvalue) > 1e-3


def _shards(sizes: list[int]) -> Shards:
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(1))
    return Shards(order, torch.tensor([0, *np.cumsum(sizes)]))


def _minibatches(batches: Batches, workers: Tensor) -> dict[int, list[list[int]]]:
    """Read the rows of each step of each worker, padding left out."""
    found = {}
    for i, position in enumerate(batches.order.tolist()):
        steps = []
        for t in range(int(batches.steps[i])):
            s = min(t, batches.rows.shape[1] - 1)
            count = batches.rows.shape[2] if batches.valid is None else int(batches.valid[i, s])
            steps.append(batches.rows[i, s, :count].tolist())
        found[int(workers[position])] = steps
    return found


def _draw(how: Sampling, round: int, workers: list[int], sizes: list[int] = SIZES) -> dict[int, list]:
    chosen = torch.tensor(workers)
    return _minibatches(Sampler(_shards(sizes), how, CPU).draw(round, chosen), chosen)


@every
def test_a_draw_does_not_depend_on_who_else_takes_part(how: Sampling) -> None:
    everyone = _draw(how, 2, list(range(6)))
    for workers in ([0], [4], [1, 4], [0, 2, 3, 5], [5, 3, 0]):
        assert _draw(how, 2, workers) == {w: everyone[w] for w in workers}


@every
def test_a_node_that_knows_only_its_own_workers_draws_the_same_places(how: Sampling) -> None:
    whole, first = _shards(SIZES), 2
    own = Shards(whole.order[whole.offsets[first] :], whole.offsets[first:] - whole.offsets[first])
    workers = torch.tensor([2, 3, 5])
    node = Sampler(own, how, CPU, first).draw(4, workers)
    assert _minibatches(node, workers) == _draw(how, 4, [2, 3, 5])


@every
def test_a_sampler_has_no_memory(how: Sampling) -> None:
    sampler, workers, others = Sampler(_shards(SIZES), how, CPU), torch.arange(6), torch.tensor([1, 3])
    for round, chosen in ((1, workers), (2, workers), (2, others), (1, workers)):
        assert _minibatches(sampler.draw(round, chosen), chosen) == _draw(how, round, chosen.tolist())


@every
def test_fewer_steps_are_the_first_of_many(how: Sampling) -> None:
    workers, few, many = torch.tensor([0, 2, 5]), torch.tensor([3, 1, 2]), torch.tensor([5, 9, 2])
    sampler = Sampler(_shards(SIZES), how, CPU)
    short, long = (_minibatches(sampler.draw(2, workers, steps), workers) for steps in (few, many))
    for w, a, b in zip(workers.tolist(), few.tolist(), many.tolist(), strict=True):
        assert (len(short[w]), len(long[w])) == (a, b)
        assert short[w] == long[w][:a]
    assert _minibatches(sampler.draw(2, workers), workers) == _draw(how, 2, [0, 2, 5])


@pytest.mark.parametrize("name", ["steps", "epochs", "with replacement"])
def test_rounds_and_seeds_differ(name: str) -> None:
    how, everyone = HOW[name], list(range(6))
    other = Sampling(how.batch_size, how.local_steps, how.local_epochs, how.replacement, how.seed + 1)
    drawn = [_draw(how, 1, everyone), _draw(how, 2, everyone), _draw(other, 1, everyone)]
    assert drawn[0][2] != drawn[1][2] != drawn[2][2] != drawn[0][2]


@every
def test_workers_use_only_their_own_rows(how: Sampling) -> None:
    shards = _shards(SIZES)
    for w, steps in _draw(how, 1, list(range(6))).items():
        assert {r for batch in steps for r in batch} <= set(shards.rows(w).tolist())


@pytest.mark.parametrize("name", ["steps", "epochs"])
def test_without_replacement_each_pass_is_a_permutation(name: str) -> None:
    shards, how = _shards(SIZES), HOW[name]
    for w, steps in _draw(how, 5, list(range(6))).items():
        own, batches = sorted(shards.rows(w).tolist()), math.ceil(SIZES[w] / 4)
        passes = [steps[i : i + batches] for i in range(0, len(steps), batches)]
        for number, one in enumerate(passes):
            lengths = [min(4, SIZES[w] - 4 * i) for i in range(len(one))]
            assert [len(batch) for batch in one] == lengths
            flat = [r for batch in one for r in batch]
            assert len(set(flat)) == len(flat)
            if len(one) == batches:
                assert sorted(flat) == own
            if number and SIZES[w] >= 7:
                assert flat != [r for batch in passes[0] for r in batch][: len(flat)]


def test_shuffles_are_uniform_over_permutations() -> None:
    how = Sampling(batch_size=1, local_steps=0, local_epochs=1, replacement=False, seed=0)
    sampler, workers = Sampler(_shards([3] * 200), how, CPU), torch.arange(200)
    place = torch.empty(600, dtype=torch.int64)
    place[sampler.owned] = torch.arange(3).repeat(200)
    drawn = torch.cat([place[sampler.draw(r, workers).rows[..., 0]] for r in range(30)])
    _, counts = torch.unique(drawn @ torch.tensor([9, 3, 1]), return_counts=True)
    assert len(counts) == 6
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_with_replacement_rows_are_uniform() -> None:
    how = Sampling(batch_size=50, local_steps=40, local_epochs=0, replacement=True, seed=0)
    shards = _shards(SIZES)
    batches = Sampler(shards, how, CPU).draw(1, torch.arange(6))
    assert batches.valid is None
    for w, size in enumerate(SIZES):
        _, counts = torch.unique(batches.rows[w], return_counts=True)
        assert len(counts) == size
        if size > 1:
            assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    # different workers draw independently: places of two workers of equal size form a uniform table
    twins = Sampler(_shards([4, 4]), how, CPU)
    place = torch.empty(8, dtype=torch.int64)
    place[twins.owned] = torch.arange(4).repeat(2)
    a, b = place[twins.draw(1, torch.arange(2)).rows].flatten(1)
    table = torch.bincount(4 * a + b, minlength=16).view(4, 4)
    assert _independent(table)


@pytest.mark.parametrize("name", ["full batch", "full batch epochs"])
def test_a_full_batch_holds_every_row_once(name: str) -> None:
    shards = _shards(SIZES)
    for w, steps in _draw(HOW[name], 1, [0, 2, 4]).items():
        assert steps == [shards.rows(w).tolist()] * 2


def test_equal_full_batches_need_no_mask() -> None:
    how = HOW["full batch"]
    assert Sampler(_shards([4, 4]), how, CPU).draw(1, torch.arange(2)).valid is None
    assert Sampler(_shards([4, 3]), how, CPU).draw(1, torch.arange(2)).valid is not None


@pytest.mark.parametrize(("size", "epochs", "masked"), [(4, 2, False), (8, 1, False), (6, 1, True)])
def test_only_partial_batches_are_masked(size: int, epochs: int, masked: bool) -> None:
    how = Sampling(batch_size=4, local_steps=0, local_epochs=epochs, replacement=False, seed=0)
    batches = Sampler(_shards([size, 4]), how, CPU).draw(1, torch.arange(2))
    assert (batches.valid is not None) == masked


def test_epochs_give_a_worker_as_many_steps_as_its_rows_need() -> None:
    batches = Sampler(_shards(SIZES), HOW["epochs"], CPU).draw(1, torch.arange(6))
    assert batches.order.tolist() == [2, 0, 3, 5, 1, 4]  # stable
    assert batches.steps.tolist() == [9, 6, 6, 6, 3, 3]
    assert batches.active == [6, 6, 6, 4, 4, 4, 1, 1, 1]


def test_steps_are_equal_for_all() -> None:
    batches = Sampler(_shards(SIZES), HOW["steps"], CPU).draw(1, torch.tensor([5, 0, 2]))
    assert batches.order.tolist() == [0, 1, 2]
    assert (batches.steps.tolist(), batches.active) == ([7] * 3, [3] * 7)


# ------------------------------------------------------------------------------------- fedsim.random


def _splitmix(x: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64 in unsigned arithmetic."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def test_bits_are_those_of_splitmix64() -> None:
    stream, golden = random.key(7, "test"), np.uint64(0x9E3779B97F4A7C15)
    i = np.concatenate([np.arange(500), 2**62 + np.arange(5), -np.arange(1, 6)]).astype(np.int64)
    first = _splitmix(i.astype(np.uint64) * golden + np.uint64(stream % 2**64))
    got = random.bits(stream, torch.from_numpy(i))
    assert np.array_equal(got.numpy().astype(np.uint64), first)
    j = np.arange(3, dtype=np.int64)
    both = _splitmix(first[:, None] + j.astype(np.uint64) * golden)
    got = random.bits(stream, torch.from_numpy(i)[:, None], torch.from_numpy(j))
    assert np.array_equal(got.numpy().astype(np.uint64), both)


def test_splitmix64_meets_its_published_sequence() -> None:
    # First outputs for seed 1234567: state = seed + k * golden, k = 1, 2, ...
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    got = random.bits(1234567, torch.arange(1, 5)).numpy().astype(np.uint64)
    assert got.tolist() == expected


def test_uniform_numbers_are_uniform_and_independent_over_coordinates() -> None:
    u = random.uniform(random.key(0, "u"), torch.arange(200)[:, None], torch.arange(200))
    assert u.dtype == torch.float64
    assert bool(((u >= 0) & (u < 1)).all())
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    table = np.histogram2d(u[:, :-1].flatten(), u[:, 1:].flatten(), bins=8)[0]
    assert _independent(table)
    table = np.histogram2d(u[:-1].flatten(), u[1:].flatten(), bins=8)[0]
    assert _independent(table)


def test_uniform_numbers_are_the_upper_53_bits() -> None:
    x = torch.arange(1000)
    expected = (random.bits(5, x).numpy().astype(np.uint64) >> np.uint64(11)) / 2**53
    assert np.array_equal(random.uniform(5, x).numpy(), expected)


@pytest.mark.parametrize("high", [1, 2, 7, 1000])
def test_integers_are_uniform_below_their_bound(high: int) -> None:
    drawn = random.integers(random.key(0, "i"), torch.tensor(high), torch.arange(20_000))
    counts = torch.bincount(drawn, minlength=high)
    assert len(counts) == high
    if high > 1:
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_integers_reach_the_ends_of_large_ranges() -> None:
    high = 2**31 - 1
    drawn = random.integers(1, torch.tensor(high), torch.arange(100_000))
    assert 0 <= int(drawn.min()) < high // 10_000
    assert high - high // 10_000 < int(drawn.max()) < high


def test_keys_depend_on_every_part() -> None:
    keys = [
        random.key(*parts)
        for parts in [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", 1, 2), (0, "a", 12)]
    ]
    assert len(set(keys)) == len(keys)
    assert all(-(2**63) <= k < 2**63 for k in keys)
    draws = [random.numpy_generator(0, "a", i).random() for i in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    numbers = [torch.rand(2, generator=random.torch_generator(0, "a", i)).tolist() for i in (1, 1, 2)]
    assert numbers[0] == numbers[1] != numbers[2]
