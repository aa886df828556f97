"""Plain NumPy reference of Local-GD and Local-SGD on linear classifiers, all nodes in one product, float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fedsim.analysis.direction import Loss, Weights, node_weights, smoothness
from fedsim.analysis.projections import anchor_factor


class Trajectory(Protocol):
    """Averaged weights ``[K + 1, d]`` of a run on signed rows; any engine may stand behind it."""

    def __call__(
        self,
        zs: Sequence[np.ndarray],
        local_steps: int,
        rounds: int,
        mode: str = "fixed",
        *,
        c: float = 1.0,
        eta: float | None = None,
        p: Weights = "uniform",
        loss: Loss = "logistic",
        pull: float = 0.0,
        anchored: bool = False,
        indices: np.ndarray | None = None,
        start: np.ndarray | None = None,
    ) -> np.ndarray: ...


def step_size(zs: Sequence[np.ndarray], local_steps: int, mode: str, c: float = 1.0) -> float:
    """``c / beta`` (fixed) or ``c / (beta L)`` (scaled); beta is that of the logistic loss."""
    return c / smoothness(zs) / (local_steps if mode == "scaled" else 1)


def reference(
    zs: Sequence[np.ndarray],
    local_steps: int,
    rounds: int,
    mode: str = "fixed",
    *,
    c: float = 1.0,
    eta: float | None = None,
    p: Weights = "uniform",
    loss: Loss = "logistic",
    pull: float = 0.0,
    anchored: bool = False,
    indices: np.ndarray | None = None,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """Run K rounds; ``indices`` ``[K, M, L, b]`` replays given rows, else every step takes all rows."""
    eta = step_size(zs, local_steps, mode, c) if eta is None else eta
    weight = node_weights(zs, p)
    sizes = np.array([len(z) for z in zs])
    rows = np.zeros((len(zs), sizes.max(), zs[0].shape[1]))
    for i, z in enumerate(zs):
        rows[i, : len(z)] = z
    # A zero row adds nothing to the gradient, so padding needs no mask.
    back = rows.transpose(0, 2, 1) * (eta / sizes)[:, None, None]
    node = np.arange(len(zs))[:, None]
    out = np.zeros((rounds + 1, rows.shape[2]))
    if start is not None:
        out[0] = start
    for k in range(rounds):
        w = np.repeat(out[k][None, :, None], len(zs), axis=0)
        for step in range(local_steps):
            if indices is not None:
                picked = rows[node, indices[k, :, step]]
                rows_now, back_now = picked, picked.transpose(0, 2, 1) * (eta / picked.shape[1])
            else:
                rows_now, back_now = rows, back
            s = rows_now @ w
            slope = np.exp(-s) if loss == "exponential" else 0.5 * (1 - np.tanh(0.5 * s))
            move = back_now @ slope
            if pull:
                move = move - eta * pull * (w - out[k][None, :, None])
            w = w + move
        out[k + 1] = anchor_factor(k + 1, anchored) * (weight @ w[:, :, 0])
    return out
