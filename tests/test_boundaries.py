"""Pinned host memory is used again, whatever lengths come; the pinning itself needs CUDA."""

import contextlib

import pytest
import torch

from onn_core.errors import ConfigError
from onn_core.weights.host import HostMemory


class Runtime:
    """What CUDA's runtime knows of pinned memory."""

    def __init__(self):
        self.pinned = set()

    def cudaHostRegister(self, address, n_bytes, flags):  # noqa: N802
        assert address not in self.pinned
        self.pinned.add(address)
        return 0

    def cudaHostUnregister(self, address):  # noqa: N802
        self.pinned.remove(address)
        return 0


@pytest.fixture
def runtime(monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda status: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    return runtime


def test_longer_batches_take_the_place_of_shorter_ones(runtime):
    memory = HostMemory(torch.device("cuda"))
    for n_tokens in (100, 101, 102, 50, 103, 103):  # as batches padded to the longest come
        layers = [memory.take(4096 * n_tokens) for _ in range(5)]
        assert all(buffer.nbytes >= 4096 * n_tokens for buffer in layers)
        assert len({buffer.data_ptr() for buffer in layers}) == len(runtime.pinned) == 5
        for buffer in layers:
            memory.give_back(buffer)
    kept = memory.take(4096)
    memory.close()
    memory.give_back(kept)  # afterwards: it is not pinned any more
    assert not runtime.pinned and memory.take(4096) is not kept


def test_memory_that_cannot_be_pinned(runtime, monkeypatch):
    def refuse(status):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.cuda, "check_error", refuse)
    with pytest.raises(ConfigError, match="lower batch_size"):
        HostMemory(torch.device("cuda")).take(4096)
