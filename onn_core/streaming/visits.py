"""What the parts of a streamed model share, and the visits of its units in the order of a step."""

import contextlib
import dataclasses
import operator
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

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
    bytes_read: int  # of files
    bytes_fetched: int  # into slots, from files or from host memory
    weight_loads: int
    seconds: Counter

    def __sub__(self, before: "Counts") -> "Counts":
        return Counts(*map(operator.sub, vars(self).values(), vars(before).values()))


@dataclasses.dataclass(eq=False)
class Streaming:
    """What the layers, the head and the embedding of one model share; they visit by it.

    head_units: the units of the head's blocks. memory_before: bytes of the process, when the model
    was loaded. member: of several models that run together, whose stream it then is. captures: a
    captured.Captures on CUDA. seconds: of each phase. watchers: called as each visit begins.
    rounds_left: through the head, after the present one.
    """

    stream: WeightStream
    planner: Planner
    n_layers: int
    head_units: Sequence[int]
    host_boundaries: HostBoundaries
    device: torch.device
    memory_before: int
    member: Member | None = None
    captures: Any = None
    passes: Passes = dataclasses.field(default_factory=Passes)
    batching: Batching = dataclasses.field(default_factory=Batching)
    seconds: Counter = dataclasses.field(default_factory=Counter)
    rounds_left: int = 0
    watchers: OrderedDict[int, Callable[[str, int], None]] = dataclasses.field(
        default_factory=OrderedDict
    )

    def __deepcopy__(self, memo: Any) -> None:
        raise ConfigError(
            "a streamed module has no weights to copy: train it with LoRA (target_modules), not "
            "whole (modules_to_save)."
        )

    @contextlib.contextmanager
    def visit(self, phase: str, unit: int, in_pass: Pass, wait: bool = True) -> Iterator[None]:
        """Enter a unit in the course of a pass; time what is done there, but no wait for weights.

        wait: for all of its weights at once; else for each by `stream.wait`.
        """
        lowest = in_pass.lowest
        if self.member is not None:
            lowest = self.member.meet(phase, unit, lowest)
        by_matrix = self.planner.plan.by_matrix
        if by_matrix and phase == "backward":
            # All room is for what this layer needs again: for its recompute, then its gradient.
            future = [Use(unit)]
        else:
            future = self.uses_from(phase, unit, lowest)
        for callback in list(self.watchers.values()):
            callback(phase, unit)
        if self.planner.budget is not None and self.device.type == "cpu":
            self._trim_heap(phase, unit)
        counts = self.stream.counts
        weights = self.stream.enter(future, request=wait or not by_matrix)
        for weight in weights if wait else ():
            self.stream.wait(weight)
        started, before_s = time.perf_counter(), counts.wait_s + self._away_s
        try:
            yield
        finally:
            stopped = time.perf_counter()
            waited_s = counts.wait_s + self._away_s - before_s
            self.seconds[phase] += stopped - started - waited_s
            if self.stream.trace is not None:
                self.stream.trace.append((phase, unit, started, stopped))

    @property
    def _away_s(self) -> float:
        return 0.0 if self.member is None else self.member.away_s

    def step_uses(self, lowest: int | None) -> list[Use]:
        """The visits of a whole step: forward, head, and backward down to layer `lowest`."""
        head = self.planner.plan.head
        units = [*range(self.n_layers), *[*self.head_units] * (head.n_rounds if head else 1)]
        return [*map(Use, units), *self._backward_uses(self.n_layers - 1, lowest)]

    def uses_from(self, phase: str, unit: int, lowest: int | None) -> list[Use]:
        """The coming visits from this one on, and those of the next step."""
        if phase == "backward":
            rest = self._backward_uses(unit, unit if lowest is None else min(lowest, unit))
        elif phase == "head":
            whole = list(self.head_units)
            units = whole[whole.index(unit) :] + whole * self.rounds_left
            rest = [*map(Use, units), *self._backward_uses(self.n_layers - 1, lowest)]
        else:  # units are numbered in the order of the forward pass
            step = self.step_uses(lowest)
            return step[unit:] + step
        return rest + self.step_uses(lowest)

    def _backward_uses(self, start: int, lowest: int | None) -> list[Use]:
        if lowest is None:
            return []
        # As planned, not as it is now: what changes from visit to visit is laid down anew.
        reserved = self.planner.plan.reserved(self.n_layers)
        return [Use(n, last_first=n in reserved) for n in range(start, lowest - 1, -1)]

    def _trim_heap(self, phase: str, unit: int) -> None:
        """Give the heap's gaps back to the system where this visit would exceed the budget.

        At the head they count for nothing: the gaps that layers leave are too small for logits.
        """
        plan = self.planner.plan
        is_first_of_head = self.head_units and unit == self.head_units[0]
        room = self.planner.budget - plan.terms.activations // (1 if is_first_of_head else 2)
        if phase == "forward" and unit in plan.reserved(self.n_layers):
            room -= plan.graph_bytes
        if memory_bytes() - self.memory_before > room:
            give_back_memory()
