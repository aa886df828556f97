"""The steps of a round as one CUDA graph: recorded once for each shape of the work, then replayed with new numbers.

Small models leave a GPU waiting for the host, which launches some ten kernels a step. A graph launches all steps of a
round at once. What changes between rounds is copied into the places that the graph reads.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clients import LocalRule
from fedsim import tree
from fedsim.objectives import Objective
from fedsim.plans import Done, Stacked, Vmap, Work
from fedsim.stacked import Unsupported

MOST = 8
"""Shapes of work that are recorded; others run without a graph, so that a cohort of many sizes does not fill the memory."""

Record = Callable[[Callable[[], Done]], tuple[Callable[[], None], Done]]
"""Runs a function once and returns how to run it again, and where its results lie."""


def record(run: Callable[[], Done]) -> tuple[Callable[[], None], Done]:
    """Record a function of tensors that stay where they are as a CUDA graph.

    Parameters
    ----------
    run : callable
        Reads and writes tensors on the current device and never waits for it.

    Returns
    -------
    tuple of callable and Done
        What replays it, and its results, which every replay writes anew.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries allocate their workspaces in the first calls
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        done = run()
    return graph.replay, done


class _Recorded(NamedTuple):
    """A recorded shape of work: the places of its inputs, how to run it, and the places of its results."""

    inputs: dict[str, Tensor]
    replay: Callable[[], None]
    done: Done


class Captured:
    """The plan ``stacked``, or ``vmap`` for models without a stacked form, as one graph a round.

    Work that takes more than numbers from the host in each round (strategies that act between steps, pictures that
    are cut anew) runs step by step.

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
    record : callable
        How to record; another one than `record` in tests, on machines without a GPU.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        rule: LocalRule,
        dtype: torch.dtype,
        record: Record = record,
    ) -> None:
        def make() -> Stacked | Vmap:
            try:
                stacked = Stacked(module, objective, rule, dtype)
                stacked.span = None  # it remembers rows between rounds, outside of the graph
                return stacked
            except Unsupported:
                return Vmap(module, objective, rule, dtype)

        self.make, self.record = make, record
        self.steps = make()
        self._known: dict[Any, _Recorded] = {}
        self._failed = False

    def run(self, work: Work) -> Done:
        """Make all steps."""
        inputs = _inputs(work)
        shape = (
            tuple((k, x.shape, x.dtype) for k, x in inputs.items()),
            tuple(work.batches.active),
            (work.x.data_ptr(), work.y.data_ptr(), work.record),
        )
        possible = work.follow is None and work.cut is None and not self._failed
        if not possible or (shape not in self._known and len(self._known) >= MOST):
            return self.steps.run(work)
        if shape not in self._known and not self._remember(shape, inputs, work):
            return self.steps.run(work)
        places, replay, done = self._known[shape]
        for k, x in inputs.items():
            places[k].copy_(x)
        replay()
        return _copied(done, work)

    def _remember(self, shape: Any, inputs: dict[str, Tensor], work: Work) -> bool:
        places = {
            k: torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x) for k, x in inputs.items()
        }
        # A fresh plan: what it gathers in the first call must be gathered again in every replay.
        try:
            replay, done = self.record(lambda: self.make().run(_placed(work, places)))
        except RuntimeError as error:
            self._failed = True
            warnings.warn(f"plan = 'graph': not recorded, steps are made one by one: {error}", stacklevel=2)
            return False
        self._known[shape] = _Recorded(places, replay, done)
        return True


def _inputs(work: Work) -> dict[str, Tensor]:
    """Name all tensors that differ between rounds; all on the device."""
    device, batches = work.worker.device, work.batches
    nested = {"anchor": work.anchor, "state": work.state, "broadcast": work.broadcast}
    found = tree.flatten_nested(nested) | {"rows": batches.rows, "worker": work.worker}
    found["steps"] = batches.steps.to(device, non_blocking=True)
    found["stream"] = torch.as_tensor(work.stream, device=device)
    return found if batches.valid is None else found | {"valid": batches.valid}


def _placed(work: Work, places: dict[str, Tensor]) -> Work:
    """Return the same work on other tensors."""
    single = {"rows", "worker", "steps", "stream", "valid"}
    nested = tree.unflatten_nested({k: x for k, x in places.items() if k not in single})
    batches = work.batches._replace(rows=places["rows"], steps=places["steps"], valid=places.get("valid"))
    return work._replace(
        anchor=nested["anchor"],
        state=nested.get("state", {}),
        broadcast=nested["broadcast"],
        batches=batches,
        worker=places["worker"],
        stream=places["stream"],
    )


def _copied(done: Done, work: Work) -> Done:
    """Copy results away from where the next replay writes."""

    def copy(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.clone()

    state = tree.map_nested(torch.clone, done.state)
    return Done(
        tree.clone(done.rows),
        state,
        done.loss.clone(),
        done.gradients.clone(),
        copy(done.losses),
        copy(done.idle),
    )
