"""The commands ``fedsim federation up | status | down | keys``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedsim.errors import BadInput, RunFailed

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="A SuperLink and SuperNodes with TLS and registered keys: on this machine, or keys for several.",
    epilog="Examples: `fedsim federation up --nodes 3`, then `fedsim flower experiments/digits.toml --federation "
    "federation`, then `fedsim federation down`. docs/federation.md says how to spread it over several hosts.",
)
console = Console()

COLOURS = {"online": "green", "starting": "yellow"}

Folder = Annotated[
    Path, typer.Argument(metavar="[DIR]", help="Folder of the federation; 'federation' by default.")
]
Hosts = Annotated[
    list[str] | None,
    typer.Option(
        "--host",
        metavar="NAME",
        help="Name or address by which others reach the link, for its certificate; repeatable. Always in it: "
        "localhost, 127.0.0.1, ::1.",
    ),
]


def check_platform(command: str) -> None:
    """Refuse a system without process groups and file locks in one line, before anything is imported that needs them.

    Parameters
    ----------
    command : str
        What the user called.

    Raises
    ------
    BadInput
        On Windows.
    """
    if os.name != "posix":
        raise BadInput(
            f"{command}: needs Linux or macOS; on Windows use WSL 2 (everything else runs on Windows too)"
        )


@app.command()
def up(
    directory: Folder = Path("federation"),
    nodes: Annotated[int | None, typer.Option(metavar="N", help="SuperNodes; 3 by default.")] = None,
    host: Hosts = None,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Where the link listens; 127.0.0.1 by default, 0.0.0.0: everywhere."
        ),
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port of the link; a free one by default.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="EXPR",
            help="A node's own data, e.g. \"Folder('a')\"; once for each node, in their order.",
        ),
    ] = None,
    workers: Annotated[
        list[int] | None,
        typer.Option(metavar="W", help="Workers of a node with its own data; once, or once for each node."),
    ] = None,
    node_config: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'K=V ...'", help="Further settings of nodes for your apps; once, or once for each node."
        ),
    ] = None,
) -> None:
    r"""Start a federation of real processes on this machine, and wait until it is online.

    New folders get an authority, a certificate for the SuperLink, and a registered key for each SuperNode. What runs
    already is left alone; what has died is started again, with the keys, data and port that it had.

    `fedsim federation up --nodes 2 --data "Folder('a')" --data "Folder('b')" --workers 4`
    """
    check_platform("fedsim federation up")
    from fedsim import deployment
    from fedsim.deployment import Wanted
    from fedsim.flower import CONNECTION

    wanted = Wanted(nodes, listen, port, host or [], data or [], workers or [], node_config or [])
    started = deployment.up(directory, wanted)
    address, rows = deployment.status(directory)
    said = f"started {', '.join(started)}" if started else "everything runs already"
    count = len(rows) - 1
    _say(f"{directory}: {said}; {count} {'nodes are' if count > 1 else 'node is'} online at {address}")
    home = deployment.connection_home(directory)
    # Flower's own command would ask a proxy for an address of this machine.
    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    direct = f"NO_PROXY={address.rsplit(':', 1)[0]} " if proxied else ""
    _say("to run an experiment on it:")
    _say(f"  fedsim flower EXPERIMENT.toml --federation {directory}")
    _say(f"  {direct}FLWR_HOME={home} flwr run . {CONNECTION} --stream")
    _say("to look at it, and to end it:")
    _say(f"  fedsim federation status {directory}")
    _say(f"  fedsim federation down {directory}")


@app.command()
def status(directory: Folder = Path("federation")) -> None:
    """Say what runs: the link, its nodes, their processes and logs. The exit code is 1 if any is not online."""
    check_platform("fedsim federation status")
    from fedsim import deployment

    address, rows = deployment.status(directory)
    table = Table(box=None, padding=(0, 2, 0, 0), title=f"{directory} at {address}", title_justify="left")
    for name in ("", "state", "pid", "log"):
        table.add_column(name, justify="right" if name == "pid" else "left", overflow="fold")
    for row in rows:
        colour = COLOURS.get(row.state, "red")
        table.add_row(row.name, f"[{colour}]{row.state}[/]", str(row.pid or ""), str(row.log))
    wide = (
        console if console.is_terminal else Console(width=max(120, 60 + max(len(str(r.log)) for r in rows)))
    )
    wide.print(table, highlight=False)
    missing = [row.name for row in rows if row.state != "online"]
    if missing:
        raise RunFailed(
            f"not online: {', '.join(missing)}; 'fedsim federation up {directory}' starts what has ended"
        )


@app.command()
def down(
    directory: Folder = Path("federation"),
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="NAME", help="End this part alone, 'node-1' or 'link'; repeatable."),
    ] = None,
) -> None:
    """End all processes of a federation and what they have started, and no others. Keys, data and logs stay.

    `fedsim federation down --only node-1` lets one node leave; `fedsim federation up` brings it back.
    """
    check_platform("fedsim federation down")
    from fedsim import deployment

    ended = deployment.down(directory, only or [])
    _say(f"ended {len(ended)} processes" if ended else "nothing was running")
    _say(f"keys, database and logs stay in {directory}; 'fedsim federation up {directory}' starts it again")


@app.command()
def keys(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for certificates and keys.")],
    host: Hosts = None,
    node: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A node that is to have a pair of keys; repeatable."),
    ] = None,
    days: Annotated[int, typer.Option(help="For how long the link's certificate is valid.")] = 365,
) -> None:
    """Make certificates and keys for a federation on several hosts.

    On the link's host `fedsim federation keys keys --host link.example.org` makes an authority (ca.crt, ca.key), if
    there is none, and a new certificate for the link (link.crt, link.key); once more renews that. On a node's host
    `fedsim federation keys keys --node clinic-a` makes its pair, clinic-a.key and clinic-a.pub; the first stays there.
    """
    from fedsim import keys as made

    if not host and not node:
        raise BadInput("fedsim federation keys: name the link with --host, or a node with --node, or both")
    if host:
        new = made.make_authority(directory)
        made.make_certificate(directory, host, days)
        made.make_secret(directory)
        _say(
            f"{'made' if new else 'kept'} the authority: {directory / 'ca.crt'}, for all hosts, and ca.key, for none"
        )
        _say(f"made the link's certificate, valid for {days} days: {directory / 'link.crt'}, link.key")
        _say(f"made or kept the secret of the link and its SuperExec: {directory / 'superexec'}")
    for name in node or []:
        new = made.make_node_key(directory, name)
        _say(
            f"{'made' if new else 'kept'} the keys of {name}: {directory / name}.key, which stays here, and {name}.pub"
        )


def _say(text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)
