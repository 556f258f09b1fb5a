"""A norm between the layers and the head, a few tokens at a time, keeping nothing but its input."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from onn_core.ops.blocks import blocks_of

ROWS_BYTES = 8 << 20  # of a part in float32; its graph has several


class NormInParts:
    """Takes the place of the forward of a norm whose input (..., C) is that of the whole batch.

    Its own graph would save the batch several times in float32; here each part is computed again
    in backward. Under autocast, or if the norm is trained, it runs as it is.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.forward = module.forward  # the class's own

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        x = args[0] if len(args) == 1 and not kwargs else None
        trained = any(parameter.requires_grad for parameter in self.module.parameters())
        if trained or not isinstance(x, torch.Tensor) or torch.is_autocast_enabled(x.device.type):
            return self.forward(*args, **kwargs)
        n_parts = -(-4 * x.numel() // ROWS_BYTES)
        return self.forward(x) if n_parts < 2 else _InParts.apply(self.forward, n_parts, x)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm over the last axis, by its class's name."""
    return type(module).__name__.endswith(("RMSNorm", "LayerNorm"))


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, norm: Callable, n_parts: int, x: torch.Tensor) -> torch.Tensor:
        ctx.norm, ctx.n_parts = norm, n_parts
        ctx.save_for_backward(x)
        out = None
        for rows, part in _parts(x, n_parts):
            normed = norm(part)
            if out is None:
                out = x.new_empty(x.shape, dtype=normed.dtype)
            out.view(1, -1, x.shape[-1])[:, rows] = normed
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        grad = grad.reshape(1, -1, x.shape[-1])
        back = torch.empty_like(x, memory_format=torch.contiguous_format)
        for rows, part in _parts(x, ctx.n_parts):
            with torch.enable_grad():
                normed = ctx.norm(part.requires_grad_())
            back.view(grad.shape)[:, rows] = torch.autograd.grad(normed, part, grad[:, rows])[0]
        return None, None, back


def _parts(x: torch.Tensor, n_parts: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """(..., C) as parts (1, n, C) of about as many rows each, with their places."""
    flat = x.detach().reshape(1, -1, x.shape[-1])
    for rows in blocks_of(flat.shape[1], -(-flat.shape[1] // n_parts)):
        yield rows, flat[:, rows].detach()
