"""Weights for several GPUs of one host: each copies a part from the host store, and they exchange.

A copy from the host takes the way that all of the host's memory takes, the exchange that between
the GPUs, which is several times as fast. All processes must fetch the same weights in the same
order: what is fetched follows from the plan and from the order of use alone once every weight is in
the host store, and `order` tells whether it did.
"""

import zlib

import torch
import torch.distributed as dist

from onn_core.weights.slots import DEVICE_ALIGNMENT, StreamedWeight
from onn_core.weights.stream import WeightStream


class Gather:
    """The exchange of parts between the processes of `group`, an NCCL group of one host.

    From now on `stream` copies from its host store in this way, until the model is closed.
    """

    def __init__(self, stream: WeightStream, group: "dist.ProcessGroup"):
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.order = 0  # a checksum of what was fetched so far: equal in all processes
        self._group = group
        self._stream = torch.cuda.Stream(stream.device)  # waits for an exchange; no copy does
        self._copy_stream = stream.copy_stream
        self._copy_alone = stream.copy_from_store
        stream.copy_from_store = self.copy

    def copy(self, weight: StreamedWeight) -> None:
        """Queue the copy of this process's part of a weight into its slot, and the exchange."""
        if weight.slot_bytes % (self.size * (DEVICE_ALIGNMENT // 16)):  # into no equal parts
            self._copy_alone(weight)
            return
        self.order = zlib.crc32(weight.source.entry.name.encode(), self.order)
        slot = weight.slot
        weight.tensor = weight.view(slot.memory)
        size = weight.slot_bytes // self.size
        part = slot.memory[self.rank * size : (self.rank + 1) * size]
        values = weight.host.view(-1).view(torch.uint8)[self.rank * size :][:size]
        with torch.cuda.stream(self._copy_stream):
            self._copy_stream.wait_event(slot.used)
            part[: len(values)].copy_(values, non_blocking=True)  # the last part may be padded
            work = dist.all_gather_into_tensor(
                slot.memory, part, group=self._group, async_op=True
            )  # after the copy, on a stream of the group's own
        with torch.cuda.stream(self._stream):
            work.wait()
            slot.filled.record(self._stream)
