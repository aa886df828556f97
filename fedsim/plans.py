"""Plans: ways to run the same local steps of many workers, interchangeable and tested equal.

* `Stacked`: layers with a worker axis (`fedsim.stacked`); for chains of affine maps and activations the
  backward pass is written out, and plain gradient descent updates in place; on a CPU threads share the workers;
* `Vmap`: ``torch.func`` on the module as it is; takes any functional model;
* `Compiled`: `Vmap` through ``torch.compile``;
* `fedsim.captured.Captured`: `Stacked` or `Vmap` as one CUDA graph a round;
* `Loop`: one worker after the other, in threads on a CPU; the reference, and the fastest for convolutions.
"""

from __future__ import annotations

import copy
import itertools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from clients import SGD, LocalRule, Oracle, State, Told
from clients.base import Part
from fedsim import random, threads, tree
from fedsim.batches import Batches
from fedsim.invariance import part_weights, slope_of
from fedsim.objectives import Objective
from fedsim.span import Span
from fedsim.stacked import Chain, Unsupported, laid_out, stack_module, weighted_loss
from fedsim.tree import Stack, Tree

BLOCK = 4 * 2**20
"""Bytes of features gathered at a time: small enough for a cache, large enough to be few calls."""


Follow = Callable[[int, Stack, slice, bool], Stack]
"""What is done to the rows at some positions after a step, in place if the last argument allows it."""

Cut = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Features of minibatches ``[*, B]``, given who uses them and in which step."""


class Work(NamedTuple):
    """Local work of m workers for one round, sorted by steps, longest first.

    Attributes
    ----------
    anchor : Stack
        Rows at the start of the round, leaves ``[m, *]``; not changed.
    state : State
        State of the local rule, leaves ``[m, *]``.
    broadcast : dict of str to Tree
        What the server sent.
    x, y : Tensor
        Features and targets of the data set.
    batches : Batches
        Which rows are used when.
    worker : Tensor
        ``[m]`` ids.
    stream : int or Tensor
        Key of the round's uniform numbers.
    follow : callable or None
        ``(t, rows, positions, in_place) -> rows``: what is done to the rows at some positions after step t.
    record : bool
        Whether the loss of every single step is asked for.
    cut : callable or None
        ``(rows, worker, step) -> features``, where steps do not take the features as they are (see `fedsim.data.Cuts`).
    place : Stack or None
        Memory in which the rows are wanted at the end.
    """

    anchor: Stack
    state: State
    broadcast: dict[str, Tree]
    x: Tensor
    y: Tensor
    batches: Batches
    worker: Tensor
    stream: int | Tensor
    follow: Follow | None = None
    record: bool = False
    cut: Cut | None = None
    place: Stack | None = None

    def begin(self) -> Stack:
        """Copy the rows at the start, to their place if they have one, for steps without autograd.

        Autograd takes what another thread does to its part of the memory for a change of this one's.

        Returns
        -------
        Stack
            The copy.
        """
        if self.place is None:
            return tree.clone(self.anchor)
        return {k: self.place[k].copy_(x) for k, x in self.anchor.items()}

    def end(self, rows: Stack) -> Stack:
        """Return the rows at the end, in one piece and in their place if they have one.

        Parameters
        ----------
        rows : Stack
            The rows at the end.

        Returns
        -------
        Stack
            Equal rows.
        """
        if self.place is None:
            # Gradients of autograd may be transposed, and so would be what was made of them.
            return tree.tree_map(Tensor.contiguous, rows)
        _overwrite(self.place, rows)
        return self.place

    def features(self, index: Tensor, worker: Tensor, step: Tensor) -> Tensor:
        """Gather the features of minibatches ``[*, B]`` that workers use in steps; both broadcast to ``*``."""
        return _gather(self.x, index) if self.cut is None else self.cut(index, worker, step)


class Done(NamedTuple):
    """Result of a `Work`: rows, state, sums over the steps, ``[m]``, and where asked for all losses, ``[m, T]``.

    ``idle`` counts the steps without a gradient; None where there are none.
    """

    rows: Stack
    state: State
    loss: Tensor
    gradients: Tensor
    losses: Tensor | None = None
    idle: Tensor | None = None


def _recorder(work: Work) -> Tensor | None:
    """Make room for the loss of every step."""
    shape = len(work.worker), len(work.batches.active)
    return torch.zeros(shape, dtype=torch.float64, device=work.worker.device) if work.record else None


class Plan(Protocol):
    """A way to run a `Work`."""

    def run(self, work: Work) -> Done:
        """Make all steps of all workers."""
        ...


class Batch(NamedTuple):
    """One step's minibatches: ``[a, B, *]``, ``[a, B, ...]`` and weights ``[a, B]`` (None if all equal)."""

    x: Tensor
    y: Tensor
    weight: Tensor | None


def _weights(batches: Batches, dtype: torch.dtype) -> Tensor | None:
    """Weights ``[T, m, B]`` of the entries: 1 / count for valid ones, 0 for padding."""
    if batches.valid is None:
        return None
    count = batches.valid.T[..., None]  # [T, m, 1]
    place = torch.arange(batches.rows.shape[-1], device=count.device)
    return (place < count).to(dtype) / count.clamp(min=1)


class _Feed:
    """Gathers minibatches, several steps at a time; full batches once for as long as workers stay the same."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._full: tuple[Tensor, Batch] | None = None

    def steps(self, work: Work) -> Iterator[tuple[int, Batch]]:
        """Yield for every step the number of active workers and their minibatches."""
        batches = work.batches
        rows = batches.rows.transpose(0, 1)  # [T, m, B]
        if rows.shape[0] == 1 and work.cut is None:
            yield from self._same(work, rows[0])
            return
        weight = _weights(batches, self.dtype)
        size = rows[0].numel() * work.x[0].numel() * work.x.element_size()
        block = max(1, BLOCK // max(1, size))
        for first in range(0, len(batches.active), block):
            a = batches.active[first]
            index = rows[first : min(first + block, len(batches.active)), :a].contiguous()
            steps = torch.arange(first, first + len(index), device=index.device)
            x, y = work.features(index, work.worker[:a], steps[:, None]), _gather(work.y, index)
            for t, own_x, own_y in zip(itertools.count(first), x.unbind(), y.unbind()):
                a = batches.active[t]
                if a < len(own_x):
                    own_x, own_y = own_x[:a], own_y[:a]
                yield a, Batch(own_x, own_y, None if weight is None else weight[t, :a])

    def _same(self, work: Work, rows: Tensor) -> Iterator[tuple[int, Batch]]:
        """Yield one minibatch for all steps."""
        if self._full is None or self._full[0] is not work.batches.rows:
            weight = _weights(work.batches, self.dtype)
            batch = Batch(_gather(work.x, rows), _gather(work.y, rows), None if weight is None else weight[0])
            self._full = (work.batches.rows, batch)
        full = self._full[1]
        for a in work.batches.active:
            if a == len(rows):
                yield a, full
            else:
                yield a, Batch(full.x[:a], full.y[:a], None if full.weight is None else full.weight[:a])


def _gather(data: Tensor, index: Tensor) -> Tensor:
    return data.index_select(0, index.reshape(-1)).view(*index.shape, *data.shape[1:])


class _Batched(ABC):
    """Plans that make one step of all active workers at a time.

    Parameters
    ----------
    rule : LocalRule
        What a worker does in a step.
    dtype : torch.dtype
        Of parameters and features.
    """

    def __init__(self, rule: LocalRule, dtype: torch.dtype) -> None:
        self.rule, self.dtype = rule, dtype
        self.feed = _Feed(dtype)

    @abstractmethod
    def step(self, theta: Stack, state: State, work: Work, u: Tensor, t: Tensor, batch: Batch) -> Any:
        """Make one step of the first a workers; returns rows, state and what they told, ``[a]``."""

    def run(self, work: Work) -> Done:
        """Make all steps of all workers."""
        return self.steps(work, self.feed)

    def steps(self, work: Work, feed: _Feed) -> Done:
        """Make all steps; workers that have finished are cut off and stay as they are."""
        m, total = len(work.worker), len(work.batches.active)
        theta, state = tree.clone(work.anchor), work.state
        times = torch.arange(total, device=work.worker.device)
        u = random.uniform(work.stream, times[:, None], work.worker).to(self.dtype)
        loss = torch.zeros(m, dtype=torch.float64, device=work.worker.device)
        gradients, idle, losses = torch.zeros_like(loss), torch.zeros_like(loss), _recorder(work)
        even = work.batches.active[-1] == m
        if not even:
            state = tree.map_nested(torch.clone, state)
        for t, (a, batch) in enumerate(feed.steps(work)):
            part, kept, inputs = theta, state, work
            if a < m:
                part = tree.take(theta, slice(a))
                kept = tree.map_nested(lambda x, a=a: x[:a], state)
                inputs = work._replace(anchor=tree.take(work.anchor, slice(a)))
            new, new_state, told = self.step(part, kept, inputs, u[t, :a], times[t], batch)
            if work.follow is not None:
                new = work.follow(t, new, slice(a), False)
            loss[:a] += told.loss
            if losses is not None:
                losses[:a, t] = told.loss
            gradients[:a] += told.gradients
            idle[:a] += told.gradients == 0
            if even:
                theta, state = new, new_state
            else:
                _overwrite(part, new)
                _overwrite(tree.flatten_nested(kept), tree.flatten_nested(new_state))
        return Done(
            work.end(theta),
            tree.map_nested(Tensor.contiguous, state),
            loss,
            gradients,
            losses,
            idle,
        )


class _Crew:
    """Threads that each make all steps of their own workers, instead of meeting after every operation.

    Parameters
    ----------
    parts : int
        How many.
    each : int
        Threads of torch that each of them uses.
    dtype : torch.dtype
        Of parameters and features.
    """

    def __init__(self, parts: int, each: int, dtype: torch.dtype) -> None:
        self.size = parts, each
        self.feeds = [_Feed(dtype) for _ in range(parts)]
        self.pool = _pool(parts, each)
        self._cut: tuple[Tensor, list[slice], list[Tensor]] | None = None

    def run(self, work: Work, steps: Callable[[Work, _Feed], Done]) -> Done:
        """Make the steps of all workers, about as many in each thread."""
        places, rows = self._places(work.batches)
        whole = {k: torch.empty(x.shape, dtype=x.dtype) for k, x in work.anchor.items()}
        work = work._replace(place=whole)
        works = [_part(work, at, own) for at, own in zip(places, rows, strict=True)]
        done = list(self.pool.map(steps, works, self.feeds))
        return Done(
            whole,
            tree.unflatten_nested(tree.concat([tree.flatten_nested(d.state) for d in done])),
            torch.cat([d.loss for d in done]),
            torch.cat([d.gradients for d in done]),
            _joined([d.losses for d in done], len(work.batches.active)),
            _joined([d.idle for d in done]),
        )

    def _places(self, batches: Batches) -> tuple[list[slice], list[Tensor]]:
        """Cut the workers; where full batches stay the same, their parts stay the same too."""
        if self._cut is None or self._cut[0] is not batches.rows:
            total, parts = batches.steps.cumsum(0), len(self.feeds)
            ends = torch.searchsorted(total, total[-1] * torch.arange(1, parts) / parts, right=True)
            edges = sorted({0, *ends.tolist(), len(total)})
            places = [slice(a, b) for a, b in itertools.pairwise(edges)]
            self._cut = (batches.rows, places, [batches.rows[at] for at in places])
        return self._cut[1:]


def _pool(size: int, each: int) -> ThreadPoolExecutor:
    """Start threads that use so many of torch's own; for all rounds, as new ones get all their memory from the system."""
    return ThreadPoolExecutor(size, initializer=torch.set_num_threads, initargs=(each,))


def _part(work: Work, at: slice, rows: Tensor) -> Work:
    """Return the work of some of the workers."""
    b, follow = work.batches, work.follow
    active = [min(a, at.stop) - at.start for a in b.active if a > at.start]
    valid = None if b.valid is None else b.valid[at, : len(active)]

    def shifted(t: int, rows: Stack, own: slice, in_place: bool) -> Stack:
        assert follow is not None
        return follow(t, rows, slice(at.start, at.start + own.stop), in_place)

    return work._replace(
        anchor=tree.take(work.anchor, at),
        place=None if work.place is None else tree.take(work.place, at),
        state=tree.map_nested(lambda x: x[at], work.state),
        batches=b._replace(order=b.order[at], steps=b.steps[at], active=active, rows=rows, valid=valid),
        worker=work.worker[at],
        follow=None if follow is None else shifted,
    )


def _joined(found: list[Tensor | None], width: int = 0) -> Tensor | None:
    """Join what all parts have, or none has; tables of losses get zeros for steps that a part does not make."""
    known = [F.pad(x, (0, width - x.shape[-1])) if width else x for x in found if x is not None]
    return torch.cat(known) if known else None


def _flops(work: Work) -> float:
    """Estimate the floating-point operations of a step of all workers, forward and backward."""
    samples = work.batches.rows[:, 0].numel() * work.y[0].numel()
    return 6.0 * samples * sum(x[0].numel() for x in work.anchor.values())


def _overwrite(old: Stack, new: Stack) -> None:
    for k, x in new.items():
        if x is not old[k]:
            old[k].copy_(x)


def _rounded(work: Work) -> bool:
    """Whether factors of products are rounded (see `fedsim.precision`)."""
    return torch.is_autocast_enabled(work.worker.device.type)


def _over(weight: Tensor, like: Tensor) -> Tensor:
    """Give weights ``[a, B]`` as many axes as ``like`` ``[a, B, ...]`` has."""
    return weight.view(*weight.shape, *(1,) * (like.ndim - 2))


def _summed(losses: list[Tensor], work: Work, mean: bool) -> tuple[Tensor, Tensor | None]:
    """Add up the samples' losses ``[a, B]`` of all steps, ``[m]``, at once; also return those of each step if asked for."""
    joined = torch.cat(losses)
    steps = (joined.mean(1) if mean else joined.sum(1)).double()
    shape = len(losses), len(work.worker)
    if len(losses[-1]) == len(work.worker):
        every = steps.view(shape)
    else:
        every = torch.zeros(shape, dtype=torch.float64, device=steps.device)
        for row, one in zip(every, steps.split([len(loss) for loss in losses]), strict=True):
            row[: len(one)] = one
    return every.sum(0), every.T if work.record else None


class Stacked(_Batched):
    """Layers with a worker axis; the local rule itself is batched by ``torch.vmap``.

    Parameters
    ----------
    module : nn.Module
        The model.
    objective : Objective
        What is minimised.
    rule : LocalRule
        What a worker does in a step.
    dtype : torch.dtype
        Of parameters and features.

    Raises
    ------
    Unsupported
        If the model has a layer without a form with a worker axis.
    """

    def __init__(self, module: nn.Module, objective: Objective, rule: LocalRule, dtype: torch.dtype) -> None:
        super().__init__(rule, dtype)
        self.objective = objective
        try:
            self.chain: Chain | None = Chain(module)
        except Unsupported:
            self.chain = None
        self.apply = stack_module(module)
        # A subclass of SGD may make another step.
        self.plain = self.chain is not None and type(rule) is SGD and not (rule.momentum or rule.weight_decay)
        self.span = None if self.chain is None else Span(self.chain, objective, rule)
        self.crew: _Crew | None = None

    def run(self, work: Work) -> Done:
        """Make all steps, in place where the rule is plain gradient descent on a chain."""
        done = self._in_span(work)
        if done is not None:
            return done
        flops = _flops(work)
        parts = min(threads.shares(flops), len(work.worker))
        if parts == 1 or work.x.device.type != "cpu" or _rounded(work):
            return self.steps(work, self.feed)
        each = min(torch.get_num_threads() // parts, threads.shares(flops / parts))
        if self.crew is None or self.crew.size != (parts, each):
            self.crew = _Crew(parts, each, self.dtype)
        return self.crew.run(work, self.steps)

    def steps(self, work: Work, feed: _Feed) -> Done:
        """Make all steps."""
        # In-place products take no rounded factors.
        plain = self.plain and not _rounded(work)
        return self._descend(work, feed) if plain else super().steps(work, feed)

    def _in_span(self, work: Work) -> Done | None:
        """Make all steps on the same rows, if they can be made within their span."""
        even = work.follow is None and not work.record and work.batches.active[-1] == len(work.worker)
        even = even and not _rounded(work)
        if self.span is None or not even or work.batches.rows.shape[1] > 1:
            return None
        total = len(work.batches.active)
        _, batch = next(self.feed.steps(work))
        if not self.span.fits(batch.x, total):
            return None
        rows, loss = self.span.descend(work.anchor, batch.x, batch.y, batch.weight, total)
        return Done(rows, work.state, loss, work.batches.steps.to(loss))

    def _descend(self, work: Work, feed: _Feed) -> Done:
        assert self.chain is not None
        assert isinstance(self.rule, SGD)
        m = len(work.worker)
        theta, losses = work.begin(), []
        for t, (a, batch) in enumerate(feed.steps(work)):
            part = theta if a == m else tree.take(theta, slice(a))
            output, inputs = self.chain.forward(part, batch.x)
            loss, delta = self.objective.loss_and_residual(output, batch.y)
            lr = self.rule.lr
            if batch.weight is None:
                lr /= loss.shape[1]  # instead of dividing delta
            else:
                loss, delta = loss * batch.weight, delta.mul_(_over(batch.weight, delta))
            losses.append(loss)
            self.chain.descend(part, inputs, delta, lr)
            if work.follow is not None:
                _overwrite(part, work.follow(t, part, slice(a), True))
        total, every = _summed(losses, work, mean=work.batches.valid is None)
        return Done(theta, work.state, total, work.batches.steps.to(total), every)

    def gradient(self, rows: Stack, batch: Batch, of: Objective | None = None) -> tuple[Stack, Tensor]:
        """Return each worker's gradient and loss at ``rows``, of the plan's objective or another."""
        objective = of or self.objective
        if self.chain is not None:
            output, inputs = self.chain.forward(rows, batch.x)
            loss, delta = objective.loss_and_residual(output.to(self.dtype), batch.y)
            if batch.weight is None:
                loss, delta = loss.mean(1), delta.div_(loss.shape[1])
            else:
                loss, delta = (loss * batch.weight).sum(1), delta.mul_(_over(batch.weight, delta))
            gradient = self.chain.gradient(rows, inputs, delta)
            return tree.tree_map(lambda x: x.to(self.dtype), gradient), loss
        with torch.enable_grad():
            leaves = {k: x.detach().requires_grad_() for k, x in rows.items()}
            output = self.apply(leaves, batch.x).to(self.dtype)
            loss = weighted_loss(objective, output, batch.y, batch.weight)
            gradients = torch.autograd.grad(loss.sum(), list(leaves.values()))
        return dict(zip(rows, gradients, strict=True)), loss.detach()

    def step(self, theta: Stack, state: State, work: Work, u: Tensor, t: Tensor, batch: Batch) -> Any:
        """Make one step; the rule's calls of ``oracle.grad`` come back here with all workers at once."""

        def gradient(rows: Stack) -> tuple[Stack, Tensor]:
            return self.gradient(rows, batch)

        def slope(at: Tree, part: Part, u: Tensor) -> tuple[Tree, Tensor]:
            weight, size = batch.weight, batch.y.shape[:2]
            if part != "all":
                even = torch.full(size, 1 / size[1], dtype=self.dtype, device=batch.y.device)
                weight = part_weights(even if weight is None else weight, part)
            here, of = batch._replace(weight=weight), slope_of(self.objective)
            *leaves, value = _AllWorkers.apply(
                lambda rows: self.gradient(rows, here, of), tuple(at), u, *at.values()
            )
            return dict(zip(at, leaves, strict=True)), value

        def one(
            theta: Tree, state: State, anchor: Tree, u: Tensor, x: Tensor, y: Tensor, worker: Tensor
        ) -> tuple[Tree, State, Told]:
            def grad(at: Tree) -> tuple[Tree, Tensor]:
                *leaves, loss = _AllWorkers.apply(gradient, tuple(at), u, *at.values())
                return dict(zip(at, leaves, strict=True)), loss

            own = partial(slope, u=u)
            oracle = Oracle(grad, anchor, work.broadcast, t, u, (x, y), own, worker)
            return self.rule.step(theta, state, oracle)

        return vmap(one)(theta, state, work.anchor, u, batch.x, batch.y, work.worker[: len(u)])


class _AllWorkers(torch.autograd.Function):
    """The gradient as an opaque operation: under ``vmap`` it is called once, with the rows of all workers."""

    generate_vmap_rule = False

    @staticmethod
    def forward(gradient: Callable, names: tuple[str, ...], u: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        """Never reached: ``u`` is batched, so `vmap` is called."""
        raise RuntimeError("a local rule asked for a gradient outside of its step")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing: nobody differentiates through a gradient."""

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride] - as torch documents it
        info: Any, in_dims: tuple, gradient: Callable, names: tuple[str, ...], u: Tensor, *leaves: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Compute the gradient of all workers at once."""
        rows = {}
        for k, x, d in zip(names, leaves, in_dims[3:], strict=True):
            rows[k] = x.expand(info.batch_size, *x.shape).clone() if d is None else x.movedim(d, 0)
        gradients, loss = gradient(rows)
        out = (*gradients.values(), loss)
        return out, (0,) * len(out)


class Vmap(_Batched):
    """One worker's step, batched as a whole by ``torch.vmap``.

    Parameters
    ----------
    module : nn.Module
        The model.
    objective : Objective
        What is minimised.
    rule : LocalRule
        What a worker does in a step.
    dtype : torch.dtype
        Of parameters and features.
    """

    def __init__(self, module: nn.Module, objective: Objective, rule: LocalRule, dtype: torch.dtype) -> None:
        super().__init__(rule, dtype)
        module = copy.deepcopy(
            module
        )  # where a layer is used twice, functional_call leaves its tensors behind

        def loss(theta: Tree, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
            return (objective.loss(functional_call(module, theta, (x,)), y) * weight).sum()

        def slope(theta: Tree, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
            return (slope_of(objective).loss(functional_call(module, theta, (x,)), y) * weight).sum()

        self.grad, self.slope = grad_and_value(loss), grad_and_value(slope)
        self.batched = self.step_all

    def step_all(
        self,
        theta: Stack,
        state: State,
        anchor: Stack,
        broadcast: dict[str, Tree],
        u: Tensor,
        t: Tensor,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        worker: Tensor,
    ) -> Any:
        """Make one step of all workers; all arguments are tensors, so that it can be compiled."""

        def one(
            theta: Tree,
            state: State,
            anchor: Tree,
            u: Tensor,
            x: Tensor,
            y: Tensor,
            weight: Tensor,
            worker: Tensor,
        ) -> tuple[Tree, State, Told]:
            oracle = Oracle(
                lambda at: self.grad(at, x, y, weight),
                anchor,
                broadcast,
                t,
                u,
                (x, y),
                lambda at, part: self.slope(at, x, y, part_weights(weight, part)),
                worker,
            )
            return self.rule.step(theta, state, oracle)

        return vmap(one)(theta, state, anchor, u, x, y, weight, worker)

    def step(self, theta: Stack, state: State, work: Work, u: Tensor, t: Tensor, batch: Batch) -> Any:
        """Make one step."""
        weight = batch.weight
        if weight is None:
            size = batch.x.shape[1]
            weight = torch.full((len(u), size), 1 / size, dtype=self.dtype, device=u.device)
        worker = work.worker[: len(u)]
        return self.batched(theta, state, work.anchor, work.broadcast, u, t, batch.x, batch.y, weight, worker)


class Compiled(Vmap):
    """`Vmap` through ``torch.compile``; needs a C++ compiler on the machine and seconds at the start."""

    def __init__(self, module: nn.Module, objective: Objective, rule: LocalRule, dtype: torch.dtype) -> None:
        super().__init__(module, objective, rule, dtype)
        self.batched = torch.compile(self.step_all, dynamic=True)


class Loop:
    """One worker after the other, each for all of its steps; on a CPU in as many threads as torch uses.

    Parameters
    ----------
    module : nn.Module
        The model.
    objective : Objective
        What is minimised.
    rule : LocalRule
        What a worker does in a step.
    dtype : torch.dtype
        Of parameters and features.
    """

    def __init__(self, module: nn.Module, objective: Objective, rule: LocalRule, dtype: torch.dtype) -> None:
        self.module, self.objective, self.rule, self.dtype = module, objective, rule, dtype
        # A subclass of SGD may make another step.
        self.plain = type(rule) is SGD and not (rule.momentum or rule.weight_decay)
        self._own = threading.local()
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def run(self, work: Work) -> Done:
        """Make all steps of each worker."""
        m = len(work.worker)
        times = torch.arange(len(work.batches.active), device=work.worker.device)
        u = random.uniform(work.stream, times[:, None], work.worker).to(self.dtype)
        if work.batches.valid is not None:  # read step by step, on the host
            work = work._replace(batches=work.batches._replace(valid=work.batches.valid.cpu()))
        threads = min(m, torch.get_num_threads()) if work.x.device.type == "cpu" else 1
        rounded = _rounded(work)  # not inherited by threads

        def one(i: int) -> Done:
            if not hasattr(self._own, "module"):  # its parameters are exchanged: one module a thread
                self._own.module = copy.deepcopy(self.module)
            with torch.autocast(work.x.device.type, torch.bfloat16, enabled=rounded, cache_enabled=False):
                return self._one(self._own.module, work, u, i)

        if threads == 1:
            ordered = [one(i) for i in range(m)]
        else:
            if self._pool is None or self._pool[0] != threads:
                self._pool = threads, _pool(threads, each=1)
            ordered = list(self._pool[1].map(one, range(m)))
        rows, states = [d.rows for d in ordered], [tree.flatten_nested(d.state) for d in ordered]
        return Done(
            tree.tree_map(Tensor.contiguous, tree.stack(rows)),
            tree.unflatten_nested(tree.tree_map(Tensor.contiguous, tree.stack(states))),
            torch.stack([d.loss for d in ordered]),
            torch.stack([d.gradients for d in ordered]),
            torch.stack([d.losses for d in ordered if d.losses is not None]) if work.record else None,
            torch.stack([d.idle for d in ordered if d.idle is not None]),
        )

    def _one(self, module: nn.Module, work: Work, u: Tensor, i: int) -> Done:
        if self.plain and work.follow is None:
            return self._descend(module, work, i)
        batches = work.batches
        anchor = theta = laid_out(module, tree.take(work.anchor, i))
        state = tree.map_nested(lambda x: x[i], work.state)
        own = {k: parameter.requires_grad_() for k, parameter in module.named_parameters()}
        every: list[Told] = []
        for step, x, y in _minibatches(work, i):
            t = len(every)

            def mean(
                at: Tree, of: Objective, part: Part = "all", x: Tensor = x, y: Tensor = y
            ) -> tuple[Tree, Tensor]:
                for k, leaf in laid_out(module, at).items():
                    own[k].data = leaf
                with torch.enable_grad():
                    loss = of.loss(module(x), y)
                    if part == "all":
                        value = loss.mean()
                    else:
                        value = (loss * part_weights(torch.full_like(loss, 1 / len(loss)), part)).sum()
                    found = torch.autograd.grad(value, list(own.values()), materialize_grads=True)
                return dict(zip(own, found, strict=True)), value.detach()

            def slope(at: Tree, part: Part, mean: Callable = mean) -> tuple[Tree, Tensor]:
                return mean(at, slope_of(self.objective), part)

            grad = partial(mean, of=self.objective)
            oracle = Oracle(grad, anchor, work.broadcast, step, u[t, i], (x, y), slope, work.worker[i])
            theta, state, told = self.rule.step(theta, state, oracle)
            every.append(told)
            if work.follow is not None:
                new = work.follow(t, tree.tree_map(lambda x: x[None], theta), slice(i, i + 1), False)
                theta = tree.take(new, 0)
        losses = torch.zeros(len(batches.active), dtype=torch.float64, device=u.device)
        losses[: len(every)] = torch.stack([told.loss for told in every])
        gradients = torch.stack([told.gradients for told in every]).double()
        return Done(theta, state, losses.sum(), gradients.sum(), losses, (gradients == 0).double().sum())

    def _descend(self, module: nn.Module, work: Work, i: int) -> Done:
        """Make plain gradient steps in place, to the last bit those of the rule."""
        assert isinstance(self.rule, SGD)
        own = {k: parameter.requires_grad_() for k, parameter in module.named_parameters()}
        start = {k: work.anchor[k][i].clone() for k in own}
        theta, leaves = laid_out(module, start), list(own.values())
        for k, parameter in own.items():
            parameter.data = theta[k]
        every: list[Tensor] = []
        for _, x, y in _minibatches(work, i):
            with torch.enable_grad():
                loss = self.objective.loss(module(x), y).mean()
                found = torch.autograd.grad(loss, leaves, materialize_grads=True)
            for value, gradient in zip(theta.values(), found, strict=True):
                value.add_(-self.rule.lr * gradient)  # rounded as the rule itself rounds
            every.append(loss.detach())
        losses = torch.zeros(len(work.batches.active), dtype=torch.float64, device=work.x.device)
        losses[: len(every)] = torch.stack(every)
        gradients = losses.new_tensor(len(every))
        return Done(theta, {}, losses.sum(), gradients, losses, losses.new_zeros(()))


def _minibatches(work: Work, i: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield number, features and targets of each step of one worker."""
    batches = work.batches
    last = batches.rows.shape[1] - 1
    for t, step in enumerate(torch.arange(int(batches.steps[i]), device=work.worker.device)):
        index = batches.rows[i, min(t, last)]
        if batches.valid is not None:
            index = index[: int(batches.valid[i, min(t, last)])]
        yield step, work.features(index, work.worker[i], step), work.y[index]


PLANS: dict[str, Callable[[nn.Module, Objective, LocalRule, torch.dtype], Plan]] = {
    "stacked": Stacked,
    "vmap": Vmap,
    "compiled": Compiled,
    "loop": Loop,
}
