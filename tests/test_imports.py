"""Imports point one way; the top-level names mean the same in whatever order they are used."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = [
    {
        "tree",
        "random",
        "checks",
        "compat",
        "processes",
        "layers",
        "least_distance",
        "gaps",
        "canvas",
        "threads",
        "errors",
        "keys",
        "source",
        "frames",
        "stored",
        "reach",
    },
    {
        "clients",
        "strategies",
        "objectives",
        "data",
        "models",
        "analysis",
        "landscapes",
        "text_classifier",
        "gpt_neo",
    },
    {"probes", "network", "schedule", "step_sizes", "invariance", "attacks"},
    {"precision"},
    {"registry", "experiment"},
    {"federation", "batches", "stacked", "span", "plans", "scores"},
    {"captured"},
    {"cohort", "carriers", "curvature", "play", "simulate"},
    {
        "checkpoints",
        "history",
        "workers",
        "text_sample",
        "plots",
        "runs",
        "messages",
        "grid",
        "over_grid",
        "hosting",
    },
    {
        "client_app",
        "resident",
        "server_app",
        "pages",
        "results",
        "groups",
        "overlays",
        "rate_plots",
        "domain_plots",
        "trajectories",
        "geometry",
        "geometry_plots",
    },
    {"report", "compare", "cells", "domain_sweep", "sweep", "track"},
    {"flower", "deployment", "deploy_cli", "cli"},
]
"""Modules import from their own layer and from those before; a newcomer is added to one of them."""

APART = LAYERS[1]
"""These do not import each other."""

FLOWER = {
    "fedsim/compat.py",
    "fedsim/frames.py",
    "fedsim/resident.py",
    "fedsim/hosting.py",
    "fedsim/grid.py",
    "fedsim/messages.py",
    "fedsim/over_grid.py",
    "fedsim/client_app.py",
    "fedsim/server_app.py",
    "strategies/base.py",
    "strategies/messages.py",
    "strategies/foreign.py",
}
"""The files that know Flower."""

FILES = sorted(
    file.relative_to(ROOT)
    for package in ("fedsim", "strategies", "clients")
    for file in (ROOT / package).rglob("*.py")
)


def unit(module: str) -> str:
    """Name what is layered: ``fedsim.data.hub`` is part of ``data``, ``strategies.base`` of ``strategies``."""
    first, *rest = module.split(".")
    return rest[0] if first == "fedsim" and rest else first


def name(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name(file) for file in FILES}


def imported(file: Path) -> set[str]:
    """List the modules that a file imports, also within functions, but not for type checkers only."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write the whole name of {node.module}"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else str(node.module))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse((ROOT / file).read_text(encoding="utf-8")))
    return found


IMPORTS = {file: imported(file) for file in FILES}
OURS = {file: {m for m in found if m in MODULES} for file, found in IMPORTS.items()}


def test_every_module_has_its_layer() -> None:
    layered = [unit for layer in LAYERS for unit in layer]
    assert len(layered) == len(set(layered))
    assert {unit(name(file)) for file in FILES} - {"fedsim"} == set(layered)


@pytest.mark.parametrize("file", [f for f in FILES if name(f) != "fedsim"], ids=str)
def test_imports_point_one_way(file: Path) -> None:
    level = {unit: i for i, layer in enumerate(LAYERS) for unit in layer}
    mine = unit(name(file))
    upward = {m for m in OURS[file] if unit(m) != "fedsim" and level[unit(m)] > level[mine]}
    assert upward == set(), f"{file} must not import from a later layer"
    if mine in APART:
        across = {m for m in OURS[file] if unit(m) in APART - {mine}}
        assert across == set(), f"{mine} must not import {across}"


def test_no_import_goes_round_in_a_circle() -> None:
    graph = {name(file): found - {"fedsim", name(file)} for file, found in OURS.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)  # raises CycleError


def test_only_a_few_files_know_flower() -> None:
    know = {str(file) for file, found in IMPORTS.items() if any(m.split(".")[0] == "flwr" for m in found)}
    assert know == FLOWER


@pytest.mark.parametrize("file", FILES, ids=str)
def test_nothing_draws_from_a_global_generator(file: Path) -> None:
    if str(file) == "strategies/foreign.py":
        return  # seeds and restores Python's generator around Flower's code
    assert "random" not in IMPORTS[file], "use fedsim.random"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_nothing_is_unpickled_or_evaluated(file: Path) -> None:
    assert IMPORTS[file].isdisjoint({
        "pickle",
        "cPickle",
        "dill",
        "cloudpickle",
        "shelve",
        "marshal",
        "joblib",
    })
    called = [
        n.func for n in ast.walk(ast.parse((ROOT / file).read_text("utf-8"))) if isinstance(n, ast.Call)
    ]
    assert {ast.unparse(f) for f in called}.isdisjoint({
        "eval",
        "exec",
        "compile",
        "torch.load",
        "torch.save",
    })
    for node in ast.walk(ast.parse((ROOT / file).read_text("utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert ast.unparse(node.value) == "False"


@pytest.mark.parametrize(
    "heavy", ["torch", "pandas", "seaborn", "matplotlib", "sklearn", "scipy", "datasets", "flwr", "ray"]
)
def test_help_imports_nothing_heavy(heavy: str, help_modules: set[str]) -> None:
    assert heavy not in help_modules


@pytest.mark.parametrize("heavy", ["pandas", "seaborn", "matplotlib", "sklearn", "scipy", "datasets", "ray"])
def test_figures_and_data_sets_are_imported_when_they_are_needed(heavy: str, run_modules: set[str]) -> None:
    assert heavy not in run_modules


def loaded(code: str) -> set[str]:
    """Run code in a fresh interpreter and list the packages it has imported."""
    code += "\nimport sys; print('\\n'.join({m.split('.')[0] for m in sys.modules}))"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout.split()
    )


@pytest.fixture(scope="module")
def help_modules() -> set[str]:
    return loaded("import fedsim.cli")


@pytest.fixture(scope="module")
def run_modules() -> set[str]:
    found = loaded("import fedsim.runs")
    assert {"torch", "fedsim"} <= found
    return found


def test_public_names_are_the_same_in_any_order() -> None:
    code = """
import fedsim
first = {name: getattr(fedsim, name) for name in fedsim.__all__}
import fedsim.runs, fedsim.cli
for name in (*fedsim.__all__, *reversed(fedsim.__all__)):
    assert getattr(fedsim, name) is first[name], name
    assert callable(first[name]), name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
