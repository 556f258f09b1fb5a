"""Toy models quantised into each published format, beside the dense weights that they mean.

The dense weights are computed here, from whole matrices and in the plainest way, not by onn_core.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
NF4 = torch.linspace(-1, 1, 16) ** 3  # any table of 16 floats is one


@dataclasses.dataclass
class Format:
    """quantise: a matrix (out, in) -> what is stored, by the suffix of its name, and the dense."""

    settings: dict
    quantise: Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
    name_of_config: str = "quantization_config"


def codes(matrix: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole numbers from 0 to 2^bits - 1 that follow the values of a matrix."""
    low, high = matrix.min(), matrix.max()
    return ((matrix - low) / (high - low) * (2**bits - 1)).round().long()


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (0.01 + 0.04 * torch.rand(shape)).to(dtype)


def words(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """numbers (r, n) of `bits` each -> (r, n * bits / 32) int32, the first in the lowest bits."""
    per_word = 32 // bits
    padded = torch.zeros(len(numbers), -(-numbers.shape[1] // per_word) * per_word).long()
    padded[:, : numbers.shape[1]] = numbers
    packed = torch.zeros(len(numbers), padded.shape[1] // per_word).long()
    for place in range(per_word):
        packed |= padded[:, place::per_word] << (bits * place)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()


def spread(grid: torch.Tensor, shape: torch.Size, block: tuple[int, int]) -> torch.Tensor:
    """A value of the grid for each element."""
    rows, columns = (torch.arange(n) // b for n, b in zip(shape, block, strict=True))
    return grid[rows][:, columns]


def four_bit(kind: str, nested: bool, block: int = 64, storage: torch.dtype = torch.uint8):
    def quantise(matrix):
        numbers = codes(matrix, 4).flatten()
        packed = (numbers[0::2] << 4 | numbers[1::2]).to(torch.uint8)
        n_blocks = -(-len(numbers) // block)
        state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16"}
        state |= {"shape": list(matrix.shape)}
        stored = {".weight": packed.view(storage)[:, None], ".weight.quant_map": NF4}
        if nested:
            state |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": 0.03}
            table, outer = torch.linspace(0, 1, 256), random(-(-n_blocks // 4))
            inner = torch.randint(0, 256, (n_blocks,))
            absmax = table[inner] * outer[torch.arange(n_blocks) // 4] + 0.03
            stored[".weight.absmax"] = inner.to(torch.uint8)
            stored |= {".weight.nested_absmax": outer, ".weight.nested_quant_map": table}
        else:
            stored[".weight.absmax"] = absmax = 0.3 + random(n_blocks)
        text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
        stored[f".weight.quant_state.bitsandbytes__{kind}"] = text
        dense = NF4[numbers] * absmax[torch.arange(len(numbers)) // block]
        return stored, dense.view(matrix.shape)

    return Format({"quant_method": "bitsandbytes", "load_in_4bit": True}, quantise)


def llm_int8():
    def quantise(matrix):
        scale = matrix.abs().amax(1)
        numbers = (matrix / scale[:, None] * 127).round().to(torch.int8)
        stored = {".weight": numbers, ".SCB": scale, ".weight_format": torch.tensor(0).byte()}
        return stored, numbers.float() * scale[:, None] / 127

    return Format({"load_in_8bit": True}, quantise)


def fp8(block: tuple[int, int] | None, name: str, dtype: torch.dtype, **settings):
    """None is a scale per tensor; (1, 0) one per row."""

    def quantise(matrix):
        numbers = (matrix * 50).to(torch.float8_e4m3fn)
        extent = block and (block[0], block[1] or matrix.shape[1])
        grid = [-(-n // b) for n, b in zip(matrix.shape, extent or matrix.shape, strict=True)]
        if dtype == torch.uint8:
            stored = torch.randint(120, 124, grid).to(dtype)
            scale = 2.0 ** (stored.float() - 127)
        else:
            stored = random(*grid, dtype=dtype)
            scale = stored.float()
        dense = numbers.float() * spread(scale, matrix.shape, extent or matrix.shape)
        shape = () if block is None else stored.shape
        return {".weight": numbers, name: stored.view(shape)}, dense

    return Format({"quant_method": "fp8"} | settings, quantise)


def compressed(bits: int, group: int | None, zeros: bool, order: bool = False, packed: bool = True):
    """compressed-tensors of whole numbers; group None is one scale a row."""

    def quantise(matrix):
        n_rows, n_columns = matrix.shape
        size = group or n_columns
        numbers, half = codes(matrix, bits), 1 << (bits - 1)
        scale = random(n_rows, n_columns // size, dtype=torch.bfloat16)
        zero = torch.randint(0, 1 << bits, scale.shape) if zeros else torch.full(scale.shape, half)
        of_column = torch.arange(n_columns) // size
        stored = {".weight_scale": scale}
        if order:
            of_column = of_column[torch.randperm(n_columns)]
            stored[".weight_g_idx"] = of_column.int()
        if packed:
            stored[".weight_packed"] = words(numbers, bits)
            stored[".weight_shape"] = torch.tensor(matrix.shape)
            if zeros:
                stored[".weight_zero_point"] = words(zero.t(), bits).t().contiguous()
        else:
            stored[".weight"] = (numbers - half).to(torch.int8)
            if zeros:
                stored[".weight_zero_point"] = (zero - half).to(torch.int8)
        dense = (numbers - zero[:, of_column]).float() * scale.float()[:, of_column]
        return stored, dense

    weights = {"num_bits": bits, "type": "int", "symmetric": not zeros, "group_size": group}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    settings = {"quant_method": "compressed-tensors", "config_groups": groups}
    return Format(settings | {"sparsity_config": {}, "ignore": ["lm_head"]}, quantise)


def float_four(kind: str):
    """MXFP4 and NVFP4 of compressed-tensors."""

    def quantise(matrix):
        numbers, size = codes(matrix, 4), 32 if kind == "mxfp4" else 16
        packed = (numbers[:, 0::2] | numbers[:, 1::2] << 4).to(torch.uint8)
        shape = (len(matrix), matrix.shape[1] // size)
        stored = {".weight_packed": packed}
        if kind == "mxfp4":
            stored[".weight_scale"] = torch.randint(120, 126, shape).to(torch.uint8)
            scale = 2.0 ** (stored[".weight_scale"].float() - 127)
        else:
            stored[".weight_scale"] = (100 * random(*shape)).to(torch.float8_e4m3fn)
            stored[".weight_global_scale"] = torch.tensor([50.0])
            scale = stored[".weight_scale"].float() / 50
        return stored, FP4[numbers] * scale[:, torch.arange(matrix.shape[1]) // size]

    weights = {"num_bits": 4, "type": "float", "group_size": 32 if kind == "mxfp4" else 16}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return Format({"quant_method": "compressed-tensors", "config_groups": groups}, quantise)


def gptq(bits: int, order: bool = False, version: int = 1, group: int = 16):
    def quantise(matrix):
        n_rows, n_columns = matrix.shape
        numbers, n_groups = codes(matrix, bits), -(-n_columns // group)
        scale = random(n_groups, n_rows, dtype=torch.float16)
        zero = torch.randint(0, 1 << bits, (n_groups, n_rows))  # those that are meant
        of_column = torch.arange(n_columns) // group
        of_column = of_column[torch.randperm(n_columns)] if order else of_column
        kept = zero if version == 2 else (zero - 1) % (1 << bits)
        stored = {".qweight": words(numbers, bits).t().contiguous(), ".scales": scale}
        stored |= {".qzeros": words(kept, bits), ".g_idx": of_column.int()}
        dense = (numbers.t() - zero[of_column]).float() * scale.float()[of_column]
        return stored, dense.t().contiguous()

    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": order}
    return Format(settings | ({"checkpoint_format": "gptq_v2"} if version == 2 else {}), quantise)


def awq(group: int = 16):
    place = [0, 4, 1, 5, 2, 6, 3, 7]  # of each of eight columns in its word

    def pack(numbers):  # (r, n) -> (r, n / 8)
        swapped = torch.empty_like(numbers)
        for column in range(numbers.shape[1]):
            swapped[:, column // 8 * 8 + place[column % 8]] = numbers[:, column]
        return words(swapped, 4)

    def quantise(matrix):
        numbers = codes(matrix, 4).t().contiguous()  # (in, out)
        zero = torch.randint(0, 16, (len(numbers) // group, len(matrix)))
        scale = random(*zero.shape, dtype=torch.float16)
        of_row = torch.arange(len(numbers)) // group
        stored = {".qweight": pack(numbers), ".qzeros": pack(zero), ".scales": scale}
        dense = (numbers - zero[of_row]).float() * scale.float()[of_row]
        return stored, dense.t().contiguous()

    return Format({"quant_method": "awq", "bits": 4, "version": "gemm"}, quantise)


def mxfp4_experts(matrix: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """gpt-oss: the experts' matrices (E, in, out) of one projection."""
    numbers = codes(matrix.mT, 4)  # (E, out, in)
    grouped = numbers.unflatten(-1, (-1, 32))  # (E, out, groups, 32)
    blocks = (grouped[..., 0::2] | grouped[..., 1::2] << 4).to(torch.uint8)
    scales = torch.randint(120, 126, grouped.shape[:3]).to(torch.uint8)
    dense = FP4[grouped] * 2.0 ** (scales.float()[..., None] - 127)
    return {"_blocks": blocks, "_scales": scales}, dense.flatten(-2).mT.contiguous()


FORMATS = {
    "nf4": four_bit("nf4", nested=False),
    "nf4-nested": four_bit("nf4", nested=True),
    "fp4-in-bf16": four_bit("fp4", nested=True, storage=torch.bfloat16),
    "nf4-wide-blocks": four_bit("nf4", nested=False, block=4096),
    "llm-int8": llm_int8(),
    "fp8-block": fp8((16, 8), ".weight_scale_inv", torch.float32),
    "fp8-ragged": fp8((24, 24), ".weight_scale_inv", torch.float32, weight_block_size=[24, 24]),
    "fp8-e8m0": fp8((16, 16), ".weight_scale_inv", torch.uint8, weight_block_size=[16, 16]),
    "fp8-tensor": fp8(None, ".weight_scale_inv", torch.bfloat16, activation_scheme="static"),
    "fp8-row": fp8((1, 0), ".weight_scale", torch.float32, quant_method="fbgemm_fp8"),
    "ct-fp8": fp8((1, 0), ".weight_scale", torch.bfloat16, quant_method="compressed-tensors"),
    "ct-int8": compressed(8, None, zeros=False, packed=False),
    "ct-int8-zeros": compressed(8, 8, zeros=True, packed=False),
    "ct-int4": compressed(4, 16, zeros=False),
    "ct-int4-zeros": compressed(4, 16, zeros=True),
    "ct-int4-order": compressed(4, 8, zeros=True, order=True),
    "ct-int8-packed": compressed(8, None, zeros=True),
    "ct-mxfp4": float_four("mxfp4"),
    "ct-nvfp4": float_four("nvfp4"),
    "gptq4": gptq(4),
    "gptq4-order": gptq(4, order=True),
    "gptq4-v2": gptq(4, version=2),
    "gptq8": gptq(8),
    "gptq2-ragged": gptq(2, group=24),
    "awq": awq(),
}


def quantised(base: Path, kind: str, folder: Path, dtype=torch.float32) -> tuple[Path, Path]:
    """The folder `base` quantised, and the same with dense matrices of `dtype`."""
    torch.manual_seed(3)
    own, dense = {}, {}
    for path in sorted(base.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            stem = name.removesuffix(".weight")
            if kind == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")):
                parts, meant = mxfp4_experts(tensor.float())
            elif kind in FORMATS and tensor.ndim == 2 and is_linear(name):
                parts, meant = FORMATS[kind].quantise(tensor.float())
            else:
                parts, meant = {name.removeprefix(stem): tensor.to(dtype)}, tensor
            dense[name] = meant.to(dtype)
            own |= {stem + suffix: part.contiguous().clone() for suffix, part in parts.items()}
    assert own.keys() != dense.keys()
    settings = {"quant_method": "mxfp4"} if kind == "mxfp4" else FORMATS[kind].settings
    config = json.loads((base / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    for place, tensors, more in (
        (folder / kind, own, {"quantization_config": settings}),
        (folder / f"{kind}-dense", dense, {}),
    ):
        shutil.copytree(base, place, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(config | more))
    return folder / kind, folder / f"{kind}-dense"


def is_linear(name: str) -> bool:
    """A matrix of a decoder layer that a quantiser takes: no router, embedding or head."""
    whole = ("gate.weight", "router.weight", "embed_tokens.weight", "lm_head.weight")
    return name.endswith(".weight") and not name.endswith(whole)
