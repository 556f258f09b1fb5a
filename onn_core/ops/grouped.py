"""Matmul of tokens that are sorted by expert, each group with the matrix of its own expert."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from onn_core.ops.matmul import Weight, matmul, matmul_grad


class GroupedMatmul(torch.autograd.Function):
    """x (S, in), sorted by expert, times the matrix of each row's expert -> (S, out).

    offsets (E,): where the rows of each expert end.
    memory: where the matrices are stored, which a graph saves. experts: gives, from where they are
    by then, the matrix (out, in) of a number. n_out: the width of the result. An expert without
    tokens is not asked for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        memory: torch.Tensor,
        offsets: torch.Tensor,
        experts: Callable[[], Callable[[int], Weight]],
        n_out: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(memory, offsets)
        ctx.experts, ctx.n_in = experts, x.shape[1]
        out, expert = x.new_zeros(len(x), n_out), experts()
        for number, rows in _groups(offsets):
            out[rows] = matmul(x[rows], expert(number))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, offsets = ctx.saved_tensors  # the weight is fetched again
        found, expert = grad.new_zeros(len(grad), ctx.n_in), ctx.experts()
        for number, rows in _groups(offsets):
            found[rows] = matmul_grad(grad[rows], expert(number))
        return found, None, None, None, None


def _groups(offsets: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has tokens, and which rows are theirs."""
    start = 0
    for number, stop in enumerate(offsets.tolist()):
        if stop > start:
            yield number, slice(start, stop)
        start = stop
