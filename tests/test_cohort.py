"""A cohort of workers: results do not depend on how workers are spread, grouped or numbered, and stay finite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.func import functional_call
from toys import blobs, quadratics, registered

from fedsim import cohort as engine
from fedsim import tree
from fedsim.carriers import InProcess
from fedsim.cohort import Cohort
from fedsim.data import Shards
from fedsim.experiment import BadInput, Experiment
from fedsim.federation import load
from fedsim.probes import Snapshot
from fedsim.simulate import RunFailed, rounds
from fedsim.tree import Tree


@pytest.fixture(autouse=True)
def _own_components() -> Iterator[None]:
    with registered():
        yield


HUGE = {"data": "Quadratics(a=(1.0, 1e200, 0.5, 1.5))", "local_steps": 4}
RUNS: dict[str, dict] = {
    "federated averaging": {"participation": 0.6},
    "uneven epochs": {"local_steps": 0, "local_epochs": 2, "client": "AdamW(lr=0.1)", "strategy": "FedAdam()"},
    "full batches": {"batch_size": 0, "strategy": "LocalGD()", "client": "Prox(SGD(lr=0.1), mu=0.5)"},
    "rows are kept": {"strategy": "Elastic()", "client": "AdamW(lr=0.1)", "local_steps": 0, "local_epochs": 1},
    "state is kept": {"strategy": "Remembering()", "client": "Averaged()", "participation": 0.4},
    "median": {"strategy": "FedMedian()", "client": "SGD(lr=0.1, momentum=0.9)", "replacement": True},
    "held-out rows": {"holdout": 0.3, "model": "MLP(hidden=(3,), activation='gelu')", "plan": "stacked"},
}  # fmt: skip
every = pytest.mark.parametrize("settings", RUNS.values(), ids=list(RUNS))


def _run(experiment: Experiment) -> list[Snapshot]:
    return [snapshot for snapshot, _ in rounds(experiment)]


def _close(a: Tree, b: Tree, tolerance: float = 1e-12) -> None:
    assert list(a) == list(b)
    for name, x in b.items():
        torch.testing.assert_close(a[name], x, rtol=tolerance, atol=tolerance, msg=name)


def _same(a: list[Snapshot], b: list[Snapshot], rows: bool = True) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        _close(x.model, y.model)
        assert x.metrics.keys() == y.metrics.keys()
        for k, value in y.metrics.items():
            assert x.metrics[k] == pytest.approx(value, rel=1e-11), k
        for p, q in zip(x.report, y.report, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-11)
        if rows:
            _close(x.rows, y.rows)
            _close(x.after, y.after)


# ------------------------------------------------------------------------------ spread over nodes


@every
@pytest.mark.parametrize("nodes", [3, 5])
def test_nodes_change_nothing(settings: dict, nodes: int) -> None:
    experiment = blobs(**settings, probes="WorkerLoss(); Drift()")
    _same(_run(experiment), _run(experiment.replace({"nodes": nodes})))


@every
def test_chunks_change_nothing(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = blobs(**settings)
    for changed in (experiment, experiment.replace({"probes": "Drift()"})):
        monkeypatch.undo()
        whole = _run(changed)
        monkeypatch.setattr(engine, "memory_budget", lambda device: 1)  # one worker at a time
        _same(whole, _run(changed), rows=bool(changed.probes))


def test_memory_cuts_the_cohort_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = blobs()
    federation = load(experiment)
    cohort = Cohort(experiment, federation, 0, 5)
    # six copies of the parameters and three of the minibatch's features, in bytes of float64
    worker = 8 * (6 * tree.num_parameters(federation.theta) + 3 * 3 * 3)
    for budget, sizes in ((5 * worker, [5]), (5 * worker - 1, [4, 1]), (2 * worker, [2, 2, 1]), (1, [1] * 5)):
        monkeypatch.setattr(engine, "memory_budget", lambda device, b=budget: b)
        assert [len(part) for part in cohort._chunks(torch.arange(5))] == sizes
    assert engine.memory_budget(torch.device("cpu")) > 0


@pytest.mark.parametrize("strategy", ["FedAvg()", "FedAvg(weighting='uniform')", "FedAvgM()", "FedYogi()"])
def test_means_of_groups_are_as_good_as_rows(strategy: str) -> None:
    experiment = blobs(strategy=strategy, nodes=2, participation=0.8)
    means, rows = _run(experiment), _run(experiment.replace({"probes": "Drift()"}))
    for x, y in zip(means, rows, strict=True):
        assert (tree.num_rows(x.rows), tree.num_rows(y.rows)) == (2, 4)
        assert x.before is None
        assert y.before is not None
        _close(x.model, y.model)
        assert x.metrics["train_loss"] == pytest.approx(y.metrics["train_loss"], rel=1e-12)


def test_a_node_that_knows_only_its_own_workers_is_the_cohort() -> None:
    experiment = blobs(holdout=0.3, local_steps=0, local_epochs=2)
    whole = load(experiment)
    part = whole._replace(train=_tail(whole.train, 2), held=_tail(whole.held, 2), first=2)
    workers = torch.tensor([2, 4])
    broadcast = {"model": whole.theta}
    a = Cohort(experiment, whole, 0, 5).train(1, workers, broadcast)
    b = Cohort(experiment, part, 2, 5).train(1, workers, broadcast)
    _close(a.rows, b.rows)
    assert [x.tolist() for x in a.report] == [x.tolist() for x in b.report]
    a, b = (Cohort(experiment, f, 2, 5).evaluate(whole.theta) for f in (whole, part))
    assert [x.tolist() for x in a] == [x.tolist() for x in b]


def _tail(shards: Shards, first: int) -> Shards:
    start = shards.offsets[first]
    return Shards(shards.order[start:], shards.offsets[first:] - start)


def test_renaming_workers_renames_results() -> None:
    experiment = blobs(batch_size=0, probes="Drift()", strategy="FedAvg()", rounds=2)
    there, back = _run(experiment), _run(experiment.replace({"partition": "Owned(reverse=True)"}))
    for x, y in zip(there, back, strict=True):
        _close(x.model, y.model)
        _close(x.rows, tree.take(y.rows, torch.arange(4, -1, -1)))
        torch.testing.assert_close(x.report.loss, y.report.loss.flip(0))


def test_workers_without_rows_are_bad_input() -> None:
    experiment = blobs()
    federation = load(experiment)
    shards = Shards(torch.arange(31), torch.tensor([0, 0, 11, 20, 20, 31]))
    message = r"partition = 'Owned\(\)': 2 workers have no rows, the first is 0; each needs at least one"
    with pytest.raises(BadInput, match=message):
        Cohort(experiment, federation._replace(train=shards), 0, 5)


# --------------------------------------------------------------------------- kept rows and states


@pytest.mark.parametrize("strategy", ["Elastic()", "Remembering()"])
def test_those_who_do_not_take_part_keep_what_they_have(strategy: str) -> None:
    experiment = blobs(strategy=strategy, client="Averaged()")
    federation = load(experiment)
    cohort, broadcast = Cohort(experiment, federation, 0, 5), {"model": federation.theta}
    cohort.train(1, torch.tensor([1, 3]), broadcast)
    first = cohort.checkpoint()
    assert first["state/count"].tolist() == [1, 4, 1, 4, 1]
    cohort.train(2, torch.tensor([0, 3]), broadcast)
    second = cohort.checkpoint()
    assert second["state/count"].tolist() == [4, 4, 1, 7, 1]
    for name, x in first.items():
        unmoved = [bool((x[w] == second[name][w]).all()) for w in range(5)]
        assert unmoved == [False, True, True, False, True], name
        theta = federation.theta.get(name.removeprefix("rows/").removeprefix("state/mean/"))
        if theta is not None:
            assert torch.equal(second[name][2], theta)
            assert torch.equal(second[name][4], theta)
    assert ("rows/1.weight" in first) == (strategy == "Elastic()")


def test_what_is_kept_can_be_put_back() -> None:
    experiment = blobs(strategy="Elastic()", client="AdamW(lr=0.1)")
    federation = load(experiment)
    broadcast, everyone = {"model": federation.theta}, torch.arange(5)
    one, two = (Cohort(experiment, federation, 0, 5) for _ in range(2))
    one.train(1, everyone, broadcast)
    one.adopt(broadcast)
    saved = one.checkpoint()
    two.restore(saved)
    a, b = (c.train(2, everyone, broadcast) for c in (one, two))
    _close(a.rows, b.rows, 0)
    assert set(saved) == {f"rows/{k}" for k in federation.theta} | {"state/count"} | {
        f"state/{m}/{k}" for m in "mv" for k in federation.theta
    }
    plain = Cohort(blobs(), federation, 0, 5)
    plain.train(1, everyone, broadcast)
    plain.adopt(broadcast)
    assert plain.checkpoint() == {}


def test_adopting_moves_rows_before_the_first_round_too() -> None:
    experiment = blobs(strategy="Elastic()")
    federation = load(experiment)
    cohort = Cohort(experiment, federation, 2, 5)
    cohort.adopt({"model": tree.zeros_like(federation.theta)})
    for i, worker in enumerate((2, 3, 4)):
        expected = tree.scale(0.5 + 1 / (2 + worker), federation.theta)
        _close({k: cohort.checkpoint()[f"rows/{k}"][i] for k in expected}, expected)


# ------------------------------------------------------------------------- workers that diverge


@pytest.mark.parametrize("strategy", ["LocalGD()", "FedMedian()", "Elastic()"])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("nodes", [1, 4])
def test_a_worker_that_is_not_finite_is_left_out_and_named(
    strategy: str, chunked: bool, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunked:
        monkeypatch.setattr(engine, "memory_budget", lambda device: 1)
    found = _run(quadratics(**HUGE, strategy=strategy, nodes=nodes))
    three = {"data": "Quadratics(a=(1.0, 0.5, 1.5), b=(0.0, -1.0, 2.0), rows=(1, 1, 1))", "num_workers": 3}
    expected = _run(quadratics(**{**HUGE, **three, "strategy": strategy}))
    assert len(found) == 3
    for x, y in zip(found, expected, strict=True):
        assert x.excluded == x.metrics["excluded"] == [1]
        assert "excluded" not in y.metrics
        assert x.metrics["participants"] == 3
        assert x.report.worker.tolist() == [0, 2, 3]
        assert all(bool(torch.isfinite(leaf).all()) for leaf in (*x.rows.values(), *x.model.values()))
        if strategy != "Elastic()":  # whose pull depends on the worker's number
            _close(x.model, y.model)
            assert x.metrics["train_loss"] == pytest.approx(y.metrics["train_loss"], rel=1e-12)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("strategy", ["LocalGD()", "FedMedian()"])
def test_a_run_without_finite_workers_fails_and_says_where(
    strategy: str, nodes: int, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunked:
        monkeypatch.setattr(engine, "memory_budget", lambda device: 1)
    experiment = quadratics(client="SGD(lr=1e60)", rounds=9, local_steps=2, nodes=nodes, strategy=strategy)
    seen = []
    message = r"round 2: .* all 4 workers are not finite; the last good model is that of round 1; a smaller"
    with pytest.raises(RunFailed, match=message) as error:
        seen += [snapshot.round for snapshot, _ in rounds(experiment)]
    assert "\n" not in str(error.value)


def test_what_a_worker_keeps_stays_finite() -> None:
    experiment = quadratics(**HUGE, strategy="Elastic()", client="SGD(lr=0.1, momentum=0.5)")
    federation = load(experiment)
    cohort = Cohort(experiment, federation, 0, 4)
    trained = cohort.train(1, torch.arange(4), {"model": federation.theta})
    assert trained.excluded == [1]
    kept = cohort.checkpoint()
    assert kept["rows/0.weight"][1].item() == 1.5
    assert kept["state/velocity/0.weight"][1].item() == 0
    assert bool((kept["state/velocity/0.weight"][[0, 2, 3]] != 0).all())


# ------------------------------------------------------------------------------------- evaluation


def test_workers_are_evaluated_on_their_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "EVALUATION_ROWS", 4)
    experiment = blobs(holdout=0.12)  # 0.12 * (7, 4, 9, 5, 6): one row each but for worker 1
    federation = load(experiment)
    found = Cohort(experiment, federation, 0, 5).evaluate(federation.theta)
    assert found.worker.tolist() == [0, 2, 3, 4]
    for i, worker in enumerate(found.worker.tolist()):
        rows = federation.held.rows(worker)
        x, y = federation.dataset.x[rows], federation.dataset.y[rows]
        output = functional_call(federation.module, federation.theta, (x,))
        assert found.loss[i].item() == pytest.approx(torch.nn.functional.cross_entropy(output, y).item())
        assert found.accuracy[i].item() == (output.argmax(1) == y).double().mean().item()
    parts = [Cohort(experiment, federation, a, b).evaluate(federation.theta) for a, b in ((0, 2), (2, 5))]
    for x, *pair in zip(found, *parts, strict=True):
        assert torch.cat(pair).tolist() == x.tolist()


def test_evaluation_without_rows_is_empty() -> None:
    experiment = quadratics()
    federation = load(experiment)
    found = Cohort(experiment, federation, 0, 4).evaluate(federation.theta)
    assert [len(x) for x in found] == [0, 0, 0]
    assert [len(x) for x in engine.evaluate(federation, federation.theta)] == [0, 0]
    loss, correct = engine.evaluate(federation, federation.theta, torch.tensor([3, 1]))
    assert loss.tolist() == pytest.approx([1.5 * 0.25 / 2, 2 * 0.25 / 2])
    assert bool(correct.isnan().all())


# ------------------------------------------------------------------------------------------ plans


@pytest.mark.parametrize(
    ("settings", "plans"),
    [
        ({"model": "MLP(hidden=(3,), activation='tanh')"}, {"stacked"}),
        ({"model": "MLP(hidden=(3,), activation='gelu')"}, {"stacked", "loop"}),
        ({"data": "Digits()", "partition": "IID()", "model": "SmallCNN((2,))", "batch_size": 4}, {"stacked", "loop"}),
    ],
)  # fmt: skip
def test_auto_takes_a_plan_that_can_run_the_model(settings: dict, plans: set[str]) -> None:
    experiment = blobs(**settings, rounds=1)
    federation = load(experiment)
    carrier = InProcess(experiment, federation)
    assert carrier.plan == "auto"
    found = next(rounds(experiment, federation, carrier))[0]
    assert carrier.plan in plans
    again = next(rounds(experiment.replace({"plan": "vmap"}), federation))[0]
    _close(found.model, again.model, 1e-10)


def test_models_without_stacked_layers_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsim.stacked import _LAYERS

    monkeypatch.delitem(_LAYERS, torch.nn.GELU)
    experiment = blobs(model="MLP(hidden=(3,), activation='gelu')", rounds=1)
    federation = load(experiment)
    carrier = InProcess(experiment, federation)
    next(rounds(experiment, federation, carrier))
    assert carrier.plan in {"vmap", "loop"}


def test_a_plan_can_be_set_from_outside() -> None:
    experiment = blobs(nodes=2)
    carrier = InProcess(experiment, load(experiment))
    carrier.use_plan("loop")
    assert [cohort.plan_name for cohort in carrier.cohorts] == ["loop", "loop"]
