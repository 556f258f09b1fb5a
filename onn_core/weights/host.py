"""Pinned host memory."""

import torch

from onn_core.errors import ConfigError
from onn_core.weights.reader import host_buffer

PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


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
            register = torch.cuda.cudart().cudaHostRegister
            try:
                with torch.cuda.device(self._device):  # a new thread is on the first
                    torch.cuda.check_error(register(buffer.data_ptr(), n_bytes, PORTABLE))
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
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr()))
