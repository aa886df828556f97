"""Laws of the strategies, and their bad arguments: a newcomer adds a row to `TABLE`."""

import dataclasses
import random
import re
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from fedsim import tree
from fedsim.registry import parse
from fedsim.tree import Stack, Tree
from strategies import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    Report,
    Rule,
    State,
    TrimmedMean,
)
from strategies.foreign import FlowerStrategy

NUM_WORKERS = 7


@dataclasses.dataclass(frozen=True)
class Case:
    """A strategy, as it is written in an experiment, and the optional laws that it obeys.

    mean: a worker of weight 0 changes nothing. replaces: equal rows become the model. robust: one outlier
    among seven rows is ignored. keeps: workers keep rows of their own. clips: divides by the norm of a row's change, so that equal rows are an error.
    grows: what is remembered takes more room in later rounds.
    """

    text: str
    mean: bool = False
    replaces: bool = False
    robust: bool = False
    keeps: bool = False
    clips: bool = False
    grows: bool = False

    @property
    def rule(self) -> Rule:
        return parse("strategy", self.text)


CLIP = "flwr.DifferentialPrivacyServerSide"
TABLE = [
    Case("FedAvg()", mean=True, replaces=True),
    Case("FedAvg(weighting='uniform')", mean=True, replaces=True),
    Case("LocalGD()", mean=True, replaces=True),
    Case("AnchoredAverage(anchored=False)", mean=True, replaces=True),
    Case("KnownLoss()", mean=True, replaces=True),
    Case("DualAcceleration()", mean=True),
    Case("FedSGD('sgd', lr=1.0)", mean=True, replaces=True),
    Case("FedSGD('nesterov', lr=0.1)", mean=True),
    Case("FedSGD('rmsprop', lr=0.1, beta2=0.9, eps=0.001)", mean=True),
    Case("FedIRM('adam', lr=0.1, eps=0.001, anneal=1)", mean=True),
    Case("PooledIRM('momentum', lr=0.1, anneal=1)"),
    Case("FedAvgM(lr=0.7, momentum=0.9)", mean=True),
    Case("FedAdam(lr=0.1)", mean=True),
    Case("FedYogi(lr=0.1)", mean=True),
    Case("FedAdagrad(lr=0.1)", mean=True),
    Case("FedMedian()", replaces=True, robust=True),
    Case("TrimmedMean(share=0.2)", replaces=True, robust=True),
    Case("DPFedAvg(clip=0.5, noise=0.0)"),
    Case("DPFedAvg(clip=1e6, noise=0.0)", replaces=True),
    Case("LeaderSGD(pull=0.2)", keeps=True),
    Case("LeaderSGD(pull=0.2, groups=7, global_every=2, prox=0.1, prox_global=0.2)", keeps=True),
    Case("LeaderGD(pull=0.2)", keeps=True),
    Case("ElasticAveraging(beta=0.4)", keeps=True),
    Case("Downpour()", keeps=True),
    Case("GapFilter(capacity=8)", mean=True, replaces=True, grows=True),
    Case("GapFilter(FedMedian(), source='raw', capacity=7)", replaces=True, robust=True, grows=True),
    Case(
        "GapFilter(FedAvgM(), source='random', capacity=4, seed=2, warm_up=3, refresh=2)",
        mean=True,
        grows=True,
    ),
    Case("GapFilter(FedAdam(), source='frozen', update='remove')", mean=True, grows=True),
    Case("DominantFilter(FedYogi(), k=2, warm_up=9)", mean=True),
    Case("DominantFilter(k=3, update='keep', warm_up=9)", mean=True, replaces=True),
    Case("TopK(FedAvg(), share=0.3)", mean=True),
    Case("TopK(FedAvg(), share=1.0)", mean=True, replaces=True),
    Case("LowBit(FedAvgM(lr=0.7, momentum=0.9), bits=4, block=3)", mean=True),
    Case("LowBit(DiLoCo(), bits=8, stochastic=True, feedback=False)", mean=True),
    Case("DiLoCo(lr=0.7, momentum=0.9)", mean=True),
    Case("DiLoCo(lr=1.0, momentum=0.0, weighting='samples')", mean=True, replaces=True),
    Case(
        "StreamingDiLoCo(lr=1.0, momentum=0.0, fragments=1, keep=0.2)", mean=True, replaces=True, keeps=True
    ),
    Case("StreamingDiLoCo(fragments=3, delay=2)", mean=True, keeps=True),
    Case("AsyncDiLoCo(every=3)", keeps=True),
    Case("AsyncDiLoCo(how='naive', discount=True)", keeps=True),
    Case("AsyncDiLoCo(how='buffered', momentum=0.0)", keeps=True),
    Case("FedCM(lr=0.5)", mean=True),
    Case("FedCM(weighting='uniform')", mean=True, replaces=True),
    Case("Scaffold(lr=0.5)", mean=True),
    Case("Scaffold()", mean=True, replaces=True),
    Case("flwr.FedAvg()", mean=True, replaces=True),
    Case("flwr.FedAvgM(server_learning_rate=0.7, server_momentum=0.9)", mean=True),
    Case("flwr.FedAdam(eta=0.1)", mean=True),
    Case("flwr.FedYogi(eta=0.1)", mean=True),
    Case("flwr.FedAdagrad(eta=0.1)", mean=True),
    Case("flwr.FedMedian()", replaces=True, robust=True),
    Case("flwr.FedTrimmedAvg(beta=0.2)", replaces=True, robust=True),
    Case("flwr.Krum(num_malicious_nodes=1)", replaces=True, robust=True),
    Case("flwr.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3)", replaces=True, robust=True),
    Case("flwr.Bulyan(num_malicious_nodes=1)", replaces=True, robust=True),
    Case("flwr.QFedAvg(client_learning_rate=0.1, q=0.5)"),
    Case(
        f"{CLIP}FixedClipping(strategy=flwr.FedAvg(), noise_multiplier=0.5, clipping_norm=1.0, "
        "num_sampled_clients=7)",
        clips=True,
    ),
    Case(
        f"{CLIP}AdaptiveClipping(strategy=flwr.FedAvgM(server_momentum=0.5), noise_multiplier=0.2, "
        "num_sampled_clients=7)",
        clips=True,
    ),
]


def cases(law: str | None = None) -> pytest.MarkDecorator:
    chosen = [c for c in TABLE if law is None or getattr(c, law)]
    return pytest.mark.parametrize("case", [pytest.param(c, id=c.text) for c in chosen])


def make_model(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tree:
    g = torch.Generator().manual_seed(seed)
    # Key order is not alphabetical, and one leaf has no axes.
    shapes = {"weight": (3, 2), "bias": (2,), "a": ()}
    return {k: torch.randn(s, generator=g, dtype=dtype) for k, s in shapes.items()}


def make_rows(seed: int = 1, m: int = NUM_WORKERS, dtype: torch.dtype = torch.float64) -> Stack:
    return tree.stack([make_model(100 * seed + i, dtype) for i in range(m)])


def make_report(rule: Rule, m: int = NUM_WORKERS, samples: Tensor | None = None) -> Report:
    samples = torch.arange(3.0, 3.0 + m) if samples is None else samples
    return Report(
        worker=torch.arange(m),
        loss=torch.linspace(0.5, 2.0, m, dtype=torch.float64),
        weight=rule.weight(samples),
        steps=torch.full((m,), 3),
        gradients=torch.full((m,), 3),
    )


def sent(rule: Rule, rows: Stack) -> Stack:
    """Add what workers send with their rows."""
    return rows | {f"{name}/{k}": 0.1 * x for name in rule.carries for k, x in rows.items()}


def take_report(report: Report, index: Tensor) -> Report:
    return Report(*(x[index] for x in report))


def run(rule: Rule, theta: Tree, stacks: list[Stack]) -> list[State]:
    state, _ = rule.init(theta, tree.num_rows(stacks[0]))
    states = []
    for rows in stacks:
        state, _ = rule.merge(state, sent(rule, rows), make_report(rule, tree.num_rows(rows)))
        states.append(state)
    return states


def assert_close(a: Tree, b: Tree, tolerance: float = 1e-12) -> None:
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k], b[k], atol=tolerance, rtol=tolerance)


def assert_same(a: State, b: State) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert_close(a[name], b[name], tolerance=0.0)


# --------------------------------------------------------------------------------------------------- laws


@cases()
def test_expression_is_the_repr_of_the_rule(case: Case) -> None:
    assert parse("strategy", repr(case.rule)) == case.rule
    assert hash(case.rule) == hash(parse("strategy", case.text))


@cases()
def test_model_and_broadcast_start_at_theta(case: Case) -> None:
    theta = make_model()
    state, broadcast = case.rule.init(theta, NUM_WORKERS)
    assert_close(state["model"], theta, tolerance=0.0)
    assert_close(broadcast["model"], theta, tolerance=0.0)
    rows = tree.replicate(theta, NUM_WORKERS)
    assert_close(case.rule.model(state, rows), theta, tolerance=1e-15 if case.keeps else 0.0)
    assert_close(case.rule.adopt(theta, broadcast, torch.tensor(2)), theta, tolerance=0.0)
    if not case.keeps:
        assert_close(case.rule.adopt(make_model(5), broadcast, torch.tensor(2)), theta, tolerance=0.0)


@cases()
def test_consensus_is_a_fixed_point(case: Case) -> None:
    rule, theta = case.rule, make_model()
    state, _ = rule.init(theta, NUM_WORKERS)
    if case.clips:
        with pytest.raises(
            ValueError, match="Flower divides by 0: all weights are 0, or it clips a row that"
        ):
            rule.merge(state, tree.replicate(theta, NUM_WORKERS), make_report(rule))
        return
    for _ in range(3):
        rows = tree.replicate(state["model"], NUM_WORKERS)
        state, _ = rule.merge(state, sent(rule, rows), make_report(rule))
        assert_close(state["model"], theta)


@cases("replaces")
def test_equal_rows_become_the_model(case: Case) -> None:
    (state,) = run(case.rule, make_model(), [tree.replicate(make_model(9), NUM_WORKERS)])
    assert_close(state["model"], make_model(9))


@cases()
def test_nothing_is_changed_in_place(case: Case) -> None:
    rule, theta, rows = case.rule, make_model(), make_rows()
    state, _ = rule.init(theta, NUM_WORKERS)
    for _ in range(2):
        report = make_report(rule)
        arguments = {**state, "rows": rows, "report": report._asdict()}
        before = tree.map_nested(torch.clone, arguments)
        state, broadcast = rule.merge(state, sent(rule, rows), report)
        assert_same(before, arguments)
        assert_close(broadcast["model"], state["model"], tolerance=0.0)
        assert_close(theta, make_model(), tolerance=0.0)


@cases()
def test_permuting_workers_changes_nothing(case: Case) -> None:
    rule = case.rule
    permutation = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    straight, permuted = (rule.init(make_model(), NUM_WORKERS)[0] for _ in range(2))
    for seed in (1, 2, 3):
        rows, report = make_rows(seed), make_report(rule)
        straight, _ = rule.merge(straight, sent(rule, rows), report)
        permuted, _ = rule.merge(
            permuted, sent(rule, tree.take(rows, permutation)), take_report(report, permutation)
        )
        assert_close(straight["model"], permuted["model"])


@cases("mean")
def test_workers_of_weight_0_change_nothing(case: Case) -> None:
    rule, rows = case.rule, make_rows()
    report = make_report(rule)
    keep = torch.tensor([0, 1, 3, 4, 6])
    weight = torch.zeros_like(report.weight)
    weight[keep] = report.weight[keep]
    state, _ = rule.init(make_model(), NUM_WORKERS)
    with_them, _ = rule.merge(state, sent(rule, rows), report._replace(weight=weight))
    without, _ = rule.merge(state, sent(rule, tree.take(rows, keep)), take_report(report, keep))
    assert_close(with_them["model"], without["model"])


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.text) for c in TABLE if c.robust or c.text == "FedAvg()"]
)
def test_robust_rules_ignore_an_outlier(case: Case) -> None:
    rows = make_rows()
    honest = tree.map_nested(torch.clone, rows)
    for x in rows.values():
        x[4] = 1e6
    (state,) = run(case.rule, make_model(), [rows])
    inside = all((x <= honest[k].amax(0)).all() for k, x in state["model"].items())
    assert inside == case.robust


@cases()
def test_a_run_goes_on_from_a_saved_state(case: Case) -> None:
    rule, stacks = case.rule, [make_rows(i) for i in (1, 2, 3, 4)]
    expected = run(rule, make_model(), stacks)
    for done in range(len(stacks)):
        state = expected[done - 1] if done else rule.init(make_model(), NUM_WORKERS)[0]
        flat = tree.clone(tree.flatten_nested(state))  # one tensor may have several names
        state = tree.unflatten_nested(safetensors.torch.load(safetensors.torch.save(flat)))
        for rows, then in zip(stacks[done:], expected[done:], strict=True):
            state, _ = rule.merge(state, sent(rule, rows), make_report(rule))
            assert_same(state, then)


@cases()
def test_the_shape_of_the_state_never_changes(case: Case) -> None:
    if case.grows:
        return
    state, _ = case.rule.init(make_model(dtype=torch.float32), NUM_WORKERS)
    shapes = tree.map_nested(lambda x: torch.tensor(x.shape), state)
    for after in run(
        case.rule, make_model(dtype=torch.float32), [make_rows(i, dtype=torch.float32) for i in (1, 2)]
    ):
        assert_same(tree.map_nested(lambda x: torch.tensor(x.shape), after), shapes)
        assert {x.dtype for x in after["model"].values()} == {torch.float32}


@cases()
def test_global_generators_neither_matter_nor_move(case: Case) -> None:
    models = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        models.append(run(case.rule, make_model(), [make_rows()])[0]["model"])
        drawn = random.random(), np.random.random(), torch.rand(()).item()  # noqa: NPY002
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        assert drawn == (random.random(), np.random.random(), torch.rand(()).item())  # noqa: NPY002
    assert_close(*models, tolerance=0.0)


# ----------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: dataclasses.replace(FedAvg(), **{"weighting": "equal"}),
            "FedAvg: weighting = 'equal' must be one of 'samples', 'uniform'",
        ),
        (lambda: FedAvgM(lr=0.0), "FedAvgM: lr = 0.0 must be > 0"),
        (lambda: FedAvgM(momentum=1.0), "FedAvgM: momentum = 1.0 must be in [0, 1)"),
        (lambda: FedAdam(lr=-1.0), "FedAdam: lr = -1.0 must be > 0"),
        (lambda: FedYogi(beta1=-0.1), "FedYogi: beta1 = -0.1 must be in [0, 1)"),
        (lambda: FedAdagrad(tau=0.0), "FedAdagrad: tau = 0.0 must be > 0"),
        (lambda: FedAdam(beta2=1.0), "FedAdam: beta2 = 1.0 must be in [0, 1)"),
        (lambda: TrimmedMean(share=0.5), "TrimmedMean: share = 0.5 must be in [0, 0.5)"),
        (
            lambda: FlowerStrategy("FedAdm"),
            "flwr: unknown strategy 'FedAdm'; did you mean 'FedAdam'? allowed: FedAvg, FedAvgM, FedAdagrad,",
        ),
        (
            lambda: FlowerStrategy("FedAdam", (("etaa", 1.0),)),
            "flwr.FedAdam: has no argument 'etaa'; did you mean 'eta'? allowed: eta, beta_1, beta_2, tau",
        ),
        (lambda: FlowerStrategy("FedAvg", (("x", 1.0),)), "flwr.FedAvg: has no argument 'x'; allowed: none"),
        (lambda: FlowerStrategy("FedAdam", (("eta", "x"),)), "flwr.FedAdam: eta = 'x' must be a number"),
        (
            lambda: FlowerStrategy("Krum", (("num_malicious_nodes", 0.5),)),
            "flwr.Krum: num_malicious_nodes = 0.5 must be a whole number",
        ),
        (lambda: FlowerStrategy("QFedAvg"), "flwr.QFedAvg: needs the argument 'client_learning_rate'"),
        (
            lambda: FlowerStrategy("FedTrimmedAvg", (("beta", 0.5),)),
            "flwr.FedTrimmedAvg: `beta` must be in the range [0, 0.5).",
        ),
        (
            lambda: FlowerStrategy("FedAvg", (("fraction_train", 0.5),)),
            "flwr.FedAvg: fraction_train = 0.5: the experiment chooses who takes part; use `participation`",
        ),
        (
            lambda: FlowerStrategy("FedAdam", (("eta_l", 0.5),)),
            "flwr.FedAdam: eta_l = 0.5: clients have their own rate; use client = 'SGD(lr=...)'",
        ),
        (
            lambda: FlowerStrategy("FedProx", (("proximal_mu", 0.5),)),
            "flwr.FedProx: acts in the clients; use strategy = 'FedAvg()' and client = 'Prox(",
        ),
        (
            lambda: FlowerStrategy("DifferentialPrivacyClientSideFixedClipping"),
            "flwr.DifferentialPrivacyClientSideFixedClipping: clips in the clients; use "
            "flwr.DifferentialPrivacyServerSideFixedClipping(...)",
        ),
        (lambda: FlowerStrategy("FedXgbBagging"), "flwr.FedXgbBagging: merges trees, not tensors;"),
        (
            lambda: FlowerStrategy(
                "DifferentialPrivacyServerSideFixedClipping",
                (("strategy", FedAvg()), ("noise_multiplier", 1.0), ("clipping_norm", 1.0)),
            ),
            "flwr.DifferentialPrivacyServerSideFixedClipping: strategy = FedAvg(weighting='samples') must be one "
            "of Flower's, such as flwr.FedAvg()",
        ),
        (
            lambda: run(FlowerStrategy("Bulyan", (("num_malicious_nodes", 2),)), make_model(), [make_rows()]),
            "flwr.Bulyan: Flower makes no model of the rows of 7 participants; it needs more of them",
        ),
    ],
)
def test_bad_arguments_are_one_line(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}.*$") as caught:
        make()
    assert "\n" not in str(caught.value)
