"""A round recorded once and replayed equals one made step by step; rounded factors are as far off as they may be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_plans import CPU, F64, TABLE, W, _assert_equal, _leaves, _work

import fedsim
from clients import SGD
from fedsim import captured, random, tree
from fedsim.batches import Sampler
from fedsim.captured import Captured
from fedsim.data import Shards
from fedsim.experiment import BadInput, Experiment
from fedsim.models import MLP, SmallCNN, Transformer
from fedsim.objectives import CrossEntropy
from fedsim.plans import PLANS, Done, Work
from fedsim.precision import products
from fedsim.tree import Tree


def remember(run: Callable[[], Done]) -> tuple[Callable[[], None], Done]:
    """Stand in for a CUDA graph: run again with the numbers and the tensors of the first time, into the same places."""
    done = run()
    places = tree.flatten_nested({"done": _all(done)})

    def replay() -> None:
        for k, x in tree.flatten_nested({"done": _all(run())}).items():
            places[k].copy_(x)

    return replay, done


def _all(done: Done) -> dict:
    optional = {k: x for k, x in (("losses", done.losses), ("idle", done.idle)) if x is not None}
    return {"rows": done.rows, "state": done.state, "loss": done.loss, "gradients": done.gradients} | optional


def later(work: Work, name: str, round: int) -> Work:
    """Another round of the same workers: other minibatches, noise, parameters and broadcast."""
    how = TABLE[name][3]
    sizes = [5, 3, 9, 4]
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(4))
    batches = Sampler(Shards(order, torch.tensor([0, *sizes]).cumsum(0)), how, CPU).draw(
        round, torch.arange(W)
    )
    moved = tree.tree_map(lambda x: x + 0.01 * round, work.anchor)
    model = tree.tree_map(lambda x: x - 0.02 * round, work.broadcast["model"])
    stream = random.key(1, "steps", round)
    return work._replace(batches=batches, anchor=moved, broadcast={"model": model}, stream=stream)


@pytest.mark.parametrize("name", list(TABLE))
def test_a_recorded_round_equals_one_made_step_by_step(name: str) -> None:
    spec, objective, rule, how, shape, outputs, task = TABLE[name]
    module, work = _work(spec, rule, how, shape, outputs, task)
    plan = Captured(module, objective, rule, F64, remember)
    earlier: list[tuple[Tree, Tree]] = []
    for round in (1, 2, 3):
        now = later(work, name, round)
        expected = _leaves(PLANS["loop"](module, objective, rule, F64).run(now))
        found = _leaves(plan.run(now))
        _assert_equal(found, expected)
        earlier.append((found, tree.clone(found)))
    for found, copy in earlier:  # a replay leaves earlier results alone
        _assert_equal(found, copy, 0)
    assert len(plan._known) == 1


def test_each_shape_is_recorded_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "MOST", 2)
    spec, objective, rule, how, shape, outputs, task = TABLE["momentum"]
    module, work = _work(spec, rule, how, shape, outputs, task)
    plan = Captured(module, objective, rule, F64, remember)
    for workers in (4, 3, 2):
        part = slice(workers)
        active = [min(a, workers) for a in work.batches.active]
        batches = work.batches._replace(
            order=work.batches.order[part],
            steps=work.batches.steps[part],
            active=active,
            rows=work.batches.rows[part],
            valid=None if work.batches.valid is None else work.batches.valid[part],
        )
        now = work._replace(
            anchor=tree.take(work.anchor, part),
            state=tree.map_nested(lambda x, part=part: x[part], work.state),
            batches=batches,
            worker=work.worker[part],
        )
        _assert_equal(_leaves(plan.run(now)), _leaves(PLANS["loop"](module, objective, rule, F64).run(now)))
    assert len(plan._known) == 2


def test_what_cannot_be_recorded_runs_step_by_step() -> None:
    spec, objective, rule, how, shape, outputs, task = TABLE["momentum"]
    module, work = _work(spec, rule, how, shape, outputs, task)

    def refuse(run: Callable[[], Done]) -> tuple[Callable[[], None], Done]:
        raise RuntimeError("operation not permitted when stream is capturing")

    plan = Captured(module, objective, rule, F64, refuse)
    expected = _leaves(PLANS["stacked"](module, objective, rule, F64).run(work))
    with pytest.warns(UserWarning, match="plan = 'graph': not recorded, .*: operation not permitted"):
        _assert_equal(_leaves(plan.run(work)), expected, 0)
    _assert_equal(_leaves(plan.run(work)), expected, 0)  # and says so once

    def pull(t: int, rows: Tree, at: slice, own: bool) -> Tree:
        return tree.tree_map(lambda x: 0.5 * x, rows)

    acting = work._replace(follow=pull)
    plan = Captured(module, objective, rule, F64, refuse)
    _assert_equal(
        _leaves(plan.run(acting)), _leaves(PLANS["stacked"](module, objective, rule, F64).run(acting)), 0
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_graph_needs_a_gpu() -> None:
    e = Experiment(num_workers=2, rounds=1, plan="graph", device="cpu")
    with pytest.raises(
        BadInput, match=r"^plan = 'graph': needs a CUDA device, and this is 'cpu'; use 'auto'$"
    ):
        next(iter(fedsim.rounds(e)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("model", ["MLP(hidden=(8,))", "SmallCNN(channels=(4,))"])
def test_a_graph_on_a_gpu_gives_the_history_of_the_cpu(model: str) -> None:
    e = Experiment(num_workers=5, rounds=3, model=model, dtype="float64", partition="IID()", local_steps=3)
    losses = {}
    for device, plan in (("cpu", "loop"), ("cuda", "graph"), ("cuda", "stacked")):
        run = fedsim.rounds(e.replace({"device": device, "plan": plan}))
        losses[plan, device] = [s.metrics["test_loss"] for s, _ in run]
    expected = losses.pop(("loop", "cpu"))
    assert all(found == pytest.approx(expected, rel=1e-9) for found in losses.values())


PRODUCTS = [
    (MLP((16,)), "classes", (8,)),
    (SmallCNN((4,)), "classes", (1, 4, 4)),
    (Transformer(1, 8, 2, 1), "tokens", (3,)),
]


@pytest.mark.parametrize("plan", ["stacked", "vmap", "loop"])
@pytest.mark.parametrize(("spec", "task", "shape"), PRODUCTS, ids=["mlp", "cnn", "transformer"])
def test_rounded_factors_are_near(
    spec: MLP, task: str, shape: tuple[int, ...], plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A factor is off by at most 2^-8 of itself, and a gradient is made of a few products: within a few times that."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # threads do not inherit the precision
    f32 = torch.float32
    objective = CrossEntropy(tokens=task == "tokens")
    module, work = _work(spec, SGD(1.0), TABLE["one step"][3], shape, 5, task)
    lower = {"anchor": tree.tree_map(lambda x: x.to(f32), work.anchor), "broadcast": {}}
    work = work._replace(**lower, x=work.x.to(f32) if work.x.is_floating_point() else work.x)
    module = module.to(f32)
    moved = {}
    for precision in ("full", "bfloat16"):
        with products(precision, CPU):
            done = PLANS[plan](module, objective, SGD(1.0), f32).run(work)
        assert all(x.dtype == f32 for x in done.rows.values())
        moved[precision] = tree.flatten(tree.tree_map(torch.sub, done.rows, work.anchor))
    error = (moved["bfloat16"] - moved["full"]).norm() / moved["full"].norm()
    assert 0 < error < 8 * 2**-8


def test_a_run_with_rounded_factors(tmp_path) -> None:
    e = Experiment(num_workers=10, rounds=15, client="Prox(SGD(lr=0.1), 0.01)", eval_every=15)
    full, rounded = (
        fedsim.run(e.replace({"precision": p, "out": str(tmp_path / p)}), draw=False).summary["test_loss"]
        for p in ("full", "bfloat16")
    )
    assert full != rounded == pytest.approx(full, rel=0.02)


def test_rounded_factors_of_float64_are_refused() -> None:
    with pytest.raises(
        BadInput, match=r"^precision = 'bfloat16': needs dtype = 'float32', it is 'float64'; use"
    ):
        Experiment(precision="bfloat16", dtype="float64")
