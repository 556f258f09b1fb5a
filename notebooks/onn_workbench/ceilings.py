"""The ceilings of this machine: reading, copying to a device, and matmuls."""

import dataclasses
import functools
import itertools
import random
import statistics
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

from onn_core.ops.matmul import matmul, matmul_grad
from onn_core.weights.reader import DirectFiles, host_buffer

INTO_BYTES = 256 << 20  # of memory that reads fill by turns
PIECE_BYTES = 8 << 20  # of one read
STRETCH_PIECES = 32  # that are read one after another
READERS = (1, 2, 4, 8)  # outstanding reads that are tried
N_ROUNDS = 3


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

        limits: what limits a step that was timed: "read", "copy", or the tokens of its matmuls.
        """
        ours, theirs = (
            {"read": one.read_bytes_per_s, "copy": one.copy_bytes_per_s} | one.flops_per_s
            for one in (self, later)
        )
        pairs = [(ours[limit], theirs[limit]) for limit in limits]
        return any(max(pair) > 1.25 * min(pair) for pair in pairs)


def sustained_read(paths: Sequence[Path], to_device: bool) -> dict[int, float]:
    """Number of readers -> bytes a second: the median of rounds in which each has its turn.

    The first round does not count: a virtual disk may give more after a pause than it sustains.
    to_device: what is read is on its way there, so that a reader has one buffer.
    """
    into_bytes = 0 if to_device else INTO_BYTES
    rounds = [
        {n: measure_read(paths, n_readers=n, into_bytes=into_bytes, seed=seed) for n in READERS}
        for seed in range(1 + N_ROUNDS)
    ]
    return {n: statistics.median(rates[n] for rates in rounds[1:]) for n in READERS}


def measure_read(
    paths: Sequence[Path],
    *,
    n_readers: int,
    limit_s: float = 0.8,
    into_bytes: int = INTO_BYTES,
    seed: int = 0,
) -> float:
    """Bytes a second that `n_readers` threads read directly, in turn over the files' pieces.

    In stretches from all over the files: what is below the disk may cache what was read last.
    into_bytes: of memory, where the reads go by turns; the processor's cache takes them faster.
    """
    files, lock = DirectFiles(), threading.Lock()
    pieces = [
        (path, start, min(start + PIECE_BYTES, path.stat().st_size))
        for path in paths
        for start in range(0, path.stat().st_size, PIECE_BYTES)
    ]
    starts = list(range(0, len(pieces), STRETCH_PIECES))
    random.Random(seed * max(READERS) + n_readers).shuffle(starts)
    pieces = [piece for start in starts for piece in pieces[start : start + STRETCH_PIECES][::-1]]
    n_buffers = max(1, into_bytes // PIECE_BYTES // n_readers)  # of each reader
    buffers = [host_buffer(PIECE_BYTES).zero_() for _ in range(n_buffers * n_readers)]
    started = time.perf_counter()

    def read(number: int) -> int:
        """Bytes that this reader has read when the time is over, or the pieces are."""
        n_bytes = 0
        for buffer in itertools.cycle(buffers[number::n_readers]):
            with lock:
                if not pieces or time.perf_counter() > started + limit_s:
                    return n_bytes
                path, start, stop = pieces.pop()
            n_bytes += files.read(path, start, stop, buffer)

    with ThreadPoolExecutor(n_readers) as readers:
        total_bytes = sum(readers.map(read, range(n_readers)))
    files.close()
    return total_bytes / (time.perf_counter() - started)


def measure_flops(
    shapes: Sequence[tuple[int, int]],
    n_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    stored: torch.dtype | None = None,
) -> float:
    """FLOP/s of the matmuls of a step with matrices of `shapes` (out, in), one by one.

    Of each three: forward, recompute, (n_tokens, in) x (in, out), and dL/dh, (n_tokens, out) x
    (out, in), which libraries multiply slower: here by a seventh in bfloat16.

    stored: the matrices' dtype in memory; the faster of `matmul` on them and of `dtype` counts.
    """
    normal = functools.partial(torch.randn, generator=torch.Generator(device), device=device)
    inputs = [normal(n_tokens, shape[1], dtype=dtype) for shape in shapes]
    grads = [normal(n_tokens, shape[0], dtype=dtype) for shape in shapes]

    def multiply(weights: list[torch.Tensor]) -> None:
        for values, grad, weight in zip(inputs, grads, weights, strict=True):
            matmul(values, weight)
            matmul(values, weight)
            matmul_grad(grad, weight)

    flops = 6 * n_tokens * sum(out * size for out, size in shapes)
    rates = []
    for kind in {dtype, stored or dtype}:
        weights = [normal(shape).to(kind) for shape in shapes]  # (out, in)
        rates.append(flops / _median_s("run(weights)", run=multiply, weights=weights))
    return max(rates)


def measure_copy(device: torch.device) -> float:
    """Bytes a second from pinned host memory to a CUDA device."""
    n_bytes = 1 << 28
    host = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    copy = "target.copy_(host, non_blocking=True)"
    return n_bytes / _median_s(copy, target=target, host=host)


def _median_s(statement: str, **names: Any) -> float:
    """Seconds of a statement, after a first time; the device has then done what it launched."""
    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.3).median
