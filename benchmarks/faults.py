"""The README's table of faults, from what ``tests/deployment/test_faults.py`` wrote to ``benchmarks/results/faults.json``."""

from __future__ import annotations

from typing import Any


def markdown(results: dict[str, Any]) -> str:
    """Return the section of the README.

    Examples
    --------
    >>> row = {"fault": "a node leaves", "missing": "node 1 in round 3", "then": "ends without it"}
    >>> print(markdown({"about": {"flwr": "1.41.0", "nodes": 3, "date": "2026-01-02"}, "faults": [row]}))
    | fault | missing, by the history | the run |
    | --- | --- | --- |
    | a node leaves | node 1 in round 3 | ends without it |
    <BLANKLINE>
    3 SuperNodes and a SuperLink with TLS and registered keys, `min-nodes = 1`, Flower 1.41.0, 2026-01-02. Every run ends
    with each of its rounds once in the history.
    """
    lines = ["| fault | missing, by the history | the run |", "| --- | --- | --- |"]
    lines += [f"| {row['fault']} | {row['missing']} | {row['then']} |" for row in results["faults"]]
    about = results["about"]
    return "\n".join([
        *lines,
        "",
        f"{about['nodes']} SuperNodes and a SuperLink with TLS and registered keys, `min-nodes = 1`, Flower "
        f"{about['flwr']}, {about['date']}. Every run ends",
        "with each of its rounds once in the history.",
    ])
