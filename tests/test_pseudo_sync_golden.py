"""DiLoCo, PALSGD, SCAFFOLD and Streaming DiLoCo: golden vectors and published fixtures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from pseudo_sync_toys import ADAMW, DILOCO, column, over_messages, path
from torch import Tensor, nn
from toys import here, quadratics, registered, snapshots

from clients import SGD, Oracle, State, Told
from fedsim import random, tree
from fedsim.carriers import Carrier
from fedsim.experiment import Experiment
from fedsim.registry import REGISTRY
from fedsim.simulate import rounds
from fedsim.tree import Tree
from strategies.streaming import cut


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    with registered():
        yield


COINS = ("0101", "1001", "0010", "0110")


def flip(monkeypatch: pytest.MonkeyPatch, coins: tuple[str, ...]) -> None:
    """Let worker i's numbers be below every p where its string has a 1, else above."""
    table = torch.tensor(
        [[0.0 if c == "1" else 0.999 for c in string] for string in coins], dtype=torch.float64
    )

    def uniform(stream: int, times: Tensor, worker: Tensor) -> Tensor:
        return table[worker, times % table.shape[1]]

    monkeypatch.setattr(random, "uniform", uniform)


# ------------------------------------------------------------------------------------------ golden vectors

GOLDEN: dict[str, tuple[dict[str, Any], list[float]]] = {
    "data-parallel SGD": (
        {"strategy": "FedAvg(weighting='uniform')", "local_steps": 1},
        [1.425, 1.359375, 1.301953125],
    ),
    "Local SGD": ({"strategy": "FedAvg()"}, [1.29646875, 1.1584491211, 1.0648545602]),
    "Local SGD, weighted": (
        {"strategy": "FedAvg()", "data": "Quadratics(rows=(1, 2, 3, 4))"},
        [1.38075625, 1.2998896104, 1.2450488879],
    ),
    "DiLoCo": ({"strategy": DILOCO}, [1.2293034375, 0.9590881628, 0.7500913301]),
    "DiLoCo, AdamW": ({"strategy": DILOCO, "client": ADAMW}, [1.4740944821, 1.4372889970, 1.3908554206]),
    "SCAFFOLD": (
        {"strategy": "Scaffold()", "client": "Controlled(SGD(lr=0.1))", "rounds": 2},
        [1.29646875, 1.1638986914],
    ),
    "one fragment": (
        {"strategy": "StreamingDiLoCo(lr=0.7, fragments=1, keep=0.0)"},
        [1.2293034375, 0.9590881628, 0.7500913301],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("plan", ["stacked", "vmap", "loop"])
def test_golden_vectors(name: str, plan: str) -> None:
    settings, expected = GOLDEN[name]
    assert path(quadratics(**settings, plan=plan)) == pytest.approx(expected, abs=1e-9, rel=0)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_vectors_over_messages(name: str) -> None:
    settings, expected = GOLDEN[name]
    experiment = quadratics(**settings, plan="vmap")
    assert path(experiment, over_messages(experiment)) == pytest.approx(expected, abs=1e-9, rel=0)


def test_golden_pseudo_gradients() -> None:
    for client, expected in (
        ("SGD(lr=0.1)", [0.20353125, 0.1164007939, 0.0294252524]),
        (ADAMW, [0.0194778330, 0.0193695893, 0.0191815647]),
    ):
        found = snapshots(quadratics(strategy=DILOCO, client=client))
        gaps = [s.sent["model"]["0.weight"].item() - s.rows["0.weight"].mean().item() for s in found]
        assert gaps == pytest.approx(expected, abs=1e-9, rel=0)


PSEUDO = {"strategy": DILOCO, "client": "PALSGD(SGD(lr=0.1), p=0.5, mix=0.4)", "local_steps": 4, "rounds": 2}


@pytest.mark.parametrize("plan", ["stacked", "vmap", "loop", "messages"])
def test_golden_vector_of_palsgd(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(monkeypatch, COINS)
    experiment = quadratics(**PSEUDO, plan="vmap" if plan == "messages" else plan, probes="Drift()")
    found = snapshots(experiment, (over_messages if plan == "messages" else here)(experiment))
    workers = [
        [1.020864, 1.2056, 0.8567, 1.738872],
        [0.7543007359, 1.0445440501, 0.5658122741, 1.53431841],
    ]
    for s, expected in zip(found, workers, strict=True):
        assert s.rows["0.weight"].flatten().tolist() == pytest.approx(expected, abs=1e-9, rel=0)
    models = [s.model["0.weight"].item() for s in found]
    assert models == pytest.approx([1.10832697, 0.7636850467], abs=1e-9, rel=0)
    assert column(found, "gradients") == [9, 18]
    assert found[0].report.idle.tolist() == [2, 2, 1, 2]


def test_golden_control_variates() -> None:
    experiment = quadratics(strategy="Scaffold()", client="Controlled(SGD(lr=0.1))", rounds=2)
    carrier = here(experiment)
    expected = [
        (0.6784375, [1.355, 0.8133333333, 1.1885416667, -0.643125]),
        (0.4419001953, [1.2365444792, 0.5074363889, 1.1168596398, -1.0932397266]),
    ]
    for (snapshot, _), (control, own) in zip(rounds(experiment, carrier=carrier), expected, strict=True):
        assert snapshot.state["control"]["0.weight"].item() == pytest.approx(control, abs=1e-9, rel=0)
        kept = carrier.checkpoint()
        after = kept["0/state/control/0.weight"] + kept["0/state/moved/0.weight"]
        assert after.flatten().tolist() == pytest.approx(own, abs=1e-9, rel=0)


# --------------------------------------------------------------------------------- Streaming DiLoCo, fixtures


@dataclass(frozen=True)
class Slope:
    """Two parameters, from 1, of the function ``2 (a + b)``: the gradient is 2 everywhere."""

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        """Build the module."""
        return _Slope()


class _Slope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(()))
        self.b = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return (2 * (self.a + self.b)).expand(x.shape[0], 1)


@dataclass(frozen=True)
class Watched:
    """Gradient descent that notes where each step begins; for the plan ``loop`` on one worker."""

    lr: float = 1.0
    seen: ClassVar[list[Tree]] = []

    def init(self, theta: Tree) -> State:
        """Remember nothing."""
        return {}

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Make one step."""
        self.seen.append(tree.clone(theta))
        return SGD(self.lr).step(theta, state, oracle)


RAMP = [1.0, -1, -3, -5, -7, -9, -11, -13, -15, -17]
STREAMED = {
    (0, 0.0): ([1, -1, -3, -11, -13, -15, -17, -19, -21, -35], [1, -1, -3, -5, -7, -9, -23, -25, -27, -29],
               [-11, -23, -35, -47]),
    (0, 0.5): ([1, -1, -3, -8, -10, -12, -14, -16, -18, -24.5], [1, -1, -3, -5, -7, -9, -17, -19, -21, -23],
               [-11, -23, -29, -35]),
    (0, 1.0): (RAMP, RAMP, [-11, -23, -23, -23]),
    (1, 0.0): ([1, -1, -3, -7, -9, -11, -13, -15, -17, -27], [1, -1, -3, -5, -7, -9, -19, -21, -23, -25],
               [-7, -19, -27, -39]),
    (1, 0.5): ([1, -1, -3, -6, -8, -10, -12, -14, -16, -21.5], [1, -1, -3, -5, -7, -9, -15, -17, -19, -21],
               [-7, -19, -25, -31]),
    (1, 1.0): (RAMP, RAMP, [-7, -19, -23, -23]),
}  # fmt: skip
"""By delay and share kept: local values of both fragments after steps 0 to 9, and what the server has after each sync."""


@pytest.fixture
def slope(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Experiment]:
    monkeypatch.setitem(REGISTRY["model"], "Slope", Slope)
    monkeypatch.setitem(REGISTRY["client"], "Watched", Watched)

    def describe(delay: int, keep: float, **settings: Any) -> Experiment:
        base = {
            "data": "Blank()", "partition": "Natural()", "model": "Slope()", "objective": "Value()",
            "strategy": f"StreamingDiLoCo(lr=2.0, momentum=0.0, fragments=2, delay={delay}, keep={keep})",
            "schedule": f"PostLocal(until=1, first={3 - delay})", "client": "SGD(lr=1.0)",
            "num_workers": 2, "rounds": 4, "local_steps": 3, "batch_size": 0, "dtype": "float64", "device": "cpu",
        }  # fmt: skip
        return Experiment.from_mapping(base | settings)

    return describe


@pytest.mark.parametrize(("delay", "keep"), STREAMED)
def test_streaming_is_the_fixture_of_torchft(
    delay: int, keep: float, slope: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, server = STREAMED[delay, keep]
    Watched.seen.clear()
    found = snapshots(slope(delay, keep, client="Watched()", plan="loop", num_workers=1))
    assert [x["a"].item() for x in Watched.seen[:10]] == first
    assert [x["b"].item() for x in Watched.seen[:10]] == second
    for name in ("a", "b"):
        merged = [s.state["model"][name].item() for s in found]
        assert merged[name == "b" :: 2] == server[name == "b" :: 2]


@pytest.mark.parametrize(("delay", "keep"), [(0, 0.5), (1, 0.0), (1, 0.5)])
@pytest.mark.parametrize("where", [here, over_messages])
def test_streaming_of_two_workers_is_that_of_one(
    delay: int, keep: float, where: Callable[[Experiment], Carrier], slope: Callable[..., Experiment]
) -> None:
    experiment = slope(delay, keep, plan="vmap")
    found = snapshots(experiment, where(experiment))
    assert [s.state["model"]["ab"[i % 2]].item() for i, s in enumerate(found)] == STREAMED[delay, keep][2]
    assert column(found, "bytes_up") == column(found, "bytes_down") == [2 * 8 * (i + 1) for i in range(4)]


def test_fragments_are_even_and_none_is_empty() -> None:
    sizes = {"a": 5, "b": 1, "c": 1, "d": 1, "e": 1, "f": 90}
    theta = {k: torch.zeros(n) for k, n in sizes.items()}
    for fragments in range(1, 7):
        found = cut(theta, fragments)
        assert len(found) == fragments
        assert all(found)
        assert [k for names in found for k in names] == [*theta]
    assert cut({k: torch.zeros(2) for k in "abcdef"}, 3) == [["a", "b"], ["c", "d"], ["e", "f"]]
