"""Nodes of a run: how they are greeted, which data they have, and when a run without them ends."""

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message
from flwr.clientapp import ClientApp
from flwr.common.config import parse_config_args
from messages_toys import Failing, Tampered, about, carrier, run, tiny

from fedsim import Experiment, RunFailed, client_app, server_app
from fedsim.compat import SUPERLINK_NODE_ID, ErrorCode
from fedsim.grid import InProcessGrid
from fedsim.messages import HELLO, ROUND, encode_broadcast
from fedsim.over_grid import greet
from fedsim.simulate import rounds


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for module in ("grid", "over_grid"):
            monkeypatch.setattr(f"fedsim.{module}.time", self)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Network(InProcessGrid):
    """A grid of which some nodes never answer, some are gone, and some are dead but not yet gone."""

    deaf: tuple[int, ...] = ()
    gone: tuple[int, ...] = ()
    dead: tuple[int, ...] = ()

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ids = [i for i in message_ids if i in self._pushed]
        return [
            *super().pull_messages(i for i in ids if self._pushed[i].metadata.dst_node_id not in self.deaf)
        ]

    def get_node_ids(self) -> list[int]:
        return [i for i in super().get_node_ids() if i not in self.gone]

    def _answer(self, message: Message) -> Message:
        if message.metadata.dst_node_id in self.dead:
            said = Message(
                Error(code=ErrorCode.NODE_UNAVAILABLE, reason="Node Unavailable"), reply_to=message
            )
            said.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID  # the SuperLink says so
            return said
        return super()._answer(message)


# ----------------------------------------------------------------------------------- when the run cannot go on


def test_a_run_without_enough_nodes_ends_after_its_round_is_recorded() -> None:
    experiment = tiny(**{"min-nodes": 0})
    going = rounds(
        experiment, carrier=carrier(experiment, InProcessGrid(Failing(ROUND), 3, experiment.to_mapping()))
    )
    snapshot, position = next(going)
    assert position.round == snapshot.round == 1
    assert snapshot.failures == {"node 1": "ValueError: no memory left"}
    with pytest.raises(
        RunFailed, match=r"^round 1: 2 of 3 nodes .* min-nodes = 3: node 1: ValueError: no memory left$"
    ):
        next(going)


def test_a_run_without_any_answer_ends() -> None:
    app = Failing(ROUND, nodes=(0, 1, 2))
    with pytest.raises(
        RunFailed, match=r"^round 1: no node answered: node 0: ValueError: no memory left; node 1: "
    ):
        run(tiny(), app)


def network(experiment: Experiment) -> Network:
    return Network(client_app.app, 3, experiment.to_mapping())


def test_a_node_that_never_answers_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = tiny(**{"round-timeout": 9.5})
    clock, grid = Clock(monkeypatch), network(experiment)
    made = carrier(experiment, grid)
    grid.deaf = (3,)
    seen = [s.failures for s, _ in rounds(experiment, carrier=made)]
    assert seen == [{"node 1": "did not answer within round-timeout = 9.5 s"}] * 2
    assert clock.now == pytest.approx(2 * 9.5, abs=0.2)


def test_a_node_that_has_left_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, experiment = Clock(monkeypatch), tiny()
    grid = network(experiment)
    run = rounds(experiment, carrier=carrier(experiment, grid))
    first, _ = next(run)
    grid.gone = (4,)
    second, _ = next(run)
    assert [first.failures, second.failures] == [{}, {"node 2": "is offline"}]
    assert clock.now == 0


def test_a_node_that_is_lost_within_a_round_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = tiny()
    grid = network(experiment)
    made = carrier(experiment, grid)
    grid.dead = (2,)
    seen = [s.failures for s, _ in rounds(experiment, carrier=made)]
    assert seen == [{"node 0": "Node Unavailable"}] * 2


# --------------------------------------------------------------------------------------------------- greeting


def hello(configs: Sequence[dict[str, Any]], app: ClientApp = client_app.app, expected: int = 0) -> list[Any]:
    return [*greet(InProcessGrid(app, len(configs), {}, configs), expected)]


def test_nodes_are_greeted_in_the_order_of_partitions() -> None:
    configs = [{"partition-id": i} for i in (2, 0, 1)]
    for expected in (0, 3):
        assert [(n.node_id, n.partition) for n in hello(configs, expected=expected)] == [
            (3, 0),
            (4, 1),
            (2, 2),
        ]


def test_one_node_needs_no_partition() -> None:
    (node,) = hello([{"partition-id": -1, "num-partitions": 0}])
    assert (node.node_id, node.workers) == (2, 0)


@pytest.mark.parametrize(
    ("configs", "expected", "text"),
    [
        (
            [{"partition-id": 0}] * 2,
            0,
            r"2 SuperNodes .* partition-id \[0, 0\] .* a partition-id of its own: --node-",
        ),
        ([{"partition-id": -1, "num-partitions": 0}] * 2, 2, r"partition-id \[-1, -1\]"),
        ([{"partition-id": i} for i in (1, 2)], 0, r"partition-id \[1, 2\] and num-partitions \[2\]"),
        ([{}] * 3, 2, r"3 SuperNodes answered for nodes = 2"),
        ([{}, {"num-partitions": 1}], 2, r"num-partitions \[1, 2\]"),
        (
            [{}, {"partition-id": "one"}],
            0,
            "SuperNode 3 cannot start: BadInput: .*'one' must be a whole number",
        ),
        ([{"data": "Digits()", "num-workers": 0}], 0, "node-config: num-workers = 0 must be >= 1"),
    ],
)
def test_nodes_that_do_not_fit_are_refused(configs: list[dict[str, Any]], expected: int, text: str) -> None:
    with pytest.raises(RunFailed, match=text) as raised:
        hello(configs, expected=expected)
    assert "\n" not in str(raised.value)


def test_a_missing_node_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    grid = InProcessGrid(client_app.app, 2, {}, [{"num-partitions": 3}] * 2)
    for expected in (0, 3):
        with pytest.raises(RunFailed, match=r"^2 of 3 nodes answered within 120 s$"):
            greet(grid, expected)
    assert clock.now == pytest.approx(240, abs=1)


def test_a_node_that_died_lately_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    grid = Network(client_app.app, 3, {}, [{"partition-id": i, "num-partitions": 2} for i in (0, 1, 1)])
    grid.dead = (3,)
    assert [node.node_id for node in greet(grid, 2)] == [2, 4]


def test_nodes_with_other_code_are_refused_by_name() -> None:
    with pytest.raises(
        RunFailed, match=r"^node 1 \(SuperNode 3\) runs other code \(hash 0{16}, here \w{16}\): install"
    ):
        hello([{}] * 3, Tampered(HELLO, about("code", "0" * 16)))


def test_a_client_app_refuses_a_server_with_other_code() -> None:
    experiment = tiny()
    made = carrier(experiment, InProcessGrid(client_app.app, 3, experiment.to_mapping()))
    content = encode_broadcast({}, {"code": "0" * 16})
    (reply, *_) = made.grid.send_and_receive([Message(content, 2, ROUND)])
    assert "runs other code" in str(reply.error.reason)


def test_there_must_be_a_worker_for_every_node() -> None:
    experiment = tiny(**{"num-workers": 2})
    with pytest.raises(RunFailed, match="3 nodes for num-workers = 2"):
        carrier(experiment, InProcessGrid(client_app.app, 3, experiment.to_mapping()))


# ----------------------------------------------------------------------------------------- data of nodes' own


def own(configs: list[dict[str, Any]], out: Path, **changes: Any) -> Any:
    experiment = tiny(out=str(out), **changes)
    return server_app.start(
        experiment, InProcessGrid(client_app.app, len(configs), experiment.to_mapping(), configs)
    )


def test_nodes_may_have_data_of_their_own(tmp_path: Path) -> None:
    configs = [
        {"data": f"Synthetic(rows={rows}, features=4, classes=3, test=0.0)", "num-workers": workers}
        for rows, workers in ((8, 1), (30, 3), (10, 1))
    ]
    done = own(configs, tmp_path / "run", probes="WorkerLoss()", holdout=0.2)
    assert done.experiment.num_workers == 5
    assert done.history["participants"].tolist() == [5, 5]
    assert "failures" not in done.history
    assert done.history["held_loss.mean"].notna().all()


def test_flower_reads_the_documented_node_config() -> None:
    assert client_app.__doc__ is not None
    (line,) = [x for x in client_app.__doc__.splitlines() if "--node-config" in x]
    _, config = shlex.split(line)
    assert parse_config_args([config]) == {
        "partition-id": 0,
        "num-partitions": 3,
        "num-workers": 2,
        "data": "Folder('mine')",
    }


def test_a_node_whose_data_do_not_fit_is_named(tmp_path: Path) -> None:
    configs = [{"data": f"Synthetic(rows=20, features={f}, classes=3)", "num-workers": 2} for f in (4, 5, 4)]
    done = own(configs, tmp_path / "run")
    (why,) = {line["node 1"] for line in done.history["failures"]}
    assert why.startswith(
        "BadInput: data of this node need another model than the server's: 1.weight is (3, 5) here"
    )


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("Digits(", "is not an expression"),
        ("Digitz()", "did you mean 'Digits'"),
        ("Folder('absent')", "absent"),
    ],
)
def test_wrong_data_of_a_node_are_named(data: str, text: str, tmp_path: Path) -> None:
    fine = {"data": "Synthetic(rows=20, features=4, classes=3)", "num-workers": 1}
    done = own([fine, {"data": data}, fine], tmp_path / "run")
    assert text in done.history["failures"][0]["node 1"]
    assert "node-config: data = " in done.history["failures"][0]["node 1"]


def test_all_nodes_have_data_of_their_own_or_none(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="some nodes have data of their own"):
        own([{}, {"data": "Digits()"}, {}], tmp_path / "run")
