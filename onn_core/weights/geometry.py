"""Named geometries: transformers configs of models whose weights need not be here."""

from pathlib import Path
from typing import Any

import torch

from onn_core.errors import ConfigError
from onn_core.ops.making import MAKING

# fmt: off
GEOMETRY_FIELDS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "max_position_embeddings", "rope_theta",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)
GEOMETRIES: dict[str, tuple] = {
    "smollm2": ("llama", 576, 1536, 30, 9, 3, 49152, 8192, 1e5, True, 1, 2, 2),
    "phi-4": ("phi3", 5120, 17920, 40, 40, 10, 100352, 16384, 2.5e5, False, 100257, 100265, 100349),
    "llama-3-8b":
        ("llama", 4096, 14336, 32, 32, 8, 128256, 8192, 5e5, False, 128000, 128001, None),
    "llama-3-70b":
        ("llama", 8192, 28672, 80, 64, 8, 128256, 8192, 5e5, False, 128000, 128001, None),
    "llama-3.1-405b":
        ("llama", 16384, 53248, 126, 128, 8, 128256, 131072, 5e5, False, 128000, 128001, None),
}
# fmt: on


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
    return sum(tensor.numel() for tensor in empty_model(config, None).parameters())


def empty_model(config: Any, dtype: torch.dtype | None) -> Any:
    """The causal language model of `config` on the meta device: shapes without memory."""
    from transformers import AutoModelForCausalLM

    with MAKING, torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def stored_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name -> tensor of all that a model folder holds, each tied weight under its first name."""
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensors.setdefault(id(tensor), (name, tensor.detach()))
    return dict(tensors.values())


def save_configs(config: Any, folder: Path) -> None:
    """Write config.json and the generation_config.json that follows from it."""
    from transformers import GenerationConfig

    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
