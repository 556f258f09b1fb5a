"""Where the inputs of layers wait for backward if the device has no room: on the host, on disk."""

import tempfile
import weakref
from collections.abc import Callable

import torch

from onn_core.weights.host import HostMemory


class HostBoundaries:
    """Boundary activations of a device in pinned host memory, copied while the device computes."""

    def __init__(self, memory: HostMemory, device: torch.device):
        self.memory, self.device = memory, device
        self._stream: torch.cuda.Stream | None = None
        # Of the micro-batch to come: (address on the host, number) -> rows, when they are there.
        self._coming: dict[tuple[int, int], tuple[torch.Tensor, torch.cuda.Event]] = {}
        # Address of each tensor that was saved -> the one before, which backward needs after it.
        self._before: dict[int, Callable[[], OnHost | None]] = {}
        self._latest: Callable[[], OnHost | None] = lambda: None

    def save(self, tensor: torch.Tensor) -> "OnHost":
        """Begin to copy a tensor, which must not be overwritten before `wait_for_copy`."""
        self._forget_coming()  # of a backward pass that was abandoned
        saved = OnHost(tensor, self)
        self._before[saved.tensor.data_ptr()], self._latest = self._latest, weakref.ref(saved)
        return saved

    def stream(self) -> "torch.cuda.Stream":
        """One for both directions: a buffer is filled anew only after it was read."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return self._stream

    def part(
        self,
        whole: torch.Tensor,
        cut: Callable[[torch.Tensor, int], torch.Tensor],
        number: int,
        n_parts: int,
    ) -> torch.Tensor:
        """cut(whole, number), rows of `whole` on the host, on the device; the next begin to come.

        Those of the next layer, too: on the bus they would wait for its weights, which compute
        then waits for in turn.
        """
        key, now = whole.data_ptr(), torch.cuda.current_stream(self.device)
        rows, copied = self._coming.pop((key, number), None) or self._copy(cut(whole, number))
        self._forget_coming()
        number = (number + 1) % n_parts
        following = whole
        if number == 0:
            before = self._before.get(key, lambda: None)()
            following = None if before is None else before.tensor
        if following is not None and following.shape == whole.shape:
            rows_to_come = cut(following, number)
            if number or rows_to_come.is_contiguous():  # else the processor would gather them now
                self._coming[following.data_ptr(), number] = self._copy(rows_to_come)
        now.wait_event(copied)
        return rows

    def _forget_coming(self) -> None:
        for _, copied in self._coming.values():  # before its memory is another's
            torch.cuda.current_stream(self.device).wait_event(copied)
        self._coming.clear()

    def _copy(self, rows: torch.Tensor) -> "tuple[torch.Tensor, torch.cuda.Event]":
        there = torch.empty(rows.shape, dtype=rows.dtype, device=self.device)
        with torch.cuda.stream(self.stream()):
            there.copy_(rows, non_blocking=True)
            return there, torch.cuda.current_stream(self.device).record_event()


class OnHost:
    """A tensor in pinned host memory."""

    def __init__(self, tensor: torch.Tensor, boundaries: HostBoundaries):
        memory, self._device = boundaries.memory, boundaries.device
        buffer = memory.take(tensor.nbytes)
        weakref.finalize(self, memory.give_back, buffer)
        self.tensor = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        stream = boundaries.stream()
        with torch.cuda.stream(stream):
            self.tensor.copy_(tensor, non_blocking=True)
            self.copied = stream.record_event()

    def wait_for_copy(self) -> None:
        """Let the device wait, so that what it does next may overwrite the tensor."""
        torch.cuda.current_stream(self._device).wait_event(self.copied)

    def read(self) -> torch.Tensor:
        self.copied.synchronize()  # rows that are not contiguous are gathered by the processor
        return self.tensor


class OnDisk:
    """A tensor in a file without a name, which ends with it."""

    def __init__(self, tensor: torch.Tensor):
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        self.file.write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())

    def read(self) -> torch.Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.file.seek(0)
        self.file.readinto(tensor.view(-1).view(torch.uint8).numpy())
        return tensor

    def __del__(self):
        self.file.close()
