"""Memory that a process and a device hold: now, and at most."""

import functools
from pathlib import Path

import torch


def memory_bytes(field: str = "VmRSS") -> int:
    """This process's memory: VmRSS now, VmHWM its peak since `reset_peak_memory`.

    What it shares with others now counts as nobody's.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = dict(line.split(":", 1) for line in lines if line.endswith("kB"))
    if field not in sizes:
        raise OSError(f"/proc/self/status has no {field}")
    own, shared = (int(sizes.get(name, "0 kB").split()[0]) for name in (field, "RssShmem"))
    return (own - shared) * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak, on the host and on the device."""
    Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device, before_bytes: int = 0) -> int:
    """The device allocator's peak; on a CPU the process's peak beyond `before_bytes`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return memory_bytes("VmHWM") - before_bytes


@functools.cache
def library_bytes(device: torch.device) -> int:
    """What CUDA's libraries take of the device at the first matmul, forward and backward."""
    if device.type != "cuda":
        return 0
    before = torch.cuda.memory_allocated(device)
    values = torch.ones(16, 16, dtype=torch.float16, device=device, requires_grad=True)
    torch.autograd.grad((values @ values).sum(), values)
    del values
    return torch.cuda.memory_allocated(device) - before
