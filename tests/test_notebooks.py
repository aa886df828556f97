"""Every notebook is stored with its outputs, runs in its short form, and what it asserts holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NEEDS = {"fewer_syncs": "tinyshakespeare"}
"""Folders of FEDSIM_DATA without which a notebook cannot run."""


@pytest.fixture(params=sorted(FOLDER.glob("*.ipynb")), ids=lambda file: file.stem)
def notebook(request: pytest.FixtureRequest):
    nbformat = pytest.importorskip("nbformat", reason="needs the extra 'notebooks'")
    return request.param.stem, nbformat.read(request.param, as_version=4)


def test_it_is_stored_as_it_was_executed(notebook):
    cells = [cell for cell in notebook[1].cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_its_short_form_runs(notebook, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs the extra 'notebooks'")
    name, content = notebook
    needed = NEEDS.get(name)
    if needed and not Path(os.environ.get("FEDSIM_DATA", "/nowhere"), needed).is_dir():
        pytest.skip(f"FEDSIM_DATA names no folder that holds {needed}/")
    monkeypatch.setenv("FEDSIM_SHORT", "1")
    nbclient.NotebookClient(content, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
