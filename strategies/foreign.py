"""Any strategy that Flower ships, as a rule: written ``flwr.FedAdam(eta=0.1)`` in an experiment."""

from __future__ import annotations

import difflib
import gc
import hashlib
import inspect
import logging
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from fedsim.compat import Run, ensure_identity
from fedsim.random import key
from fedsim.tree import Stack, Tree, clone, zeros_like
from strategies.base import Broadcast, Report, Rule, State

# What a Flower strategy remembers between rounds: attribute and the type in which it keeps it.
_MEMORY: dict[type[Strategy], dict[str, type]] = {
    flower.FedAvg: {},
    flower.FedAvgM: {"current_arrays": ArrayRecord, "momentum_vector": list},
    flower.FedAdagrad: {"m_t": dict, "v_t": dict},
    flower.FedAdam: {"m_t": dict, "v_t": dict},
    flower.FedYogi: {"m_t": dict, "v_t": dict},
    flower.FedMedian: {},
    flower.FedTrimmedAvg: {},
    flower.Krum: {},
    flower.MultiKrum: {},
    flower.Bulyan: {},
    flower.QFedAvg: {},
    flower.DifferentialPrivacyServerSideFixedClipping: {},
    flower.DifferentialPrivacyServerSideAdaptiveClipping: {"clipping_norm": float},
}
_CLASSES = {c.__name__: c for c in _MEMORY}

_CLIENT_SIDE = "clips in the clients; use flwr.DifferentialPrivacyServerSide{}Clipping(...)"
_REFUSED = {
    "FedProx": "acts in the clients; use strategy = 'FedAvg()' and client = 'Prox(SGD(lr=...), mu=...)'",
    "FedXgbBagging": "merges trees, not tensors; there is no substitute here",
    "FedXgbCyclic": "merges trees, not tensors; there is no substitute here",
    "DifferentialPrivacyClientSideFixedClipping": _CLIENT_SIDE.format("Fixed"),
    "DifferentialPrivacyClientSideAdaptiveClipping": _CLIENT_SIDE.format("Adaptive"),
}

_SAMPLING = "the experiment chooses who takes part; use `participation`"
_PROTOCOL = "it belongs to the messages, which fedsim writes; leave it out"
_SET_HERE = {
    "fraction_train": _SAMPLING,
    "min_train_nodes": _SAMPLING,
    "min_available_nodes": _SAMPLING,
    "fraction_evaluate": "the experiment chooses who evaluates; leave it out",
    "min_evaluate_nodes": "the experiment chooses who evaluates; leave it out",
    "eta_l": "clients have their own rate; use client = 'SGD(lr=...)'",
    "weighted_by_key": _PROTOCOL,
    "arrayrecord_key": _PROTOCOL,
    "configrecord_key": _PROTOCOL,
    "train_loss_key": _PROTOCOL,
    "train_metrics_aggr_fn": _PROTOCOL,
    "evaluate_metrics_aggr_fn": _PROTOCOL,
    "selection_rule": "a function cannot be written in an expression; Flower's default is used",
    "accountant": "a privacy accountant cannot be written in an expression; compute the budget apart",
}
_EVERYBODY = {"fraction_train": 1.0, "min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}


@dataclass(frozen=True, repr=False)
class FlowerStrategy(Rule):
    """A strategy of ``flwr.serverapp.strategy``, run by Flower's own code on messages made in memory.

    Its ``num-examples`` is the number of training rows, its ``train_loss`` the loss of the report. The model
    keeps its dtype, whatever Flower computes in.

    =============================================  ==========================================================
    strategy                                       works?
    =============================================  ==========================================================
    FedAvg, FedAvgM, FedMedian, FedTrimmedAvg,     yes
    Krum, MultiKrum
    FedAdagrad, FedAdam, FedYogi                   yes, in Flower's form (see `strategies.server_opt`)
    Bulyan                                         yes, with ``4 num_malicious_nodes + 3`` participants
    QFedAvg                                        yes; its loss is the mean over the round's minibatches
    DifferentialPrivacyServerSideFixedClipping,    yes, around ``strategy=flwr....``; a row equal to the
    DifferentialPrivacyServerSideAdaptiveClipping  model is an error in Flower; the noise is a function of
                                                   the initial model and the round
    DifferentialPrivacyClientSide...Clipping       no, clients do not clip
    FedProx                                        no, it is ``client = "Prox(...)"``
    FedXgbBagging, FedXgbCyclic                    no, they merge trees
    =============================================  ==========================================================

    Parameters
    ----------
    name : str
        Name of the class.
    arguments : tuple of (str, value)
        Its arguments by name: numbers, or a further `FlowerStrategy` for ``strategy``.

    Raises
    ------
    ValueError
        If the class or an argument is unknown, refused, missing or out of range.

    Examples
    --------
    >>> FlowerStrategy("FedAdam", (("eta", 0.1), ("tau", 1e-3)))
    flwr.FedAdam(eta=0.1, tau=0.001)
    """

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.name in _REFUSED:
            self._fail(_REFUSED[self.name])
        if self.name not in _CLASSES:
            raise ValueError(f"flwr: unknown strategy {self.name!r}; {_choose(self.name, _CLASSES)}")
        parameters = inspect.signature(_CLASSES[self.name]).parameters
        allowed = [p for p in parameters if p not in _SET_HERE]
        for argument, value in self.arguments:
            if argument in _SET_HERE and argument in parameters:
                if (argument, value) != ("fraction_train", 1):
                    self._fail(f"{argument} = {value!r}: {_SET_HERE[argument]}")
            elif argument not in allowed:
                self._fail(f"has no argument {argument!r}; {_choose(argument, allowed)}")
            else:
                self._check(argument, value, parameters[argument].annotation)
        given = dict(self.arguments)
        for argument in allowed:
            if parameters[argument].default is inspect.Parameter.empty and argument not in given:
                self._fail(f"needs the argument {argument!r}")
        try:
            self._build()
        except ValueError as error:
            self._fail(" ".join(str(error).split()))

    def __repr__(self) -> str:
        return f"flwr.{self.name}({', '.join(f'{k}={v!r}' for k, v in self.arguments)})"

    def init(self, theta: Tree, num_workers: int) -> tuple[State, Broadcast]:
        """Start in round 0 with everything Flower's strategy remembers at 0."""
        digest = hashlib.blake2b(digest_size=4)
        for _, x in sorted(theta.items()):
            digest.update(x.detach().cpu().numpy().tobytes())
        noise = int.from_bytes(digest.digest(), "little")
        device = next(iter(theta.values())).device
        state: State = {
            "model": theta,
            "flower": {k: torch.tensor(v, device=device) for k, v in (("round", 0), ("noise", noise))},
        }
        for name, memory, attribute, kind in self._memories(self._build()):
            if kind is float:
                state[name] = {"value": torch.tensor(memory[attribute], dtype=torch.float64, device=device)}
            else:
                state[name] = clone(theta) if kind is ArrayRecord else zeros_like(theta)
        return state, {"model": theta}

    def merge(self, state: State, rows: Stack, report: Report) -> tuple[State, Broadcast]:
        """Let a fresh object of Flower's class, put into its last state, aggregate one reply a row.

        Parameters
        ----------
        state : dict of str to Tree
            What `init` or the last `merge` returned.
        rows : Stack
            Parameters after the local steps, leaves ``[m, *]``.
        report : Report
            What the workers told.

        Returns
        -------
        tuple of State and Broadcast
            The model and all that Flower's object remembers, on the device of the rows.

        Raises
        ------
        ValueError
            If Flower gives no model.
        """
        strategy = self._build()
        # Flower matches arrays by position and draws noise for one after the other: the order of keys must
        # not depend on whether the state has been on disk.
        names = sorted(state["model"])
        for name, memory, attribute, kind in self._memories(strategy):
            memory[attribute] = _decode(state[name], kind, names)
        server_round = int(state["flower"]["round"]) + 1
        noise = key(int(state["flower"]["noise"]), "flower", server_round)
        nodes = [worker + 1 for worker in report.worker.tolist()]
        contents = dict(zip(nodes, _contents({k: rows[k] for k in names}, report), strict=True))
        ensure_identity()
        with _quiet_and_seeded(noise):
            messages = strategy.configure_train(
                server_round,
                _record(_arrays({k: state["model"][k] for k in names})),
                ConfigRecord(),
                _Participants(nodes),
            )
            # Flower samples all nodes, in an order that means nothing.
            ordered = sorted(messages, key=lambda m: m.metadata.dst_node_id)
            replies = [Message(contents[m.metadata.dst_node_id], reply_to=m) for m in ordered]
            try:
                merged, _ = strategy.aggregate_train(server_round, replies)
            except ZeroDivisionError:
                self._fail("Flower divides by 0: all weights are 0, or it clips a row that equals the model")
        if merged is None:
            self._fail(
                f"Flower makes no model of the rows of {len(nodes)} participants; it needs more of them"
            )
        like = next(iter(rows.values()))
        new: State = {name: _encode(memory[a], names) for name, memory, a, _ in self._memories(strategy)}
        new["flower"] = state["flower"] | {"round": torch.tensor(server_round)}
        new["model"] = {k: torch.from_numpy(merged[k].numpy()).to(x.dtype) for k, x in state["model"].items()}
        new = {name: {k: x.to(like.device) for k, x in memory.items()} for name, memory in new.items()}
        return new, {"model": new["model"]}

    def _build(self) -> Strategy:
        """Make a fresh object of Flower's class."""
        component = _CLASSES[self.name]
        parameters = inspect.signature(component).parameters
        arguments = {k: v for k, v in _EVERYBODY.items() if k in parameters}
        arguments |= {k: v._build() if isinstance(v, FlowerStrategy) else v for k, v in self.arguments}
        return component(**arguments)

    def _memories(self, strategy: Strategy) -> Iterator[tuple[str, dict[str, Any], str, type]]:
        """Go through all that a strategy and those inside it remember: name, where, attribute, type."""
        for attribute, kind in _MEMORY[_CLASSES[self.name]].items():
            yield attribute, vars(strategy), attribute, kind
        for argument, value in self.arguments:
            if isinstance(value, FlowerStrategy):
                for name, memory, attribute, kind in value._memories(vars(strategy)[argument]):
                    yield f"{argument}.{name}", memory, attribute, kind

    def _check(self, argument: str, value: object, annotation: Any) -> None:
        if annotation is Strategy:
            if not isinstance(value, FlowerStrategy):
                self._fail(f"{argument} = {value!r} must be one of Flower's, such as flwr.FedAvg()")
            return
        try:
            TypeAdapter(annotation).validate_python(value, strict=True)
        except ValidationError:
            allowed = "a whole number" if annotation is int else "a number"
            self._fail(f"{argument} = {value!r} must be {allowed}")

    def _fail(self, text: str) -> NoReturn:
        raise ValueError(f"flwr.{self.name}: {text}") from None


class _LiveArray(Array):
    """An array of a message that never leaves this process, written to bytes only for who asks for them."""

    def __init__(self, ndarray: NDArray[Any]) -> None:
        self.__dict__.update(
            dtype=str(ndarray.dtype), shape=ndarray.shape, stype="numpy.ndarray", _ndarray=ndarray
        )

    @property
    def data(self) -> bytes:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The bytes, in Flower's encoding."""
        return Array(self.__dict__["_ndarray"]).data

    def numpy(self) -> NDArray[Any]:
        """Return a copy: some strategies compute in place."""
        return self.__dict__["_ndarray"].copy()


class _Participants(Grid):
    """A grid that knows its nodes and carries nothing."""

    def __init__(self, nodes: list[int]) -> None:
        self._nodes = nodes

    def get_node_ids(self) -> Iterable[int]:
        return self._nodes

    def set_run(self, run: Run) -> None:
        raise RuntimeError("the grid of flwr strategies carries no run")

    @property
    def run(self) -> Run:
        raise RuntimeError("the grid of flwr strategies carries no run")

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise RuntimeError("the grid of flwr strategies carries no messages")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise RuntimeError("the grid of flwr strategies carries no messages")

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise RuntimeError("the grid of flwr strategies carries no messages")


@contextmanager
def _quiet_and_seeded(noise: int) -> Iterator[None]:
    """Keep Flower's lines for every reply off the terminal, and its draws away from everybody else's.

    Flower draws its noise with NumPy's global generator and samples nodes with Python's. Both are as before
    when the block ends. Some strategies collect garbage once a reply: nothing that is older than the block
    is looked at.
    """
    logger = logging.getLogger("flwr")
    level, python, legacy = logger.level, random.getstate(), np.random.get_state()  # noqa: NPY002
    logger.setLevel(max(level, logging.WARNING))
    np.random.seed([noise & 0xFFFFFFFF, noise >> 32 & 0xFFFFFFFF])  # noqa: NPY002
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        logger.setLevel(level)
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


def _arrays(x: Tree) -> dict[str, NDArray[Any]]:
    return {k: leaf.detach().cpu().numpy() for k, leaf in x.items()}


def _record(arrays: dict[str, NDArray[Any]]) -> ArrayRecord:
    record = ArrayRecord()
    for k, x in arrays.items():
        record[k] = _LiveArray(x)
    return record


def _contents(rows: Stack, report: Report) -> list[RecordDict]:
    """Write what each worker would have sent."""
    arrays = _arrays(rows)
    told = zip(report.weight.tolist(), report.loss.tolist(), strict=True)
    return [
        RecordDict({
            # The dots keep a leaf without axes an array.
            "arrays": _record({k: x[i, ...] for k, x in arrays.items()}),
            "metrics": MetricRecord({"num-examples": weight, "train_loss": loss}),
        })
        for i, (weight, loss) in enumerate(told)
    ]


def _decode(memory: Tree, kind: type, names: list[str]) -> Any:
    if kind is float:
        return memory["value"].item()
    arrays = _arrays({k: memory[k] for k in names})
    if kind is ArrayRecord:
        return _record(arrays)
    return list(arrays.values()) if kind is list else arrays


def _encode(value: Any, names: list[str]) -> Tree:
    if isinstance(value, float):
        return {"value": torch.tensor(value, dtype=torch.float64)}
    if isinstance(value, ArrayRecord):
        value = {k: x.numpy() for k, x in value.items()}
    elif isinstance(value, list):
        value = dict(zip(names, value, strict=True))
    return {k: torch.from_numpy(np.asarray(x)) for k, x in value.items()}


def _choose(word: str, allowed: Iterable[str]) -> str:
    names = list(allowed)
    match = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"did you mean {match[0]!r}? " if match else ""
    return f"{hint}allowed: {', '.join(names) or 'none'}"
