"""Leaders and centres: who leads and when, what never changes, and closed forms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from leaders_toys import ALONE, GOLDEN, carriers, last, parabolas, values
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from toys import blobs, here, registered, snapshots

from fedsim import Experiment, tree
from fedsim.cohort import Cohort
from fedsim.data import Shards
from fedsim.experiment import BadInput
from fedsim.federation import load
from fedsim.network import Network
from fedsim.plans import PLANS
from fedsim.probes import Clock
from fedsim.scores import Scorer
from fedsim.simulate import rounds
from strategies import Downpour, ElasticAveraging, FedAvg, LeaderGD, LeaderSGD, Report, Rule
from strategies.leader import best


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    with registered():
        yield


# ------------------------------------------------------------------------------- who leads, and when


def test_v7_a_window_holds_only_losses_that_exist() -> None:
    experiment = parabolas(strategy="LeaderSGD(window=4)", num_workers=3, data="Parabolas(a=(1.0, 1.0, 1.0), b=(0.0, 0.0, 0.0))", model="Scalar(starts_at=(1.0, 1.0, 1.0))")  # fmt: skip
    scorer = Scorer(experiment, load(experiment), 0, 3)
    losses = torch.tensor(
        [[9, 1, 1, 1, 0.2], [9, 0.5, 0.5, 0.5, 0.5], [0.9, 0, 0, 0, 0]], dtype=torch.float64
    )
    scorer.remember(torch.arange(3), losses, torch.tensor([5, 5, 1]))
    score = scorer.of(1, torch.arange(3), {}, lambda rule: PLANS["loop"](*[None] * 4))  # type: ignore[arg-type]
    assert score.tolist() == pytest.approx([0.8, 0.5, 0.9])
    assert best(score) == 1
    scorer.remember(torch.tensor([2]), torch.tensor([[0.1, 7.0]], dtype=torch.float64), torch.tensor([1]))
    assert scorer.of(1, torch.tensor([2]), {}, lambda rule: PLANS["loop"](*[None] * 4)).item() == 0.5  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("score", "expected"),
    [([3.0, 1.0, 1.0], 1), ([math.nan, 2.0, -math.inf], 1), ([math.inf, math.nan], None), ([], None)],
)
def test_the_best_is_finite_and_the_first_of_equals(score: list[float], expected: int | None) -> None:
    assert best(torch.tensor(score, dtype=torch.float64)) == expected


def report(loss: list[float]) -> Report:
    m = len(loss)
    ones = torch.ones(m, dtype=torch.int64)
    return Report(torch.arange(m), torch.tensor(loss, dtype=torch.float64), ones.double(), ones, ones)


def test_nobody_leads_where_no_score_is_finite() -> None:
    rule, theta = LeaderSGD(groups=2), {"w": torch.zeros(3)}
    state, broadcast = rule.init(theta, 4)
    rows = {"w": torch.randn(4, 3)}
    state, broadcast = rule.merge(state, {"w": rows["w"][1:3]}, report([5.0, 1.0, 2.0, math.nan]))
    assert broadcast["lead"]["worker"].tolist() == [1, 2]
    nothing = report([math.nan] * 4)
    assert not len(rule.choose(state, nothing))
    with pytest.warns(UserWarning, match="sync 2: no worker has a finite score, nobody leads"):
        state, broadcast = rule.merge(state, tree.take(rows, slice(0)), nothing)
    adopt = torch.vmap(rule.adopt, in_dims=(0, None, 0))
    assert torch.equal(adopt(rows, broadcast, torch.arange(4))["w"], rows["w"])
    # a group of which no score is finite is not pulled; the others are, by its own leader only
    state, broadcast = rule.merge(state, {"w": rows["w"][1:2]}, report([5.0, 1.0, math.nan, math.nan]))
    moved = adopt(rows, broadcast, torch.arange(4))["w"]
    assert torch.equal(moved[1:], rows["w"][1:])
    torch.testing.assert_close(moved[0], 0.9 * rows["w"][0] + 0.1 * rows["w"][1])


BY = ["running_train", "fresh_batch", "full_batch", "shared_val"]


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("nodes", [1, 3])
def test_scores_are_the_losses_that_they_are_called(by: str, nodes: int) -> None:
    experiment = blobs(
        strategy=f"LeaderSGD(pull=0.0, leader='{by}', window=4)",
        holdout=0.4,
        rounds=2,
        batch_size=2,
        nodes=nodes,
    )
    federation = load(experiment)
    first, second = snapshots(experiment)
    data = federation.dataset
    for s in (first, second):
        for i in range(5):
            row, own = tree.take(s.rows, i), federation.train.rows(i)
            at = {"full_batch": own, "shared_val": federation.held.order}.get(by)
            if at is not None and (by == "full_batch" or len(at) <= 4):
                loss = cross_entropy(functional_call(federation.module, row, (data.x[at],)), data.y[at])
                assert s.told.loss[i].item() == pytest.approx(loss.item(), rel=1e-12)
        chosen = int(s.told.loss.argmin())
        assert int(s.broadcast["lead"]["worker"]) == chosen
    if by == "running_train":  # three losses, then the last of them and three more
        assert first.told.loss.tolist() == pytest.approx(first.report.loss.tolist(), rel=1e-12)
        single = blobs(strategy="LeaderSGD(pull=0.0, window=1)", holdout=0.4, rounds=2, batch_size=2)
        last = snapshots(single)[0].told.loss
        assert second.told.loss.tolist() == pytest.approx(
            ((3 * second.report.loss + last) / 4).tolist(), rel=1e-12
        )
    if by == "fresh_batch":
        assert first.told.loss.tolist() != pytest.approx(first.report.loss.tolist(), rel=1e-3)


def test_shared_rows_are_the_same_for_all() -> None:
    experiment = blobs(strategy="LeaderSGD(leader='shared_val', window=6)", holdout=0.4)
    federation, own = load(experiment), blobs(nodes=1)
    scorer = Scorer(experiment, federation, 0, 5)
    assert len(scorer.shared) == 6
    assert set(scorer.shared.tolist()) <= set(federation.held.order.tolist())
    assert torch.equal(scorer.shared, Scorer(experiment, federation, 2, 4).shared)
    part = federation._replace(held=Shards.from_assignment(np.array([0, 1]), 2), train=federation.train)
    with pytest.raises(BadInput, match="nodes with data of their own share no held-out rows"):
        Scorer(experiment, part, 0, 2)
    assert own


def test_own_losses_are_warned_of_where_data_differ() -> None:
    skewed = Experiment(strategy="LeaderSGD()", num_workers=4, rounds=1, model="Linear()", device="cpu")
    with pytest.warns(UserWarning, match="elects the one with the easiest under partition = 'Dirichlet"):
        next(rounds(skewed))
    fair = skewed.replace({"strategy": "LeaderSGD(leader='shared_val', window=100)", "holdout": 0.2})
    next(rounds(fair))


# ---------------------------------------------------------------------------------------- invariants

MOST = {"local_steps": 2, "rounds": 4}


@pytest.mark.parametrize(
    "strategy", ["LeaderSGD(pull=0.3, leader='full_batch')", "LeaderSGD(groups=5, global_every=2)"]
)
def test_a_leader_stays_bit_for_bit(strategy: str) -> None:
    for s in snapshots(blobs(strategy=strategy)):
        who = int(s.broadcast["lead"]["best"])
        for name, x in s.rows.items():
            assert torch.equal(x[who], s.after[name][who])
        moved = [not torch.equal(s.rows[k], s.after[k]) for k in s.rows]
        assert any(moved) or s.round % 2


def test_a_full_pull_copies_the_winner() -> None:
    for s in snapshots(blobs(strategy="LeaderSGD(pull=1.0)", local_steps=1)):
        for name, x in s.after.items():
            assert torch.equal(x, s.broadcast["model"][name].expand_as(x))


@pytest.mark.parametrize(
    "strategy",
    [
        "LeaderSGD(pull=0.0)",
        "ElasticAveraging(alpha=0.0, beta=0.5)",
        "ElasticAveraging(alpha=0.0, after_step=True)",
    ],
)
def test_without_a_pull_workers_are_alone(strategy: str) -> None:
    """E6: bit for bit what each of them does in a federation of its own."""
    experiment = blobs(strategy=strategy, client="SGD(lr=0.3, momentum=0.9)", plan="loop")
    federation = load(experiment)
    rows = snapshots(experiment)[-1].rows
    cohort = Cohort(experiment.replace({"strategy": "LeaderSGD(pull=0.0)"}), federation, 2, 3)
    alone = [cohort.train(r, torch.tensor([2]), {"model": federation.theta}).rows for r in range(1, 5)]
    for name, x in rows.items():
        assert torch.equal(x[2], alone[-1][name][0])


def test_one_group_knows_no_global_pull() -> None:
    a, b = (
        snapshots(blobs(strategy=f"LeaderSGD(pull_global={g}, global_every={k})"))[-1]
        for g, k in ((0.1, 1), (0.9, 3))
    )
    for name, x in a.after.items():
        assert torch.equal(x, b.after[name])


@pytest.mark.parametrize("client", ["SGD(lr=0.3)", "SGD(lr=0.3, momentum=0.9)"])
@pytest.mark.parametrize(
    "strategy", ["LeaderSGD(prox=0.4)", "LeaderSGD(groups=5, prox=0.4, prox_global=0.3)"]
)
def test_all_plans_make_the_same_stale_pulls(client: str, strategy: str) -> None:
    """In place or not, with workers that have finished cut off."""
    experiment = blobs(client=client, strategy=strategy, schedule="TotalSteps(durations=(1.0, 2.0))")
    expected = last(experiment.replace({"plan": "loop"}))
    for plan in ("stacked", "vmap"):
        found = last(experiment.replace({"plan": plan}))
        for name, leaf in expected.after.items():
            torch.testing.assert_close(found.after[name], leaf, rtol=1e-12, atol=1e-12)
    assert expected.metrics["train_loss"] != last(blobs(client=client, plan="loop")).metrics["train_loss"]


def test_permuting_workers_permutes_results() -> None:
    first = parabolas(**MOST, strategy="LeaderSGD(pull=0.2, leader='full_batch')")
    data = "Parabolas(a=(1.5, 0.5, 2.0, 1.0), b=(2.0, -1.0, 1.0, 0.0))"
    second = first.replace({"data": data, "model": "Scalar(starts_at=(4.0, 1.0, -2.0, 3.0))"})
    assert values(snapshots(first)[-1].after) == pytest.approx(
        values(snapshots(second)[-1].after)[::-1], rel=1e-14
    )


def test_what_is_sent_is_counted_as_in_the_paper() -> None:
    """One float is four bytes; a sync of 16 workers with 351,946 parameters."""
    p, theta = 16, {"w": torch.zeros(351_946)}
    some = report([1.0] * p)
    rows = tree.replicate(theta, p)

    def floats(rule: Rule, syncs: int = 1) -> float:
        state, broadcast = rule.init(theta, p)
        before = clock = Clock()
        for _ in range(syncs):
            before = clock
            chosen = torch.isin(some.worker, rule.choose(state, some))
            state, broadcast = rule.merge(state, tree.take(rows, chosen), some)
            clock = Network().tick(clock, some, theta, broadcast, 1.0, rule.traffic(broadcast, p))
        return (clock.bytes_up - before.bytes_up + clock.bytes_down - before.bytes_down) / 4

    d = 351_946
    assert floats(LeaderSGD()) == 5_983_098 == d + p * d + p
    assert floats(ElasticAveraging()) == floats(FedAvg()) == floats(Downpour()) == 11_262_272 == 2 * p * d
    assert floats(LeaderSGD(groups=4, global_every=2)) == 4 * d + p * d + p
    assert floats(LeaderSGD(groups=4, global_every=2), syncs=2) == 4 * d + 2 * p * d + p


@carriers
def test_runs_count_what_is_sent(carrier: Any) -> None:
    experiment = parabolas(strategy="LeaderSGD()", local_steps=3, rounds=3)
    for s in snapshots(experiment, carrier(experiment)):
        assert (s.clock.bytes_up, s.clock.bytes_down) == (8 * s.round * (1 + 4), 8 * s.round * 4)
        assert s.clock.gradients == s.clock.local_steps == 12 * s.round
    experiment = parabolas(**ALONE, schedule="FreeRunning()", rounds=3)
    for s in snapshots(experiment, carrier(experiment)):  # four came before the first round
        assert s.clock.bytes_up == s.clock.bytes_down == 8 * 4 * (s.round + 1)
        assert s.clock.gradients == s.clock.local_steps == 8 * s.round


# ------------------------------------------------------------------------------------- closed forms


def test_e4_the_elastic_fixed_point_is_not_the_minimiser() -> None:
    s = last(parabolas(strategy="ElasticAveraging(beta=0.4)", local_steps=1, rounds=1200, eval_every=0))
    a, b = torch.tensor([1.0, 2.0, 0.5, 1.5]), torch.tensor([0.0, 1.0, -1.0, 2.0])
    center = float((a * b / (a + 1)).sum() / (a / (a + 1)).sum())
    assert center == pytest.approx(0.7301587302, abs=1e-7)
    assert s.model["0.weight"].item() == pytest.approx(0.7301587302, abs=1e-8)
    assert values(s.rows) == pytest.approx([0.3650793651, 0.9100529101, 0.1534391534, 1.4920634921], abs=1e-8)


def test_e5_the_sum_of_workers_and_centre_is_kept() -> None:
    experiment = parabolas(
        strategy="ElasticAveraging(beta=0.4, alpha=0.1)", client="SGD(lr=1e-300)", local_steps=1, rounds=20
    )
    for s in snapshots(experiment):
        assert sum(values(s.rows)) + s.model["0.weight"].item() == pytest.approx(7.5, abs=1e-12)
    experiment = parabolas(
        **ALONE | {"client": "SGD(lr=1e-300)", "local_steps": 1}, schedule="FreeRunning()", rounds=5
    )
    carrier = here(experiment)
    for s, _ in rounds(experiment, carrier=carrier):
        kept = carrier.checkpoint()["0/rows/0.weight"].sum().item()
        assert kept + s.model["0.weight"].item() == pytest.approx(7.5, abs=1e-12)


def _turn(p: int, eta: float, alpha: float) -> Tensor:
    """On ``x^2 / 2`` a turn of all workers is a linear map of rows and centre; its columns are run side by side."""
    rule, basis = ElasticAveraging(alpha=alpha), torch.eye(p + 1, dtype=torch.float64)
    state, _ = rule.init({"x": basis[p]}, p)
    found = []
    for i in range(p):
        s = {"x": basis[i]}
        state, broadcast = rule.exchange(state, {"x": s["x"][None]}, report([0.0]))
        found.append(rule.follow({"x": (1 - eta) * s["x"]}, s, broadcast, torch.tensor(i), 1)["x"])
    return torch.stack([*found, state["model"]["x"]])


@pytest.mark.parametrize("p", [3, 8])
@pytest.mark.parametrize("eta", [0.1, 0.5, 1.0, 1.5])
def test_e2_stability_of_workers_that_come_in_turn(p: int, eta: float) -> None:
    def growth(alpha: float) -> float:
        return torch.linalg.matrix_power(_turn(p, eta, alpha), 500).abs().max().item()

    limit = (4 - 2 * eta) / (4 - eta)
    assert growth(limit) <= 1 + GOLDEN  # on the boundary
    assert growth(0.5 * limit) < 1
    assert growth(1.05 * limit) > 1e4


@pytest.mark.parametrize(("p", "radius"), [(3, 0.999269748), (8, 0.999115698)])
def test_e3_workers_that_come_in_turn_settle_where_alternating_directions_do_not(
    p: int, radius: float
) -> None:
    turn = _turn(p, 0.001, 0.001 * 2.5)
    assert torch.linalg.eigvals(turn).abs().max().item() == pytest.approx(radius, abs=GOLDEN)


@pytest.mark.parametrize(
    ("rho", "elastic", "led"),
    [
        pytest.param(0.1, 0.9486832981, -0.8872983346, marks=pytest.mark.slow),
        (0.2, 0.8944271910, -0.7236067977),
    ],
)
def test_l4_two_wells(rho: float, elastic: float, led: float) -> None:
    """The centre holds both workers back from their minima; a leader reaches its own and holds back the other."""
    well = parabolas(
        data="Blank()", model="DoubleWell()", objective="Value()", num_workers=2, local_steps=1, eval_every=0,
        strategy=f"ElasticAveraging(beta={0.2 * rho}, alpha={0.1 * rho})", plan="loop", rounds=round(110 / rho),
    )  # fmt: skip
    s = last(well)
    assert values(s.rows) == pytest.approx([-elastic, elastic], abs=1e-9)
    assert s.model["position"].item() == pytest.approx(0, abs=1e-9)
    s = last(well.replace({"strategy": f"LeaderGD(pull={0.1 * rho})", "rounds": 400}))
    assert values(s.rows) == pytest.approx([led, 1.0], abs=1e-9)


def test_l5_one_step_towards_a_better_point_descends() -> None:
    """The bound of Teng et al. for one step with noise s: both sides in closed form, for 1000 random quadratics."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    worst = -math.inf
    for _ in range(1000):
        h = 0.1 + 5 * draw(4)
        m, big = float(h.min()), float(h.max())
        kappa, noise = big / m, float(draw(1))
        eta = (0.01 + 0.99 * float(draw(1))) / (2 * big)
        rho = float(draw(1)) * min(1 / (2 * kappa * eta), 1 / (2 * m * (eta * kappa) ** 2))
        x = 4 * draw(4) - 2
        z = 4 * draw(4) - 2

        def f(y: Tensor, h: Tensor = h) -> float:
            return float((h * y * y).sum() / 2)

        z = z * min(1.0, math.sqrt(f(x) / f(z)))
        rule = LeaderSGD(pull=eta * rho)
        state, _ = rule.init({"w": x}, 2)
        at = {"w": torch.stack([z, x])}
        _, broadcast = rule.merge(state, tree.take(at, slice(1)), report([f(z), f(x)]))
        pulled = rule.adopt({"w": x}, broadcast, torch.tensor(1))["w"]
        step = pulled - eta * h * x
        expected = f(step) + eta**2 * noise * float(h.sum()) / 2 / 4  # noise of covariance noise / 4 I
        bound = (1 - m * eta) * f(x) - eta * rho * (f(x) - f(z)) + eta**2 * big * noise / 2
        worst = max(worst, expected - bound)
    assert worst <= 1e-12


@pytest.mark.parametrize("doubt", [0.0, 0.3, 3.0])
def test_l6_a_wrong_leader_costs_no_more_than_the_doubt_about_losses(doubt: float) -> None:
    """The bound of Teng et al. for losses that are known up to noise; each group is a federation with a quadratic of its own.

    The long-run mean of f is at most ``eta kappa s^2 / 2 + 4 rho sqrt(p) doubt / m``, far above what is seen; without
    pulls its closed form is ``eta s^2 / 4`` over 3 dimensions, each with the share ``1 / (1 - eta h / 2)``.
    """
    generator = torch.Generator().manual_seed(2)
    problems, p, eta, rho, steps = 4, 4, 0.2, 0.5, 500
    h = 0.5 + 1.5 * torch.rand(problems, 3, generator=generator, dtype=torch.float64)
    curvature = h.repeat_interleave(p, dim=0)
    found = []
    for pull in (0.0, eta * rho):
        rule = LeaderSGD(pull=pull, groups=problems, global_every=10 * steps)
        state, _ = rule.init({"x": torch.zeros(3, dtype=torch.float64)}, problems * p)
        adopt = torch.vmap(rule.adopt, in_dims=(0, None, 0))
        worker, total = torch.arange(problems * p), torch.zeros(problems, dtype=torch.float64)
        x = torch.zeros(problems * p, 3, dtype=torch.float64)
        for step in range(steps):
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64) / math.sqrt(3)
            x = x - eta * (curvature * x + noise)
            value = (curvature * x * x).sum(1) / 2
            seen = value + doubt * torch.randn(len(x), generator=generator, dtype=torch.float64)
            state, broadcast = rule.merge(state, {"x": x}, report(seen.tolist()))
            x = adopt({"x": x}, broadcast, worker)["x"]
            if step >= steps // 5:
                total += (curvature * x * x).sum(1).view(problems, p).mean(1) / 2
        found.append(total / (steps - steps // 5))
    small, large = h.min(1).values, h.max(1).values
    bound = eta * large / small / 2 + 4 * rho * math.sqrt(p) * doubt / small
    assert found[0].tolist() == pytest.approx((eta / 12 / (1 - eta * h / 2)).sum(1).tolist(), rel=0.25)
    assert bool((found[1] <= bound).all())
    assert bool((found[1] > bound / 1e4).all())


def _pulled_steps(x: Tensor, h: Tensor, z: Tensor, pull: float) -> Tensor:
    """Steps of size 1 from ``x`` on ``sum h x^2 / 2``, each with one of the leaders ``z``."""
    rule = LeaderGD(pull=pull)
    state, broadcast = rule.init({"w": x}, 1)
    lead = state["lead"] | {"pull": torch.full_like(state["lead"]["pull"], pull)}

    def one(z: Tensor) -> Tensor:
        sent = {**broadcast, "model": {"w": z}, "lead": lead}
        return rule.follow({"w": x - h * x}, {"w": x}, sent, torch.tensor(0), 1)["w"] - x

    return torch.vmap(one)(z)


def test_l7_better_points_lie_where_newton_would_go() -> None:
    """On quadratics, a small pull to a point of lower value turns the step towards Newton's in at least half of cases."""
    generator = torch.Generator().manual_seed(1)
    for dimension in (2, 5, 20):
        for kappa in (2.0, 10.0, 100.0):
            h = torch.logspace(0, math.log10(kappa), dimension, dtype=torch.float64)
            x = torch.randn(dimension, generator=generator, dtype=torch.float64)
            direction = torch.randn(400, dimension, generator=generator, dtype=torch.float64)
            radius = torch.rand(400, 1, generator=generator, dtype=torch.float64) ** (1 / dimension)
            z = radius * direction / direction.norm(dim=1, keepdim=True) * (h * x * x).sum().sqrt() / h.sqrt()
            step = _pulled_steps(x, h, z, 1e-3)
            plain, newton = (
                torch.cosine_similarity(-h * x, -x, dim=0),
                torch.cosine_similarity(step, -x[None], dim=1),
            )
            share = (newton >= plain).double().mean().item()
            assert share >= 0.5 - 3 * 0.5 / math.sqrt(400)
