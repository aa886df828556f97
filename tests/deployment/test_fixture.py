"""The deployment fixture itself: the smallest app runs over two SuperNodes, also after one was replaced."""

from pathlib import Path

import pytest
from loopback import Federation

from fedsim.flower import run_flower

TINY_APP = Path(__file__).parents[1] / "tiny_app"

pytestmark = [pytest.mark.deployment, pytest.mark.slow]


def test_smallest_app_runs_over_two_supernodes(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(federation.home))
    lines: list[str] = []
    label = """LeaderSGD(pull=0.1, groups=4), "a" and 'b'"""
    outcome = run_flower(
        TINY_APP, {"label": label}, 2, federation=federation.connection, on_line=lines.append
    )
    assert outcome.status == "finished:completed", outcome.details
    assert [f"node: {i} of 2, label {label}" in lines for i in range(2)] == [True, True]


def test_killed_supernode_can_be_replaced(federation: Federation) -> None:
    before = federation.online()
    federation.kill_node(1)
    federation.start_node(1)
    # Without keys the replacement has an id of its own; the SuperLink misses the old one only later.
    federation.wait_online(1, besides=before)
