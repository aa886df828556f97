"""The short form of the notebook about flat minima runs, and what it asserts holds."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_short_form(monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="needs the extra 'notebooks'")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra 'notebooks'")
    monkeypatch.setenv("FEDSIM_SHORT", "1")
    notebook = nbformat.read(FOLDER / "flat_minima.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
