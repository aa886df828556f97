"""Pages: what they say about runs, that they need nothing but themselves, and that a browser shows them."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import fedsim
from fedsim import cli, compare, groups, overlays, report, sweep
from fedsim.results import best, final

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

TINY = {
    "data": "Synthetic(rows=200, features=4, classes=3)",
    "model": "Linear()",
    "num_workers": 4,
    "rounds": 3,
}


def run(path: Path, **changes: str | int | float) -> fedsim.Run:
    return fedsim.run(fedsim.Experiment.from_mapping({**TINY, **changes, "out": str(path)}))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fedsim.Run]:
    folder = tmp_path_factory.mktemp("runs")
    probes = "WorkerLoss(); Drift()"
    return {
        "one": run(folder / "one", holdout=0.3, probes=probes),
        "slow0": run(folder / "slow0", client="SGD(lr=0.01)"),
        "slow1": run(folder / "slow1", client="SGD(0.01)", seed=1),
        "fast0": run(folder / "fast0", client="SGD(lr=0.1)"),
        "fast1": run(folder / "fast1", client="SGD(lr=0.1)", seed=1),
    }


def text_of(page: Path) -> str:
    """What a reader sees: the page without its head and its tags."""
    body = page.read_text(encoding="utf-8").partition("</head>")[2]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def figures_of(page: Path) -> list[str]:
    return re.findall(r'<figure id="figure-([^"]*)"', page.read_text(encoding="utf-8"))


def is_alone(page: Path) -> bool:
    """Whether nothing in a page is fetched from elsewhere, and every link goes to a place within it."""
    text = page.read_text(encoding="utf-8")
    addresses = re.findall(r'(?:src|href|srcset|action|data)="([^"]*)"', text)
    inner = [a.removeprefix("#") for a in addresses if a.startswith("#")]
    elsewhere = [a for a in addresses if not a.startswith(("#", "data:"))]
    absent = [a for a in inner if f'id="{a}"' not in text]
    return (
        not elsewhere
        and not absent
        and "@import" not in text
        and "url(" not in text
        and "<script" not in text
    )


# --- the page of a run -----------------------------------------------------------------------------------------


def test_a_report_shows_figures_results_experiment_and_commands(runs: dict[str, fedsim.Run]) -> None:
    done = runs["one"]
    page = report.write(done.path)
    said = text_of(page)
    assert is_alone(page)
    assert figures_of(page) == ["loss", "accuracy", "costs", "workers", "partition", "worker_loss", "drift"]
    assert 'client = "SGD(lr=0.1)"' in said
    assert f"fedsim run {done.path}/experiment.toml" in said
    accuracy = done.history["test_accuracy"]
    assert f"test accuracy {accuracy.iloc[-1]:.4g} {accuracy.max():.4g} {accuracy.argmax() + 1} " in said
    assert f"torch {done.summary['versions']['torch']}" in said


def test_a_report_of_an_interrupted_run_says_so(tmp_path: Path) -> None:
    done = run(tmp_path / "run")
    for name in ("summary.json", "model.safetensors", "workers.json"):
        (done.path / name).unlink()
    page = report.write(done.path)
    assert f"The run has not ended: 3 of 3 rounds; 'fedsim resume {done.path}' continues it." in text_of(page)
    (done.path / "history.jsonl").write_text("")
    page = report.write(done.path)
    assert "The run has not ended: 0 of 3 rounds" in text_of(page)
    assert figures_of(page) == []
    assert is_alone(page)


def test_a_report_names_whom_the_figures_leave_out(tmp_path: Path) -> None:
    done = run(tmp_path / "run")
    lines = [json.loads(line) for line in (done.path / "history.jsonl").read_text().splitlines()]
    lines[0]["excluded"] = [2, 3]
    lines[1]["failures"] = {"node 1": "<b>gone</b>"}
    lines[2]["train_loss"] = math.inf
    (done.path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report.write(done.path)
    said = text_of(page)
    assert "Round 1: not finite, left out of the average: workers 2, 3" in said
    assert "Round 2: node 1 did not answer: <b>gone</b>" in said
    assert "training loss is infinite in 1 round" in said
    assert "<b>gone" not in page.read_text(encoding="utf-8")


def test_final_and_best_skip_what_is_not_finite() -> None:
    import pandas as pd

    history = pd.DataFrame({
        "round": [1, 2, 3, 4],
        "test_loss": [3.0, 1.0, math.nan, 2.0],
        "test_accuracy": math.nan,
    })
    assert (final(history, "test_loss"), best(history, "test_loss")) == (2.0, (1.0, 2))
    assert math.isnan(final(history, "test_accuracy"))
    assert best(history, "test_accuracy")[1] == best(history, "train_loss")[1] == 0


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fedsim.BadInput, match="is not a run directory"):
        report.write(tmp_path)


# --- comparisons -----------------------------------------------------------------------------------------------


def test_runs_are_named_by_what_differs_and_averaged_over_seeds(runs: dict[str, fedsim.Run]) -> None:
    names = ("slow0", "slow1", "fast0", "fast1")
    found = groups.group(groups.load([runs[k].path for k in names]))
    assert [(g.label, len(g.runs)) for g in found] == [("SGD(lr=0.01)", 2), ("SGD(lr=0.1)", 2)]
    row = groups.summarise(found).iloc[1]
    values = [runs[k].history["test_loss"].iloc[-1] for k in ("fast0", "fast1")]
    assert row["test_loss.final"] == pytest.approx(np.mean(values))
    assert row["test_loss.final_sd"] == pytest.approx(np.std(values, ddof=1))
    figure = overlays.overlay(found, "test_loss")
    assert figure is not None
    both = np.stack([runs[k].history["test_loss"] for k in ("fast0", "fast1")])
    np.testing.assert_allclose(np.asarray(figure.axes[0].lines[1].get_ydata()), both.mean(0))


def test_the_same_run_twice_is_told_apart_and_the_same_directory_counts_once(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a"), run(tmp_path / "b")
    assert len(groups.load([a.path, a.path])) == 1
    assert [g.label for g in groups.group([a, b])] == ["FedAvg, a", "FedAvg, b"]


def test_the_best_of_a_column_is_marked(runs: dict[str, fedsim.Run]) -> None:
    table = groups.summarise(groups.group([runs["slow0"], runs["fast0"]]))
    rows = compare.cells(table)
    at = rows.header.index("test loss, final")
    losses = table["test_loss.final"].tolist()
    assert [row[at].best for row in rows.body] == [v == min(losses) for v in losses]


def test_the_page_of_a_comparison(runs: dict[str, fedsim.Run], tmp_path: Path) -> None:
    page = tmp_path / "pages" / "compare.html"
    result = CliRunner().invoke(
        cli.app, ["compare", *(str(r.path) for r in runs.values()), "--out", str(page)]
    )
    assert result.exit_code == 0, result.output
    assert is_alone(page)
    assert {"test_accuracy-round", "train_loss-round", "test_accuracy-bytes"} <= {*figures_of(page)}
    assert "5 runs compared" in text_of(page)
    assert "probes=WorkerLoss(); Drift()" in text_of(page)


def test_a_comparison_needs_rounds(tmp_path: Path) -> None:
    done = run(tmp_path / "run")
    (done.path / "history.jsonl").unlink()
    with pytest.raises(fedsim.BadInput, match="none of the directories holds a round"):
        groups.load([done.path])


# --- in a browser ----------------------------------------------------------------------------------------------

PROBE = """<script>
addEventListener("load", () => {
  const wrong = [...document.images].filter(i => !(i.complete && i.naturalWidth > 100));
  document.body.dataset.seen = document.images.length;
  document.body.dataset.wrong = wrong.map(i => i.alt).join("; ");
  document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth;
});
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_all_pages(runs: dict[str, fedsim.Run], tmp_path: Path, width: int) -> None:
    base = fedsim.Experiment.from_mapping(TINY)
    grid = {"client": ["SGD(lr=0.1)"], "local-steps": ["2", "4"]}
    for cell in sweep.plan(base, grid, 1, tmp_path / "sweep"):
        fedsim.run(cell.experiment)
    sweep.write(base, grid, 1, tmp_path / "sweep", {})
    compare.write([r.path for r in runs.values()], tmp_path / "compare.html")
    pages = [report.write(runs["one"].path), tmp_path / "compare.html", tmp_path / "sweep" / "sweep.html"]
    for page in pages:
        probed = tmp_path / "probed.html"
        text = page.read_text(encoding="utf-8")
        probed.write_text(text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
        shown = subprocess.run(
            [
                str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", f"--window-size={width},900",
                "--dump-dom", probed.as_uri(),
            ],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        assert "CONSOLE" not in shown.stderr
        seen = dict(re.findall(r'data-(seen|wrong|wide)="([^"]*)"', shown.stdout))
        assert seen == {"seen": str(len(figures_of(page))), "wrong": "", "wide": "false"}, page
        assert int(seen["seen"]) >= 3
