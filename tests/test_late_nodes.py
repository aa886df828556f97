"""Nodes that are missing when a run begins, come later, come again under another id, or should not be there."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from flwr.app import Context, Message, RecordDict

import fedsim
from fedsim import BadInput, Experiment, RunFailed, client_app, over_grid, server_app
from fedsim.grid import InProcessGrid
from fedsim.messages import HELLO, ROUND
from fedsim.over_grid import ABSENT, greet

TINY = {
    "data": "Synthetic(rows=150, features=4, classes=3)",
    "model": "MLP(hidden=(3,))",
    "num-workers": 6,
    "rounds": 6,
    "local-steps": 2,
    "batch-size": 4,
    "dtype": "float64",
    "device": "cpu",
    "min-nodes": 1,
    "plan": "vmap",
}


class Coming(InProcessGrid):
    """A grid whose nodes are online in some rounds only, by the messages that were sent; ids count from 2."""

    def __init__(self, times: dict[int, range], configs: list[dict[str, Any]], run: dict[str, Any]) -> None:
        super().__init__(client_app.app, len(configs), run, configs)
        self.times, self.round, self.asked = times, 0, []

    def get_node_ids(self) -> list[int]:
        return [node for node in super().get_node_ids() if self.round in self.times.get(node, range(99))]

    def push_messages(self, messages: Any) -> list[str]:
        messages = list(messages)
        self.asked += [m.metadata.dst_node_id for m in messages if m.metadata.message_type == HELLO]
        if any(m.metadata.message_type == ROUND for m in messages):
            self.round += 1
        return super().push_messages(messages)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(over_grid, "JOIN_SECONDS", 0.0)
    monkeypatch.setattr(server_app, "HELLO_SECONDS", 0.2)


def place(i: int, num: int = 3, **more: Any) -> dict[str, Any]:
    return {"partition-id": i, "num-partitions": num, **more}


def start(
    out: Path, times: dict[int, range], configs: list[dict[str, Any]], **changes: Any
) -> tuple[Any, Coming]:
    run = Experiment.from_mapping(
        TINY | {"out": str(out)} | {k.replace("_", "-"): v for k, v in changes.items()}
    )
    grid = Coming(times, configs, run.to_mapping())
    return server_app.start(run, grid), grid


def missing(history: pd.DataFrame) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    if "failures" in history:
        for number, names in zip(history["round"], history["failures"], strict=True):
            for name in names if isinstance(names, dict) else ():
                found.setdefault(name, []).append(number)
    return found


def test_a_run_begins_with_min_nodes_and_takes_in_who_comes_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Online after two rounds, asked then, and its answer is read a round later.
    done, _ = start(tmp_path / "run", {4: range(2, 99)}, [place(i) for i in range(3)])
    assert done.history["round"].tolist() == [1, 2, 3, 4, 5, 6]
    assert missing(done.history) == {"node 2": [1, 2, 3]}
    assert set(done.history["failures"][0].values()) == {"is offline"}
    assert done.history["participants"].tolist() == [4, 4, 4, 6, 6, 6]
    said = capsys.readouterr().out
    assert "3 nodes with 6 workers, without node 2 for now" in said
    assert "node 2 has come: SuperNode 4" in said


def test_who_came_late_trains_as_if_it_had_been_there(tmp_path: Path) -> None:
    """From the same model, its round is the same: draws depend on seed, round and worker alone."""
    late, _ = start(tmp_path / "late", {4: range(0, 0)}, [place(i) for i in range(3)], rounds=2)
    there, _ = start(tmp_path / "there", {}, [place(i) for i in range(3)], rounds=2)
    assert late.history["participants"].tolist() == [4, 4]
    assert there.history["participants"].tolist() == [6, 6]
    two = fedsim.run(Experiment.from_mapping(TINY | {"out": str(tmp_path / "two"), "rounds": 2}))
    assert there.history["train_loss"].tolist() == pytest.approx(
        two.history["train_loss"].tolist(), rel=1e-12
    )


def test_a_node_that_comes_again_under_another_id_takes_its_place(tmp_path: Path) -> None:
    # As SuperNodes without keys do: ids 3 and 5 are the same place.
    configs = [place(0), place(1), place(2), place(1)]
    done, _ = start(tmp_path / "run", {3: range(0, 2), 5: range(3, 99)}, configs)
    assert missing(done.history) == {"node 1": [3, 4]}


def test_a_place_that_is_taken_is_not_given_away(tmp_path: Path) -> None:
    configs = [place(0), place(1), place(2), place(1)]
    done, grid = start(tmp_path / "run", {4: range(0, 2), 5: range(2, 99)}, configs)
    assert missing(done.history) == {"node 2": [3, 4, 5, 6]}
    assert 5 in grid.asked


@pytest.mark.parametrize(
    "wrong", [place(3), place(2, num=4), place(2, **{"data": "Digits()", "num-workers": 2})]
)
def test_who_has_no_place_is_asked_once_and_left_out(
    wrong: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = [place(0), place(1), place(2), wrong]
    done, grid = start(tmp_path / "run", {4: range(0, 1), 5: range(1, 99)}, configs)
    assert missing(done.history) == {"node 2": [2, 3, 4, 5, 6]}
    assert grid.asked.count(5) == 1
    assert capsys.readouterr().out.count("not taken in: SuperNode 5: its node-config names no place") == 1


def test_a_newcomer_with_other_code_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = over_grid._read_greeting

    def tampered(node: int, content: RecordDict) -> Any:
        if node == 4:
            content.config_records["about"]["code"] = "0" * 16
        return read(node, content)

    monkeypatch.setattr(over_grid, "_read_greeting", tampered)
    done, _ = start(tmp_path / "run", {4: range(1, 99)}, [place(i) for i in range(3)])
    assert missing(done.history) == {"node 2": [1, 2, 3, 4, 5, 6]}
    assert "not taken in: node 2 (SuperNode 4) runs other code" in capsys.readouterr().out


def test_a_newcomer_that_failed_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()
    app = client_app.app

    class Failing(type(app)):
        def __call__(self, message: Message, context: Context) -> Message:
            if context.node_id == 4 and message.metadata.message_type == HELLO and next(calls) == 0:
                raise RuntimeError("not yet")
            return app(message, context)

    monkeypatch.setattr(client_app, "app", Failing())
    done, grid = start(tmp_path / "run", {4: range(1, 99)}, [place(i) for i in range(3)])
    assert grid.asked.count(4) == 2
    assert missing(done.history) == {"node 2": [1, 2, 3]}


def test_without_min_nodes_all_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"^2 of 3 nodes answered within 0.2 s$"):
        start(tmp_path / "run", {4: range(0, 0)}, [place(i) for i in range(3)], min_nodes=0)


def test_fewer_than_min_nodes_are_not_enough(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"^1 of 3 nodes answered within 0.2 s$"):
        start(tmp_path / "run", {3: range(0, 0), 4: range(0, 0)}, [place(i) for i in range(3)], min_nodes=2)


def test_who_comes_alone_must_be_there_from_the_start(tmp_path: Path) -> None:
    changes = {"schedule": "FreeRunning()", "strategy": "ElasticAveraging()", "client": "Nesterov(lr=0.1)"}
    with pytest.raises(RunFailed, match=r"^2 of 3 nodes answered within 0.2 s$"):
        start(tmp_path / "run", {4: range(0, 0)}, [place(i) for i in range(3)], **changes)


def test_nodes_with_data_of_their_own_must_all_be_there() -> None:
    own = {"data": "Synthetic(rows=8, features=4, classes=3, test=0.0)", "num-workers": 2}
    grid = Coming({4: range(0, 0)}, [place(i, **own) for i in range(3)], {})
    with pytest.raises(RunFailed, match=r"^2 of 3 nodes answered within 0.1 s$"):
        greet(grid, 0, 0.1, enough=1)


def test_a_missing_node_is_known_by_its_partition_alone() -> None:
    grid = Coming({3: range(0, 0)}, [place(i) for i in range(3)], {})
    assert [(g.node_id, g.partition) for g in greet(grid, 0, 0.1, enough=2)] == [(2, 0), (ABSENT, 1), (4, 2)]


def test_a_strategy_that_needs_what_workers_keep_says_so_of_a_late_node(tmp_path: Path) -> None:
    changes = {"strategy": "DiLoCo()", "client": "SGD(lr=0.1, momentum=0.5)"}
    assert not Experiment.from_mapping(TINY | changes).parts.strategy.recovers
    done, _ = start(tmp_path / "run", {4: range(1, 99)}, [place(i) for i in range(3)], **changes)
    assert missing(done.history) == {"node 2": [1, 2, 3, 4, 5, 6]}
    why = [names["node 2"] for names in done.history["failures"]]
    assert why[:2] == ["is offline"] * 2
    assert "what its workers keep between rounds is lost: this is round 3" in why[2]


def test_two_processes_do_not_write_to_one_run(tmp_path: Path) -> None:
    experiment = Experiment.from_mapping(TINY | {"out": str(tmp_path / "run"), "rounds": 2})

    def second(*_: Any) -> None:
        with pytest.raises(BadInput, match="another process is running it"):
            fedsim.resume(tmp_path / "run")

    done = fedsim.runs.run(experiment, progress=second, draw=False)
    assert done.history["round"].tolist() == [1, 2]
    assert len(fedsim.resume(tmp_path / "run", changes={"rounds": 3}).history) == 3
