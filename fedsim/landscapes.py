"""Functions of a few parameters as models, from which workers start apart: for pictures and closed forms.

The output of such a model is its value, whatever the input; with ``data = "Blank()"``, ``partition = "Natural()"`` and
``objective = "Value()"`` workers minimise it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fedsim.random import numpy_generator
from fedsim.tree import Stack


@runtime_checkable
class StartsApart(Protocol):
    """A model whose workers start from different parameters; the server starts from their mean."""

    def starts(self, num_workers: int, seed: int, shape: tuple[int, ...]) -> Stack:
        """Return the initial rows for samples of ``shape``, leaves ``[W, *]`` float64."""
        ...


class _Landscape(nn.Module):
    """A module with one parameter, ``position``, whose output is `value` for every sample."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(*shape))

    def value(self, position: Tensor) -> Tensor:
        """Return the function's value, a scalar."""
        return position.new_zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """Return the value for each of the samples, ``[B, 1]``."""
        return self.value(self.position).expand(x.shape[0], 1)


class _Sinc(_Landscape):
    def value(self, position: Tensor) -> Tensor:
        return torch.sinc(position.square().sum().sqrt())


class _DoubleWell(_Landscape):
    def value(self, position: Tensor) -> Tensor:
        return (position.square() - 1).square().sum() / 4


class _Factorisation(_Landscape):
    """The products that are needed, so that nothing of size N x N is formed."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``|U U^T - X X^T|_F^2 / 4`` for targets U, ``[B, N, r] -> [B, 1]``."""
        own, cross, theirs = self.position.T @ self.position, x.mT @ self.position, x.mT @ x
        value = own.square().sum() - 2 * cross.square().sum((1, 2)) + theirs.square().sum((1, 2))
        return value[:, None] / 4


def _given(name: str, starts: Sequence[float | tuple[float, ...]], num_workers: int) -> Tensor:
    if len(starts) != num_workers:
        raise ValueError(f"{name}: starts has {len(starts)} points, for {num_workers} workers")
    return torch.tensor(starts, dtype=torch.float64)


@dataclass(frozen=True)
class Scalar:
    """The model ``x -> w x`` with one weight, from which workers start apart; for ``Parabolas``.

    Parameters
    ----------
    starts_at : tuple of float
        Initial weight of each worker.
    """

    starts_at: tuple[float, ...] = (3.0, -2.0, 1.0, 4.0)

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        """Build the module ``[B, 1] -> [B, 1]``."""
        if input_shape != (1,) or num_outputs != 1:
            raise ValueError(f"Scalar: input_shape = {input_shape} must be (1,), and num_outputs 1")
        return nn.Sequential(nn.Linear(1, 1, bias=False))

    def starts(self, num_workers: int, seed: int, shape: tuple[int, ...]) -> Stack:
        """Return the weights, ``[W, 1, 1]``."""
        return {"0.weight": _given("Scalar", self.starts_at, num_workers)[:, None, None]}


@dataclass(frozen=True)
class Sinc:
    """``L(x, y) = sin(pi r) / (pi r)`` with ``r = |(x, y)|``: rings of local minima, the deepest at r = 1.43, ``L = -0.2172``.

    Parameters
    ----------
    starts_at : tuple of tuple of float
        Initial position of each worker.

    References
    ----------
    The toy of Teng et al. (2019), arXiv:1905.10395; these starts and step sizes are ours.
    """

    starts_at: tuple[tuple[float, float], ...] = ((-6.0, -4.0), (-15.0, -18.0), (20.0, 11.0), (17.0, 8.0))

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        """Build the module."""
        return _Sinc(2)

    def starts(self, num_workers: int, seed: int, shape: tuple[int, ...]) -> Stack:
        """Return the positions, ``[W, 2]``."""
        return {"position": _given("Sinc", self.starts_at, num_workers)}


@dataclass(frozen=True)
class DoubleWell:
    """``(x^2 - 1)^2 / 4``: minima at -1 and 1.

    Parameters
    ----------
    starts_at : tuple of float
        Initial position of each worker.
    """

    starts_at: tuple[float, ...] = (-0.8, 0.9)

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        """Build the module."""
        return _DoubleWell(1)

    def starts(self, num_workers: int, seed: int, shape: tuple[int, ...]) -> Stack:
        """Return the positions, ``[W, 1]``."""
        return {"position": _given("DoubleWell", self.starts_at, num_workers)[:, None]}


@dataclass(frozen=True)
class Factorisation:
    """``|U U^T - X X^T|_F^2 / 4`` over ``X [size, rank]`` for the target U of ``data = "LowRank(...)"``.

    Entries of the workers' starts are N(0, 1). Values are exact to about ``1e-15 size^2``: use ``dtype = "float64"``.
    """

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        """Build the module for targets of ``input_shape``, (size, rank)."""
        if len(input_shape) != 2:
            raise ValueError(
                f"Factorisation: input_shape = {input_shape} must be (size, rank), as of LowRank()"
            )
        return _Factorisation(*input_shape)

    def starts(self, num_workers: int, seed: int, shape: tuple[int, ...]) -> Stack:
        """Draw the starts, ``[W, size, rank]``."""
        draw = numpy_generator(seed, "starts").standard_normal((num_workers, *shape))
        return {"position": torch.from_numpy(draw)}
