"""Canaries: they fail when a Flower release moves what fedsim/compat.py relies on."""

import importlib
import inspect
import sys

import flwr
import pytest
from flwr.app import Error, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedsim import compat
from fedsim.grid import InProcessGrid

HELP = f"flwr {flwr.__version__} moved or changed {{}}: adapt fedsim/compat.py, then the bounds on flwr in pyproject.toml"

PRIVATE = [
    ("flwr.supercore.task_identity", "TaskIdentity"),
    ("flwr.supercore.run", "Run"),
    ("flwr.common.constant", "ErrorCode"),
    ("flwr.common.constant", "PARTITION_ID_KEY"),
    ("flwr.common.constant", "NUM_PARTITIONS_KEY"),
    ("flwr.common.constant", "SUPERLINK_NODE_ID"),
    ("flwr.app.message", "make_message"),
    ("flwr.superlink.grid.inmemory_grid", "InMemoryGrid"),
    ("flwr.superlink.grid.http_grid", "HttpGrid"),
]


@pytest.mark.parametrize(("module", "name"), PRIVATE)
def test_flower_still_has_the_private_name(module: str, name: str) -> None:
    try:
        found = hasattr(importlib.import_module(module), name)
    except ImportError:
        found = False
    assert found, HELP.format(f"{module}.{name}")


def test_identity_is_three_numbers_of_the_class() -> None:
    from flwr.supercore.task_identity import TaskIdentity

    fields = sorted(name for name in vars(TaskIdentity) if name.endswith("_id"))
    assert fields == ["_node_id", "_run_id", "_task_id"], HELP.format("the fields of TaskIdentity")


def test_grid_has_no_further_abstract_methods() -> None:
    expected = {
        "create_message",
        "get_node_ids",
        "pull_messages",
        "push_messages",
        "run",
        "send_and_receive",
        "set_run",
    }
    assert Grid.__abstractmethods__ == expected, HELP.format("the abstract methods of Grid")


def test_message_id_is_the_one_that_was_set() -> None:
    with compat.with_identity():
        message = Message(RecordDict(), 7, "train")
    assert message.metadata.message_id == ""
    compat.set_message_id(message, "a")
    assert message.metadata.message_id == "a", HELP.format("the message id in Metadata")
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "a"


def test_identity_reaches_the_message_and_is_restored() -> None:
    with compat.with_identity(run_id=5, node_id=6, task_id=7):
        with compat.with_identity(run_id=8):
            assert compat.current_run_id() == 8
        metadata = Message(RecordDict(), 9, "query").metadata
    assert (metadata.run_id, metadata.src_node_id, metadata.src_task_id) == (5, 6, 7), HELP.format(
        "TaskIdentity"
    )


def test_ensured_identity_does_not_replace_one_that_is_set() -> None:
    with compat.with_identity(run_id=5):
        compat.ensure_identity()
        assert compat.current_run_id() == 5


def test_identity_is_restored_after_an_exception() -> None:
    with compat.with_identity(run_id=5):
        with pytest.raises(KeyError), compat.with_identity(run_id=6):
            raise KeyError
        assert compat.current_run_id() == 5


def test_copy_with_content_keeps_the_metadata_apart() -> None:
    with compat.with_identity():
        message = Message(RecordDict(), 7, "train")
    compat.set_message_id(message, "a")
    other = compat.with_content(message, RecordDict())
    other.metadata.dst_node_id = 8
    assert (message.metadata.dst_node_id, other.metadata.message_id) == (7, "a"), HELP.format("make_message")
    assert isinstance(other.metadata, Metadata)


def test_run_carries_its_configuration() -> None:
    run = compat.new_run(3, {"seed": 1})
    assert (run.run_id, run.override_config) == (3, {"seed": 1}), HELP.format("Run.create_empty")


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (0, "unknown"),
        (1, "load client app exception"),
        (2, "client app raised exception"),
        (5, "node unavailable"),
        (8, "client app crashed"),
        (99, "error 99"),
    ],
)
def test_error_codes_keep_their_numbers(code: int, name: str) -> None:
    assert compat.error_name(Error(code).code) == name, HELP.format("ErrorCode")


def test_simulation_grid_is_told_from_the_others() -> None:
    from flwr.server.superlink.linkstate import LinkStateFactory
    from flwr.superlink.grid.http_grid import HttpGrid
    from flwr.superlink.grid.inmemory_grid import InMemoryGrid

    # Only the class matters, so no link state is built.
    simulated = InMemoryGrid.__new__(InMemoryGrid)
    assert compat.is_simulation(simulated), HELP.format("InMemoryGrid")
    assert not compat.is_simulation(HttpGrid(token="t")), HELP.format("HttpGrid")
    assert not compat.is_simulation(InProcessGrid(ClientApp(), 1, {}))
    assert "state_factory" in inspect.signature(InMemoryGrid).parameters
    assert LinkStateFactory.__module__ in sys.modules


def test_engines_still_answer_exceptions_as_the_in_process_grid_does() -> None:
    simulation = importlib.import_module("flwr.server.superlink.fleet.vce.vce_api")
    deployment = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    for module in (simulation, deployment):
        source = inspect.getsource(module)
        assert "e_code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION" in source, HELP.format(module.__name__)
        assert 'reason = str(type(ex)) + ":<\'" + str(ex) + "\'>"' in source, HELP.format(module.__name__)


def test_a_process_for_one_message_is_known_by_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType

    command = TASK_TYPE_TO_COMMAND[TaskType.CLIENT_APP]
    for place in ("/venv/bin/", ""):
        monkeypatch.setattr(sys, "argv", [f"{place}{command}", "--insecure"])
        assert compat.is_for_one_message(), HELP.format("TASK_TYPE_TO_COMMAND")
    for other in ("flwr-simulation", "pytest", "", "-c"):
        monkeypatch.setattr(sys, "argv", [other])
        assert not compat.is_for_one_message()
