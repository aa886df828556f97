"""Tables and figures from measurements: on the terminal, in Markdown, as PNG."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.ticker import NullFormatter
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIMILAR = 0.15
"""Largest relative difference of final test losses that counts as the same training."""

AXES = {"workers": "workers, all taking part", "parameters": "parameters", "rounds": "rounds"}
"""Series of `benchmarks.growth` that are drawn, and the labels of their axes."""

Rows = list[list[str]]


@dataclass(frozen=True)
class Speed:
    """An implementation on a workload: medians over the repeats.

    Attributes
    ----------
    workload, implementation, label, note : str
        What it is.
    rounds, repeats : int
        How much was measured.
    ms, low, high : float
        Milliseconds a round: median, least and most.
    start_s : float
        Seconds from the start of the process to the end of the first round.
    peak_mb : float
        Largest resident memory of the process.
    loss, reference : float
        Test loss at the end, and fedsim's after as many rounds (NaN if it was not measured).
    ratio : float
        Of the milliseconds to fedsim's (NaN if it was not measured).
    """

    workload: str
    implementation: str
    label: str
    note: str
    rounds: int
    repeats: int
    ms: float
    low: float
    high: float
    start_s: float
    peak_mb: float
    loss: float
    reference: float
    ratio: float

    @property
    def differs(self) -> bool:
        """Whether the loss is known to differ from fedsim's; False if that was not measured."""
        return abs(self.loss / self.reference - 1) > SIMILAR


def speeds(results: dict[str, Any]) -> list[Speed]:
    """Summarise what `benchmarks.speed` writes, workload after workload, in the order of measurement."""
    measured = results["measurements"]
    keys = dict.fromkeys((m["workload"], m["implementation"]) for m in measured)
    found = []
    for workload, name in sorted(keys, key=lambda key: key[0]):
        here = [m for m in measured if m["workload"] == workload]
        mine = [m for m in here if m["implementation"] == name]
        ours = [m["ms"] for m in here if m["implementation"] == "fedsim"]
        rounds, ms = mine[0]["rounds"], [m["ms"] for m in mine]
        curves = [m["losses"] for m in here if len(m["losses"]) >= rounds]
        found.append(
            Speed(
                workload,
                name,
                results["implementations"][name]["label"],
                mine[0]["note"],
                rounds,
                len(mine),
                median(ms),
                min(ms),
                max(ms),
                median(m["start_s"] for m in mine),
                median(m["peak_mb"] for m in mine),
                median(m["test_loss"] for m in mine),
                curves[0][rounds - 1] if curves else math.nan,
                median(ms) / median(ours) if ours else math.nan,
            )
        )
    return found


def speed_rows(results: dict[str, Any]) -> tuple[list[str], Rows]:
    """Return header and rows: milliseconds a round and the ratio to fedsim for each workload, and start-up."""
    names = list(results["workloads"])
    header = ["", *[part for k in names for part in (f"{k}, ms", "x")], "start-up, s"]
    found = {(s.workload, s.implementation): s for s in speeds(results)}
    rows = []
    for name, about in results["implementations"].items():
        if not about["version"]:
            rows.append([about["label"], *["not installed", ""] * len(names), ""])
            continue
        cells, starts = [], []
        for k in names:
            s = found.get((k, name))
            if s is None:
                cells += ["failed", ""]
                continue
            ratio = "" if math.isnan(s.ratio) else number(s.ratio)
            cells += [number(s.ms) + (" (!)" if s.differs else ""), ratio]
            starts.append(s.start_s)
        is_package = name in ("fedjax", "pfl", "flower")
        label = f"{about['label']} {about['version']}" if is_package else about["label"]
        rows.append([label, *cells, number(median(starts)) if starts else ""])
    return header, rows


def rate_rows(results: dict[str, Any]) -> tuple[list[str], Rows]:
    """Return header and rows: what fedsim and the limit reach of the machine's ceilings."""
    most = results["ceilings"]
    header = ["", "GFLOP/s", "of a large product", "GB/s", "of a large copy"]
    rows = []
    for s in speeds(results):
        if s.implementation in ("fedsim", "hand"):
            asked = results["workloads"][s.workload]
            flops, moved = 1000 * asked["flops"] / s.ms, 1000 * asked["bytes"] / s.ms
            shares = f"{flops / most['flops']:.1%}", f"{moved / most['bytes']:.1%}"
            name = f"{s.workload}, {s.label}"
            rows.append([name, number(flops / 1e9), shares[0], number(moved / 1e9), shares[1]])
    rows.append(["ceiling, measured", number(most["flops"] / 1e9), "", number(most["bytes"] / 1e9), ""])
    return header, rows


def loss_rows(results: dict[str, Any]) -> tuple[list[str], Rows]:
    """Return header and rows: the test loss of each implementation beside fedsim's after as many rounds."""
    header = ["", "rounds", "test loss", "fedsim's", "repeats", "ms, least to most", "peak MB", ""]
    rows = []
    for s in speeds(results):
        losses = f"{s.loss:.3f}", "" if math.isnan(s.reference) else f"{s.reference:.3f}"
        spread = f"{number(s.low)} to {number(s.high)}"
        memory = "" if s.implementation == "flower" else number(s.peak_mb)  # many processes
        name = f"{s.workload}, {s.label}"
        rows.append([name, str(s.rounds), *losses, str(s.repeats), spread, memory, s.note])
    return header, rows


def conditions(results: dict[str, Any]) -> str:
    """Say where and how the numbers were taken."""
    a = results["about"]
    return (
        f"{a['device']}, {a['threads']} threads on as many cores, torch {a['torch']}, Python {a['python']}, "
        f"{a['date']}. Medians of {a['repeats']} interleaved repeats, a process each; stock Flower and the evaluated "
        "run once, fedsim and the limit three times in each repeat of A and B. The loop and pfl-research have one thread on A and B, where more make them slower. "
        "Steady state: without the first fifth of the rounds and the last. Start-up is from the start of the "
        "process to the end of the first round. No implementation evaluates between rounds unless it says so; "
        "fedsim writes its history and checkpoints. Waiting OpenMP threads sleep for fedsim and the limit "
        "(GOMP_SPINCOUNT=0, as fedsim sets it); the others run with their own defaults. On C fedsim lays pictures "
        "out with their channels last, the others as they are. (!) marks a test loss "
        f"that differs from fedsim's after as many rounds by more than {SIMILAR:.0%}."
    )


def print_speed(results: dict[str, Any], console: Console) -> None:
    """Print all tables."""
    print_table("Milliseconds a round, and ratio to fedsim", *speed_rows(results), console)
    for k, about in results["workloads"].items():
        console.print(f"{k}: {about['title']}", markup=False)
    print_table("The same training", *loss_rows(results), console)
    print_table("Rates", *rate_rows(results), console)
    console.print(conditions(results), markup=False)


def speed_markdown(results: dict[str, Any]) -> str:
    """Return the section of the README."""
    titles = "\n".join(f"* {k}: {about['title']}" for k, about in results["workloads"].items())
    return f"{titles}\n\n{markdown(*speed_rows(results))}\n\n{conditions(results)}\n"


def speed_figure(results: dict[str, Any], path: Path) -> None:
    """Draw milliseconds a round, one panel a workload, on logarithmic axes."""
    import seaborn as sns

    found, names = speeds(results), list(results["workloads"])
    labels = list(dict.fromkeys(s.label for s in found))
    figure, panels = _panels(len(names), width=4.2, height=0.42 * len(labels) + 1.2, sharey=True)
    for k, axes in zip(names, panels, strict=True):
        here = {s.label: s.ms for s in found if s.workload == k}
        data = pd.DataFrame({"label": list(here), "ms": list(here.values())})
        sns.barplot(
            data, x="ms", y="label", hue="label", order=labels, hue_order=labels, palette="colorblind",
            legend=False, ax=axes,
        )  # fmt: skip
        axes.set(xscale="log", xlabel="ms a round", ylabel="", title=k)
        axes.xaxis.set_minor_formatter(NullFormatter())  # within one decade they would overlap
        for label, ms in here.items():
            axes.text(ms, labels.index(label), f" {number(ms)}", va="center")
        axes.margins(x=0.25)
    _save(figure, panels, path)


@dataclass(frozen=True)
class Growth:
    """A point of a series: medians over the repeats.

    Attributes
    ----------
    series : str
        As in `benchmarks.growth.Point`.
    at, participants : int
        Where on the axis; workers of a round.
    ms, ms_with_start_and_end : float
        Milliseconds a round in the steady state, and of the whole call by the number of rounds.
    partition_s, peak_mb : float
        Seconds to share out the rows; largest resident memory of the process.
    """

    series: str
    at: int
    participants: int
    ms: float
    ms_with_start_and_end: float
    partition_s: float
    peak_mb: float

    @property
    def us_a_worker(self) -> float:
        """Microseconds a round and participant."""
        return 1000 * self.ms / self.participants


def growths(results: dict[str, Any]) -> list[Growth]:
    """Summarise what `benchmarks.growth` writes, in the order of measurement."""
    measured = results["measurements"]
    found = []
    for series, at in dict.fromkeys((m["series"], m["at"]) for m in measured):
        mine = [m for m in measured if (m["series"], m["at"]) == (series, at)]
        columns = ("ms", "ms_with_start_and_end", "partition_s", "peak_mb")
        medians = [median(m[column] for m in mine) for column in columns]
        found.append(Growth(series, at, mine[0]["participants"], *medians))
    return found


def growth_rows(results: dict[str, Any]) -> tuple[list[str], Rows]:
    """Return header and rows of all points."""
    header = ["", "ms a round", "us a round and worker", "whole call, ms a round", "partition, s", "peak MB"]
    rows = []
    for g in growths(results):
        name = f"{g.at:,} {g.series}"
        if g.series == "registered":
            name = f"{g.at:,} workers registered, {g.participants} a round"
        numbers = (g.ms, g.us_a_worker, g.ms_with_start_and_end, g.partition_s, g.peak_mb)
        rows.append([name, *map(number, numbers)])
    return header, rows


def growth_markdown(results: dict[str, Any]) -> str:
    """Return the section of the README."""
    a = results["about"]
    return (
        f"{markdown(*growth_rows(results))}\n\n"
        "Workers: logistic regression 64-10, 5 steps of 10, all taking part. Parameters: perceptrons of one "
        "hidden layer, 16 workers, 5 steps of 10. Rounds: 4 workers with 10 rows of 20 features, one full "
        "gradient. Registered: 2 million rows of 32 features, Dirichlet(0.3). All with history and checkpoints; "
        "the whole call includes the figures at its end; peak memory is that of the process. "
        f"{a['device']}, {a['threads']} threads, torch {a['torch']}, {a['date']}, medians of up to "
        f"{a['repeats']} repeats.\n"
    )


def print_growth(results: dict[str, Any], console: Console) -> None:
    """Print the table."""
    print_table("Growth", *growth_rows(results), console)


def growth_figure(results: dict[str, Any], path: Path) -> None:
    """Draw the cost of a round against workers, parameters and rounds."""
    import seaborn as sns

    found = growths(results)
    drawn = [series for series in AXES if any(g.series == series for g in found)]
    figure, panels = _panels(len(drawn), width=3.6, height=3.2, sharey=False)
    for series, axes in zip(drawn, panels, strict=True):
        mine = [g for g in found if g.series == series]
        per_worker = series == "workers"
        y = [g.us_a_worker if per_worker else g.ms for g in mine]
        sns.lineplot(x=[g.at for g in mine], y=y, marker="o", color="C0", ax=axes)
        label = "us a round and worker" if per_worker else "ms a round"
        axes.set(xscale="log", xlabel=AXES[series], ylabel=label)
        if series == "rounds":
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log")
    _save(figure, panels, path)


def number(x: float) -> str:
    """Write a number with three digits, or all of them before the point.

    Examples
    --------
    >>> number(0.5678), number(12.34), number(881.2), number(2_000_000.0)
    ('0.568', '12.3', '881', '2,000,000')
    """
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def markdown(header: list[str], rows: Rows) -> str:
    """Return a Markdown table; all columns but the first are right-aligned.

    Examples
    --------
    >>> print(markdown(["", "ms"], [["a", "1"]]))
    |  | ms |
    | --- | ---: |
    | a | 1 |
    """
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_table(title: str, header: list[str], rows: Rows, console: Console) -> None:
    """Print a table on the terminal."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table, markup=False)


def _panels(count: int, width: float, height: float, sharey: bool) -> tuple[Figure, list[Axes]]:
    import seaborn as sns
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with sns.axes_style("whitegrid"):
        figure = Figure(figsize=(width * count + (1.6 if sharey else 0), height), layout="constrained")
        FigureCanvasAgg(figure)
        return figure, list(figure.subplots(1, count, squeeze=False, sharey=sharey)[0])


def _save(figure: Figure, panels: list[Axes], path: Path) -> None:
    import seaborn as sns

    for axes in panels:
        sns.despine(ax=axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
