"""Int8 and NF4 of matrices that are stored dense, in the layout of bitsandbytes.

int8: a row is divided by its largest absolute value and written as whole numbers up to 127. NF4:
64 values in order share their largest absolute value, and each is the nearest of 16 (Dettmers et
al. 2022 and 2023).
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from onn_core.ops.four_bit import NF4
from onn_core.weights.dequantise import INT8_FACTOR, FourBit, Quantised, Scaled
from onn_core.weights.shards import TensorEntry

KINDS = ("int8", "nf4")
NF4_BLOCK = 64
BLOCK_ELEMENTS = 1 << 24  # that are quantised at a time
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def settings(kind: str) -> dict[str, Any]:
    """`quantization_config` of a config.json, as transformers writes it for bitsandbytes."""
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True).to_dict()
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    return BitsAndBytesConfig(load_in_4bit=True, **nf4).to_dict()


def takes(kind: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape can be quantised."""
    return len(shape) == 2 and math.prod(shape) % (2 if kind == "nf4" else 1) == 0


def layout(kind: str, name: str, shape: tuple[int, ...]) -> Layout:
    """What is stored of the matrix `name` ("....weight"): its tensors in the order of a file."""
    n = math.prod(shape)
    if kind == "int8":
        scale = f"{name.removesuffix('.weight')}.SCB"
        return {name: (torch.int8, shape), scale: (torch.float32, shape[:1])}
    return {
        name: (torch.uint8, (n // 2, 1)),
        f"{name}.absmax": (torch.float32, (-(-n // NF4_BLOCK),)),
        f"{name}.quant_map": (torch.float32, (16,)),
        f"{name}.quant_state.bitsandbytes__nf4": (torch.uint8, (len(state(shape)),)),
    }


def quantise(kind: str, matrix: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that `layout` names, of a matrix (V, C) of any float dtype on a CPU."""
    step = NF4_BLOCK * max(1, BLOCK_ELEMENTS // (NF4_BLOCK * matrix.shape[1]))
    rows = _int8_rows if kind == "int8" else _nf4_rows
    made = [rows(matrix[start : start + step].float()) for start in range(0, len(matrix), step)]
    packed, scale = (torch.cat(parts) for parts in zip(*made, strict=True))
    if kind == "int8":
        return [packed, scale]
    text = torch.frombuffer(bytearray(state(tuple(matrix.shape))), dtype=torch.uint8)
    return [packed, scale, torch.tensor(NF4), text]


def stored_as(kind: str, shape: tuple[int, ...]) -> Quantised:
    """A matrix of this shape as it would be stored in a file that need not be there."""
    entries = tuple(
        TensorEntry(name, Path(), 0, math.prod(size) * dtype.itemsize, dtype, size)
        for name, (dtype, size) in layout(kind, "weight", shape).items()
        if "quant_state" not in name
    )
    if kind == "int8":
        return Scaled("weight", entries, shape, (shape[0], 1), (1, 1), INT8_FACTOR)
    return FourBit("weight", entries, shape, NF4_BLOCK, is_nf4=True)


def state(shape: tuple[int, ...]) -> bytes:
    """bitsandbytes' JSON of a matrix in NF4, with blanks up to a multiple of 8 bytes.

    What follows in a file then stays aligned, and is read to where it goes.
    """
    fields = {"quant_type": "nf4", "blocksize": NF4_BLOCK, "dtype": "bfloat16"}
    text = json.dumps(fields | {"shape": list(shape)})
    return text.ljust(-(-len(text) // 8) * 8).encode()


def _int8_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """values (v, C) float32 -> numbers (v, C) int8 and the largest of each row (v,)."""
    scale = values.abs().amax(1)
    numbers = (values * (127 / scale.clamp(min=1e-38))[:, None]).round_().clamp_(-127, 127)
    return numbers.to(torch.int8), scale


def _nf4_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """values (v, C) float32 -> packed (n/2, 1) uint8 and absmax (n/64,), as `quantize_4bit` does.

    v is a multiple of 64, so that no block goes on, or these are the last rows.
    """
    code, values = torch.tensor(NF4), values.flatten()
    n_whole = len(values) // NF4_BLOCK * NF4_BLOCK
    blocks = values[:n_whole].view(-1, NF4_BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1, 1).flatten()
    if n_whole < len(values):
        last = values[n_whole:].abs().amax().clamp(min=1e-38)
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, (values[n_whole:] / last).clamp_(-1, 1)])
    between = (code[1:] + code[:-1]) / 2
    numbers = torch.bucketize(scaled, between, out_int32=True).to(torch.uint8)
    return (numbers[::2] << 4 | numbers[1::2])[:, None], absmax
