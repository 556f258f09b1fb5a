"""Which stored tensors of a quantised model folder are one matrix, and in which format.

The configuration names the format; which matrices are quantised is seen from the tensors that are
there. All is checked against the headers of the files: only what is a few bytes a matrix is read.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from onn_core.errors import ModelFolderError
from onn_core.ops import four_bit
from onn_core.weights.dequantise import INT8_FACTOR, FloatFour, FourBit, Grouped, Quantised, Scaled
from onn_core.weights.shards import TensorEntry, damaged, parse_json_object, reading, short

# What quantises -> what its settings may be, where another value would mean other weights.
METHODS: dict[str, dict[str, tuple[Any, ...]]] = {
    "bitsandbytes": {},
    "fp8": {},
    "fbgemm_fp8": {},
    "mxfp4": {},
    "gptq": {"checkpoint_format": (None, "", "gptq", "gptq_v2"), "is_marlin_format": (None, False)},
    "awq": {"version": (None, "gemm", "GEMM")},
    "compressed-tensors": {"transform_config": (None, {}), "sparsity_config": (None,)},
}
SETTINGS_NAMES = ("quantization_config", "compression_config")  # in config.json
OLD_GPTQ_NAME = "quantize_config.json"  # where AutoGPTQ kept its settings
MAX_SETTINGS_BYTES = 1 << 20
MAX_STATE_BYTES = 4096  # of bitsandbytes' JSON for one matrix
BYTES = (torch.uint8,)
WORDS = (torch.int32,)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCALES = (*FLOATS, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint8)
# Beside a quantised matrix, and of no use to its values: ranges of activations and of the cache.
BESIDE = re.compile(
    r"\.(weight_format|activation_scale|input_scale|input_zero_point|input_global_scale"
    r"|input_scale_ub|output_scale|output_zero_point|[qkv]_scale|[qkv]_zero_point)$"
)


def take_settings(model_dir: Path, config: PreTrainedConfig) -> dict[str, Any] | None:
    """The quantisation that config.json, or quantize_config.json of old GPTQ, names, if any.

    It is taken out of `config`, so that transformers makes plain modules. ModelFolderError if it
    is none of METHODS.
    """
    settings, path = None, model_dir / "config.json"
    for part in (config, config.get_text_config()):  # which may be the same
        for name in SETTINGS_NAMES:
            found = part.__dict__.pop(name, None)
            settings = found if settings is None else settings
    old = model_dir / OLD_GPTQ_NAME
    if settings is None and os.path.isfile(old):
        with reading(old), open(old, "rb") as file:
            content = file.read(MAX_SETTINGS_BYTES + 1)
        settings, path = {"quant_method": "gptq"} | parse_json_object(content, old), old
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise damaged(path, "its quantization_config is not an object")
    by_flag = settings.get("load_in_4bit") is True or settings.get("load_in_8bit") is True
    method = settings.get("quant_method", "bitsandbytes" if by_flag else None)
    if not isinstance(method, str) or method not in METHODS:
        raise ModelFolderError(
            f"{model_dir.name} is quantised with {short(method)}, which is none of "
            f"{', '.join(METHODS)}: use another version of the model."
        )
    settings = settings | {"quant_method": method}
    sparse = settings.get("sparsity_config")
    if isinstance(sparse, dict) and sparse.get("format") in (None, "dense"):
        settings["sparsity_config"] = None
    for name, known in METHODS[method].items():
        value = settings.get(name)
        if value not in known:
            raise ModelFolderError(
                f"{model_dir.name} is quantised with {method} and {name} {short(value)}, which "
                "cannot be read: use another version of the model."
            )
    return settings


def without_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json as of an unquantised folder."""
    inner = {name: value for name, value in config.items() if name not in SETTINGS_NAMES}
    return {n: without_settings(v) if isinstance(v, dict) else v for n, v in inner.items()}


def find_quantised(
    tensors: dict[str, TensorEntry], settings: dict[str, Any], read: Callable[[str], torch.Tensor]
) -> dict[str, Quantised]:
    """Name of a parameter in an unquantised folder -> how its matrix is stored.

    read: gives a tensor; only small ones are read. ModelFolderError if parts are missing or do not
    fit together, or a matrix is in no format that is known.
    """
    found: dict[str, Quantised] = {}
    taken: set[str] = set()
    formats = _Finder(tensors, settings, read).formats()
    for key in tensors:
        for pattern, make in formats.items():
            match = re.fullmatch(pattern, key)
            if match and (one := make(match[1], key)) is not None:
                if one.name in found or one.name in tensors.keys() - {e.name for e in one.entries}:
                    raise _unfit(one.name, "is stored twice")
                found[one.name] = one
                taken |= {entry.name for entry in one.entries}
    for key, entry in tensors.items():
        packed = entry.dtype in (*FP8, torch.int8, torch.uint8) and key.endswith(".weight")
        packed |= key.endswith((".qweight", ".qzeros", ".weight_packed", "_blocks"))
        packed |= key.endswith(".scales") and settings["quant_method"] in ("awq", "gptq")
        if packed and key not in taken:
            raise _unfit(key, f"({str(entry.dtype).removeprefix('torch.')}) lacks its other parts")
    return found


@dataclasses.dataclass
class _Finder:
    tensors: dict[str, TensorEntry]
    settings: dict[str, Any]
    read: Callable[[str], torch.Tensor]

    def formats(self) -> dict[str, Callable[[str, str], Quantised | None]]:
        """The name of a part that each matrix of a format has one of -> what makes of it."""
        method = self.settings["quant_method"]
        if method == "bitsandbytes":
            state = r"(.+)\.quant_state\.bitsandbytes__(?:nf4|fp4)"
            return {state: self.four_bit, r"(.+)\.SCB": self.int8}
        if method in ("gptq", "awq"):
            return {r"(.+)\.qweight": self.gptq}
        if method == "mxfp4":
            return {r"(.+)_blocks": self.mxfp4}
        return {r"(.+)_scale(?:_inv)?": self.scaled, r"(.+)\.weight_packed": self.packed}

    def part(
        self, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...] | None
    ) -> TensorEntry:
        """The stored tensor `name`; ModelFolderError if it is not there or not of that kind."""
        entry = self.tensors.get(name)
        if entry is None:
            raise _unfit(name, "is missing")
        if entry.dtype not in dtypes:
            raise _unfit(name, f"has dtype {str(entry.dtype).removeprefix('torch.')}")
        if shape is not None and (
            len(entry.shape) != len(shape)
            or any(want not in (None, size) for size, want in zip(entry.shape, shape, strict=True))
        ):
            raise _unfit(name, f"has shape {list(entry.shape)}")
        if not entry.n_bytes:
            raise _unfit(name, "is empty")
        return entry

    def optional(self, name: str, *kind: Any) -> list[TensorEntry]:
        return [self.part(name, *kind)] if name in self.tensors else []

    def four_bit(self, name: str, key: str) -> Quantised:
        state_entry = self.part(key, BYTES, (None,))
        if state_entry.n_bytes > MAX_STATE_BYTES:
            raise _unfit(key, f"has {state_entry.n_bytes:,} bytes")
        state = parse_json_object(self.read(key).numpy().tobytes(), state_entry.path)
        shape, block = _sizes(state.get("shape"), key), state.get("blocksize")
        if type(block) is not int or not 2 <= block <= 1 << 16 or block & (block - 1):
            raise _unfit(key, f"has a blocksize of {short(block)}")
        n = math.prod(shape)
        weight = self.part(name, (*BYTES, torch.int8, *FLOATS), None)
        if weight.n_bytes != -(-n // 2):
            raise _unfit(name, f"has {weight.n_bytes:,} bytes for {n:,} values of half a byte")
        absmax = self.part(f"{name}.absmax", (*BYTES, *FLOATS), (-(-n // block),))
        code = self.part(f"{name}.quant_map", FLOATS, (16,))
        is_nf4 = block == 64 and tuple(self.read(code.name).tolist()) == four_bit.NF4
        if absmax.dtype != torch.uint8:
            return FourBit(name, (weight, absmax, code), shape, block, is_nf4=is_nf4)
        outer, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if type(outer) is not int or not 2 <= outer <= 1 << 16:
            raise _unfit(key, f"has a nested_blocksize of {short(outer)}")
        if type(offset) is not float or not math.isfinite(offset):
            raise _unfit(key, f"has a nested_offset of {short(offset)}")
        nested = self.part(f"{name}.nested_absmax", FLOATS, (-(-absmax.n_bytes // outer),))
        table = self.part(f"{name}.nested_quant_map", FLOATS, (256,))
        entries = (weight, absmax, code, nested, table)
        return FourBit(name, entries, shape, block, outer, offset, is_nf4)

    def int8(self, name: str, key: str) -> Quantised:
        weight = self.part(f"{name}.weight", (torch.int8,), (None, None))
        scale = self.part(key, FLOATS, weight.shape[:1])
        layout = self.tensors.get(f"{name}.weight_format")
        if layout is not None and (layout.n_bytes > 8 or self.read(layout.name).any()):
            raise _unfit(layout.name, "names a layout of one processor")
        grid = (weight.shape[0], 1)
        return Scaled(weight.name, (weight, scale), weight.shape, grid, (1, 1), INT8_FACTOR)

    def scaled(self, name: str, key: str) -> Quantised | None:
        weight = self.tensors.get(name)
        if weight is None or weight.dtype not in (*FP8, torch.int8):
            return None
        self.part(name, (weight.dtype,), None)
        scale = self.part(key, SCALES, None)
        grid, blocks = self.grid(weight, scale)
        zero = self.optional(f"{name}_zero_point", (torch.int8,), scale.shape)
        return Scaled(name, (weight, scale, *zero), weight.shape, grid, blocks)

    def grid(
        self, weight: TensorEntry, scale: TensorEntry
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """How many scales each dimension of a matrix has, and how many elements one is for."""
        grid = scale.shape if math.prod(scale.shape) > 1 else ()
        if len(grid) == 1 or len(grid) == len(weight.shape) - 1 == 2:
            grid = (*grid, 1)  # one a row
        grid = (1,) * (len(weight.shape) - len(grid)) + grid
        blocks = []
        for size, count in zip(weight.shape, grid, strict=False):
            named = [b for b in self.named_blocks() if -(-size // b) == count]
            if count == 1:
                blocks.append(size)
            elif size % count == 0 or named:
                blocks.append(named[0] if named else size // count)
        if len(blocks) != len(grid) or len(grid) != len(weight.shape):
            raise _unfit(scale.name, f"has shape {list(scale.shape)} for {list(weight.shape)}")
        return grid, tuple(blocks)

    def named_blocks(self) -> list[int]:
        """Extents of blocks that the configuration names."""
        named = [self.settings.get("weight_block_size")]
        for weights in self.groups():
            named += [weights.get("block_structure"), [weights.get("group_size")]]
        extents = [n for block in named if isinstance(block, list) for n in block]
        return [n for n in dict.fromkeys(extents) if type(n) is int and n > 0]

    def groups(self) -> list[dict[str, Any]]:
        """What compressed-tensors says of weights, for each kind of matrix."""
        groups = self.settings.get("config_groups")
        groups = groups.values() if isinstance(groups, dict) else ()
        weights = [group.get("weights") for group in groups if isinstance(group, dict)]
        return [one for one in weights if isinstance(one, dict)]

    def packed(self, name: str, key: str) -> Quantised:
        packed = self.part(key, (*WORDS, *BYTES), (None, None))
        n_rows, width = packed.shape
        scale = self.part(f"{name}.weight_scale", SCALES, (None, None))
        n_groups = scale.shape[1]
        if packed.dtype == torch.uint8:
            if scale.shape[0] != n_rows or 2 * width % n_groups:
                raise _unfit(scale.name, f"has shape {list(scale.shape)}")
            divisor = self.optional(f"{name}.weight_global_scale", FLOATS, (1,))
            entries = (packed, scale, *divisor)
            return FloatFour(f"{name}.weight", entries, (n_rows, 2 * width))
        self.part(scale.name, FLOATS, (n_rows, None))
        stored_shape = self.part(f"{name}.weight_shape", (torch.int64, torch.int32), (2,))
        shape = _sizes(self.read(stored_shape.name).tolist(), stored_shape.name)
        named = [weights.get("num_bits") for weights in self.groups()]
        fitting = [b for b in (4, 8, 2) if b in named and -(-shape[1] * b // 32) == width]
        if shape[0] != n_rows or len(fitting) != 1:
            raise _unfit(key, f"has shape {list(packed.shape)} for {list(shape)}")
        bits = fitting[0]
        zero_shape = (-(-n_rows * bits // 32), n_groups)
        zero = self.optional(f"{name}.weight_zero_point", WORDS, zero_shape)
        index = self.index(f"{name}.weight_g_idx", shape[1], n_groups)
        entries = (packed, scale, *zero, *index)
        return Grouped(f"{name}.weight", entries, shape, bits, bool(zero), bool(index))

    def gptq(self, name: str, key: str) -> Quantised:
        """And AWQ, whose words hold numbers of several rows, not of several columns."""
        is_awq = self.settings["quant_method"] == "awq"
        words = self.part(key, WORDS, (None, None))
        scale = self.part(f"{name}.scales", FLOATS, (None, None))
        n_groups, n_rows = scale.shape
        zero = self.part(f"{name}.qzeros", WORDS, (n_groups, None))
        bits = 32 * zero.shape[1] // n_rows
        if bits not in ((4,) if is_awq else (2, 4, 8)) or bits * n_rows != 32 * zero.shape[1]:
            raise _unfit(zero.name, f"has shape {list(zero.shape)} for {n_rows:,} rows")
        if words.shape[1] != (zero.shape[1] if is_awq else n_rows):
            raise _unfit(key, f"has shape {list(words.shape)} for {n_rows:,} rows")
        n_columns = words.shape[0] if is_awq else words.shape[0] * 32 // bits
        index = self.index(f"{name}.g_idx", n_columns, n_groups)
        entries, shape = (words, scale, zero, *index), (n_rows, n_columns)
        version_1 = not is_awq and self.settings.get("checkpoint_format") != "gptq_v2"
        layout = {"transposed": True, "zero_offset": int(version_1), "is_awq": is_awq}
        return Grouped(f"{name}.weight", entries, shape, bits, True, bool(index), **layout)

    def index(self, name: str, n_columns: int, n_groups: int) -> list[TensorEntry]:
        """The tensor that says the group of each column, where they are not in order."""
        entry = self.optional(name, (torch.int32, torch.int64), (n_columns,))
        divides = n_columns % n_groups == 0
        if entry and ((groups := self.read(name)) != -1).any():  # -1: there is no such order
            if not ((groups >= 0) & (groups < n_groups)).all():
                raise _unfit(name, f"names groups that are not among {n_groups:,}")
            if not divides or (groups.view(n_groups, -1) != torch.arange(n_groups)[:, None]).any():
                return entry
        if not divides:
            raise _unfit(name, f"is missing, and {n_columns:,} columns are not {n_groups:,} groups")
        return []

    def mxfp4(self, name: str, key: str) -> Quantised:
        blocks = self.part(key, BYTES, (None, None, None, 16))
        scale = self.part(f"{name}_scales", BYTES, blocks.shape[:3])
        n_experts, n_out, n_groups, _ = blocks.shape
        shape = (n_experts, 32 * n_groups, n_out)
        return FloatFour(name, (blocks, scale), shape, turned=True)


def _sizes(shape: Any, name: str) -> tuple[int, ...]:
    """A shape that a file states, of positive numbers."""
    whole = isinstance(shape, list) and 1 <= len(shape) <= 8
    if not whole or any(type(n) is not int or not 0 < n < 1 << 31 for n in shape):
        raise _unfit(name, f"states the shape {short(json.dumps(shape))}")
    return tuple(shape)


def _unfit(name: str, reason: str) -> ModelFolderError:
    return ModelFolderError(
        f"the quantised tensor {short(name)} {reason}: download the folder again, or use another "
        "version of the model."
    )
