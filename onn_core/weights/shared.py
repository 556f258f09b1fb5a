"""Host memory that the processes of one host share: what one has read, none reads again.

It is a memfd, which the file system /dev/shm does not limit and which is gone when the last process
is, however that ends. The others open it through /proc; a small file in the folder for temporary
files tells them where. Each piece of it is read by whoever comes first and locks it meanwhile, so
that one who dies holds nobody up.
"""

import contextlib
import fcntl
import hashlib
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from onn_core.errors import ConfigError
from onn_core.processes import n_local

LAUNCH = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")  # equal in the processes of a launch


class SharedMemory:
    """Memory of the processes of a launch on this host that give the same `what`, and its marks.

    what: says what lies in it. n_bytes: of it; a page takes memory when it is first written.
    n_pieces: that are marked when they have been read. budget: becomes that of the first process,
    for what each measures by itself differs. ConfigError where they cannot tell each other of it.
    """

    def __init__(self, what: str, n_bytes: int, n_pieces: int, budget: int):
        launch = [os.environ.get(name) for name in LAUNCH]
        key = hashlib.sha256(repr((launch, what, n_bytes, n_pieces)).encode()).hexdigest()[:24]
        self.budget = budget
        self._name = f"onn-{key}"
        self._made: Path | None = None  # the file that tells of it, in the process that made it
        try:
            self._descriptor = self._open(n_bytes + n_pieces)
        except OSError as error:
            raise ConfigError(
                f"the processes of this host cannot share memory ({error}): set TMPDIR to a "
                "folder that they can write, or host_budget to 0."
            ) from error
        self._memory = mmap.mmap(self._descriptor, n_bytes + n_pieces)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._marks = memoryview(self._memory)[n_bytes:]

    def _open(self, n_bytes: int) -> int:
        """A descriptor of the memory, which the first process makes."""
        path = Path(tempfile.gettempdir(), f"{self._name}-{os.getuid()}")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o600), "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with contextlib.suppress(OSError, ValueError):  # of a launch that has ended
                link, budget = file.read().split()
                if os.readlink(link).startswith(f"/memfd:{self._name}"):
                    descriptor = os.open(link, os.O_RDWR | os.O_CLOEXEC)
                    self.budget = int(budget)
                    return descriptor
            descriptor = os.memfd_create(self._name)
            os.ftruncate(descriptor, n_bytes)
            file.seek(0)
            file.truncate()
            file.write(f"/proc/{os.getpid()}/fd/{descriptor} {self.budget}")
            self._made = path
        return descriptor

    def part(self, start: int, n_bytes: int) -> torch.Tensor:
        """(n_bytes,) uint8 of it, with a storage of its own."""
        return torch.frombuffer(self._memory, dtype=torch.uint8, offset=start, count=n_bytes)

    @contextlib.contextmanager
    def piece(self, number: int) -> Iterator[bool]:
        """Inside, no other process reads a piece; yields whether it has yet to be read.

        When it ends well, the piece is marked.
        """
        if self._marks[number]:
            yield False
            return
        self._lock(fcntl.F_WRLCK, number)
        try:
            yield not self._marks[number]
            self._marks[number] = 1
        finally:
            self._lock(fcntl.F_UNLCK, number)

    def _lock(self, kind: int, number: int) -> None:
        """A lock of the descriptor's own: those of a process take two readers for a deadlock."""
        flock = struct.pack("hhqqi", kind, os.SEEK_SET, number, 1, 0)
        fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLKW, flock)

    def close(self) -> None:
        """Leave it to the others; a tensor of it stays readable."""
        self._marks.release()
        if self._made is not None:
            self._made.unlink(missing_ok=True)
        os.close(self._descriptor)


def is_shared() -> bool:
    """Whether several processes of a launch are on this host, and can share memory."""
    return n_local() > 1 and hasattr(os, "memfd_create") and hasattr(fcntl, "F_OFD_SETLKW")
