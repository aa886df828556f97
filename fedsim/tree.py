"""Arithmetic on trees of tensors.

A *tree* is one model, ``dict[str, Tensor]`` with leaves ``[*]``. A *stack* is the same tree for W workers,
with leaves ``[W, *]``. A federation is a stack; averaging is a mean over axis 0, a leader is an index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Tree = dict[str, Tensor]
Stack = dict[str, Tensor]


def tree_map(f: Callable[..., Tensor], *trees: Tree) -> Tree:
    """Apply ``f`` leaf by leaf: ``out[k] = f(a[k], b[k], ...)``.

    Parameters
    ----------
    f : callable
        Takes one leaf of every tree.
    *trees : Tree
        Trees with the same keys.

    Returns
    -------
    Tree
        The results under the keys of the first tree.
    """
    first = trees[0]
    return {k: f(*(t[k] for t in trees)) for k in first}


def add(a: Tree, b: Tree) -> Tree:
    """Sum ``a + b``."""
    return tree_map(torch.add, a, b)


def sub(a: Tree, b: Tree) -> Tree:
    """Difference ``a - b``."""
    return tree_map(torch.sub, a, b)


def scale(s: float | Tensor, a: Tree) -> Tree:
    """Multiple ``s a``; ``s`` is a number or a scalar tensor."""
    return tree_map(lambda x: s * x, a)


def axpy(s: float | Tensor, a: Tree, b: Tree) -> Tree:
    """Scaled sum ``s a + b``; ``s`` is a number or a scalar tensor."""
    return tree_map(lambda x, y: s * x + y, a, b)


def lerp(a: Tree, b: Tree, t: float | Tensor) -> Tree:
    """Point ``a + t (b - a)`` on the line from ``a`` (t = 0) to ``b`` (t = 1)."""
    return tree_map(lambda x, y: x + t * (y - x), a, b)


def dot(a: Tree, b: Tree) -> Tensor:
    """Inner product of all entries of one tree with another, a scalar."""
    products = [(a[k] * b[k]).sum() for k in a]
    return torch.stack(products).sum()


def norm(a: Tree) -> Tensor:
    """Euclidean norm over all leaves together, a scalar."""
    return dot(a, a).sqrt()


def where(condition: Tensor, a: Tree, b: Tree) -> Tree:
    """Choose ``a`` where the scalar ``condition`` holds, else ``b``."""
    return tree_map(lambda x, y: torch.where(condition, x, y), a, b)


def zeros_like(a: Tree) -> Tree:
    """Tree of zeros of the same shapes."""
    return tree_map(torch.zeros_like, a)


def clone(a: Tree) -> Tree:
    """Copy of every leaf."""
    return tree_map(torch.clone, a)


def num_parameters(a: Tree) -> int:
    """Count the entries P of a tree."""
    return sum(x.numel() for x in a.values())


def stack(trees: Sequence[Tree]) -> Stack:
    """Stack W trees into leaves ``[W, *]``."""
    return {k: torch.stack([t[k] for t in trees]) for k in trees[0]}


def replicate(a: Tree, num_workers: int) -> Stack:
    """Give each of ``num_workers`` workers a copy of its own: leaves ``[W, *]``, never an expanded view."""
    return tree_map(lambda x: x.expand(num_workers, *x.shape).clone(), a)


def take(rows: Stack, index: int | Tensor | slice) -> Tree:
    """Take rows by position: a number gives one tree, a tensor or slice a stack."""
    return tree_map(lambda x: x[index], rows)


def num_rows(rows: Stack) -> int:
    """Count the workers W of a stack."""
    return next(iter(rows.values())).shape[0]


def concat(stacks: Sequence[Stack]) -> Stack:
    """Join stacks along the worker axis."""
    if len(stacks) == 1:
        return stacks[0]
    return {k: torch.cat([s[k] for s in stacks]) for k in stacks[0]}


def mean(rows: Stack, weight: Tensor) -> Tree:
    """Weighted mean over workers, ``sum_i weight_i rows_i / sum_i weight_i``.

    Parameters
    ----------
    rows : Stack
        Leaves ``[W, *]``.
    weight : Tensor
        ``[W]``, nonnegative, not all zero.

    Returns
    -------
    Tree
        Leaves ``[*]``.
    """
    if len(weight) == 1:
        return take(rows, 0)
    w = weight / weight.sum()

    def average(x: Tensor) -> Tensor:
        return torch.mv(x.reshape(x.shape[0], -1).T, w.to(x.dtype)).reshape(x.shape[1:])

    return tree_map(average, rows)


def flatten(a: Tree) -> Tensor:
    """Join all leaves of one tree into a vector ``[P]``, in key order of the dictionary."""
    return torch.cat([x.reshape(-1) for x in a.values()])


def flatten_rows(rows: Stack) -> Tensor:
    """Join all leaves of a stack into a matrix ``[W, P]``."""
    return torch.cat([x.reshape(x.shape[0], -1) for x in rows.values()], dim=1)


def unflatten(vector: Tensor, like: Tree) -> Tree:
    """Cut ``[..., P]`` into views with the shapes of the tree ``like``; leading axes are kept."""
    out, start = {}, 0
    lead = vector.shape[:-1]
    for k, x in like.items():
        out[k] = vector[..., start : start + x.numel()].view(torch.Size((*lead, *x.shape)))
        start += x.numel()
    return out


def map_nested(f: Callable[[Tensor], Tensor], nested: dict[str, Any]) -> dict[str, Any]:
    """Apply ``f`` to every tensor of nested dictionaries."""
    return {k: map_nested(f, v) if isinstance(v, dict) else f(v) for k, v in nested.items()}


def flatten_nested(nested: dict[str, Any], prefix: str = "") -> Tree:
    """Flatten nested dictionaries into one level, names joined by ``/``; the inverse of `unflatten_nested`."""
    out: Tree = {}
    for k, v in nested.items():
        out |= flatten_nested(v, f"{prefix}{k}/") if isinstance(v, dict) else {prefix + k: v}
    return out


def unflatten_nested(flat: Tree) -> dict[str, Any]:
    """Rebuild nested dictionaries from names joined by ``/``."""
    out: dict[str, Any] = {}
    for name, x in flat.items():
        *path, last = name.split("/")
        level = out
        for k in path:
            level = level.setdefault(k, {})
        level[last] = x
    return out
