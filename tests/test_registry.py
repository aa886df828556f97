"""Expressions: read from the syntax tree, never evaluated; one line for whatever is wrong."""

import math
from dataclasses import dataclass

import pytest

from clients import SGD, AdamW, Prox
from fedsim import registry
from fedsim.data import Dirichlet
from fedsim.models import MLP
from fedsim.network import Network
from fedsim.registry import KINDS, REGISTRY, BadInput, describe, expression, nearest, parse, register
from strategies import FedAvg, FedAvgM


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("client", "SGD", SGD()),
        ("client", "SGD()", SGD()),
        ("client", " SGD( 0.5 , nesterov = True, momentum=0.9 ) ", SGD(0.5, momentum=0.9, nesterov=True)),
        ("client", "SGD(lr=1)", SGD(lr=1.0)),
        ("client", "SGD(lr=1e-3)", SGD(lr=0.001)),
        ("client", "Prox(SGD(lr=0.5), mu=0.1)", Prox(SGD(lr=0.5), mu=0.1)),
        ("client", "Prox(inner=AdamW, mu=0.1)", Prox(AdamW(), mu=0.1)),
        ("model", "MLP(hidden=(20, 10))", MLP(hidden=(20, 10))),
        ("model", "MLP(hidden=[20, 10])", MLP(hidden=(20, 10))),
        ("model", "MLP(hidden=())", MLP(hidden=())),
        ("network", "Network(bandwidth=inf)", Network(bandwidth=math.inf)),
        ("strategy", "FedAvg(weighting='uniform')", FedAvg(weighting="uniform")),
        ("partition", "Dirichlet(\n  alpha=0.3,  # skew\n)", Dirichlet(alpha=0.3)),
    ],
)
def test_an_expression_makes_the_component(kind: str, text: str, expected: object) -> None:
    assert parse(kind, text) == expected


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, named in REGISTRY.items() for n in named])
def test_what_a_component_prints_makes_it_again(kind: str, name: str) -> None:
    needed = {"Hub": "('ylecun/mnist')", "Folder": "('here')", "ByQuantity": "(alpha=0.5)"}
    needed["Geometry"] = "('here', other='there')"
    made = parse(kind, name + needed.get(name, "()"))
    assert type(made) is REGISTRY[kind][name]
    assert parse(kind, repr(made)) == made
    assert parse(kind, expression(made)) == made


def test_an_expression_leaves_out_defaults() -> None:
    assert expression(SGD()) == "SGD()"
    assert expression(Prox(SGD(lr=0.5, momentum=0.9))) == "Prox(inner=SGD(lr=0.5, momentum=0.9))"
    assert expression(FedAvgM(momentum=0.5, weighting="uniform")) == (
        "FedAvgM(weighting='uniform', momentum=0.5)"
    )
    assert expression(parse("strategy", "flwr.Krum(num_malicious_nodes=1)")) == (
        "flwr.Krum(num_malicious_nodes=1)"
    )


CLIENTS = "allowed: " + ", ".join(REGISTRY["client"])


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        # names
        ("client", "SDG()", f"unknown name 'SDG'; did you mean 'SGD'? {CLIENTS}"),
        ("client", "sgd()", f"unknown name 'sgd'; did you mean 'SGD'? {CLIENTS}"),
        ("client", "Xyzzy()", f"unknown name 'Xyzzy'; {CLIENTS}"),
        ("client", "FedAvg()", f"unknown name 'FedAvg'; that is a strategy; {CLIENTS}"),
        ("client", "Prox(SDG())", f"unknown name 'SDG'; did you mean 'SGD'? {CLIENTS}"),
        ("strategy", "flwr.FedAvgN()", "flwr: unknown strategy 'FedAvgN'; did you mean 'FedAvg'?"),
        # arguments
        ("client", "SGD(rl=0.1)", "SGD has no argument 'rl'; did you mean 'lr'? allowed: lr, momentum, "),
        ("client", "SGD(0.1, lr=0.1)", "SGD: multiple values for argument 'lr'; arguments: lr, "),
        ("client", "SGD(0.1, 0.9, True, 0.0, 5)", "SGD: too many positional arguments; arguments: lr, "),
        ("client", "SGD(lr=0.1, lr=0.2)", "the argument 'lr' of SGD is written twice"),
        ("data", "Folder()", "Folder: missing a required argument: 'path'; arguments: path, "),
        # types
        ("client", "SGD(lr='fast')", "SGD: lr = 'fast' must be a number"),
        ("client", "SGD(lr=True)", "SGD: lr = True must be a number"),
        ("client", "SGD(lr=None)", "SGD: lr = None must be a number"),
        ("client", "SGD(lr=(0.1,))", "SGD: lr = (0.1,) must be a number"),
        ("client", "SGD(lr=1j)", "SGD: lr = 1j must be a number"),
        ("client", "SGD(lr=SGD())", "SGD: lr = SGD(lr=0.1, "),
        ("client", "SGD(nesterov=1)", "SGD: nesterov = 1 must be True or False"),
        ("client", "Prox(0.1)", "Prox: inner = 0.1 must be an expression such as SGD(lr=0.1)"),
        ("model", "MLP(hidden=20)", "MLP: hidden = 20 must be a tuple (a, b, ...), each a whole number"),
        ("model", "MLP(hidden=(20.5,))", "MLP: hidden = (20.5,) must be a tuple (a, b, ...), each a whole"),
        ("data", "MNIST(rows=1.5)", "MNIST: rows = 1.5 must be a whole number or None"),
        ("partition", "Pathological(classes=2.0)", "Pathological: classes = 2.0 must be a whole number"),
        ("strategy", "FedAvg(weighting='even')", "must be one of 'samples', 'uniform'"),
        # range
        ("client", "SGD(lr=-1)", "SGD: lr = -1.0 must be > 0"),
        ("client", "SGD(lr=nan)", "SGD: lr = nan must be > 0"),
        ("client", "Prox(SGD(lr=0), mu=0.1)", "SGD: lr = 0.0 must be > 0"),
        ("partition", "Dirichlet(alpha=0)", "Dirichlet: alpha = 0.0 must be > 0"),
        # no expression at all
        ("client", "", "is not an expression such as SGD(): "),
        ("client", "SGD(lr=", "is not an expression such as SGD(): "),
        ("client", "SGD(); SGD()", "is not an expression such as SGD(): "),
        ("client", "SGD()\nSGD()", "is not an expression such as SGD(): "),
        ("client", "SGD(\0)", "is not an expression such as SGD()"),
        ("client", "(" * 300 + ")" * 300, "is not an expression such as SGD()"),
        ("client", "-" * 100_000 + "1", "is not an expression such as SGD()"),
        ("client", "SGD(" * 150 + ")" * 150, "SGD"),
        ("client", "3", "'3' is not a name; write for instance SGD()"),
        ("client", "'SGD()'", "is not a name; write for instance SGD()"),
        ("client", "clients.SGD()", "'clients.SGD' is not a name; write for instance SGD()"),
        ("client", "SGD()()", "'SGD()' is not a name; write for instance SGD()"),
        ("client", "SGD(lr=0.1 + 0.1)", "'0.1 + 0.1' is not a number, a string or a name()"),
        ("client", "SGD(lr=10 ** 10)", "'10 ** 10' is not a number, a string or a name()"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(kind: str, text: str, reason: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse(kind, text)
    message = str(caught.value)
    assert message.startswith(f"{kind} = {text!r}: ")
    assert reason in message
    assert len(message.splitlines()) == 1


class Trap(Exception):
    """Raised by whatever must not be called."""


@dataclass(frozen=True)
class Armed:
    """A component with an attribute that must not be read and a value that must not be called."""

    value: float = 0.0

    @property
    def fire(self) -> float:
        raise Trap

    def __call__(self) -> float:
        raise Trap


@pytest.mark.parametrize(
    "value",
    [
        "__import__('os').system('touch {file}')",
        "open('{file}', 'w')",
        'exec(\'open("{file}", "w")\')',
        "(lambda: open('{file}', 'w'))()",
        "lambda: 1",
        "[open('{file}', 'w') for _ in (1,)]",
        "(open('{file}', 'w') for _ in (1,))",
        "{{open('{file}', 'w')}}",
        "{{1: open('{file}', 'w')}}",
        'f\'{{open("{file}", "w")}}\'',
        "f'plain'",
        "(x := open('{file}', 'w'))",
        "open('{file}', 'w') if True else 1",
        "not open('{file}', 'w')",
        "open('{file}', 'w') or 1",
        "-open('{file}', 'w')",
        "1 < open('{file}', 'w').fileno()",
        "[1, 2][open('{file}', 'w').fileno()]",
        "Armed().fire",
        "Armed()()",
        "Armed().__class__.__mro__",
        "().__class__.__bases__[0].__subclasses__()",
        "*[1]",
        "**{{'value': 1}}",
        "__builtins__",
        "print",
        "await open('{file}', 'w')",
        "yield",
    ],
)
@pytest.mark.parametrize("shape", ["{value}", "Armed({value})", "Armed(value={value})", "Armed([{value}])"])
def test_code_is_refused_and_never_runs(
    value: str, shape: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REGISTRY["client"], "Armed", Armed)
    monkeypatch.setattr(registry, "open", lambda *_: pytest.fail("called"), raising=False)
    file = tmp_path / "evil"
    text = shape.format(value=value.format(file=file))
    with pytest.raises(BadInput) as caught:
        parse("client", text)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).startswith(f"client = {text!r}: ")
    assert not file.exists()


def test_flowers_names_are_no_way_out_either() -> None:
    for text in ("flwr.__import__('os')", "flwr.os.system(command='x')", "flwr.FedAvg.__init__()", "flwr"):
        with pytest.raises(BadInput, match=r"^strategy = ") as caught:
            parse("strategy", text)
        assert len(str(caught.value).splitlines()) == 1


def test_a_class_of_ones_own_becomes_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, "client", dict(REGISTRY["client"]))
    assert register("client", Armed) is Armed
    assert register("client", Armed) is Armed
    assert parse("client", "Armed(value=2)") == Armed(2.0)
    other = type("SGD", (), {"__module__": "mine"})
    with pytest.raises(BadInput, match=r"register: the client SGD is taken by clients\.sgd"):
        register("client", other)
    with pytest.raises(BadInput, match="kind = 'clients' must be one of data, "):
        register("clients", Armed)


def test_the_nearest_word_is_proposed() -> None:
    assert nearest("num-wrkers", ["rounds", "num-workers"]) == "did you mean 'num-workers'? "
    assert nearest("FEDAVG", ["FedAvg", "FedAdam"]) == "did you mean 'FedAvg'? "
    assert nearest("zzz", ["FedAvg"]) == ""


@pytest.mark.parametrize("kind", REGISTRY)
def test_every_component_is_described_in_one_line(kind: str) -> None:
    assert KINDS[kind]
    rows = describe(kind)
    assert [name for name, _, _ in rows] == sorted(REGISTRY[kind])
    for name, arguments, summary in rows:
        assert summary.endswith("."), name
        assert "\n" not in summary
        assert arguments[0] + arguments[-1] == "()"
        assert "*" not in arguments
