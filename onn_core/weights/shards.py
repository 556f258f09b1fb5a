"""One safetensors file: where its tensors lie, and how one is written in bounded memory."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from onn_core.errors import ModelFolderError

MAX_DIMENSIONS = 64  # of a tensor in torch
# fmt: off
DTYPES = {  # as safetensors writes them
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}
# fmt: on
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `n_bytes` at byte `offset` of the file `path`."""

    name: str
    path: Path
    offset: int
    n_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_tensor_index(path: Path) -> list[TensorEntry]:
    """The tensors of a safetensors file in the order of their bytes; no tensor data is read.

    ModelFolderError if the file is damaged. The safetensors library checks the header, whose
    tensors must fill the file without gaps or overlaps, and allocates no more than it holds.
    """
    with reading(path), open(path, "rb") as file:
        try:
            with safe_open(path, "np"):
                pass
        except SafetensorError as error:
            raise damaged(path, error) from error
        header_bytes = int.from_bytes(file.read(8), "little")
        fields = parse_json_object(file.read(header_bytes), path)
    fields.pop("__metadata__", None)
    entries = []
    for name, info in fields.items():
        dtype, shape, (start, stop) = info["dtype"], info["shape"], info["data_offsets"]
        if dtype not in DTYPES:
            raise ModelFolderError(
                f"{path} has tensor {short(name)} of dtype {dtype}, which cannot be read: use "
                "another version of the model."
            )
        if len(shape) > MAX_DIMENSIONS or math.prod(size or 1 for size in shape) >= 2**63:
            raise damaged(path, f"tensor {short(name)} has a shape that torch cannot have")
        offset = 8 + header_bytes + start
        entries.append(TensorEntry(name, path, offset, stop - start, DTYPES[dtype], tuple(shape)))
    return sorted(entries, key=lambda entry: (entry.offset, entry.n_bytes))


def write_tensors(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    pieces: Callable[[str], Iterable[Any]],
) -> None:
    """Write a safetensors file piece by piece, so that no tensor need be in memory as a whole.

    layout: name -> dtype and shape, in the order of the file. pieces: the bytes of the tensor of a
    name, as buffers in their order. ValueError if they are not as many as the layout says.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name, (dtype, shape) in layout.items():
        start, stop = stop, stop + math.prod(shape) * dtype.itemsize
        fields = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        header[name] = fields
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins at a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in layout:
            for piece in pieces(name):
                file.write(piece)
            if file.tell() != 8 + len(text) + header[name]["data_offsets"][1]:
                raise ValueError(f"the pieces of {name} are not as long as its shape says")


def parse_json_object(content: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in `content`, read from `path`; ModelFolderError if it is none.

    A key that is there twice is refused: two readers could take different values for it.
    """
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"its JSON is invalid: {error}") from error
    if not isinstance(value, dict):
        raise damaged(path, "its JSON is not an object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key is there twice")
    return fields


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Inside, an OSError becomes a ModelFolderError that names `path`."""
    try:
        yield
    except OSError as error:
        raise ModelFolderError(
            f"{path} cannot be read ({error.strerror or error}): restore it, or check its "
            "permissions and the disk."
        ) from error


def stamp(path: int | Path) -> tuple[int, int]:
    """Size in bytes and modification time in ns of a path or descriptor: a change shows in them."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def damaged(path: Path, reason: object) -> ModelFolderError:
    """The error for a file that is not what it should be."""
    return ModelFolderError(f"{path} is damaged ({str(reason)[:500]}): download or save it again.")


def short(name: Any) -> str:
    """`name` as Python writes it, cut to what fits in an error message."""
    return repr(name) if len(repr(name)) <= 100 else repr(name)[:100] + "..."
