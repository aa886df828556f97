"""The in-process grid and the helpers for every grid, with tiny ClientApps."""

from collections.abc import Iterable

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fedsim.compat import ErrorCode, with_identity
from fedsim.grid import InProcessGrid, exchange, wait_for_nodes


def make_app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        visits = context.state.get("visits", MetricRecord({"n": 0}))
        assert isinstance(visits, MetricRecord)
        count = int(visits["n"]) + 1  # pyright: ignore[reportArgumentType]
        context.state["visits"] = MetricRecord({"n": count})
        partition = int(context.node_config["partition-id"])
        arrays = message.content.array_records["arrays"].to_numpy_ndarrays()
        content = RecordDict({
            "arrays": ArrayRecord([a + partition for a in arrays]),
            "metrics": MetricRecord({"num-examples": 1 + partition, "visits": count}),
        })
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 1, "loss": float(context.node_config["partition-id"])})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            raise KeyError("no such worker")
        return Message(
            RecordDict({"config": ConfigRecord({"seed": context.run_config["seed"]})}), reply_to=message
        )

    @app.train("config")
    def change_config(message: Message, context: Context) -> Message:
        context.run_config["seed"] = 2
        return Message(RecordDict(), reply_to=message)

    @app.train("nothing")
    def nothing(message: Message, context: Context) -> Message:
        return Message(RecordDict(), 1, "train")

    @app.train("greedy")
    def greedy(message: Message, context: Context) -> Message:
        seen = message.content.config_records["config"]
        count = len(seen)
        seen[f"from-{context.node_id}"] = 1
        message.content["own"] = MetricRecord({"n": 1})
        return Message(RecordDict({"metrics": MetricRecord({"n": count})}), reply_to=message)

    return app


def make_messages(grid: InProcessGrid, kind: str = "train") -> list[Message]:
    shared = RecordDict({"arrays": ArrayRecord([np.zeros(2)]), "config": ConfigRecord()})
    return [Message(shared, node, kind) for node in grid.get_node_ids()]


def visits(replies: Iterable[Message]) -> list[tuple[int, object]]:
    return [(r.metadata.src_node_id, r.content.metric_records["metrics"]["visits"]) for r in replies]


def test_nodes_answer_in_order_and_keep_their_state() -> None:
    grid = InProcessGrid(make_app(), 3, {"seed": 1})
    assert visits(grid.send_and_receive(make_messages(grid))) == [(2, 1), (3, 1), (4, 1)]
    assert visits(grid.send_and_receive(make_messages(grid)[1:])) == [(3, 2), (4, 2)]


def test_reversed_replies_are_the_same_replies() -> None:
    replies = {}
    for reverse in (False, True):
        grid = InProcessGrid(make_app(), 3, {"seed": 1}, reverse_replies=reverse)
        got = grid.send_and_receive(make_messages(grid))
        replies[reverse] = [(r.metadata.src_node_id, r.content) for r in got]
    assert replies[True] == replies[False][::-1]
    assert [node for node, _ in replies[True]] == [4, 3, 2]


def test_node_configs_are_added() -> None:
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(RecordDict({"config": ConfigRecord({**context.node_config})}), reply_to=message)

    grid = InProcessGrid(app, 2, {}, node_configs=[{"data": "a"}, {"data": "b"}])
    configs = [
        dict(r.content.config_records["config"]) for _, r in exchange(grid, make_messages(grid, "query"))
    ]
    assert configs == [
        {"partition-id": 0, "num-partitions": 2, "data": "a"},
        {"partition-id": 1, "num-partitions": 2, "data": "b"},
    ]


def test_an_exception_becomes_an_error_reply() -> None:
    grid = InProcessGrid(make_app(), 3, {"seed": 1})
    first, second, third = grid.send_and_receive(make_messages(grid, "query"))
    assert first.content["config"] == third.content["config"] == {"seed": 1}
    assert second.metadata.src_node_id == 3
    assert second.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert second.error.reason == """<class 'KeyError'>:<''no such worker''>"""


def test_an_unknown_action_becomes_an_error_reply() -> None:
    grid = InProcessGrid(make_app(), 1, {})
    (reply,) = grid.send_and_receive(make_messages(grid, "query.absent"))
    assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION


def test_a_client_cannot_change_the_run_config() -> None:
    grid = InProcessGrid(make_app(), 1, {"seed": 1})
    (reply,) = grid.send_and_receive(make_messages(grid, "train.config"))
    assert reply.error.code == ErrorCode.UNKNOWN
    assert "run_config" in str(reply.error.reason)
    (reply,) = grid.send_and_receive(make_messages(grid, "query"))
    assert reply.content["config"] == {"seed": 1}


def test_a_reply_to_nothing_becomes_an_error_reply() -> None:
    grid = InProcessGrid(make_app(), 1, {})
    (reply,) = grid.send_and_receive(make_messages(grid, "train.nothing"))
    assert "must return Message(..., reply_to=message)" in str(reply.error.reason)


def test_a_client_cannot_change_what_the_others_receive() -> None:
    grid = InProcessGrid(make_app(), 3, {})
    messages = make_messages(grid, "train.greedy")
    replies = grid.send_and_receive(messages)
    assert [r.content.metric_records["metrics"]["n"] for r in replies] == [0, 0, 0]
    assert set(messages[0].content) == {"arrays", "config"}


def test_a_client_runs_when_its_reply_is_asked_for() -> None:
    ran: list[int] = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        ran.append(context.node_id)
        return Message(RecordDict(), reply_to=message)

    grid = InProcessGrid(app, 3, {})
    replies = exchange(grid, make_messages(grid))
    assert ran == []
    next(replies)
    assert ran == [2]
    assert len(list(replies)) == 2
    assert ran == [2, 3, 4]


def test_messages_are_pushed_and_pulled_apart() -> None:
    grid = InProcessGrid(make_app(), 2, {})
    ids = grid.push_messages(make_messages(grid))
    assert [r.metadata.reply_to_message_id for r in grid.pull_messages(ids[1:])] == ids[1:]
    assert [r.metadata.reply_to_message_id for r in grid.pull_messages(ids)] == ids[:1]
    assert list(grid.pull_messages(ids)) == []


def test_stock_fedavg_runs() -> None:
    results = []
    for reverse in (False, True):
        grid = InProcessGrid(make_app(), 4, {"seed": 1}, reverse_replies=reverse)
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=1.0, min_train_nodes=4, min_available_nodes=4)
        results.append(strategy.start(grid=grid, initial_arrays=ArrayRecord([np.zeros(3)]), num_rounds=2))
    for result in results:
        # Each round adds the mean partition, weighted by 1 + partition: (0*1 + 1*2 + 2*3 + 3*4) / 10 = 2.
        (theta,) = result.arrays.to_numpy_ndarrays()
        np.testing.assert_allclose(theta, 4.0, rtol=1e-15)
        assert result.evaluate_metrics_clientapp[2]["loss"] == 1.5


def test_the_run_id_is_the_one_of_the_flower_runtime() -> None:
    with with_identity(run_id=12):
        grid = InProcessGrid(make_app(), 1, {"seed": 3})
        ((_, reply),) = exchange(grid, make_messages(grid))
    assert grid.run.run_id == reply.metadata.run_id == 12
    assert grid.run.override_config == {"seed": 3}


@pytest.mark.parametrize(
    ("num_nodes", "configs", "text"),
    [
        (0, None, "num_nodes = 0 must be at least 1"),
        (2, [{}], "node_configs has 1 entries, must have num_nodes = 2"),
    ],
)
def test_bad_arguments_are_named(num_nodes: int, configs: list[dict[str, int]] | None, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        InProcessGrid(make_app(), num_nodes, {}, configs)


def test_a_message_to_an_absent_node_is_refused() -> None:
    grid = InProcessGrid(make_app(), 2, {})
    with pytest.raises(ValueError, match=r"dst_node_id = 9 must be in 2\.\.3"):
        grid.push_messages([Message(RecordDict(), 9, "train")])


class SlowGrid(InProcessGrid):
    """Like a deployment: replies arrive on the `delay`-th pull, some nodes come late, some never answer."""

    def __init__(
        self, num_nodes: int, delay: int = 0, deaf: tuple[int, ...] = (), refuse: bool = False
    ) -> None:
        super().__init__(make_app(), num_nodes, {"seed": 1})
        self.delay, self.deaf, self.refuse = delay, deaf, refuse
        self.pulls = self.looks = 0

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = super().push_messages(messages)
        return ids[1:] if self.refuse else ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.pulls += 1
        if self.pulls <= self.delay:
            return []
        return [r for r in super().pull_messages(message_ids) if r.metadata.src_node_id not in self.deaf]

    def get_node_ids(self) -> list[int]:
        self.looks += 1
        return super().get_node_ids()[: self.looks]


def test_exchange_asks_again_until_all_replies_are_there() -> None:
    grid = SlowGrid(3, delay=2)
    grid.looks = 3
    assert visits(r for _, r in exchange(grid, make_messages(grid))) == [(2, 1), (3, 1), (4, 1)]
    assert grid.pulls == 3


def test_exchange_gives_up_at_the_timeout() -> None:
    grid = SlowGrid(3, deaf=(3,))
    grid.looks = 3
    assert visits(r for _, r in exchange(grid, make_messages(grid), timeout=0.12)) == [(2, 1), (4, 1)]
    assert grid.pulls > 1


def test_exchange_of_nothing_is_nothing() -> None:
    assert list(exchange(SlowGrid(1), [])) == []


def test_exchange_refuses_to_lose_a_message() -> None:
    grid = SlowGrid(3, refuse=True)
    grid.looks = 3
    with pytest.raises(RuntimeError, match="the grid accepted 2 of 3 messages"):
        list(exchange(grid, make_messages(grid)))


def test_waiting_for_nodes_gives_them_in_order() -> None:
    grid = SlowGrid(3)
    assert wait_for_nodes(grid, 3, timeout=5.0) == [2, 3, 4]
    assert grid.looks == 3


def test_waiting_for_nodes_ends_with_how_many_are_there() -> None:
    with pytest.raises(TimeoutError, match=r"^2 of 3 nodes are online after 0\.1 s$"):
        wait_for_nodes(InProcessGrid(make_app(), 2, {}), 3, timeout=0.1)
