"""The weights that are streamed, and the memory that holds them one after another.

A slot holds a weight as it is fetched; a scratch holds the dense values of packed weights.
"""

import dataclasses
import functools
import itertools
import math
import weakref
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from onn_core.weights.dequantise import Source
from onn_core.weights.reader import PAGE_BYTES, host_buffer, take_smallest
from onn_core.weights.shards import TensorEntry

READ_BYTES = 8 << 20  # at most, of one read
DEVICE_ALIGNMENT = 256  # bytes; matmul of a matrix that begins elsewhere is slow


class Read(NamedTuple):
    """Bytes start:stop of the file of a stored tensor.

    at: where the first of them goes in the weight's memory, unless they are cast on the way.
    """

    entry: TensorEntry
    start: int
    stop: int
    at: int


@dataclasses.dataclass(eq=False)
class StreamedWeight:
    """One matrix that is fetched and evicted.

    Where quantised matrices are stored it is packed: its slot holds the stored tensors, each in
    whole pages as in its file. It is multiplied by blocks, or its values are in a scratch while
    they are used.
    """

    source: Source
    shape: tuple[int, ...]
    dtype: torch.dtype  # of its values
    on_device: bool = False  # its slot is memory of a device, which no file is read into
    # The linear layer of its unit that alone uses it; None: who may use it at any time of a visit.
    module: int | None = None
    by_blocks: bool = False  # it can be multiplied as it is stored, a few rows at a time
    # The layers, perhaps of several runs, that use its values nevertheless.
    lookers: weakref.WeakSet = dataclasses.field(default_factory=weakref.WeakSet, repr=False)
    unit: int = -1  # the decoder layer, or the block of the head, that it belongs to
    slot: "Slot | None" = None
    tensor: torch.Tensor | None = None  # (shape) in the slot, once it is ready; packed, its bytes
    host: torch.Tensor | None = None  # the same in host memory, of what is copied from there
    dense: torch.Tensor | None = None  # (shape) in a scratch, if it needs one
    # What a small matrix, or that of experts, is cast to at each use; of a small one the plan may
    # have room for a copy.
    wide_dtype: torch.dtype | None = None
    wide: torch.Tensor | None = None  # (shape) that copy, for as long as it is resident
    in_use: bool = False
    reads_left: int = 0  # until it can be used, or copied from the host

    @property
    def name(self) -> str:
        """The same in every process of a run."""
        return f"{self.unit} {self.source.entries[0].name}"

    @property
    def packed(self) -> bool:
        return self.source is not None and self.source.packed

    @property
    def needs_dense(self) -> bool:
        """Whether it takes a buffer of the scratch."""
        return self.packed and not self.by_blocks or bool(self.lookers)

    @property
    def wide_bytes(self) -> int:
        if self.wide_dtype is None or self.by_blocks:
            return 0
        return math.prod(self.shape) * self.wide_dtype.itemsize

    def evict(self) -> None:
        """Its slot is no longer its own."""
        self.slot = self.tensor = self.wide = None

    @property
    def is_idle(self) -> bool:
        """Whether it is resident and may be evicted."""
        return self.tensor is not None and not self.in_use

    @property
    def dense_dtype(self) -> torch.dtype:
        return self.wide_dtype or self.dtype

    @property
    def dense_bytes(self) -> int:
        return math.prod(self.shape) * self.dense_dtype.itemsize

    @functools.cached_property
    def n_bytes(self) -> int:
        """Of what its slot holds."""
        if self.packed:
            return self.source.n_bytes
        return math.prod(self.shape) * self.dtype.itemsize

    @functools.cached_property
    def slot_bytes(self) -> int:
        """On a device its bytes; else in whole pages, with room for where it begins in one."""
        if self.on_device and not self.packed:
            return -(-self.n_bytes // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT
        return self.host_bytes

    @property
    def host_bytes(self) -> int:
        """Of host memory that its file is read into page by page."""
        sizes = [e.n_bytes for e in self.source.entries] if self.packed else [self.n_bytes]
        return sum(map(_in_pages, sizes))

    @property
    def in_place(self) -> bool:
        """Whether the file's bytes are the tensor's."""
        return self.source.direct and self.source.entry.dtype == self.dtype

    def reads(self) -> list[Read]:
        """What is read of its files; a weight that is converted as it is read is one."""
        if not self.packed and not self.source.direct:
            return [Read(self.source.entry, 0, 0, 0)]
        found, begin = [], 0
        for entry in self.source.entries:
            first, stop = _first_page(entry), entry.offset + entry.n_bytes
            for start in range(first, stop, READ_BYTES):
                end = min(start + READ_BYTES, stop)
                found.append(Read(entry, start, end, begin + start - first))
            begin += _in_pages(entry.n_bytes)
        return found

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """`tensor` in its slot (slot_bytes,), or in host memory (host_bytes,)."""
        if self.packed:
            return memory[: self.host_bytes]
        entry = self.source.entry
        in_page = self.in_place and memory.device.type == "cpu"
        begin = entry.offset - _first_page(entry) if in_page else 0
        return memory[begin : begin + self.n_bytes].view(self.dtype).view(self.shape)

    @property
    def captured_bytes(self) -> int:
        """Of the memory where CUDA graphs find its values."""
        return self.dense_bytes if self.packed else self.slot_bytes

    def values_in(self, memory: torch.Tensor) -> torch.Tensor:
        """(dense_bytes or more,) -> (shape), memory that its values fill, packed or not."""
        values = memory[: self.dense_bytes].view(self.dense_dtype)
        return (self.source.laid_out(values) if self.packed else values).view(self.shape)

    def stored_tensors(self) -> list[torch.Tensor]:
        """Of a packed weight that is resident: what its source is made of, in the slot."""
        found, begin = [], 0
        for entry in self.source.entries:
            at = begin + entry.offset - _first_page(entry)
            part = self.tensor[at : at + entry.n_bytes]
            if at % entry.dtype.itemsize:  # as in a file that aligns nothing
                part = part.clone()
            found.append(part.view(entry.dtype).view(entry.shape))
            begin += _in_pages(entry.n_bytes)
        return found

    @torch.no_grad()
    def write_values(self, out: torch.Tensor) -> None:
        """Give `out` (shape) the values of what is in the slot."""
        if not self.packed:
            out.copy_(self.tensor)
            return
        self.source.dense(self.stored_tensors(), self.dtype, out.view(self.source.shape))


def _in_pages(n_bytes: int) -> int:
    """Whole pages that hold so many bytes, wherever in a page they begin."""
    return -(-n_bytes // PAGE_BYTES) * PAGE_BYTES + PAGE_BYTES


def _first_page(entry: TensorEntry) -> int:
    """Where in its file the page begins that holds the first byte of a tensor."""
    return entry.offset // PAGE_BYTES * PAGE_BYTES


@dataclasses.dataclass(eq=False)
class Slot:
    """Memory that holds one weight at a time; on a device, with two events that order its use."""

    memory: torch.Tensor  # (slot_bytes,) uint8
    weight: StreamedWeight | None = None
    filled: "torch.cuda.Event | None" = None  # on the copy stream
    used: "torch.cuda.Event | None" = None  # on the compute's, after the last use


class Scratch:
    """Buffers for the values of weights that are not used as they are stored.

    Each holds a weight's until another weight needs it.
    counts: size in bytes -> buffers, as planned; weights that are used together may need more.
    A device fills a buffer on the stream that computes, after all that has used it. Whoever holds
    on to a weight must know it by its name: its values are made again at its next use.
    """

    def __init__(self, device: torch.device, counts: Counter):
        self.counts = counts
        self._device = device
        self._free: list[torch.Tensor] = []
        self._held: dict[StreamedWeight, torch.Tensor] = {}  # in the order of their filling

    @property
    def n_bytes(self) -> int:
        """Of the buffers that there are now."""
        return sum(memory.nbytes for memory in [*self._free, *self._held.values()])

    def fill(
        self, weight: StreamedWeight, busy: Collection[StreamedWeight]
    ) -> StreamedWeight | None:
        """Make a resident weight dense; returns the one whose buffer it took, if any.

        busy: weights that must stay dense.
        """
        memory, evicted = self._take(weight.dense_bytes, busy)
        self._held[weight] = memory
        weight.dense = weight.values_in(memory)
        weight.write_values(weight.dense)
        return evicted

    def _take(
        self, size: int, busy: Collection[StreamedWeight]
    ) -> tuple[torch.Tensor, StreamedWeight | None]:
        """A buffer of at least `size` bytes: free, not yet made, or of the weight filled first."""
        if (free := take_smallest(self._free, size)) is not None:
            return free, None
        made = Counter(memory.nbytes for memory in [*self._free, *self._held.values()])
        planned = [other for other in (self.counts - made).elements() if other >= size]
        for one, memory in () if planned else self._held.items():
            if memory.nbytes >= size and one not in busy:
                del self._held[one]
                one.dense = None
                return memory, one
        size = min(planned, default=size)
        if self._device.type == "cpu":
            return host_buffer(size), None
        return torch.empty(size, dtype=torch.uint8, device=self._device), None

    def free(self, weight: StreamedWeight) -> None:
        """A weight is not needed dense any longer."""
        memory = self._held.pop(weight, None)
        if memory is not None:
            weight.dense = None
            self._free.append(memory)

    def trim(self) -> None:
        """Give the memory back that no weight has."""
        self._free.clear()

    def clear(self) -> None:
        """Give all memory back."""
        for weight in self._held:
            weight.dense = None
        self._held.clear()
        self.trim()


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
    sizes = [tuple(weight.slot_bytes for weight in unit) for unit in units]
    ahead = [sizes[n][: len(prefetched(unit))] if prefetch else () for n, unit in enumerate(units)]
    windows = {  # of a model whose layers are alike only two differ
        (*sizes[first : first + n_resident], *ahead[first + n_resident :][:1])
        for first in range(max(1, len(units) - n_resident + 1))
    }
    slots: Counter = Counter()
    for window in windows:
        slots |= Counter(itertools.chain.from_iterable(window))  # the larger count of each size
    return slots


def few_slots(units: Sequence[Sequence[StreamedWeight]], n_each: int) -> Counter:
    """Size in bytes -> slots, at most `n_each`: for units that are streamed matrix by matrix."""
    slots: Counter = Counter()
    for unit in units:
        counts = Counter(weight.slot_bytes for weight in unit)
        slots |= Counter({size: min(count, n_each) for size, count in counts.items()})
    return slots


def count_dense(units: Sequence[Sequence[StreamedWeight]], whole_unit: bool) -> Counter:
    """Size in bytes -> buffers of a scratch: for a whole unit, or for a linear layer at a time.

    What may be used at any time has a buffer of its own.
    """
    counts: Counter = Counter()
    largest = 0  # of those that take turns
    for unit in units:
        needing = [weight for weight in unit if weight.needs_dense]
        turns = [w for w in needing if w.module is not None and not whole_unit]
        counts |= Counter(weight.dense_bytes for weight in needing if weight not in turns)
        largest = max([largest, *(weight.dense_bytes for weight in turns)])
    return counts + Counter({largest: int(largest > 0)})


def slots_bytes(slots: Counter) -> int:
    """Memory of all slots."""
    return sum(size * count for size, count in slots.items())
