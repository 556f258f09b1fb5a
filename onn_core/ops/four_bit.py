"""Values of four bits made dense on a GPU in one launch, by whichever kernel is there and equal."""

import functools
from collections.abc import Callable

import torch

# fmt: off
NF4 = (  # Dettmers et al. 2023; as bitsandbytes writes it
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)
# fmt: on
# (packed (n/2,) uint8, absmax (n/block,), code (16,), block, out (n,)): all contiguous, on one
# device; out = code[number] * absmax[place // block], rounded once.
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor], None]


def in_plain_torch(
    packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, block: int, out: torch.Tensor
) -> None:
    """What a kernel must be equal to: many launches, and several times the memory."""
    numbers = torch.stack([packed >> 4, packed & 15], 1).flatten()[: out.numel()].int()
    absmax = absmax.repeat_interleave(block)[: out.numel()]
    out.view(-1).copy_(code[numbers].mul_(absmax))


@functools.cache
def kernel(device: torch.device, is_nf4: bool) -> Kernel | None:
    """The fastest there is on a device, for the table NF4 or for any; None if there is none.

    triton comes with torch for CUDA, but needs a C compiler; bitsandbytes is an extra.
    """
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(256, (4096,), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(128, generator=generator)
    given = [part.to(device) for part in (packed, absmax, torch.tensor(NF4))]
    want, got = (torch.zeros(8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    in_plain_torch(*given, 64, want)
    for one in (_of_triton, _of_bitsandbytes) if is_nf4 else (_of_triton,):
        try:
            one(*given, 64, got)
        except Exception:  # it is missing, or cannot be built here
            continue
        if torch.equal(got, want):
            return one
    return None


def _of_triton(
    packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, block: int, out: torch.Tensor
) -> None:
    from onn_core.ops.four_bit_triton import make_dense

    make_dense(packed, absmax, code, block, out)


def _of_bitsandbytes(
    packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, block: int, out: torch.Tensor
) -> None:
    import bitsandbytes  # noqa: F401, it registers the operator

    make_dense = torch.ops.bitsandbytes.dequantize_4bit.out
    make_dense(packed, absmax, block, "nf4", out.shape, out.dtype, out=out)
