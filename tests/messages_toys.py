"""A small run over messages, and nodes that fail or whose replies are changed on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsim import Experiment, client_app
from fedsim.federation import load
from fedsim.grid import InProcessGrid
from fedsim.over_grid import OverGrid, greet
from fedsim.probes import Snapshot
from fedsim.simulate import rounds

TINY = {
    "data": "Synthetic(rows=100, features=4, classes=3)",
    "partition": "IID()",
    "model": "Linear()",
    "num-workers": 6,
    "rounds": 2,
    "local-steps": 2,
    "batch-size": 4,
    "dtype": "float64",
    "device": "cpu",
    "min-nodes": 2,
}


class Tampered(ClientApp):
    """The ClientApp, but the content of what node 1 replies to one kind of message is changed."""

    def __init__(
        self, kind: str, change: Callable[[RecordDict], object], nodes: Sequence[int] = (1,)
    ) -> None:
        self.kind, self.change, self.nodes = kind, change, nodes

    def __call__(self, message: Message, context: Context) -> Message:
        reply = client_app.app(message, context)
        if message.metadata.message_type == self.kind and context.node_config["partition-id"] in self.nodes:
            self.change(reply.content)
        return reply


class Failing(ClientApp):
    """The ClientApp, but some nodes raise at one kind of message."""

    def __init__(self, kind: str, nodes: Sequence[int] = (1,)) -> None:
        self.kind, self.nodes = kind, nodes

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type == self.kind and context.node_config["partition-id"] in self.nodes:
            raise ValueError("no memory\nleft")
        return client_app.app(message, context)


class Explosive:
    """An object that fails the test when it is unpickled."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("unpickled",))


def tiny(**changes: Any) -> Experiment:
    return Experiment.from_mapping(TINY | changes)


def carrier(experiment: Experiment, grid: InProcessGrid) -> OverGrid:
    return OverGrid(grid, experiment, load(experiment), greet(grid, 3))


def run(experiment: Experiment, app: ClientApp) -> list[Snapshot]:
    grid = InProcessGrid(app, 3, experiment.to_mapping())
    return [snapshot for snapshot, _ in rounds(experiment, carrier=carrier(experiment, grid))]


def about(name: str, values: Any) -> Callable[[RecordDict], object]:
    return lambda content: content.config_records["about"].update({name: values})
