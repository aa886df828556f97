"""The frozen, validated description of a run, read from TOML, Flower's run configuration or Python."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from clients import (
    IRM,
    SASAM,
    AdaptiveSGD,
    Controlled,
    Guided,
    LocalRule,
    LossNormalised,
    Projection,
    StepDecay,
    WarmupCosine,
)
from fedsim.attacks import Attack
from fedsim.data import Partition, Source
from fedsim.models import Linear, ModelSpec
from fedsim.network import Network
from fedsim.objectives import CrossEntropy, Exponential, Logistic, Objective
from fedsim.precision import Precision
from fedsim.probes import Probe
from fedsim.registry import REGISTRY, BadInput, expression, nearest, parse
from fedsim.schedule import DynamicSteps, FreeRunning, PostLocal, Schedule, TotalSteps
from strategies import (
    AsyncDiLoCo,
    DualAcceleration,
    FedCM,
    FedIRM,
    LeaderGD,
    LeaderSGD,
    LocalGD,
    PooledIRM,
    Rule,
    Scaffold,
    StreamingDiLoCo,
)

COMPONENTS = (
    "data",
    "partition",
    "model",
    "objective",
    "client",
    "strategy",
    "network",
    "schedule",
    "attack",
)


class Parts(NamedTuple):
    """The components that an experiment's expressions name."""

    data: Source
    partition: Partition
    model: ModelSpec
    objective: Objective
    client: LocalRule
    strategy: Rule
    network: Network
    schedule: Schedule
    attack: Attack
    probes: tuple[Probe, ...]


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class Experiment(BaseModel):
    """A run, completely: the same experiment gives the same history on every carrier.

    Components are expressions or the objects themselves; ``Experiment(client=SGD(lr=0.5))`` and
    ``Experiment(client="SGD(0.5)")`` are equal. In TOML and on command lines the keys are written with
    hyphens (``num-workers``).

    Attributes
    ----------
    data, partition, model, objective, client, strategy : str
        Expressions; ``fedsim list`` shows all names and their arguments.
    network : str
        Expression for the costs of the simulated clock.
    schedule : str
        Expression for the speeds of workers and when they meet.
    attack : str
        Expression for the workers that attack, and how.
    probes : str
        Expressions joined by ``;``, or empty.
    num_workers : int
        Workers W of the federation, >= 1.
    participation : float
        Share of the workers that take part in a round, in (0, 1]; at least one does.
    rounds : int
        Rounds, >= 1.
    local_steps, local_epochs : int
        Work of a round: so many steps, or so many passes over a worker's own rows. One of the two is 0.
    batch_size : int
        Rows of a minibatch, >= 1, or 0 for all rows of the worker (gradient descent).
    replacement : bool
        Draw minibatches with replacement; otherwise each pass is a fresh shuffle and its last batch may
        be smaller.
    holdout : float
        Share of each worker's rows kept for its own evaluation, in [0, 1).
    eval_every : int
        Rounds between evaluations, >= 0; the last round is always evaluated; 0 evaluates only there.
    seed : int
        Seed of everything.
    device : str
        ``auto``, ``cpu`` or ``cuda`` (``cuda:1`` ...).
    dtype : {"float32", "float64"}
        Precision of parameters and features.
    precision : {"full", "tf32", "bfloat16"}
        Of the factors of products and convolutions in local steps: as they are, or rounded to 11 bits (on a GPU, and
        nothing elsewhere) or 8 bits, relative errors of up to ``2^-11`` and ``2^-8``; with ``dtype = "float32"``.
    plan : {"auto", "stacked", "graph", "vmap", "compiled", "loop"}
        How the engine batches workers; ``auto`` takes the fastest. ``graph`` needs CUDA.
    nodes : int
        Nodes over which workers are spread when no Flower deployment says otherwise, >= 1.
    min_nodes : int
        Nodes that must answer in a round for the run to go on, 0 for all.
    max_update_norm : float
        Euclidean norm of an update, the sent row less the model sent before it, above which a worker is left out of
        the round, >= 0; 0 for no limit.
    round_timeout : float
        Seconds after which missing nodes are left out of a round, > 0.
    engine : {"in-process", "flower"}
        Under ``flwr run`` in simulation: one process, or Flower's simulation engine with its actors.
    out : str
        Run directory; empty for ``runs/<time>``.

    Raises
    ------
    BadInput
        With one line that names the key, the value and what is allowed.

    Examples
    --------
    >>> Experiment(num_workers=10, client="SGD(lr=0.5)").num_workers
    10
    >>> Experiment.from_mapping({"num-wrkers": 10})
    Traceback (most recent call last):
    fedsim.errors.BadInput: unknown key 'num-wrkers'; did you mean 'num-workers'? allowed: data, ...
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=_kebab,
        populate_by_name=True,
        allow_inf_nan=False,
    )

    data: str = "Digits()"
    partition: str = "Dirichlet(alpha=0.3)"
    model: str = "MLP(hidden=(200,))"
    objective: str = "CrossEntropy()"
    client: str = "SGD(lr=0.1)"
    strategy: str = "FedAvg()"
    network: str = "Network()"
    schedule: str = "Synchronous()"
    attack: str = "NoAttack()"
    probes: str = ""
    num_workers: int = Field(default=100, ge=1)
    participation: float = Field(default=1.0, gt=0, le=1)
    rounds: int = Field(default=50, ge=1)
    local_steps: int = Field(default=10, ge=0)
    local_epochs: int = Field(default=0, ge=0)
    batch_size: int = Field(default=16, ge=0)
    replacement: bool = False
    holdout: float = Field(default=0.0, ge=0, lt=1)
    eval_every: int = Field(default=1, ge=0)
    seed: int = Field(default=0, ge=0)
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    dtype: Literal["float32", "float64"] = "float32"
    precision: Precision = "full"
    plan: Literal["auto", "stacked", "graph", "vmap", "compiled", "loop"] = "auto"
    nodes: int = Field(default=1, ge=1)
    min_nodes: int = Field(default=0, ge=0)
    max_update_norm: float = Field(default=0.0, ge=0)
    round_timeout: float = Field(default=3600.0, gt=0)
    engine: Literal["in-process", "flower"] = "in-process"
    out: str = ""

    @model_validator(mode="wrap")
    @classmethod
    def _one_line(cls, values: Any, handler: Any) -> Any:
        """Turn pydantic's report into one line about the first thing that is wrong."""
        if not isinstance(values, dict):
            return handler(values)
        values = {_kebab(k): v for k, v in values.items()}
        allowed = [_kebab(name) for name in cls.model_fields]
        for k in values:
            if k not in allowed:
                raise BadInput(f"unknown key {k!r}; {nearest(k, allowed)}allowed: {', '.join(allowed)}")
        if values.get("local-epochs") and "local-steps" not in values:
            values["local-steps"] = 0
        for k in COMPONENTS:
            if k in values and not isinstance(values[k], str):
                values[k] = expression(values[k])
        if isinstance(values.get("probes"), list | tuple):
            values["probes"] = "; ".join(p if isinstance(p, str) else expression(p) for p in values["probes"])
        try:
            return handler(values)
        except ValidationError as error:
            first = error.errors()[0]
            k, value = str(first["loc"][0]), first["input"]
            raise BadInput(
                f"{k} = {value!r} must be {_allowed(first['type'], first.get('ctx', {}), value)}"
            ) from None

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        if (self.local_steps == 0) == (self.local_epochs == 0):
            raise BadInput(
                f"local-steps = {self.local_steps}, local-epochs = {self.local_epochs}: "
                "one of them must be > 0, the other 0"
            )
        parts = self.parts
        named = [type(p).__name__ for p in parts.probes]
        if len(set(named)) < len(named):
            raise BadInput(f"probes = {self.probes!r}: each probe may be named once")
        if isinstance(parts.strategy, LocalGD) and self.batch_size != 0:
            raise BadInput(
                f"strategy = {self.strategy!r}: Local-GD uses full gradients; set batch-size = 0 "
                f"(it is {self.batch_size}) or strategy = 'FedAvg()'"
            )
        if self.precision != "full" and self.dtype != "float32":
            raise BadInput(
                f"precision = {self.precision!r}: needs dtype = 'float32', it is {self.dtype!r}; use precision = 'full'"
            )
        self._check_schedule()
        self._check_pairs()
        self._check_hostile()
        if isinstance(parts.client, Projection):
            self._check_wants({"batch-size": (self.batch_size, 0), "local-steps": (self.local_steps, 1)})
        if isinstance(parts.strategy, PooledIRM):
            self._check_pooling()
        elif _contains(parts.client, LossNormalised) or parts.strategy.asks:
            self._check_asking()
        if self.nodes > self.num_workers:
            raise BadInput(f"nodes = {self.nodes} must be <= num-workers = {self.num_workers}")
        if parts.strategy.keeps_rows and self.participation < 1:
            raise BadInput(
                f"participation = {self.participation}: {self.strategy} is defined for all workers; set it to 1.0"
            )
        return self

    def _check_schedule(self) -> None:
        strategy, schedule = self.parts.strategy, self.parts.schedule
        if isinstance(strategy, LeaderGD) and self.batch_size != 0:
            raise BadInput(
                f"strategy = {self.strategy!r}: uses full gradients; set batch-size = 0 (it is {self.batch_size}) "
                "or strategy = 'LeaderSGD()'"
            )
        if strategy.score is not None and strategy.score.by == "shared_val" and self.holdout == 0:
            raise BadInput(
                f"holdout = 0.0: strategy = {self.strategy!r} elects by held-out rows; set holdout > 0"
            )
        stale = isinstance(strategy, LeaderSGD) and strategy.follows != "never"
        counted = TotalSteps | FreeRunning | PostLocal | DynamicSteps
        if (stale or isinstance(schedule, counted)) and self.local_steps == 0:
            key, value = ("strategy", self.strategy) if stale else ("schedule", self.schedule)
            raise BadInput(f"local-epochs = {self.local_epochs}: {key} = {value!r} needs local-steps")
        if isinstance(schedule, TotalSteps | FreeRunning) and self.participation < 1:
            raise BadInput(
                f"participation = {self.participation}: schedule = {self.schedule!r} is defined for all workers"
            )
        if isinstance(schedule, FreeRunning) and not strategy.asynchronous:
            hint = "; leader methods take 'TotalSteps(...)'" if strategy.upload == "chosen" else ""
            raise BadInput(
                f"schedule = {self.schedule!r}: strategy = {self.strategy!r} cannot take workers one at a time; use "
                f"'ElasticAveraging()', 'Downpour()' or 'AsyncDiLoCo()'{hint}"
            )
        waits = isinstance(schedule, FreeRunning) and schedule.grace is not None
        if waits and not isinstance(strategy, AsyncDiLoCo):
            raise BadInput(
                f"schedule = {self.schedule!r}: grace is for strategy = 'AsyncDiLoCo(...)', it is {self.strategy!r}"
            )

    def _check_pairs(self) -> None:
        client, strategy = self.parts.client, self.parts.strategy
        together = isinstance(strategy, Scaffold) and isinstance(client, Controlled)
        if (isinstance(strategy, Scaffold) or _contains(client, Controlled)) and not together:
            raise BadInput(
                f"client = {self.client!r}, strategy = {self.strategy!r}: 'Controlled(...)' and 'Scaffold()' need each "
                "other, the client not within another rule"
            )
        if isinstance(strategy, FedCM) != _contains(client, Guided):
            raise BadInput(
                f"client = {self.client!r}, strategy = {self.strategy!r}: 'Guided(...)' and 'FedCM()' need each other"
            )
        if isinstance(strategy, FedIRM) != _contains(client, IRM):
            raise BadInput(
                f"client = {self.client!r}, strategy = {self.strategy!r}: 'IRM(...)' and 'FedIRM(...)' need each other"
            )
        if isinstance(strategy, FedIRM) and not isinstance(self.parts.objective, CrossEntropy | Logistic):
            raise BadInput(
                f"objective = {self.objective!r}: client = {self.client!r} needs 'Logistic()' or 'CrossEntropy()'"
            )
        if isinstance(strategy, StreamingDiLoCo) and not strategy.delay < self.local_steps:
            raise BadInput(
                f"local-steps = {self.local_steps}: strategy = {self.strategy!r} needs more local steps than its delay"
            )
        counting = next((k.__name__ for k in (WarmupCosine, StepDecay) if _contains(client, k)), None)
        if counting and not strategy.keeps_state:
            raise BadInput(
                f"client = {self.client!r}: {counting} counts a worker's steps in all rounds, but strategy = "
                f"{self.strategy!r} keeps nothing at workers; 'DiLoCo(lr=1.0, momentum=0.0)' averages and does"
            )
        if _contains(client, AdaptiveSGD | SASAM, persistent=True) and not strategy.keeps_state:
            raise BadInput(
                f"client = {self.client!r}: persistent keeps a worker's step between rounds, but strategy = "
                f"{self.strategy!r} keeps nothing at workers; 'DiLoCo(lr=1.0, momentum=0.0)' averages and does"
            )

    def _check_hostile(self) -> None:
        strategy = self.parts.strategy
        merged = not strategy.keeps_rows and strategy.upload != "chosen" and not strategy.carries
        if merged and not strategy.asks and not isinstance(self.parts.schedule, FreeRunning):
            return
        for key, value, default in (
            ("attack", self.attack, "'NoAttack()'"),
            ("max-update-norm", self.max_update_norm, "0"),
        ):
            if value != type(self).model_fields[key.replace("-", "_")].default:
                raise BadInput(
                    f"{key} = {value!r}: is for rounds whose workers start from the server's model and send their rows, "
                    f"not for strategy = {self.strategy!r} with schedule = {self.schedule!r}; use {key} = {default}"
                )

    def _check_asking(self) -> None:
        client, strategy = self.parts.client, self.parts.strategy
        if not isinstance(client, LossNormalised) or not strategy.asks:
            raise BadInput(
                f"client = {self.client!r}, strategy = {self.strategy!r}: 'LossNormalised(...)' and 'KnownLoss()' or "
                "'DualAcceleration()' need each other, none within another rule"
            )
        wanted = {"batch-size": (self.batch_size, 0), "participation": (self.participation, 1)}
        if isinstance(strategy, DualAcceleration):
            wanted["local-steps"] = (self.local_steps, 1)
        if not isinstance(self.parts.objective, Exponential):
            raise BadInput(f"objective = {self.objective!r}: client = {self.client!r} needs 'Exponential()'")
        self._check_wants(wanted)

    def _check_pooling(self) -> None:
        client = self.parts.client
        if not isinstance(client, IRM) or client.split:
            raise BadInput(
                f"client = {self.client!r}: strategy = {self.strategy!r} needs 'IRM(...)', not split and not within another rule"
            )
        for key, value, wanted in (("batch-size", self.batch_size, 0), ("local-steps", self.local_steps, 1)):
            if value != wanted:
                raise BadInput(f"{key} = {value}: strategy = {self.strategy!r} needs {key} = {wanted}")

    def _check_wants(self, wanted: dict[str, tuple[float, int]]) -> None:
        model = self.parts.model
        for key, (value, allowed) in wanted.items():
            if value != allowed:
                raise BadInput(f"{key} = {value}: client = {self.client!r} needs {key} = {allowed}")
        if not isinstance(model, Linear) or model.bias:
            raise BadInput(f"model = {self.model!r}: client = {self.client!r} needs 'Linear(bias=False)'")
        if self.plan not in ("auto", "loop"):
            raise BadInput(f"plan = {self.plan!r}: client = {self.client!r} runs on 'loop', or 'auto'")

    @cached_property
    def parts(self) -> Parts:
        """The components, parsed from their expressions."""
        named = {k: parse(k, getattr(self, k)) for k in COMPONENTS}
        probes = tuple(parse("probe", p, "probes") for p in self.probes.split(";") if p.strip())
        return Parts(**named, probes=probes)

    @property
    def label(self) -> str:
        """What a reader of the results must know, or nothing: local steps with IRM, another optimiser after the switch."""
        strategy, said = self.parts.strategy, []
        if isinstance(strategy, FedIRM):
            if self.local_steps != 1:
                said.append("local IRM steps, which are known to end in the rule that IRM is to avoid")
            if strategy.on_anneal == "domainbed_compat" and strategy.optimiser != "adam":
                said.append(f"Adam in place of {strategy.optimiser} from step {strategy.anneal} on")
        return "; ".join(said)

    @property
    def num_participants(self) -> int:
        """Workers of a round, ``max(1, round(participation W))``."""
        return max(1, round(self.participation * self.num_workers))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Experiment:
        """Make an experiment from keys written with hyphens or underscores; the rest has defaults."""
        return cls.model_validate(dict(values))

    @classmethod
    def from_toml(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Experiment:
        """Read an experiment from a TOML file of flat keys.

        Parameters
        ----------
        path : str or Path
            The file.
        overrides : mapping, optional
            Keys that replace those of the file.

        Returns
        -------
        Experiment
            The validated experiment.

        Raises
        ------
        BadInput
            If the file cannot be read, is not TOML, or a setting is wrong.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BadInput(f"{path}: is not TOML: {error}") from None
        try:
            return cls.from_mapping(values | dict(overrides or {}))
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from None

    def __eq__(self, other: object) -> bool:
        """Two experiments are equal if all their keys mean the same."""
        return isinstance(other, Experiment) and not self.differing(other)

    def __hash__(self) -> int:
        """Hash the keys that are not expressions."""
        return hash(tuple(v for k, v in self.to_mapping().items() if k not in (*COMPONENTS, "probes")))

    def differing(self, other: Experiment) -> list[str]:
        """List the keys whose values do not mean the same in another experiment."""
        ours, theirs = self.to_mapping(), other.to_mapping()
        parts = {k: (v, getattr(other.parts, k)) for k, v in self.parts._asdict().items()}
        return [
            k for k, v in ours.items() if v != theirs[k] and not (k in parts and parts[k][0] == parts[k][1])
        ]

    def to_mapping(self) -> dict[str, Any]:
        """Return all keys, with hyphens, and their values."""
        return self.model_dump(by_alias=True)

    def to_toml(self) -> str:
        """Write all keys as TOML; reading it gives an equal experiment."""
        return tomli_w.dumps(self.to_mapping())

    def replace(self, changes: Mapping[str, Any]) -> Experiment:
        """Return a copy with some keys changed, validated again."""
        return type(self).from_mapping(self.to_mapping() | {_kebab(k): v for k, v in dict(changes).items()})


def _contains(rule: Any, kind: type | UnionType, persistent: bool = False) -> bool:
    """Say whether a local rule is of a kind, and persistent if so wished, or wraps one that is."""
    fields = [f.name for f in dataclasses.fields(rule)] if dataclasses.is_dataclass(rule) else []
    if isinstance(rule, kind) and (not persistent or rule.persistent):  # type: ignore[attr-defined]
        return True
    return "inner" in fields and _contains(rule.inner, kind, persistent)  # type: ignore[attr-defined]


def parse_override(text: str) -> tuple[str, Any]:
    """Read ``KEY=VALUE`` of a command line; the value is TOML, or a string where it is not.

    Parameters
    ----------
    text : str
        For instance ``rounds=10`` or ``client=SGD(lr=0.5)``.

    Returns
    -------
    tuple of str and object
        Key and value.

    Raises
    ------
    BadInput
        If there is no ``=``.

    Examples
    --------
    >>> parse_override("rounds=10"), parse_override("client=SGD(lr=0.5)")
    (('rounds', 10), ('client', 'SGD(lr=0.5)'))
    """
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise BadInput(f"-o {text!r}: write KEY=VALUE, for instance -o rounds=10")
    try:
        read = tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        return name, value
    field = Experiment.model_fields.get(name.replace("-", "_"))
    is_text = field is not None and field.annotation is str
    return name, value if is_text and not isinstance(read, str | list) else read


def _allowed(kind: str, limit: Mapping[str, Any], value: Any) -> str:
    """Say what pydantic's check of this kind allows."""
    signs = {"greater_than": ("> ", "gt"), "greater_than_equal": (">= ", "ge")}
    signs |= {"less_than": ("< ", "lt"), "less_than_equal": ("<= ", "le")}
    if kind in signs:
        sign, name = signs[kind]
        return f"{sign}{limit[name]:g}"
    if kind == "literal_error":
        names = limit["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        hint = nearest(value, names).strip() if isinstance(value, str) else ""
        return limit["expected"] + (f"; {hint}" if hint else "")
    words = {
        "int_type": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": "a string",
        "string_pattern_mismatch": "'auto', 'cpu', 'cuda' or 'cuda:<number>'",
    }
    return words.get(kind, kind.replace("_", " "))


__all__ = ["REGISTRY", "BadInput", "Experiment", "Parts", "parse_override"]
