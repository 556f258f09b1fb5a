"""Which weight is fetched next, into which slot, and which weight it evicts.

The order of a step is known: forward, head, backward, and forward again. So the weight to fetch is
the absent one that is used soonest, and the one to evict is the one that is used last (Belady
1966, optimal because the order is known): what fits is resident at both turns of a step, and a
model that fits whole is read once.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from onn_core.weights.slots import Slot, StreamedWeight, count_slots, slots_bytes


class Use(NamedTuple):
    """A coming visit of a unit: of a decoder layer, or of a block of the head."""

    unit: int
    last_first: bool = False  # its weights are used last first: its graph is reserved


class Schedule:
    """Slots, and the order in which weights pass through them.

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
        self._new_slot = new_slot
        self._made: dict[int, list[Slot]] = defaultdict(list)
        self._future: list[Use] = []
        self._positions: dict[int, list[int]] = {}  # unit -> places in the future

    def begin(self, future: Sequence[Use]) -> None:
        """The visit of `future[0]` begins; the others will follow."""
        self._future = list(future)
        self._positions = defaultdict(list)
        for position, use in enumerate(self._future):
            self._positions[use.unit].append(position)

    def next_weight(self) -> StreamedWeight | None:
        """The absent weight that is used soonest and has a slot, which is then its own.

        OSError, RuntimeError or MemoryError if the memory of a new slot cannot be had.
        """
        full = set()  # sizes that have no room for a weight that is used this late
        for position, use in enumerate(self._future):
            for weight in self.units[use.unit][:: -1 if use.last_first else 1]:
                if weight.slot is not None or weight.slot_bytes in full:
                    continue
                if position == 0 and not weight.in_use:  # this visit has dropped it already
                    continue
                slot = self._find_slot(weight.slot_bytes, position)
                if slot is None:
                    full.add(weight.slot_bytes)
                    continue
                if slot.weight is not None:
                    slot.weight.slot = slot.weight.tensor = None
                slot.weight, weight.slot = weight, slot
                return weight
            if len(full) == len(self.slots):
                break
        return None

    def made(self) -> Counter:
        """Size in bytes -> slots that have memory."""
        return Counter({size: len(slots) for size, slots in self._made.items()})

    def clear(self) -> None:
        """Evict everything and give up the slots."""
        self._made.clear()
        for unit in self.units:
            for weight in unit:
                weight.slot, weight.tensor, weight.in_use = None, None, False

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

    def _find_slot(self, size: int, position: int) -> Slot | None:
        """A new slot, or the one whose weight is used last, if that is after `position`."""
        made = self._made[size]
        if len(made) < self.slots[size]:
            made.append(self._new_slot(size))
            return made[-1]
        idle = [s for s in made if s.weight.tensor is not None and not s.weight.in_use]
        last_used = max(idle, key=lambda slot: self._next_use(slot.weight), default=None)
        if last_used is not None and self._next_use(last_used.weight) > position:
            return last_used
        return None

    def _next_use(self, weight: StreamedWeight) -> float:
        """When an idle weight is used again: its use in the current visit, 0, is over."""
        return next((use for use in self._positions.get(weight.unit, ()) if use > 0), math.inf)
