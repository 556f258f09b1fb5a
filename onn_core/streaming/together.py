"""Several models over one stream of weights, whose passes go through the layers together.

Each model runs in a thread of its own, and one thread runs at a time. They meet at the beginning of
every visit, where the one goes on whose visit comes first in the order of a step: all of them visit
a layer before any visits the next, and the stream sees one visit. What a model computes, and in
which order, is what it would compute alone, with its own random numbers; so its results are equal
bit for bit, whatever the others do, end or fail.

On a CPU they meet at products of frozen weights, too: a few rows of each model are one matrix,
which is multiplied several times as fast. A row's sums do not depend on the other rows unless
its model has very few; that is not taken on trust but seen, for each shape and number of rows.
"""

import contextlib
import copy
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from onn_core.memory.process import memory_bytes
from onn_core.memory.together import SHARED_ROWS, Part, plan_together
from onn_core.ops.matmul import products_by
from onn_core.processes import n_local
from onn_core.streaming.passes import random_state, set_random_state
from onn_core.streaming.products import ROWS_AT_ONCE, Product, Sameness
from onn_core.weights.schedule import Use
from onn_core.weights.slots import StreamedWeight
from onn_core.weights.stream import CLOSE_S, WeightStream


class Together:
    """What the models have in common: their weights, their stream, and whose turn it is."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self._sameness = Sameness()
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
                binding.parameter.weight = weight
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
        """Wake the member that goes on."""
        if self.members:
            self.choose().turn.release()

    def choose(self) -> "Member":
        """The member that goes on: whose visit comes first, of those that wait for no product.

        Where none of a visit is left that may go on, the products are made for which they wait.
        """
        while True:
            waiting = [m for m in self.members if m.product is not None and m.product.waits]
            ready = [m for m in self.members if m not in waiting]
            first = min(ready, key=lambda member: member.place, default=None)
            if not waiting or (first is not None and self._has_room(first, waiting[0])):
                return first
            self._multiply([member.product for member in waiting])

    def _has_room(self, member: "Member", waiting: "Member") -> bool:
        """Whether a member is, or may be, in the visit in which others wait."""
        if member.place[:2] != waiting.place[:2]:
            return False
        n_rows = sum(one.visit_rows for one in self.members if one.visiting)
        return member.visiting or n_rows + member.visit_rows <= SHARED_ROWS

    @torch.no_grad()
    def _multiply(self, products: Sequence[Product]) -> None:
        """Make the products of one kind: at once, as far as that is known to change no bit."""
        products = [one for one in products if one.kind == products[0].kind]
        if len(products) > 1:
            with contextlib.suppress(MemoryError, RuntimeError):  # no room for all at once
                self._multiply_at_once(products)
        for one in products:
            if one.waits:
                one.make()

    def _multiply_at_once(self, products: Sequence[Product]) -> None:
        """Give each its result, where that is known to be the same; else make it, and look."""
        started, first, shape = time.perf_counter(), products[0], products[0].kind[1]
        starts = [0, *itertools.accumulate(one.n_rows for one in products)]
        n_rows = starts.pop()
        n_all = next((n for n in ROWS_AT_ONCE if n >= n_rows), n_rows)
        sizes = [
            (start, one.n_rows, n_all, one.rows.is_contiguous())
            for start, one in zip(starts, products, strict=True)
        ]
        if not any(self._sameness.may_be(shape, size) for size in sizes):
            return
        rows = first.rows.new_zeros(n_all, first.rows.shape[-1])
        torch.cat([one.rows.reshape(-1, rows.shape[1]) for one in products], out=rows[:n_rows])
        every = first.multiply(rows, *first.given)
        known = [self._sameness.is_known(shape, size, rows.dtype) for size in sizes]
        seconds = (time.perf_counter() - started) / len(products)
        for one, size, is_known in zip(products, sizes, known, strict=True):
            at_once = every[size[0] : size[0] + one.n_rows].reshape(*one.rows.shape[:-1], -1)
            one.seconds += seconds
            if is_known:
                one.result = at_once.clone()  # of its own: a layer changes it in place
                continue
            one.make()
            if one.error is None and self._sameness.may_be(shape, size):
                self._sameness.note(shape, size, one.result, at_once)


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
        self.visiting = False  # it has begun the visit of its place
        self.visit_rows = 0  # of a micro-batch, in tokens
        self.product: Product | None = None
        self.away_s = 0.0  # in which others computed while it waited for a product
        self._phase = ""  # of this visit
        self._by_request = False  # matrix by matrix
        self._shares = False  # whether products are shared in this visit
        self._released: set[StreamedWeight] = set()  # in this visit

    def __getattr__(self, name: str) -> Any:
        """All that is not defined here is the stream's own: units, counts, wait, request ...

        Here is what depends on the other members.
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
            with torch.autograd.set_multithreading_enabled(False), products_by(self.multiply):
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
        self.visiting, self._released, self._phase = False, set(), phase
        self.place = (n_passes + (visit <= last), visit, number)
        self.lowest = lowest
        self._wait_for_turn()
        while visit == 0 and self._gives_way():
            self.place = (self.place[0] + 1, visit, number)
            self._wait_for_turn()
        self.visiting = True
        trained = [m.lowest for m in together.members if m.lowest is not None]
        return min(trained, default=None)

    def multiply(
        self, multiply: Callable[..., torch.Tensor], rows: torch.Tensor, *given: torch.Tensor | None
    ) -> torch.Tensor:
        """The product of rows (..., C) with a frozen weight, made with those of other members."""
        product = Product(multiply, rows, given)
        here = (m.place[:2] == self.place[:2] for m in self.together.members if m is not self)
        is_plain = not (torch.is_grad_enabled() and rows.requires_grad)
        shares = self._shares and self.visiting and is_plain
        if not (shares and 0 < product.n_rows < SHARED_ROWS and any(here)):
            return multiply(rows, *given)
        counts = self.together.stream.counts
        self.product, started, wait_s = product, time.perf_counter(), counts.wait_s
        self._wait_for_turn()
        self.product = None
        waited_s = counts.wait_s - wait_s  # for weights, which a visit knows of
        self.away_s += time.perf_counter() - started - product.seconds - waited_s
        if product.error is not None:
            raise product.error
        return product.result

    def _wait_for_turn(self) -> None:
        first = self.together.choose()
        if first is not self:
            before = random_state(self.device)
            first.turn.release()
            self.turn.acquire()
            set_random_state(before, self.device)

    def _let_others_finish(self) -> None:
        """Wait until no other member is within the visit that this one has ended."""
        if all(member.product is None for member in self.together.members):
            return
        self.visiting, place = False, self.place
        self.place = (place[0], place[1] + 0.5, place[2])  # between two visits
        self._wait_for_turn()
        self.place = place

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
        self._by_request = not request
        weights = self.units[future[0].unit]
        # Else a scratch is in between.
        is_plain = not any(weight.packed or weight.needs_dense for weight in weights)
        # Processes meet in the order in which runs end their visits, which must be the same in all.
        alone = n_local() == 1
        self._shares = request and is_plain and alone and self.device.type == "cpu"
        self._shares &= self._phase != "head"  # where all rows of a batch are multiplied at once
        together.stream.check = self.check
        if request and together.entered == here:
            self.check()
            return weights
        together.entered = here if request else None
        return together.stream.enter(future, request)

    def request(self, weight: StreamedWeight) -> None:
        self._released.discard(weight)
        self.together.stream.request(weight)

    def wait(self, weight: StreamedWeight) -> torch.Tensor:
        self._released.discard(weight)
        return self.together.stream.wait(weight)

    def release(self, weight: StreamedWeight) -> None:
        """As the stream's, once no other member needs the weight in this visit."""
        self._released.add(weight)
        here = self.place[:2]
        others = [m for m in self.together.members if m is not self and m.place[:2] == here]
        if self._by_request or all(weight in member._released for member in others):
            self.together.stream.release(weight)

    def fit(self, batch_size: int, n_tokens: int, n_trained: int, n_back: int) -> None:
        """Plan for batches (B, T) of this model; ConfigError if the sum does not fit."""
        planner = self.part.planner
        before = planner.plan
        planner.fit(batch_size, n_tokens, n_trained, n_back)
        self.visit_rows = min(batch_size, planner.micro_batch_size or batch_size) * n_tokens
        if planner.plan is not before or not self.part.n_trained:
            self._let_others_finish()  # their visit: other slots evict what is resident
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
        self.visiting = False
        if self in self.together.members:
            self.together.members.remove(self)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Leave; the last one closes the stream."""
        self.leave()
        if not self.together.members:
            self.together.close(timeout_s)
