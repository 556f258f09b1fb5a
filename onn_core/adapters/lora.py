"""Which layers are trained, and their adapters through PEFT."""

import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import peft
import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from onn_core.adapters.folder import load_adapter
from onn_core.config import TrainConfig
from onn_core.errors import ConfigError
from onn_core.ops.making import MAKING
from onn_core.streaming.skeleton import all_layers, decoder_layers


def select_layers(sparse_layers: str | Sequence[int], n_layers: int) -> list[int]:
    """The sorted numbers of the layers that `sparse_layers` means, of `n_layers` in all.

    It is "all", "ends:4" (the first and the last 4), "last:8", or numbers from 0. ConfigError for
    anything else, or for a layer that the model does not have.
    """
    wrong = ConfigError(
        f'sparse_layers must be "all", "ends:N", "last:N" or different numbers from 0 to '
        f"{n_layers - 1}, not {sparse_layers!r}."
    )
    if isinstance(sparse_layers, str):
        if sparse_layers == "all":
            return list(range(n_layers))
        match = re.fullmatch(r"(ends|last):(\d+)", sparse_layers)
        if not match or not 1 <= int(match[2]) <= n_layers:
            raise wrong
        size = int(match[2])
        last = range(n_layers - size, n_layers)
        return sorted({*range(size), *last}) if match[1] == "ends" else list(last)
    layers = list(sparse_layers) if isinstance(sparse_layers, Iterable) else []
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise wrong
    if not layers or len(set(layers)) != len(layers) or not set(layers) <= set(range(n_layers)):
        raise wrong
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
    """`model` in training mode with the LoRA adapters that `config` asks for.

    With `config.adapter` they are those of that folder, to be trained further. ConfigError if the
    model has no module or parameter of a name.
    """
    float32 = config.lora_dtype != "model"
    if config.adapter is not None:
        return load_adapter(model, config.adapter, trainable=True, float32=float32).train()
    layers = decoder_layers(model)
    selected = select_layers(config.sparse_layers, len(layers))
    names = linear_names(layers)
    targets = names if config.target_modules is None else list(config.target_modules)
    parameters = _target_parameters(model, [layers[number] for number in selected], config)
    unknown = [target for target in targets if target not in names]
    if unknown or not targets and not parameters:
        raise ConfigError(
            f"target_modules {', '.join(map(repr, unknown))} match no linear module of a decoder "
            f"layer: choose among {', '.join(names)}."
        )
    numbers = None if len(selected) == len(layers) else selected
    if len(all_layers(model)) > len(layers):  # PEFT's numbers would count what sees or hears, too
        chosen, numbers = {part for n in selected for part in layers[n].modules()}, None
        full_names = (name for name, module in model.named_modules() if module in chosen)
        targets = [name for name in full_names if name.rsplit(".", 1)[-1] in targets]
    lora = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        target_parameters=parameters,
        layers_to_transform=numbers,
        task_type="CAUSAL_LM",
    )
    with MAKING, warnings.catch_warnings():
        torch.manual_seed(config.seed)
        # PEFT asks transformers for a property that was renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        adapted = peft.get_peft_model(model, lora, autocast_adapter_dtype=float32).train()
    left_out = describe_experts(model).get("untrained_experts")
    if left_out and config.target_modules is None:
        print(
            f"adapter: the experts of this mixture are not trained ({', '.join(left_out)}), only "
            "the linear modules; target_parameters takes these names.",
            file=sys.stderr,
        )
    return adapted


def _target_parameters(
    model: nn.Module, layers: Sequence[nn.Module], config: TrainConfig
) -> list[str] | None:
    """The full names in `model` of the parameters of `layers` that `config` names.

    PEFT leaves parameters out of layers_to_transform, so each layer is named.
    """
    if not config.target_parameters:
        return None
    prefixes = {layer: name for name, layer in model.named_modules()}
    found, unmatched = [], set(config.target_parameters)
    for layer in layers:
        for name, parameter in layer.named_parameters():
            for target in config.target_parameters:
                if parameter.ndim in (2, 3) and f".{name}".endswith(f".{target}"):
                    found.append(f"{prefixes[layer]}.{name}")
                    unmatched.discard(target)
    if unmatched:
        known = describe_experts(model).get("untrained_experts", [])
        raise ConfigError(
            f"target_parameters {', '.join(map(repr, sorted(unmatched)))} match no matrix of a "
            f"decoder layer: {'choose among ' + ', '.join(known) if known else 'leave it None'}."
        )
    return found


def describe_experts(model: PreTrainedModel) -> dict[str, list[str]]:
    """What a record says of a mixture whose experts are not all trained; {} of other models.

    model: the base model, once it has its adapters. "untrained_experts" lists the names in a layer
    of the three-dimensional parameters (experts, out, in) without an adapter, which target_modules
    cannot reach; target_parameters takes these names.
    """
    untrained: set[str] = set()
    for layer in decoder_layers(model):
        wrappers = [module for module in layer.modules() if isinstance(module, ParamWrapper)]
        adapted = {(wrapper.get_base_layer(), wrapper.parameter_name) for wrapper in wrappers}
        for module_name, module in layer.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3 and (module, name) not in adapted:
                    untrained.add(f"{module_name}.{name}".replace(".base_layer", ""))
    return {"untrained_experts": sorted(untrained)} if untrained else {}


def trained_layers(model: PreTrainedModel) -> list[int]:
    """The numbers of the decoder layers that have a parameter to train."""
    return [
        number
        for number, layer in enumerate(decoder_layers(model))
        if any(parameter.requires_grad for parameter in layer.parameters())
    ]


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
