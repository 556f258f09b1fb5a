"""Random model folders of any geometry, written as fast as the disk."""

import copy
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onn_core.config import expand_home
from onn_core.errors import ModelFolderError
from onn_core.record import cache_dir, new_folder, write_json
from onn_core.weights.default_model import prepare_default_model
from onn_core.weights.folder import write_index
from onn_core.weights.geometry import empty_model, geometry, save_configs, stored_tensors
from onn_core.weights.shards import write_tensors

# For speed one block of random values is repeated through all matrices. Its length is a prime, so
# that no row of a matrix equals another.
RANDOM_BLOCK_VALUES = 2**22 - 3


def prepare(name: str, layers: int | None = None, out: Path | None = None) -> Path:
    """The folder of "smollm2", or of a random model folder of a geometry in GEOMETRIES.

    A random one is written once, to `out` or next to the default model, with the default model's
    tokenizer as a stand-in, so that text can be used.
    """
    from transformers import AutoTokenizer

    default = prepare_default_model()
    if name == "smollm2" and out is None and layers is None:
        return default
    config = geometry(name, layers)
    folder = (
        Path(expand_home(out)) if out else cache_dir() / f"{name}-{config.num_hidden_layers}-layers"
    )
    if out is not None or not (folder / "tokenizer.json").is_file():
        write_random_model(folder, config)
        AutoTokenizer.from_pretrained(default).save_pretrained(folder)
    return folder


def write_random_model(
    folder: str | os.PathLike,
    config: Any,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    shard_bytes: int = 5 * 10**9,
    progress: bool = True,
) -> Path:
    """Write a random safetensors model folder of any causal-LM `config`, as fast as the disk.

    Matrices are normal with std `config.initializer_range`, norm weights one, biases zero; tied
    weights are written once; `dtype` is float32, bfloat16 or float16. There is no tokenizer. A
    folder that already holds this config, dtype and seed is returned as it is. ModelFolderError
    when it holds something else or the disk is too full.
    """
    from tqdm.auto import tqdm

    folder = Path(expand_home(folder))
    model = empty_model(config, dtype)
    config = copy.deepcopy(config)
    config.dtype, config.architectures = dtype, [type(model).__name__]
    contents = {"config": json.loads(config.to_json_string(use_diff=False)), "seed": seed}
    del contents["config"]["transformers_version"]
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        done = folder / "random_checkpoint.json"
        if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == contents:
            return folder
        raise ModelFolderError(
            f"{folder} holds something else: delete it or choose another folder."
        )

    tensors = stored_tensors(model)
    with new_folder(folder) as temporary:
        needed_bytes = sum(tensor.nbytes for tensor in tensors.values())
        free_bytes = shutil.disk_usage(temporary).free
        if needed_bytes > free_bytes:
            raise ModelFolderError(
                f"the model folder needs {needed_bytes / 1e9:.1f} GB and the disk of {folder} has "
                f"{free_bytes / 1e9:.1f} GB free: free some space or write fewer layers."
            )
        save_configs(config, temporary)
        with tqdm(total=needed_bytes, unit="B", unit_scale=True, disable=not progress) as bar:
            _write_random_shards(temporary, tensors, config, seed, shard_bytes, bar)
        write_json(temporary / "random_checkpoint.json", contents)
    return folder


def _write_random_shards(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    config: Any,
    seed: int,
    shard_bytes: int,
    bar: Any,
) -> None:
    """The shards of `tensors`, which are on the meta device, and their index."""
    from huggingface_hub import split_torch_state_dict_into_shards

    normal = torch.randn(RANDOM_BLOCK_VALUES, generator=torch.Generator().manual_seed(seed))
    normal *= getattr(config, "initializer_range", 0.02)
    normal_bytes, position = normal.to(config.dtype).view(torch.uint8).numpy(), 0

    def pieces(name: str) -> Iterator[np.ndarray]:
        nonlocal position
        tensor = tensors[name]
        if tensor.dim() < 2:
            fill = 0.0 if name.endswith("bias") else 1.0
            yield torch.full((tensor.numel(),), fill, dtype=tensor.dtype).view(torch.uint8).numpy()
            return
        left_bytes = tensor.nbytes
        while left_bytes:
            piece = normal_bytes[position : position + left_bytes]
            yield piece
            left_bytes -= len(piece)
            position = (position + len(piece)) % len(normal_bytes)
            bar.update(len(piece))

    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    shards = {
        file_name: {name: (tensors[name].dtype, tensors[name].shape) for name in names}
        for file_name, names in plan.filename_to_tensors.items()
    }
    for file_name, layout in shards.items():
        write_tensors(folder / file_name, layout, pieces)
    write_index(folder, shards)
