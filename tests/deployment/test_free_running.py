"""Workers that come alone, on a real deployment: replies are taken as they come, and that node gets new work at once."""

from itertools import pairwise
from pathlib import Path

import pytest
from loopback import Federation

import fedsim
from fedsim import Experiment
from fedsim.cli import write_app
from fedsim.flower import run_flower

pytestmark = [pytest.mark.deployment, pytest.mark.slow]

ROUNDS, STEPS, WORKERS = 4, 2, 5


def test_nobody_waits_for_the_other_node(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three workers share the first node and two the second, which so come more often: no node waits between messages."""
    monkeypatch.setenv("FLWR_HOME", str(federation.home))
    chosen = Experiment(
        data="Synthetic(rows=150, features=4, classes=3)",
        partition="IID()",
        model="MLP(hidden=(3,))",
        client="Nesterov(lr=0.1, momentum=0.5)",
        strategy="ElasticAveraging()",
        schedule="FreeRunning()",
        num_workers=WORKERS,
        rounds=ROUNDS,
        local_steps=STEPS,
        batch_size=4,
        dtype="float64",
        device="cpu",
        out=str(tmp_path / "run"),
    )
    folder = tmp_path / "app"
    folder.mkdir()
    write_app(folder, chosen)
    lines: list[str] = []
    outcome = run_flower(
        folder, chosen.to_mapping(), 2, federation=federation.connection, on_line=lines.append, timeout=1200.0
    )
    assert outcome.completed, lines
    assert "2 nodes with 5 workers" in lines
    history = fedsim.load(tmp_path / "run").history
    assert "failures" not in history
    # each arrival is counted once, with its steps and with a row up and a row down
    arrivals = [WORKERS * r for r in range(1, ROUNDS + 1)]
    assert history["participants"].tolist() == [WORKERS] * ROUNDS
    assert history["local_steps"].tolist() == [STEPS * n for n in arrivals]
    row = 8 * ((4 + 1) * 3 + (3 + 1) * 3)
    assert history["bytes_up"].tolist() == [row * (WORKERS + n) for n in arrivals]
    # between two arrivals of one worker the others come too, and with a barrier all would come equally often
    most, least = history["arrivals.max"].tolist(), history["arrivals.min"].tolist()
    assert all(a <= b for a, b in (*pairwise(most), *pairwise(least)))
    assert most[-1] > ROUNDS > least[-1] >= 1
    assert max(history["staleness.max"].tolist()) >= 2
