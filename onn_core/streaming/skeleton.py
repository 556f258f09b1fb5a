"""A transformers model without its weights, its decoder layers, and the device it is made for."""

import copy
from collections.abc import Callable

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from onn_core.config import dtype_name
from onn_core.errors import ConfigError, ModelFolderError, OnnError
from onn_core.ops.making import MAKING
from onn_core.ops.matmul import has_fast_matmul
from onn_core.processes import local_rank, n_local
from onn_core.weights.folder import ModelFolder

MAX_BUFFERS_BYTES = 4 << 30  # causal masks of old families, tables of positions


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers in order; ConfigError if the model has none that can be streamed.

    Of a multimodal model those of its text part: what sees and hears has layers of its own.
    """
    layers = all_layers(model)
    decoder = model.get_decoder()
    inside = set(decoder.modules()) if isinstance(decoder, nn.Module) else set()
    return [layer for layer in layers if layer in inside] or layers


def all_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of every stack of a model; ConfigError if there is none."""
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    if not stacks:  # older families
        depth = getattr(model.config, "num_hidden_layers", None)
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        stacks = [module for module in lists if len(module) == depth]
    layers = [layer for stack in stacks for layer in stack]
    inner = {id(part) for layer in layers for part in layer.modules() if part is not layer}
    layers = [layer for layer in layers if id(layer) not in inner]
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no stack of decoder layers to stream.")
    return layers


def skeleton(
    model_folder: ModelFolder,
    dtype: str | torch.dtype,
    device: torch.device,
    make_class: Callable[[type[PreTrainedModel]], type[PreTrainedModel]] = lambda plain: plain,
) -> PreTrainedModel:
    """The model with its parameters on the meta device and its buffers real.

    make_class: what is made of the family's class before an instance is.

    ConfigError, ModelFolderError if config.json describes none that can be streamed from here.
    """
    try:
        with MAKING:
            return _skeleton(model_folder, dtype, device, make_class)
    except OnnError:
        raise
    except Exception as error:  # what a bad file raises differs from family to family
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        raise ModelFolderError(
            f"{model_folder.model_dir} has a config.json or generation_config.json that "
            f"transformers cannot use ({reason}): download the folder again."
        ) from error


def _skeleton(
    model_folder: ModelFolder, dtype: str | torch.dtype, device: torch.device, make_class: Callable
) -> PreTrainedModel:
    config = model_folder.config
    try:
        model_class = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        model_class = None
    named = config.architectures or []
    masked = any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in named)
    masked = masked and model_class is not None and model_class.__name__ not in named
    if model_class is None or config.is_encoder_decoder or masked:
        raise ConfigError(
            f"{model_folder.model_dir.name} holds {', '.join(named)[:200] or config.model_type}, "
            "which is not a causal language model: choose a decoder-only model."
        )
    _require_modest(model_class, model_folder)
    with init_empty_weights(include_buffers=False):
        dtype = _resolve_dtype(dtype, model_folder, device)
        model = make_class(model_class)._from_config(config, dtype=dtype)
    model.tie_weights()
    model.name_or_path = config._name_or_path = str(model_folder.base_dir)
    if not model_folder.gguf and (model_folder.model_dir / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(model_folder.model_dir)
    return model


def _require_modest(model_class: type[PreTrainedModel], model_folder: ModelFolder) -> None:
    """ModelFolderError if the config asks for more layers or buffers than the folder can back."""
    config = model_folder.config
    n_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(n_layers, int) and n_layers > len(model_folder.tensors):
        raise ModelFolderError(
            f"config.json asks for {n_layers} layers, but {model_folder.model_dir.name} has only "
            f"{len(model_folder.tensors)} tensors: the two do not belong together."
        )
    with torch.device("meta"):  # nothing is allocated
        buffers = model_class._from_config(copy.deepcopy(config)).buffers()
    n_bytes = sum(buffer.nbytes for buffer in buffers)
    if n_bytes > MAX_BUFFERS_BYTES:
        raise ModelFolderError(
            f"config.json asks for {n_bytes / 1e9:.1f} GB of buffers: correct it."
        )


def _resolve_dtype(
    dtype: str | torch.dtype, model_folder: ModelFolder, device: torch.device
) -> torch.dtype:
    if dtype == "auto":
        dtype = model_folder.stored_dtype
        if device.type == "cpu" and not has_fast_matmul(dtype):
            dtype = torch.float32
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype_name(dtype), None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ConfigError("dtype must be auto, float32, bfloat16, float16 or float64.")
    return dtype


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto" is CUDA if there is one; ConfigError for a device that is not there.

    "cuda" is the first device, or, under a launcher of several processes, this process's own.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f'device {device!r} is not understood: use "cpu" or "cuda".') from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError('there is no CUDA device here: use device="cpu".')
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f'device {device.type!r} is not supported: use "cpu" or "cuda".')
    if device.type == "cpu" or device.index is not None:
        return device
    n_devices = torch.cuda.device_count()
    if n_local() > n_devices > 1:  # with one, the launcher may show each process its own
        raise ConfigError(
            f"{n_local()} processes cannot share {n_devices} CUDA devices: start as many processes "
            "as there are devices."
        )
    return torch.device("cuda", local_rank() % n_devices)
