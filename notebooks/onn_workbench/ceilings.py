"""The ceilings of this machine: reading, copying and matrix products."""

import dataclasses
import itertools
import random
import statistics
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from onn_core.ops.matmul import matmul, matmul_grad
from onn_core.weights.reader import DirectFiles, host_buffer

PIECE_BYTES = 8 << 20
STRETCH = 32  # pieces that are read one after another


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this machine sustains, on these files and shapes."""

    read_bytes_per_s: float
    flops_per_s: dict[int, float]  # tokens in a matmul -> FLOP/s
    copy_bytes_per_s: float | None = None  # host to device

    def mean(self, later: "Ceilings") -> "Ceilings":
        """What it sustained between the two; the better of two moments it did not sustain."""
        return Ceilings(
            (self.read_bytes_per_s + later.read_bytes_per_s) / 2,
            {n: (flops + later.flops_per_s[n]) / 2 for n, flops in self.flops_per_s.items()},
            self.copy_bytes_per_s and (self.copy_bytes_per_s + later.copy_bytes_per_s) / 2,
        )

    def disturbed(self, later: "Ceilings", limits: Collection[str | int]) -> bool:
        """Whether one of `limits` was measured more than a quarter apart.

        limits: what limits a step that was timed: "read", "copy", or the tokens of its products.
        """
        pairs = zip(map(self._of, limits), map(later._of, limits), strict=True)
        return any(max(pair) > 1.25 * min(pair) for pair in pairs)

    def _of(self, limit: str | int) -> float:
        if isinstance(limit, int):
            return self.flops_per_s[limit]
        return self.read_bytes_per_s if limit == "read" else self.copy_bytes_per_s


def measure_read(
    paths: Sequence[Path], *, n_readers: int, limit_s: float = 3.0, into_bytes: int = 256 << 20
) -> float:
    """Bytes a second that `n_readers` threads read directly, in turn over the files' pieces.

    In stretches from all over the files: what is below the disk may cache what was read last.
    into_bytes: of memory, where the reads go by turns; the processor's cache takes them faster.
    """
    files, lock, totals = DirectFiles(), threading.Lock(), [0]
    pieces = [
        (path, start, min(start + PIECE_BYTES, path.stat().st_size))
        for path in paths
        for start in range(0, path.stat().st_size, PIECE_BYTES)
    ]
    starts = list(range(0, len(pieces), STRETCH))
    random.Random(n_readers).shuffle(starts)
    pieces = [piece for start in starts for piece in pieces[start : start + STRETCH][::-1]]
    n_buffers = max(1, into_bytes // PIECE_BYTES // n_readers)  # of each reader
    buffers = [host_buffer(PIECE_BYTES).zero_() for _ in range(n_buffers * n_readers)]

    def read(number: int) -> None:
        for buffer in itertools.cycle(buffers[number::n_readers]):
            with lock:
                if not pieces or time.perf_counter() > stop_at:
                    return
                path, start, stop = pieces.pop()
            n_bytes = files.read(path, start, stop, buffer)
            with lock:
                totals[0] += n_bytes

    started = time.perf_counter()
    stop_at = started + limit_s
    threads = [threading.Thread(target=read, args=[number]) for number in range(n_readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files.close()
    return totals[0] / (time.perf_counter() - started)


def measure_flops(
    shapes: Sequence[tuple[int, int]],
    n_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int = 3,
    stored: torch.dtype | None = None,
) -> float:
    """FLOP/s of the products of a step with matrices of `shapes` (out, in), one by one.

    Of each three: forward, recompute, (n_tokens, in) x (in, out), and dL/dh, (n_tokens, out) x
    (out, in), which libraries multiply slower: here by a seventh in bfloat16.

    stored: the matrices' dtype in memory; the faster of `matmul` on them and of `dtype` counts.
    """
    if stored not in (None, dtype):
        rates = [measure_flops(shapes, n_tokens, dtype, device, repeats)]
        weights = [torch.randn(shape, device=device).to(stored) for shape in shapes]
    else:
        rates = []
        weights = [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]  # (out, in)
    inputs = [torch.randn(n_tokens, shape[1], dtype=dtype, device=device) for shape in shapes]
    grads = [torch.randn(n_tokens, shape[0], dtype=dtype, device=device) for shape in shapes]

    def multiply(times: int) -> float:
        """Seconds of all products, as many times."""
        _synchronize(device)
        started = time.perf_counter()
        for values, grad, weight in times * list(zip(inputs, grads, weights, strict=True)):
            matmul(values, weight)
            matmul(values, weight)
            matmul_grad(grad, weight)
        _synchronize(device)
        return time.perf_counter() - started

    multiply(1)
    times = max(1, round(0.1 / multiply(1)))  # a GPU's are too short to be timed one by one
    seconds = statistics.median(multiply(times) for _ in range(repeats)) / times
    flops = 6 * n_tokens * sum(out * size for out, size in shapes)
    return max(*rates, flops / seconds, 0.0)


def measure_copy(device: torch.device, n_bytes: int = 1 << 28, repeats: int = 5) -> float:
    """Bytes a second from pinned host memory to a CUDA device."""
    host = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    times_s = []
    for _ in range(repeats + 1):
        _synchronize(device)
        started = time.perf_counter()
        there.copy_(host, non_blocking=True)
        _synchronize(device)
        times_s.append(time.perf_counter() - started)
    return n_bytes / statistics.median(times_s[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
