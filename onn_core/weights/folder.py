"""A Hugging Face folder as an index, validated before any weight is read."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from onn_core.config import expand_home
from onn_core.errors import ModelFolderError, OnnError
from onn_core.record import write_json
from onn_core.weights.dequantise import Plain, Quantised, Source
from onn_core.weights.gguf import gguf_files, read_gguf
from onn_core.weights.quantised import find_quantised, take_settings
from onn_core.weights.reader import MAPPED_BYTES, host_buffer
from onn_core.weights.shards import (
    TensorEntry,
    damaged,
    parse_json_object,
    read_tensor_index,
    reading,
    short,
    stamp,
)

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
BLOCK_BYTES = 8 << 20  # of a tensor, at a time
MAX_INDEX_BYTES = 100_000_000  # as much as the safetensors library allows for a header


class ModelFolder:
    """The configuration and the tensor index of a model folder; made by `ModelFolder.open`.

    tensors: all that is stored, by name. quantised: the matrices that are to be decoded, by the
    name of their parameter. config: as of an unquantised folder. gguf: the files, of a GGUF model.

    A shard is open only while something is read from it, so any number of shards needs one file
    handle, and a shard that was changed since is never read.
    """

    def __init__(self, model_dir: Path, gguf: Sequence[Path] = ()):
        self.model_dir = self.base_dir = model_dir  # base_dir: by which adapters name the model
        self.gguf = gguf
        self.tensors: dict[str, TensorEntry] = {}
        self.quantised: dict[str, Quantised] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}  # of each shard at `open`
        self.quantisation: dict[str, Any] | None = None
        for path in gguf:
            self._stamp(path)
        if gguf:
            self.config, self.tensors, self.quantised = read_gguf(gguf)
        else:
            self.config, self.quantisation = _read_config(model_dir)
        self._dtype = self.config.dtype  # transformers changes it whenever it makes a model

    @classmethod
    def open(cls, model_dir: str | os.PathLike) -> "ModelFolder":
        """Validate the folder and the header of each shard; ModelFolderError if it cannot be used.

        Reads config.json and `model.safetensors`, or else the shards that
        `model.safetensors.index.json` names. No tensor data is read. A leading ~ is the home.
        `model_dir` may also be a GGUF file, or a folder with one.
        """
        model_dir = Path(expand_home(model_dir))
        if files := gguf_files(model_dir):
            return cls(files[0].parent, files)
        if not os.path.isdir(model_dir):
            raise ModelFolderError(
                f"{model_dir} is not a folder: give that of a downloaded model "
                "(hf download NAME --local-dir FOLDER)."
            )
        model_folder = cls(model_dir)
        weight_map = _read_weight_map(model_dir)
        for shard in dict.fromkeys(weight_map.values()) or [WEIGHTS_NAME]:
            model_folder._add_shard(model_dir / shard)
        for name, shard in weight_map.items():
            entry = model_folder.tensors.get(name)
            if entry is None or entry.path.name != shard:
                raise damaged(model_dir / INDEX_NAME, f"{shard} has no tensor {short(name)}")
        if model_folder.quantisation is not None:
            model_folder.quantised = find_quantised(
                model_folder.tensors, model_folder.quantisation, model_folder.read
            )
        return model_folder

    @property
    def stored_dtype(self) -> torch.dtype:
        """What `from_pretrained(dtype="auto")` of transformers takes."""
        if self._dtype or self.quantised:
            return self._dtype or torch.bfloat16
        dtypes = (entry.dtype for entry in self.tensors.values())
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)

    def parameter_names(self) -> list[str]:
        """The names of the tensors that this folder would have if nothing was quantised."""
        parts = {entry.name for one in self.quantised.values() for entry in one.entries}
        return [name for name in self.tensors if name not in parts] + list(self.quantised)

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` in fresh CPU memory; ModelFolderError if its file cannot be read."""
        return self.read_entry(self.tensors[name])

    def read_entry(self, entry: TensorEntry) -> torch.Tensor:
        """A tensor, or a part of one, in fresh CPU memory."""
        n = entry.n_bytes
        # The heap would hold large blocks back, in each thread that reads.
        buffer = host_buffer(n) if n >= MAPPED_BYTES else torch.empty(n, dtype=torch.uint8)
        with self._opened(entry.path) as descriptor:
            _read_into(descriptor, entry.path, buffer.numpy(), entry.offset)
        return buffer.view(entry.dtype).reshape(entry.shape)

    def source(self, name: str) -> Source:
        """How the tensor `name` of an unquantised folder is stored."""
        if name in self.quantised:
            return self.quantised[name]
        return Plain(name, (self.tensors[name],), self.tensors[name].shape)

    def read_source(self, source: Source, dtype: torch.dtype) -> torch.Tensor:
        """A parameter in fresh memory: in `dtype` if it is quantised, else as it is stored."""
        return source.dense([self.read_entry(entry) for entry in source.entries], dtype)

    def read_dense(self, name: str) -> torch.Tensor:
        """The tensor `name` that an unquantised folder would have, in the dtype of the model."""
        return self.read_source(self.source(name), self.stored_dtype).to(self.stored_dtype)

    def same_bytes(self, one: Source, other: Source) -> bool:
        """Whether two parameters are stored alike, with equal bytes; reads both, by pieces."""
        if type(one) is not Plain or type(other) is not Plain:
            return False
        if (one.entry.dtype, one.shape) != (other.entry.dtype, other.shape):
            return False
        pieces = (self.read_blocks(source.name) for source in (one, other))
        return all(map(np.array_equal, *pieces))

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
        with self._opened(entry.path) as descriptor:
            for row, target in zip(numbers, buffer.numpy(), strict=True):
                _read_into(descriptor, entry.path, target, entry.offset + row * row_bytes)
        return buffer.view(entry.dtype).reshape(len(numbers), *row_shape)

    def read_blocks(self, name: str) -> Iterator[np.ndarray]:
        """The bytes of the tensor `name` as uint8 arrays of at most 8 MiB, in order."""
        entry = self.tensors[name]
        with self._opened(entry.path) as descriptor:
            for start in range(0, entry.n_bytes, BLOCK_BYTES):
                block = np.empty(min(BLOCK_BYTES, entry.n_bytes - start), np.uint8)
                _read_into(descriptor, entry.path, block, entry.offset + start)
                yield block

    def fingerprint(self) -> str:
        """The shards' sizes and times and the tensors' names, dtypes and shapes, hashed."""
        found = hashlib.sha256()
        for path, seen in sorted(self._stamps.items()):
            found.update(f"{path.name} {seen}\n".encode())
        for name, entry in sorted(self.tensors.items()):
            found.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
        return found.hexdigest()

    def check_unchanged(self) -> None:
        """ModelFolderError if the size or the modification time of a shard is not as at `open`."""
        for path in self._stamps:
            self._require_unchanged(path, path)

    @contextlib.contextmanager
    def _opened(self, path: Path) -> Iterator[int]:
        """A descriptor of a shard, for one read; ModelFolderError if it is not as at `open`."""
        with reading(path), open(path, "rb", buffering=0) as file:
            self._require_unchanged(path, file.fileno())
            yield file.fileno()

    def _require_unchanged(self, path: Path, opened: Path | int) -> None:
        with reading(path):
            if stamp(opened) != self._stamps[path]:
                raise ModelFolderError(
                    f"{path} was changed while it was in use: load the model again."
                )

    def _stamp(self, path: Path) -> None:
        with reading(path):
            self._stamps[path] = stamp(path)

    def _add_shard(self, path: Path) -> None:
        self._stamp(path)
        for entry in read_tensor_index(path):
            if entry.name in self.tensors:
                other = self.tensors[entry.name].path.name
                raise damaged(path, f"tensor {short(entry.name)} is in {other} as well")
            self.tensors[entry.name] = entry


def _read_config(model_dir: Path) -> tuple[transformers.PreTrainedConfig, dict[str, Any] | None]:
    """The configuration, and what it says of quantisation, which is taken out of it."""
    path = model_dir / "config.json"
    if not os.path.isfile(path):
        raise ModelFolderError(f"{model_dir} has no config.json: give a Hugging Face model folder.")
    try:
        json.loads(path.read_bytes(), parse_int=np.int64)  # a larger number would fail in torch
        config = transformers.AutoConfig.from_pretrained(
            model_dir, trust_remote_code=False, local_files_only=True
        )
        return config, take_settings(model_dir, config)
    except OnnError:
        raise
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
        with reading(model_dir):
            names = os.listdir(model_dir)
        if any(name.endswith(PICKLE_SUFFIXES) for name in names):
            raise ModelFolderError(
                f"{model_dir} has only pickled weights, which can run code: convert them once with "
                f"save_pretrained(..., safe_serialization=True)."
            )
        raise ModelFolderError(
            f"{model_dir} has neither {WEIGHTS_NAME} nor {INDEX_NAME}: download the model again."
        )
    with reading(path):
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise damaged(path, f"it is larger than {MAX_INDEX_BYTES:,} bytes")
        content = path.read_bytes()
    weight_map = parse_json_object(content, path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(path, "its weight_map does not map tensor names to files")
    for shard in {shard if isinstance(shard, str) else None for shard in weight_map.values()}:
        # The files of the Hugging Face cache are links to elsewhere, which is fine; a name that
        # leads out of the folder is not.
        if shard is None or "/" in shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise damaged(path, f"{short(shard)} is not the name of a .safetensors file here")
        if not os.path.isfile(model_dir / shard):
            raise ModelFolderError(f"{model_dir} lacks {short(shard)}: finish the download.")
    return weight_map


def write_index(
    folder: Path, shards: Mapping[str, Mapping[str, tuple[torch.dtype, Sequence[int]]]]
) -> None:
    """The index of `shards`: file name -> tensor name -> dtype and shape; none of one plain file.

    Files in parts need one, also where there is only one part.
    """
    if list(shards) == [WEIGHTS_NAME]:
        return
    weight_map = {name: shard for shard, own in shards.items() for name in own}
    kinds = [kind for own in shards.values() for kind in own.values()]
    n_bytes = sum(math.prod(shape) * dtype.itemsize for dtype, shape in kinds)
    index = {"metadata": {"total_size": n_bytes}, "weight_map": weight_map}
    write_json(folder / INDEX_NAME, index)


def _read_into(descriptor: int, path: Path, target: Any, offset: int) -> None:
    """Fill the bytes of `target` (N,) from the file, starting at byte `offset`."""
    view = memoryview(target)
    while len(view):
        n_read = os.preadv(descriptor, [view], offset)
        if n_read == 0:
            raise damaged(path, f"it ends at byte {offset:,}")
        view, offset = view[n_read:], offset + n_read
