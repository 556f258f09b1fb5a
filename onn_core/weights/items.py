"""What is streamed: matrices that come and go, and the slots of memory that hold them."""

import dataclasses
import math
import weakref
from collections import Counter
from collections.abc import Sequence

import torch

from onn_core.weights.formats import Source
from onn_core.weights.host import HostMemory
from onn_core.weights.reader import PAGE_BYTES, host_buffer

PIECE_BYTES = 8 << 20  # one read


@dataclasses.dataclass(eq=False)
class Item:
    """One matrix that comes and goes."""

    source: Source
    shape: tuple[int, ...]
    dtype: torch.dtype  # in memory
    unit: int = -1
    slot: "Slot | None" = None
    tensor: torch.Tensor | None = None  # (shape) in the slot, once it is ready
    in_use: bool = False
    pieces_left: int = 0
    ready_event: "torch.cuda.Event | None" = None

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def slot_bytes(self) -> int:
        """Its bytes in whole pages, with room for where it begins within a page of its file."""
        return -(-self.n_bytes // PAGE_BYTES) * PAGE_BYTES + PAGE_BYTES

    @property
    def in_place(self) -> bool:
        """Whether the file's bytes are the tensor's."""
        return self.source.direct and self.source.entry.dtype == self.dtype

    @property
    def first_page(self) -> int:
        """Where in its file the page begins that holds its first byte."""
        return self.source.entry.offset // PAGE_BYTES * PAGE_BYTES

    def pieces(self) -> list[tuple[int, int]]:
        """Byte ranges of its file, one a read; a converted tensor is made in one go."""
        if not self.source.direct:
            return [(0, 0)]
        stop = self.source.entry.offset + self.source.entry.n_bytes
        starts = range(self.first_page, stop, PIECE_BYTES)
        return [(start, min(start + PIECE_BYTES, stop)) for start in starts]

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensor (shape) in its slot's memory (slot_bytes,)."""
        begin = self.source.entry.offset - self.first_page if self.in_place else 0
        return memory[begin : begin + self.n_bytes].view(self.dtype).view(self.shape)


@dataclasses.dataclass(eq=False)
class Slot:
    """Memory that holds one item at a time."""

    memory: torch.Tensor  # (slot_bytes,) uint8
    item: Item | None = None
    free_event: "torch.cuda.Event | None" = None  # the last compute that read it


def lookahead(items: Sequence[Item]) -> list[Item]:
    """The items of a layer that are fetched while the one before computes: up to the largest.

    The current layer lets its matrices go one by one, so the largest finds room in time, and the
    layer begins when its first matrix is there.
    """
    largest = max(range(len(items)), key=lambda i: items[i].n_bytes, default=0)
    return list(items[: max(1, largest)])


def count_slots(
    units: Sequence[Sequence[Item]], n_resident: int, look_ahead: bool = True
) -> Counter:
    """Size in bytes -> slots, for `n_resident` units at once and the look-ahead into the next."""
    slots: Counter = Counter()
    for first in range(len(units)):
        window = [item for unit in units[first : first + n_resident] for item in unit]
        for unit in units[first + n_resident : first + n_resident + look_ahead]:
            window += lookahead(unit)
        slots |= Counter(item.slot_bytes for item in window)  # the larger count of each size
    return slots


def few_slots(units: Sequence[Sequence[Item]], n_each: int) -> Counter:
    """Size in bytes -> slots, at most `n_each`: for units that are streamed item by item."""
    slots: Counter = Counter()
    for unit in units:
        counts = Counter(item.slot_bytes for item in unit)
        slots |= Counter({size: min(count, n_each) for size, count in counts.items()})
    return slots


def no_memory(
    units: Sequence[Sequence[Item]],
    slots: Counter,
    held: dict[int, list[Slot]],
    error: Exception,
) -> str:
    """What to say when memory ends before all `slots` are `held`: with the plan that would fit."""
    wanted = sum(size * count for size, count in slots.items())
    had = sum(size * len(some) for size, some in held.items())
    plans = {n: count_slots(units, n) for n in range(1, len(units) + 1)}
    fits = [  # half of it, so that the rest of the run has room
        n for n, plan in plans.items() if sum(plan[size] * size for size in plan) <= had // 2
    ]
    advice = f"load it with chunk_size={fits[-1]}" if fits else "free some memory and load it again"
    return (
        f"there is no memory for the resident layers ({error}): of {wanted / 1e6:,.0f} MB only "
        f"{had / 1e6:,.0f} MB could be had; {advice}."
    )


class Staging:
    """One reader's two buffers, for pieces that are cast or copied to a device."""

    def __init__(self, copies: "torch.cuda.Stream | None"):
        self._copies = copies
        self._make = host_buffer
        if copies is not None:  # pinned, of huge pages: into others direct reads are slower
            memory = HostMemory(copies.device)
            self._make = memory.take
            weakref.finalize(self, memory.close).atexit = False
        self._buffers: list[torch.Tensor] = []
        self._events: list = [None, None]
        self._turn = 0

    def buffer(self) -> torch.Tensor:
        """(PIECE_BYTES,) uint8 whose last copy is done."""
        self._turn = 1 - self._turn
        while len(self._buffers) < 2:
            self._buffers.append(self._make(PIECE_BYTES))
        if self._events[self._turn] is not None:
            self._events[self._turn].synchronize()
        return self._buffers[self._turn]

    def copy(self, target: torch.Tensor, values: torch.Tensor, slot: Slot) -> None:
        """target <- values, with a cast if they differ, once the slot is free."""
        if self._copies is None:
            target.copy_(values)
            return
        with torch.cuda.stream(self._copies):
            if slot.free_event is not None:
                self._copies.wait_event(slot.free_event)
            target.copy_(values, non_blocking=True)
            self._events[self._turn] = self._copies.record_event()
