"""Measured flatness: eigenvalues and rises against dense Hessians, the probe, and how flat rules end on digits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from test_clients import assert_close
from torch import Tensor
from toys import blobs, registered

import fedsim
from clients import SASAM, Oracle, State, Told
from fedsim import tree
from fedsim.analysis.hessian import TrainingLoss, dense_hessian, trace
from fedsim.analysis.sharpness import (
    federated_product,
    m_sharpness,
    power_iteration,
    start_vector,
    top_eigenvalue,
)
from fedsim.carriers import InProcess
from fedsim.experiment import BadInput, Experiment
from fedsim.federation import load
from fedsim.models import MLP, initialise
from fedsim.objectives import CrossEntropy
from fedsim.probes import Snapshot
from fedsim.probes.disagreement import training_loss
from fedsim.registry import REGISTRY
from fedsim.tree import Tree

F64 = torch.float64


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    with registered():
        yield


# --------------------------------------------------------------------------------------- measured flatness


def network(rows: int = 30, chunk: int = 11) -> tuple[TrainingLoss, Tree]:
    """Make a small smooth network and its data."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 5, generator=g, dtype=F64)
    y = torch.randint(3, (rows,), generator=g)
    module, theta = initialise(MLP(hidden=(6,), activation="tanh"), (5,), 3, 0, F64)
    return TrainingLoss(module, CrossEntropy(), x, y, chunk), theta


def test_eigenvalue_and_trace_are_those_of_the_dense_hessian() -> None:
    problem, theta = network(chunk=0)
    dense = dense_hessian(problem, theta)
    top = top_eigenvalue(problem, theta, tol=1e-15, most=20_000)
    assert top.converged
    assert top.value == pytest.approx(torch.linalg.eigvalsh(dense)[-1].item(), abs=1e-8)
    assert trace(problem, theta, 2000)[0] == pytest.approx(dense.trace().item(), rel=0.05)


def test_power_iteration_returns_the_largest_and_not_the_longest() -> None:
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=F64))
    matrix = basis @ torch.diag(torch.tensor([-6.5, -2.0, 0.0, 1.0, 3.0, 4.0], dtype=F64)) @ basis.T
    start = torch.randn(6, generator=generator, dtype=F64)
    top = power_iteration(lambda v: matrix @ v, start, tol=1e-14, most=1000)
    assert top.value == pytest.approx(4.0, abs=1e-8)
    assert top.converged
    assert top.products > 2
    short = power_iteration(lambda v: matrix @ v, start, tol=1e-14, most=3)
    assert (short.products, short.converged) == (6, False)
    assert power_iteration(lambda v: 0 * v, start) == (0.0, 1, True)


def test_federated_power_iteration_is_that_of_pooled_data() -> None:
    whole, theta = network(rows=30)
    cuts = (slice(0, 6), slice(6, 18), slice(18, 30))
    each = [whole._replace(x=whole.x[c], y=whole.y[c]) for c in cuts]
    share = torch.tensor([6.0, 12.0, 12.0], dtype=F64) / 30
    exact = {"tol": 1e-15, "most": 20_000}
    pooled = top_eigenvalue(whole, theta, **exact).value
    found = power_iteration(federated_product(each, share, theta), start_vector(theta, 0), **exact).value
    assert found == pytest.approx(pooled, abs=1e-8)
    mean = sum(
        p * top_eigenvalue(problem, theta, **exact).value
        for p, problem in zip(share.tolist(), each, strict=True)
    )
    assert found <= mean + 1e-12


def test_the_rise_is_the_gradient_for_a_small_radius() -> None:
    problem, theta = network()
    slope = problem.gradient(theta)[0].norm().item()
    assert m_sharpness(problem, theta, 1e-4) / (1e-4 * slope) == pytest.approx(1, abs=1e-3)


def test_m_sharpness_is_a_mean_over_groups_and_higher_than_over_all_rows() -> None:
    problem, theta = network()
    groups = [problem._replace(x=problem.x[i : i + 8], y=problem.y[i : i + 8]) for i in range(0, 30, 8)]
    rises = [m_sharpness(p, theta, 0.1) * len(p.x) for p in groups]
    assert m_sharpness(problem, theta, 0.1, m=8) == pytest.approx(sum(rises) / 30, abs=1e-12)
    assert m_sharpness(problem, theta, 0.1, m=30) == m_sharpness(problem, theta, 0.1)
    assert m_sharpness(problem, theta, 0.1, m=1) > m_sharpness(problem, theta, 0.1)


def test_the_probe_measures_at_its_rounds_what_analysis_says() -> None:
    experiment = blobs(rounds=4, probes="Sharpness(every=2, rows=0, rho=0.1, m=5, probes=4)")
    snapshots = [s for s, _ in fedsim.rounds(experiment)]
    columns = [{k: v for k, v in s.metrics.items() if k.startswith("sharpness.")} for s in snapshots]
    assert [len(c) for c in columns] == [0, 8, 0, 8]
    problem, theta = training_loss(snapshots[3].federation), snapshots[3].model
    assert columns[3]["sharpness.lambda_max"] == top_eigenvalue(problem, theta).value
    assert columns[3]["sharpness.m_sharpness"] == m_sharpness(problem, theta, 0.1, m=5)
    assert columns[3]["sharpness.rise"] == m_sharpness(problem, theta, 0.1)
    assert columns[3]["sharpness.loss"] == problem.gradient(theta)[1]
    alone = [s.model for s, _ in fedsim.rounds(blobs(rounds=4))]
    assert_close(alone[-1], snapshots[-1].model, tolerance=0.0)  # a probe changes nothing


def test_the_probe_looks_at_some_rows_the_same_in_all_rounds() -> None:
    settings = {"rounds": 2, "client": "SGD(lr=1e-300)"}  # nothing moves
    some, again = (
        s.metrics["sharpness.loss"]
        for s, _ in fedsim.rounds(blobs(**settings, probes="Sharpness(every=1, rows=7)"))
    )
    *_, (whole, _) = fedsim.rounds(blobs(**settings, probes="Sharpness(every=1, rows=0)"))
    assert some == again != whole.metrics["sharpness.loss"]


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("Sharpness(every=0)", "every = 0 must be >= 1"),
        ("Sharpness(rho=0.0)", "rho = 0.0 must be > 0"),
        ("Sharpness(probes=1)", "probes = 1 must be >= 2"),
        ("Sharpness(rows=-1)", "rows = -1 must be >= 0"),
    ],
)
def test_bad_arguments_of_the_probe(expression: str, text: str) -> None:
    with pytest.raises(BadInput, match=text):
        blobs(probes=expression)


def test_bad_arguments_of_the_measures() -> None:
    problem, theta = network()
    with pytest.raises(ValueError, match="tol = 0"):
        top_eigenvalue(problem, theta, tol=0)
    with pytest.raises(ValueError, match="most = 1"):
        top_eigenvalue(problem, theta, most=1)
    with pytest.raises(ValueError, match="rho = 0"):
        m_sharpness(problem, theta, 0)
    with pytest.raises(ValueError, match="m = -1"):
        m_sharpness(problem, theta, 0.1, m=-1)


# ------------------------------------------------------------------------------- what becomes of digits


def on_digits(client: str, **settings: object) -> Experiment:
    """Describe a run of the network 64-64-10 on digits."""
    base = {
        "data": "Digits()", "partition": "IID()", "model": "MLP(hidden=(64,))", "client": client, "num_workers": 1,
        "rounds": 1, "local_steps": 0, "local_epochs": 20, "batch_size": 32, "device": "cpu", "dtype": "float64",
        "plan": "stacked",
    }  # fmt: skip
    return Experiment.from_mapping(base | settings)


def digits(client: str, **settings: object) -> Snapshot:
    """Train, and return the last round."""
    *_, (last, _) = fedsim.rounds(on_digits(client, **settings))
    return last


def accuracy(snapshot: Snapshot) -> float:
    found = snapshot.metrics["test_accuracy"]
    assert isinstance(found, float)
    return found


def sharpest(snapshot: Snapshot) -> float:
    return top_eigenvalue(training_loss(snapshot.federation), snapshot.model).value


FEDERATION = {
    "partition": "Dirichlet(alpha=0.3)", "num_workers": 10, "rounds": 25, "local_steps": 10, "local_epochs": 0,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("eta0", [1e-4, 0.1, 10.0])
def test_adaptive_steps_need_no_tuning(eta0: float) -> None:
    assert accuracy(digits(f"AdaptiveSGD(eta0={eta0})", local_epochs=25)) >= 0.94
    if eta0 != 0.1:
        assert accuracy(digits(f"SGD(lr={eta0})", local_epochs=25)) <= 0.4


@dataclass(frozen=True)
class Watched:
    """`SASAM` that remembers how far it has climbed at most."""

    inner: SASAM = SASAM()  # noqa: RUF009 - it is frozen

    def init(self, theta: Tree) -> State:
        """Begin at 0."""
        return {"inner": self.inner.init(theta), "far": torch.zeros((), dtype=F64)}

    def step(self, theta: Tree, state: State, oracle: Oracle) -> tuple[Tree, State, Told]:
        """Look at the third point at which a gradient is asked for."""
        asked: list[Tree] = []

        def grad(x: Tree) -> tuple[Tree, Tensor]:
            asked.append(x)
            return oracle.grad(x)

        after, inner, said = self.inner.step(theta, state["inner"], oracle._replace(grad=grad))
        far = torch.maximum(state["far"], tree.norm(tree.sub(asked[2], theta)))
        return after, {"inner": inner, "far": far}, said


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_safe_form_trains_within_its_radius(seed: int) -> None:
    fedsim.register("client", Watched)
    try:
        experiment = on_digits("Watched()", seed=seed, strategy="Remembering()")
        federation = load(experiment)
        carrier = InProcess(experiment, federation)
        *_, (last, _) = fedsim.rounds(experiment, federation, carrier)
    finally:
        del REGISTRY["client"]["Watched"]
    assert accuracy(last) >= 0.93
    state = carrier.cohorts[0].state
    assert state is not None
    assert 0.1 < state["far"].item() <= 0.2 * (1 + 1e-12)


@pytest.mark.slow
def test_the_faithful_form_collapses_as_it_warns() -> None:
    with pytest.warns(UserWarning, match="preset='transcription'.* is known to collapse"):
        last = digits("SASAM(preset='transcription')")
    assert accuracy(last) < 0.3


@pytest.mark.slow
def test_sam_ends_flatter_than_sgd() -> None:
    sam, sgd = (sharpest(digits(c)) for c in ("SAM(SGD(lr=0.05), rho=0.2)", "SGD(lr=0.05)"))
    assert sam / sgd < 0.7


@pytest.mark.slow
def test_fedsam_ends_flatter_than_fedavg_and_as_accurate() -> None:
    sam, sgd = (digits(c, **FEDERATION) for c in ("SAM(SGD(lr=0.2), rho=0.1)", "SGD(lr=0.2)"))
    assert sharpest(sam) / sharpest(sgd) < 0.8
    assert abs(accuracy(sam) - accuracy(sgd)) < 0.025


@pytest.mark.slow
def test_fed_sa_sam_ends_flatter_than_delta_sgd() -> None:
    clients = ("SASAM(preset='federated')", "AdaptiveSGD(preset='federated')")
    sasam, delta = (sharpest(digits(c, **FEDERATION)) for c in clients)
    assert sasam / delta < 0.65
