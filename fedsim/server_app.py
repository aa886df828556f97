"""The Flower ServerApp: the same rounds as everywhere, over Flower's grid."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsim import federation, runs
from fedsim.compat import is_simulation
from fedsim.experiment import BadInput, Experiment
from fedsim.over_grid import ABSENT, HELLO_SECONDS, Greeting, OverGrid, greet
from fedsim.probes import Snapshot
from fedsim.schedule import FreeRunning
from fedsim.simulate import RunFailed

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment of the run configuration.

    In Flower's simulation the default is to train in this process, without messages (``engine =
    "in-process"``); with ``engine = "flower"`` and in every deployment the nodes train. What goes wrong is
    printed in one line, ``fedsim: <reason>``, and raised.

    Parameters
    ----------
    grid : Grid
        Flower's grid.
    context : Context
        Holds the run configuration.

    Raises
    ------
    BadInput
        If the configuration is wrong, or does not fit the data.
    RunFailed
        If nodes are missing at the start, or the run cannot go on.
    """
    try:
        experiment = Experiment.from_mapping(context.run_config)
        in_process = is_simulation(grid) and experiment.engine == "in-process"
        done = start(experiment, None if in_process else grid)
    except (BadInput, RunFailed) as error:
        # Flower writes a traceback around it; this line is for people and for `fedsim flower` to find.
        print(f"fedsim: {error}", flush=True)
        raise
    print(f"run directory: {done.path.resolve()}", flush=True)
    for figure in sorted((done.path / "figures").glob("*.png")):
        print(f"figure: {figure.resolve()}", flush=True)


def start(experiment: Experiment, grid: Grid | None) -> runs.Run:
    """Run or resume an experiment over a grid, or in this process if there is none.

    Parameters
    ----------
    experiment : Experiment
        The run; where its ``out`` holds an unfinished run of the same experiment, that one is continued.
    grid : Grid or None
        Any Flower grid.

    Returns
    -------
    Run
        The finished run.
    """
    make: Callable[[Experiment, federation.Federation], OverGrid] | None = None
    if grid is not None:
        # Who comes alone, without rounds, must be there from the start.
        alone = isinstance(experiment.parts.schedule, FreeRunning)
        enough = 0 if alone else experiment.min_nodes
        nodes = greet(grid, experiment.nodes if experiment.nodes > 1 else 0, HELLO_SECONDS, enough)
        own = sum(node.workers for node in nodes)
        if own:
            experiment = experiment.replace({"num-workers": own, "nodes": 1})
        absent = [f"node {node.partition}" for node in nodes if node.node_id == ABSENT]
        missing = f", without {', '.join(absent)} for now" if absent else ""
        print(f"{len(nodes)} nodes with {experiment.num_workers} workers{missing}", flush=True)
        make = partial(_carrier, grid, nodes)

    if experiment.out and (Path(experiment.out) / "history.jsonl").exists():
        return runs.resume(experiment.out, changes=experiment.to_mapping(), carrier=make, progress=log)
    loaded = federation.load(experiment)
    carrier = None if make is None else make(experiment, loaded)
    return runs.run(experiment, federation=loaded, carrier=carrier, progress=log)


def _carrier(
    grid: Grid, nodes: list[Greeting], experiment: Experiment, loaded: federation.Federation
) -> OverGrid:
    return OverGrid(grid, experiment, loaded, nodes)


def log(snapshot: Snapshot, experiment: Experiment) -> None:
    """Print one plain line a round, at most about fifty lines a run."""
    every = max(1, experiment.rounds // 50)
    if snapshot.round % every == 0 or snapshot.round == experiment.rounds or snapshot.failures:
        print(runs.line(snapshot, experiment), flush=True)
