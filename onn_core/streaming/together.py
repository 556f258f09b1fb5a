"""Several models over one stream of weights, whose passes go through the layers together.

Each model runs in a thread of its own, and one thread runs at a time. They meet at the beginning of
every visit, where the one goes on whose visit comes first in the order of a step: all of them visit
a layer, one after another, before any visits the next, and the stream sees one visit. What a model
computes, and in which order, is what it would compute alone, with its own random numbers; so its
results are equal bit for bit, whatever the others do, end or fail.
"""

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from onn_core.memory.process import memory_bytes
from onn_core.memory.together import Part, plan_together
from onn_core.streaming.passes import random_state, set_random_state
from onn_core.weights.schedule import Use
from onn_core.weights.slots import StreamedWeight
from onn_core.weights.stream import CLOSE_S, WeightStream


class Together:
    """What the models have in common: their weights, their stream, and whose turn it is."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.stream: WeightStream | None = None
        self.memory_before = memory_bytes()  # of the process
        self.entered: tuple[int, int] | None = None  # the place of the visit that the stream is in
        self._weights: list[list[StreamedWeight]] | None = None
        self._first: list[Any] = []  # the first model, which its weights ask how they are converted
        self._blocks: list[tuple[int, StreamedWeight]] = []

    def same_weights(self, bindings: Sequence[Sequence[Any]], blocks: list) -> list:
        """Bind the first model's weights in a later one, too; returns the blocks of its head."""
        if self._weights is None:
            self._weights = [[binding.weight for binding in layer] for layer in bindings]
            self._blocks = blocks
        for layer, weights in zip(bindings, self._weights, strict=True):
            for binding, weight in zip(layer, weights, strict=True):
                binding.weight = weight
        return self._blocks

    def join(self, model: Any, make_stream: Callable[[], WeightStream], part: Part) -> "Member":
        """The stream as a further model sees it."""
        self.stream = self.stream or make_stream()
        self._first = self._first or [model]
        self.members.append(Member(self, part, len(self.members)))
        return self.members[-1]

    def plan(self) -> None:
        """The plan that has room for all members, from what each would have alone."""
        parts = [member.part for member in self.members]
        plans = plan_together(parts)
        for part, plan in zip(parts, plans, strict=True):
            part.planner.plan = plan
        self.entered = None  # other slots evict what is resident
        self.stream.set_slots(plans[0].slots, plans[0].dense, plans[0].casts_once)

    def close(self, timeout_s: float) -> None:
        """All members have left: give the weights' memory back."""
        self.stream.close(timeout_s)
        self._first = []

    def next(self) -> None:
        """Wake the member whose visit comes first."""
        if self.members:
            min(self.members, key=lambda member: member.place).turn.release()


class Member:
    """The stream as one of several models sees it.

    place: where its next visit is: the number of the pass, the visit in the pass, the member.
    lowest: the lowest layer that its pass trains, None if it trains none. n_passes: that train, in
    the whole run; only the number of reads depends on it.
    """

    def __init__(self, together: Together, part: Part, number: int):
        self.together = together
        self.part = part
        self.place = (0, -1, number)
        self.lowest: int | None = None
        self.n_passes = 0
        self.turn = threading.Semaphore(0)
        self.check: Callable[[], None] = lambda: None
        self._is_last = True  # of those that visit a unit

    def __getattr__(self, name: str) -> Any:
        """All that is not defined here is the stream's own: units, counts, wait, request ...

        Here are `enter`, `release` and `close`, which depend on the other members.
        """
        return getattr(self.together.stream, name)

    # --- whose turn it is ---------------------------------------------------------------------

    def run(self, work: Callable[[], None], before: Any) -> None:
        """Do `work` in this thread when it is this member's turn; before: its random state."""
        self.turn.acquire()
        try:
            set_random_state(before, self.device)
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            # CUDA's one backward thread would wait here for one model while another needs it.
            with torch.autograd.set_multithreading_enabled(False):
                work()
        finally:
            self.leave()
            self.together.next()

    def meet(self, phase: str, unit: int, lowest: int | None) -> int | None:
        """Wait until a visit is the next of all members'; the lowest layer that any trains."""
        together, n_units = self.together, len(self.units)
        if self not in together.members:  # it was closed, and goes on
            together.members.append(self)
        visit = 2 * n_units - unit if phase == "backward" else unit
        n_passes, last, number = self.place
        self.place = (n_passes + (visit <= last), visit, number)
        self.lowest = lowest
        self._wait_for_turn()
        while visit == 0 and self._gives_way():
            self.place = (self.place[0] + 1, visit, number)
            self._wait_for_turn()
        trained = [m.lowest for m in together.members if m.lowest is not None]
        return min(trained, default=None)

    def _wait_for_turn(self) -> None:
        if min(member.place for member in self.together.members) != self.place:
            before = random_state(self.device)
            self.together.next()
            self.turn.acquire()
            set_random_state(before, self.device)

    def _gives_way(self) -> bool:
        """Whether to train in the next pass: in this one the run with most passes evaluates.

        Else all would read the weights of a backward pass that it does not need.
        """
        longest = max(self.together.members, key=lambda member: member.n_passes)
        here = longest.place[0] == self.place[0]
        return here and longest.lowest is None and self.lowest is not None

    # --- the stream ---------------------------------------------------------------------------

    def enter(self, future: Sequence[Use], request: bool = True) -> list[StreamedWeight]:
        """As the stream's; what another member has entered is resident until the last is done.

        Where a layer is streamed matrix by matrix (without `request`), nothing is shared.
        """
        together, here = self.together, self.place[:2]
        others = [member.place[:2] for member in together.members if member is not self]
        self._is_last = not request or here not in others
        together.stream.check = self.check
        if request and together.entered == here:
            self.check()
            return self.units[future[0].unit]
        together.entered = here if request else None
        return together.stream.enter(future, request)

    def release(self, weight: StreamedWeight) -> None:
        if self._is_last:
            self.together.stream.release(weight)

    def fit(self, batch_size: int, n_tokens: int, n_trained: int, n_back: int) -> None:
        """Plan for batches (B, T) of this model; ConfigError if the sum does not fit."""
        planner = self.part.planner
        before = planner.plan
        planner.fit(batch_size, n_tokens, n_trained, n_back)
        if planner.plan is not before or not self.part.n_trained:
            self.part.ask(batch_size, n_tokens, n_trained, planner.plan)
            self.together.plan()

    def expect(self, batch_size: int, n_tokens: int) -> None:
        """Make room for larger batches (B, T) that come later, an evaluation's."""
        planner = copy.copy(self.part.planner)  # whose plan changes when they come
        planner.fit(batch_size, n_tokens, self.part.n_trained, 0)
        self.part.ask(batch_size, n_tokens, self.part.n_trained, planner.plan)
        self.together.plan()

    def leave(self) -> None:
        """The others go on without this one."""
        if self in self.together.members:
            self.together.members.remove(self)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Leave; the last one closes the stream."""
        self.leave()
        if not self.together.members:
            self.together.close(timeout_s)
