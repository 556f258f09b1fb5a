"""Host memory on the way to a device: pinned buffers, the host store, a reader's staging."""

import contextlib
import functools
import types
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from onn_core.errors import ConfigError
from onn_core.processes import local_rank, n_local
from onn_core.weights.reader import host_buffer, take_smallest
from onn_core.weights.shared import SharedMemory, is_shared
from onn_core.weights.slots import READ_BYTES, Read, StreamedWeight

PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


def pin(memory: torch.Tensor, device: torch.device) -> None:
    """Pin host memory (n,) uint8 for copies to any device; RuntimeError if it is refused."""
    register = torch.cuda.cudart().cudaHostRegister
    with torch.cuda.device(device):  # a new thread is on the first
        try:
            torch.cuda.check_error(register(memory.data_ptr(), memory.nbytes, PORTABLE))
        except RuntimeError:
            if torch.cuda.is_available():
                with contextlib.suppress(RuntimeError):  # CUDA says it again at the next launch
                    torch.ones(1, device=device)
            raise


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

    The processes of one host share one, on a CPU as well; each reads a part of a weight first.

    weights: all that are streamed, in the order of their use. budget: bytes that they may take. If
    not all fit, those that do are spread evenly, so that the disk is read all the time. what: says
    which weights they are.
    """

    def __init__(
        self, device: torch.device, weights: Sequence[StreamedWeight], budget: int, what: str = ""
    ):
        self._device = device
        # (host_bytes,) uint8, page-aligned, that each weight is read into, once it is reserved.
        self.memory: dict[StreamedWeight, torch.Tensor | None] = {}
        self._pinned: list[torch.Tensor] = []
        self._warned = False
        total = sum(weight.host_bytes for weight in weights)
        self._shared: SharedMemory | None = None
        self._open_shared: Callable[[], SharedMemory] | None = None
        if budget and is_shared():
            what += "".join(f" {w.source.entries} {w.shape} {w.dtype}" for w in weights)
            n_pieces = sum(len(weight.reads()) for weight in weights)
            self._open_shared = functools.partial(SharedMemory, what, total, n_pieces, budget)
            self._shared = self._open_shared()
            budget = self._shared.budget
        # Its first byte and its first piece, where another process has them whatever its budget.
        self._places: dict[StreamedWeight, tuple[int, int]] = {}
        self.budget_used = n_bytes = n_pieces = 0
        for weight in weights:
            place = n_bytes, n_pieces
            n_bytes, n_pieces = n_bytes + weight.host_bytes, n_pieces + len(weight.reads())
            if self.budget_used + weight.host_bytes <= budget * min(1.0, n_bytes / total):
                self.memory[weight], self._places[weight] = None, place
                self.budget_used += weight.host_bytes

    def holds(self, weight: StreamedWeight) -> bool:
        """Whether a weight has its place here, read or not."""
        return weight in self.memory

    def reserve(self, weight: StreamedWeight) -> None:
        """Map memory for a weight; MemoryError or OSError if there is none."""
        if self.memory[weight] is not None:
            return
        if self._open_shared is not None:
            self._shared = self._shared or self._open_shared()
            start, _ = self._places[weight]
            self.memory[weight] = self._shared.part(start, weight.host_bytes)
        else:
            self.memory[weight] = host_buffer(weight.host_bytes)

    def reads(self, weight: StreamedWeight) -> list[tuple[int, Read]]:
        """Those of a weight, numbered, in the order of this process: each begins elsewhere."""
        reads = list(enumerate(weight.reads()))
        first = len(reads) * local_rank() // n_local() if self._open_shared else 0
        return reads[first:] + reads[:first]

    def piece(self, weight: StreamedWeight, number: int) -> AbstractContextManager[bool]:
        """Around a weight's read of this number: whether it has yet to be done."""
        if self._shared is None or not self.holds(weight):
            return nullcontext(True)
        return self._shared.piece(self._places[weight][1] + number)

    def pin(self, weight: StreamedWeight) -> None:
        """Pin the memory of a weight after it was read: its pages are there, so that is quick."""
        if self._device.type != "cuda":
            return
        memory = self.memory[weight]
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

    def close(self) -> None:
        """Give the memory back; each weight is read again at its next use."""
        if self._pinned:
            torch.cuda.synchronize(self._device)
        for memory in self._pinned:
            unpin(memory)
        self._pinned.clear()
        for weight in self.memory:
            self.memory[weight] = weight.host = None
        if self._shared is not None:
            self._shared.close()
            self._shared = None


class HostMemory:
    """Pinned buffers that are used again, of huge pages.

    torch's own are as large as the next power of two and of small pages, into which a direct read
    is slower: 8 MiB at a time, one reader, 2.8 against 4.0 GB/s on one machine.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._taken: dict[int, torch.Tensor] = {}  # by address
        self._free: list[torch.Tensor] = []

    def take(self, n_bytes: int) -> torch.Tensor:
        """(n_bytes or more,) uint8. ConfigError if the host has no more to pin.

        Where none is large enough, those that are free make room: a batch longer than all before
        has as many buffers, not more.
        """
        buffer = take_smallest(self._free, n_bytes)
        if buffer is None:
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
        self._taken[buffer.data_ptr()] = buffer
        return buffer

    def give_back(self, buffer: torch.Tensor) -> None:
        """The next to take it may fill it only on the stream that last used it."""
        if self._taken.pop(buffer.data_ptr(), None) is not None:  # else it was unpinned in between
            self._free.append(buffer)

    def close(self) -> None:
        """Unpin all; what is taken stays readable."""
        self._unpin([*self._free, *self._taken.values()])
        self._free, self._taken = [], {}

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
        self, target: torch.Tensor, values: torch.Tensor, used: "torch.cuda.Event | None" = None
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
