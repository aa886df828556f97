"""The strategies as anybody's ServerApp uses them: `start` with stock ClientApps over a grid."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import flwr.serverapp.strategy as stock
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Result, Strategy
from numpy.typing import NDArray
from torch import Tensor

from fedsim import tree
from fedsim.grid import InProcessGrid
from fedsim.tree import Stack, Tree
from strategies import (
    Broadcast,
    ElasticAveraging,
    FedAvg,
    FedAvgM,
    FedMedian,
    GapFilter,
    LeaderSGD,
    Report,
    Rule,
    State,
    from_record,
    to_record,
)
from strategies.foreign import FlowerStrategy

NUM_WORKERS = 6
A = np.array([1.0, 2.0, 0.5, 1.5, 0.7, 1.2])
B = np.array([0.0, 1.0, -1.0, 2.0, 0.3, -0.4])


def descend(x: NDArray[np.generic], worker: int) -> NDArray[np.generic]:
    """Make three gradient steps on the loss a (x - b)^2 / 2."""
    for _ in range(3):
        x = (x - 0.1 * A[worker] * (x - B[worker])).astype(x.dtype)
    return x


def make_app(
    failing: int | None = None,
    diverging: int | None = None,
    seen: list[ConfigRecord] | None = None,
    per_node: int = 0,
) -> ClientApp:
    """Make a ClientApp that knows nothing of fedsim; with `per_node` it hosts as many workers a node."""
    app = ClientApp()

    def rows(x: NDArray[np.generic], node: int) -> NDArray[np.generic]:
        if not per_node:
            return descend(x, node)
        return np.stack([descend(x, worker) for worker in range(per_node * node, per_node * (node + 1))])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        node = int(context.node_config["partition-id"])
        if seen is not None:
            seen.append(message.content.config_records["config"])
        if node == failing:
            raise RuntimeError("out of memory")
        record = message.content.array_records["arrays"]
        arrays = {k: Array(np.asarray(rows(x.numpy(), node))) for k, x in record.items()}
        if node == diverging:
            arrays["w"] = Array(np.full_like(arrays["w"].numpy(), np.nan))
        workers = [*range(per_node * node, per_node * (node + 1))] if per_node else [node]
        samples = [3.0 + worker for worker in workers]
        losses = [0.5 + worker for worker in workers]
        metrics = MetricRecord({
            "num-examples": samples if per_node else samples[0],
            "train_loss": losses if per_node else losses[0],
        })
        return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        node = int(context.node_config["partition-id"])
        (x, *_) = message.content.array_records["arrays"].to_numpy_ndarrays()
        metrics = MetricRecord({"num-examples": 2 + node, "loss": float(np.square(x - B[node]).sum())})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def initial(dtype: type[np.floating] = np.float64) -> ArrayRecord:
    arrays = {"w": np.array([[1.5, -0.5], [0.25, 3.0]]), "b": np.array(0.75)}
    return ArrayRecord({k: Array(np.asarray(x, dtype=dtype)) for k, x in arrays.items()})


def start(
    strategy: Strategy,
    app: ClientApp,
    nodes: int = NUM_WORKERS,
    reverse: bool = False,
    arrays: ArrayRecord | None = None,
) -> Result:
    grid = InProcessGrid(app, nodes, {}, reverse_replies=reverse)
    return strategy.start(grid=grid, initial_arrays=arrays or initial(), num_rounds=3)


def assert_close(a: Result, b: Result, tolerance: float) -> None:
    assert list(a.arrays) == list(b.arrays) == ["w", "b"]
    for k, x in a.arrays.items():
        np.testing.assert_allclose(x.numpy(), b.arrays[k].numpy(), rtol=tolerance, atol=tolerance)
    for of_a, of_b in (
        (a.train_metrics_clientapp, b.train_metrics_clientapp),
        (a.evaluate_metrics_clientapp, b.evaluate_metrics_clientapp),
    ):
        assert of_a.keys() == of_b.keys() == {1, 2, 3}
        for server_round, record in of_a.items():
            assert dict(record) == pytest.approx(dict(of_b[server_round]), rel=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-6)])
@pytest.mark.parametrize("reverse", [False, True])
def test_fedavg_is_that_of_flower(dtype: type[np.floating], tolerance: float, reverse: bool) -> None:
    ours = start(FedAvg(), make_app(), reverse=reverse, arrays=initial(dtype))
    theirs = start(stock.FedAvg(), make_app(), arrays=initial(dtype))
    assert_close(ours, theirs, tolerance)
    assert {x.dtype for x in ours.arrays.values()} == {np.dtype(dtype).name}


def test_the_order_of_replies_changes_no_bit() -> None:
    straight, reverse = (start(FedAvgM(), make_app(), reverse=r) for r in (False, True))
    assert straight.arrays == reverse.arrays
    assert straight.train_metrics_clientapp == reverse.train_metrics_clientapp


NESTED = FlowerStrategy("FedAvgM", (("server_momentum", 0.5),))
CLIPPING = (("noise_multiplier", 0.0), ("num_sampled_clients", NUM_WORKERS))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            FlowerStrategy("FedAvgM", (("server_learning_rate", 0.5), ("server_momentum", 0.8))),
            lambda: stock.FedAvgM(server_learning_rate=0.5, server_momentum=0.8),
        ),
        (FedAvgM(lr=0.5, momentum=0.8), lambda: stock.FedAvgM(server_learning_rate=0.5, server_momentum=0.8)),
        (FlowerStrategy("FedAdam"), stock.FedAdam),
        (FlowerStrategy("FedYogi"), stock.FedYogi),
        (FlowerStrategy("FedAdagrad"), stock.FedAdagrad),
        (FlowerStrategy("FedMedian"), stock.FedMedian),
        (FedMedian(), stock.FedMedian),
        (FlowerStrategy("FedTrimmedAvg"), stock.FedTrimmedAvg),
        (FlowerStrategy("Krum"), stock.Krum),
        (
            FlowerStrategy("MultiKrum", (("num_nodes_to_select", 2),)),
            lambda: stock.MultiKrum(num_nodes_to_select=2),
        ),
        (
            FlowerStrategy("QFedAvg", (("client_learning_rate", 0.1),)),
            lambda: stock.QFedAvg(client_learning_rate=0.1),
        ),
        (
            FlowerStrategy(
                "DifferentialPrivacyServerSideAdaptiveClipping", (("strategy", NESTED), *CLIPPING)
            ),
            lambda: stock.DifferentialPrivacyServerSideAdaptiveClipping(
                stock.FedAvgM(server_momentum=0.5), noise_multiplier=0.0, num_sampled_clients=NUM_WORKERS
            ),
        ),
    ],
    ids=lambda x: repr(x) if isinstance(x, Rule) else "",
)
def test_foreign_strategies_remember_what_flower_does(ours: Rule, theirs: Callable[[], Strategy]) -> None:
    a = start(ours, make_app())
    gc.freeze()  # QFedAvg collects all garbage twice a reply.
    b = start(theirs(), make_app())
    gc.unfreeze()
    for k, x in a.arrays.items():
        np.testing.assert_allclose(x.numpy(), b.arrays[k].numpy(), rtol=1e-12, atol=1e-12)


def test_a_node_that_fails_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    ours = start(FedAvg(), make_app(failing=1))
    assert "node 3 failed: " in caplog.text
    assert "out of memory" in caplog.text
    assert_close(ours, start(stock.FedAvg(), make_app(failing=1)), 1e-12)


def test_a_node_that_diverges_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    ours = start(FedAvg(), make_app(diverging=1))
    assert "parameters of workers [1] are not finite" in caplog.text
    without = start(FedAvg(), make_app(failing=1))
    assert ours.arrays == without.arrays
    assert ours.train_metrics_clientapp == without.train_metrics_clientapp


@pytest.mark.parametrize("rule", [FedAvg(), FedMedian(), FlowerStrategy("FedAvg")], ids=repr)
@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_stacks_of_rows_count_as_many_workers(rule: Rule, nodes: int) -> None:
    together = start(rule, make_app(per_node=NUM_WORKERS // nodes), nodes=nodes)
    apart = start(rule, make_app())
    for k, x in together.arrays.items():
        np.testing.assert_allclose(x.numpy(), apart.arrays[k].numpy(), rtol=1e-12, atol=1e-12)
    assert together.train_metrics_clientapp[3] == pytest.approx(apart.train_metrics_clientapp[3], rel=1e-12)


def test_the_configuration_is_sent_and_not_changed() -> None:
    seen: list[ConfigRecord] = []
    config = ConfigRecord({"lr": 0.5})
    grid = InProcessGrid(make_app(seen=seen), 2, {})
    FedAvg().start(grid=grid, initial_arrays=initial(), num_rounds=2, train_config=config)
    assert [dict(c) for c in seen] == [{"lr": 0.5, "server-round": r} for r in (1, 1, 2, 2)]
    assert dict(config) == {"lr": 0.5}


def test_all_failing_keeps_the_model() -> None:
    grid = InProcessGrid(make_app(failing=0), 1, {})
    strategy = FedAvg()
    messages = strategy.configure_train(1, initial(), ConfigRecord(), grid)
    assert strategy.aggregate_train(1, grid.send_and_receive(messages)) == (None, None)
    (message,) = strategy.configure_train(2, initial(), ConfigRecord(), grid)
    assert message.content["arrays"] == initial()


@dataclass(frozen=True)
class Pull(Rule):
    """Elastic averaging: workers keep their rows and move towards the mean; the model is the mean of rows."""

    keeps_rows: ClassVar[bool] = True
    pull: float = 0.3

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        mean = tree.mean(rows, report.weight)
        return {"model": mean}, {"model": mean}

    def adopt(self, row: Tree, broadcast: Broadcast, worker: Tensor) -> Tree:
        return tree.lerp(row, broadcast["model"], self.pull)

    def model(self, state: State, rows: Stack) -> Tree:
        return tree.mean(rows, torch.ones(tree.num_rows(rows), dtype=torch.float64))


def test_rules_that_keep_rows_move_each_row() -> None:
    result = start(Pull(), make_app())
    weight = 3.0 + np.arange(NUM_WORKERS)
    for k, x in initial().items():
        rows = np.stack([x.numpy()] * NUM_WORKERS)
        for _ in range(3):
            rows = np.stack([descend(row, worker) for worker, row in enumerate(rows)])
            mean = np.tensordot(weight / weight.sum(), rows, axes=1)
            rows = rows + 0.3 * (mean - rows)
        np.testing.assert_allclose(result.arrays[k].numpy(), rows.mean(axis=0), rtol=1e-12, atol=1e-12)


def test_a_rule_that_keeps_rows_needs_a_node_a_worker() -> None:
    with pytest.raises(
        ValueError, match=r"^Pull\(pull=0.3\) keeps a row for each worker: node 2 sent 3 rows, must"
    ):
        start(Pull(), make_app(per_node=3), nodes=2)


def test_records_keep_shapes_dtypes_and_order() -> None:
    x = {"z": torch.tensor(3), "a": torch.rand(2, 3).T, "m": torch.zeros(0, 2, dtype=torch.float64)}
    back = from_record(to_record(x))
    assert list(back) == list(x)
    for k, leaf in x.items():
        assert back[k].shape == leaf.shape
        assert back[k].dtype == leaf.dtype
        assert torch.equal(back[k], leaf)


def answer(content: RecordDict, model: ArrayRecord) -> tuple[ArrayRecord | None, MetricRecord | None]:
    """Let one node send `content` in round 1 of FedAvg."""
    grid = InProcessGrid(ClientApp(), 1, {})
    strategy = FedAvg()
    (message,) = strategy.configure_train(1, model, ConfigRecord(), grid)
    return strategy.aggregate_train(1, [Message(content, reply_to=message)])


def test_counters_are_averaged_and_stay_whole() -> None:
    model = ArrayRecord({"w": Array(np.zeros(2)), "seen": Array(np.array(4))})
    rows = ArrayRecord({"w": Array(np.ones((2, 2))), "seen": Array(np.array([7, 9]))})
    arrays, _ = answer(RecordDict({"a": rows, "m": MetricRecord({"num-examples": [1, 3]})}), model)
    assert arrays is not None
    assert arrays["seen"].numpy().dtype == np.int64
    assert arrays["seen"].numpy() == 8  # 8.5, rounded to even
    assert arrays["w"].numpy().tolist() == [1.0, 1.0]


def test_only_finite_rows_of_a_stack_count() -> None:
    rows = ArrayRecord({"w": Array(np.array([[1.0], [np.inf], [4.0]]))})
    metrics = MetricRecord({"num-examples": [1, 7, 2], "train_loss": [1.0, 9.0, 4.0], "steps": 3})
    arrays, means = answer(RecordDict({"a": rows, "m": metrics}), _one())
    assert arrays is not None
    assert means is not None
    assert arrays["w"].numpy().tolist() == pytest.approx([3.0], rel=1e-15)
    assert dict(means) == pytest.approx({"train_loss": 3.0, "steps": 3.0}, rel=1e-15)


def test_replies_without_samples_make_no_model() -> None:
    content = RecordDict({"a": _one(), "m": MetricRecord({"num-examples": 0})})
    assert answer(content, _one()) == (None, None)


def _one() -> ArrayRecord:
    return ArrayRecord({"w": Array(np.ones(1))})


ONE_EXAMPLE = MetricRecord({"num-examples": 1})


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            RecordDict({"m": ONE_EXAMPLE}),
            r"node 2: a reply must hold one record of metrics and, after training, one of arrays; it holds \['m'\]",
        ),
        (RecordDict({"a": _one()}), r"node 2: a reply must hold one record of metrics .*; it holds \['a'\]"),
        (
            RecordDict({"a": ArrayRecord({"v": Array(np.ones(1))}), "m": ONE_EXAMPLE}),
            r"node 2: arrays \['v'\] must be those of the model, \['w'\]",
        ),
        (
            RecordDict({"a": ArrayRecord({"w": Array(np.ones((3, 2)))}), "m": ONE_EXAMPLE}),
            r"node 2: shape \[3, 2\] of 'w' must be \[1\], or \[3, 1\] for 3 rows",
        ),
        (
            RecordDict({
                "a": ArrayRecord({"w": Array(np.ones((3, 1)))}),
                "m": MetricRecord({"num-examples": [1, 2]}),
            }),
            "node 2: num-examples has 2 entries, must have one for each of 3 rows",
        ),
    ],
)
def test_bad_replies_are_one_line(content: RecordDict, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        answer(content, _one())


def test_an_error_reply_to_evaluation_is_left_out() -> None:
    grid = InProcessGrid(ClientApp(), 1, {})
    (message,) = FedAvg().configure_evaluate(1, initial(), ConfigRecord(), grid)
    reply = Message(Error(code=1, reason="gone"), reply_to=message)
    assert FedAvg().aggregate_evaluate(1, [reply]) is None


def test_rounds_begin_with_configure_train() -> None:
    with pytest.raises(RuntimeError, match=r"configure_train must be called for round 1 first$"):
        FedAvg().aggregate_train(1, [])


def test_a_leader_pulls_workers_of_any_app() -> None:
    """Worker 0 reports the lowest loss; the others go half-way to it before the mean is taken."""
    result = start(LeaderSGD(pull=0.5), make_app())
    rows = [torch.from_numpy(initial()["w"].numpy())] * NUM_WORKERS
    for _ in range(3):
        rows = [torch.from_numpy(descend(x.numpy(), i)) for i, x in enumerate(rows)]
        rows = [(x + rows[0]) / 2 for x in rows]
    expected = torch.stack(rows).mean(0).numpy()
    np.testing.assert_allclose(result.arrays["w"].numpy(), expected, rtol=1e-12)


def test_pulls_within_local_steps_need_workers_that_know_them() -> None:
    with pytest.raises(ValueError, match=r"ElasticAveraging.*acts in the workers' local steps"):
        start(ElasticAveraging(), make_app())
    start(ElasticAveraging(after_step=True), make_app())
    with pytest.raises(ValueError, match=r"GapFilter.*acts in the workers' local steps"):
        start(GapFilter(), make_app())
    start(GapFilter(update="remove"), make_app())
