"""Filtered gradients: reductions, projections, and who sends which basis."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from std_protocol import checkpoints, std

from clients import SGD, Filtered, Prox
from clients.filtered import project
from fedsim import tree
from fedsim.analysis.hessian import dominant
from fedsim.carriers import InProcess
from fedsim.experiment import BadInput
from fedsim.federation import load
from fedsim.gaps import from_trees, gaps, subspace, subspace_of
from fedsim.probes.disagreement import training_loss
from fedsim.simulate import rounds
from strategies import DominantFilter, FedAvg, GapFilter, LeaderSGD, Report, TopK

F64 = torch.float64
TINY = {
    "data": "Digits(test=0.5)",
    "model": "MLP(hidden=(6,), activation='tanh')",
    "num_workers": 5,
    "rounds": 5,
    "local_steps": 3,
    "batch_size": 8,
    "dtype": "float64",
    "probes": "",
}
FILTER = "Filtered(SGD(lr=0.05))"


def run(**changes):
    return [snapshot for snapshot, _ in rounds(std(**TINY | changes))]


def equal(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def flat_basis(broadcast, channel="basis"):
    return torch.cat([x.flatten(1) for x in broadcast[channel].values()], dim=1)


def test_projection_is_one():
    g = torch.Generator().manual_seed(0)
    like = {"a": torch.zeros(3, 2, dtype=F64), "b": torch.zeros(4, dtype=F64)}
    q = torch.linalg.qr(torch.randn(10, 3, generator=g, dtype=F64)).Q
    basis = tree.unflatten(q.T.contiguous(), like)
    v = tree.unflatten(torch.randn(10, generator=g, dtype=F64), like)
    inside, outside = project(v, basis, True), project(v, basis, False)
    torch.testing.assert_close(tree.flatten(inside), q @ q.T @ tree.flatten(v))
    torch.testing.assert_close(tree.add(inside, outside), v)
    torch.testing.assert_close(project(inside, basis, True), inside)
    torch.testing.assert_close(project(inside, basis, False), tree.zeros_like(v), rtol=0, atol=1e-12)


def test_without_a_basis_it_is_the_inner_rule():
    plain = run(client="Prox(SGD(lr=0.05), mu=0.1)")
    filtered = run(
        client="Filtered(Prox(SGD(lr=0.05), mu=0.1))",
        strategy="GapFilter(FedAvg(weighting='uniform'), warm_up=9)",
    )
    for a, b in zip(plain, filtered, strict=True):
        torch.testing.assert_close(a.model, b.model, rtol=0, atol=1e-12)
        assert len(flat_basis(b.broadcast)) == 0


def test_an_unfiltered_client_makes_it_the_inner_strategy():
    plain = run(client="SGD(lr=0.05)")
    wrapped = run(client="SGD(lr=0.05)", strategy="GapFilter(FedAvg(weighting='uniform'), capacity=8)")
    for a, b in zip(plain, wrapped, strict=True):
        torch.testing.assert_close(a.model, b.model, rtol=0, atol=1e-12)


@pytest.mark.parametrize("plan", ["stacked", "vmap", "loop"])
def test_filtered_steps_stay_out_of_the_basis(plan):
    snapshots = run(client=FILTER, strategy="GapFilter(capacity=12, warm_up=2)", plan=plan)
    assert [len(flat_basis(s.broadcast)) for s in snapshots] == [0, 8, 10, 10, 10]
    for before, s in pairwise(snapshots[1:]):
        q = flat_basis(before.broadcast)
        torch.testing.assert_close(q @ q.T, torch.eye(len(q), dtype=F64), rtol=0, atol=1e-8)
        moved = tree.flatten_rows(s.rows) - tree.flatten(before.model)
        assert moved.norm(dim=1).min() > 1e-4
        assert (q @ moved.T).abs().max() < 1e-10
        found = gaps(s.rows, torch.ones(5))
        assert (q @ found.values.T).abs().max() < 1e-10


def test_kept_steps_stay_in_the_basis():
    snapshots = run(client="Filtered(SGD(lr=0.05), keep=True)", strategy="GapFilter(capacity=12, warm_up=2)")
    q = flat_basis(snapshots[2].broadcast)
    moved = tree.flatten_rows(snapshots[3].rows) - tree.flatten(snapshots[2].model)
    torch.testing.assert_close(moved @ q.T @ q, moved, rtol=0, atol=1e-10)


def test_fifo_basis_is_the_span_of_the_probes_buffer():
    for snapshot, position in rounds(
        std(
            **TINY | {"probes": "Disagreement(capacity=12)"}, client=FILTER, strategy="GapFilter(capacity=12)"
        )
    ):
        q = subspace(from_trees(position.memories[0])).basis()
        found = flat_basis(snapshot.broadcast)
        torch.testing.assert_close(found.T @ found, q @ q.T, rtol=0, atol=1e-8)


def test_frozen_and_refreshed_bases():
    frozen = run(client=FILTER, strategy="GapFilter(source='frozen', capacity=12, warm_up=2)")
    assert equal(frozen[1].broadcast["basis"], frozen[4].broadcast["basis"])
    slow = run(client=FILTER, strategy="GapFilter(capacity=12, warm_up=2, refresh=2)")
    assert equal(slow[1].broadcast["basis"], slow[2].broadcast["basis"])
    assert not equal(slow[2].broadcast["basis"], slow[3].broadcast["basis"])


def test_random_bases_are_fresh_and_repeatable():
    one, two = (run(client=FILTER, strategy="GapFilter(source='random', capacity=12)") for _ in range(2))
    q, r = flat_basis(one[3].broadcast), flat_basis(one[4].broadcast)
    torch.testing.assert_close(q @ q.T, torch.eye(len(q), dtype=F64), rtol=0, atol=1e-8)
    assert (q @ r.T).norm() ** 2 / len(q) < 0.2
    assert equal(one[4].model, two[4].model)


def test_the_clock_charges_the_basis():
    plain = run(client=FILTER, strategy="GapFilter(capacity=12, warm_up=9)")
    sent = run(client=FILTER, strategy="GapFilter(capacity=12, warm_up=5)")
    size = tree.num_parameters(plain[0].model)
    assert sent[-1].clock.bytes_down - plain[-1].clock.bytes_down == 5 * 8 * 10 * size


def test_gap_filter_resumes_exactly(tmp_path):
    import fedsim.runs

    experiment = std(
        **TINY, client=FILTER, strategy="GapFilter(capacity=12, warm_up=2)", out=str(tmp_path / "whole")
    )
    whole = fedsim.runs.run(experiment)
    fedsim.runs.run(experiment.replace({"rounds": 3, "out": str(tmp_path / "cut")}))
    assert equal(whole.model, fedsim.runs.resume(tmp_path / "cut", changes={"rounds": 5}).model)


@pytest.mark.parametrize("client", ["SGD(lr=0.05)", "SGD(lr=0.05, momentum=0.9)"])
@pytest.mark.parametrize("plan", ["stacked", "vmap", "loop"])
def test_raw_steps_are_those_along_the_filtered_path(client, plan):
    """With the basis of the warm-up alone, ``raw`` and ``fifo`` are one walk, told in two ways."""
    changes = {"client": f"Filtered({client})", "plan": plan}
    fifo = run(**changes, strategy="GapFilter(capacity=12, warm_up=4)")
    raw = run(**changes, strategy="GapFilter(source='raw', capacity=12, warm_up=4)")
    q = flat_basis(raw[3].broadcast, "raw_basis")
    torch.testing.assert_close(q, flat_basis(fifo[3].broadcast), rtol=0, atol=1e-9)
    assert len(q) == 10
    torch.testing.assert_close(raw[4].model, fifo[4].model, rtol=0, atol=1e-10)
    torch.testing.assert_close(raw[4].report.loss, fifo[4].report.loss)
    told, walked = (tree.flatten_rows(s[4].rows) - tree.flatten(s[3].model) for s in (raw, fifo))
    torch.testing.assert_close(told - told @ q.T @ q, walked, rtol=0, atol=1e-9)
    assert (told @ q.T).norm() > 0.1 * told.norm()


def test_raw_rows_add_up_unfiltered_gradients():
    strategy = "GapFilter(FedAvg(weighting='uniform'), source='raw', capacity=12, warm_up=2)"
    experiment = std(**TINY | {"rounds": 3}, client=FILTER, strategy=strategy)
    *_, (before, _), (after, _) = rounds(experiment)
    basis, x = before.broadcast["raw_basis"], before.model
    batches = InProcess(experiment, before.federation).cohorts[0].sampler.draw(3, torch.arange(5))
    problem = training_loss(before.federation)
    for worker, order in enumerate(batches.rows):
        here, total = x, tree.zeros_like(x)
        for rows in order:
            g = tree.unflatten(problem.minibatch_gradient(here, rows), x)
            total = tree.axpy(-0.05, g, total)
            here = tree.axpy(-0.05, project(g, basis, False), here)
        torch.testing.assert_close(tree.take(after.rows, worker), tree.add(x, total), rtol=0, atol=1e-10)


def test_raw_gaps_do_not_forget():
    """Gaps of filtered workers leave the old span, those of raw steps do not."""
    shares = []
    for source, channel in (("fifo", "basis"), ("raw", "raw_basis")):
        snapshots = run(client=FILTER, strategy=f"GapFilter(source='{source}', capacity=4, warm_up=2)")
        q = flat_basis(snapshots[3].broadcast, channel)
        new = gaps(snapshots[4].rows, torch.ones(5)).values
        shares.append(((new @ q.T).norm() / new.norm()).item())
    assert shares[0] < 1e-8
    assert shares[1] > 0.1


@pytest.mark.parametrize("update", ["remove", "keep"])
def test_the_server_filters_updates(update):
    snapshots = run(client="SGD(lr=0.05)", strategy=f"GapFilter(capacity=12, warm_up=2, update='{update}')")
    plain = run(client="SGD(lr=0.05)")
    torch.testing.assert_close(snapshots[1].model, plain[1].model, rtol=0, atol=1e-12)
    for before, s in pairwise(snapshots[1:]):
        assert s.broadcast.keys() == {"model"}
        q = flat_basis(before.state, "filter.basis")
        mean = tree.flatten_rows(s.rows).mean(0) - tree.flatten(before.model)
        inside = q.T @ (q @ mean)
        moved = tree.flatten(s.model) - tree.flatten(before.model)
        torch.testing.assert_close(moved, inside if update == "keep" else mean - inside, rtol=0, atol=1e-12)
        assert min(inside.norm(), (mean - inside).norm()) > 1e-4
    assert snapshots[-1].clock.bytes_down == plain[-1].clock.bytes_down


@pytest.mark.parametrize(("warm_up", "refresh"), [(0, 1), (2, 1), (1, 2)])
def test_dominant_filter(warm_up, refresh):
    """Workers receive the eigenvectors at the model they start from, or at the one of the last refresh."""
    strategy = f"DominantFilter(FedAvg(weighting='uniform'), k=4, warm_up={warm_up}, refresh={refresh})"
    snapshots = run(client="Filtered(SGD(lr=0.05), keep=True)", strategy=strategy)
    problem, u = training_loss(snapshots[0].federation), None
    for s in snapshots:
        start = s.sent["model"]
        q = flat_basis(s.sent)
        assert len(q) == (4 if s.round > warm_up else 0)
        if s.round <= warm_up:
            continue
        if (s.round - 1 - warm_up) % refresh == 0:
            u = dominant(problem, start, 4, tol=1e-9).vectors
        assert u is not None
        torch.testing.assert_close(q.T @ q, u @ u.T, rtol=0, atol=1e-4)
        moved = tree.flatten_rows(s.rows) - tree.flatten(start)
        assert moved.norm(dim=1).min() > 1e-4
        torch.testing.assert_close(moved @ q.T @ q, moved, rtol=0, atol=1e-10)


def test_dominant_filter_at_the_server():
    """One local step: filtering gradients and filtering the update are the same."""
    changes = {"local_steps": 1, "rounds": 3}
    there = run(client="Filtered(SGD(lr=0.05))", strategy="DominantFilter(k=3, warm_up=1)", **changes)
    here = run(client="SGD(lr=0.05)", strategy="DominantFilter(k=3, warm_up=1, update='remove')", **changes)
    torch.testing.assert_close(here[-1].model, there[-1].model, rtol=0, atol=1e-9)


def test_dominant_filter_resumes_exactly(tmp_path):
    import fedsim.runs

    experiment = std(**TINY, client=FILTER, strategy="DominantFilter(k=3, warm_up=1, refresh=3)")
    whole = fedsim.runs.run(experiment.replace({"out": str(tmp_path / "whole")}))
    fedsim.runs.run(experiment.replace({"rounds": 3, "out": str(tmp_path / "cut")}))
    assert equal(whole.model, fedsim.runs.resume(tmp_path / "cut", changes={"rounds": 5}).model)


def test_dominant_filter_needs_the_training_loss():
    rule, theta = DominantFilter(k=1), {"w": torch.zeros(3)}
    state, _ = rule.init(theta, 2)
    rows, one = tree.replicate(theta, 2), torch.ones(2)
    report = Report(torch.arange(2), one, one, one, one)
    state, _ = rule.merge(state, rows, report)
    with pytest.raises(ValueError, match="only fedsim's own server computes the Hessian's eigenvectors"):
        rule.merge(state, rows, report)
    experiment = std(**TINY, client=FILTER, strategy="DominantFilter(warm_up=0)")
    carrier = InProcess(experiment, load(experiment))
    carrier.knows_data = False
    with pytest.raises(BadInput, match="needs the training loss on the server"):
        next(rounds(experiment, carrier=carrier))


def test_bad_input():
    with pytest.raises(ValueError, match="sends no channel 'basis'"):
        run(client=FILTER)
    with pytest.raises(ValueError, match="capacity = 0 must be >= 1"):
        GapFilter(capacity=0)
    with pytest.raises(ValueError, match="source = 'new' must be one of 'fifo', 'raw', 'frozen', 'random'"):
        GapFilter(source="new")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="warm_up = 0 must be >= 1"):
        GapFilter(warm_up=0)
    with pytest.raises(ValueError, match="update = 'keep' must be 'whole' for source = 'raw'"):
        GapFilter(source="raw", update="keep")
    with pytest.raises(ValueError, match="update = 'drop' must be one of"):
        GapFilter(update="drop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"keep = True must be False for GapFilter\(source='raw'\)"):
        run(client="Filtered(keep=True)", strategy="GapFilter(source='raw')")
    with pytest.raises(ValueError, match=r"DominantFilter: inner = LeaderSGD.* whose workers keep nothing"):
        DominantFilter(LeaderSGD())
    with pytest.raises(ValueError, match=r"GapFilter: inner = TopK.* must be a strategy whose"):
        GapFilter(TopK())
    with pytest.raises(ValueError, match=r"GapFilter: inner = DominantFilter.* such as FedAvg\(\)"):
        GapFilter(DominantFilter())
    with pytest.raises(ValueError, match="DominantFilter: k = 0 must be >= 1"):
        DominantFilter(k=0)
    with pytest.raises(BadInput, match="k = 460 must be < 460, the number of parameters"):
        run(client=FILTER, strategy="DominantFilter(k=460)")
    with pytest.raises(BadInput, match="unknown name 'SGDD'"):
        std(client="Filtered(SGDD())")
    assert Filtered(Prox(SGD())).inner == Prox(SGD())
    assert GapFilter().inner == FedAvg()


@pytest.mark.slow
def test_what_filters_do_to_the_loss():
    """W14: 50 rounds after a warm-up of 150."""
    experiment = std(num_workers=8, probes="")
    warm = checkpoints(std(num_workers=8, rounds=150), (150,))[0]
    position = warm.position._replace(memories=())
    start = warm.problem.gradient(warm.theta)[1]

    def drop(found):
        *_, (snapshot, _) = found
        return start - warm.problem.gradient(snapshot.model)[1]

    plain = drop(rounds(experiment, warm.federation, position=position))
    dominant_filter = "DominantFilter(FedAvg(weighting='uniform'), k=10, warm_up=150)"
    for keep, low, high in ((True, -0.05, 0.05), (False, 0.95, 1.05)):
        filtered = {"client": f"Filtered(SGD(lr=0.01), keep={keep})", "strategy": dominant_filter}
        assert low < drop(rounds(experiment.replace(filtered), warm.federation)) / plain < high
    for source in ("fifo", "raw", "frozen", "random"):
        strategy = f"GapFilter(FedAvg(weighting='uniform'), source='{source}', capacity=64, warm_up=150)"
        filtered = experiment.replace({"client": "Filtered(SGD(lr=0.01))", "strategy": strategy})
        assert drop(rounds(filtered, warm.federation)) / plain > 0.85


def test_training_loss_leaves_held_out_rows_alone():
    ((snapshot, _), *_) = rounds(std(**TINY, holdout=0.25))
    problem = training_loss(snapshot.federation)
    assert len(problem.x) == len(snapshot.federation.train.rows(0)) == 673  # all workers hold out the same
    assert len(snapshot.federation.dataset.x) == 898


def test_subspace_of_one_vector():
    assert subspace_of(torch.ones(1, 4)).rank == 1
