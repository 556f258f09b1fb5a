"""Which layers are trained, and their adapters through PEFT."""

import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import peft
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from onn_core.adapters.folder import load_adapter
from onn_core.config import TrainConfig
from onn_core.errors import ConfigError
from onn_core.streaming.loading import decoder_layers


def select_layers(sparse_layers: str | Sequence[int], n_layers: int) -> list[int]:
    """Layer numbers of "all", "ends:4" (first and last 4), "last:8", or numbers; ConfigError."""
    how = (
        f'sparse_layers must be "all", "ends:N", "last:N" or different numbers from 0 to '
        f"{n_layers - 1}, not {sparse_layers!r}."
    )
    if isinstance(sparse_layers, str):
        if sparse_layers == "all":
            return list(range(n_layers))
        match = re.fullmatch(r"(ends|last):(\d+)", sparse_layers)
        if not match or not 1 <= int(match[2]) <= n_layers:
            raise ConfigError(how)
        size = int(match[2])
        last = range(n_layers - size, n_layers)
        return sorted({*range(size), *last}) if match[1] == "ends" else list(last)
    layers = list(sparse_layers)
    whole = all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers)
    if not layers or not whole or len(set(layers)) != len(layers):
        raise ConfigError(how)
    if min(layers) < 0 or max(layers) >= n_layers:
        raise ConfigError(how)
    return sorted(layers)


def linear_names(layers: Sequence[nn.Module]) -> list[str]:
    """The last parts of the names of all linear modules in decoder layers."""
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for layer in layers
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        }
    )


def add_adapter(model: PreTrainedModel, config: TrainConfig) -> peft.PeftModel:
    """`model` with LoRA adapters on the layers and modules of `config`; ConfigError if none.

    With `config.adapter` they are those of that folder, to be trained further.
    """
    if config.adapter is not None:
        wrapped = load_adapter(
            model, config.adapter, trainable=True, float32=config.lora_dtype != "model"
        )
        wrapped.train()
        return wrapped
    layers = decoder_layers(model)
    selected = select_layers(config.sparse_layers, len(layers))
    names = linear_names(layers)
    targets = list(config.target_modules or names)
    unknown = [target for target in targets if target not in names]
    if unknown or not targets:
        raise ConfigError(
            f"target_modules {', '.join(map(repr, unknown))} match no linear module of a decoder "
            f"layer: choose among {', '.join(names)}."
        )
    everything = len(selected) == len(layers)
    lora = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        layers_to_transform=None if everything else selected,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(config.seed)
    with warnings.catch_warnings():  # PEFT asks transformers for a property that was renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        wrapped = peft.get_peft_model(
            model, lora, autocast_adapter_dtype=config.lora_dtype != "model"
        )
    wrapped.train()
    return wrapped


def trained_layers(model: PreTrainedModel) -> list[int]:
    """The numbers of the decoder layers that have a parameter to train."""
    return [
        number
        for number, layer in enumerate(decoder_layers(model))
        if any(parameter.requires_grad for parameter in layer.parameters())
    ]


def count_trainable(model: nn.Module) -> int:
    """How many parameters are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def save_adapter(model: peft.PeftModel, folder: str | os.PathLike) -> None:
    """Write a standard PEFT adapter folder; each file is replaced whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        model.save_pretrained(temporary, save_embedding_layers=False)
        (temporary / "README.md").unlink(missing_ok=True)
        for path in sorted(temporary.iterdir()):  # the configuration before the weights
            with path.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
