"""How GGUF stores a matrix: rows of blocks, and how they become dense.

The types that most files have are torch's work here, several times as fast as transformers' own
and on any device. The others are transformers' and the gguf package's. All are equal bit for bit.
"""

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from onn_core.ops.matmul import PackedMatrix
from onn_core.weights.dequantise import Parts, Quantised

FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}  # by the number of the type


@dataclasses.dataclass(frozen=True, eq=False)
class Ggml(Quantised):
    """A matrix, or the matrices of all experts, of one GGUF tensor or of two.

    parts: each (..., bytes of a row) uint8. types: the number of the ggml type of each. order (R,):
    which stored row each row is; None if they are in order. Two parts lie one behind the other in
    the second dimension: the gates and ups of experts.
    """

    types: tuple[int, ...]
    order: Tensor | None = None

    @property
    def by_rows(self) -> bool:
        return len(self.entries) == 1 and self.order is None

    @property
    def by_expert(self) -> bool:
        return len(self.shape) == 3 and self.order is None

    def expert(self, parts: Parts, number: int) -> PackedMatrix:
        own = [part[number] for part in parts]  # (out, bytes of a row) each
        begins = list(itertools.accumulate(map(len, own), initial=0))

        def make(start: int, stop: int) -> Tensor:
            made = []
            for stored, kind, begin in zip(own, self.types, begins, strict=False):
                rows = stored[max(0, start - begin) : max(0, stop - begin)]
                if len(rows):
                    made.append(dense_rows(rows, kind))
            return made[0] if len(made) == 1 else torch.cat(made)

        return PackedMatrix(own[0], self.shape[1:], make)

    def rows(self, parts: Parts, start: int, stop: int) -> Tensor:
        made = []
        for part, entry, kind in zip(parts, self.entries, self.types, strict=True):
            _, *middle, row_bytes = entry.shape
            n = math.prod(middle)
            stored = part.view(-1, row_bytes)
            if self.order is None:
                stored = stored[start * n : stop * n]
            else:
                order = self.order.to(stored.device, non_blocking=True)
                stored = stored.index_select(0, order[start * n : stop * n])
            made.append(dense_rows(stored, kind).view(stop - start, *middle, -1))
        values = made[0] if len(made) == 1 else torch.cat(made, 1)
        return values.view(stop - start, *self.shape[1:])


@dataclasses.dataclass(frozen=True, eq=False)
class Processed(Quantised):
    """A vector whose values transformers changes: a norm that is stored with one added to it.

    parts: (n,) of a float type. change: float32 (n,) -> float32 (shape), on a CPU.
    """

    change: Callable[[Tensor], Tensor]

    def rows(self, parts: Parts, start: int, stop: int) -> Tensor:
        values = self.change(parts[0].cpu().float()).view(self.shape)
        return values[start:stop].to(parts[0].device)


def dense_rows(stored: Tensor, kind: int) -> Tensor:
    """stored (n, bytes of a row) uint8 -> (n, columns) float32, in fresh memory on its device."""
    if kind in FLOATS:
        return stored.clone().view(FLOATS[kind]).to(torch.float32)
    if kind in BLOCKS:
        block_bytes, decode = BLOCKS[kind]
        return decode(stored.reshape(-1, block_bytes)).view(len(stored), -1)
    from transformers.integrations.gguf import dequant

    if kind in dequant.GGML_BLOCK:
        return dequant.dequantize(stored.flatten(), kind).view(len(stored), -1)
    import gguf

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of NaN, which a caller notices
        values = gguf.dequantize(stored.cpu().numpy(), gguf.GGMLQuantizationType(kind))
    return torch.from_numpy(values).to(stored.device)


def _fields(packed: Tensor, shifts: Sequence[int], bits: int, width: int) -> Tensor:
    """packed (b, n) uint8 -> (b, n * len(shifts)) uint8: of each `width` bytes their fields.

    Four bytes at a time: shifts of single bytes are slow.
    """
    words = packed.clone(memory_format=torch.contiguous_format).view(torch.int32)
    words = words.view(len(packed), -1, 1, width // 4)
    mask = ((1 << bits) - 1) * 0x01010101
    fields = [(words >> shift if shift else words) & mask for shift in shifts]
    return torch.cat(fields, 2).view(len(packed), -1).view(torch.uint8)


def _joined(low: Tensor, high: Tensor, shift: int = 4) -> Tensor:
    """low (b, n) and high (b, n), the bits from `shift` on -> (b, n) float32."""
    return (low.view(torch.int32) | high.view(torch.int32) << shift).view(torch.uint8).float()


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 that begins at a byte of each block, (b, 1) in float32."""
    return blocks[:, start : start + 2].clone().view(torch.float16).float()


def _scaled(values: Tensor, scale: Tensor, minimum: Tensor | None = None) -> Tensor:
    """values (b, n) times scale (b, m), less minimum (b, m), of each n / m values; in place."""
    values = values.view(*scale.shape, -1).mul_(scale[..., None])
    if minimum is not None:
        values.sub_(minimum[..., None])
    return values


def _single_bits(packed: Tensor) -> Tensor:
    """packed (b, n) uint8 -> (b, 8 * n) uint8: the bits of each byte, the lowest first."""
    places = torch.arange(8, device=packed.device)
    table = (torch.arange(256, device=packed.device)[:, None] >> places & 1).to(torch.uint8)
    found = table.view(torch.int64).flatten().index_select(0, packed.int().flatten())
    return found.view(torch.uint8).view(len(packed), -1)


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and the minima of Q4_K and Q5_K: packed (b, 12) uint8 -> twice (b, 8) float32."""
    one, two, both = packed.split(4, 1)
    scale = torch.cat([one & 63, both & 15 | one >> 6 << 4], 1)
    minimum = torch.cat([two & 63, both >> 4 | two >> 6 << 4], 1)
    return scale.float(), minimum.float()


def _q4_and_q5(blocks: Tensor, has_fifth: bool, has_minimum: bool) -> Tensor:
    """Q4_0 to Q5_1: scale, minimum, the numbers' fifth bits, and the others; some lack a part."""
    low = _fields(blocks[:, -16:], (0, 4), 4, 16)
    values = _joined(low, _single_bits(blocks[:, -20:-16])) if has_fifth else low.float()
    if has_minimum:
        return values.mul_(_half(blocks, 0)).add_(_half(blocks, 2))
    return values.sub_(16 if has_fifth else 8).mul_(_half(blocks, 0))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _q2_k(blocks: Tensor) -> Tensor:
    scale, minimum = (blocks[:, :16] & 15).float(), (blocks[:, :16] >> 4).float()
    values = _fields(blocks[:, 16:80], (0, 2, 4, 6), 2, 32).float()
    return _scaled(values, scale.mul_(_half(blocks, 80)), minimum.mul_(_half(blocks, 82)))


def _q3_k(blocks: Tensor) -> Tensor:
    low = _fields(blocks[:, 32:96], (0, 2, 4, 6), 2, 32)
    high = _fields(blocks[:, :32], range(8), 1, 32)
    scale_low = _fields(blocks[:, 96:104], (0, 4), 4, 8)
    scale_high = _fields(blocks[:, 104:108], (0, 2, 4, 6), 2, 4)
    scale = _joined(scale_low, scale_high).sub_(32).mul_(_half(blocks, 108))
    return _scaled(_joined(low, high, 2).sub_(4), scale)


def _q4_k_and_q5_k(blocks: Tensor, has_fifth: bool) -> Tensor:
    scale, minimum = _six_bits(blocks[:, 4:16])
    low = _fields(blocks[:, -128:], (0, 4), 4, 32)
    fifth = _fields(blocks[:, 16:48], range(8), 1, 32) if has_fifth else None
    values = low.float() if fifth is None else _joined(low, fifth)
    return _scaled(values, scale.mul_(_half(blocks, 0)), minimum.mul_(_half(blocks, 2)))


def _q6_k(blocks: Tensor) -> Tensor:
    low = _fields(blocks[:, :128], (0, 4), 4, 64)
    high = _fields(blocks[:, 128:192], (0, 2, 4, 6), 2, 32)
    scale = blocks[:, 192:208].view(torch.int8).float().mul_(_half(blocks, 208))
    return _scaled(_joined(low, high).sub_(32), scale)


# number of the type -> bytes of a block, and what makes (b, values of a block) of (b, bytes)
BLOCKS: dict[int, tuple[int, Callable[[Tensor], Tensor]]] = {
    2: (18, functools.partial(_q4_and_q5, has_fifth=False, has_minimum=False)),
    3: (20, functools.partial(_q4_and_q5, has_fifth=False, has_minimum=True)),
    6: (22, functools.partial(_q4_and_q5, has_fifth=True, has_minimum=False)),
    7: (24, functools.partial(_q4_and_q5, has_fifth=True, has_minimum=True)),
    8: (34, _q8_0),
    10: (84, _q2_k),
    11: (110, _q3_k),
    12: (144, functools.partial(_q4_k_and_q5_k, has_fifth=False)),
    13: (176, functools.partial(_q4_k_and_q5_k, has_fifth=True)),
    14: (210, _q6_k),
}
