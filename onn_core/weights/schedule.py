"""The order in which weights pass through their slots, made from the order of their use.

When a visit begins, its part of the schedule is laid down: which weight is fetched as each weight
of the visit is dropped, and which weight it evicts. That is the absent weight that is used soonest,
in place of the one that is used last (Belady 1966, optimal because the order is known): what fits
is resident at both turns of a step, and a model that fits whole is read once. Who runs the fetches
only looks at the head of a queue.
"""

import math
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from onn_core.weights.slots import Slot, StreamedWeight, count_slots, slots_bytes


class Use(NamedTuple):
    """A coming visit of a unit: of a decoder layer, or of a block of the head."""

    unit: int
    last_first: bool = False  # its weights are used last first: its graph is reserved


class Fetch(NamedTuple):
    """A weight to fetch. evicts: whose slot it takes; None takes any that is free."""

    weight: StreamedWeight
    evicts: StreamedWeight | None
    visit: int  # the number of the visit that it is for
    place: int = 0  # among the weights of that visit


class Schedule:
    """Slots, and which weight each holds next.

    units: the weights of each unit. slots: size in bytes -> how many. new_slot: makes one.
    """

    def __init__(
        self,
        units: Sequence[Sequence[StreamedWeight]],
        slots: Counter,
        new_slot: Callable[[int], Slot],
    ):
        self.units = [list(unit) for unit in units]
        for number, unit in enumerate(self.units):
            for weight in unit:
                weight.unit = number
        self.slots = slots
        self.visit = 0  # the number of the present one
        self.uses: list[Use] = []  # the present one and those that are known to follow
        self.next_visits: dict[int, int] = {}  # unit -> number of its next visit
        self._new_slot = new_slot
        self._made: dict[int, list[Slot]] = defaultdict(list)
        self._planned = False  # whether fetches are laid down for them, or only for requests
        self._sizes: dict[int, _SizeClass] = {}

    def begin(self, future: Sequence[Use], by_request: bool = False) -> None:
        """The visit of `future[0]` begins; the others will follow.

        by_request: fetch only what `request` asks for.
        """
        known, future = self.uses[1:], list(future)
        n_both = min(len(known), len(future))
        as_planned = self._planned and n_both and known[:n_both] == future[:n_both]
        self.visit += 1
        self.uses = max(known, future, key=len) if as_planned else future
        self.next_visits = {}
        for place in range(len(self.uses) - 1, 0, -1):
            self.next_visits[self.uses[place].unit] = self.visit + place
        if by_request or not as_planned:
            self._planned = not by_request
            self._sizes = {size: _SizeClass(self, size, self._made[size]) for size in self.slots}
        for size_class in self._sizes.values() if self._planned else ():
            size_class.lay_down()

    def request(self, weight: StreamedWeight) -> None:
        """The present visit needs a weight: fetch it if it is not resident and not laid down."""
        queue = self._sizes[weight.slot_bytes].queue
        if weight.slot is not None or any(
            fetch.weight is weight and fetch.visit == self.visit for fetch in queue
        ):
            return
        if self._planned:  # the order is another than was laid down: the next visit plans anew
            self._planned = False
            for size_class in self._sizes.values():
                here = [fetch for fetch in size_class.queue if fetch.visit <= self.visit]
                size_class.queue = deque(here)
        self._sizes[weight.slot_bytes].queue.append(Fetch(weight, None, self.visit))

    def next_fetch(self) -> StreamedWeight | None:
        """The weight to fetch next, whose slot is then its own; None if none has room yet.

        OSError, RuntimeError or MemoryError if the memory of a new slot cannot be had.
        """
        queues = [one.queue for one in self._sizes.values() if one.queue]
        for queue in sorted(queues, key=lambda queue: queue[0][2:]):
            weight = queue[0].weight
            slot = self._slot_for(queue[0])
            if slot is None:
                continue
            queue.popleft()
            if slot.weight is not None:
                slot.weight.evict()
            slot.weight, weight.slot = weight, slot
            return weight
        return None

    def coming(self) -> list[StreamedWeight]:
        """What is laid down to be fetched and has no slot yet, soonest first."""
        queued = [fetch for one in self._sizes.values() for fetch in one.queue]
        return [fetch.weight for fetch in sorted(queued, key=lambda fetch: fetch[2:])]

    def reorder(self, unit: int, weights: list[StreamedWeight]) -> None:
        """The weights of a unit are used in this order from now on."""
        self.units[unit][:] = weights
        self._planned = False

    def state(self) -> str:
        """A checksum of the order of use, what is resident, and what is laid down to be fetched."""
        weights = [slot.weight for slots in self._made.values() for slot in slots]
        queued = [one for size in self._sizes.values() for one in size.queue]
        said = [
            sorted(self.slots.items()),
            [weight.name for unit in self.units for weight in unit],
            sorted(weight.name for weight in weights),
            sorted((one.weight.name, one.visit - self.visit) for one in queued),
        ]
        return f"{zlib.crc32(repr(said).encode()):x}"

    def made(self) -> Counter:
        """Size in bytes -> slots that have memory."""
        return Counter({size: len(slots) for size, slots in self._made.items() if slots})

    def clear(self) -> None:
        """Evict everything and give up the slots."""
        self._made.clear()
        self._sizes, self.uses, self._planned = {}, [], False
        for unit in self.units:
            for weight in unit:
                weight.evict()
                weight.in_use, weight.reads_left = False, 0

    def no_memory(self, error: Exception) -> str:
        """What to say when memory ends before all slots are made: with the plan that would fit."""
        made = slots_bytes(self.made())
        plans = {n: count_slots(self.units, n) for n in range(1, len(self.units) + 1)}
        # half of what could be had, so that the rest of the run has room
        fits = [n for n, plan in plans.items() if slots_bytes(plan) <= made // 2]
        advice = "free some memory and load it again"
        if fits:
            advice = f"load it with chunk_size={fits[-1]}"
        return (
            f"there is no memory for the resident layers ({error}): of "
            f"{slots_bytes(self.slots) / 1e6:,.0f} MB only {made / 1e6:,.0f} MB could be had; "
            f"{advice}."
        )

    def _slot_for(self, fetch: Fetch) -> Slot | None:
        """The slot of the weight that is evicted, if that is idle; else a new or an idle one."""
        if fetch.evicts is not None and fetch.evicts.slot is not None:
            return fetch.evicts.slot if fetch.evicts.is_idle else None
        size = fetch.weight.slot_bytes
        made = self._made[size]
        if len(made) < self.slots[size]:
            made.append(self._new_slot(size))
            return made[-1]
        idle = [slot for slot in made if slot.weight.is_idle]
        later = self.next_visits
        return max(idle, key=lambda slot: later.get(slot.weight.unit, math.inf), default=None)


class _SizeClass:
    """The weights of one size, the slots that they share, and the fetches that are laid down."""

    def __init__(self, schedule: Schedule, size: int, made: Sequence[Slot]):
        self.queue: deque[Fetch] = deque()
        self._schedule = schedule
        self._units = [
            [(place, one) for place, one in enumerate(unit) if one.slot_bytes == size]
            for unit in schedule.units
        ]
        self._n_weights = sum(map(len, self._units))
        # What is resident when all that is laid down has been fetched.
        self._resident = {slot.weight: None for slot in made}  # in a fixed order, as no set is
        self._n_free = schedule.slots[size] - len(made)
        # All uses from the present visit to here are resident.
        self._visit, self._place = schedule.visit, 0

    def lay_down(self) -> None:
        """Queue what is fetched as the present visit begins, and as each of its weights is done.

        What the visit has not yet used is not evicted.
        """
        if len(self._resident) == self._n_weights:  # a model that fits whole: at every visit
            return
        if self._visit < self._schedule.visit:
            self._visit, self._place = self._schedule.visit, 0
        used = self._of(self._schedule.uses[0])
        waiting = {weight for _, weight in used}
        self._fetch(waiting)
        for _, weight in used:
            waiting.discard(weight)
            self._fetch(waiting)

    def _of(self, use: Use) -> Sequence[tuple[int, StreamedWeight]]:
        """The weights of a visit in the order of their use, each with its place."""
        weights = self._units[use.unit]
        return [(-place, weight) for place, weight in weights[::-1]] if use.last_first else weights

    def _fetch(self, waiting: Collection[StreamedWeight]) -> None:
        """Queue the soonest absent weights, each in place of one that is used later."""
        next_visits = self._schedule.next_visits
        while (absent := self._soonest_absent()) is not None:
            (place, weight), evicts = absent, None
            if self._n_free:
                self._n_free -= 1
            else:
                latest = self._visit
                for one in self._resident:
                    visit_of_one = next_visits.get(one.unit, math.inf)
                    if visit_of_one > latest and one not in waiting:
                        evicts, latest = one, visit_of_one
                if evicts is None:
                    return
                del self._resident[evicts]
            self._resident[weight] = None
            self.queue.append(Fetch(weight, evicts, self._visit, place))

    def _soonest_absent(self) -> tuple[int, StreamedWeight] | None:
        visit, uses = self._schedule.visit, self._schedule.uses
        while self._visit - visit < len(uses):
            weights = self._of(uses[self._visit - visit])
            while self._place < len(weights):
                if weights[self._place][1] not in self._resident:
                    return weights[self._place]
                self._place += 1
            self._visit, self._place = self._visit + 1, 0
        return None
