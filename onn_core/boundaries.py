"""Where the inputs of layers wait for backward if the device has no room: on the host, on disk."""

import tempfile
from collections import defaultdict

import torch

from onn_core.reader import host_buffer


class HostMemory:
    """Pinned buffers that are used again; torch's own are as large as the next power of two."""

    def __init__(self) -> None:
        self._all: list[torch.Tensor] = []
        self._free: dict[int, list[torch.Tensor]] = defaultdict(list)  # size in bytes -> buffers

    def take(self, n_bytes: int) -> torch.Tensor:
        """(n_bytes,) uint8."""
        if not self._free[n_bytes]:
            buffer = host_buffer(n_bytes)
            runtime = torch.cuda.cudart()
            torch.cuda.check_error(runtime.cudaHostRegister(buffer.data_ptr(), n_bytes, 0))
            self._all.append(buffer)
            self._free[n_bytes].append(buffer)
        return self._free[n_bytes].pop()

    def give_back(self, buffer: torch.Tensor) -> None:
        """The next to take it may fill it only on the stream that last used it."""
        self._free[buffer.nbytes].append(buffer)

    def close(self) -> None:
        """Unpin all; what is taken stays readable."""
        if self._all:
            torch.cuda.synchronize()
        for buffer in self._all:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr()))
        self._all.clear()
        self._free.clear()


class OnHost:
    """A tensor in pinned host memory, from where a micro-batch at a time is fetched."""

    def __init__(self, tensor: torch.Tensor, memory: HostMemory):
        self.memory, self.buffer = memory, memory.take(tensor.nbytes)
        self.tensor = self.buffer.view(tensor.dtype).view(tensor.shape)
        self.tensor.copy_(tensor, non_blocking=True)

    def read(self) -> torch.Tensor:
        return self.tensor

    def __del__(self):
        self.memory.give_back(self.buffer)


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
