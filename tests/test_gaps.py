"""Gaps, their buffer and their span: identities, the rank law, and what float32 does to them."""

from __future__ import annotations

import pytest
import torch

from fedsim import tree
from fedsim.gaps import (
    empty_buffer,
    from_trees,
    gaps,
    newest,
    push,
    subspace,
    subspace_of,
    to_trees,
    with_gram,
)

F64 = torch.float64


def rows_of(m, size=200, seed=0, dtype=torch.float32):
    """Rows that differ by a few thousandths, as after local steps."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=g, dtype=F64) + 2e-3 * torch.randn(m, size, generator=g, dtype=F64)
    return tree.unflatten(x.to(dtype), {"a": torch.zeros(10, 10), "b": torch.zeros(size - 100)})


def filled(counts, capacity, weights=None, size=200, dtype=None):
    buffer = empty_buffer()
    for r, m in enumerate(counts):
        weight = torch.ones(m) if weights is None else weights[r]
        buffer = push(buffer, gaps(rows_of(m, size, r), weight, dtype), r + 1, torch.arange(m), capacity)
    return buffer


@pytest.mark.parametrize(
    "weight", [torch.ones(5), torch.tensor([0.4, 0.25, 0.15, 0.1, 0.1]), torch.arange(5)]
)
def test_weighted_gaps_sum_to_zero(weight):
    """W3."""
    rows = rows_of(5)
    found = gaps(rows, weight, F64)
    p = found.weight
    assert found.values.dtype == F64
    assert (p @ found.values).norm() / found.values.norm(dim=1).max() < 1e-10
    flat = tree.flatten_rows(rows).double()
    torch.testing.assert_close(found.values, flat - (weight / weight.sum()).double() @ flat)
    torch.testing.assert_close(found.gram, found.values @ found.values.T)


def test_float32_gaps_are_rounded_float64_gaps():
    """A subtraction of the float32 mean errs by 3e-4 of a gap; the rank law needs far less (R1)."""
    rows, p = rows_of(8, size=5000), torch.rand(8, generator=torch.Generator().manual_seed(0)) + 0.1
    exact, found = gaps(rows, p, F64), gaps(rows, p)
    assert found.values.dtype == torch.float32
    error = (found.values - exact.values).norm(dim=1) / exact.values.norm(dim=1)
    assert error.max() < 2e-7
    torch.testing.assert_close(
        found.gram, exact.gram, rtol=1e-5, atol=1e-5 * exact.gram.diagonal().max().item()
    )


def test_gaps_do_not_change_rows_in_float64():
    rows = rows_of(4, dtype=F64)
    before = tree.clone(rows)
    gaps(rows, torch.ones(4))
    assert all(torch.equal(rows[k], before[k]) for k in rows)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(
    ("counts", "capacity", "rank"),
    [
        ([16] * 9, 16, 15),
        ([16] * 9, 64, 60),
        ([16] * 9, 128, 120),
        ([6] * 4, 16, 14),
        ([8] * 2, 64, 14),
        ([1] * 5, 8, 0),
        ([5, 3, 1, 7, 2, 4, 6], 17, 14),  # of the last four rounds' 19 gaps 17: three rounds are whole
    ],
)
def test_rank_law(counts, capacity, rank, dtype):
    """W4."""
    weights = [torch.rand(m, generator=torch.Generator().manual_seed(r)) + 0.1 for r, m in enumerate(counts)]
    for w in (None, weights):
        buffer = filled(counts, capacity, w, dtype=dtype)
        assert buffer.rank == rank
        if rank:
            assert subspace(buffer).rank == rank
        else:
            assert buffer.size == 0


def test_first_in_first_out():
    buffer = filled([4, 3, 5], 7)
    assert buffer.round.tolist() == [2, 2, 3, 3, 3, 3, 3]
    assert buffer.worker.tolist() == [1, 2, 0, 1, 2, 3, 4]
    assert buffer.num_rounds == 2
    torch.testing.assert_close(buffer.matrix()[:2], gaps(rows_of(3, seed=1), torch.ones(3)).values[1:])
    assert newest(buffer, 3).worker.tolist() == [2, 3, 4]
    assert newest(buffer, 100) is buffer


def test_gram_matrix_grows_with_the_buffer():
    buffer, whole = empty_buffer(), filled([4, 3, 5, 4], 9, dtype=F64)
    for r, m in enumerate([4, 3, 5, 4]):
        buffer = push(buffer, gaps(rows_of(m, seed=r), torch.ones(m), F64), r + 1, torch.arange(m), 9)
        if r != 2:  # a round may be left out
            buffer = with_gram(buffer)
    wanted = whole.matrix() @ whole.matrix().T
    torch.testing.assert_close(with_gram(buffer).gram, wanted)
    torch.testing.assert_close(with_gram(whole).gram, wanted)


def test_pushing_leaves_the_old_buffer_alone():
    old = filled([4, 4], 8)
    copy = old.matrix().clone()
    push(old, gaps(rows_of(4, seed=9), torch.ones(4)), 3, torch.arange(4), 8)
    assert torch.equal(old.matrix(), copy)


def test_basis_is_orthonormal_and_spans_the_gaps():
    """W17."""
    buffer = filled([6, 6, 6], 16, dtype=F64)
    span = subspace(buffer)
    q = span.basis()
    torch.testing.assert_close(q.T @ q, torch.eye(span.rank, dtype=F64), rtol=0, atol=1e-8)
    d = buffer.matrix()
    torch.testing.assert_close(d @ q @ q.T, d, rtol=0, atol=1e-8 * d.norm().item())
    torch.testing.assert_close(span.coordinates(d).square().sum(0), d.square().sum(1), rtol=1e-8, atol=0)


def test_scaling_gaps_leaves_the_span():
    """W17."""
    d = filled([6, 6, 6], 16, dtype=F64).matrix()
    scale = torch.rand(len(d), 1, generator=torch.Generator().manual_seed(0), dtype=F64) + 0.5
    p, q = (subspace_of(x).basis() for x in (d, scale * d))
    torch.testing.assert_close(p @ p.T, q @ q.T, rtol=0, atol=1e-8)


def test_truncated_span_keeps_the_largest():
    d = torch.diag(torch.tensor([1.0, 5.0, 3.0], dtype=F64))
    q = subspace_of(d, rank=2).basis()
    torch.testing.assert_close(q @ q.T, torch.diag(torch.tensor([0.0, 1.0, 1.0], dtype=F64)))


def test_gaps_of_workers_that_agree_are_not_pushed():
    rows = tree.replicate(tree.take(rows_of(2), 0), 4)
    old = filled([4], 8)
    assert push(old, gaps(rows, torch.ones(4)), 2, torch.arange(4), 8) is old


def test_trees_and_back():
    buffer = with_gram(filled([4, 3, 5], 7))
    trees = tree.unflatten_nested(tree.flatten_nested(to_trees(buffer)))
    back = from_trees(trees)
    assert all(torch.equal(a, b) for a, b in zip(back.blocks, buffer.blocks, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(back[1:], buffer[1:], strict=True))
    assert from_trees({}).size == 0


def test_bad_input():
    with pytest.raises(ValueError, match="capacity = 0 must be >= 1"):
        push(empty_buffer(), gaps(rows_of(3), torch.ones(3)), 1, torch.arange(3), 0)
    with pytest.raises(ValueError, match="no gap that is not zero"):
        subspace(empty_buffer())
    with pytest.raises(ValueError, match="no gap that is not zero"):
        subspace_of(torch.zeros(3, 5))
