"""Weights for several GPUs of one host: each copies a part from the host store, and they exchange.

A copy from the host takes the way that all of the host's memory takes, the exchange that between
the GPUs, which is several times as fast.
"""

import zlib

import torch
import torch.distributed as dist

from onn_core.errors import OnnError
from onn_core.weights.slots import DEVICE_ALIGNMENT, StreamedWeight

NOT_EXCHANGED = (
    "the GPUs of this host could not exchange the parts of the weights: start all processes "
    "again, without ONN_GATHER=1, so that each copies all weights."
)
SMALLEST_BYTES = 1 << 20  # a smaller weight is copied sooner than it is exchanged


class Gather:
    """The exchange in the course of a step between the processes of an NCCL group of one host.

    All must fetch the same weights in the same order. What is fetched follows from the plan and
    the order of use alone, once every weight is in the host store; `require_same` tells whether
    it did.
    """

    def __init__(self, copy_stream: torch.cuda.Stream, group: "dist.ProcessGroup"):
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._group = group
        self._copy_stream = copy_stream
        self._done_stream = torch.cuda.Stream(copy_stream.device)  # waits, so that no copy does
        self._order = 0  # a checksum of what was exchanged so far

    def copy(self, weight: StreamedWeight) -> bool:
        """Queue this process's part of a weight into its slot, and the exchange, if it is large."""
        slot, size = weight.slot, weight.slot_bytes // self._size
        size -= size % DEVICE_ALIGNMENT
        if weight.slot_bytes < SMALLEST_BYTES:
            return False
        self._order = zlib.crc32(weight.name.encode(), self._order)
        values = weight.host.view(-1).view(torch.uint8)
        all_parts = slot.memory[: size * self._size]
        rest = slice(len(all_parts), len(values))  # what does not divide into equal parts
        with torch.cuda.stream(self._copy_stream):
            self._copy_stream.wait_event(slot.used)
            slot.memory[rest].copy_(values[rest], non_blocking=True)
            start = self._rank * size
            part, own = all_parts[start : start + size], values[start : start + size]
            part[: len(own)].copy_(own, non_blocking=True)  # the last may end with padding
            work = dist.all_gather_into_tensor(all_parts, part, group=self._group, async_op=True)
        with torch.cuda.stream(self._done_stream):
            work.wait()
            slot.filled.record(self._done_stream)
        return True

    def require_same(self) -> None:
        """OnnError unless all processes exchanged the same weights in the same order."""
        mine = torch.tensor([self._order], device=self._copy_stream.device)
        every = mine.new_empty(self._size)
        dist.all_gather_into_tensor(every, mine, group=self._group)
        if len(set(every.tolist())) > 1:
            raise OnnError(NOT_EXCHANGED)
