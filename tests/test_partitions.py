"""Partitions: laws that all obey, closed forms of each, references, and bad input."""

from __future__ import annotations

import dataclasses
import math
import sys

import numpy as np
import pytest
import torch

from fedsim.data import (
    IID,
    ByLabel,
    ByQuantity,
    Contiguous,
    Dataset,
    Dirichlet,
    FlowerDatasets,
    Natural,
    Partition,
    Pathological,
    Shards,
    hold_out,
)
from fedsim.data.partitions import _cut, _dirichlet, _top_up
from fedsim.registry import parse

W = 23
EXACT = [
    IID(),
    Contiguous(),
    Dirichlet(alpha=0.3),
    Dirichlet(alpha=1e-4, min_size=3),
    Dirichlet(alpha=math.inf),
    Pathological(classes=2),
    Pathological(classes=3),
    ByLabel(),
    ByQuantity(sigma=1.5),
    ByQuantity(alpha=0.2),
    Natural(),
]
RANDOM = [p for p in EXACT if not isinstance(p, Contiguous | Natural)]


def make(rows: int = 997, classes: int = 10, task: str = "classes", natural: int | None = 60) -> Dataset:
    y = torch.from_numpy(np.random.default_rng(0).integers(0, classes, rows))
    y[:classes] = torch.arange(classes)
    if task == "regression":
        y = y.float()
    workers = None if natural is None else torch.arange(rows) % natural
    x = torch.zeros(rows, 1)
    outputs = classes if task == "classes" else 1
    return Dataset(x, y, x[:0], y[:0], outputs, task, "toy", workers)


@pytest.mark.parametrize("partition", EXACT, ids=repr)
def test_every_row_has_one_owner_and_every_worker_a_row(partition: Partition) -> None:
    shards = partition.assign(make(), W, seed=1)
    assert shards.num_workers == W
    assert shards.order.dtype == shards.offsets.dtype == torch.int64
    assert torch.equal(shards.order.sort().values, torch.arange(997))
    assert shards.sizes.min() >= 1
    assert torch.equal(torch.cat([shards.rows(i) for i in range(W)]), shards.order)


@pytest.mark.parametrize("partition", EXACT, ids=repr)
def test_the_same_seed_gives_the_same_shards(partition: Partition) -> None:
    first, again = (partition.assign(make(), W, seed=5) for _ in range(2))
    assert torch.equal(first.order, again.order)
    assert torch.equal(first.offsets, again.offsets)


@pytest.mark.parametrize("partition", RANDOM, ids=repr)
def test_another_seed_gives_other_shards(partition: Partition) -> None:
    first, other = (partition.assign(make(), W, seed=s) for s in (5, 6))
    assert not torch.equal(first.order, other.order)


@pytest.mark.parametrize(
    "partition", [p for p in EXACT if not isinstance(p, Pathological | ByLabel)], ids=repr
)
def test_one_worker_owns_all(partition: Partition) -> None:
    assert torch.equal(partition.assign(make(), 1, seed=0).rows(0), torch.arange(997))


@pytest.mark.parametrize("partition", [IID(), Contiguous(), Dirichlet(), ByQuantity(sigma=2.0)], ids=repr)
def test_as_many_workers_as_rows_get_one_row_each(partition: Partition) -> None:
    assert partition.assign(make(rows=50), 50, seed=0).sizes.tolist() == [1] * 50


@pytest.mark.parametrize("partition", [IID(), Contiguous(), ByQuantity(sigma=0.0)], ids=repr)
def test_equal_sizes_differ_by_one_at_most(partition: Partition) -> None:
    sizes = partition.assign(make(), W, seed=2).sizes
    assert sizes.max() - sizes.min() <= 1


def test_contiguous_blocks_are_consecutive() -> None:
    assert torch.equal(Contiguous().assign(make(), W, seed=0).order, torch.arange(997))


def counts(dataset: Dataset, shards: Shards) -> np.ndarray:
    """Rows of each class at each worker, [W, C]."""
    owner = np.repeat(np.arange(shards.num_workers), shards.sizes.numpy())
    table = np.zeros((shards.num_workers, 10), dtype=np.int64)
    np.add.at(table, (owner, dataset.y[shards.order].long().numpy()), 1)
    return table


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 7, 10])
def test_pathological_workers_hold_exactly_c_classes_and_classes_have_equal_numbers_of_holders(
    classes: int,
) -> None:
    data = make(rows=3000)
    held = counts(data, Pathological(classes).assign(data, W, seed=3)) > 0
    assert (held.sum(1) == classes).all()
    assert held.sum(0).max() - held.sum(0).min() <= 1


def test_pathological_classes_are_cut_evenly() -> None:
    table = counts(make(), Pathological(2).assign(make(), W, seed=0))
    for column in table.T:
        assert np.ptp(column[column > 0]) <= 1


def test_pathological_leaves_out_classes_that_nobody_holds() -> None:
    data = make()
    shards = Pathological(2).assign(data, 3, seed=0)
    kept = data.y[shards.order].unique()
    assert len(kept) == 6
    assert len(shards.order) == int(torch.isin(data.y, kept).sum())


@pytest.mark.parametrize("num_workers", [4, 10, W])
def test_by_label_gives_worker_i_the_class_i_mod_c(num_workers: int) -> None:
    data = make()
    table = counts(data, ByLabel().assign(data, num_workers, seed=0))
    for i, row in enumerate(table):
        assert row.nonzero()[0].tolist() == [i % 10]
    for k in range(min(num_workers, 10)):
        holders = table[k::10, k]
        assert holders.sum() == (data.y == k).sum()
        assert np.ptp(holders) <= 1


def test_by_label_of_a_binary_task_has_two_classes() -> None:
    data = make(classes=2, task="binary")
    table = counts(data, ByLabel().assign(data, 5, seed=0))
    assert (table[:, :2] > 0).tolist() == [[i % 2 == 0, i % 2 == 1] for i in range(5)]


def test_dirichlet_shares_have_the_variance_of_a_beta_law() -> None:
    # of two workers the first gets Beta(alpha, alpha) of each class: mean 1/2, variance 1 / (4 (2 alpha + 1))
    alpha, classes, each = 0.7, 4000, 200
    y = torch.arange(classes).repeat_interleave(each)
    x = torch.zeros(len(y), 1)
    data = Dataset(x, y, x[:0], y[:0], classes, "classes", "toy")
    shards = Dirichlet(alpha).assign(data, 2, seed=0)
    share = np.bincount(y[shards.rows(0)].numpy(), minlength=classes) / each
    variance = 1 / (4 * (2 * alpha + 1))
    fourth = variance**2 * 3 * (2 * alpha + 1) / (2 * alpha + 3)  # central moment of Beta(alpha, alpha)
    assert abs(share.mean() - 0.5) < 5 * math.sqrt(variance / classes)
    error = 5 * math.sqrt((fourth - variance**2) / classes) + 1 / each**2
    assert abs(share.var() - variance) < error


def test_dirichlet_of_infinite_alpha_gives_all_workers_the_same_mix() -> None:
    data = make()
    assert np.ptp(counts(data, Dirichlet(alpha=math.inf).assign(data, 7, seed=0)), axis=0).max() <= 1


def test_dirichlet_of_tiny_alpha_gives_a_class_to_one_worker() -> None:
    data = make()
    table = counts(data, Dirichlet(alpha=1e-6).assign(data, 2, seed=0))
    # worker 1 may have been topped up with one row
    assert (np.minimum(table[0], table[1]) <= 1).all()


@pytest.mark.parametrize("alpha", [1e-9, 1e-3, 1.0, 1e6, math.inf])
def test_shares_are_finite_and_sum_to_one(alpha: float) -> None:
    shares = _dirichlet(np.random.default_rng(0), alpha, 50)
    assert np.isfinite(shares).all()
    assert shares.sum() == pytest.approx(1)


def test_cut_is_exact_and_within_one_of_the_shares() -> None:
    shares = _dirichlet(np.random.default_rng(1), 0.5, 200)
    sizes = _cut(12345, shares)
    assert sizes.sum() == 12345
    assert sizes.min() >= 0
    assert np.abs(sizes - 12345 * shares).max() <= 1


@pytest.mark.parametrize("min_size", [1, 2, 5])
def test_top_up_equals_moving_one_row_at_a_time_from_the_largest(min_size: int) -> None:
    worker = np.random.default_rng(min_size).geometric(0.3, 200).clip(1, 30) - 1
    sizes = np.bincount(worker, minlength=30)
    assert sizes.min() < min_size
    expected = sizes.copy()
    while expected.min() < min_size:
        expected[expected.argmin()] += 1
        expected[expected.argmax()] -= 1
    topped = _top_up(worker, 30, min_size)
    assert sorted(np.bincount(topped, minlength=30)) == sorted(expected)
    small = sizes < min_size
    assert (topped[small[worker]] == worker[small[worker]]).all()


def test_log_normal_sizes_have_the_given_spread() -> None:
    data = make(rows=400_000, natural=None)
    sizes = ByQuantity(sigma=0.5).assign(data, 1000, seed=0).sizes.double()
    # of W draws the sample deviation errs by sigma / sqrt(2 W)
    assert abs(sizes.log().std().item() - 0.5) < 5 * 0.5 / math.sqrt(2000)


def test_natural_workers_own_their_rows() -> None:
    data = make(natural=W)
    shards = Natural().assign(data, W, seed=0)
    for i in range(W):
        assert torch.equal(shards.rows(i), torch.arange(i, 997, W))


def test_more_natural_workers_than_workers_are_merged_with_their_neighbours() -> None:
    data = make(natural=7)
    shards = Natural().assign(data, 3, seed=0)
    assert data.workers is not None
    owners = [data.workers[shards.rows(i)].unique().tolist() for i in range(3)]
    assert owners == [[0, 1, 2], [3, 4], [5, 6]]


def test_assignment_may_leave_rows_without_owner() -> None:
    shards = Shards.from_assignment(np.array([2, -1, 0, 2, -1]), 4)
    assert shards.sizes.tolist() == [1, 0, 2, 0]
    assert [shards.rows(i).tolist() for i in range(4)] == [[2], [], [0, 3], []]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.99])
def test_hold_out_keeps_a_share_of_each_worker_back(share: float) -> None:
    shards = ByQuantity(sigma=1.5).assign(make(), W, seed=0)
    train, held = hold_out(shards, share, seed=0)
    for i in range(W):
        together = torch.cat([train.rows(i), held.rows(i)]).sort().values
        assert torch.equal(together, shards.rows(i))
    n = shards.sizes
    assert torch.equal(held.sizes, torch.minimum((share * n + 0.5).long(), n - 1))
    assert train.sizes.min() >= 1


def test_hold_out_keeps_single_rows_and_empty_workers() -> None:
    shards = Shards.from_assignment(np.array([0, 2, 2]), 3)
    train, held = hold_out(shards, 0.9, seed=0)
    assert train.sizes.tolist() == [1, 0, 1]
    assert held.sizes.tolist() == [0, 0, 1]


def test_hold_out_depends_on_the_seed_alone_and_takes_rows_at_random() -> None:
    shards = Contiguous().assign(make(rows=4000), 2, seed=0)
    one, again, other = (hold_out(shards, 0.5, seed=s)[1] for s in (0, 0, 1))
    assert torch.equal(one.order, again.order)
    assert not torch.equal(one.order, other.order)
    # the mean of n / 2 of n numbers 0 .. n - 1 has variance (n + 1) / 12
    assert abs(one.rows(0).double().mean().item() - 999.5) < 5 * math.sqrt(2001 / 12)


@pytest.mark.parametrize(
    ("make_partition", "message"),
    [
        (lambda: Dirichlet(alpha=-1), "Dirichlet: alpha = -1 must be > 0"),
        (lambda: Dirichlet(alpha=math.nan), "alpha = nan must be > 0"),
        (lambda: Dirichlet(min_size=0), "min_size = 0 must be >= 1"),
        (lambda: Pathological(classes=0), "classes = 0 must be >= 1"),
        (lambda: ByQuantity(), "give alpha or sigma"),
        (lambda: ByQuantity(alpha=1.0, sigma=1.0), "give alpha or sigma"),
        (lambda: ByQuantity(alpha=0.0), "alpha = 0.0 must be > 0"),
        (lambda: ByQuantity(sigma=-0.1), "sigma = -0.1 must be >= 0"),
        (lambda: ByQuantity(sigma=math.inf), "sigma = inf must be >= 0 and finite"),
        (lambda: FlowerDatasets("IidPartitioner", ("alpha",)), "option 'alpha' must be 'argument=literal'"),
        (lambda: FlowerDatasets("IidPartitioner", ("alpha=f()",)), "must be 'argument=literal'"),
    ],
)
def test_bad_arguments(make_partition, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_partition()


@pytest.mark.parametrize("partition", EXACT, ids=repr)
def test_more_workers_than_rows(partition: Partition) -> None:
    with pytest.raises(
        ValueError, match="num-workers = 5000 is larger than the 1,347 training rows of toy: "
    ):
        partition.assign(make(rows=1347), 5000, seed=0)
    with pytest.raises(ValueError, match="num-workers = 0 must be >= 1"):
        partition.assign(make(), 0, seed=0)


@pytest.mark.parametrize("partition", [Dirichlet(), Pathological(), ByLabel()], ids=repr)
def test_label_partitions_need_classes(partition: Partition) -> None:
    with pytest.raises(ValueError, match=r"toy has no classes \(task = 'regression'\): take IID"):
        partition.assign(make(task="regression"), 3, seed=0)


@pytest.mark.parametrize(
    ("partition", "data", "num_workers", "message"),
    [
        (Dirichlet(min_size=100), make(), 20, "min_size = 100 for 20 workers needs 2,000 rows, toy has 997"),
        (Pathological(11), make(), 5, "classes = 11 is larger than the 10 classes of toy"),
        (
            ByLabel(),
            make(rows=30),
            30,
            r"workers have no row of toy \(worker \d+, .*\): .* lower num-workers",
        ),
        (Pathological(1), make(rows=30), 30, "workers have no row of toy"),
        (Natural(), make(natural=None), 3, "toy does not say which worker a row comes from"),
        (Natural(), make(natural=3), 5, "num-workers = 5 is larger than the 3 natural workers of toy"),
    ],
    ids=repr,
)
def test_impossible_partitions(partition: Partition, data: Dataset, num_workers: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition.assign(data, num_workers, seed=0)


def test_bad_shards() -> None:
    with pytest.raises(ValueError, match=r"row 1 is owned by worker 3, must be in \[-1, 3\)"):
        Shards.from_assignment(np.array([0, 3]), 3)
    shards = Shards.from_assignment(np.array([0, 1]), 2)
    with pytest.raises(IndexError, match=r"worker 2 must be in \[0, 2\)"):
        shards.rows(2)
    with pytest.raises(ValueError, match=r"share = 1 must be in \[0, 1\)"):
        hold_out(shards, 1, seed=0)


@pytest.mark.parametrize("partition", [*EXACT, FlowerDatasets()], ids=repr)
def test_repr_is_the_expression_that_makes_it(partition: Partition) -> None:
    assert parse("partition", repr(partition)) == partition
    with pytest.raises(dataclasses.FrozenInstanceError):
        partition.alpha = 1  # type: ignore[attr-defined]


def test_flower_datasets_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"install the extra fedsim\[partitioners\]"):
        FlowerDatasets().assign(make(), 3, seed=0)


@pytest.mark.filterwarnings("ignore")  # of the other package
def test_flower_datasets_partitioners() -> None:
    pytest.importorskip("flwr_datasets", reason="flwr-datasets is an optional extra")
    data = make()
    for partition in (
        FlowerDatasets("DirichletPartitioner", ("alpha=0.5", "min_partition_size=2")),
        FlowerDatasets("IidPartitioner", ()),
        FlowerDatasets("NaturalIdPartitioner", ()),
    ):
        shards = partition.assign(data, 60, seed=0)
        assert torch.equal(shards.order.sort().values, torch.arange(997))
        assert torch.equal(shards.order, partition.assign(data, 60, seed=0).order)
    for partition, message in (
        (FlowerDatasets("Iid", ()), "name = 'Iid' must be one of .*IidPartitioner"),
        (FlowerDatasets("IidPartitioner", ("alpha=1",)), "unknown option 'alpha', there are num_partitions"),
        (FlowerDatasets("NaturalIdPartitioner", ()), "makes 60 parts of toy, num-workers is 7"),
    ):
        with pytest.raises(ValueError, match=message):
            partition.assign(data, 7, seed=0)
