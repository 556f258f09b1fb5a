"""Disk -> host -> device: weights are fetched ahead of the compute, in the order of their use.

A *unit* is what is visited at once: a decoder layer, or a block of rows of the head. What is
fetched next, and what it evicts, is the matter of `schedule.py`; here is who fetches. A weight
that a device's host store holds is copied by the compute's own thread, which only queues the copy.
All else is read by reader threads, which sleep while there is nothing to read.
"""

import contextlib
import dataclasses
import hashlib
import os
import threading
import time
import types
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence

import torch

from onn_core.errors import ConfigError, ModelFolderError
from onn_core.weights.ahead import ReadAhead
from onn_core.weights.folder import ModelFolder
from onn_core.weights.gather import Gather
from onn_core.weights.host import HostStore, Staging
from onn_core.weights.reader import (
    DirectFiles,
    ReaderCount,
    host_buffer,
    host_memory_bytes,
    run_at_once,
)
from onn_core.weights.schedule import Schedule, Use
from onn_core.weights.shards import TensorEntry
from onn_core.weights.shared import is_shared
from onn_core.weights.slots import Read, Scratch, Slot, StreamedWeight

# Of a disk. Two on a CPU: one reads while the other is between two reads. Before a device it is
# tried which number is fastest.
N_READERS = {"cpu": (2,), "cuda": (1, 2, 4, 8)}
N_CACHE_READERS = max(2, min(8, (os.cpu_count() or 2) // 2))  # of the page cache
CHECK_S = 0.2  # between two looks, while the compute waits, at whether to stop
CLOSE_S = 10.0  # until a reader whose read does not return is left behind


@dataclasses.dataclass
class StreamCounts:
    """What a stream has done since it was made."""

    wait_s: float = 0.0  # the compute stood still for weights
    bytes_read: int = 0  # of files
    bytes_fetched: int = 0  # into slots, from files or from host memory
    weight_loads: Counter = dataclasses.field(default_factory=Counter)  # unit -> weights


class WeightStream:
    """Fetches the coming units' weights into a fixed number of slots.

    model_folder: where the weights lie. units: the weights of each unit. slots: size in bytes ->
    how many. host_budget: bytes of host memory that may hold weights for a device, or for several
    processes. dense: size in bytes -> buffers of the scratch. check: called while the compute
    waits; it may raise, to abandon a step.
    """

    def __init__(
        self,
        model_folder: ModelFolder,
        units: Sequence[Sequence[StreamedWeight]],
        slots: Counter,
        device: torch.device,
        host_budget: int = 0,
        dense: Counter | None = None,
    ):
        self.schedule = Schedule(units, slots, self.new_slot)
        self.units = self.schedule.units
        self.scratch = Scratch(device, dense or Counter())
        self.casts_once = False
        self.counts = StreamCounts()
        self.trace: list[tuple[str, int, float, float]] | None = None  # "read", unit, start, stop
        self.digests: dict[str, str] | None = None  # read -> hash of its bytes; None checks none
        self.check: Callable[[], None] = lambda: None
        self.model_folder = model_folder
        self.device = device
        every = [weight for unit in units for weight in unit]
        # A CUDA budget is the device's: host memory that nobody needs may cache what was read.
        n_bytes = sum(weight.n_bytes for weight in every)
        cached = device.type == "cuda" and 5 * n_bytes <= 4 * host_memory_bytes()
        self.files = DirectFiles(cached)
        self.copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._compute_stream = self.copy_stream and torch.cuda.current_stream(device)
        self.store = HostStore(device, every, host_budget, model_folder.fingerprint())
        self.ahead = ReadAhead(device, units, self.store) if self.copy_stream else None
        self.gather: Gather | None = None  # with the other processes of this host
        self._entered: list[StreamedWeight] = []  # of the unit that is visited now
        self._reads: deque[tuple[StreamedWeight, int, Read]] = deque()
        self._error: Exception | None = None
        lock = threading.RLock()
        self._ready = threading.Condition(lock)  # a weight, or an error
        self._work = threading.Condition(lock)  # a read, or the end
        self._closed = self._hangs = False
        self._readers: list[threading.Thread] = []
        choices = (N_CACHE_READERS,) if cached else N_READERS[device.type]
        if is_shared():  # processes that try at once would try against each other
            choices = choices[:1]
        self._most_readers, self.reader_count = max(choices), ReaderCount(choices)

    # --- the compute's side ---------------------------------------------------------------

    def enter(self, future: Sequence[Use], request: bool = True) -> list[StreamedWeight]:
        """Begin the visit of `future[0]` and return its weights, each of which is waited for.

        future: the units that will be visited, this one first. request: all its weights at once;
        without, each when `request` or `wait` asks for it (matrix by matrix).
        """
        self.check()
        if self.copy_stream is not None:  # asked once a visit: it takes a while
            self._compute_stream = torch.cuda.current_stream(self.device)
        weights = self.units[future[0].unit]
        with self._ready:
            for weight in self._entered:  # left behind by a visit that was interrupted
                self.release(weight)
            self._entered = weights
            self.schedule.begin(future, by_request=not request)
            for weight in weights:
                weight.in_use = request
            if not self._readers:
                self._start_readers()
            self._fetch()
        return weights

    def request(self, weight: StreamedWeight) -> None:
        """The compute will need `weight` in this visit."""
        if weight.in_use and weight.tensor is not None:
            return
        with self._ready:
            weight.in_use = True
            self.schedule.request(weight)
            self._fetch()

    def wait(self, weight: StreamedWeight) -> torch.Tensor:
        """What the slot of a weight of the unit that was entered holds, when it is ready.

        ModelFolderError if a file fails, ConfigError if a slot's memory cannot be had.
        """
        self.request(weight)
        if weight.tensor is None or self._error is not None:
            with self._ready:
                started = time.perf_counter()
                while self._error is None and weight.tensor is None:
                    self._ready.wait(CHECK_S)
                    self.check()
                self.counts.wait_s += time.perf_counter() - started
                if self._error is not None:
                    raise self._error
        if self.copy_stream is not None:
            self._compute_stream.wait_event(weight.slot.filled)
        return weight.tensor

    def release(self, weight: StreamedWeight) -> None:
        """The compute needs `weight` no longer in this visit."""
        if not weight.in_use:
            return
        if self.copy_stream is not None and weight.slot is not None:
            weight.slot.used.record(self._compute_stream)
        with self._ready:
            weight.in_use = False
            self._fetch()

    def reorder(self, unit: int, weights: list[StreamedWeight]) -> None:
        """Fetch the weights of a unit in this order from now on."""
        with self._ready:
            self.schedule.reorder(unit, weights)

    def hash_reads(self) -> dict[str, str]:
        """From now on compare every read with its first; returns the hashes of the first reads."""
        if self.digests is None:
            self.digests = {}
        return self.digests

    def set_slots(
        self, slots: Counter, dense: Counter | None = None, casts_once: bool = False
    ) -> None:
        """Go on with other slots; what is resident is evicted if they differ.

        casts_once: whether small matrices have a copy in the dtype that they are multiplied in.
        """
        if dense is not None and dense != self.scratch.counts:
            self.scratch.clear()
            self.scratch.counts = dense
        if (slots, casts_once) != (self.schedule.slots, self.casts_once):
            self._stop(CLOSE_S)
            self.schedule.slots, self.casts_once = slots, casts_once

    def state(self) -> str:
        """What decides which weights are copied next; "" while some have yet to be read."""
        with self._ready:
            weights = [weight for unit in self.units for weight in unit]
            if not all(self.store.holds(weight) and weight.host is not None for weight in weights):
                return ""
            return self.schedule.state()

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Stop the readers and give all memory back; `enter` starts afresh.

        A reader whose read does not return in time keeps its memory; `enter` is then an error.
        """
        if self._stop(timeout_s):
            self.store.close()
            if self.ahead is not None:
                self.ahead.close()

    def _stop(self, timeout_s: float) -> bool:
        """Whether all readers have ended and the slots are given back; the host store stays."""
        with self._work:
            self._closed = True
            self._work.notify_all()
        if threading.current_thread() in self._readers:  # its garbage collection found the owner
            threading.Thread(target=self.close).start()
            return False
        deadline = time.monotonic() + (0 if self._hangs else timeout_s)
        self._hangs = True  # until all have ended: who interrupts this does not wait again
        for reader in self._readers:
            reader.join(max(0, deadline - time.monotonic()))
        self._hangs = any(reader.is_alive() for reader in self._readers)
        if self._hangs:
            self._error = ModelFolderError(
                "a read of the weights does not return: check the disk and load the model again."
            )
            return False
        self._readers.clear()
        self._reads.clear()
        if self.copy_stream is not None:  # slots that are being filled are another's memory soon
            torch.cuda.synchronize(self.device)
        if self.ahead is not None:
            self.ahead.clear()
        self.schedule.clear()
        self.scratch.clear()
        self._error = None
        self.files.close()
        return True

    # --- who fetches ----------------------------------------------------------------------

    def _fetch(self) -> None:
        """Copy from the host, or give to the readers, all that has a slot; under the lock."""
        while self._error is None:
            try:
                weight = self.schedule.next_fetch()
                if weight is not None and self.store.holds(weight):
                    self.store.reserve(weight)
            except (OSError, RuntimeError, MemoryError) as error:  # mmap's, CUDA's, Python's
                self._fail(ConfigError(self.schedule.no_memory(error)))
                return
            if weight is None:
                break
            self.counts.weight_loads[weight.unit] += 1
            self.counts.bytes_fetched += weight.n_bytes
            if weight.host is not None:
                self.copy_from_host(weight)
            elif not weight.reads_left:  # it is not being read ahead
                self._begin_reads(weight)
        if self.ahead is None or self._error is not None:
            return
        for weight in self.schedule.coming():
            is_absent = weight.slot is None and weight.host is None and not weight.reads_left
            if is_absent and self.ahead.take(weight):
                self._begin_reads(weight)

    def _begin_reads(self, weight: StreamedWeight) -> None:
        reads = self.store.reads(weight)
        weight.reads_left = len(reads)
        self._reads.extend((weight, *read) for read in reads)
        self._work.notify_all()

    def copy_from_host(self, weight: StreamedWeight) -> None:
        """Queue the copy of a weight in host memory into its slot; a CPU takes it as it is."""
        slot = weight.slot
        if self.copy_stream is None:
            weight.tensor = weight.host
            return
        tensor = weight.view(slot.memory)
        # An exchange may still fill it, with a weight that was never used.
        self.copy_stream.wait_event(slot.filled)
        if self.gather is None or not self.gather.copy(weight):
            self.copy_stream.wait_event(slot.used)
            with torch.cuda.stream(self.copy_stream):
                tensor.copy_(weight.host, non_blocking=True)
            slot.filled.record(self.copy_stream)
        self.ahead.give_back(weight, self.copy_stream)
        weight.tensor = tensor  # last: who sees it without the lock waits for `filled`

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._ready.notify_all()

    def new_slot(self, n_bytes: int) -> Slot:
        """Memory on the device; MemoryError, OSError or RuntimeError if there is none."""
        if self.copy_stream is None:
            return Slot(host_buffer(n_bytes))
        memory = torch.empty(n_bytes, dtype=torch.uint8, device=self.device)
        slot = Slot(memory, filled=torch.cuda.Event(), used=torch.cuda.Event())
        # Kernels that are still queued may use what the allocator hands out again.
        slot.used.record(torch.cuda.current_stream(self.device))
        return slot

    def _start_readers(self) -> None:
        self._closed = False
        for number in range(self._most_readers):
            name = f"onn-reader-{number}"
            reader = threading.Thread(target=self._run, args=[number], name=name, daemon=True)
            reader.start()
            self._readers.append(reader)

    def _run(self, number: int) -> None:
        """A reader: one read after the other, until the stream is closed; while it is one of few.

        number: from 0; those from `reader_count.now` on rest.
        """
        run_at_once()
        staging = Staging(self.copy_stream)
        while True:
            with self._work:
                while not self._closed and (not self._reads or number >= self.reader_count.now):
                    self._work.wait()
                if self._closed:
                    return
                weight, piece, read = self._reads.popleft()
            error = self._error
            try:
                if error is None:
                    with self.store.piece(weight, piece) as absent:
                        if absent:
                            self.fetch(weight, read, staging)
            except Exception as problem:  # raised in the compute's thread, by wait
                error = problem
            with self._ready:
                is_last = error is None and weight.reads_left == 1
                if not is_last:  # else it counts as read when it can be used
                    weight.reads_left -= 1
                if error is not None:
                    self._fail(error)
            if is_last:
                self._finish(weight)

    def _finish(self, weight: StreamedWeight) -> None:
        """The last of a weight's bytes has been read."""
        if self.store.holds(weight):
            self.store.pin(weight)
        with self._ready:
            weight.reads_left = 0
            memory = self._host_memory(weight)
            if memory is None:
                if self.copy_stream is not None:
                    weight.slot.filled.record(self.copy_stream)
                weight.tensor = weight.view(weight.slot.memory)
            else:
                weight.host = weight.view(memory)
                if weight.slot is not None:
                    self.copy_from_host(weight)
            self._ready.notify_all()
            self._fetch()  # what evicts this weight may have waited for it

    def fetch(self, weight: StreamedWeight, read: Read, staging: Staging) -> None:
        """Read a part of the weight's files to where it goes."""
        source, memory, used = weight.source, self._host_memory(weight), None
        if memory is None:
            memory, used = weight.slot.memory, weight.slot.used
        if not weight.packed and not source.direct:
            with self._reading(weight) as done:
                values = self.model_folder.read_source(source, weight.dtype)
                done.n_bytes = source.n_bytes
            self._verify(source.entry, 0, values)
            staging.copy(weight.view(memory), values, used)
            return
        entry, start, stop, at = read
        is_direct = (weight.packed or weight.in_place) and memory.device.type == "cpu"
        buffer = memory[at:] if is_direct else staging.buffer()
        with self._reading(weight) as done:
            done.n_bytes = self.files.read(entry.path, start, stop, buffer)
        values = buffer[: stop - start]
        self._verify(entry, start, values)
        if is_direct:
            return
        if weight.packed:
            target = memory[at : at + len(values)]
        else:
            begin = max(start, entry.offset)  # from the first whole element on; it may be cast
            values = values[begin - start :].view(entry.dtype)
            first = (begin - entry.offset) // entry.dtype.itemsize
            target = weight.view(memory).view(-1)[first : first + len(values)]
        staging.copy(target, values, used)

    @contextlib.contextmanager
    def _reading(self, weight: StreamedWeight) -> Iterator[types.SimpleNamespace]:
        """Around a read: it is counted, traced, and one of a trial of the number of readers.

        It is told `n_bytes`. What fills the host store is no trial: it is read once, into memory
        that nobody has touched.
        """
        is_tried, done = not self.store.holds(weight), types.SimpleNamespace(n_bytes=0)
        with self._work:
            started = time.perf_counter()
            if is_tried:
                self.reader_count.begin(started)
        try:
            yield done
        finally:
            stopped = time.perf_counter()
            with self._work:
                self.counts.bytes_read += done.n_bytes
                if self.trace is not None:
                    self.trace.append(("read", weight.unit, started, stopped))
                if is_tried:
                    n_before = self.reader_count.now
                    self.reader_count.end(stopped, done.n_bytes)
                    if self.reader_count.now > n_before:
                        self._work.notify_all()

    def _host_memory(self, weight: StreamedWeight) -> torch.Tensor | None:
        """(host_bytes,) uint8 that a weight is read into; None: its reads go to its slot."""
        if self.store.holds(weight):
            return self.store.memory[weight]
        return None if self.ahead is None else self.ahead.memory(weight)

    def _verify(self, entry: TensorEntry, start: int, values: torch.Tensor) -> None:
        """ModelFolderError if a read's bytes are not what they were when first read."""
        if self.digests is None:
            return
        content = values.contiguous().flatten().view(torch.uint8).numpy()
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        if self.digests.setdefault(f"{entry.name} {start}", digest) != digest:
            raise ModelFolderError(
                f"{entry.path.name} is not what it was ({entry.name} has other values): restore "
                "the model folder and load it again."
            )
