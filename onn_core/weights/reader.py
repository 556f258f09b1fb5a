"""Whole-page reads straight from disk, past the page cache where the file system allows it."""

import contextlib
import ctypes
import mmap
import os
import platform
import struct
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from onn_core.errors import ModelFolderError

PAGE_BYTES = 4096
O_DIRECT = getattr(os, "O_DIRECT", 0)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}  # of asm/unistd.h
KEEP_POLICY = 0x08
SLICE_NS = 100_000  # the least that Linux takes
MAX_OPEN = 32  # files; a process may have few descriptors, and a model hundreds of shards
MAPPED_BYTES = 8 << 20  # from here on a block is mapped; 32 MiB still left gaps of 300
TRIAL_BYTES = 1 << 30  # of one number of readers
WORTH_A_READER = 1.03  # times as fast, else fewer readers are taken


def hold_freed_memory(hold: bool) -> None:
    """Whether glibc holds large freed blocks back for the next tensor, or maps each by itself.

    Held back, they leave gaps that grow from visit to visit until they are trimmed; mapped, each
    of their pages is a fault. 4 layers of phi-4, batch 32 x 16: 7.1 s a step in 1.9 GiB with
    blocks that are held back, 8.5 s in 1.5 GiB with blocks that are mapped.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30 if hold else MAPPED_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def give_back_memory() -> None:
    """Give the pages of freed blocks back to the system, also those inside the heap."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def run_at_once() -> None:
    """Let the calling thread run as soon as it wakes, also where matmul fills every processor.

    Linux from 6.12 lets a thread with a short slice interrupt one with a longer, without privilege.
    With the usual slice a reader whose read has ended waits up to 3 ms for a processor, and the
    disk for its next read: 8 layers of phi-4 at batch 1 then take 1.80 s a step, not 1.78.
    """
    number = SCHED_SETATTR.get(platform.machine()) if sys.platform == "linux" else None
    if number is not None:
        size, niceness = struct.calcsize("IIQiIQQQ"), os.getpriority(os.PRIO_PROCESS, 0)
        attributes = struct.pack("IIQiIQQQ", size, 0, KEEP_POLICY, niceness, 0, SLICE_NS, 0, 0)
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).syscall(number, 0, attributes, 0)


def host_buffer(n_bytes: int) -> torch.Tensor:
    """(n_bytes,) uint8, page-aligned, given back to the system when dropped."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory, the default, has no huge pages
    memory = mmap.mmap(-1, n_bytes, flags=private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def take_smallest(free: list[torch.Tensor], n_bytes: int) -> torch.Tensor | None:
    """Take the smallest buffer of at least `n_bytes` out of `free`; None if there is none."""
    fits = [place for place, buffer in enumerate(free) if buffer.nbytes >= n_bytes]
    return free.pop(min(fits, key=lambda place: free[place].nbytes)) if fits else None


def host_memory_bytes() -> int:
    """Memory that this process could fill: what is available, within its control group's limit."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    room = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        folder, name = Path("/sys/fs/cgroup"), "memory.max"
        if controllers:
            folder, name = folder / "memory", "memory.limit_in_bytes"
        if controllers in ("", "memory"):
            for group in (folder / path[1:], *(folder / path[1:]).parents):
                with contextlib.suppress(OSError, ValueError):  # "max", or no such group
                    room = min(room, int((group / name).read_text()))
    return room


class ReaderCount:
    """How many readers read at once: each of `choices` (few first) is tried, the fastest stays.

    It belongs to the disk: of two virtual disks of hosts with a GPU one gave most to a single
    reader, and from the other a single one got 69 % of the ceiling.
    """

    def __init__(self, choices: Sequence[int]):
        self.now = choices[0]
        # The first twice: its first reads open the files, and touch new memory.
        self._trials = deque([choices[0], *choices] if len(choices) > 1 else [])
        self._trial_s: dict[int, float] = {}  # number of readers -> seconds a byte
        self._n_bytes, self._busy_s = 0, 0.0  # of the present trial
        self._under_way, self._since = 0, 0.0

    def begin(self, now: float) -> None:
        """A read begins, at `now` in seconds."""
        self._tick(now)
        self._under_way += 1

    def end(self, now: float, n_bytes: int) -> None:
        """A read of so many bytes has ended.

        What counts is the time in which any was under way: it is not the disk's that none was.
        """
        self._tick(now)
        self._under_way -= 1
        self._n_bytes += n_bytes
        if not self._trials or self._n_bytes < TRIAL_BYTES:
            return
        self._trial_s[self._trials.popleft()] = self._busy_s / self._n_bytes
        self._n_bytes, self._busy_s = 0, 0.0
        if self._trials:
            self.now = self._trials[0]
            return
        most_s = WORTH_A_READER * min(self._trial_s.values())
        self.now = next(n for n, trial_s in self._trial_s.items() if trial_s <= most_s)

    def _tick(self, now: float) -> None:
        now = max(now, self._since)
        if self._under_way:
            self._busy_s += now - self._since
        self._since = now


class DirectFiles:
    """Descriptors that many threads read from; opened at first use, MAX_OPEN of them for good.

    cached: read through the page cache and leave it the pages.
    """

    def __init__(self, cached: bool = False):
        self.cached = cached
        self._opened: dict[Path, tuple[int, bool]] = {}  # descriptor, direct
        self._lock = threading.Lock()

    def read(self, path: Path, start: int, stop: int, into: torch.Tensor) -> int:
        """Read bytes start:stop to the start of `into`; returns the bytes read, in whole pages.

        `start` is a multiple of the page; `into` is page-aligned and holds whole pages.
        ModelFolderError if the file is gone, refuses, or has become shorter.
        """
        n_whole = -(-(stop - start) // PAGE_BYTES) * PAGE_BYTES
        view = memoryview(into.numpy())[:n_whole]
        n_read = 0
        try:
            with self._descriptor(path) as (descriptor, direct):
                while n_read < stop - start:
                    got = os.preadv(descriptor, [view[n_read:]], start + n_read)
                    if got == 0:
                        raise ModelFolderError(
                            f"{path.name} became shorter while it was read: "
                            "restore the model folder and start again."
                        )
                    n_read += got
                if not direct and not self.cached and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(descriptor, start, n_whole, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise ModelFolderError(
                f"{path.name} cannot be read at byte {start} ({error.strerror}): "
                "check the disk, restore the file and start again."
            ) from error
        return n_read

    @contextlib.contextmanager
    def _descriptor(self, path: Path) -> Iterator[tuple[int, bool]]:
        """A descriptor of a file, and whether it reads past the page cache."""
        with self._lock:
            opened = self._opened.get(path)
            stays = opened is not None or len(self._opened) < MAX_OPEN
            if opened is None:
                opened = _open(path, direct=not self.cached)
            if stays:
                self._opened[path] = opened
        try:
            yield opened
        finally:
            if not stays:
                os.close(opened[0])

    def close(self) -> None:
        """Close every descriptor; a later read opens its file again."""
        with self._lock:
            while self._opened:
                os.close(self._opened.popitem()[1][0])


def _open(path: Path, direct: bool) -> tuple[int, bool]:
    """A descriptor, and whether it reads past the page cache: not all file systems can."""
    if direct and O_DIRECT:
        with contextlib.suppress(OSError):  # it is refused at opening, or only at reading
            descriptor = os.open(path, os.O_RDONLY | O_DIRECT)
            try:
                os.preadv(descriptor, [host_buffer(PAGE_BYTES).numpy()], 0)
                return descriptor, True
            except OSError:
                os.close(descriptor)
    return os.open(path, os.O_RDONLY), False
