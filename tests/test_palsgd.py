"""PALSGD: the expected round and its fixed point, drift, coins, and bad arguments."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pseudo_sync_toys import DILOCO, fixed_point, weights_of
from torch import Tensor
from toys import A, B, quadratics, registered, snapshots

from clients import PALSGD, SGD, AdamW, LocalRule, Oracle, Prox
from fedsim import tree
from fedsim.tree import Tree
from strategies import StreamingDiLoCo


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    with registered():
        yield


# ------------------------------------------------------------------------------------------ the expected round


def scripted(rule: LocalRule, a: float, b: float, start: float, anchor: float, numbers: list[float]) -> float:
    """Walk one worker of the toy through a round with given random numbers."""
    theta, home = ({"x": torch.tensor(v, dtype=torch.float64)} for v in (start, anchor))
    state = rule.init(theta)

    def grad(at: Tree) -> tuple[Tree, Tensor]:
        return {"x": a * (at["x"] - b)}, a / 2 * (at["x"] - b) ** 2

    for t, u in enumerate(numbers):
        oracle = Oracle(grad, home, {"model": home}, torch.tensor(t), torch.tensor(u, dtype=torch.float64))
        theta, state, _ = rule.step(theta, state, oracle)
    return theta["x"].item()


def expected_end(p: float, a: float, b: float, start: float, steps: int = 4) -> float:
    """Average the end of a round over all coin strings."""
    rule, total = PALSGD(SGD(lr=0.1), p=p, mix=0.4), 0.0
    for coins in itertools.product((0, 1), repeat=steps):
        numbers = [0.0 if c else 0.9999 for c in coins]
        probability = math.prod(p if c else 1 - p for c in coins)
        total += probability * scripted(rule, a, b, start, start, numbers)
    return total


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_the_expected_round_of_palsgd_is_that_of_the_proximal_term(p: float) -> None:
    golden = (1.0146516, 1.2223424, 1.0635411, 1.7248156)
    for a, b, known in zip(A, B, golden, strict=True):
        e = 1.5
        for _ in range(4):
            e = e - 0.1 * (a * (e - b) + 0.4 * (e - 1.5))
        assert expected_end(p, a, b, 1.5) == pytest.approx(e, abs=1e-12)
        assert e == pytest.approx(known, abs=1e-7)
        assert e == pytest.approx(scripted(Prox(SGD(0.1), mu=0.4), a, b, 1.5, 1.5, [0.5] * 4), abs=1e-12)


def test_the_mean_map_of_palsgd_stops_at_a_biased_point() -> None:
    # The expected round is affine in its start; two values give it.
    ends = [[expected_end(0.5, a, b, start) for a, b in zip(A, B, strict=True)] for start in (0.0, 1.0)]
    offset, slope = (sum(x) / 4 for x in (ends[0], [y - x for x, y in zip(*ends, strict=True)]))
    assert offset / (1 - slope) == pytest.approx(0.8515719394, abs=1e-9)
    assert fixed_point(weights_of(4, 0.4)) == pytest.approx(0.8515719394, abs=1e-9)
    assert fixed_point(weights_of(4)) == pytest.approx(0.8517363855, abs=1e-9)


# ------------------------------------------------------------------------------------------------------- drift


@dataclass(frozen=True)
class Unguarded(PALSGD):
    """Without the check of the pull."""

    def __post_init__(self) -> None:
        """Check nothing."""


def mean_square(rule: LocalRule, samples: int = 200_000, steps: int = 64) -> float:
    """Walk samples from 0 through a round on ``x^2 / 2`` with gradient noise of deviation 1: mean of ``x^2``."""
    g = torch.Generator().manual_seed(1)
    x = torch.zeros(samples, dtype=torch.float64)

    def step(x: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        home = {"x": torch.zeros_like(x)}
        oracle = Oracle(lambda at: ({"x": at["x"] + noise}, at["x"] ** 2), home, {}, torch.tensor(0), u)
        return rule.step({"x": x}, {}, oracle)[0]["x"]

    for _ in range(steps):
        noise, u = (f(samples, generator=g, dtype=torch.float64) for f in (torch.randn, torch.rand))
        x = torch.vmap(step)(x, noise, u)
    return x.square().mean().item()


def drift(p: float, mix: float, lr: float = 0.05, steps: int = 64) -> float:
    """Mean square in closed form."""
    r = (1 - p) * (1 - lr / (1 - p)) ** 2 + (p * (1 - lr * mix / p) ** 2 if p else 0.0)
    return lr**2 / (1 - p) * (1 - r**steps) / (1 - r)


@pytest.mark.parametrize(
    ("p", "mix", "expected"),
    [
        (0.0, 0.0, 0.025605), (0.1, 0.0, 0.028530), (0.1, 0.5, 0.019703), (0.1, 1.0, 0.016129), (0.1, 2.0, 0.014084),
        (0.25, 1.0, 0.017857),
    ],
)  # fmt: skip
def test_the_drift_of_palsgd(p: float, mix: float, expected: float) -> None:
    assert drift(p, mix) == pytest.approx(expected, abs=5e-7)
    assert mean_square(PALSGD(SGD(lr=0.05), p=p, mix=mix)) == pytest.approx(expected, rel=0.02)


def test_a_small_p_at_the_same_mix_diverges() -> None:
    rule = Unguarded(SGD(lr=0.05), p=0.05, mix=4.0)
    assert mean_square(rule, 2000, 64) > 10
    assert mean_square(rule, 2000, 128) > 10 * mean_square(rule, 2000, 64)


# -------------------------------------------------------------------------------------- steps, pulls and coins


def test_every_tensor_is_pulled_unless_the_published_code_is_reproduced() -> None:
    g = torch.Generator().manual_seed(0)
    theta, home = (
        {
            k: torch.randn(s, generator=g, dtype=torch.float64)
            for k, s in {"w": (3, 2), "b": (2,), "v": ()}.items()
        }
        for _ in range(2)
    )

    def grad(at: Tree) -> tuple[Tree, Tensor]:
        return tree.zeros_like(at), torch.zeros((), dtype=torch.float64)

    oracle = Oracle(grad, home, {}, torch.tensor(1), torch.tensor(0.05, dtype=torch.float64))
    for first_only in (False, True):
        rule = PALSGD(SGD(lr=0.1), p=0.2, mix=0.5, first_tensor_only=first_only)
        after, _, said = rule.step(theta, {}, oracle)
        assert said.gradients.item() == 0
        for i, k in enumerate(theta):
            pull = 0.0 if first_only and i else 0.1 * 0.5 / 0.2
            torch.testing.assert_close(after[k], theta[k] - pull * (theta[k] - home[k]), rtol=1e-14, atol=0)


def test_the_state_advances_with_gradient_steps_only() -> None:
    rule, plain = PALSGD(AdamW(lr=0.02), p=0.5, mix=1.0), AdamW(lr=0.02 / 0.5)
    theta = {"x": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    state = rule.init(theta)

    def oracle(u: float) -> Oracle:
        return Oracle(
            lambda at: (tree.scale(3.0, at), at["x"].sum()), theta, {}, torch.tensor(0), torch.tensor(u)
        )

    x, reference, expected = theta, plain.init(theta), theta
    for u in (0.9, 0.1, 0.6, 0.2, 0.3, 0.7):
        x, state, _ = rule.step(x, state, oracle(u))
        if u < 0.5:
            expected = tree.axpy(-0.02 / 0.5, tree.sub(expected, theta), expected)
        else:
            expected, reference, _ = plain.step(expected, reference, oracle(u))
        torch.testing.assert_close(x, expected, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(state, reference, rtol=0, atol=0)
    assert state["count"].item() == 3


def coins(**settings: Any) -> Tensor:
    """Return the coins ``[rounds, workers]`` of a run with one step a round."""
    base = {
        "data": "Quadratics(a=(1.0, 1.0, 1.0, 1.0, 1.0, 1.0), b=(0.0, 0.0, 0.0, 0.0, 0.0, 0.0), rows=(1, 1, 1, 1, 1, 1))"
    }
    base |= {"num_workers": 6, "local_steps": 1, "rounds": 200, "eval_every": 0, "strategy": DILOCO}
    base |= {"client": "PALSGD(SGD(lr=0.1), p=0.3)"}
    return torch.stack([s.report.idle for s in snapshots(quadratics(**(base | settings)))]).double()


def test_coins_are_fair_and_independent_and_the_same_again() -> None:
    found = coins()
    n, p = found.numel(), 0.3
    assert abs(found.mean().item() - p) < 4 * math.sqrt(p * (1 - p) / n)
    correlation = torch.corrcoef(found.T) - torch.eye(6)
    assert correlation.abs().max().item() < 4 / math.sqrt(len(found))
    assert torch.equal(found[:20], coins(plan="loop", nodes=3, rounds=20))
    assert not torch.equal(found[:20], coins(seed=1, rounds=20))


def test_coins_of_the_published_code_are_the_same_for_all_and_begin_with_a_gradient() -> None:
    found = coins(client="PALSGD(SGD(lr=0.1), p=0.3, coin_seed=2023)")
    assert torch.equal(found, found[:, :1].expand(-1, 6))
    assert not found[0].any()
    assert abs(found[:, 0].mean().item() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / len(found))
    longer = coins(client="PALSGD(SGD(lr=0.1), p=0.3, coin_seed=2023)", local_steps=4, rounds=20)
    assert torch.equal(longer[:, 0], found[:80, 0].view(20, 4).sum(1))  # they go on from round to round


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: PALSGD(p=1.0), r"PALSGD: p = 1\.0 must be in \[0, 1\)"),
        (lambda: PALSGD(mix=-1.0), r"PALSGD: mix = -1\.0 must be >= 0"),
        (lambda: PALSGD(coin_seed=-1), r"PALSGD: coin_seed = -1 must be >= 0"),
        (lambda: PALSGD(SGD(lr=0.1), p=0.1, mix=2.0), r"PALSGD: lr mix / p = 0\.1 \* 2 / 0\.1 = 2 must be < 2, or .*"),
        (lambda: PALSGD(Prox(AdamW(lr=0.2)), p=0.1, mix=2.0), r"PALSGD: lr mix / p = 0\.2 \* 2 / 0\.1 = 4 must .*"),
        (lambda: StreamingDiLoCo(keep=1.5), r"StreamingDiLoCo: keep = 1\.5 must be in \[0, 1\]"),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_line(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        make()


def test_a_pull_that_overshoots_is_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"PALSGD: lr mix / p = 0\.15 \* 1 / 0\.1 = 1\.5 is above 1"):
        PALSGD(SGD(lr=0.15), p=0.1, mix=1.0)
