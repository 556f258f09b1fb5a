"""Where packed weights become dense: a few buffers, filled by whoever computes."""

from collections import Counter, defaultdict
from collections.abc import Collection

import torch

from onn_core.weights.reader import host_buffer
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
        self._free: dict[int, list[torch.Tensor]] = defaultdict(list)
        self._held: dict[StreamedWeight, torch.Tensor] = {}  # in the order of their filling

    @property
    def n_bytes(self) -> int:
        """Of the buffers that there are now."""
        free = [memory for buffers in self._free.values() for memory in buffers]
        return sum(memory.nbytes for memory in [*free, *self._held.values()])

    def fill(
        self, weight: StreamedWeight, busy: Collection[StreamedWeight]
    ) -> StreamedWeight | None:
        """Make a resident weight dense; returns the one whose buffer it took, if any.

        busy: weights that must stay dense.
        """
        size, evicted = weight.dense_bytes, None
        held = [one for one in self._held if one.dense_bytes == size]
        idle = [one for one in held if one not in busy]
        if self._free[size]:
            memory = self._free[size].pop()
        elif idle and len(held) >= self.counts[size]:
            evicted = idle[0]
            memory = self._held.pop(evicted)
            evicted.dense = None
        elif self._device.type == "cpu":
            memory = host_buffer(size)
        else:
            memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._held[weight] = memory
        weight.dense = memory.view(weight.dtype).view(weight.shape)
        with torch.no_grad():
            weight.fill_dense()
        return evicted

    def free(self, weight: StreamedWeight) -> None:
        """A weight is not needed dense any longer."""
        memory = self._held.pop(weight, None)
        if memory is not None:
            weight.dense = None
            self._free[weight.dense_bytes].append(memory)

    def clear(self) -> None:
        """Give all memory back."""
        for weight in self._held:
            weight.dense = None
        self._held.clear()
        self._free.clear()
