"""The benchmarks' pieces that need neither Ray nor time: all implementations solve the same problem."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import attacks, hand, load, loop, nodes, tables
from benchmarks.ceilings import demand
from benchmarks.growth import SAME, points
from benchmarks.nets import build
from benchmarks.problem import Problem, milliseconds_a_round
from benchmarks.readme import replace_section
from benchmarks.speed import IMPLEMENTATIONS
from benchmarks.syncs import STRATEGIES, measure
from benchmarks.workloads import Workload, problem, workloads
from fedsim import Experiment
from fedsim.federation import load as load_federation

SMALL = {
    "linear": {"model": "Linear()"},
    "mlp": {"model": "MLP(hidden=(7,))"},
    "cnn": {"model": "SmallCNN(channels=(3, 4))"},
}


def small(model: str, tmp_path: Path) -> tuple[Problem, Path]:
    e = Experiment.from_mapping(
        {"num_workers": 5, "participation": 0.6, "local_steps": 3, "batch_size": 4} | SMALL[model]
    )
    made = problem("T", Workload("a test", model, e))
    made.save(tmp_path / "problem.npz")
    return made, tmp_path / "problem.npz"


def reference(made: Problem, rows: Tensor) -> Tensor:
    """Train each worker alone with ordinary autograd, ``rows [K, S, B] -> [K, P]``."""
    out = []
    for worker in rows:
        net = build(made)
        net.load_state_dict({k: torch.from_numpy(v) for k, v in made.theta.items()})
        optimizer = torch.optim.SGD(net.parameters(), lr=made.lr)
        for index in worker:
            optimizer.zero_grad()
            x, y = torch.from_numpy(made.x)[index], torch.from_numpy(made.y)[index]
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        out.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    return torch.stack(out)


@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_a_problem_is_the_experiment_of_fedsim(name: str, tmp_path: Path) -> None:
    workload = workloads()[name]
    federation = load_federation(workload.experiment)
    problem(name, workload, federation).save(tmp_path / "p.npz")
    read = Problem.load(tmp_path / "p.npz")
    net = build(read)
    net.load_state_dict({k: torch.from_numpy(v) for k, v in read.theta.items()})
    assert list(dict(net.named_parameters())) == list(federation.theta)
    x = federation.dataset.test_x[:3]
    torch.testing.assert_close(net(x), torch.func.functional_call(federation.module, federation.theta, (x,)))
    assert read.num_workers == workload.experiment.num_workers
    assert read.participants == workload.experiment.num_participants
    np.testing.assert_array_equal(read.rows(4), federation.train.rows(4))


@pytest.mark.parametrize("model", SMALL)
def test_hand_batched_steps_are_those_of_autograd(model: str, tmp_path: Path) -> None:
    made, _ = small(model, tmp_path)
    rows = torch.from_numpy(np.random.default_rng(1).integers(0, len(made.x), (3, 3, 4)))
    theta = torch.cat([torch.from_numpy(v).flatten() for v in made.theta.values()])
    x, y = torch.from_numpy(made.x), torch.from_numpy(made.y)
    share = torch.tensor([0.2, 0.5, 0.3])
    if model == "cnn":
        one = hand.LeanLoop(made, x, y)
        candidates = [one.all, hand.Threads(one, 2).all, hand.Grouped(made, x, y).all]
    else:
        candidates = [hand.Chain(made, x, y, made.participants).all]
    for local in candidates:
        torch.testing.assert_close(local(theta, rows, share), share @ reference(made, rows))


@pytest.mark.parametrize("train", [hand.train, loop.train])
def test_training_lowers_the_loss(train, tmp_path: Path) -> None:
    made, file = small("mlp", tmp_path)
    trained = train(file, 5, "cpu")
    x, y, net = torch.from_numpy(made.x), torch.from_numpy(made.y), build(made)
    losses = []
    for theta in (made.theta, trained.model):
        net.load_state_dict({k: torch.from_numpy(v) for k, v in theta.items()})
        losses.append(F.cross_entropy(net(x), y).item())
    assert losses[1] < losses[0]
    assert len(trained.ends) == 5
    assert trained.ends == sorted(trained.ends)


def test_demand_of_a_linear_model_is_counted_by_hand(tmp_path: Path) -> None:
    made, _ = small("linear", tmp_path)
    flops, moved = demand(made)
    steps, features, parameters = 3 * 3, 64, 64 * 10 + 10
    assert flops == steps * 4 * 2 * (2 * features * 10)  # batch 4; output and gradient of the weights
    assert moved == 4 * (steps * (3 * parameters + 4 * features) + 3 * parameters)


def test_the_steady_state_leaves_out_warm_up_and_the_last_round() -> None:
    assert milliseconds_a_round([5.0, 9.0]) == 4000
    assert milliseconds_a_round([10.0, 20.0, *[21.0 + i for i in range(8)]]) == pytest.approx(1000)


def measurement(name: str, ms: float, loss: float, losses: list[float]) -> dict:
    about = {"workload": "A", "implementation": name, "repeat": 0, "rounds": 2, "note": "", "peak_mb": 1.0}
    return about | {"ms": ms, "start_s": 1.0, "total_s": 2.0, "test_loss": loss, "losses": losses}


def test_tables_show_ratios_and_mark_other_losses() -> None:
    results = {
        "about": {"device": "d", "threads": 1, "torch": "t", "python": "p", "date": "x", "repeats": 3},
        "implementations": {
            k: {"label": i.label, "version": "1" if k != "pfl" else ""} for k, i in IMPLEMENTATIONS.items()
        },
        "ceilings": {"flops": 1e9, "bytes": 1e9},
        "workloads": {"A": {"title": "t", "rounds": 2, "flops": 1e6, "bytes": 1e6}},
        "measurements": [
            measurement("fedsim", 2.0, 0.5, []),
            measurement("fedsim", 1.0, 0.5, []),
            measurement("fedsim", 9.0, 0.5, []),
            measurement("fedsim-eval", 2.5, 0.5, [0.8, 0.5]),
            measurement("loop", 20.0, 0.6, []),
        ],
    }
    _, rows = tables.speed_rows(json.loads(json.dumps(results)))
    found = {row[0]: row[1:] for row in rows}
    assert found["fedsim"] == ["2", "1", "1"]
    assert found["plain PyTorch loop"] == ["20 (!)", "10", "1"]
    assert found["pfl-research"] == ["not installed", "", ""]
    assert found["FedJAX 1"] == ["failed", "", ""]
    assert "| fedsim | 2 | 1 | 1 |" in tables.speed_markdown(results)
    assert tables.rate_rows(results)[1][0] == ["A, fedsim", "0.5", "50.0%", "0.5", "50.0%"]
    assert math.isnan(tables.speeds(results | {"measurements": results["measurements"][4:]})[0].ratio)


def test_all_points_of_growth_are_experiments() -> None:
    made = {(p.series, p.at): Experiment.from_mapping(SAME | p.keys) for p in points()}
    assert made["workers", 10_000].num_participants == 10_000
    assert made["registered", 1_000_000].num_participants == 100
    assert [at for series, at in made if series == "rounds"] == [100, 1_000, 10_000, 100_000]


def test_only_a_marked_section_is_replaced() -> None:
    text = "a\n<!-- speed:begin -->\nold\n<!-- speed:end -->\nb\n"
    assert replace_section(text, "speed", "new\n") == text.replace("old", "new")
    with pytest.raises(ValueError, match="growth:begin"):
        replace_section(text, "growth", "new")


def test_attackers_take_accuracy_and_the_table_says_so(tmp_path: Path) -> None:
    found = attacks.measure(1, ["FedAvg"], [0.0, 0.5])
    accuracy = {(f["attack"], f["share"]): f["accuracy"] for f in found}
    assert all(accuracy[kind, 0.0] > 0.8 > accuracy[kind, 0.5] for kind in attacks.ATTACKS)
    attacks.figure(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    flipped = next(
        line for line in attacks.markdown({"measurements": found}).splitlines() if "flipped" in line
    )
    assert flipped == f"| flipped labels | FedAvg | {found[0]['accuracy']:.2f} | {found[1]['accuracy']:.2f} |"


def test_syncs_are_measured_side_by_side() -> None:
    found = measure(STRATEGIES, 2, 8)
    assert list(found) == list(STRATEGIES)
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in found.values())


def test_rounds_over_nodes_are_compared_with_the_floor() -> None:
    known = nodes.kinds(3)
    assert known["fedsim"].keys == {"num-workers": 3}
    for kind in known.values():
        if kind.keys is not None:
            Experiment.from_mapping(nodes.SAME | kind.keys)
    seconds = {nodes.FLOOR: [[4.0, 5.0], [3.0]], "fedsim": [[4.4, 4.0], [4.8]]}
    measured = [
        {"kind": kind, "label": known[kind].label, "seconds": part}
        for kind, parts in seconds.items()
        for part in parts
    ]
    *_, line, _, about = nodes.markdown({"measurements": measured, "about": "Here."}).splitlines()
    assert line == "| fedsim, FedAvg | 4.40 | +10% | 4.00 to 4.80 |"
    assert about == "Here."


def test_memory_under_load_is_level_if_its_slope_is_flat(tmp_path: Path) -> None:
    samples = [{"round": r, "mb": 500.0 + min(r, 50), "client_mb": 100.0} for r in range(1, 101)]
    rising = [s | {"mb": 500.0 + 2 * s["round"]} for s in samples]
    measured = [
        {"label": label, "rounds": 100, "ms": 12.3, "samples": found}
        for label, found in (("level", samples), ("rising", rising))
    ]
    assert [load.growth(found) for found in measured] == pytest.approx([0.0, 200.0], abs=1e-6)
    *_, level, rises, _, _ = load.markdown({"measurements": measured, "about": "Here."}).splitlines()
    assert level.startswith("| level | 100 | 546 (to 50) | 550 (to 100) |")
    assert rises.endswith("| +200.0 |")
    load.figure({"measurements": measured}, tmp_path / "load.png")
    assert (tmp_path / "load.png").stat().st_size > 10_000
    for _, keys in load.CASES.values():
        Experiment.from_mapping(load.SAME | keys)


def test_a_meter_counts_marked_processes_only(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text("{}\n{}\n")
    code = "import os; x = bytearray(os.urandom(2**25)); input()"
    env = {load.MARK: "this"}
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, env=env) as process:
        meter = load.Meter("this", tmp_path / "history.jsonl", 3)
        meter.start()
        while not meter.samples or meter.samples[-1]["mb"] < 32:
            time.sleep(0.05)
        meter.over.set()
        meter.join()
        assert process.stdin is not None
        process.stdin.close()
    last = meter.samples[-1]
    assert (last["round"], last["client_mb"]) == (2, 0)
    assert 32 < last["mb"] < 128
