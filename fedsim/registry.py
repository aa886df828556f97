"""Names of everything an experiment can be made of, and the parser of expressions such as ``FedAvg()``.

An expression is read from its syntax tree: a name of the registry, called with literals or with further
expressions. It is never evaluated.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import types
import typing
from typing import Any

from pydantic import TypeAdapter, ValidationError

import clients
import strategies
from fedsim import (
    attacks,
    data,
    gpt_neo,
    landscapes,
    models,
    network,
    objectives,
    probes,
    schedule,
    text_classifier,
)
from fedsim.errors import BadInput
from strategies.foreign import FlowerStrategy


def _classes(module: Any, *names: str) -> dict[str, type]:
    return {name: getattr(module, name) for name in names}


REGISTRY: dict[str, dict[str, type]] = {
    "data": _classes(
        data,
        "Digits",
        "MNIST",
        "CIFAR10",
        "TinyShakespeare",
        "TinyStories",
        "Synthetic",
        "Hub",
        "Folder",
        "Pair",
        "FrozenFeatures",
        "Cropped",
        "Separable",
        "NonSeparable",
        "Mixed",
        "NearDegenerate",
        "Toy",
        "LinearRegression",
        "NextKind",
        "ColoredDigits",
        "RotatedDigits",
        "Shifted",
        "Blank",
        "Parabolas",
        "LowRank",
    ),
    "partition": _classes(
        data,
        "IID",
        "Dirichlet",
        "Pathological",
        "ByLabel",
        "ByQuantity",
        "Contiguous",
        "Natural",
        "Shared",
        "FlowerDatasets",
    ),
    "model": _classes(models, "Linear", "MLP", "SmallCNN", "CNN7", "ResNet20", "Transformer")
    | _classes(text_classifier, "TextClassifier")
    | _classes(gpt_neo, "GPTNeo")
    | _classes(landscapes, "Scalar", "Sinc", "DoubleWell", "Factorisation"),
    "objective": _classes(objectives, "CrossEntropy", "SquaredError", "Logistic", "Exponential", "Value"),
    "client": _classes(
        clients,
        "SGD",
        "ScaledSGD",
        "AdamW",
        "Prox",
        "Clipped",
        "WarmupCosine",
        "StepDecay",
        "PALSGD",
        "Controlled",
        "Fresh",
        "IRM",
        "Projection",
        "LossNormalised",
        "Filtered",
        "Nesterov",
        "SAM",
        "AdaptiveSGD",
        "SASAM",
        "Guided",
        "Gaussian",
    ),
    "strategy": _classes(
        strategies,
        "FedAvg",
        "FedSGD",
        "FedIRM",
        "PooledIRM",
        "LocalGD",
        "AnchoredAverage",
        "KnownLoss",
        "DualAcceleration",
        "FedAvgM",
        "FedAdam",
        "FedYogi",
        "FedAdagrad",
        "DiLoCo",
        "StreamingDiLoCo",
        "AsyncDiLoCo",
        "TopK",
        "LowBit",
        "Scaffold",
        "FedCM",
        "FedMedian",
        "TrimmedMean",
        "DPFedAvg",
        "GapFilter",
        "DominantFilter",
        "LeaderSGD",
        "LeaderGD",
        "ElasticAveraging",
        "Downpour",
    ),
    "probe": _classes(
        probes,
        "WorkerLoss",
        "Drift",
        "Leaders",
        "Direction",
        "Bias",
        "NormalisedMargin",
        "Disagreement",
        "Sharpness",
        "Environments",
        "PrivacyLoss",
        "Geometry",
    ),
    "network": _classes(network, "Network"),
    "schedule": _classes(schedule, "Synchronous", "PostLocal", "DynamicSteps", "TotalSteps", "FreeRunning"),
    "attack": _classes(attacks, "NoAttack", "LabelFlip", "ScaledUpdate", "GaussianUpdate"),
}

KINDS = {
    "data": "where rows come from",
    "partition": "which worker owns which rows",
    "model": "what is trained",
    "objective": "the loss of a row",
    "client": "what a worker does in one local step",
    "strategy": "what the server does in a sync; also flwr.NAME(...), any strategy that Flower ships",
    "probe": "what is measured after a round; the key is probes, several are joined by ;",
    "network": "what the simulated clock charges",
    "schedule": "how fast workers are, and when they meet",
    "attack": "which workers attack, and how",
}
"""What each kind of component is, in a few words."""


def register(kind: str, component: type) -> type:
    """Make a class of your own known to expressions, under its own name.

    Parameters
    ----------
    kind : str
        One of the keys of `REGISTRY`.
    component : type
        A frozen dataclass with the verbs of its kind.

    Returns
    -------
    type
        The class itself, so that this is a decorator with ``functools.partial``.

    Raises
    ------
    BadInput
        If the kind is unknown or the name is taken by another class.
    """
    if kind not in REGISTRY:
        raise BadInput(f"register: kind = {kind!r} must be one of {', '.join(REGISTRY)}")
    known = REGISTRY[kind].get(component.__name__, component)
    if known is not component:
        raise BadInput(f"register: the {kind} {component.__name__} is taken by {known.__module__}")
    REGISTRY[kind][component.__name__] = component
    return component


def nearest(word: str, allowed: typing.Iterable[str]) -> str:
    """Say ``did you mean ...? `` for the nearest of the allowed words, or nothing."""
    match = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    if not match:
        lower = {a.lower(): a for a in allowed}
        match = [lower[m] for m in difflib.get_close_matches(word.lower(), list(lower), n=1, cutoff=0.5)]
    return f"did you mean {match[0]!r}? " if match else ""


def parse(kind: str, text: str, key: str | None = None) -> Any:
    """Make the component that an expression names.

    Parameters
    ----------
    kind : str
        One of the keys of `REGISTRY`.
    text : str
        Expression, for instance ``"Prox(SGD(lr=0.1), mu=0.01)"``; ``"FedAvg"`` is ``"FedAvg()"``.
    key : str or None
        Name of the setting for error messages; the kind by default.

    Returns
    -------
    object
        The frozen dataclass.

    Raises
    ------
    BadInput
        If the text does not parse, a name or argument is unknown, or a value has the wrong type or range.

    Examples
    --------
    >>> parse("client", "Prox(SGD(lr=0.5), mu=0.1)").inner.lr
    0.5
    >>> parse("client", "SDG(lr=0.5)")
    Traceback (most recent call last):
    fedsim.errors.BadInput: client = 'SDG(lr=0.5)': unknown name 'SDG'; did you mean 'SGD'? allowed: ...
    """
    where = f"{key or kind} = {text!r}"
    try:
        node = ast.parse(text.strip(), mode="eval").body
        return _component(kind, node, where)
    except SyntaxError as error:
        raise BadInput(f"{where}: is not an expression such as {_example(kind)}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError):  # null bytes; thousands of brackets or signs
        raise BadInput(f"{where}: is not an expression such as {_example(kind)}") from None


def expression(component: Any) -> str:
    """Write the expression that makes a component: its repr without the arguments at their defaults.

    Parameters
    ----------
    component : object
        A frozen dataclass; of anything else the repr is taken.

    Returns
    -------
    str
        What `parse` reads back.

    Examples
    --------
    >>> expression(clients.Prox(clients.SGD(lr=0.5)))
    'Prox(inner=SGD(lr=0.5))'
    """
    if not dataclasses.is_dataclass(component) or not component.__dataclass_params__.repr:  # type: ignore
        return repr(component)
    changed = []
    for field in dataclasses.fields(component):
        value = getattr(component, field.name)
        if field.init and field.repr and value != field.default:
            changed.append(f"{field.name}={expression(value)}")
    return f"{type(component).__name__}({', '.join(changed)})"


def _example(kind: str) -> str:
    return f"{next(iter(REGISTRY[kind]))}()"


def _component(kind: str, node: ast.expr, where: str) -> Any:
    if isinstance(node, ast.Call):
        called, args, keywords = node.func, node.args, node.keywords
    else:
        called, args, keywords = node, [], []
    name = ast.unparse(called)
    written = [k.arg for k in keywords if k.arg]
    twice = [argument for i, argument in enumerate(written) if argument in written[:i]]
    if twice:
        raise BadInput(f"{where}: the argument {twice[0]!r} of {name} is written twice")
    if kind == "strategy" and name.startswith("flwr."):
        arguments = {k.arg or "": _value(kind, k.value, where) for k in keywords}
        if args or "" in arguments:
            raise BadInput(f"{where}: write the arguments of {name} as name=value")
        return _construct(FlowerStrategy, [name.removeprefix("flwr."), tuple(arguments.items())], {}, where)
    if not isinstance(called, ast.Name):
        raise BadInput(f"{where}: {name!r} is not a name; write for instance {_example(kind)}")
    known = REGISTRY[kind]
    if name not in known:
        others = [k for k, named in REGISTRY.items() if name in named]
        hint = f"that is a {others[0]}; " if others else nearest(name, known)
        raise BadInput(f"{where}: unknown name {name!r}; {hint}allowed: {', '.join(known)}")
    if any(isinstance(a, ast.Starred) for a in args) or any(k.arg is None for k in keywords):
        raise BadInput(f"{where}: stars are not allowed in the arguments of {name}")
    values = [_value(kind, a, where) for a in args]
    named = {k.arg: _value(kind, k.value, where) for k in keywords if k.arg}
    return _construct(known[name], values, named, where)


def _value(kind: str, node: ast.expr, where: str) -> Any:
    """Read a literal, a list of literals, or a further expression of the same kind."""
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_value(kind, e, where) for e in node.elts)
    if isinstance(node, ast.Call | ast.Name | ast.Attribute):
        name = ast.unparse(node.func if isinstance(node, ast.Call) else node)
        if name in {"inf", "nan"}:
            return float(name)
        return _component(kind, node, where)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise BadInput(f"{where}: {ast.unparse(node)!r} is not a number, a string or a name()") from None


def _construct(component: type, values: list[Any], named: dict[str, Any], where: str) -> Any:
    name = component.__name__
    signature = inspect.signature(component)
    allowed = [p.name for p in signature.parameters.values()]
    for argument in named:
        if argument not in allowed:
            hint = nearest(argument, allowed)
            raise BadInput(
                f"{where}: {name} has no argument {argument!r}; {hint}allowed: {', '.join(allowed) or 'none'}"
            )
    try:
        bound = signature.bind(*values, **named)
    except TypeError as error:
        raise BadInput(f"{where}: {name}: {error}; arguments: {', '.join(allowed) or 'none'}") from None
    hints = typing.get_type_hints(component)  # each field in the module of its class
    arguments = {k: _typed(name, k, v, hints.get(k, Any), where) for k, v in bound.arguments.items()}
    try:
        return component(**arguments)
    except (ValueError, TypeError) as error:
        raise BadInput(f"{where}: {' '.join(str(error).split())}") from None


def _typed(name: str, argument: str, value: Any, hint: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value):
        if not isinstance(hint, type) or hint in {int, float, str, bool}:
            raise BadInput(f"{where}: {name}: {argument} = {value!r} must be {_says(hint)}")
        return value
    if isinstance(hint, type) and hint.__module__ != "builtins":
        raise BadInput(f"{where}: {name}: {argument} = {value!r} must be an expression such as SGD(lr=0.1)")
    try:
        return TypeAdapter(hint).validate_python(value, strict=True)
    except ValidationError:
        raise BadInput(f"{where}: {name}: {argument} = {value!r} must be {_says(hint)}") from None


def _says(hint: Any) -> str:
    """Say a type in plain words."""
    words = {int: "a whole number", float: "a number", str: "a string", bool: "True or False"}
    if hint in words:
        return words[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is tuple and len(arguments) == 2 and arguments[1] is ...:
        return f"a tuple (a, b, ...), each {_says(arguments[0])}"
    if origin in {types.UnionType, typing.Union}:
        return " or ".join(map(_says, arguments))
    return str(getattr(hint, "__name__", hint)).replace("NoneType", "None")


def describe(kind: str) -> list[tuple[str, str, str]]:
    """List a kind: name, arguments with defaults and one-line summary of every component."""
    rows = []
    for name, component in sorted(REGISTRY[kind].items()):
        summary = (inspect.getdoc(component) or "").split("\n")[0]
        arguments = []
        for p in inspect.signature(component).parameters.values():
            arguments.append(p.name if p.default is p.empty else f"{p.name}={expression(p.default)}")
        rows.append((name, f"({', '.join(arguments)})", summary))
    return rows
