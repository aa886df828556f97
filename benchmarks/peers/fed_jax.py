"""FedJAX: ``pip install fedjax jax dm-haiku``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import fedjax  # pyright: ignore[reportMissingImports]
import jax  # pyright: ignore[reportMissingImports]
import jax.numpy as jnp  # pyright: ignore[reportMissingImports]
import numpy as np
from fedjax.algorithms import fed_avg  # pyright: ignore[reportMissingImports]

from benchmarks.problem import Problem, Trained

PAIR = [(1, 1), (1, 1)]


def _convolved(x: Any, weight: Any, bias: Any) -> Any:
    """Return convolution, ReLU and 2x2 maximum of ``[B, C, H, W]``."""
    x = jax.lax.conv_general_dilated(x, weight, (1, 1), PAIR) + bias[:, None, None]
    return jax.lax.reduce_window(jax.nn.relu(x), -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")


def forward(params: dict[str, Any], x: Any) -> Any:
    """Return the outputs of the linear model, the perceptron or the CNN, by the number of parameters."""
    layers = sorted({k.split(".")[0] for k in params}, key=int)
    p = [params[f"{layer}.{kind}"] for layer in layers for kind in ("weight", "bias")]
    if len(p) == 6:
        x = _convolved(_convolved(x, p[0], p[1]), p[2], p[3])
        p = p[4:]
    x = x.reshape(len(x), -1)
    if len(p) == 4:
        x = jax.nn.relu(x @ p[0].T + p[1])
        p = p[2:]
    return x @ p[0].T + p[1]


def per_example_loss(params: dict[str, Any], batch: dict[str, Any], rng: Any) -> Any:
    """Return the cross-entropy of each row."""
    logs = jax.nn.log_softmax(forward(params, batch["x"]))
    return -jnp.take_along_axis(logs, batch["y"][:, None], axis=1)[:, 0]


def train(file: Path, rounds: int, device: str) -> Trained:
    """Run the library's federated averaging; its batches are full, from a repeated shuffle."""
    problem = Problem.load(file)
    clients = {
        str(i).encode(): {"x": problem.x[problem.rows(i)], "y": problem.y[problem.rows(i)]}
        for i in range(problem.num_workers)
    }
    sampler = fedjax.client_samplers.UniformGetClientSampler(
        fedjax.InMemoryFederatedData(clients), num_clients=problem.participants, seed=0
    )
    algorithm = fed_avg.federated_averaging(
        fedjax.grad(per_example_loss),
        fedjax.optimizers.sgd(problem.lr),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(problem.batch, num_epochs=None, num_steps=problem.steps),
    )
    state = algorithm.init({k: jnp.asarray(v) for k, v in problem.theta.items()})
    ends = []
    for _ in range(rounds):
        state, _ = algorithm.apply(state, sampler.sample())
        jax.block_until_ready(state.params)
        ends.append(time.monotonic())
    return Trained(ends, {k: np.asarray(v) for k, v in state.params.items()})
