"""The weights that are streamed, and the slots of memory that hold them one after another."""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Sequence

import torch

from onn_core.weights.formats import Source
from onn_core.weights.reader import PAGE_BYTES

READ_BYTES = 8 << 20  # at most, of one read
DEVICE_ALIGNMENT = 256  # bytes; matmul of a matrix that begins elsewhere is slow


@dataclasses.dataclass(eq=False)
class StreamedWeight:
    """One matrix that is fetched and evicted."""

    source: Source
    shape: tuple[int, ...]
    dtype: torch.dtype  # in memory
    on_device: bool = False  # its slot is memory of a device, which no file is read into
    unit: int = -1  # the decoder layer, or the block of the head, that it belongs to
    slot: "Slot | None" = None
    tensor: torch.Tensor | None = None  # (shape) in the slot, once it is ready
    host: torch.Tensor | None = None  # (shape) in the host store, once it has been read
    in_use: bool = False
    reads_left: int = 0

    @property
    def is_idle(self) -> bool:
        """Whether it is resident and may be evicted."""
        return self.tensor is not None and not self.in_use

    @functools.cached_property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @functools.cached_property
    def slot_bytes(self) -> int:
        """On a device its bytes; else in whole pages, with room for where it begins in one."""
        if self.on_device:
            return -(-self.n_bytes // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT
        return self.host_bytes

    @property
    def host_bytes(self) -> int:
        """Of host memory that its file is read into page by page."""
        return -(-self.n_bytes // PAGE_BYTES) * PAGE_BYTES + PAGE_BYTES

    @property
    def in_place(self) -> bool:
        """Whether the file's bytes are the tensor's."""
        return self.source.direct and self.source.entry.dtype == self.dtype

    @property
    def first_page(self) -> int:
        """Where in its file the page begins that holds its first byte."""
        return self.source.entry.offset // PAGE_BYTES * PAGE_BYTES

    def reads(self) -> list[tuple[int, int]]:
        """Byte ranges (start, stop) of its file, one a read; a converted weight is one."""
        if not self.source.direct:
            return [(0, 0)]
        stop = self.source.entry.offset + self.source.entry.n_bytes
        starts = range(self.first_page, stop, READ_BYTES)
        return [(start, min(start + READ_BYTES, stop)) for start in starts]

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensor (shape) in its slot (slot_bytes,), or in host memory (host_bytes,)."""
        in_page = self.in_place and memory.device.type == "cpu"
        begin = self.source.entry.offset - self.first_page if in_page else 0
        return memory[begin : begin + self.n_bytes].view(self.dtype).view(self.shape)


@dataclasses.dataclass(eq=False)
class Slot:
    """Memory that holds one weight at a time; on a device, with two events that order its use."""

    memory: torch.Tensor  # (slot_bytes,) uint8
    weight: StreamedWeight | None = None
    filled: "torch.cuda.Event | None" = None  # on the copy stream
    used: "torch.cuda.Event | None" = None  # on the compute's, after the last use


def prefetched(weights: Sequence[StreamedWeight]) -> list[StreamedWeight]:
    """The weights of a layer that are fetched while the one before computes: up to the largest.

    The current layer drops its weights one by one, so the largest finds room in time, and the
    layer begins when its first weight is ready.
    """
    largest = max(range(len(weights)), key=lambda i: weights[i].n_bytes, default=0)
    return list(weights[: max(1, largest)])


def count_slots(
    units: Sequence[Sequence[StreamedWeight]], n_resident: int, prefetch: bool = True
) -> Counter:
    """Size in bytes -> slots, for `n_resident` units at once and the prefetch of the next."""
    slots: Counter = Counter()
    for first in range(len(units)):
        window = [weight for unit in units[first : first + n_resident] for weight in unit]
        for unit in units[first + n_resident : first + n_resident + prefetch]:
            window += prefetched(unit)
        slots |= Counter(weight.slot_bytes for weight in window)  # the larger count of each size
    return slots


def few_slots(units: Sequence[Sequence[StreamedWeight]], n_each: int) -> Counter:
    """Size in bytes -> slots, at most `n_each`: for units that are streamed matrix by matrix."""
    slots: Counter = Counter()
    for unit in units:
        counts = Counter(weight.slot_bytes for weight in unit)
        slots |= Counter({size: min(count, n_each) for size, count in counts.items()})
    return slots


def slots_bytes(slots: Counter) -> int:
    """Memory of all slots."""
    return sum(size * count for size, count in slots.items())
