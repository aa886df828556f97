"""Frames: what is sent between a process and a resident arrives bit by bit, and what is no frame is refused."""

from __future__ import annotations

import ast
import json
import os
import pickle
import struct
import sys
import threading
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from messages_toys import Explosive

from fedsim import frames

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="the folder and its socket are those of POSIX"
)


def content() -> RecordDict:
    return RecordDict({
        "about": ConfigRecord({"n": 2**63, "name": "a", "x": 1.0, "yes": True, "list": [3, 1], "none": []}),
        "arrays": ArrayRecord({
            "z": Array(np.arange(6, dtype=np.float32).reshape(2, 3) / 3),
            "a": Array(np.array(1 / 3)),
            "empty": Array(np.zeros((0, 4), dtype=np.int64)),
            "f": Array(np.asfortranarray(np.arange(6.0).reshape(2, 3))),
        }),
        "report": MetricRecord({"loss": [0.1, float("nan"), float("inf"), 5e-324], "count": 3, "mean": 2.0}),
    })


def test_records_arrive_bit_by_bit_and_in_their_order() -> None:
    sent = content()
    described, tensors = frames.pack(sent)
    got = frames.unpack(json.loads(json.dumps(described)), tensors)
    assert [*got] == [*sent]
    assert got["about"] == sent["about"]
    assert [type(v) for v in got["report"].values()] == [type(v) for v in sent["report"].values()]
    np.testing.assert_array_equal(got["report"]["loss"], sent["report"]["loss"])  # type: ignore[arg-type]
    assert [*got.array_records["arrays"]] == [*sent.array_records["arrays"]]
    for key, array in sent.array_records["arrays"].items():
        there, here = got.array_records["arrays"][key].numpy(), array.numpy()
        assert (there.dtype, there.shape) == (here.dtype, here.shape)
        np.testing.assert_array_equal(there, here)


def test_a_frame_is_what_was_sent() -> None:
    a, b = Pipe()
    with a, b:
        frames.send(a, {"kind": "x", "n": 2**63}, b"123")
        assert frames.receive(b) == ({"kind": "x", "n": 2**63}, b"123")


@pytest.mark.parametrize(
    "header", [b"", b"{", b"[1]", b"\xff", pickle.dumps(Explosive()), b"[" * 100_000], ids=str
)
def test_what_is_not_a_frame_is_refused(header: bytes) -> None:
    a, b = Pipe()
    with a, b:
        sender = threading.Thread(target=lambda: (a.send_bytes(header), a.send_bytes(b"")))
        sender.start()
        with pytest.raises(frames.BadFrame):
            frames.receive(b)
        sender.join()


@pytest.mark.parametrize("part", [0, 1])
def test_what_is_too_long_is_refused_before_it_is_read(part: int) -> None:
    a, b = Pipe()
    with a, b:
        if part:
            a.send_bytes(b"{}")
        os.write(
            a.fileno(), struct.pack("!i", -1) + struct.pack("!Q", 2**62)
        )  # a length, and nothing behind it
        with pytest.raises(frames.BadFrame, match="longer than"):
            frames.receive(b)


@pytest.mark.parametrize(
    "described",
    [
        None,
        3,
        [1],
        [["a", "arrays"]],
        [["a", "arrays", {"x": "7"}]],
        [["a", "arrays", ["x"]]],
        [["a", "object", {}]],
        [["a", "metrics", {"x": "text"}]],
        [["a", "config", {"x": {"y": 1}}]],
        [["a", "config", {"x": None}]],
    ],
)
def test_other_descriptions_are_refused(described: Any) -> None:
    with pytest.raises(frames.BadFrame, match="not a description"):
        frames.unpack(described, frames.pack(RecordDict())[1])


@pytest.mark.parametrize(
    "tensors", [b"", b"garbage", pickle.dumps(Explosive()), struct.pack("<Q", 2**60) + b"{}"]
)
def test_other_tensors_are_refused(tensors: bytes) -> None:
    with pytest.raises(frames.BadFrame, match="not a description"):
        frames.unpack([], tensors)


def test_objects_are_not_sent() -> None:
    with pytest.raises(TypeError, match="bytes"):
        frames.send(Pipe()[0], {"x": pickle.dumps(1)})


@pytest.mark.parametrize("name", ["frames", "reach", "resident", "client_app", "hosting"])
def test_nothing_is_pickled_or_evaluated(name: str) -> None:
    """Of a connection only the methods for bytes are used: the others pickle."""
    code = ast.parse((ROOT / "fedsim" / f"{name}.py").read_text())
    imported = {a.name for n in ast.walk(code) if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}
    assert not imported & {"pickle", "marshal", "shelve", "dill"}
    called = {ast.unparse(n.func) for n in ast.walk(code) if isinstance(n, ast.Call)}
    assert not called & {"eval", "exec", "connection.send", "connection.recv", "torch.load", "listener.recv"}
