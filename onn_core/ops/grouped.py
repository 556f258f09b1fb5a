"""Matmul of tokens that are sorted by expert, each group with the matrix of its own expert."""

from collections.abc import Callable
from typing import Any

import torch

from onn_core.ops.matmul import Weight, matmul, matmul_grad


class GroupedMatmul(torch.autograd.Function):
    """x (S, in), sorted by expert, times the matrix of each row's expert -> (S, out).

    offsets (E,): where the rows of each expert end.
    memory: where the matrices are stored, which a graph saves. experts: gives, from where they are
    by then, the matrix of a number: (out, in), or (in, out) where they are `turned`. n_out: the
    width of the result. An expert without tokens is not asked for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        memory: torch.Tensor,
        offsets: torch.Tensor,
        experts: Callable[[], Callable[[int], Weight]],
        turned: bool,
        n_out: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(memory, offsets)
        ctx.experts, ctx.turned, ctx.n_in = experts, turned, x.shape[1]
        return _multiply(matmul_grad if turned else matmul, x, offsets, experts(), n_out)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, offsets = ctx.saved_tensors  # the weight is fetched again
        multiply = matmul if ctx.turned else matmul_grad
        found = _multiply(multiply, grad, offsets, ctx.experts(), ctx.n_in)
        return found, None, None, None, None, None


def _multiply(
    multiply: Callable[[torch.Tensor, Weight], torch.Tensor],
    x: torch.Tensor,
    offsets: torch.Tensor,
    expert: Callable[[int], Weight],
    width: int,
) -> torch.Tensor:
    """Each group of rows of x by its expert's matrix -> (S, width)."""
    out, start = x.new_zeros(len(x), width), 0
    with torch.autocast(x.device.type, enabled=False):  # which leaves a grouped matmul alone
        for number, stop in enumerate(offsets.tolist()):
            if stop > start:
                out[start:stop] = multiply(x[start:stop], expert(number))
            start = stop
    return out
