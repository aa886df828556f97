"""Golden vectors, closed forms and reductions of the strategies, own and Flower's."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim import tree
from fedsim.registry import parse
from fedsim.tree import Stack, Tree
from strategies import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedMedian,
    FedYogi,
    LocalGD,
    Report,
    Rule,
    State,
    TrimmedMean,
)
from strategies.foreign import FlowerStrategy

NUM_WORKERS = 7
CLIP = "flwr.DifferentialPrivacyServerSide"


def make_rows(seed: int, m: int = NUM_WORKERS) -> Stack:
    g = torch.Generator().manual_seed(seed)
    return {
        k: torch.randn((m, *s), generator=g, dtype=torch.float64)
        for k, s in {"weight": (3, 2), "b": ()}.items()
    }


def make_model() -> Tree:
    return tree.take(make_rows(0, m=1), 0)


def make_report(rule: Rule, m: int = NUM_WORKERS, samples: Tensor | None = None) -> Report:
    samples = torch.arange(3.0, 3.0 + m) if samples is None else samples
    ones = torch.ones(m, dtype=torch.int64)
    loss = torch.linspace(0.5, 2.0, m, dtype=torch.float64)
    return Report(torch.arange(m), loss, rule.weight(samples), ones, ones)


def run(rule: Rule, theta: Tree, stacks: list[Stack]) -> list[State]:
    state, _ = rule.init(theta, tree.num_rows(stacks[0]))
    states = []
    for rows in stacks:
        state, _ = rule.merge(state, rows, make_report(rule, tree.num_rows(rows)))
        states.append(state)
    return states


def assert_close(a: Tree, b: Tree) -> None:
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k], b[k], atol=1e-12, rtol=1e-12)


# ------------------------------------------------------------------------------------------ golden vectors

# Worker i has the loss a_i (x - b_i)^2 / 2 and takes 3 full gradient steps of rate 0.1 from 1.5.
A = torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=torch.float64)
B = torch.tensor([0.0, 1.0, -1.0, 2.0], dtype=torch.float64)

W2 = [1.29646875, 1.1584491211, 1.0648545602]
W2_WEIGHTED = [1.38075625, 1.2998896104, 1.2450488879]
W8 = [1.29646875, 0.9752709961, 0.6515589157]
W9 = [1.4047915302, 1.2759951433, 1.1282755455]
W9_FLOWER = [1.4292310756, 1.3469988803, 1.2603708556]
W10 = [1.4047926230, 1.2763585494, 1.1295359258]
W10_FLOWER = [1.4046831553, 1.2761644517, 1.1292693678]
W11 = [1.4004901180, 1.3362947250, 1.2871498601]
W11_FLOWER = [1.4004889228, 1.3362931628, 1.2871481258]


def toy(rule: Rule, samples: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)) -> list[float]:
    state, broadcast = rule.init({"x": torch.tensor([1.5], dtype=torch.float64)}, 4)
    weight = torch.tensor(samples, dtype=torch.float64)
    path = []
    for _ in range(3):
        start = rule.adopt({"x": torch.zeros(1, dtype=torch.float64)}, broadcast, torch.tensor(0))
        x = start["x"].expand(4)
        for _ in range(3):
            x = x - 0.1 * A * (x - B)
        state, broadcast = rule.merge(state, {"x": x[:, None]}, make_report(rule, 4, weight))
        path.append(rule.model(state, {"x": x[:, None]})["x"].item())
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("FedAvg()", W2),
        ("LocalGD()", W2),
        ("flwr.FedAvg()", W2),
        ("FedAvgM(lr=1.0, momentum=0.9)", W8),
        ("flwr.FedAvgM(server_learning_rate=1.0, server_momentum=0.9)", W8),
        ("FedAdam(lr=0.1, beta1=0.9, beta2=0.99, tau=1e-3)", W9),
        ("flwr.FedAdam(eta=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3)", W9_FLOWER),
        ("FedYogi(lr=0.1, beta1=0.9, beta2=0.99, tau=1e-3)", W10),
        ("flwr.FedYogi(eta=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3)", W10_FLOWER),
        ("FedAdagrad(lr=0.1, tau=1e-3)", W11),
        ("flwr.FedAdagrad(eta=0.1, tau=1e-3)", W11_FLOWER),
    ],
)
def test_golden_vectors(text: str, expected: list[float]) -> None:
    assert toy(parse("strategy", text)) == pytest.approx(expected, abs=1e-9, rel=0)


@pytest.mark.parametrize("text", ["FedAvg()", "flwr.FedAvg()"])
def test_golden_vector_of_weighted_averaging(text: str) -> None:
    weighted = toy(parse("strategy", text), samples=(1.0, 2.0, 3.0, 4.0))
    assert weighted == pytest.approx(W2_WEIGHTED, abs=1e-9, rel=0)


def test_uniform_weighting_ignores_the_samples() -> None:
    assert toy(FedAvg(weighting="uniform"), samples=(1.0, 2.0, 3.0, 4.0)) == pytest.approx(W2, abs=1e-9)
    assert toy(LocalGD(), samples=(1.0, 2.0, 3.0, 4.0)) == pytest.approx(W2, abs=1e-9)


@pytest.mark.parametrize(
    ("paper", "flower", "apart"),
    [
        (FedAdam(), FlowerStrategy("FedAdam"), 1e-2),
        (FedYogi(), FlowerStrategy("FedYogi", (("eta", 0.1),)), 1e-4),
        (FedAdagrad(), FlowerStrategy("FedAdagrad"), 1e-7),
    ],
)
def test_paper_form_and_flower_form_differ(paper: Rule, flower: Rule, apart: float) -> None:
    assert abs(toy(paper)[0] - toy(flower)[0]) > apart


# ---------------------------------------------------------------------------------------------- reductions


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("FedAvgM(lr=1.0, momentum=0.0)", "FedAvg()"),
        ("TrimmedMean(share=0.0)", "FedAvg(weighting='uniform')"),
        ("TrimmedMean(share=0.49)", "FedMedian()"),
        ("flwr.FedAvg()", "FedAvg()"),
        ("flwr.FedAvg(fraction_train=1.0)", "FedAvg()"),
        ("flwr.FedAvgM(server_learning_rate=0.5, server_momentum=0.8)", "FedAvgM(lr=0.5, momentum=0.8)"),
        ("flwr.FedMedian()", "FedMedian()"),
        ("flwr.FedTrimmedAvg(beta=0.3)", "TrimmedMean(share=0.3)"),
        ("flwr.MultiKrum(num_nodes_to_select=7)", "FedAvg()"),
        (
            f"{CLIP}FixedClipping(strategy=flwr.FedAvg(), noise_multiplier=0, clipping_norm=1e9, "
            "num_sampled_clients=7)",
            "FedAvg()",
        ),
    ],
)
def test_reductions(a: str, b: str) -> None:
    stacks = [make_rows(i) for i in (1, 2, 3)]
    pairs = zip(*(run(parse("strategy", text), make_model(), stacks) for text in (a, b)), strict=True)
    for x, y in pairs:
        assert_close(x["model"], y["model"])


@pytest.mark.parametrize("m", [1, 2, 5, 6])
def test_median_is_that_of_numpy(m: int) -> None:
    rows = make_rows(1, m)
    (state,) = run(FedMedian(), make_model(), [rows])
    assert_close(state["model"], {k: torch.tensor(np.median(x.numpy(), axis=0)) for k, x in rows.items()})


@pytest.mark.parametrize(("share", "m", "cut"), [(0.1, 9, 0), (0.1, 10, 1), (0.3, 7, 2), (0.49, 5, 2)])
def test_trimmed_mean_cuts_the_floor_of_its_share(share: float, m: int, cut: int) -> None:
    x = torch.tensor([2.0**i for i in range(m)], dtype=torch.float64)
    (state,) = run(TrimmedMean(share=share), {"x": x[0]}, [{"x": x.flip(0)}])
    assert state["model"]["x"].item() == pytest.approx(x[cut : m - cut].mean().item(), rel=1e-15)


def test_qfedavg_with_q_0_is_the_uniform_mean_of_the_steps() -> None:
    rule = parse("strategy", "flwr.QFedAvg(client_learning_rate=0.1, q=0.0)")
    (state,) = run(rule, make_model(), [make_rows(1)])
    assert_close(state["model"], tree.mean(make_rows(1), torch.ones(NUM_WORKERS, dtype=torch.float64)))


def test_krum_gives_the_row_in_the_middle_of_the_crowd() -> None:
    rows = {"x": torch.tensor([[0.0], [0.1], [0.25], [9.0], [-7.0]], dtype=torch.float64)}
    rule = parse("strategy", "flwr.Krum(num_malicious_nodes=2)")
    (state,) = run(rule, {"x": torch.zeros(1, dtype=torch.float64)}, [rows])
    # The nearest neighbour of both 0.0 and 0.1 is 0.1 away: the first wins.
    assert state["model"]["x"].item() in {0.0, 0.1}


def test_clipping_shortens_each_change_to_the_norm() -> None:
    rule = parse(
        "strategy",
        f"{CLIP}FixedClipping(strategy=flwr.FedAvg(), noise_multiplier=0, clipping_norm=0.5, "
        "num_sampled_clients=2)",
    )
    zero = {"x": torch.zeros(2, dtype=torch.float64)}
    rows = {"x": torch.tensor([[3.0, 4.0], [0.0, 0.1]], dtype=torch.float64)}
    state, _ = rule.init(zero, 2)
    state, _ = rule.merge(state, rows, make_report(rule, 2, torch.tensor([1.0, 1.0])))
    assert state["model"]["x"].tolist() == pytest.approx([0.15, 0.25], rel=1e-12)


def test_noise_has_its_size_and_changes_with_the_round_and_the_initial_model() -> None:
    rule = parse(
        "strategy",
        f"{CLIP}FixedClipping(strategy=flwr.FedAvg(), noise_multiplier=2, clipping_norm=10.0, "
        "num_sampled_clients=4)",
    )
    n = 20_000

    def noise(start: float) -> list[Tensor]:
        theta = {"x": torch.full((n,), start, dtype=torch.float64)}
        state, _ = rule.init(theta, 4)
        found = []
        for _ in range(2):
            rows = tree.replicate(state["model"], 4)
            rows["x"] += 1e-3
            expected = state["model"]["x"] + 1e-3
            state, _ = rule.merge(state, rows, make_report(rule, 4))
            found.append(state["model"]["x"] - expected)
        return found

    drawn = [*noise(0.0), *noise(1.0)]
    for i, x in enumerate(drawn):
        # The sample deviation of n draws has a standard error of sigma / sqrt(2 n).
        assert x.std().item() == pytest.approx(2 * 10.0 / 4, rel=4 / math.sqrt(2 * n))
        for y in drawn[:i]:
            assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < 4 / math.sqrt(n)
