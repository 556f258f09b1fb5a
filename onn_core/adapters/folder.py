"""A PEFT adapter folder: checked against a model before anything is allocated, then loaded."""

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedModel

from onn_core.errors import ConfigError, ModelFolderError
from onn_core.streaming.loading import skeleton
from onn_core.weights.folder import ModelFolder, read_tensor_index

MAX_CONFIG_BYTES = 1 << 20
SOUND_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # they leave the base as it is
REFUSED = (  # they change the base model, or import a module that the file names
    *("megatron_config", "layer_replication", "loftq_config", "corda_config", "lora_ga_config"),
    *("arrow_config", "use_bdlora", "alora_invocation_tokens", "use_qalora", "velora_config"),
    *("monteclora_config", "kasa_config"),
)
PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")


def read_adapter(folder: str | os.PathLike) -> peft.LoraConfig:
    """The configuration of a LoRA adapter; ConfigError if the folder has none that is supported."""
    path = Path(folder) / CONFIG_NAME
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"it is larger than {MAX_CONFIG_BYTES:,} bytes")
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{folder} holds no {CONFIG_NAME} that can be read ({reason}): give the folder that "
            "save_pretrained wrote."
        ) from error
    if not isinstance(fields, dict) or fields.get("peft_type") != "LORA":
        raise ConfigError(f"{path} describes no LoRA adapter: only LoRA and DoRA are supported.")
    for name in REFUSED:
        if fields.get(name):
            raise ConfigError(
                f"{path} sets {name}, which is not supported: use plain LoRA or DoRA."
            )
    start = fields.get("init_lora_weights", True)
    if start not in SOUND_STARTS:
        raise ConfigError(
            f"{path} says init_lora_weights {start!r}, which changes the base model: save the "
            "adapter again with path_initial_model_for_weight_conversion."
        )
    for name in PATTERNS:
        value = fields.get(name) or []
        for pattern in value if isinstance(value, list | dict) else [value]:
            _require_plain_pattern(pattern, path, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.LoraConfig.from_pretrained(folder)
    except Exception as error:  # what a bad file raises differs from field to field
        raise _unfit(folder, error) from error


def check_adapter(model_folder: ModelFolder, folder: str | os.PathLike) -> peft.LoraConfig:
    """The adapter's configuration, once its tensors are those that it needs on this model.

    Names and shapes are compared with the adapter made on the meta device: nothing is allocated.
    """
    config = read_adapter(folder)
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not os.path.isfile(path):
        raise ConfigError(f"{folder} has no {path.name}; pickles are not loaded.")
    stored = {entry.name: entry.shape for entry in read_tensor_index(path)}
    model = skeleton(model_folder, torch.float32, torch.device("cpu"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
            needed = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    except Exception as error:
        raise _unfit(folder, error) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in needed.items()}
    for name in sorted(shapes.keys() | stored.keys()):
        if name not in shapes and name.endswith(".base_layer.weight"):
            raise ConfigError(
                f"{folder} holds a matrix of the base model as well ({name[:200]}): save the "
                "adapter with save_embedding_layers=False."
            )
        if shapes.get(name) != stored.get(name):
            raise ConfigError(
                f"{folder} does not fit this model: {name[:200]} has shape {stored.get(name)} in "
                f"the file and should have {shapes.get(name)}: use the model it was trained on."
            )
    return read_adapter(folder)  # afresh: the one above is bound to the meta model


def load_adapter(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    *,
    model_folder: ModelFolder | None = None,
    trainable: bool = False,
    float32: bool = True,
) -> peft.PeftModel:
    """`model` with the LoRA adapter of a PEFT folder; ConfigError if it does not fit.

    model_folder: that of `model`, unless it is a streamed one. float32: adapters in float32,
    whatever the model's dtype; else in the model's.
    """
    config = check_adapter(model_folder or model.model_folder, folder)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            return peft.PeftModel.from_pretrained(
                model,
                folder,
                config=config,
                is_trainable=trainable,
                autocast_adapter_dtype=float32,
            )
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise _unfit(folder, error) from error


def _require_plain_pattern(pattern: Any, path: Path, name: str) -> None:
    """A regular expression that is short to match, whatever the names."""
    text = pattern if isinstance(pattern, str) else ""
    repeated_groups = re.search(r"\)\s*[*+{]", text)
    if not text or repeated_groups or len(re.findall(r"[*+{]", text)) > 3 or len(text) > 10_000:
        raise ConfigError(
            f"{path} has a pattern in {name} that is no text or may take too long to match: list "
            "the modules by name."
        )


def _unfit(folder: str | os.PathLike, error: Exception) -> ConfigError:
    if isinstance(error, ModelFolderError | ConfigError):
        return error
    reason = " ".join(str(error).split())[:300]
    return ConfigError(f"{folder} is not an adapter for this model: {reason}")
