"""Reading ahead of the slots without a device: its events take a while, its copies are real.

Streams and events of CUDA are stood in for; files, readers, schedule and buffers are those of a
run. What CUDA itself does is tested in `test_cuda.py`.
"""

import contextlib
import random
import time
from types import SimpleNamespace

import pytest
import torch
from test_stream import no_hang  # noqa: F401
from toy import streamed, toy_dir

from onn_core.errors import ModelFolderError
from onn_core.weights import ahead, host
from onn_core.weights.reader import host_buffer
from onn_core.weights.schedule import Use
from onn_core.weights.slots import Slot, count_slots
from onn_core.weights.stream import WeightStream

DEVICE = SimpleNamespace(type="cuda")


class Event:
    def __init__(self):
        self.passes_at = 0.0

    def record(self, stream=None):
        self.passes_at = time.perf_counter() + random.random() * 2e-4

    def synchronize(self):
        time.sleep(max(0.0, self.passes_at - time.perf_counter()))


class Stream:
    device = DEVICE

    def __init__(self, device=None):
        pass

    def wait_event(self, event):
        pass

    def record_event(self):
        event = Event()
        event.record()
        return event


class SlowStream(WeightStream):
    """Some reads take longer; one may fail."""

    fails_at = 0  # the number of the read
    n_reads = 0

    def new_slot(self, n_bytes):
        return Slot(host_buffer(n_bytes), filled=Event(), used=Event())

    def fetch(self, weight, read, staging):
        self.n_reads += 1
        if self.n_reads == self.fails_at:
            raise ModelFolderError("it cannot be read")
        time.sleep(random.choice([0.0, 0.0, 5e-4]))
        super().fetch(weight, read, staging)


@pytest.fixture
def pinned(monkeypatch):
    """Addresses of what is pinned now; CUDA is stood in for."""
    now = []
    for name, stand_in in (("Stream", Stream), ("Event", Event)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    for module in (host, ahead):
        monkeypatch.setattr(module, "pin", lambda memory, device: now.append(memory.data_ptr()))
        monkeypatch.setattr(module, "unpin", lambda memory: now.remove(memory.data_ptr()))
    return now


def open_slow(n_resident):
    """A stream of the toy's units whose host store holds nothing, and what each weight is."""
    own = streamed(toy_dir("llama")).streaming.stream
    own.close()
    folder = own.model_folder
    values = {w: folder.read_source(w.source, w.dtype) for unit in own.units for w in unit}
    return SlowStream(folder, own.units, count_slots(own.units, n_resident), DEVICE), values


def visit(stream, values, uses):
    weights = stream.enter(uses)
    for weight in weights[::-1] if uses[0].last_first else weights:
        assert torch.equal(stream.wait(weight), values[weight])
        time.sleep(random.choice([0.0, 1e-3]))  # it computes
        stream.release(weight)


@pytest.mark.parametrize("seed", range(6))
def test_weights_are_right_in_any_order_and_nothing_stays_pinned(seed, pinned):
    random.seed(seed)
    stream, values = open_slow(1 + seed % 2)
    units = range(len(stream.units))
    uses = [*map(Use, units), *(Use(n, random.random() < 0.3) for n in reversed(units))] * 3
    if seed > 3:
        random.shuffle(uses)
    for number in range(len(uses)):
        visit(stream, values, uses[number:])
    n_pinned = len(pinned)
    assert n_pinned > 0
    stream.set_slots(count_slots(stream.units, 2))  # another plan: the buffers stay
    visit(stream, values, uses)
    assert len(pinned) == n_pinned
    stream.close()
    assert not pinned


@pytest.mark.parametrize("fails_at", [3, 20, 45])
def test_a_read_that_fails_leaves_no_buffer_behind(fails_at, pinned):
    stream, values = open_slow(1)
    stream.fails_at = fails_at
    uses = [*map(Use, range(len(stream.units)))] * 40
    with pytest.raises(ModelFolderError, match="it cannot be read"):
        for number in range(len(uses)):
            visit(stream, values, uses[number:])
    for weight in values:  # as the end of the interrupted visit does
        stream.release(weight)
    stream.close()
    assert not pinned
    visit(stream, values, uses)  # it starts afresh
    stream.close()
