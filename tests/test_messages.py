"""What nodes say is checked: content arrives bit by bit, bad replies are named and left out, and the run goes on."""

import copy
import io
import pickle
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from messages_toys import Explosive, Failing, Tampered, about, carrier, run, tiny

from fedsim import client_app, tree
from fedsim.cohort import Evaluated, Trained
from fedsim.grid import InProcessGrid
from fedsim.messages import (
    HELD,
    ROUND,
    BadReply,
    check_code,
    decode_broadcast,
    decode_evaluated,
    decode_trained,
    encode_broadcast,
    encode_evaluated,
    encode_trained,
)
from fedsim.simulate import rounds
from strategies import Report, from_record, to_record

ROWS = {"strategy": "FedMedian()"}
"""Settings under which nodes send every worker's row; without them they send one mean."""


# -------------------------------------------------------------------------------------------- round trips


@pytest.fixture(params=[torch.float32, torch.float64])
def theta(request: pytest.FixtureRequest) -> tree.Tree:
    generator = torch.Generator().manual_seed(1)
    shapes = {"b": (2, 3), "a": (4,), "scalar": ()}
    return {k: torch.randn(s, generator=generator, dtype=request.param) for k, s in shapes.items()}


def report(workers: Sequence[int]) -> Report:
    x = torch.tensor(workers)
    return Report(x, x.double() / 3, x.double() + 0.1, x + 1, 2 * x, x % 3)


def same(a: Any, b: Any) -> bool:
    return [*a] == [*b] and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_a_broadcast_arrives_bit_by_bit(theta: tree.Tree) -> None:
    sent = {"model": theta, "pull": tree.scale(1 / 3, theta), "nothing": {}}
    content = encode_broadcast(sent, {"round": 3, "upload": "rows"})
    check_code(content)
    got = decode_broadcast(content, torch.device("cpu"))
    assert [*got] == [*sent]
    assert all(same(got[k], sent[k]) for k in sent)
    assert content.config_records["about"]["round"] == 3


def test_rows_and_reports_arrive_bit_by_bit(theta: tree.Tree) -> None:
    rows, told = tree.stack([theta, tree.scale(1 / 3, theta)]), report([4, 7])
    content = encode_trained(Trained(rows, told, told, [5]), 3)
    got = decode_trained(content, theta, torch.tensor([4, 5, 7]), "rows", 3)
    assert same(got.rows, rows)
    assert same(got.told._asdict(), told._asdict())
    assert same(got.report._asdict(), told._asdict())
    assert got.excluded == [5]


def test_a_mean_arrives_with_one_report_for_all(theta: tree.Tree) -> None:
    rows, told = tree.stack([theta]), report([4, 7])
    got = decode_trained(encode_trained(Trained(rows, told, told, []), 1), theta, told.worker, "mean", 1)
    assert same(got.rows, rows)
    assert same(got.report._asdict(), told._asdict())
    mean = (4 / 3 * 4.1 + 7 / 3 * 7.1) / 11.2
    assert [x.item() for x in got.told] == pytest.approx([4, mean, 11.2, 8, 22, 2], rel=1e-15)


@pytest.mark.parametrize("upload", ["rows", "mean"])
def test_a_node_may_have_no_finite_worker(theta: tree.Tree, upload: Any) -> None:
    rows, told = tree.take(tree.stack([theta]), slice(0)), report([])
    got = decode_trained(
        encode_trained(Trained(rows, told, told, [4, 7]), 1), theta, torch.tensor([4, 7]), upload, 1
    )
    assert (len(got.told.worker), tree.num_rows(got.rows), got.excluded) == (0, 0, [4, 7])


def test_workers_that_are_not_finite_are_left_out(theta: tree.Tree) -> None:
    rows, told = tree.stack([theta] * 4), report([1, 3, 5, 6])
    rows["a"][1, 2], rows["scalar"][3] = torch.inf, torch.nan
    told.loss[2] = torch.nan
    content = encode_trained(Trained(rows, told, told, [4]), 1)
    got = decode_trained(content, theta, torch.tensor([1, 3, 4, 5, 6]), "rows", 1)
    assert (got.report.worker.tolist(), got.excluded) == ([1], [3, 4, 5, 6])
    assert same(got.rows, tree.stack([theta]))


def test_an_evaluation_arrives_bit_by_bit() -> None:
    found = Evaluated(
        torch.tensor([3, 5]), torch.tensor([1 / 3, 2.0]).double(), torch.tensor([torch.nan, 1]).double()
    )
    got = decode_evaluated(encode_evaluated(found), 3, 6)
    for a, b in zip(got, found, strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


# ---------------------------------------------------------------------------------------------- bad replies


def on_rows(change: Callable[[tree.Tree], tree.Tree]) -> Callable[[RecordDict], object]:
    def apply(content: RecordDict) -> None:
        content["rows"] = to_record(change(from_record(content.array_records["rows"])))

    return apply


def on_array(make: Callable[[Array], Array]) -> Callable[[RecordDict], object]:
    def apply(content: RecordDict) -> None:
        rows = content.array_records["rows"]
        name = next(iter(rows))
        rows[name] = make(rows[name])

    return apply


def column(name: str, values: Any) -> Callable[[RecordDict], object]:
    return lambda content: content.metric_records["report"].update({name: values})


def without(name: str) -> Callable[[RecordDict], object]:
    return lambda content: content.pop(name)


def without_setting(name: str) -> Callable[[RecordDict], object]:
    return lambda content: content.config_records["about"].pop(name)


def only_first(content: RecordDict) -> None:
    on_rows(lambda rows: tree.take(rows, slice(1)))(content)
    for name, values in content.metric_records["report"].items():
        assert isinstance(values, list)
        content.metric_records["report"][name] = values[:1]


def raw(data: bytes) -> Callable[[RecordDict], object]:
    return on_array(lambda x: Array(x.dtype, x.shape, x.stype, data))


def huge() -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (2**50,)})
    return file.getvalue()


def pickled() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Explosive()], dtype=object), allow_pickle=True)
    return file.getvalue()


BAD: dict[str, tuple[Callable[[RecordDict], object], str]] = {
    "a parameter is missing": (
        on_rows(lambda x: dict([*x.items()][1:])),
        "rows: missing or strange parameters: ",
    ),
    "a parameter is strange": (
        on_rows(lambda x: x | {"other": x["1.weight"]}),
        "rows: missing or strange parameters: other",
    ),
    "other precision": (on_rows(lambda x: {k: v.float() for k, v in x.items()}), "is torch.float32"),
    "other shape": (
        on_rows(lambda x: x | {"1.weight": x["1.weight"][..., :1]}),
        "rows: 1.weight is .* must be",
    ),
    "too many rows": (on_rows(lambda x: tree.concat([x, x])), "rows: 1.weight is .* must be"),
    "no rows": (on_rows(lambda x: tree.take(x, slice(0))), "rows: 1.weight is .* must be"),
    "a number in place of a row": (
        on_rows(lambda x: x | {"1.bias": torch.ones(()).double()}),
        "rows: 1.bias is .* ()",
    ),
    "garbage": (raw(b"garbage"), "rows: unreadable array"),
    "a message that is too long": (raw(bytes(10**7)), "rows: 1.weight has 10000000 bytes, at most 4"),
    "a header that promises too much": (raw(huge()), "rows: unreadable array"),
    "a pickle": (raw(pickled()), "rows: unreadable array"),
    "a bare pickle": (raw(pickle.dumps(Explosive())), "rows: unreadable array"),
    "text": (on_array(lambda x: Array(np.array(["a"]))), "rows: unreadable array"),
    "other encoding": (
        on_array(lambda x: Array(x.dtype, x.shape, "pickle", x.data)),
        "rows: unreadable array",
    ),
    "no such worker": (column("worker", [2, 99]), "names workers 99 that do not take part at this node"),
    "another node's worker": (column("worker", [1, 2]), "names workers 1 that do not take part"),
    "a worker twice": (column("worker", [2, 2]), "leaves out workers 3"),
    "workers in another order": (column("worker", [3, 2]), "workers must ascend"),
    "a worker is missing": (only_first, "leaves out workers 3"),
    "half a worker": (column("worker", [2.0, 2.5]), "worker must be whole numbers"),
    "no worker": (column("worker", [2.0, float("nan")]), "worker must be whole numbers"),
    "huge worker": (column("worker", [2.0, 1e300]), "worker must be whole numbers"),
    "excluded in vain": (about("excluded", [3]), "names workers twice: 3"),
    "strange excluded": (about("excluded", [-1, 17]), "names workers -1, 17 that do not take part"),
    "excluded is a number": (about("excluded", 3), "excluded must be a list"),
    "excluded is text": (about("excluded", ["a"]), "excluded must be a list"),
    "columns of different lengths": (column("loss", [0.5]), r"different lengths: \[2, 1, 2, 2, 2, 2\]"),
    "a number in place of a list": (column("loss", 0.5), "loss must be a list of numbers"),
    "a column is missing": (
        lambda c: c.metric_records["report"].pop("steps"),
        "steps must be a list",
    ),
    "weight not a number": (column("weight", [1.0, float("nan")]), "weights must be finite and >= 0"),
    "infinite weight": (column("weight", [1.0, float("inf")]), "weights must be finite and >= 0"),
    "negative weight": (column("weight", [2.0, -1.0]), "weights must be finite and >= 0"),
    "no weight": (column("weight", [0.0, 0.0]), "weights must not all be 0"),
    "negative steps": (column("steps", [2, -2]), "steps, gradients and idle must be >= 0"),
    "endless gradients": (column("gradients", [2.0, float("inf")]), "gradients must be whole numbers"),
    "no rows record": (without("rows"), "rows: missing or strange parameters"),
    "no report": (without("report"), "record 'report' is missing"),
    "no settings": (without("about"), "runs other code"),
    "another round": (about("round", 7), "answers round 7, asked for round [12]"),
    "no round": (without_setting("round"), "answers round None, asked for round"),
    "other weights": (column("weight", [1e9, 1.0]), "weights are not those of its workers' rows"),
    "other code": (about("code", "0123456789abcdef"), "runs other code .hash 0123456789abcdef, here "),
    "other records": (
        lambda c: c.update({"report": ConfigRecord({"worker": [2]})}),
        "record 'report' is missing",
    ),
}
BAD_MEAN = {
    name: BAD[name] for name in ("too many rows", "no rows", "other precision", "negative weight")
} | {
    "mean not finite": (on_rows(lambda x: tree.scale(torch.nan, x)), "not finite"),
    "loss not finite": (column("loss", [1.0, float("inf")]), "not finite"),
}


@pytest.mark.parametrize(
    ("name", "settings"), [*((name, ROWS) for name in BAD), *((name, {}) for name in BAD_MEAN)]
)
def test_a_bad_reply_is_named_and_left_out(name: str, settings: dict[str, Any]) -> None:
    change, text = (BAD if settings else BAD_MEAN)[name]
    snapshots = run(tiny(**settings), Tampered(ROUND, change))
    assert len(snapshots) == 2
    for snapshot in snapshots:
        assert snapshot.report.worker.tolist() == [0, 1, 4, 5]
        assert snapshot.metrics["failures"] == snapshot.failures
        assert [*snapshot.failures] == ["node 1"]
        assert re.search(text, snapshot.failures["node 1"])
        assert "\n" not in snapshot.failures["node 1"]


class Replaying(ClientApp):
    """The ClientApp, but node 1 sends its reply of the first round in all rounds."""

    def __init__(self) -> None:
        self.kept: RecordDict | None = None

    def __call__(self, message: Message, context: Context) -> Message:
        reply = client_app.app(message, context)
        if message.metadata.message_type != ROUND or context.node_config["partition-id"] != 1:
            return reply
        self.kept = self.kept or reply.content
        return Message(self.kept, reply_to=message)


def test_a_replayed_reply_is_refused() -> None:
    first, second = run(tiny(), Replaying())
    assert first.failures == {}
    assert second.failures == {"node 1": "answers round 1, asked for round 2"}


class Impostor(InProcessGrid):
    """A grid on which every answer of node 0 comes twice, the first time from node 2."""

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = []
        for reply in super().pull_messages(message_ids):
            if reply.metadata.src_node_id == 2:
                false = copy.deepcopy(reply)
                false.metadata.__dict__["_src_node_id"] = 4
                found.append(false)
            found += [reply, reply] if reply.metadata.src_node_id == 2 else [reply]
        return found


def test_nobody_answers_for_another_node_or_twice() -> None:
    experiment = tiny()
    grid = Impostor(client_app.app, 3, experiment.to_mapping())
    seen = [s for s, _ in rounds(experiment, carrier=carrier(experiment, grid))]
    assert all(same(a.model, b.model) for a, b in zip(seen, run(experiment, client_app.app), strict=True))


def test_nobody_answers_for_another_node_or_twice_without_rounds() -> None:
    alone = {"strategy": "ElasticAveraging()", "schedule": "FreeRunning()", "batch-size": 4}
    experiment = tiny(**alone)
    expected = run(experiment, client_app.app)
    grid = Impostor(client_app.app, 3, experiment.to_mapping())
    seen = [s for s, _ in rounds(experiment, carrier=carrier(experiment, grid))]
    assert [s.failures for s in seen] == [{}] * len(expected)
    assert all(same(a.model, b.model) for a, b in zip(seen, expected, strict=True))


def test_long_updates_are_left_out_whatever_they_say() -> None:
    def stretch(content: RecordDict) -> None:
        on_rows(lambda rows: tree.scale(1e3, rows))(content)

    for settings in ({}, ROWS):
        for snapshot in run(tiny(**settings, **{"max-update-norm": 10.0}), Tampered(ROUND, stretch)):
            assert snapshot.excluded == [2, 3]
            assert snapshot.report.worker.tolist() == [0, 1, 4, 5]
            assert snapshot.failures == {}


def test_a_bad_reply_counts_as_no_reply() -> None:
    bad = run(tiny(**ROWS), Tampered(ROUND, without("report")))
    none = run(tiny(**ROWS), Failing(ROUND))
    assert all(same(a.model, b.model) for a, b in zip(bad, none, strict=True))


def test_a_worker_that_is_not_finite_is_no_failure() -> None:
    def spoil(content: RecordDict) -> None:
        rows = from_record(content.array_records["rows"])
        rows["1.weight"][0, 0, 0] = torch.nan
        content["rows"] = to_record(rows)

    (first, second) = run(tiny(**ROWS), Tampered(ROUND, spoil))
    for snapshot in (first, second):
        assert (snapshot.failures, snapshot.excluded) == ({}, [2])
        assert snapshot.report.worker.tolist() == [0, 1, 3, 4, 5]


# ------------------------------------------------------------------------------------------ workers' evaluation


def strange_workers(content: RecordDict) -> None:
    content.metric_records["held"]["worker"] = [0, 1]


def test_evaluation_goes_on_without_a_node_that_fails() -> None:
    experiment = tiny(holdout=0.3)
    whole, *_ = run(experiment, client_app.app)
    for app in (Failing(HELD), Tampered(HELD, strange_workers), Tampered(HELD, without("held"))):
        part, *_ = run(experiment, app)
        assert same(part.model, whole.model)
        assert part.metrics["held_loss.mean"] != whole.metrics["held_loss.mean"]
        assert part.metrics["test_loss"] == whole.metrics["test_loss"]
        assert list(part.failures) == ["node 1 (evaluation)"]
    none, *_ = run(experiment, Failing(HELD, nodes=(0, 1, 2)))
    assert "held_loss.mean" not in none.metrics
    assert none.metrics["failures"] == {
        f"node {i} (evaluation)": "ValueError: no memory left" for i in range(3)
    }


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"worker": [0, 6]}, r"must ascend and be in 0\.\.5"),
        ({"worker": [1, 0]}, "must ascend"),
        ({"worker": [1, 1]}, "must ascend"),
        ({"worker": [0.0, 0.5]}, "must ascend"),
        ({"loss": [0.5]}, "different lengths"),
        ({"accuracy": 0.5}, "accuracy must be a list of numbers"),
    ],
)
def test_a_bad_evaluation_is_refused(columns: dict[str, Any], text: str) -> None:
    two = torch.zeros(2, dtype=torch.float64)
    content = encode_evaluated(Evaluated(torch.arange(2), two, two))
    content.metric_records["held"].update(columns)
    with pytest.raises(BadReply, match=text):
        decode_evaluated(content, 0, 6)
