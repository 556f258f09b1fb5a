"""What `cross_entropy` does to a block of logits on a GPU, in two launches instead of twenty."""

import contextlib

import torch

with contextlib.suppress(ImportError):  # torch for a CPU comes without it
    import triton
    import triton.language as tl

BLOCK = 1024  # numbers that a program has at once


def count(
    logits: torch.Tensor,
    labels: torch.Tensor,
    first: int,
    top: torch.Tensor,
    total: torch.Tensor,
    target: torch.Tensor,
) -> torch.Tensor:
    """Count logits (n, v) of the vocabulary from `first` on, and put exp(logit - top) in place.

    labels (n,). top, total and target (n,) in float32 are brought up to date; returns the factor
    (n,) of what was summed under the top before.
    """
    shrink = torch.empty_like(top)
    n, v = logits.shape
    with torch.cuda.device_of(logits):
        _count[(n,)](logits, labels, top, total, target, shrink, first, v, BLOCK)
    return shrink


def take_rows(
    weight: torch.Tensor, labels: torch.Tensor, first: int, out: torch.Tensor
) -> torch.Tensor:
    """Row labels - first of weight (v, C) into out (n, C), where there is one."""
    v, width = weight.shape
    with torch.cuda.device_of(weight):
        _take_rows[(len(labels),)](weight, labels, out, first, v, width, BLOCK)
    return out


if "triton" in globals():

    @triton.jit
    def _count(logits, labels, top, total, target, shrink, first, v, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        line = logits + row * v
        column = tl.load(labels + row) - first
        if (column >= 0) & (column < v):  # before the line is overwritten
            tl.store(target + row, tl.load(line + column).to(tl.float32))
        highest = tl.full((BLOCK,), -float("inf"), tl.float32)
        for start in range(0, v, BLOCK):
            place = start + tl.arange(0, BLOCK)
            values = tl.load(line + place, mask=place < v, other=-float("inf"))
            highest = tl.maximum(highest, values.to(tl.float32))
        before = tl.load(top + row)
        now = tl.maximum(before, tl.max(highest, 0))  # all programs' threads meet here
        factor = tl.exp(before - now)
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, v, BLOCK):
            place = start + tl.arange(0, BLOCK)
            values = tl.load(line + place, mask=place < v, other=-float("inf"))
            values = tl.exp(values.to(tl.float32) - now)
            tl.store(line + place, values.to(logits.dtype.element_ty), mask=place < v)
            sums += values
        tl.store(total + row, tl.load(total + row) * factor + tl.sum(sums, 0))
        tl.store(top + row, now)
        tl.store(shrink + row, factor)

    @triton.jit
    def _take_rows(weight, labels, out, first, v, width, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.load(labels + row) - first
        if (column >= 0) & (column < v):
            for start in range(0, width, BLOCK):
                place = start + tl.arange(0, BLOCK)
                inside = place < width
                values = tl.load(weight + column * width + place, mask=inside)
                tl.store(out + row * width + place, values, mask=inside)
