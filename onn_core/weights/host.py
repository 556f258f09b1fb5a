"""Host memory on the way to a device: pinned buffers, the host store, a reader's staging."""

import types
import warnings
import weakref
from collections.abc import Sequence

import torch

from onn_core.errors import ConfigError
from onn_core.weights.reader import host_buffer
from onn_core.weights.slots import READ_BYTES, StreamedWeight

PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


def pin(memory: torch.Tensor, device: torch.device) -> None:
    """Pin host memory (n,) uint8 for copies to any device; RuntimeError if it is refused."""
    register = torch.cuda.cudart().cudaHostRegister
    with torch.cuda.device(device):  # a new thread is on the first
        torch.cuda.check_error(register(memory.data_ptr(), memory.nbytes, PORTABLE))


def unpin(memory: torch.Tensor) -> None:
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()))


def as_seen_by(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A pinned tensor in host memory as one of the device, which reads it over the bus."""
    place = {"shape": (tensor.nbytes,), "typestr": "|u1", "data": (tensor.data_ptr(), False)}
    memory = types.SimpleNamespace(__cuda_array_interface__=place | {"version": 3})
    with torch.cuda.device(device):
        return torch.as_tensor(memory, device=device).view(tensor.dtype).view(tensor.shape)


class HostStore:
    """Weights that wait in host memory for a device: each from its first read on.

    weights: all that are streamed, in the order of their use. budget: bytes that they may take. If
    not all fit, those that do are spread evenly, so that the disk is read all the time.
    """

    def __init__(self, device: torch.device, weights: Sequence[StreamedWeight], budget: int):
        self._device = device
        self._memory: dict[StreamedWeight, torch.Tensor | None] = {}
        self._pinned: list[torch.Tensor] = []
        self._warned = False
        total = sum(weight.host_bytes for weight in weights)
        passed = 0
        self.budget_used = 0
        for weight in weights:
            passed += weight.host_bytes
            if self.budget_used + weight.host_bytes <= budget * min(1.0, passed / total):
                self.budget_used += weight.host_bytes
                self._memory[weight] = None

    def holds(self, weight: StreamedWeight) -> bool:
        """Whether a weight has its place here, read or not."""
        return weight in self._memory

    def reserve(self, weight: StreamedWeight) -> None:
        """Map memory for a weight; MemoryError or OSError if there is none."""
        if self._memory[weight] is None:
            self._memory[weight] = host_buffer(weight.host_bytes)

    def memory(self, weight: StreamedWeight) -> torch.Tensor:
        """(host_bytes,) uint8, page-aligned, that the weight is read into."""
        return self._memory[weight]

    def pin(self, weight: StreamedWeight) -> None:
        """Pin the memory of a weight after it was read: its pages are there, so that is quick."""
        memory = self._memory[weight]
        try:
            pin(memory, self._device)
            self._pinned.append(memory)
        except RuntimeError as error:
            if not self._warned:
                warnings.warn(
                    f"host memory cannot be pinned ({error}): copies to the device take about "
                    "twice as long; raise the limit of locked memory (ulimit -l) of this process.",
                    stacklevel=2,
                )
            self._warned = True

    @property
    def n_bytes(self) -> int:
        """Of the weights that it holds now."""
        return sum(weight.n_bytes for weight in self._memory if weight.host is not None)

    def close(self) -> None:
        """Give the memory back; each weight is read again at its next use."""
        if self._pinned:
            torch.cuda.synchronize(self._device)
        for memory in self._pinned:
            unpin(memory)
        self._pinned.clear()
        for weight in self._memory:
            self._memory[weight] = weight.host = None


class HostMemory:
    """Pinned buffers that are used again, of huge pages.

    torch's own are as large as the next power of two and of small pages, into which a direct read
    is slower: 8 MiB at a time, one reader, 2.8 against 4.0 GB/s on one machine.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._taken: list[torch.Tensor] = []
        self._free: list[torch.Tensor] = []

    def take(self, n_bytes: int) -> torch.Tensor:
        """(n_bytes or more,) uint8. ConfigError if the host has no more to pin.

        Where none is large enough, those that are free make room: a batch longer than all before
        has as many buffers, not more.
        """
        fits = [buffer for buffer in self._free if buffer.nbytes >= n_bytes]
        if fits:
            buffer = min(fits, key=lambda buffer: buffer.nbytes)
            self._free = [other for other in self._free if other is not buffer]
        else:
            self._unpin(self._free)
            self._free = []
            buffer = host_buffer(n_bytes)
            try:
                pin(buffer, self._device)
            except RuntimeError as error:
                raise ConfigError(
                    f"the host has no memory to pin for what passes to the device ({error}): free "
                    "some, or lower batch_size or max_length."
                ) from error
        self._taken.append(buffer)
        return buffer

    def give_back(self, buffer: torch.Tensor) -> None:
        """The next to take it may fill it only on the stream that last used it."""
        if any(other is buffer for other in self._taken):  # else it was unpinned in between
            self._taken = [other for other in self._taken if other is not buffer]
            self._free.append(buffer)

    def close(self) -> None:
        """Unpin all; what is taken stays readable."""
        self._unpin(self._free + self._taken)
        self._free, self._taken = [], []

    def _unpin(self, buffers: list[torch.Tensor]) -> None:
        if buffers:
            torch.cuda.synchronize(self._device)
        for buffer in buffers:
            unpin(buffer)


class Staging:
    """One reader's two buffers, for reads that are cast or copied to a device.

    copy_stream: of the device; None on a CPU.
    """

    def __init__(self, copy_stream: "torch.cuda.Stream | None"):
        self._copy_stream = copy_stream
        self._make = host_buffer
        if copy_stream is not None:  # pinned, of huge pages: into others direct reads are slower
            memory = HostMemory(copy_stream.device)
            self._make = memory.take
            weakref.finalize(self, memory.close).atexit = False
        self._buffers: list[torch.Tensor] = []
        self._copied: list = [None, None]  # an event for each buffer
        self._turn = 0

    def buffer(self) -> torch.Tensor:
        """(READ_BYTES,) uint8 whose last copy is done."""
        self._turn = 1 - self._turn
        while len(self._buffers) < 2:
            self._buffers.append(self._make(READ_BYTES))
        if self._copied[self._turn] is not None:
            self._copied[self._turn].synchronize()
        return self._buffers[self._turn]

    def copy(
        self,
        target: torch.Tensor,
        values: torch.Tensor,
        used: "torch.cuda.Event | None" = None,
    ) -> None:
        """target <- values, with a cast if they differ, once the event `used` has passed."""
        if self._copy_stream is None:
            target.copy_(values)
            return
        with torch.cuda.stream(self._copy_stream):
            if used is not None:
                self._copy_stream.wait_event(used)
            target.copy_(values, non_blocking=True)
            self._copied[self._turn] = self._copy_stream.record_event()
