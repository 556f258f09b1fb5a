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
        self._store = store
        self._not_made: Counter = Counter()  # size in bytes -> buffers that may yet be made
        for unit in units:
            self._not_made |= Counter(weight.host_bytes for weight in unit if self._reads(weight))
        self._free: dict[int, list[_Buffer]] = defaultdict(list)
        self._taken: dict[StreamedWeight, _Buffer] = {}

    def _reads(self, weight: StreamedWeight) -> bool:
        return (weight.packed or weight.in_place) and not self._store.holds(weight)

    def take(self, weight: StreamedWeight) -> bool:
        """Whether there is a buffer for a weight, which then is its own."""
        size = weight.host_bytes
        if not self._reads(weight):
            return False
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

    def clear(self) -> None:
        """Forget what was read; no read may be under way."""
        for weight, buffer in self._taken.items():
            weight.host = None
            self._free[buffer.memory.nbytes].append(buffer)
        self._taken.clear()

    def close(self) -> None:
        """Give the memory back; no read may be under way."""
        self.clear()
        if any(self._free.values()):
            torch.cuda.synchronize(self._device)
        for size, free in self._free.items():
            while free:
                self._not_made[size] += 1
                unpin(free.pop().memory)
