"""The command line: ``fedsim run | resume | flower | report | compare | federation | geometry | sweep | list``."""

from __future__ import annotations

import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fedsim import deploy_cli

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Federated-learning simulator on Flower and PyTorch: many workers in one batched call.",
    epilog="Exit codes: 0 done, 1 the run failed, 2 wrong input, 130 interrupted.",
)
app.add_typer(deploy_cli.app, name="federation")
console = Console()
errors = Console(stderr=True, soft_wrap=True)

LIST_WIDTH = 120
"""Columns of `fedsim list` where the output is not a terminal."""

File = Annotated[
    Path | None, typer.Argument(metavar="[EXPERIMENT.toml]", help="Experiment; without it the defaults run.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "-o",
        "--override",
        metavar="KEY=VALUE",
        help="Replace a key of the experiment, e.g. -o rounds=10 -o 'client=SGD(lr=0.5)'; repeatable.",
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Run directory, new; runs/DATE-TIME by default.")
]

Open = Annotated[bool, typer.Option("--open/--no-open", help="Show the page in a browser.")]
Track = Annotated[
    str,
    typer.Option(
        "--track", metavar="NAME", help="Write live curves too: 'tensorboard', into DIR/tensorboard."
    ),
]


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"fedsim {version('fedsim')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Say the version and exit."),
    ] = False,
) -> None:
    """Take the options that come before a command."""


@app.command()
def run(experiment: File = None, override: Settings = None, out: Out = None, track: Track = "") -> None:
    """Run an experiment in this process.

    EXPERIMENT.toml holds keys such as `rounds = 50` or `client = "SGD(lr=0.1)"`; those that it leaves out
    have defaults, and without a file all have. `fedsim list` shows what the expressions may name. The run
    directory gets experiment.toml, history.jsonl, checkpoint/, model.safetensors, summary.json and figures/.
    """
    from fedsim import runs
    from fedsim.track import tracking

    chosen = _experiment(experiment, override, out)
    path = Path(chosen.out or runs.new_directory())
    chosen = chosen.replace({"out": str(path)})
    with _resumable(path), _Progress() as progress, tracking(track, path, progress) as follow:
        done = runs.run(chosen, progress=follow)
    _conclude(done)


@app.command()
def resume(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Run directory.")],
    override: Settings = None,
    track: Track = "",
) -> None:
    """Continue an interrupted run, as if it had not been interrupted.

    DIR is its run directory. A run that has ended goes on with `-o rounds=100`. Other keys that leave the
    finished rounds as they are may change too: device, plan, nodes, min-nodes, round-timeout, eval-every.
    """
    from fedsim import runs
    from fedsim.experiment import parse_override
    from fedsim.track import tracking

    with _resumable(directory), _Progress() as progress, tracking(track, directory, progress) as follow:
        changes = dict(parse_override(text) for text in override or [])
        done = runs.resume(directory, changes=changes, progress=follow)
    _conclude(done)


@app.command()
def flower(
    experiment: File = None,
    override: Settings = None,
    out: Out = None,
    federation: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|NAME",
            help="Run on a deployment: folder of `fedsim federation up`, or connection of your Flower configuration.",
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="DIR", help="Continue the run of this directory.")
    ] = None,
) -> None:
    """Run an experiment with `flwr run`: simulated here, or on a deployment.

    EXPERIMENT.toml and the run directory are those of `fedsim run`. By default a simulation trains in one
    process; `-o engine=flower -o nodes=2` spreads the workers over Flower's simulated nodes. On a deployment the
    nodes train, and the run directory is on the link's host. If a run ends early, --resume begins a new one that
    goes on behind the last round in its history.

    `fedsim federation up`, then `fedsim flower EXPERIMENT.toml --federation federation`
    """
    deploy_cli.check_platform("fedsim flower")
    from fedsim import runs
    from fedsim.experiment import BadInput, parse_override
    from fedsim.flower import CONNECTION, run_flower
    from fedsim.simulate import RunFailed

    home: Path | None = None
    if federation is not None and (_is_path(federation) or (Path(federation) / "federation.json").exists()):
        from fedsim.deployment import connection_home

        home, federation = connection_home(Path(federation)), CONNECTION

    if resume is not None:
        if experiment is not None or out is not None:
            raise BadInput(
                "--resume DIR takes the experiment of that directory; leave out EXPERIMENT.toml and --out"
            )
        chosen = runs.read_experiment(resume).replace(dict(parse_override(text) for text in override or []))
        path = resume
    else:
        chosen = _experiment(experiment, override, out)
        path = Path(chosen.out or runs.new_directory())
        runs.check_new(path)
    chosen = chosen.replace({"out": str(path.resolve())})
    reasons: list[str] = []

    def show(line: str) -> None:
        print(line, flush=True)
        if line.startswith("fedsim: "):  # the ServerApp's last word
            reasons.append(line.removeprefix("fedsim: "))

    with _resumable(path, "fedsim flower --resume"), tempfile.TemporaryDirectory("fedsim-app") as folder:
        write_app(Path(folder), chosen)
        try:
            outcome = run_flower(
                Path(folder),
                chosen.to_mapping(),
                num_supernodes=chosen.nodes,
                federation=federation,
                on_line=show,
                home=home,
            )
        except RuntimeError as error:  # the SuperLink does not answer, or refuses
            raise RunFailed(f"{' '.join(str(error).split())}{_on_resume(path)}") from error
    if not outcome.completed:
        reason = reasons[-1] if reasons else outcome.details or "see the log above"
        raise RunFailed(f"Flower's run {outcome.run_id} is {outcome.status}: {reason}{_on_resume(path)}")
    far = federation is not None and home is None  # on this host or on another
    if far and not (path / "experiment.toml").exists():
        print(f"run directory: {chosen.out} on the host of the SuperLink")
        return
    done = runs.load(path)
    if not done.summary:
        raise RunFailed(f"{path}: Flower's run ended without a summary; see the log above")
    _conclude(done)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Run directory, finished or not.")],
    show: Open = False,
) -> None:
    """Write the page of a run, DIR/report.html: figures, results, experiment, versions, how to repeat it.

    It is one file that needs no network and no scripts.
    """
    from fedsim import report

    _present(report.write(directory), show)


@app.command()
def compare(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run directories.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page.")] = Path("compare.html"),
    show: Open = False,
) -> None:
    """Compare runs on one page; runs that are equal but for their seeds are averaged.

    They are named by what differs between their experiments.
    """
    from fedsim import compare

    _print_rows(compare.write(directories, out))
    _present(out, show)


@app.command()
def geometry(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Directories of finished runs.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Figure of all runs beside each other.")
    ] = None,
) -> None:
    """Repeat runs with their end points known: how each local step and each round moves towards the end.

    For every step and round: restricted secant inequality, error bound, their cosine gamma and the locally optimal learning
    rate, with the controls without which they prove nothing: a random walk, the same rounds in random order, and the ends of three other
    runs. Takes some six times as long as the run. DIR/geometry/ gets steps.csv, rounds.csv, clients.csv, summary.json; DIR/figures/ gets
    the figures, which `fedsim report` shows too.
    """
    from fedsim import geometry_plots
    from fedsim.experiment import BadInput
    from fedsim.geometry import finished, write
    from fedsim.groups import group

    known = [finished(directory) for directory in directories]
    if out is not None and not out.parent.is_dir():
        raise BadInput(f"--out {out}: there is no folder {out.parent}")
    for directory in directories:
        found = write(directory).summary
        table = Table("", "steps", "rounds", box=None, padding=(0, 2, 0, 0))
        for name in dict.fromkeys([*found["rounds"], *found["steps"]]):
            values = [f"{found[k][name]:.4g}" if name in found[k] else "" for k in ("steps", "rounds")]
            table.add_row(name, *values)
        console.print(table)
        console.print(f"the repeated run ends {found['difference']:.2g} of its way from the model")
        console.print(f"run directory: {directory}", soft_wrap=True, highlight=False)
        for figure in geometry_plots.save(directory):
            console.print(f"figure: {figure}", soft_wrap=True, highlight=False)
    if out is not None:
        groups = group(known)
        summaries = {g.label: [geometry_plots.read(run.path) for run in g.runs] for g in groups}
        geometry_plots.save_as(geometry_plots.overview(summaries), out)
        console.print(f"figure: {out}", soft_wrap=True, highlight=False)


@app.command()
def sweep(
    experiment: File = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--grid",
            metavar="KEY=V1,V2",
            help="Values of a key, e.g. --grid 'client=SGD(lr=0.1),SGD(lr=0.01)'; repeatable: all combinations run.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(metavar="N", help="Seeds of each combination.")] = 1,
    optimisers: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Server optimisers whose settings are drawn at random: sgd, momentum, nesterov, rmsprop, adam, or all.",
        ),
    ] = "",
    draws: Annotated[int, typer.Option(metavar="N", help="Settings of each of --optimisers.")] = 30,
    keep: Annotated[
        float | None,
        typer.Option(
            metavar="A", help="Least accuracy in the training domains of runs that --optimisers compares."
        ),
    ] = None,
    override: Settings = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Directory; sweeps/DATE-TIME by default.")
    ] = None,
    jobs: Annotated[
        int, typer.Option(metavar="J", help="Processes, at most one a core; 0: one a core, or one on a GPU.")
    ] = 0,
    show: Open = False,
) -> None:
    """Run every combination of settings, and compare them in DIR/sweep.csv and DIR/sweep.html.

    Everything is checked before anything runs. A run that fails does not stop the others. The same command
    with the same --out goes on where it was interrupted; more values or seeds add to what is there.
    With --optimisers, accuracy in the training domains is drawn against that in the held-out one.
    """
    from fedsim import domain_sweep, runs, sweep
    from fedsim.simulate import RunFailed

    chosen = _experiment(experiment, override, None)
    values = sweep.read_grid(grid or [])
    folder = out or runs.new_directory("sweeps")
    search = domain_sweep.read_search(optimisers, draws, keep)
    if search is not None:
        chosen = domain_sweep.prepare(chosen, values, search)
    planned = sweep.plan(chosen, values, seeds, folder, search)
    if search is not None:
        for e in {cell.experiment.data: cell.experiment for cell in planned}.values():
            domain_sweep.place(e)
    counter = iter(range(1, len(planned) + 1))

    def say(cell: Any, outcome: Any) -> None:
        what = f"failed: {outcome.error}" if outcome.error else f"{outcome.seconds:.1f} s"
        print(f"{next(counter)}/{due} {cell.path.name}: {what}", flush=True)

    due = sum(not sweep.is_done(cell) for cell in planned)
    print(f"{len(planned)} runs, {len(planned) - due} of them done, in {folder}", flush=True)
    try:
        outcomes = sweep.run(planned, jobs or sweep.num_jobs(chosen), say)
    except KeyboardInterrupt:
        _fail(f"interrupted; the same command with '--out {folder}' continues", 130)
    _print_rows(sweep.write(chosen, values, seeds, folder, outcomes, search))
    print(f"table: {folder / 'sweep.csv'}")
    _present(folder / "sweep.html", show)
    failed = sweep.failures(outcomes, search)
    if failed:
        raise RunFailed(
            f"{failed} of {len(planned)} runs failed; see the column 'error' of {folder / 'sweep.csv'}"
        )


@app.command("list")
def list_components(
    kind: Annotated[
        str | None, typer.Argument(metavar="[KIND]", help="data, partition, model, ...; all by default.")
    ] = None,
) -> None:
    """List everything that experiments can name, with arguments and a one-line summary.

    KIND is data, partition, model, objective, client, strategy, probe, network, schedule or attack; without it all are listed.
    """
    from fedsim.registry import KINDS, REGISTRY, BadInput, describe, nearest

    if kind is not None and kind not in REGISTRY:
        raise BadInput(f"kind = {kind!r}: {nearest(kind, REGISTRY)}allowed: {', '.join(REGISTRY)}")
    wide = console if console.is_terminal else Console(width=LIST_WIDTH)
    for name in [kind] if kind else REGISTRY:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="bold", max_width=max(20, 2 * wide.width // 5), overflow="fold")
        table.add_column(ratio=1)
        for component, arguments, summary in describe(name):
            table.add_row(f"{component}{arguments}", summary.replace("`", ""))
        wide.print(f"[bold cyan]{name}[/]: {KINDS[name]}", highlight=False)
        wide.print(Padding(table, (0, 0, 1, 2)))


def _is_path(text: str) -> bool:
    """Say whether a text cannot be the name of a connection."""
    return text.startswith(".") or "/" in text


def _on_resume(path: Path) -> str:
    """Say how a run goes on, if it has begun."""
    history = path / "history.jsonl"
    begun = history.exists() and history.stat().st_size > 0
    return f"; 'fedsim flower --resume {path}' goes on" if begun else ""


def write_app(folder: Path, experiment: Any) -> None:
    """Write a Flower app that consists of fedsim's two apps, as ``flwr run`` wants it.

    Parameters
    ----------
    folder : Path
        An empty folder.
    experiment : Experiment
        Its keys become the app's configuration.
    """
    import tomli_w

    from fedsim.experiment import Experiment

    assert isinstance(experiment, Experiment)
    package = folder / "fedsim_flower_app"
    package.mkdir()
    (package / "__init__.py").write_text('"""The apps of fedsim, for flwr run."""\n')
    for side in ("server", "client"):
        (package / f"{side}_app.py").write_text(f"from fedsim.{side}_app import app\n\n__all__ = ['app']\n")
    apps = {f"{side}app": f"fedsim_flower_app.{side}_app:app" for side in ("server", "client")}
    flwr = {"publisher": "fedsim", "components": apps, "config": experiment.to_mapping()}
    project = {"name": "fedsim-flower-app", "version": "1.0.0", "license": "Apache-2.0", "dependencies": []}
    project |= {"description": "The apps of fedsim"}
    (folder / "pyproject.toml").write_text(
        tomli_w.dumps({"project": project, "tool": {"flwr": {"app": flwr}}}), encoding="utf-8"
    )


def _experiment(file: Path | None, override: list[str] | None, out: Path | None) -> Any:
    from fedsim.experiment import Experiment, parse_override

    changes = dict(parse_override(text) for text in override or [])
    if out is not None:
        changes["out"] = str(out)
    if file is None:
        return Experiment.from_mapping(changes)
    return Experiment.from_toml(file, changes)


def _conclude(done: Any) -> None:
    """Print the final figures and where everything is."""
    summary = done.summary
    shown = ["id_accuracy", "ood_accuracy", "test_accuracy", "test_loss", "train_loss", "test_perplexity"]
    shown += ["sim_time", "seconds_per_round"]
    shown += [
        name for name, value in summary.items() if "." in name and isinstance(value, float)
    ]  # of probes
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name in shown:
        if name in summary:
            table.add_row(name, f"{summary[name]:.4g}")
    console.print(table)
    console.print(f"run directory: {done.path}", soft_wrap=True, highlight=False)
    for figure in sorted((done.path / "figures").glob("*.png")):
        console.print(f"figure: {figure}", soft_wrap=True, highlight=False)


def _present(page: Path, show: bool) -> None:
    console.print(f"page: {page}", soft_wrap=True, highlight=False)
    if show:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())


def _print_rows(rows: Any) -> None:
    """Print a table of a page; the best of a column is bold."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for i, name in enumerate(rows.header):
        table.add_column(name, justify="right" if i else "left", overflow="fold", ratio=None if i else 1)
    for row in rows.body:
        table.add_row(*(Text(cell.text, style="bold" if cell.best else "") for cell in row))
    wide = console if console.is_terminal else Console(width=LIST_WIDTH)
    wide.print(table)


class _Progress:
    """A bar with rounds a second, loss and time left on a terminal; plain lines elsewhere."""

    def __init__(self) -> None:
        self.bar: Progress | None = None
        self.task: Any = None

    def __enter__(self) -> _Progress:
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("round"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[speed]}"),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=console,
                refresh_per_second=5,
            )
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, snapshot: Any, experiment: Any) -> None:
        from fedsim import runs

        bar = self.bar
        if bar is None:
            every = max(1, experiment.rounds // 20)
            first = snapshot.round == 1
            if (
                first
                or snapshot.round % every == 0
                or snapshot.round == experiment.rounds
                or snapshot.failures
            ):
                print(runs.line(snapshot, experiment), flush=True)
            return
        if self.task is None:
            self.task = bar.add_task(
                "", total=experiment.rounds, completed=snapshot.round - 1, speed="", figures=""
            )
        for warning in runs.trouble(snapshot):
            bar.console.print(warning, style="yellow")
        speed = bar.tasks[0].speed
        bar.update(
            self.task,
            completed=snapshot.round,
            speed=f"{speed:.1f}/s" if speed else "",
            figures=runs.figures(snapshot),
        )


@contextmanager
def _resumable(path: Path, command: str = "fedsim resume") -> Iterator[None]:
    """Say after Ctrl-C how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        kept = (path / "experiment.toml").exists()
        _fail(f"interrupted; '{command} {path}' continues" if kept else "interrupted", 130)


def main() -> None:
    """Run the command line; exit codes: 0 done, 1 the run failed, 2 bad input, 130 interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what was started is also ended
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        try:
            code = app(standalone_mode=False, prog_name="fedsim")
        except (typer.Abort, KeyboardInterrupt):
            _fail("interrupted", 130)
        except Exception as error:
            _explain(error)
    if code == 130:  # what Typer makes of Ctrl-C, without a word
        _fail("interrupted", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _warn(message: Warning | str, *place: object) -> None:
    errors.print(f"fedsim: warning: {message}", style="yellow", highlight=False, markup=False)


def _explain(error: Exception) -> NoReturn:
    """Say an expected error in one line and exit with its code; let others show where they come from."""
    import click

    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show(sys.stdout)
        sys.exit(2)
    if isinstance(error, click.UsageError):
        said, *hints = " ".join(error.format_message().split()).split(" Did you mean ")
        _fail(" Did you mean ".join([said, *hints[:1]]), 2)  # Typer and Click may both have one
    from fedsim.errors import BadInput, RunFailed

    if isinstance(error, BadInput):
        _fail(str(error), 2)
    if isinstance(error, RunFailed):
        _fail(str(error), 1)
    raise error


def _fail(text: str, code: int) -> NoReturn:
    errors.print(f"fedsim: {text}", style="red", highlight=False, markup=False)
    sys.exit(code)


if __name__ == "__main__":
    main()
