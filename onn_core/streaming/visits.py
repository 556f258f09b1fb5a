"""Visits of a model's units, in the order of a step; who watches is told, and time is counted."""

import contextlib
import dataclasses
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from onn_core.errors import ConfigError
from onn_core.memory.boundaries import HostBoundaries
from onn_core.memory.planner import Planner
from onn_core.memory.process import memory_bytes
from onn_core.streaming.batching import Batching
from onn_core.streaming.passes import Pass, Passes
from onn_core.streaming.together import Member
from onn_core.weights.reader import give_back_memory
from onn_core.weights.schedule import Use
from onn_core.weights.stream import WeightStream

Event = tuple[str, int, float, float]  # phase or "read", unit, start, stop


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a streamed model has done since it was loaded; two of them subtract.

    seconds: of each phase (forward, head, backward), without waiting for weights.
    """

    wait_s: float
    bytes_read: int
    weight_loads: int
    seconds: Counter

    def __sub__(self, before: "Counts") -> "Counts":
        seconds = {phase: s - before.seconds[phase] for phase, s in self.seconds.items()}
        return Counts(
            self.wait_s - before.wait_s,
            self.bytes_read - before.bytes_read,
            self.weight_loads - before.weight_loads,
            Counter(seconds),
        )


class Visits:
    """Enters one unit after the other.

    head_units: the units of the head's blocks. memory_before: bytes of the process, when the model
    was loaded.
    """

    def __init__(
        self,
        stream: WeightStream,
        planner: Planner,
        n_layers: int,
        head_units: Sequence[int],
        memory_before: int,
    ):
        self.stream = stream
        self.planner = planner
        self.n_layers = n_layers
        self.head_units = list(head_units)
        self.seconds: Counter = Counter()  # phase -> wall clock
        self.trace: list[Event] | None = None
        self.watchers: OrderedDict[int, Callable[[str, int], None]] = OrderedDict()
        self._memory_before = memory_before

    def watch(self, callback: Callable[[str, int], None]) -> RemovableHandle:
        """Call `callback(phase, unit)` at the beginning of each visit until it is removed."""
        handle = RemovableHandle(self.watchers)
        self.watchers[handle.id] = callback
        return handle

    def counts(self) -> Counts:
        done = self.stream.counts
        return Counts(
            done.wait_s, done.bytes_read, done.weight_loads.total(), Counter(self.seconds)
        )

    def step_uses(self, lowest: int | None) -> list[Use]:
        """The visits of a whole step: forward, head, and backward down to layer `lowest`."""
        units = [*range(self.n_layers), *self.head_units]
        return [*map(Use, units), *self._backward_uses(self.n_layers - 1, lowest)]

    def uses_from(self, phase: str, unit: int, lowest: int | None) -> list[Use]:
        """The coming visits from this one on, and those of the next step."""
        if phase == "backward":
            rest = self._backward_uses(unit, unit if lowest is None else min(lowest, unit))
        else:  # units are numbered in the order of the forward pass
            rest = self.step_uses(lowest)[unit:]
        return rest + self.step_uses(lowest)

    def _backward_uses(self, start: int, lowest: int | None) -> list[Use]:
        if lowest is None:
            return []
        reserved = self.planner.graphs.by_layer
        return [Use(n, last_first=bool(reserved[n])) for n in range(start, lowest - 1, -1)]

    @contextlib.contextmanager
    def visit(
        self, phase: str, unit: int, future: Sequence[Use], wait: bool = True
    ) -> Iterator[None]:
        """Enter `unit`; time what is done there, without the wait for its weights.

        wait: for all of its weights at once; else for each by `stream.wait`.
        """
        for callback in list(self.watchers.values()):
            callback(phase, unit)
        if self.planner.budget is not None and self.stream.device.type == "cpu":
            self._trim_heap(phase, unit)
        counts = self.stream.counts
        weights = self.stream.enter(future, wait or not self.planner.plan.by_matrix)
        for weight in weights if wait else ():
            self.stream.wait(weight)
        started, waited_s = time.perf_counter(), counts.wait_s
        try:
            yield
        finally:
            stopped = time.perf_counter()
            self.seconds[phase] += stopped - started - (counts.wait_s - waited_s)
            if self.trace is not None:
                self.trace.append((phase, unit, started, stopped))

    def _trim_heap(self, phase: str, unit: int) -> None:
        """Give the heap's gaps back to the system where this visit would exceed the budget.

        At the head always: the gaps that layers leave are too small for logits.
        """
        plan = self.planner.plan
        room = self.planner.budget - plan.terms.activations // 2
        if phase == "forward" and unit in plan.reserved(self.n_layers):
            room -= plan.graph_bytes
        if [unit] == self.head_units[:1] or memory_bytes() - self._memory_before > room:
            give_back_memory()


@dataclasses.dataclass(frozen=True)
class Streaming:
    """What the layers, the head and the embedding of one model share; none of it is replaced."""

    stream: WeightStream
    planner: Planner
    visits: Visits
    passes: Passes
    batching: Batching
    host_boundaries: HostBoundaries
    device: torch.device
    member: Member | None = None  # of several models that run together; its stream then
    captures: Any = None  # captured.Captures on CUDA

    def __deepcopy__(self, memo: Any) -> None:
        raise ConfigError(
            "a streamed module has no weights to copy: train it with LoRA (target_modules), not "
            "whole (modules_to_save)."
        )

    @contextlib.contextmanager
    def visit(self, phase: str, unit: int, of: Pass, wait: bool = True) -> Iterator[None]:
        """Enter a unit in the course of a pass."""
        lowest = of.lowest
        if self.member is not None:
            lowest = self.member.meet(phase, unit, lowest)
        by_matrix = self.planner.plan.by_matrix and phase == "backward"
        # Matrix by matrix, all room is for what this layer needs again: recompute, then gradient.
        future = [Use(unit)] if by_matrix else self.visits.uses_from(phase, unit, lowest)
        with self.visits.visit(phase, unit, future, wait):
            yield
