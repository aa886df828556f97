"""Compressed updates: their closed forms, the law of error feedback, and bytes counted as sent."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from toys import blobs, registered

import fedsim
from fedsim import BadInput, tree
from fedsim.registry import parse
from fedsim.tree import Stack, Tree
from strategies import Compressed, DiLoCo, FedAvg, LowBit, Report, Rule, State, TopK

W, ROUNDS = 4, 6
LOSSY: list[Compressed] = [
    TopK(share=0.3),
    TopK(DiLoCo(), share=0.1),
    LowBit(bits=4, block=3),
    LowBit(DiLoCo(lr=1.0, momentum=0.5), bits=2, block=100),
    LowBit(bits=3, stochastic=True, seed=1),
]
lossy = pytest.mark.parametrize("rule", LOSSY, ids=repr)


def make_model(seed: int = 0) -> Tree:
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=g, dtype=torch.float64) for k, s in {"w": (3, 2), "b": (4,)}.items()}


def make_report(rule: Rule, workers: list[int]) -> Report:
    m = len(workers)
    ones = torch.ones(m, dtype=torch.int64)
    return Report(
        torch.tensor(workers), torch.zeros(m).double(), rule.weight(torch.arange(1.0, 1.0 + m)), ones, ones
    )


def updates(round: int, workers: list[int]) -> Stack:
    return tree.stack([make_model(100 * round + i) for i in workers])


def play(rule: Rule, workers: list[int]) -> tuple[State, list[Tree]]:
    """Let the same workers move from the model by given updates in each round; returns the state and all models."""
    state, broadcast = rule.init(make_model(), W)
    models = [broadcast["model"]]
    for number in range(1, ROUNDS + 1):
        rows = tree.tree_map(torch.add, updates(number, workers), models[-1])
        state, broadcast = rule.merge(state, rows, make_report(rule, workers))
        models.append(broadcast["model"])
    return state, models


def assert_close(a: object, b: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# --- laws


@pytest.mark.parametrize("inner", [FedAvg(), FedAvg(weighting="uniform"), DiLoCo()], ids=repr)
def test_all_entries_are_the_inner_strategy(inner: Rule) -> None:
    _, expected = play(inner, [0, 1, 2])
    for feedback in (True, False):
        _, found = play(TopK(inner, share=1.0, feedback=feedback), [0, 1, 2])
        assert_close(found, expected)


@lossy
def test_what_was_sent_and_what_is_remembered_are_all_updates(rule: Compressed) -> None:
    # One worker under averaging: the model moves by what it sends.
    rule = replace(rule, inner=FedAvg())
    state, models = play(rule, [2])
    moved = tree.sub(models[-1], models[0])
    total = tree.tree_map(lambda x: x.sum(0), tree.concat([updates(r, [2]) for r in range(1, ROUNDS + 1)]))
    error = state["compressed.error"]
    assert_close(tree.add(moved, tree.take(error, 2)), total)
    assert tree.norm(tree.take(error, 2)) > 0
    assert tree.norm(tree.take(error, torch.tensor([0, 1, 3]))) == 0  # absent workers keep theirs


@lossy
def test_without_feedback_nothing_is_remembered(rule: Compressed) -> None:
    rule = replace(rule, inner=FedAvg(), feedback=False)
    state, models = play(rule, [2])
    assert "compressed.error" not in state
    for number, (before, after) in enumerate(pairwise(models), 1):
        rows = tree.flatten_rows(updates(number, [2]))
        sent = rule.compress(rows, number, torch.tensor([2]))
        assert_close(tree.flatten(tree.sub(after, before)), sent[0])
        assert not torch.allclose(sent, rows)


@lossy
def test_workers_together_are_those_one_by_one(rule: Compressed) -> None:
    rows, worker = torch.randn(5, 11, dtype=torch.float64), torch.tensor([0, 1, 4, 6, 9])
    together = rule.compress(rows, 3, worker)
    alone = [rule.compress(rows[i : i + 1], 3, worker[i : i + 1])[0] for i in range(5)]
    assert_close(together, torch.stack(alone), tolerance=0.0)


@lossy
def test_nothing_is_sent_of_nothing(rule: Compressed) -> None:
    zero = torch.zeros(2, 7, dtype=torch.float64)
    assert_close(rule.compress(zero, 1, torch.arange(2)), zero, tolerance=0.0)


def test_feedback_reaches_the_minimum_where_its_absence_does_not() -> None:
    # Two workers pull the first of two entries in opposite directions harder than both pull the second one; only the
    # larger entry of each is sent, and without memory the second never moves.
    target = torch.tensor([[3.0, 1.0], [-3.0, 1.0]], dtype=torch.float64)

    def end(feedback: bool) -> Tensor:
        rule = TopK(share=0.5, feedback=feedback)
        state, broadcast = rule.init({"x": torch.zeros(2, dtype=torch.float64)}, 2)
        for _ in range(300):
            x = broadcast["model"]["x"]
            state, broadcast = rule.merge(
                state, {"x": x + 0.05 * (target - x)}, make_report(FedAvg(weighting="uniform"), [0, 1])
            )
        return broadcast["model"]["x"]

    minimum = target.mean(0)
    assert (end(False) - minimum).norm() > 0.9
    assert (end(True) - minimum).norm() < 0.2


# --- closed forms


def test_the_largest_entries_are_sent_exactly() -> None:
    row = torch.tensor([[0.5, -3.0, 2.0, 0.1, -0.2]], dtype=torch.float64)
    kept = [[0.0, -3.0, 2.0, 0.0, 0.0]]
    assert TopK(share=0.4).compress(row, 1, torch.zeros(1)).tolist() == kept
    assert TopK(share=1e-9).compress(row, 1, torch.zeros(1)).tolist() == [[0.0, -3.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_top_k_is_a_contraction(share: float) -> None:
    row = torch.randn(3, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left = row - TopK(share=share).compress(row, 1, torch.arange(3))
    assert bool((left.square().sum(1) <= (1 - share) * row.square().sum(1)).all())


def test_entries_are_multiples_of_the_scale_of_their_block() -> None:
    row = torch.tensor([[7.0, 2.4, -2.6, 0.0, 14.0, -9.1, 70.0]], dtype=torch.float64)
    # Blocks of three: scales 7 / 7, 14 / 7 and 70 / 7.
    expected = [[7.0, 2.0, -3.0, 0.0, 14.0, -10.0, 70.0]]
    found = LowBit(bits=4, block=3).compress(row, 1, torch.zeros(1))
    assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_rounding_errs_by_half_a_step_at_most(bits: int) -> None:
    row = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = row.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    error = (LowBit(bits=bits, block=64).compress(row, 1, torch.arange(3)) - row).abs() / step
    assert error.max() <= 0.5 + 1e-9
    assert error.max() > 0.25


def test_stochastic_rounding_is_right_on_average() -> None:
    row = torch.tensor([1.0, 0.3, -0.45, 0.0, -0.99], dtype=torch.float64)
    rule, n = LowBit(bits=3, stochastic=True), 4000  # a step is 1 / 3
    found = torch.cat([rule.compress(row.expand(n, -1), r, torch.arange(n)) for r in (1, 2)])
    # The standard deviation of one draw is at most half a step.
    assert (found.mean(0) - row).abs().max() < 5 * (1 / 6) / math.sqrt(2 * n)
    assert {round(3 * x) for x in found[:, 1].tolist()} == {0, 1}
    assert_close(found[:, 0], torch.ones(2 * n, dtype=torch.float64))
    assert not torch.equal(found[:n], found[n:])


@pytest.mark.parametrize(
    ("rule", "entries", "expected"),
    [
        (TopK(share=0.01), 1000, 10 * 4 + 10 * 4),
        (TopK(share=0.5), 1000, 500 * 4 + 125),  # a bit an entry is less than 4 bytes a place
        (LowBit(bits=8, block=256), 1000, 1000 + 4 * 4),
        (LowBit(bits=4, block=100), 999, 500 + 10 * 4),
    ],
    ids=repr,
)
def test_bytes_of_an_update(rule: Compressed, entries: int, expected: int) -> None:
    assert rule.num_bytes(entries, 4) == expected


# --- runs


def test_bytes_and_seconds_of_a_run_are_those_of_compressed_rows() -> None:
    with registered():

        def last(strategy: str) -> dict:
            e = blobs(strategy=strategy, network="Network(step=0.0, bandwidth=8.0)", rounds=2)
            *_, (snapshot, _) = fedsim.rounds(e)
            return snapshot.metrics

        plain, few = last("FedAvg()"), last("TopK(FedAvg(), share=0.25)")
    entries = 3 * 4 + 4 + 4 * 2 + 2
    k = round(0.25 * entries)
    row, sent = 8 * entries, 8 * k + min(4 * k, math.ceil(entries / 8))
    assert plain["bytes_up"] == plain["bytes_down"] == few["bytes_down"] == 2 * 5 * row
    assert few["bytes_up"] == 2 * 5 * sent
    assert plain["sim_time"] == 2 * 2 * row / 8
    assert few["sim_time"] == 2 * (row + sent) / 8


@pytest.mark.parametrize(
    "strategy", ["TopK(DiLoCo(), share=0.2)", "LowBit(FedAvg(), bits=4, stochastic=True)"]
)
def test_runs_are_equal_on_one_node_and_two_under_every_plan(strategy: str) -> None:
    with registered():
        ends = []
        for settings in ({"plan": "stacked"}, {"plan": "loop"}, {"nodes": 2}):
            *_, (snapshot, _) = fedsim.rounds(blobs(strategy=strategy, client="AdamW(lr=0.05)", **settings))
            ends.append(snapshot.model)
    assert_close(ends[1], ends[0], tolerance=1e-9)
    assert_close(ends[2], ends[0], tolerance=1e-9)


def test_workers_keep_states_as_the_inner_strategy_says() -> None:
    assert parse("strategy", "TopK(DiLoCo())").keeps_state
    assert not parse("strategy", "TopK(FedAvg())").keeps_state


def test_resuming_gives_the_same_run(tmp_path) -> None:
    with registered():
        e = blobs(strategy="TopK(DiLoCo(), share=0.2)", client="AdamW(lr=0.05)", out=str(tmp_path / "whole"))
        whole = fedsim.run(e, draw=False)
        half = fedsim.run(e.replace({"rounds": 2, "out": str(tmp_path / "half")}), draw=False)
        rest = fedsim.resume(half.path, changes={"rounds": e.rounds}, draw=False)
    assert_close(rest.model, whole.model, tolerance=0.0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("TopK(share=0.0)", r"TopK: share = 0\.0 must be in \(0, 1\]"),
        ("LowBit(bits=1)", "LowBit: bits = 1 must be from 2 to 16"),
        ("LowBit(block=0)", "LowBit: block = 0 must be >= 1"),
        (
            "TopK(ElasticAveraging())",
            "TopK: inner = .* must be a strategy whose workers start from its model and",
        ),
        ("LowBit(TopK())", "LowBit: inner = .* must be a strategy whose workers start from its model and"),
        ("TopK(Scaffold())", "TopK: inner = .* must be a strategy whose workers start from its model and"),
    ],
)
def test_bad_arguments_are_one_line(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says) as caught:
        parse("strategy", text)
    assert "\n" not in str(caught.value)
