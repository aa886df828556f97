"""Range checks of arguments: one clear line that names the class, the argument, the value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Collection


def _fail(owner: object, name: str, allowed: str) -> None:
    raise ValueError(f"{type(owner).__name__}: {name} = {getattr(owner, name)!r} must be {allowed}")


def positive(owner: object, *names: str) -> None:
    """Demand that attributes of ``owner`` are > 0."""
    for name in names:
        if not getattr(owner, name) > 0:
            _fail(owner, name, "> 0")


def nonnegative(owner: object, *names: str) -> None:
    """Demand that attributes of ``owner`` are >= 0."""
    for name in names:
        if not getattr(owner, name) >= 0:
            _fail(owner, name, ">= 0")


def unit(owner: object, *names: str) -> None:
    """Demand that attributes of ``owner`` are in [0, 1)."""
    for name in names:
        if not 0 <= getattr(owner, name) < 1:
            _fail(owner, name, "in [0, 1)")


def share(owner: object, *names: str) -> None:
    """Demand that attributes of ``owner`` are in [0, 1]."""
    for name in names:
        if not 0 <= getattr(owner, name) <= 1:
            _fail(owner, name, "in [0, 1]")


def finite(owner: object, *names: str) -> None:
    """Demand that attributes of ``owner`` are neither infinite nor NaN."""
    for name in names:
        if not math.isfinite(getattr(owner, name)):
            _fail(owner, name, "finite")


def at_least(owner: object, low: float, *names: str) -> None:
    """Demand that attributes of ``owner`` are >= ``low``."""
    for name in names:
        if not getattr(owner, name) >= low:
            _fail(owner, name, f">= {low}")


def one_of(owner: object, name: str, allowed: Collection[str]) -> None:
    """Demand that an attribute of ``owner`` is one of the allowed strings."""
    if getattr(owner, name) not in allowed:
        _fail(owner, name, "one of " + ", ".join(map(repr, allowed)))
