"""`four_bit`'s kernel in triton."""

import contextlib

import torch

with contextlib.suppress(ImportError):  # torch for a CPU comes without it
    import triton
    import triton.language as tl

PROGRAM_BYTES = 1024  # packed, that one program makes dense


def make_dense(
    packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, block: int, out: torch.Tensor
) -> None:
    """A `four_bit.Kernel`, of any table and blocks of an even size."""
    programs = (-(-len(packed) // PROGRAM_BYTES),)
    with torch.cuda.device_of(out):
        _make_dense[programs](packed, absmax, code, out, out.numel(), block, PROGRAM_BYTES)


if "triton" in globals():

    @triton.jit
    def _make_dense(packed, absmax, code, out, n, BLOCK: tl.constexpr, N_BYTES: tl.constexpr):
        first = tl.program_id(0).to(tl.int64) * N_BYTES
        place = first + tl.arange(0, N_BYTES)
        inside = 2 * place < n
        pair = tl.load(packed + place, mask=inside, other=0).to(tl.int32)
        # A block is of an even size: one factor is for both.
        scale = tl.load(absmax + 2 * place // BLOCK, mask=inside, other=0.0)
        high = tl.load(code + (pair >> 4)) * scale
        low = tl.load(code + (pair & 15)) * scale
        values = tl.interleave(high, low)
        place = 2 * first + tl.arange(0, 2 * N_BYTES)
        tl.store(out + place, values.to(out.dtype.element_ty), mask=place < n)
