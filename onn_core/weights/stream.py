"""Disk -> host -> device: weights arrive ahead of the compute, in the order it will use them.

A *unit* is what is visited at once: a decoder layer, or a block of rows of the head. A unit's
matrices are its *items*. The model says which units come next (the order of a training step is
known: forward, head, backward, forward ...), and reader threads keep as many upcoming items in
memory as there are *slots*. An item that is no longer needed stays until its slot is wanted for an
item that is used sooner (Belady's rule, optimal because the order is known): what fits stays
resident at both turns of the step, and a model that fits whole is read once.
"""

import dataclasses
import hashlib
import math
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import torch

from onn_core.errors import ConfigError, ModelFolderError
from onn_core.weights.folder import ModelFolder, TensorEntry
from onn_core.weights.items import Item, Slot, Staging, no_memory
from onn_core.weights.reader import DirectFiles, host_buffer, host_memory_bytes, run_at_once

# of a disk: one reads while the other is between two pieces; a GPU's host read 2.8 GB/s by each
N_READERS = {"cpu": 2, "cuda": 1}
N_COPIERS = max(2, min(8, (os.cpu_count() or 2) // 2))  # of the page cache
CHECK_S = 0.2  # between two looks, while the compute waits, at whether to stop
CLOSE_S = 10.0  # until a reader whose read does not return is left behind


@dataclasses.dataclass
class StreamCounts:
    """What a stream has done since it was made."""

    wait_s: float = 0.0  # the compute stood still for weights
    bytes_read: int = 0
    item_loads: Counter = dataclasses.field(default_factory=Counter)  # unit -> items fetched


class WeightStream:
    """Keeps the coming units' items on their way into a fixed number of slots.

    units: the items of every unit. slots: size in bytes -> how many.
    """

    def __init__(
        self,
        model_folder: ModelFolder,
        units: Sequence[Sequence[Item]],
        slots: Counter,
        device: torch.device,
    ):
        self.units = [list(unit) for unit in units]
        for number, unit in enumerate(self.units):
            for item in unit:
                item.unit = number
        self.slots = slots
        self.counts = StreamCounts()
        self.trace: list[tuple[str, int, float, float]] | None = None  # "read", unit, start, stop
        self.digests: dict[str, str] | None = None  # piece -> hash of its bytes; None checks none
        self.check: Callable[[], None] = lambda: None  # may raise, to abandon a step
        self._model_folder = model_folder
        self._device = device
        # a CUDA budget is the device's: host memory that nobody needs may keep what was read
        n_bytes = sum(item.n_bytes for unit in self.units for item in unit)
        cached = device.type == "cuda" and 5 * n_bytes <= 4 * host_memory_bytes()
        self.files = DirectFiles(cached)
        self._held: dict[int, list[Slot]] = defaultdict(list)
        self._entered: list[Item] = []  # of the unit that is visited now
        self._future: list[int] = []
        self._uses: dict[int, list[int]] = {}  # unit -> positions in the future
        self._pieces: list[tuple[Item, int, int]] = []  # of the item being fetched, last first
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._closed = self._hangs = False
        self._readers: list[threading.Thread] = []
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    # --- the compute's side ---------------------------------------------------------------

    def enter(self, future: Sequence[int], claim: bool = True) -> list[Item]:
        """Begin unit `future[0]` and return its items, each of which is then waited for.

        future: the units that will be visited, this one first; ~unit is fetched last item first.
        claim: all its items at once.
        """
        self.check()
        items = self.units[max(future[0], ~future[0])]
        with self._changed:
            for item in self._entered:  # left behind by a visit that was interrupted
                self.release(item)
            self._entered = items
            self._future = list(future)
            self._uses = defaultdict(list)
            for position, unit in enumerate(self._future):
                self._uses[max(unit, ~unit)].append(position)
            for item in items:
                item.in_use = claim
            if not self._readers:
                self._start_readers()
            self._changed.notify_all()
        return items

    def wait(self, item: Item) -> torch.Tensor:
        """The tensor of an item of the unit that was entered, when it is ready.

        ModelFolderError if a file fails, ConfigError if the memory for the slots cannot be had.
        """
        if not item.in_use:
            self.claim(item)
        with self._changed:
            started = time.perf_counter()
            while self._error is None and item.tensor is None:
                self._changed.wait(CHECK_S)
                self.check()
            self.counts.wait_s += time.perf_counter() - started
            if self._error is not None:
                raise self._error
        if item.ready_event is not None:
            torch.cuda.current_stream(self._device).wait_event(item.ready_event)
        return item.tensor

    def release(self, item: Item) -> None:
        """The compute needs `item` no longer in this visit."""
        if not item.in_use:
            return
        if self._copies is not None and item.slot is not None:
            item.slot.free_event = torch.cuda.current_stream(self._device).record_event()
        with self._changed:
            item.in_use = False
            self._changed.notify_all()

    def claim(self, item: Item) -> None:
        """The compute will need `item` in this visit."""
        with self._changed:
            item.in_use = True
            self._changed.notify_all()

    def reorder(self, unit: int, items: list[Item]) -> None:
        """Fetch the items of a unit in this order from now on."""
        with self._changed:
            self.units[unit][:] = items

    def check_files(self) -> None:
        """ModelFolderError if a shard is not what it was when the model was loaded."""
        self._model_folder.check_unchanged()

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Stop the readers and give all memory back; `enter` starts afresh.

        A reader whose read does not return in time keeps its memory; `enter` is then an error.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() in self._readers:  # its garbage collection found the owner
            threading.Thread(target=self.close).start()
            return
        deadline = time.monotonic() + (0 if self._hangs else timeout_s)
        self._hangs = True  # until all have ended: who interrupts this does not wait again
        for reader in self._readers:
            reader.join(max(0, deadline - time.monotonic()))
        self._hangs = any(reader.is_alive() for reader in self._readers)
        if self._hangs:
            self._error = ModelFolderError(
                "a read of the weights does not return: check the disk and load the model again."
            )
            return
        self._readers.clear()
        self._held.clear()
        self._pieces.clear()
        for unit in self.units:
            for item in unit:
                item.slot, item.tensor, item.in_use = None, None, False
        self._error = None
        self.files.close()

    def _start_readers(self) -> None:
        self._closed = False
        for number in range(N_COPIERS if self.files.cached else N_READERS[self._device.type]):
            reader = threading.Thread(target=self._read, name=f"onn-reader-{number}", daemon=True)
            reader.start()
            self._readers.append(reader)

    # --- what to fetch next, and where to put it -------------------------------------------

    def _next_piece(self) -> tuple[Item, int, int] | None:
        """The next (item, start, stop) to read, or None while there is nothing to fetch."""
        if self._error is not None:
            return None
        if not self._pieces:
            try:
                item = self._next_item()
            except (OSError, RuntimeError, MemoryError) as error:  # mmap's, CUDA's, Python's
                self._error = ConfigError(no_memory(self.units, self.slots, self._held, error))
                self._changed.notify_all()
                return None
            if item is None:
                return None
            pieces = item.pieces()
            item.pieces_left = len(pieces)
            self._pieces = [(item, start, stop) for start, stop in reversed(pieces)]
        return self._pieces.pop()

    def _next_item(self) -> Item | None:
        """The absent item that is used soonest and has room; its slot is then its own."""
        full = set()  # sizes that have no room for an item used this late
        for position, unit in enumerate(self._future):
            for item in self.units[unit] if unit >= 0 else self.units[~unit][::-1]:
                if item.slot is not None or item.slot_bytes in full:
                    continue
                if position == 0 and not item.in_use:  # already let go in this visit
                    continue
                slot = self._find_slot(item.slot_bytes, position)
                if slot is None:
                    full.add(item.slot_bytes)
                    continue
                if slot.item is not None:
                    slot.item.slot = slot.item.tensor = None
                slot.item, item.slot = item, slot
                self.counts.item_loads[item.unit] += 1
                return item
            if len(full) == len(self.slots):
                break
        return None

    def _find_slot(self, size: int, position: int) -> Slot | None:
        """A new slot, or the one whose item is used last, if that is after `position`."""
        held = self._held[size]
        if len(held) < self.slots[size]:
            held.append(self._new_slot(size))
            return held[-1]
        idle = [slot for slot in held if slot.item.tensor is not None and not slot.item.in_use]
        last_used = max(idle, key=lambda slot: self._next_use(slot.item), default=None)
        if last_used is not None and self._next_use(last_used.item) > position:
            return last_used
        return None

    def _new_slot(self, size: int) -> Slot:
        if self._copies is None:
            return Slot(host_buffer(size))
        return Slot(torch.empty(size, dtype=torch.uint8, device=self._device))

    def _next_use(self, item: Item) -> float:
        """When an idle item is used again: its use in the current unit, position 0, is over."""
        return next((use for use in self._uses.get(item.unit, ()) if use > 0), math.inf)

    # --- the readers' side ----------------------------------------------------------------

    def _read(self) -> None:
        run_at_once()
        staging = Staging(self._copies)
        while True:
            with self._changed:
                while (piece := self._next_piece()) is None:
                    if self._closed:
                        return
                    self._changed.wait()
                if self._closed:
                    return
            item, start, stop = piece
            n_read, error, started = 0, None, time.perf_counter()
            try:
                n_read = self._load(item, start, stop, staging)
            except Exception as problem:  # raised in the compute's thread, by wait
                error = problem
            with self._changed:
                if self.trace is not None:
                    self.trace.append(("read", item.unit, started, time.perf_counter()))
                self.counts.bytes_read += n_read
                item.pieces_left -= 1
                if error is not None:
                    self._error = self._error or error
                elif item.pieces_left == 0 and not self._error:
                    if self._copies is not None:
                        item.ready_event = self._copies.record_event()
                    item.tensor = item.view(item.slot.memory)
                self._changed.notify_all()

    def _load(self, item: Item, start: int, stop: int, staging: "Staging") -> int:
        """Bring bytes start:stop of the item's file into its slot; returns the bytes read."""
        source, memory = item.source, item.slot.memory
        if not source.direct:
            values = source.read(self._model_folder)
            self._verify(source.entry, 0, values)
            staging.copy(item.view(memory), values, item.slot)
            return source.n_bytes
        entry = source.entry
        into = memory[start - item.first_page :]
        if item.in_place and self._copies is None:
            n_read = self.files.read(entry.path, start, stop, into)
            self._verify(entry, start, into[: stop - start])
            return n_read
        buffer = staging.buffer()
        n_read = self.files.read(entry.path, start, stop, buffer)
        self._verify(entry, start, buffer[: stop - start])
        if item.in_place:
            staging.copy(into[: stop - start], buffer[: stop - start], item.slot)
        else:
            begin = max(start, entry.offset)
            values = buffer[begin - start : stop - start].view(entry.dtype)
            first = (begin - entry.offset) // entry.dtype.itemsize
            target = item.view(memory).view(-1)[first : first + len(values)]
            staging.copy(target, values, item.slot)
        return n_read

    def _verify(self, entry: TensorEntry, start: int, values: torch.Tensor) -> None:
        """ModelFolderError if a piece is not what it was when it was first read."""
        if self.digests is None:
            return
        content = values.contiguous().flatten().view(torch.uint8).numpy()
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        if self.digests.setdefault(f"{entry.name} {start}", digest) != digest:
            raise ModelFolderError(
                f"{entry.path.name} is not what it was ({entry.name} has other values): restore "
                "the model folder and load it again."
            )
