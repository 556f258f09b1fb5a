"""Host buffers for weights of a disk that are read before a slot of the device is free for them."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch

from onn_core.weights.host import HostStore, pin, unpin
from onn_core.weights.reader import host_buffer
from onn_core.weights.slots import StreamedWeight


@dataclasses.dataclass(eq=False)
class _Buffer:
    memory: torch.Tensor  # (host_bytes of its weights,) uint8, pinned
    copied: "torch.cuda.Event | None" = None  # on the copy stream, after its last copy


class ReadAhead:
    """Pinned memory for one unit: the disk fills it while the slots hold the unit before.

    Without it a disk rests while a layer computes whose weights take all slots. Only weights that
    are read as they are stored and are not in the store are read ahead.
    """

    def __init__(
        self, device: torch.device, units: Sequence[Sequence[StreamedWeight]], store: HostStore
    ):
        self._device = device
        self._not_made: Counter = Counter()  # size in bytes -> buffers that may yet be made
        for unit in units:
            read = [w for w in unit if (w.packed or w.in_place) and not store.holds(w)]
            self._not_made |= Counter(weight.host_bytes for weight in read)
        self._free: dict[int, list[_Buffer]] = defaultdict(list)
        self._taken: dict[StreamedWeight, _Buffer] = {}

    def take(self, weight: StreamedWeight) -> bool:
        """Whether there is a buffer for a weight, which then is its own."""
        size = weight.host_bytes
        if not self._free[size]:
            if not self._not_made[size]:
                return False
            self._not_made[size] -= 1
            try:
                memory = host_buffer(size)
                pin(memory, self._device)
            except (RuntimeError, OSError, MemoryError):  # then its reads wait for a slot
                self._not_made.clear()
                return False
            self._free[size].append(_Buffer(memory))
        self._taken[weight] = self._free[size].pop(0)
        return True

    def memory(self, weight: StreamedWeight) -> torch.Tensor | None:
        """(host_bytes,) uint8 that a weight is read into, once its last copy is done; or None."""
        buffer = self._taken.get(weight)
        if buffer is None:
            return None
        if buffer.copied is not None:
            buffer.copied.synchronize()
        return buffer.memory

    def give_back(self, weight: StreamedWeight, copy_stream: "torch.cuda.Stream") -> None:
        """The copy of a weight into its slot is queued."""
        buffer = self._taken.pop(weight, None)
        if buffer is not None:
            weight.host = None
            buffer.copied = copy_stream.record_event()
            self._free[buffer.memory.nbytes].append(buffer)

    def close(self) -> None:
        """Give the memory back; no read or copy may be under way."""
        for weight in self._taken:
            weight.host = None
        every = [*self._taken.values(), *(one for free in self._free.values() for one in free)]
        if every:
            torch.cuda.synchronize(self._device)
        for buffer in every:
            self._not_made[buffer.memory.nbytes] += 1
            unpin(buffer.memory)
        self._taken.clear()
        self._free.clear()
