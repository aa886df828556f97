"""What the arithmetic alone costs when it is batched by hand for one model: a limit, not a simulator.

For chains of affine maps and ReLU: batched matrix products, a written backward pass, in-place updates. For the small CNN the fastest of three: a lean loop, the same in threads,
and grouped convolutions with ordinary autograd. No loss is computed on the way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problem import Problem, Trained

Local = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Local steps and merge: ``(theta [P], rows [K, S, B], share [K]) -> [P]``."""


def train(file: Path, rounds: int, device: str) -> Trained:
    """Run the fastest candidate for the problem's model."""
    problem = Problem.load(file)
    x, y = torch.from_numpy(problem.x).to(device), torch.from_numpy(problem.y).to(device)
    theta = torch.cat([torch.from_numpy(v).flatten() for v in problem.theta.values()]).to(device)
    candidates: dict[str, Local] = {}
    if problem.model == "cnn":
        one = LeanLoop(problem, x, y)
        candidates["lean loop"] = one.all
        if device == "cpu" and torch.get_num_threads() > 1:
            candidates["lean loop in threads"] = Threads(one, torch.get_num_threads()).all
        candidates["grouped convolutions"] = Grouped(problem, x, y).all
    else:
        chain = Chain(problem, x, y, problem.participants).all
        candidates["batched products"] = chain
        if device == "cpu" and torch.get_num_threads() > 1:
            candidates["batched products, one thread"] = in_one_thread(chain)
            candidates["batched products in threads"] = ChainThreads(
                problem, x, y, torch.get_num_threads()
            ).all
    rounds_of = Rounds(problem, device)
    name = rounds_of.fastest(candidates, theta)
    ends = []
    for _ in range(rounds):
        theta = rounds_of.one(candidates[name], theta)
        ends.append(time.monotonic())
    model = {k: v.cpu().numpy() for k, v in views(problem, theta[None]).items()}
    return Trained(ends, {k: v[0] for k, v in model.items()}, name)


def in_one_thread(local: Local) -> Local:
    """Let local steps use one thread, which is faster where products are tiny."""

    def inner(theta: Tensor, rows: Tensor, share: Tensor) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return local(theta, rows, share)
        finally:
            torch.set_num_threads(before)

    return inner


def views(problem: Problem, flat: Tensor) -> dict[str, Tensor]:
    """Return the leaves ``[K, *]`` of flat parameters ``[K, P]``, without copying."""
    sizes = [v.size for v in problem.theta.values()]
    parts = flat.split(sizes, dim=1)
    return {k: part.unflatten(1, v.shape) for (k, v), part in zip(problem.theta.items(), parts, strict=True)}


class Rounds:
    """Draws participants and batches, and merges."""

    def __init__(self, problem: Problem, device: str) -> None:
        self.problem, self.device = problem, device
        self.chooser = np.random.default_rng(0)
        self.generator = torch.Generator(device).manual_seed(0)
        self.order = torch.from_numpy(problem.order).to(device)
        self.offsets = torch.from_numpy(problem.offsets).to(device)

    def one(self, local: Local, theta: Tensor) -> Tensor:
        """Make one round."""
        p = self.problem
        chosen = self.chooser.choice(p.num_workers, p.participants, replace=False)
        workers = torch.from_numpy(np.sort(chosen)).to(self.device)
        first = self.offsets[workers]
        size = self.offsets[workers + 1] - first
        u = torch.rand(len(chosen), p.steps * p.batch, generator=self.generator, device=self.device)
        rows = self.order[first[:, None] + (u * size[:, None]).long()].view(-1, p.steps, p.batch)
        theta = local(theta, rows, (size / size.sum()).to(theta.dtype))
        if self.device != "cpu":
            torch.cuda.synchronize()
        return theta

    def fastest(self, candidates: dict[str, Local], theta: Tensor) -> str:
        """Return the name of the candidate with the shortest round of three, after one to warm up."""
        if len(candidates) == 1:
            return next(iter(candidates))
        seconds = {}
        for name, local in candidates.items():
            self.one(local, theta)
            taken = []
            for _ in range(3):
                start = time.perf_counter()
                self.one(local, theta)
                taken.append(time.perf_counter() - start)
            seconds[name] = min(taken)
        return min(seconds, key=lambda name: seconds[name])


class Chain:
    """Affine maps with ReLU between them, for softmax regression and the multilayer perceptron."""

    def __init__(self, problem: Problem, x: Tensor, y: Tensor, workers: int) -> None:
        self.problem = problem
        self.x = x.flatten(1)
        self.target = F.one_hot(y).to(x.dtype)
        # A block a leaf: on slices of a flat vector a worker, torch loops over the workers of a product.
        self.leaves = [torch.empty(workers, *v.shape, device=x.device) for v in problem.theta.values()]
        self.layers = list(zip(self.leaves[0::2], self.leaves[1::2], strict=True))

    def all(self, theta: Tensor, rows: Tensor, share: Tensor) -> Tensor:
        """Make the local steps of all workers at once."""
        for leaf, start in zip(self.leaves, views(self.problem, theta[None]).values(), strict=True):
            leaf.copy_(start.expand_as(leaf))
        for index in rows.transpose(0, 1).reshape(self.problem.steps, -1):
            self._step(index)
        return torch.cat([share @ leaf.flatten(1) for leaf in self.leaves])

    def _step(self, index: Tensor) -> None:
        rate = -self.problem.lr / self.problem.batch
        h = self.x.index_select(0, index).view(-1, self.problem.batch, self.x.shape[1])
        inputs = [h]
        for weight, bias in self.layers[:-1]:
            h = torch.baddbmm(bias[:, None], h, weight.mT).relu_()
            inputs.append(h)
        weight, bias = self.layers[-1]
        z = torch.baddbmm(bias[:, None], h, weight.mT)
        delta = z.sub_(z.amax(2, keepdim=True)).exp_()  # torch.softmax is slow over a short axis
        delta.div_(delta.sum(2, keepdim=True))
        delta.sub_(self.target.index_select(0, index).view_as(delta))
        for i in reversed(range(len(self.layers))):
            (weight, bias), h = self.layers[i], inputs[i]
            below = torch.bmm(delta, weight) if i else delta
            weight.baddbmm_(delta.mT, h, alpha=rate)
            bias.add_(delta.sum(1), alpha=rate)
            delta = torch.ops.aten.threshold_backward(below, h, 0) if i else below


class ChainThreads:
    """`Chain` in threads with one core and some of the workers each."""

    def __init__(self, problem: Problem, x: Tensor, y: Tensor, threads: int) -> None:
        parts = np.array_split(np.arange(problem.participants), threads)
        self.places = [slice(part[0], part[-1] + 1) for part in parts if len(part)]
        self.chains = [Chain(problem, x, y, at.stop - at.start) for at in self.places]
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def all(self, theta: Tensor, rows: Tensor, share: Tensor) -> Tensor:
        """Make the local steps of all workers."""
        jobs = [
            self.pool.submit(chain.all, theta, rows[at], share[at])
            for chain, at in zip(self.chains, self.places, strict=True)
        ]
        return torch.stack([job.result() for job in jobs]).sum(0)


class LeanLoop:
    """One worker after the other without module, optimiser or copies."""

    def __init__(self, problem: Problem, x: Tensor, y: Tensor) -> None:
        self.problem, self.x, self.y = problem, x, y

    def all(self, theta: Tensor, rows: Tensor, share: Tensor) -> Tensor:
        """Make the local steps of all workers."""
        return share @ torch.stack([self.one(theta, index) for index in rows])

    def one(self, theta: Tensor, rows: Tensor) -> Tensor:
        """Make the local steps of one worker, ``rows [S, B]``."""
        leaves = [v[0].clone().requires_grad_() for v in views(self.problem, theta[None]).values()]
        for index in rows:
            loss = F.cross_entropy(_cnn(leaves, self.x[index]), self.y[index])
            gradients = torch.autograd.grad(loss, leaves)
            with torch.no_grad():
                for leaf, gradient in zip(leaves, gradients, strict=True):
                    leaf.sub_(gradient, alpha=self.problem.lr)
        return torch.cat([v.detach().flatten() for v in leaves])


class Threads:
    """`LeanLoop` in threads with one core each; PyTorch releases the interpreter's lock."""

    def __init__(self, loop: LeanLoop, threads: int) -> None:
        self.loop = loop
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def all(self, theta: Tensor, rows: Tensor, share: Tensor) -> Tensor:
        """Make the local steps of all workers."""
        return share @ torch.stack(list(self.pool.map(lambda index: self.loop.one(theta, index), rows)))


class Grouped:
    """All workers in grouped convolutions, with ordinary autograd of the summed loss."""

    def __init__(self, problem: Problem, x: Tensor, y: Tensor) -> None:
        self.problem, self.x, self.y = problem, x, y

    def all(self, theta: Tensor, rows: Tensor, share: Tensor) -> Tensor:
        """Make the local steps of all workers at once."""
        k = len(rows)
        flat = theta.expand(k, -1)
        leaves = [v.clone().requires_grad_() for v in views(self.problem, flat).values()]
        for index in rows.transpose(0, 1):
            joined = self.x[index].transpose(0, 1).flatten(1, 2)  # [B, K * C, H, W]
            output = self._forward(leaves, joined, k)
            losses = F.cross_entropy(output.flatten(0, 1), self.y[index].flatten(), reduction="sum")
            gradients = torch.autograd.grad(losses / self.problem.batch, leaves)
            with torch.no_grad():
                for leaf, gradient in zip(leaves, gradients, strict=True):
                    leaf.sub_(gradient, alpha=self.problem.lr)
        return torch.cat([share @ v.detach().flatten(1) for v in leaves])

    def _forward(self, leaves: list[Tensor], h: Tensor, k: int) -> Tensor:
        for weight, bias in zip(leaves[0:4:2], leaves[1:4:2], strict=True):
            h = F.conv2d(h, weight.flatten(0, 1), bias.flatten(), padding=1, groups=k)
            h = F.max_pool2d(F.relu(h), 2)
        features = h.unflatten(1, (k, -1)).transpose(0, 1).flatten(2)  # [K, B, features]
        return torch.baddbmm(leaves[5][:, None], features, leaves[4].mT)


def _cnn(leaves: list[Tensor], x: Tensor) -> Tensor:
    h = F.max_pool2d(F.relu(F.conv2d(x, leaves[0], leaves[1], padding=1)), 2)
    h = F.max_pool2d(F.relu(F.conv2d(h, leaves[2], leaves[3], padding=1)), 2)
    return F.linear(h.flatten(1), leaves[4], leaves[5])
