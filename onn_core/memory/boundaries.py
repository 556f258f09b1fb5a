"""Where the inputs of layers wait for backward if the device has no room: on the host, on disk."""

import tempfile
import weakref

import torch

from onn_core.weights.host import HostMemory


class OnHost:
    """A tensor in pinned host memory, from where a micro-batch at a time is fetched."""

    def __init__(self, tensor: torch.Tensor, memory: HostMemory):
        buffer = memory.take(tensor.nbytes)
        weakref.finalize(self, memory.give_back, buffer)
        self.tensor = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self.tensor.copy_(tensor, non_blocking=True)
        self.copied = torch.cuda.current_stream(tensor.device).record_event()

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
