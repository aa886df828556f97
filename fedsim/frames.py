"""How a ClientApp's process and its node's resident speak: JSON and safetensors over a local connection, never pickle.

A *frame* is two byte strings, one after the other: a JSON object, and the tensors that it numbers, in safetensors'
format. This module imports no PyTorch: it is a part of the process that Flower starts for every message.
"""

from __future__ import annotations

import json
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors import SafetensorError
from safetensors.numpy import load, save

MAX_HEADER = 2**28
"""Longest JSON that is read, in bytes."""
MAX_TENSORS = 2**36
"""Most bytes of tensors that are read."""


class BadFrame(Exception):
    """What came is not a frame; the message says why."""


def send(connection: Connection, header: dict[str, Any], tensors: bytes = b"") -> None:
    """Send a frame.

    Parameters
    ----------
    connection : Connection
        From ``multiprocessing.connection``; only its methods for bytes are used, which pickle nothing.
    header : dict
        What JSON can say.
    tensors : bytes
        In safetensors' format.
    """
    text = json.dumps(header).encode()
    connection.send_bytes(text)
    connection.send_bytes(tensors)


def receive(
    connection: Connection, max_header: int = MAX_HEADER, max_tensors: int = MAX_TENSORS
) -> tuple[dict[str, Any], bytes]:
    """Receive a frame.

    Parameters
    ----------
    connection : Connection
        From ``multiprocessing.connection``.
    max_header, max_tensors : int
        Longer parts are refused before they are read.

    Returns
    -------
    tuple of dict and bytes
        What `send` was given.

    Raises
    ------
    BadFrame
        If a part is too long, or the first is not a JSON object.
    EOFError, ConnectionError
        If the other side is gone.
    """
    text = _part(connection, max_header)
    tensors = _part(connection, max_tensors)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadFrame(f"not JSON: {str(error)[:100]}") from None
    if not isinstance(header, dict):
        raise BadFrame("not a JSON object")
    return header, tensors


def _part(connection: Connection, limit: int) -> bytes:
    try:
        return connection.recv_bytes(limit)
    except ConnectionError:
        raise
    except OSError as error:  # what a connection raises for a length beyond the limit
        raise BadFrame(f"longer than {limit:,} bytes, or cut off: {error}") from None


def pack(content: RecordDict) -> tuple[list[Any], bytes]:
    """Describe Flower's records, and collect their arrays.

    Parameters
    ----------
    content : RecordDict
        Of numbers, text, lists and arrays; not of bytes.

    Returns
    -------
    tuple of list and bytes
        For the header, every record's name, kind and entries, arrays being numbered; and the arrays. The order of
        records and of their entries is kept, which safetensors alone does not.
    """
    arrays: dict[str, np.ndarray] = {}
    described: list[Any] = []
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            entries = {}
            for key, array in record.items():
                entries[key] = str(len(arrays))
                arrays[entries[key]] = np.asarray(array.numpy(), order="C")
            described.append([name, "arrays", entries])
        else:
            described.append([name, "metrics" if isinstance(record, MetricRecord) else "config", {**record}])
    return described, save(arrays)


def unpack(described: Any, tensors: bytes) -> RecordDict:
    """Build Flower's records again.

    Parameters
    ----------
    described, tensors
        What `pack` returned.

    Returns
    -------
    RecordDict
        Equal to what was packed.

    Raises
    ------
    BadFrame
        If there is something else in their place.
    """
    content = RecordDict()
    try:
        arrays = load(tensors)
        for name, kind, entries in described:
            if kind == "arrays":
                content[name] = ArrayRecord({k: Array(arrays[number]) for k, number in entries.items()})
            else:
                content[name] = {"metrics": MetricRecord, "config": ConfigRecord}[kind](entries)
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadFrame(f"not a description of records and their arrays: {str(error)[:100]}") from None
    return content
