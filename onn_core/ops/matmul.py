"""Matmul of activations with a matrix that is stored in another dtype or format, block by block.

On a CPU without bfloat16 matmul the weights are in bfloat16 in memory and are cast a few rows at
a time, so that the float32 copy never leaves the processor's cache: half the traffic of a float32
matrix. On one AVX2 machine (2 cores, a matrix of 17920 x 5120) that ran at 163 GFLOP/s where the
whole matrix in float32 reached 145 and in bfloat16 11 (512 tokens), and at 90 against 33 and 13
(16 tokens).

float16 on a CPU goes the same way, because its own matmul runs at a few GFLOP/s: in float32, and
every result is rounded to float16, as tensor cores do.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from onn_core.ops.blocks import blocks_of

BLOCK_BYTES = 5 << 20  # of the cast copy; it must stay in the cache
FEW_TOKENS = 64  # up to here the block is the better left operand
LEAST_TOKENS = 16  # with 2 to 15 MKL takes up to three times as long: they are filled up with zeros

_of_thread = threading.local()


@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """A matrix (V, C) whose rows are made of what is stored, a few at a time.

    memory: what is stored. make: of start and stop, numbers (stop - start, C) of any dtype; start
    is a multiple of `row_step`. factors (V,): by which the matrix is more than these numbers.
    """

    memory: torch.Tensor
    shape: tuple[int, int]
    make: Callable[[int, int], torch.Tensor]
    factors: torch.Tensor | None = None
    row_step: int = 1

    @property
    def dtype(self) -> torch.dtype:
        """Of what is stored."""
        return self.memory.dtype

    def data_ptr(self) -> int:
        return self.memory.data_ptr()

    def __len__(self) -> int:
        return self.shape[0]


Weight = torch.Tensor | PackedMatrix


@contextlib.contextmanager
def products_by(multiply: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Inside, in this thread, products of frozen weights are made by `multiply`.

    It is given a function of activations (..., C), weight and perhaps bias, and these: it returns
    what the function would.
    """
    _of_thread.multiply = multiply
    try:
        yield
    finally:
        del _of_thread.multiply


def _by_others() -> Callable[..., torch.Tensor] | None:
    return getattr(_of_thread, "multiply", None)


def has_fast_matmul(dtype: torch.dtype) -> bool:
    """Whether this CPU has matmul of `dtype`; without, it takes many times float32's."""
    if dtype == torch.bfloat16:
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype != torch.float16


def cast_in_cache(stored: torch.dtype, wanted: torch.dtype, device: torch.device) -> bool:
    """Whether a matrix is in memory as it is stored and is cast by `matmul`."""
    narrow = stored in (torch.bfloat16, torch.float16)
    return narrow and wanted == torch.float32 and device.type == "cpu"


def in_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matmul of `dtype` is done in float32 and rounded."""
    return dtype == torch.float16 and device.type == "cpu"


def prepare_linear(
    module: nn.Module, stored: torch.dtype, wanted: torch.dtype, device: torch.device
) -> torch.dtype:
    """In which dtype the matrix of `module` is in memory; a plain linear layer takes any."""
    narrow = cast_in_cache(stored, wanted, device)
    if type(module) is not nn.Linear or not (narrow or in_float32(wanted, device)):
        return wanted
    use_matmul(module)
    return stored if narrow else wanted


def use_matmul(module: nn.Module) -> None:
    """Let a plain linear layer multiply by `linear`."""
    if type(module) is nn.Linear and "forward" not in module.__dict__:
        module.forward = functools.partial(_linear_forward, module)


def _linear_forward(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x, module.weight, module.bias)


def matmul(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., C) times weight (V, C) transposed, plus bias (V,) -> (..., V), in the dtype of x."""
    multiply = _by_others()
    return _matmul(x, weight, bias) if multiply is None else multiply(_matmul, x, weight, bias)


def _matmul(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    if in_float32(x.dtype, x.device):
        return _matmul(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)
    parts = _row_blocks(weight)
    factors = weight.factors if type(weight) is PackedMatrix else None
    same = torch.is_tensor(weight) and weight.dtype == x.dtype
    if same or len(parts) == 1 and factors is None:
        return F.linear(x, _whole(weight, x.dtype), bias)
    flat = _filled_up(x.reshape(-1, x.shape[-1]))  # (n or LEAST_TOKENS, C)
    few = len(flat) <= FEW_TOKENS
    out = flat.new_empty((len(weight), len(flat)) if few else (len(flat), len(weight)))
    turned = flat.t().contiguous() if few else None  # (C, n)
    for rows, block in _blocks(weight, parts, x.dtype):
        if few:
            torch.mm(block, turned, out=out[rows])
        else:
            torch.mm(flat, block.t(), out=out[:, rows])
    n = x.numel() // x.shape[-1]
    out = (out.t()[:n].contiguous() if few else out).view(*x.shape[:-1], len(weight))
    if factors is not None:
        out.mul_(factors)
    return out if bias is None else out.add_(bias)


def matmul_grad(grad: torch.Tensor, weight: Weight) -> torch.Tensor:
    """grad (..., V) times weight (V, C) -> (..., C), in the dtype of grad."""
    multiply = _by_others()
    return _matmul_grad(grad, weight) if multiply is None else multiply(_matmul_grad, grad, weight)


def _matmul_grad(grad: torch.Tensor, weight: Weight) -> torch.Tensor:
    if in_float32(grad.dtype, grad.device):
        return _matmul_grad(grad.float(), weight).to(grad.dtype)
    parts = _row_blocks(weight)
    factors = weight.factors if type(weight) is PackedMatrix else None
    flat = grad.reshape(-1, grad.shape[-1])  # (n, V)
    if factors is not None:
        flat = (flat * factors).to(grad.dtype)
    same = torch.is_tensor(weight) and weight.dtype == grad.dtype
    if same or len(parts) == 1:
        return (flat @ _whole(weight, grad.dtype)).view(*grad.shape[:-1], weight.shape[1])
    n, flat = len(flat), _filled_up(flat)
    # Sums of blocks would be rounded once more for each in a narrow dtype.
    wide = torch.promote_types(grad.dtype, torch.float32)
    total = flat.new_zeros(weight.shape[1], len(flat), dtype=wide)  # (C, n)
    # The block as the left operand took up to a third less time.
    for rows, block in _blocks(weight, parts, grad.dtype):
        if wide == grad.dtype:
            total.addmm_(block.t(), flat[:, rows].t())
        else:
            total.add_(block.t() @ flat[:, rows].t())
    return total.t()[:n].to(grad.dtype).contiguous().view(*grad.shape[:-1], weight.shape[1])


def _filled_up(flat: torch.Tensor) -> torch.Tensor:
    """(n, C) -> (LEAST_TOKENS, C) where n is a few, but not one."""
    lacking = LEAST_TOKENS - len(flat)
    return F.pad(flat, (0, 0, 0, lacking)) if 0 < lacking < LEAST_TOKENS - 1 else flat


def _whole(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """(V, C) in `dtype`."""
    whole = weight if torch.is_tensor(weight) else weight.make(0, len(weight))
    return whole.to(dtype)


def _blocks(
    weight: Weight, parts: list[slice], dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Each slice of rows with a copy (v, C) in `dtype`, which the next one may overwrite."""
    buffer = None
    for rows in parts:
        stored = weight[rows] if torch.is_tensor(weight) else weight.make(rows.start, rows.stop)
        if stored.dtype != dtype:
            if buffer is None:
                buffer = stored.new_empty(stored.shape, dtype=dtype)  # the first is the largest
            stored = buffer[: len(stored)].copy_(stored)
        yield rows, stored


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` for a frozen weight (V, C) of any dtype: x (..., C), bias (V,) -> (..., V)."""
    if torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    if weight.dtype == x.dtype and not in_float32(x.dtype, x.device):
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if _by_others() is None or trained:
            return F.linear(x, weight, bias)
    elif bias is not None and bias.requires_grad:
        return Matmul.apply(x, weight, None) + bias
    return Matmul.apply(x, weight, bias)


def packed_linear(
    x: torch.Tensor,
    memory: torch.Tensor,
    bias: torch.Tensor | None,
    matrix: Callable[[], PackedMatrix],
) -> torch.Tensor:
    """`F.linear` for a matrix (V, C) that is packed in `memory`: x (..., C), bias (V,) -> (..., V).

    matrix: see `Matmul`.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
        bias = None if bias is None else bias.to(x.dtype)
        with torch.autocast(device, enabled=False):
            return packed_linear(x, memory, bias, matrix)
    if bias is not None and bias.requires_grad:
        return Matmul.apply(x, memory, None, matrix) + bias
    return Matmul.apply(x, memory, bias, matrix)


class Matmul(torch.autograd.Function):
    """x (..., C) times a frozen matrix (V, C) transposed, plus a bias (V,) that is not trained.

    memory: the matrix, or where it is packed, which a graph saves. matrix: of a packed one, gives
    it from where it is by then.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        memory: torch.Tensor,
        bias: torch.Tensor | None,
        matrix: Callable[[], PackedMatrix] | None = None,
    ) -> torch.Tensor:
        ctx.save_for_backward(memory)
        ctx.matrix = matrix
        return matmul(x, memory if matrix is None else matrix(), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (memory,) = ctx.saved_tensors  # the weight is fetched again
        return matmul_grad(grad, memory if ctx.matrix is None else ctx.matrix()), None, None, None


def in_one_block(shape: tuple[int, ...]) -> bool:
    """Whether a matrix (V, C) is cast as a whole: then a copy in float32 saves the cast."""
    return len(shape) == 2 and shape[0] <= _block_rows(shape[1])


def _row_blocks(weight: Weight) -> list[slice]:
    """Slices of rows whose float32 copy is about BLOCK_BYTES, and of 16 rows at least."""
    size = _block_rows(weight.shape[1])
    if not torch.is_tensor(weight):
        size = -(-size // weight.row_step) * weight.row_step
    return blocks_of(len(weight), size)


def _block_rows(n_columns: int) -> int:
    return max(16, BLOCK_BYTES // (4 * n_columns) // 16 * 16)
