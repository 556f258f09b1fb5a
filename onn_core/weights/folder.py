"""A Hugging Face folder as an index, validated before any weight is read."""

import contextlib
import dataclasses
import json
import math
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from onn_core.errors import ModelFolderError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_DIMENSIONS = 64
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `n_bytes` at byte `offset` of the file `path`."""

    name: str
    path: Path
    offset: int
    n_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class ModelFolder:
    """The configuration and the tensor index of a model folder; made by `ModelFolder.open`."""

    def __init__(self, model_dir: Path, config: transformers.PreTrainedConfig):
        self.model_dir = model_dir
        self.config = config
        self.tensors: dict[str, TensorEntry] = {}
        self._descriptors: dict[Path, int] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}  # (size in bytes, mtime in ns) at open
        self._closer = weakref.finalize(self, _close_all, self._descriptors)

    @classmethod
    def open(cls, model_dir: str | os.PathLike) -> "ModelFolder":
        """Validate the folder and the header of each shard; ModelFolderError if it cannot be used.

        Reads config.json and `model.safetensors`, or else the shards that
        `model.safetensors.index.json` names. No tensor data is read.
        """
        model_dir = Path(model_dir)
        if not os.path.isdir(model_dir):
            raise ModelFolderError(
                f"{model_dir} is not a folder: give that of a downloaded model "
                "(hf download NAME --local-dir FOLDER)."
            )
        model_folder = cls(model_dir, _read_config(model_dir))
        weight_map = _read_weight_map(model_dir)
        try:
            for shard in dict.fromkeys(weight_map.values()) or [WEIGHTS_NAME]:
                model_folder._add_shard(model_dir / shard)
            for name, shard in weight_map.items():
                entry = model_folder.tensors.get(name)
                if entry is None or entry.path.name != shard:
                    raise _damaged(model_dir / INDEX_NAME, f"{shard} has no tensor {_short(name)}")
        except BaseException:
            model_folder.close()
            raise
        return model_folder

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` in fresh CPU memory; ModelFolderError if its file cannot be read."""
        entry = self.tensors[name]
        buffer = torch.empty(entry.n_bytes, dtype=torch.uint8)
        _read_into(self._descriptors[entry.path], entry.path, buffer.numpy(), entry.offset)
        return buffer.view(entry.dtype).reshape(entry.shape)

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows `rows` (U,) int64, in any order, of the tensor `name` (V, C), as (U, C) on the CPU.

        Reads only those rows. IndexError if a row is out of range; ModelFolderError if the file
        cannot be read.
        """
        entry = self.tensors[name]
        n_rows, *row_shape = entry.shape
        numbers = rows.tolist()
        if numbers and not 0 <= min(numbers) <= max(numbers) < n_rows:
            raise IndexError(f"rows {min(numbers)} to {max(numbers)} of {n_rows} in {name}")
        row_bytes = math.prod(row_shape) * entry.dtype.itemsize
        buffer = torch.empty(len(numbers), row_bytes, dtype=torch.uint8)  # (U, C * itemsize)
        descriptor = self._descriptors[entry.path]
        for row, target in zip(numbers, buffer.numpy(), strict=True):
            _read_into(descriptor, entry.path, target, entry.offset + row * row_bytes)
        return buffer.view(entry.dtype).reshape(len(numbers), *row_shape)

    def check_unchanged(self) -> None:
        """ModelFolderError if the size or the modification time of a shard is not as at `open`."""
        for path, stamp in self._stamps.items():
            with _reading(path):
                status = os.stat(path)
            if (status.st_size, status.st_mtime_ns) != stamp:
                raise ModelFolderError(
                    f"{path} was changed while it was in use: load the model again."
                )

    def close(self) -> None:
        """Close the shards; nothing can be read afterwards. Closing twice is harmless."""
        self._closer()

    def _add_shard(self, path: Path) -> None:
        with _reading(path):
            descriptor = self._descriptors[path] = os.open(path, os.O_RDONLY)
            status = os.fstat(descriptor)
        self._stamps[path] = (status.st_size, status.st_mtime_ns)
        for entry in _read_header(descriptor, path, status.st_size):
            if entry.name in self.tensors:
                other = self.tensors[entry.name].path.name
                raise _damaged(path, f"tensor {_short(entry.name)} is in {other} as well")
            self.tensors[entry.name] = entry


def read_tensor_index(path: Path) -> list[TensorEntry]:
    """The tensors of one safetensors file in the order of their bytes; ModelFolderError if none."""
    with _reading(path):
        descriptor = os.open(path, os.O_RDONLY)
    try:
        return _read_header(descriptor, path, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def _read_config(model_dir: Path) -> transformers.PreTrainedConfig:
    path = model_dir / "config.json"
    if not os.path.isfile(path):
        raise ModelFolderError(f"{model_dir} has no config.json: give a Hugging Face model folder.")
    try:
        json.loads(path.read_bytes(), parse_int=np.int64)  # a larger number would fail in torch
        return transformers.AutoConfig.from_pretrained(
            model_dir, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # what a bad file raises differs from family to family
        if "trust_remote_code" in str(error):
            raise ModelFolderError(
                f"{path} asks to run code from the model folder, which is never done: choose a "
                f"model that transformers knows by itself."
            ) from error
        reason = " ".join(str(error).split())[:500]
        raise ModelFolderError(
            f"{path} is not a configuration that transformers {transformers.__version__} can use: "
            f"correct it or choose another model ({reason})."
        ) from error


def _read_weight_map(model_dir: Path) -> dict[str, str]:
    """Tensor name -> shard file name, as the index says; empty for a folder with one file."""
    if os.path.isfile(model_dir / WEIGHTS_NAME):
        return {}
    path = model_dir / INDEX_NAME
    if not os.path.isfile(path):
        with _reading(model_dir):
            names = os.listdir(model_dir)
        if any(name.endswith(PICKLE_SUFFIXES) for name in names):
            raise ModelFolderError(
                f"{model_dir} has only pickled weights, which can run code: convert them once with "
                f"save_pretrained(..., safe_serialization=True)."
            )
        raise ModelFolderError(
            f"{model_dir} has neither {WEIGHTS_NAME} nor {INDEX_NAME}: download the model again."
        )
    with _reading(path):
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise _damaged(path, f"it is larger than {MAX_HEADER_BYTES:,} bytes")
        content = path.read_bytes()
    weight_map = _parse_object(content, path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _damaged(path, "its weight_map does not map tensor names to files")
    for shard in {shard if isinstance(shard, str) else None for shard in weight_map.values()}:
        # a link to elsewhere is how the Hugging Face cache works; a name that leads there is not
        if shard is None or "/" in shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise _damaged(path, f"{_short(shard)} is not the name of a .safetensors file here")
        if not os.path.isfile(model_dir / shard):
            raise ModelFolderError(f"{model_dir} lacks {_short(shard)}: finish the download.")
    return weight_map


def _read_header(descriptor: int, path: Path, file_bytes: int) -> list[TensorEntry]:
    """The tensors of one safetensors file, which must cover its data without holes or overlaps."""
    prefix = bytearray(8)
    if file_bytes < len(prefix):
        raise _damaged(path, f"it has only {file_bytes} bytes")
    _read_into(descriptor, path, prefix, 0)
    header_bytes = int.from_bytes(prefix, "little")
    data_start = len(prefix) + header_bytes
    if header_bytes > MAX_HEADER_BYTES or data_start > file_bytes:
        raise _damaged(path, f"it says that its header has {header_bytes:,} bytes")
    header = bytearray(header_bytes)
    _read_into(descriptor, path, header, len(prefix))
    fields = _parse_object(header, path)
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "its __metadata__ does not map text to text")
    entries = [_parse_entry(name, info, path, data_start) for name, info in fields.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.n_bytes))
    end = data_start
    for entry in entries:
        if entry.offset != end:
            raise _damaged(path, f"tensor {_short(entry.name)} overlaps another or leaves a gap")
        end += entry.n_bytes
    if end != file_bytes:
        raise _damaged(path, f"it has {file_bytes:,} bytes, its tensors end at {end:,}")
    return entries


def _parse_entry(name: str, info: Any, path: Path, data_start: int) -> TensorEntry:
    info = info if isinstance(info, dict) else {}
    dtype, shape, offsets = (info.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ModelFolderError(
            f"{path} has tensor {_short(name)} of dtype {_short(dtype)}, which cannot be read: use "
            f"an unquantised version of the model."
        )
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise _damaged(path, f"tensor {_short(name)} has no valid shape")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"tensor {_short(name)} has no valid data_offsets")
    n_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if math.prod(size or 1 for size in shape) >= 2**63 or offsets[0] + n_bytes != offsets[1]:
        raise _damaged(path, f"tensor {_short(name)} has offsets that do not fit its shape")
    return TensorEntry(name, path, data_start + offsets[0], n_bytes, DTYPES[dtype], tuple(shape))


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(size) is int and 0 <= size < 2**63 for size in value
    )


def _parse_object(content: bytes | bytearray, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its JSON is invalid: {error}") from error
    if not isinstance(value, dict):
        raise _damaged(path, "its JSON is not an object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key is there twice")
    return fields


def _read_into(descriptor: int, path: Path, target: Any, offset: int) -> None:
    """Fill the bytes of `target` (N,) from the file, starting at byte `offset`."""
    view = memoryview(target)
    while len(view):
        with _reading(path):
            n_read = os.preadv(descriptor, [view], offset)
        if n_read == 0:
            raise _damaged(path, f"it ends at byte {offset:,}")
        view, offset = view[n_read:], offset + n_read


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelFolderError(
            f"{path} cannot be read ({error.strerror}): check its permissions and the disk."
        ) from error


def _close_all(descriptors: dict[Path, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def _damaged(path: Path, reason: str) -> ModelFolderError:
    return ModelFolderError(f"{path} is damaged ({reason}): download or save it again.")


def _short(name: Any) -> str:
    return repr(name) if len(repr(name)) <= 100 else repr(name)[:100] + "..."
