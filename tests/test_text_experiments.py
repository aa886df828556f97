"""The experiments on text, cut down to a round: they train, and tell what their figures are drawn from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import fedsim
from fedsim.federation import load

SMALL = sorted((Path(__file__).parents[1] / "experiments").glob("text_*_small.toml"))
pytestmark = pytest.mark.skipif(
    not Path(os.environ.get("FEDSIM_DATA", "/nowhere"), "tinyshakespeare").is_dir(),
    reason="FEDSIM_DATA names no folder that holds tinyshakespeare/",
)


@pytest.mark.parametrize("path", SMALL, ids=[p.stem for p in SMALL])
def test_a_round(path: Path) -> None:
    base = fedsim.Experiment.from_toml(path)
    if "vocabulary" in base.data:
        pytest.importorskip("tokenizers", reason="needs the extra fedsim[text]")
    data = base.data.replace("context=48", "context=8, rows=180")
    model = "Transformer(layers=1, width=8, heads=2)"
    e = base.replace({"data": data, "model": model, "rounds": 2, "local_steps": 2, "device": "cpu"})
    federation = load(e)
    *_, (last, _) = fedsim.rounds(e, federation)
    figures: dict[str, Any] = dict(last.metrics)
    assert 1 < figures["test_perplexity"] < 2 * federation.dataset.num_outputs
    pulls = figures["pseudo_syncs"]
    assert figures["gradients"] == 4 * 2 * 2 - pulls
    assert pulls == 0 or "PALSGD" in e.client
    assert figures["sim_time"] > 0
    assert figures["bytes_up"] <= figures["bytes_down"]
