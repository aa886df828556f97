"""Whole runs: golden vectors, closed forms, reductions, interruption, counters, and what a snapshot says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad
from toys import A, B, blobs, quadratics, registered

from fedsim import tree
from fedsim.carriers import Answers, InProcess
from fedsim.cohort import Upload
from fedsim.errors import BadInput
from fedsim.experiment import Experiment
from fedsim.federation import Federation, load
from fedsim.network import Network, num_bytes
from fedsim.probes import Clock, Snapshot
from fedsim.registry import parse
from fedsim.schedule import participants
from fedsim.simulate import Position, RunFailed, rounds
from fedsim.tree import Tree
from strategies import Broadcast, Report, Traffic

GOLDEN = 1e-9


@pytest.fixture(autouse=True)
def _own_components() -> Iterator[None]:
    with registered():
        yield


def _models(experiment: Experiment) -> list[float]:
    return [snapshot.model["0.weight"].item() for snapshot, _ in rounds(experiment)]


def _last(experiment: Experiment) -> Snapshot:
    *_, (snapshot, _) = rounds(experiment)
    return snapshot


def _close(a: Tree, b: Tree, tolerance: float = 1e-12) -> None:
    for name, x in b.items():
        torch.testing.assert_close(a[name], x, rtol=tolerance, atol=tolerance, msg=name)


# ---------------------------------------------------------------------------------- golden vectors

WEIGHTED = {"data": "Quadratics(rows=(1, 2, 3, 4))", "strategy": "FedAvg()"}
VECTORS: dict[str, tuple[dict, list[float]]] = {
    "W1 gradient descent": ({"local_steps": 1}, [1.425, 1.359375, 1.301953125]),
    "W1 by samples": ({"local_steps": 1, "strategy": "FedAvg()"}, [1.425, 1.359375, 1.301953125]),
    "W1 epochs": ({"local_steps": 0, "local_epochs": 1}, [1.425, 1.359375, 1.301953125]),
    "W2 Local SGD": ({}, [1.29646875, 1.1584491211, 1.0648545602]),
    "W2 minibatches of one": ({"strategy": "FedAvg()", "batch_size": 1}, [1.29646875, 1.1584491211, 1.0648545602]),
    "W2 weighted": (WEIGHTED, [1.38075625, 1.2998896104, 1.2450488879]),
    "W6 FedProx": ({"client": "Prox(SGD(lr=0.1), mu=0.4)", "rounds": 2}, [1.30474875, 1.1697471545]),
    "W8 FedAvgM": ({"strategy": "FedAvgM(lr=1.0, momentum=0.9)"}, [1.29646875, 0.9752709961, 0.6515589157]),
    "W9 FedAdam": ({"strategy": "FedAdam()"}, [1.4047915302, 1.2759951433, 1.1282755455]),
    "W10 FedYogi": ({"strategy": "FedYogi()"}, [1.4047926230, 1.2763585494, 1.1295359258]),
    "W11 FedAdagrad": ({"strategy": "FedAdagrad()"}, [1.4004901180, 1.3362947250, 1.2871498601]),
}  # fmt: skip


@pytest.mark.parametrize("where", [{}, {"nodes": 3}, {"plan": "loop"}, {"plan": "vmap"}], ids=str)
@pytest.mark.parametrize(("settings", "expected"), VECTORS.values(), ids=list(VECTORS))
def test_golden_vectors(settings: dict, expected: list[float], where: dict) -> None:
    assert _models(quadratics(**settings, **where)) == pytest.approx(expected, abs=GOLDEN)


@pytest.mark.parametrize(
    ("client", "expected"), [("SGD(lr=0.1)", 0.8676699029), ("Prox(SGD(lr=0.1), mu=0.4)", 0.8672486430)]
)
def test_local_steps_stop_at_their_biased_fixed_point(client: str, expected: float) -> None:
    """A3: with ``w_i = (1 - (1 - eta (a_i + mu))^H) a_i / (a_i + mu)`` at ``sum_i w_i b_i / sum_i w_i``."""
    mu = 0.4 if "mu" in client else 0.0
    w = [(1 - (1 - 0.1 * (a + mu)) ** 3) * a / (a + mu) for a in A]
    found = _models(quadratics(client=client, rounds=80, eval_every=0))[-1]
    assert found == pytest.approx(sum(x * b for x, b in zip(w, B, strict=True)) / sum(w), abs=GOLDEN)
    assert found == pytest.approx(expected, abs=GOLDEN)


def test_one_full_step_a_round_is_centralised_gradient_descent() -> None:
    """A2: workers weighted by their rows, against one worker that owns all."""
    many = blobs(local_steps=1, batch_size=0, rounds=6)
    one = many.replace({"num_workers": 1, "partition": "Contiguous()"})
    federation = load(many)
    theta, data = federation.theta, federation.dataset

    def loss(theta: Tree) -> Tensor:
        return torch.nn.functional.cross_entropy(functional_call(federation.module, theta, (data.x,)), data.y)

    for (x, _), (y, _) in zip(rounds(many), rounds(one), strict=True):
        assert x.metrics["train_loss"] == pytest.approx(loss(theta).item(), rel=1e-12)
        theta = tree.axpy(-0.3, grad(loss)(theta), theta)
        _close(x.model, theta)
        _close(y.model, theta)


REDUCTIONS = {
    "Prox(mu=0) is the inner rule": ({"client": "Prox(SGD(lr=0.3), mu=0.0)"}, {"client": "SGD(lr=0.3)"}),
    "Prox(mu=0) is the inner rule, with state": (
        {"client": "Prox(AdamW(lr=0.1), mu=0.0)"}, {"client": "AdamW(lr=0.1)"},
    ),
    "FedAvgM(1, 0) is FedAvg": ({"strategy": "FedAvgM(lr=1.0, momentum=0.0)"}, {"strategy": "FedAvg()"}),
    "TrimmedMean(0) is the uniform mean": (
        {"strategy": "TrimmedMean(share=0.0)"}, {"strategy": "FedAvg(weighting='uniform')"},
    ),
    "the median of two is their mean": (
        {"strategy": "FedMedian()", "participation": 0.4},
        {"strategy": "FedAvg(weighting='uniform')", "participation": 0.4},
    ),
    "LocalGD is FedAvg on full batches": (
        {"strategy": "LocalGD()", "batch_size": 0},
        {"strategy": "FedAvg(weighting='uniform')", "batch_size": 0},
    ),
    "an epoch of full batches is a step": (
        {"batch_size": 0, "local_steps": 2}, {"batch_size": 0, "local_steps": 0, "local_epochs": 2},
    ),
    "a batch of all rows is a full batch": (
        {"batch_size": 9, "local_steps": 2}, {"batch_size": 0, "local_steps": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("a", "b"), REDUCTIONS.values(), ids=list(REDUCTIONS))
def test_reductions(a: dict, b: dict) -> None:
    for (x, _), (y, _) in zip(rounds(blobs(**a)), rounds(blobs(**b)), strict=True):
        _close(x.model, y.model)
        torch.testing.assert_close(x.report.loss, y.report.loss)


@pytest.mark.parametrize(
    "strategy", ["FedAvg()", "FedMedian()", "TrimmedMean(share=0.3)", "FedAvgM()", "Elastic()"]
)
def test_workers_that_agree_go_on_as_one(strategy: str) -> None:
    """Consensus: four workers with the same data are one worker, as long as no momentum is at work."""
    same = "Quadratics(a=(2.0, 2.0, 2.0, 2.0), b=(1.0, 1.0, 1.0, 1.0))"
    found = _models(quadratics(data=same, strategy=strategy, rounds=1))
    assert found == pytest.approx([1 + 0.5 * 0.8**3], rel=1e-14)


# ------------------------------------------------------------------------- interruption, mutation

LONG = {
    "sampled": {"participation": 0.6, "strategy": "FedYogi()"},
    "kept": {"strategy": "Elastic()", "client": "AdamW(lr=0.1)", "nodes": 2, "local_steps": 0, "local_epochs": 2},
    "state": {"strategy": "Remembering()", "client": "Averaged()", "participation": 0.4},
}  # fmt: skip
lasting = pytest.mark.parametrize("settings", LONG.values(), ids=list(LONG))


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [x for v in value.values() for x in _tensors(v)]
    if isinstance(value, list | tuple):
        return [x for v in value for x in _tensors(v)]
    return []


@lasting
def test_a_run_that_was_interrupted_goes_on_as_if_nothing_had_been(settings: dict) -> None:
    experiment = blobs(**settings, rounds=6, holdout=0.2, probes="Drift()")
    federation = load(experiment)
    carrier = InProcess(experiment, federation)
    history, saved = [], {}
    for snapshot, position in rounds(experiment, federation, carrier):
        history.append(snapshot)
        saved[position.round] = position, tree.clone(carrier.checkpoint())
    assert [s.round for s in history] == [1, 2, 3, 4, 5, 6]
    for stop in (1, 3, 5):
        position, kept = saved[stop]
        again = InProcess(experiment, federation)
        again.restore(kept)
        again.use_plan(carrier.plan)
        later = [snapshot for snapshot, _ in rounds(experiment, federation, again, position)]
        for x, y in zip(later, history[stop:], strict=True):
            assert x.metrics == y.metrics
            assert x.clock == y.clock
            for a, b in zip(
                _tensors([x.model, x.rows, x.state]), _tensors([y.model, y.rows, y.state]), strict=True
            ):
                assert torch.equal(a, b)  # bit for bit


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    experiment = blobs(rounds=5, eval_every=0)
    federation = load(experiment)
    shorter = list(rounds(experiment.replace({"rounds": 2}), federation))
    longer = rounds(experiment, federation, None, shorter[-1][1])
    expected = [snapshot.model for snapshot, _ in rounds(experiment, federation)][2:]
    for (snapshot, _), model in zip(longer, expected, strict=True):
        _close(snapshot.model, model, 0)
    assert list(rounds(experiment, federation, None, Position(5, {}, {}, Clock(), ()))) == []


@lasting
def test_nothing_that_was_given_away_is_changed(settings: dict) -> None:
    experiment = blobs(**settings, probes="Drift()")
    federation = load(experiment)
    given: list[tuple[list[Tensor], list[Tensor]]] = []
    for found in rounds(experiment, federation):
        every = _tensors([federation.theta, federation.dataset.x, found[1]])
        every += _tensors([getattr(found[0], f.name) for f in fields(Snapshot)])
        given.append((every, [x.clone() for x in every]))
    for every, copies in given:
        assert all(torch.equal(x, y) for x, y in zip(every, copies, strict=True))


# --------------------------------------------------------------------------- counters and history


def test_who_takes_part() -> None:
    experiment = Experiment(num_workers=50, participation=0.3)
    drawn = [participants(experiment, r) for r in range(1, 201)]
    for workers in drawn:
        assert len(workers) == 15
        assert workers.tolist() == sorted(set(workers.tolist()))
        assert 0 <= int(workers[0]) <= int(workers[-1]) < 50
    counts = torch.bincount(torch.cat(drawn), minlength=50).double()
    # drawn without replacement: variance of a count is 200 * 0.3 * 0.7
    assert float(((counts - 60) ** 2).sum() / (200 * 0.3 * 0.7)) < 49 + 5 * math.sqrt(2 * 49)
    assert participants(experiment, 7).tolist() == drawn[6].tolist() != drawn[7].tolist()
    other = experiment.replace({"seed": 1})
    assert participants(other, 7).tolist() != drawn[6].tolist()
    assert participants(Experiment(num_workers=3, participation=1e-3), 1).numel() == 1
    assert participants(Experiment(num_workers=3), 1).tolist() == [0, 1, 2]


def test_the_clock_counts_what_is_done_and_sent() -> None:
    network = "Network(step=2.0, latency=0.25, bandwidth=32.0)"
    experiment = blobs(network=network, local_steps=0, local_epochs=2, rounds=3, model="Linear()")
    # steps of the five workers: 2 ceil(n / 3) for n = 7, 4, 9, 5, 6; a model has 8 numbers of 8 bytes
    steps, size = [6, 4, 6, 4, 4], 64
    for snapshot, _ in rounds(experiment):
        r = snapshot.round
        assert snapshot.report.steps.tolist() == snapshot.report.gradients.tolist() == steps
        assert snapshot.metrics["sim_time"] == r * (2.0 * 6 + 2 * 0.25 + 2 * size / 32)
        assert snapshot.metrics["gradients"] == snapshot.metrics["local_steps"] == r * 24
        assert snapshot.metrics["bytes_up"] == snapshot.metrics["bytes_down"] == r * 5 * size
        assert snapshot.metrics["participants"] == 5
        assert snapshot.metrics["round"] == r


def test_a_tick_in_closed_form() -> None:
    theta = {"a": torch.zeros(3), "b": torch.zeros(2, 2, dtype=torch.float64)}
    assert num_bytes(theta) == 12 + 32
    m, ones = torch.tensor([4, 9]), torch.ones(2, dtype=torch.float64)
    report = Report(m, ones, ones, torch.tensor([3, 5]), torch.tensor([6, 10]))
    broadcast = {"model": theta, "center": theta}
    clock = Network(0.5, 0.1, 11.0).tick(Clock(1.0, 2, 3, 4, 5), report, theta, broadcast)
    assert clock.sim_time == pytest.approx(1 + 2.5 + 0.2 + 12)
    assert clock[1:] == (2 + 16, 3 + 8, 4 + 2 * 44, 5 + 2 * 88, 0, 1)
    idle = report._replace(idle=torch.tensor([1, 4]))
    clock = Network(0.5).tick(Clock(), idle, theta, broadcast)
    assert (clock.pseudo_syncs, clock.optimiser_steps, clock.sim_time) == (5, 3, 0.5 * 2)
    nobody = Report(*(x[:0] for x in report))
    assert Network().tick(Clock(), nobody, theta, broadcast) == Clock()
    assert Network().tick(Clock(), report, theta, broadcast).sim_time == 5.0  # infinitely fast links


@pytest.mark.parametrize(
    ("overlap", "seconds"), [(0, 2.5 + 4.4), (3, 2.5 + 2.9), (8, 2.5 + 0.4), (9, 2.5), (20, 2.5)]
)
def test_what_is_sent_hides_behind_steps(overlap: int, seconds: float) -> None:
    theta = {"a": torch.zeros(30), "b": torch.zeros(10)}
    traffic = Traffic(3, 1, entries=20, overlap=overlap)  # 160 bytes up and down: 4 s, and 0.4 s of latency
    assert Network(0.5, 0.2, 40.0).sync(5, 3, theta, {}, traffic) == (pytest.approx(seconds), 240, 240)


def test_links_are_drawn_once_a_run_and_the_slowest_counts() -> None:
    network, everyone = Network(0.5, 0.2, 40.0, sigma=0.7), torch.arange(1000)
    own = [network.among(everyone[i : i + 1], 1000, 3) for i in range(1000)]
    slower = torch.tensor([n.latency / 0.2 for n in own], dtype=torch.float64)
    assert [n.bandwidth * s for n, s in zip(own, slower.tolist(), strict=True)] == pytest.approx(
        [40.0] * 1000
    )
    assert abs(slower.log().mean().item()) < 3 * 0.7 / math.sqrt(1000)
    assert slower.log().std().item() == pytest.approx(0.7, rel=0.1)
    some = network.among(everyone[7:9], 1000, 3)
    assert some == max(own[7:9], key=lambda n: n.latency)
    assert some.sigma == 0.0
    assert network.among(everyone[:1], 1000, 4) != own[0]
    assert Network(0.5, 0.2).among(everyone, 1000, 3) == Network(0.5, 0.2)


@pytest.mark.parametrize(
    "settings",
    [{}, {"strategy": "ElasticAveraging()", "schedule": "FreeRunning()", "client": "Nesterov(lr=0.1)"}],
    ids=["together", "alone"],
)
def test_runs_wait_for_slow_links(settings: dict) -> None:
    """A model of 8 numbers of 8 bytes crosses a link twice, with two latencies."""
    experiment = blobs(**settings, network="Network(0.0, 0.25, 32.0, sigma=0.7)", rounds=1, model="Linear()")
    ((snapshot, _),) = rounds(experiment)
    own = [experiment.parts.network.among(torch.tensor([i]), 5, 0) for i in range(5)]
    seconds = sorted(2 * n.latency + 128 / n.bandwidth for n in own)
    if not settings:
        assert snapshot.metrics["sim_time"] == pytest.approx(seconds[-1])
        return
    arrivals = sorted(k * s for s in seconds for k in range(1, 6))[:5]
    assert snapshot.metrics["sim_time"] == pytest.approx(arrivals[-1])


@pytest.mark.parametrize("bad", ["step=-1.0", "latency=-0.1", "bandwidth=0.0", "sigma=-1.0"])
def test_networks_refuse_negative_costs(bad: str) -> None:
    with pytest.raises(BadInput, match=rf"Network: {bad.split('=')[0]} = "):
        parse("network", f"Network({bad})")


def test_probes_in_closed_form() -> None:
    experiment = quadratics(probes="WorkerLoss(); Drift()", local_steps=1, rounds=2)
    first, second = (snapshot for snapshot, _ in rounds(experiment))
    for snapshot, x in ((first, 1.5), (second, 1.425)):
        losses = torch.tensor([a * (x - b) ** 2 / 2 for a, b in zip(A, B, strict=True)], dtype=torch.float64)
        names = ("min", "p10", "median", "p90", "max")
        expected = torch.quantile(losses, torch.tensor([0, 0.1, 0.5, 0.9, 1], dtype=torch.float64))
        assert [snapshot.metrics[f"worker_loss.{n}"] for n in names] == pytest.approx(expected.tolist())
        assert snapshot.metrics["train_loss"] == pytest.approx(losses.mean().item())
        moved = [0.1 * abs(a * (x - b)) / x for a, b in zip(A, B, strict=True)]
        assert snapshot.metrics["drift.mean"] == pytest.approx(sum(moved) / 4)
        assert snapshot.metrics["drift.max"] == pytest.approx(max(moved))
        assert snapshot.before is not None
        assert snapshot.before["0.weight"].flatten().tolist() == pytest.approx([x] * 4)
        assert torch.equal(snapshot.after["0.weight"], snapshot.rows["0.weight"])
    assert second.sent is first.broadcast


def test_kept_rows_are_moved_as_the_strategy_says() -> None:
    experiment = quadratics(strategy="Elastic()", rounds=4)
    rows = torch.full((4,), 1.5, dtype=torch.float64)
    a, b = (torch.tensor(x, dtype=torch.float64) for x in (A, B))
    pull = 0.5 - 1 / (2 + torch.arange(4, dtype=torch.float64))
    for snapshot, _ in rounds(experiment):
        assert snapshot.before is not None
        torch.testing.assert_close(snapshot.before["0.weight"].flatten(), rows)
        rows = b + (1 - 0.1 * a) ** 3 * (rows - b)
        torch.testing.assert_close(snapshot.rows["0.weight"].flatten(), rows)
        rows = rows + pull * (rows.mean() - rows)
        torch.testing.assert_close(snapshot.after["0.weight"].flatten(), rows)
        assert snapshot.model["0.weight"].item() == pytest.approx(rows.mean().item())


@pytest.mark.parametrize(
    ("every", "evaluated"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (3, [3, 5]), (0, [5])]
)
def test_the_last_round_is_always_evaluated(every: int, evaluated: list[int]) -> None:
    experiment = blobs(rounds=5, eval_every=every, holdout=0.2)
    found = [s.round for s, _ in rounds(experiment) if "test_loss" in s.metrics]
    assert found == [s.round for s, _ in rounds(experiment) if "held_loss.mean" in s.metrics] == evaluated


def test_evaluation_is_that_of_the_model() -> None:
    experiment = blobs(holdout=0.3)
    federation = load(experiment)
    snapshot = _last(experiment)
    data, held = federation.dataset, []
    output = functional_call(federation.module, snapshot.model, (data.test_x,))
    loss = torch.nn.functional.cross_entropy(output, data.test_y).item()
    assert snapshot.metrics["test_loss"] == pytest.approx(loss, rel=1e-12)
    assert snapshot.metrics["test_accuracy"] == (output.argmax(1) == data.test_y).double().mean().item()
    assert "test_perplexity" not in snapshot.metrics
    for worker in range(5):
        rows = federation.held.rows(worker)
        output = functional_call(federation.module, snapshot.model, (data.x[rows],))
        hits = (output.argmax(1) == data.y[rows]).double()
        held.append((torch.nn.functional.cross_entropy(output, data.y[rows]).item(), hits.mean().item()))
    loss, accuracy = torch.tensor(held, dtype=torch.float64).T
    for name, x, worst, tail in (
        ("loss", loss, loss.max(), "p90"),
        ("accuracy", accuracy, accuracy.min(), "p10"),
    ):
        level = 0.9 if tail == "p90" else 0.1
        expected = {"mean": x.mean(), tail: torch.quantile(x, level), "worst": worst}
        for k, value in expected.items():
            assert snapshot.metrics[f"held_{name}.{k}"] == pytest.approx(value.item(), rel=1e-12)


def test_regression_has_no_accuracy_and_no_test_set_no_test_loss() -> None:
    snapshot = _last(quadratics(data="Quadratics(rows=(2, 2, 2, 2))", holdout=0.5))
    x = snapshot.model["0.weight"].item()
    losses = [a * (x - b) ** 2 / 2 for a, b in zip(A, B, strict=True)]
    assert snapshot.metrics["held_loss.mean"] == pytest.approx(sum(losses) / 4)
    assert snapshot.metrics["held_loss.worst"] == pytest.approx(max(losses))
    assert not [k for k in snapshot.metrics if "accuracy" in k or k.startswith("test")]


def test_a_holdout_too_small_for_any_worker_is_no_evaluation() -> None:
    metrics = _last(quadratics(holdout=0.2)).metrics  # one row each: all of them to train on
    assert not [k for k in metrics if k.startswith("held")]


# -------------------------------------------------------------------------------- nodes that fail


class Failing(InProcess):
    """Nodes that fail from a given round on."""

    def __init__(self, experiment: Experiment, federation: Federation, since: int, lost: int) -> None:
        super().__init__(experiment, federation)
        self.since, self.lost = since, lost

    def train(self, round: int, workers: Tensor, broadcast: Broadcast, upload: Upload) -> Answers:
        """Forget what the last nodes say."""
        answers = super().train(round, workers, broadcast, upload)
        if round < self.since:
            return answers
        names = {f"node {i}": "unplugged" for i in range(self.num_nodes - self.lost, self.num_nodes)}
        return Answers(answers.trained[: self.num_nodes - self.lost], names, None)


def test_the_round_in_which_nodes_fail_is_told_and_then_the_run_ends() -> None:
    experiment = quadratics(nodes=4)
    federation = load(experiment)
    run = rounds(experiment, federation, Failing(experiment, federation, 2, 1))
    seen = [next(run)[0], next(run)[0]]
    assert seen[1].metrics["failures"] == {"node 3": "unplugged"}
    assert seen[1].report.worker.tolist() == [0, 1, 2]
    message = "round 2: 3 of 4 nodes answered, fewer than min-nodes = 4: node 3: unplugged"
    with pytest.raises(RunFailed, match=message):
        next(run)


def test_a_run_may_go_on_without_some_nodes() -> None:
    experiment = quadratics(nodes=4, min_nodes=3)
    federation = load(experiment)
    found = [s for s, _ in rounds(experiment, federation, Failing(experiment, federation, 1, 1))]
    three = quadratics(
        data="Quadratics(a=(1.0, 2.0, 0.5), b=(0.0, 1.0, -1.0), rows=(1, 1, 1))", num_workers=3
    )
    assert [s.model["0.weight"].item() for s in found] == pytest.approx(_models(three), rel=1e-14)
    assert all(s.metrics["failures"] == {"node 3": "unplugged"} for s in found)


def test_a_round_without_any_answer_ends_the_run() -> None:
    experiment = quadratics(nodes=2, min_nodes=1)
    federation = load(experiment)
    run = rounds(experiment, federation, Failing(experiment, federation, 2, 2))
    next(run)
    with pytest.raises(RunFailed, match="round 2: no node answered: node 0: unplugged; node 1: unplugged"):
        next(run)


def test_perplexity_is_told_for_text() -> None:
    from fedsim.data import Dataset, Shards
    from fedsim.federation import assemble

    text = torch.randint(5, (12, 4), generator=torch.Generator().manual_seed(0))
    dataset = Dataset(text[:8, :-1], text[:8, 1:], text[8:, :-1], text[8:, 1:], 5, "tokens", "toy")
    settings = {
        "model": "Transformer(layers=1, width=4, heads=2)",
        "num-workers": 2,
        "rounds": 1,
        "plan": "vmap",
    }
    experiment = Experiment.from_mapping({**settings, "device": "cpu"})
    federation = assemble(experiment, dataset, Shards(torch.arange(8), torch.tensor([0, 4, 8])))
    metrics = next(rounds(experiment, federation))[0].metrics
    loss = metrics["test_loss"]
    assert isinstance(loss, float)
    assert metrics["test_perplexity"] == pytest.approx(math.exp(loss))
