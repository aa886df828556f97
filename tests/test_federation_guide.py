"""The guide and the containers: every command in them exists and knows its options, and files agree with each other."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
import yaml

from benchmarks import faults
from benchmarks.readme import replace_section
from fedsim import cli

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "federation.md"
COMPOSE = ROOT / "docker" / "compose.yaml"
DOCKERFILE = ROOT / "docker" / "Dockerfile"

ASK = """
import contextlib, importlib, io, json, sys
helps = {}
for call in json.loads(sys.argv[1]):
    entry, *rest = call.split()
    module, name = {
        "flower-superlink": ("flwr.superlink.cli", "flower_superlink"),
        "flower-supernode": ("flwr.supernode.cli", "flower_supernode"),
        "flower-superexec": ("flwr.supercore.cli", "flower_superexec"),
        "flwr": ("flwr.cli.app", "app"),
    }[entry]
    sys.argv, said = [entry, *rest, "--help"], io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        getattr(importlib.import_module(module), name)()
    helps[call] = said.getvalue()
print(json.dumps(helps))
"""
"""Prints what Flower's commands say about themselves, without starting a process for each."""


def guide_commands() -> list[list[str]]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    blocks = [block for language, block in fenced if language in {"", "ini"}]
    lines = [line.removeprefix("ExecStart=") for block in blocks for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if not re.match(r"export |\[|\w+=", line)]
    return [[Path(first).name, *rest] for first, *rest in filter(None, words)]


def compose() -> dict[str, Any]:
    return yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))


def compose_commands() -> list[list[str]]:
    return [service["command"] for service in compose()["services"].values()]


COMMANDS = guide_commands() + compose_commands()
FLOWERS = [words for words in COMMANDS if words[0].startswith(("flower-", "flwr"))]
OURS = [words for words in COMMANDS if words[0] == "fedsim"]


def called(words: list[str]) -> str:
    """Name of the command, with its subcommand where it has some."""
    depth = {"supernode": 3}.get(words[1], 2) if words[0] == "flwr" else 1
    return " ".join(words[:depth])


@pytest.fixture(scope="module")
def helps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    calls = json.dumps(sorted({called(words) for words in FLOWERS}))
    folder = tmp_path_factory.mktemp("home")
    environment = {
        "FLWR_HOME": str(folder),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "COLUMNS": "200",
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK, calls], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def options(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)]


def test_there_are_commands_of_each_kind() -> None:
    kinds = {called(words) for words in FLOWERS}
    assert {
        "flower-superlink",
        "flower-supernode",
        "flower-superexec",
        "flwr supernode register",
        "flwr run",
    } <= kinds
    assert len(compose_commands()) == 4
    assert len(OURS) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("words", FLOWERS, ids=lambda words: " ".join(words)[:60])
def test_flower_knows_the_options(words: list[str], helps: dict[str, str]) -> None:
    said = helps[called(words)]
    for option in options(words):
        if option != "-o":
            assert re.search(rf"{option}\b(?![-\w])", said), f"{called(words)} has no option {option}"
    assert "deprecated" not in [option for option in options(words) if f"{option} is deprecated" in said]


@pytest.mark.parametrize("words", OURS, ids=lambda words: " ".join(words)[:60])
def test_fedsim_knows_the_commands_and_options(words: list[str]) -> None:
    command = typer.main.get_command(cli.app)
    rest = words[1:]
    while isinstance(command, click.Group):
        command, rest = command.commands[rest[0]], rest[1:]
    context = command.make_context(words[0], rest, resilient_parsing=False)  # raises UsageError
    assert context.params


def test_containers_agree_with_the_guide_and_the_commands() -> None:
    services = compose()["services"]
    link = dict(word.split("=", 1) for word in services["link"]["command"] if "=" in word)
    assert "--enable-supernode-auth" in services["link"]["command"]
    assert "--insecure" not in [word for words in compose_commands() for word in words]
    nodes = {name: s for name, s in services.items() if s["command"][0] == "flower-supernode"}
    for i, (name, service) in enumerate(nodes.items()):
        given = dict(word.split("=", 1) for word in service["command"] if "=" in word)
        assert given["--node-config"] == f"partition-id={i} num-partitions={len(nodes)}"
        assert given["--superlink"].endswith(f"link:{link['--port']}}}")
        assert any(f"/{name}.key:" in volume for volume in service["volumes"])
    for service in services.values():
        mounted = [volume.rsplit(":ro", 1)[0].rsplit(":", 1)[-1] for volume in service["volumes"]]
        files = [word.split("=", 1)[1] for word in service["command"] if "=/" in word]
        for file in files:
            assert any(file == place or file.startswith(f"{place}/") for place in mounted), file
        assert service["read_only"]
        assert service["restart"] == "unless-stopped"
        named = [
            volume.split(":")[0] for volume in service["volumes"] if not volume.startswith(("$", ".", "/"))
        ]
        assert set(named) <= compose()["volumes"].keys()


def test_the_image_needs_no_network_when_it_runs() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1" in text
    assert "FLWR_DISABLE_UPDATE_CHECK=1" in text
    assert re.findall(r"^USER (\w+)$", text, re.MULTILINE) == ["fedsim"]
    for source in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for name in source.split():
            assert (ROOT / name).exists(), name
    packages = re.search(r'^packages = \["(.+)"\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert packages is not None
    for package in packages[1].split('", "'):
        assert f"COPY {package} {package}\n" in text
    home = re.search(r"FLWR_HOME=(\S+)/flower", text)
    assert home is not None
    for service in compose()["services"].values():
        assert any(volume.endswith(f":{home[1]}") for volume in service["volumes"])  # the rest is read-only


def test_the_readme_has_the_faults_that_were_tried() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "faults.json").read_text(encoding="utf-8"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert replace_section(text, "faults", faults.markdown(results)) == text
    assert len(results["faults"]) == 7
    assert all(row.keys() == {"fault", "missing", "then"} for row in results["faults"])


def test_the_readme_leads_to_the_guide() -> None:
    assert "(docs/federation.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
