"""A dense model folder quantised once, into the cache, and streamed from there ever after."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from onn_core.errors import ConfigError, ModelFolderError
from onn_core.processes import alone_in
from onn_core.record import cache_dir, sha256_of, write_json
from onn_core.weights import quantise
from onn_core.weights.folder import INDEX_NAME, WEIGHTS_NAME, ModelFolder, write_index
from onn_core.weights.shards import TensorEntry, stamp, write_tensors

MANIFEST_NAME = "manifest.json"
VERSION = 1  # of what is written
COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")  # next to the weights


def quantised_copy(
    model_folder: ModelFolder, kind: str, names: Collection[str], progress: bool = True
) -> ModelFolder:
    """The folder with the matrices of the tensors `names` in "int8" or "nf4".

    It is in the cache, named for what it was made of. Made shard by shard, a matrix in memory at a
    time; what was interrupted goes on with the next shard, and a file that was changed since is
    made again. ConfigError if the disk has no room, ModelFolderError if it cannot be written.
    """
    copy = _Copy(model_folder, kind, frozenset(names))
    try:
        copy.folder.parent.mkdir(parents=True, exist_ok=True)
        with alone_in(copy.folder.parent):  # the others find it made
            if not _is_intact(copy.folder):
                shutil.rmtree(copy.folder, ignore_errors=True)
                copy.write(progress)
    except OSError as error:
        raise ModelFolderError(
            f"{copy.folder} cannot be written ({error.strerror or error}): make room, or set "
            "ONN_CACHE to a folder that can be."
        ) from error
    made = ModelFolder.open(copy.folder)
    made.base_dir = model_folder.base_dir
    return made


class _Copy:
    def __init__(self, model_folder: ModelFolder, kind: str, names: frozenset[str]):
        self.model_folder, self.kind, self.names = model_folder, kind, names
        identity = hashlib.sha256(f"{VERSION} {kind} {sorted(names)}".encode())
        identity.update((model_folder.model_dir / "config.json").read_bytes())
        identity.update(model_folder.fingerprint().encode())
        name = f"{model_folder.model_dir.name}-{kind}-{identity.hexdigest()[:12]}"
        self.folder = cache_dir() / name
        self.shards: dict[str, list[TensorEntry]] = {}
        for entry in sorted(model_folder.tensors.values(), key=lambda e: (e.path.name, e.offset)):
            self.shards.setdefault(entry.path.name, []).append(entry)
        self._parts: dict[str, torch.Tensor] = {}  # of the latest matrix

    def layout(self, shard: str) -> quantise.Layout:
        """What the shard of the copy holds."""
        found: quantise.Layout = {}
        for entry in self.shards[shard]:
            if entry.name in self.names:
                found |= quantise.layout(self.kind, entry.name, entry.shape)
            else:
                found[entry.name] = entry.dtype, entry.shape
        return found

    def write(self, progress: bool) -> None:
        """Make the copy, or what is left of it."""
        from tqdm.auto import tqdm

        partial = self.folder.with_name(f"{self.folder.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        done = {
            shard: known
            for shard, known in _manifest(partial).items()
            if shard in self.shards and _is_same(partial / shard, known)
        }
        left = [shard for shard in self.shards if shard not in done]
        kinds = [kind for shard in left for kind in self.layout(shard).values()]
        n_bytes = sum(math.prod(shape) * dtype.itemsize for dtype, shape in kinds)
        free = shutil.disk_usage(partial).free
        what = f"{self.model_folder.model_dir.name} in {self.kind} takes {n_bytes / 1e9:.1f} GB"
        if n_bytes > free:
            raise ConfigError(
                f"{what} more in {partial.parent}, which has {free / 1e9:.1f} GB free: make room, "
                "or set ONN_CACHE to a folder on another disk."
            )
        if progress:
            print(f"{what} of {partial.parent}; it is made once.", flush=True)
        total = sum(entry.n_bytes for shard in left for entry in self.shards[shard])
        with tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
            for shard in left:
                temporary = partial / f".{shard}.{os.getpid()}"
                write_tensors(temporary, self.layout(shard), lambda name: self._pieces(name, bar))
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                self.model_folder.check_unchanged()
                digest = sha256_of(temporary)
                os.replace(temporary, partial / shard)
                done[shard] = {"sha256": digest, "stamp": list(stamp(partial / shard))}
                write_json(partial / MANIFEST_NAME, done)
        self._write_rest(partial)
        os.rename(partial, self.folder)

    def _pieces(self, name: str, bar: Any) -> Iterator[Any]:
        """The bytes of a tensor of the copy."""
        entry = self.model_folder.tensors.get(name)
        if entry is not None and name not in self.names:
            for block in self.model_folder.read_blocks(name):
                yield block
                bar.update(len(block))
            return
        if entry is not None:  # the first part of a matrix; the others follow at once
            made = quantise.quantise(self.kind, self.model_folder.read(name))
            names = quantise.layout(self.kind, name, entry.shape)
            self._parts = dict(zip(names, made, strict=True))
            bar.update(entry.n_bytes)
        yield self._parts.pop(name).contiguous().view(-1).view(torch.uint8).numpy()

    def _write_rest(self, partial: Path) -> None:
        """All that is no weight."""
        for path in self.model_folder.model_dir.iterdir():
            own = path.name in (INDEX_NAME, MANIFEST_NAME) or path.name.startswith(".")
            if path.suffix in COPIED and path.is_file() and not own:
                shutil.copyfile(path, partial / path.name)
        config = json.loads((self.model_folder.model_dir / "config.json").read_bytes())
        config["quantization_config"] = quantise.settings(self.kind)
        config["dtype"] = str(self.model_folder.stored_dtype).removeprefix("torch.")
        write_json(partial / "config.json", config)
        write_index(partial, {shard: self.layout(shard) for shard in self.shards})


def _manifest(folder: Path) -> dict[str, Any]:
    """Shard -> its hash and its stamp; empty if there is none that can be read."""
    try:
        found = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        return {name: dict(known) for name, known in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _is_same(path: Path, known: dict[str, Any]) -> bool:
    """Whether a shard is as it was written: by its stamp, or, if that is another, by its hash."""
    try:
        return list(stamp(path)) == known["stamp"] or sha256_of(path) == known["sha256"]
    except (OSError, KeyError):
        return False


def _is_intact(folder: Path) -> bool:
    manifest = _manifest(folder)
    found = list(manifest) == [WEIGHTS_NAME] or (folder / INDEX_NAME).is_file()
    return found and all(_is_same(folder / n, known) for n, known in manifest.items())
