"""The low-rank update of a linear layer (LoRA, Hu et al. 2021) as one function.

PEFT owns the modules. Its own forward makes and saves float32 copies of a layer's input and output
where the adapters are in float32 and the model is narrow; this one adds into the output that the
base layer has just made, saves the input itself and x A^T, and casts a few rows at a time.

On CUDA the float32 products run on bf16 tensor cores: a float32 matrix is exactly the sum of three
in bf16, and products of parts are summed in float32 (Markidis et al. 2018, Ootomo & Yokota 2022).
"""

import contextlib
import functools
import math
from typing import Any

import torch
from peft.tuners import lora
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from onn_core.ops.blocks import blocks_of
from onn_core.ops.matmul import in_float32

BLOCK_BYTES = 1 << 20  # of a few rows' wider copy on a CPU; it must stay in the cache
CUDA_BLOCK_BYTES = 64 << 20  # there fewer launches count
SPLIT_TOKENS = 1024  # on CUDA, below that, the parts are too small to pay
MAX_RANK = 128  # above, MKL's sums in one step are rounded elsewhere
# h b^T from the parts 0, 1, 2 of both; what is left out is below 2^-21 of it.
LEFT, RIGHT = (0, 0, 0, 1, 1, 2), (0, 1, 2, 0, 1, 0)


def fuse_lora(module: nn.Module) -> None:
    """Let the LoRA linear layers inside `module` run as one function wherever they are plain."""
    for part in module.modules():
        if type(part) is lora.Linear and "forward" not in part.__dict__:
            part.forward = functools.partial(_forward, part)


def _forward(module: lora.Linear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """In place of PEFT's own: x (..., C) -> (..., V)."""
    plain = None if args or kwargs else _plain_adapter(module, x)
    if plain is None:
        return type(module).forward(module, x, *args, **kwargs)
    a, b, scaling, compute = plain
    base = module.base_layer
    out = base(x)
    # What these two return nobody else holds, and their own gradients do not need it.
    fresh = type(base) in (nn.Linear, Conv1D) and not base._forward_hooks
    if not fresh or not out.is_contiguous():
        out = out.clone(memory_format=torch.contiguous_format)
    if not torch.is_grad_enabled():
        return LoraAdd.add(out, x, a, b, scaling, compute)[0]
    return LoraAdd.apply(out, x, a, b, scaling, compute)


def _plain_adapter(
    module: lora.Linear, x: torch.Tensor
) -> tuple[nn.Parameter, nn.Parameter, float, torch.dtype] | None:
    """A (r, C), B (V, r), the scaling and the dtype that PEFT computes in; None if not plain."""
    active = module._active_adapter
    if not isinstance(active, str):
        if len(active) != 1:
            return None
        active = active[0]
    if module._disable_adapters or module.merged_adapters or active in module.lora_variant:
        return None
    parts = module._modules  # not by attribute: this runs at every call
    down, up, dropout = (
        parts[x]._modules.get(active) for x in ("lora_A", "lora_B", "lora_dropout")
    )
    for layer in (down, up):
        if type(layer) is not nn.Linear or layer._parameters["bias"] is not None:
            return None
        if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
            return None
    if type(dropout) is not nn.Identity and dropout.training and getattr(dropout, "p", 1) > 0:
        return None
    a, b = down._parameters["weight"], up._parameters["weight"]
    if a.dtype != b.dtype or not (module.cast_input_dtype_enabled or a.dtype == x.dtype):
        return None
    compute, kind = a.dtype, x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        if a.dtype == torch.float64:  # which autocast leaves alone
            return None
        compute = torch.get_autocast_dtype(kind)
    if in_float32(compute, x.device):
        compute = torch.float32
    return a, b, module.scaling[active], compute


class LoraAdd(torch.autograd.Function):
    """out (..., V) plus scaling x A^T B^T, for x (..., C), A (r, C) and B (V, r).

    It takes over the memory of `out`, which must be contiguous, and which neither anybody else nor
    the gradient of what made it may need. The products are in the dtype `compute`.
    """

    @staticmethod
    def add(
        out: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        compute: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum, and h = x A^T (n, r)."""
        total = out.data  # the same memory, but no view: what comes next may change it in place
        flat = x.reshape(-1, x.shape[-1])
        with _without_autocast(x.device.type):
            add = _add_split if _splits(flat, total, compute) else _add
            if a.dtype != compute:
                a, b = a.to(compute), b.to(compute)
            h = add(total.view(-1, total.shape[-1]), flat, a, b, scaling)
        return total, h

    @staticmethod
    def forward(
        ctx: Any,
        out: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        compute: torch.dtype,
    ) -> torch.Tensor:
        total, h = LoraAdd.add(out, x, a, b, scaling, compute)
        ctx.save_for_backward(x, a, b, h)
        ctx.scaling = scaling
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, a, b, h = ctx.saved_tensors  # h (n, r)
        flat, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        _, of_x, of_a, of_b, *_ = ctx.needs_input_grad
        with _without_autocast(x.device.type):
            find = _grads_split if _splits(flat, grad, h.dtype) else _grads
            matrices = a.to(h.dtype), b.to(h.dtype)
            dx, da, db = find(grad_rows, flat, *matrices, h, ctx.scaling, wanted=(of_x, of_a, of_b))
        dx = None if dx is None else dx.view(x.shape)
        da, db = None if da is None else da.to(a.dtype), None if db is None else db.to(b.dtype)
        return grad if ctx.needs_input_grad[0] else None, dx, da, db, None, None


def _without_autocast(kind: str) -> contextlib.AbstractContextManager:
    """The dtypes here are chosen already; and backward may run where another autocast is on."""
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def _add(
    out: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Add to out (n, V) in place -> h = x A^T (n, r); the roundings are PEFT's."""
    if len(x) <= _rows_at_once(x, len(b), a.dtype):
        h = torch.mm(x.to(a.dtype), a.t())
        _add_product(out, h, b, scaling)
        return h
    h = a.new_empty(len(x), len(a))
    for rows in _row_blocks(x, len(b), a.dtype):
        h[rows] = here = torch.mm(x[rows].to(a.dtype), a.t())
        _add_product(out[rows], here, b, scaling)
    return h


def _add_product(out: torch.Tensor, h: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
    """out (n, V) += scaling h B^T."""
    if out.dtype == h.dtype and _in_one_step(out, h.shape[1], scaling):
        out.addmm_(h, b.t(), alpha=scaling)
    elif _is_exact(scaling):
        out.add_(torch.mm(h, b.t()), alpha=scaling)
    else:
        out.add_(torch.mm(h, b.t()).mul_(scaling))


def _in_one_step(out: torch.Tensor, rank: int, scaling: float) -> bool:
    """Whether a product is added to `out` as it is made.

    On CUDA a narrow output is then rounded once instead of three times. On a CPU a large one in
    float32 passes through the cache once; MKL's sums over so few products keep PEFT's bits.
    """
    if out.is_cuda:
        return out.dtype.itemsize < 4
    large = out.dtype == torch.float32 and out.nbytes > BLOCK_BYTES
    return large and rank <= MAX_RANK and _is_exact(scaling)


def _grads(
    grad: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    h: torch.Tensor,
    scaling: float,
    wanted: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x (n, C), A and B that are wanted, of that of the output (n, V)."""
    of_x, of_a, of_b = wanted
    dx = da = db = None
    after = scaling if _is_exact(scaling) else 1.0  # else the gradient itself, as PEFT does it
    for rows in _row_blocks(x, len(b), a.dtype):
        grad_here = grad[rows].to(a.dtype)
        if after != scaling:
            grad_here = grad_here * scaling
        if of_b:
            db = _sum(db, grad_here.t(), h[rows])
        if of_x or of_a:
            grad_h = torch.mm(grad_here, b)
            if after != 1:
                grad_h.mul_(after)
            if of_a:
                da = _sum(da, grad_h.t(), x[rows].to(a.dtype))
            if of_x and rows.stop - rows.start == len(x):
                dx = torch.mm(grad_h, a).to(x.dtype)
            elif of_x:
                dx = torch.empty_like(x) if dx is None else dx
                dx[rows] = torch.mm(grad_h, a)
    if of_b and after != 1:
        db.mul_(after)
    return dx, da, db


def _sum(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.mm(left, right) if total is None else total.addmm_(left, right)


def _is_exact(scaling: float) -> bool:
    """Whether it is a power of two, so that it may be applied anywhere without a rounding."""
    return abs(math.frexp(scaling)[0]) == 0.5


def _rows_at_once(x: torch.Tensor, n_out: int, compute: torch.dtype) -> int:
    """All rows of x (n, C), or as many as are widened to few bytes."""
    if x.dtype.itemsize >= compute.itemsize:
        return max(len(x), 1)
    n_bytes = CUDA_BLOCK_BYTES if x.is_cuda else BLOCK_BYTES
    return max(16, n_bytes // (compute.itemsize * max(x.shape[1], n_out)))


def _row_blocks(x: torch.Tensor, n_out: int, compute: torch.dtype) -> list[slice]:
    """Slices of so many rows; at least one."""
    size, n = _rows_at_once(x, n_out, compute), max(len(x), 1)
    return blocks_of(min(n, size) if x.is_meta else n, size)  # on meta, one stands for all


# ---- float32 products on bf16 tensor cores


def _splits(x: torch.Tensor, out: torch.Tensor, compute: torch.dtype) -> bool:
    narrow = x.dtype == out.dtype == torch.bfloat16 and compute == torch.float32
    return narrow and x.is_cuda and len(x) >= SPLIT_TOKENS and _has_float32_sums(x.device)


@functools.cache
def _has_float32_sums(device: torch.device) -> bool:
    """Whether this build and device multiply bf16 into float32."""
    try:
        _product(*(torch.ones(16, 16, dtype=torch.bfloat16, device=device) for _ in range(2)))
    except (RuntimeError, TypeError):
        return False
    return True


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left (n, k) times right (k, m), both in bf16, in float32."""
    return torch.mm(left, right, out_dtype=torch.float32)


def _parts(matrix: torch.Tensor, which: tuple[int, ...], dim: int) -> torch.Tensor:
    """A float32 matrix as bf16 parts beside (dim 1) or below (dim 0) each other.

    Part 0 holds the upper 8 of its 24 bits, 1 the next, 2 the last: their sum is the matrix.
    """
    upper = _upper(matrix)
    rest = matrix - upper
    middle = _upper(rest)
    parts = upper, middle, _upper(rest - middle)
    return torch.cat([parts[number] for number in which], dim)


def _upper(matrix: torch.Tensor) -> torch.Tensor:
    """The upper halves of float32 numbers, which are bf16 numbers: a view."""
    return matrix.contiguous().view(torch.bfloat16)[:, 1::2]


def _add_split(
    out: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """As `_add`; the output is rounded once."""
    h = _product(x, _parts(a, (0, 1, 2), 0).t()).view(len(x), 3, len(a)).sum(1)
    out.addmm_(_parts(h, LEFT, 1), _parts(b, RIGHT, 1).t(), alpha=scaling)
    return h


def _grads_split(
    grad: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    h: torch.Tensor,
    scaling: float,
    wanted: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, ...]:
    """As `_grads`."""
    of_x, of_a, of_b = wanted
    rank = len(a)
    dx = da = db = None
    if of_b:
        db = _product(grad.t(), _parts(h * scaling, (0, 1, 2), 1)).view(len(b), 3, rank).sum(1)
    if of_x or of_a:
        grad_h = _product(grad, _parts(b, (0, 1, 2), 1)).view(len(x), 3, rank).sum(1).mul_(scaling)
        if of_a:
            da = _product(_parts(grad_h, (0, 1, 2), 1).t(), x).view(3, *a.shape).sum(0)
        if of_x:
            dx = torch.mm(_parts(grad_h, LEFT, 1), _parts(a, RIGHT, 0))
    return dx, da, db
