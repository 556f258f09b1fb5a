"""Where packed weights become dense: a few buffers, filled by whoever computes."""

from collections import Counter
from collections.abc import Collection

import torch

from onn_core.weights.reader import host_buffer, take_smallest
from onn_core.weights.slots import StreamedWeight


class Scratch:
    """Buffers that hold the values of packed weights, each until another weight needs it.

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
        weight.dense = memory[: weight.dense_bytes].view(weight.dtype).view(weight.shape)
        with torch.no_grad():
            weight.fill_dense()
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

    def clear(self) -> None:
        """Give all memory back."""
        for weight in self._held:
            weight.dense = None
        self._held.clear()
        self._free.clear()
