"""Merge an adapter into its base, shard by shard.

PEFT's own `merge` computes each changed matrix, one module at a time, so the result is bit-equal to
`merge_and_unload` of the model in memory; everything else is copied as it is. The memory holds one
module at a time: its matrix, and the float32 results of PEFT's matmuls. A quantised matrix is
written dense, in the dtype of the model; a GGUF file becomes a folder.
"""

import contextlib
import functools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from onn_core.adapters.folder import load_adapter, read_adapter
from onn_core.config import expand_home
from onn_core.data.tokenizer import load_tokenizer
from onn_core.errors import ConfigError, DataError
from onn_core.record import new_folder, write_json
from onn_core.streaming.skeleton import skeleton
from onn_core.weights.dequantise import Converted
from onn_core.weights.folder import (
    INDEX_NAME,
    PICKLE_SUFFIXES,
    WEIGHTS_NAME,
    ModelFolder,
    write_index,
)
from onn_core.weights.formats import find_sources
from onn_core.weights.geometry import save_configs
from onn_core.weights.quantised import BESIDE, OLD_GPTQ_NAME, without_settings
from onn_core.weights.shards import TensorEntry, write_tensors

NOT_COPIED = (*PICKLE_SUFFIXES, ".safetensors", ".py", ".gguf", ".h5", ".msgpack", ".onnx")


def merge(
    model_dir: str | os.PathLike, adapter_dir: str | os.PathLike, out_dir: str | os.PathLike
) -> Path:
    """Write `model_dir` with the adapter merged into it as the new folder `out_dir`.

    It has the same shards, tensors and dtypes, but nothing is quantised, and it loads in plain
    transformers. `out_dir` appears only once it is complete. A leading ~ in any of the three is
    the home. ConfigError if `out_dir` exists already, the disk is too full, or the adapter does
    not fit or cannot be merged; ModelFolderError if `model_dir` cannot be read.
    """
    out_dir = Path(expand_home(out_dir))
    if out_dir.exists() or out_dir.is_symlink():
        raise ConfigError(f"{out_dir} exists already: choose another folder for the merged model.")
    model_folder = ModelFolder.open(model_dir)
    merged = _Merged(model_folder, adapter_dir)
    shards = _layout(model_folder, merged)
    tensors = [tensor for shard in shards.values() for tensor in shard.values()]
    n_bytes = sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors)
    with new_folder(out_dir) as temporary:
        if n_bytes > shutil.disk_usage(temporary).free:
            raise ConfigError(
                f"the merged model needs {n_bytes / 1e9:.1f} GB, more than the disk of "
                f"{out_dir} has free: free some space or choose another folder."
            )
        for shard, own in shards.items():
            write_tensors(temporary / shard, own, merged.pieces)
        if model_folder.gguf:
            config = model_folder.config
            config.dtype, config.architectures = model_folder.stored_dtype, [merged.model_name]
            save_configs(config, temporary)
            with contextlib.suppress(DataError):  # the file may hold no tokenizer
                load_tokenizer(model_folder.gguf[0]).save_pretrained(temporary)
        else:
            _copy_files(model_folder, temporary)
        write_index(temporary, shards)
        model_folder.check_unchanged()
    return out_dir


def _copy_files(model_folder: ModelFolder, out_dir: Path) -> None:
    """All but the weights, and the configuration as of an unquantised folder."""
    for path in sorted(model_folder.model_dir.iterdir()):
        wanted = path.suffix not in NOT_COPIED and path.name not in (INDEX_NAME, OLD_GPTQ_NAME)
        if wanted and path.is_file() and not path.name.startswith("."):
            shutil.copyfile(path, out_dir / path.name)
    if model_folder.quantised:
        config = json.loads((out_dir / "config.json").read_bytes())
        write_json(out_dir / "config.json", without_settings(config))


class _Merged:
    """The tensors of a model folder that an adapter changes, each made when it is asked for."""

    def __init__(self, model_folder: ModelFolder, adapter_dir: str | os.PathLike):
        self.model_folder = model_folder
        model = skeleton(model_folder, model_folder.stored_dtype, torch.device("cpu"))
        self.model_name = type(model).__name__
        self.sources = find_sources(model, model_folder)
        names = {module: name for name, module in model.named_modules()}
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        _make_placeholders(model, read_adapter(adapter_dir).modules_to_save or ())
        self.model = load_adapter(model, adapter_dir, model_folder=model_folder)
        self._tuners: dict[nn.Module, list[BaseTunerLayer]] = {}
        saved: dict[nn.Module, nn.Module] = {}
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer):
                self._tuners.setdefault(module.get_base_layer(), []).append(module)
            elif isinstance(module, ModulesToSaveWrapper):
                own = module.modules_to_save["default"]
                saved.update(zip(module.original_module.modules(), own.modules(), strict=True))
        self._last: tuple[nn.Module | None, dict[str, torch.Tensor]] = None, {}
        # tensor of the model folder -> its dtype and what makes it
        self.makers: dict[str, tuple[torch.dtype, Callable[[], torch.Tensor]]] = {}
        for module, module_name in names.items():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if module in saved:
                    parameter = saved[module]._parameters[name]
                if module in self._tuners:
                    make = functools.partial(self._merge, module, module_name, name)
                elif not _is_absent(parameter):  # trained whole: a module to save, a bias
                    make = functools.partial(torch.Tensor.detach, parameter)
                else:
                    continue
                full_name = f"{module_name}.{name}"
                source = self.sources.get(full_name)
                if source is None or full_name in {*tied, *tied.values()}:
                    raise ConfigError(
                        f"the adapter changes {full_name}, which shares its values with another "
                        "part of the model: only an adapter without it can be merged."
                    )
                if type(source) is Converted:
                    raise ConfigError(
                        f"the adapter changes {full_name}, which transformers makes from other "
                        "tensors of the folder: merge it in memory with PEFT."
                    )
                self.makers[source.name] = parameter.dtype, make

    def pieces(self, name: str) -> Iterator[Any]:
        """The bytes of a tensor of the merged model."""
        if name in self.makers:
            values = self.makers[name][1]()
        elif name in self.model_folder.quantised:
            values = self.model_folder.read_dense(name)
        else:
            return self.model_folder.read_blocks(name)
        return iter([values.contiguous().view(-1).view(torch.uint8).numpy()])

    def _merge(self, module: nn.Module, module_name: str, name: str) -> torch.Tensor:
        """A parameter of `module` after PEFT merged its adapters into it."""
        if self._last[0] is not module:
            self._last = None, {}  # before more memory is taken
            before = dict(module._parameters)
            for own, parameter in before.items():
                if parameter is not None:
                    values = parameter.detach()
                    if _is_absent(parameter):
                        source = self.sources[f"{module_name}.{own}"]
                        values = self.model_folder.read_source(source, parameter.dtype)
                    values = values.to(parameter.dtype).view(parameter.shape)
                    values = values.clone() if values.data_ptr() == parameter.data_ptr() else values
                    module._parameters[own] = nn.Parameter(values, requires_grad=False)
            try:
                for tuner in reversed(self._tuners[module]):  # the innermost first
                    tuner.merge()
                self._last = module, dict(module._parameters)
            except (RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"the adapter of {module_name} cannot be merged: {error}"
                ) from error
            finally:
                module._parameters.update(before)
                for tuner in self._tuners[module]:
                    tuner.merged_adapters.clear()
        return self._last[1][name].detach()


def _make_placeholders(model: PreTrainedModel, in_full_names: Sequence[str]) -> None:
    """Give `model` parameters of one NaN each, expanded to their shapes.

    Vectors, and the modules of `in_full_names`, which the adapter replaces, get all their memory.
    """
    plan = model._get_dtype_plan(model.dtype)
    made: dict[int, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        in_full = any(f".{module_name}.".find(f".{name}.") >= 0 for name in in_full_names)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                in_float32 = any(re.search(rule, f"{module_name}.{name}") for rule in plan)
                full = in_full or parameter.ndim < 2
                shape = parameter.shape if full else (1,) * parameter.ndim
                dtype = torch.float32 if in_float32 else parameter.dtype
                values = torch.full(shape, torch.nan, dtype=dtype).expand(parameter.shape)
                made[id(parameter)] = nn.Parameter(values, requires_grad=False)
            module._parameters[name] = made[id(parameter)]


def _is_absent(parameter: torch.Tensor) -> bool:
    """Whether `parameter` is still a placeholder: nothing but NaN."""
    if parameter.untyped_storage().nbytes() == parameter.element_size():
        parameter = (
            parameter.flatten()[:1] if parameter.ndim < 2 else parameter[(0,) * parameter.ndim]
        )
    return bool(parameter.isnan().all())


def _layout(
    model_folder: ModelFolder, merged: _Merged
) -> dict[str, dict[str, tuple[torch.dtype, Sequence[int]]]]:
    """Shard -> tensor -> dtype and shape of the merged model, in the order of their bytes."""
    kinds: dict[str, tuple[TensorEntry, torch.dtype, Sequence[int]]] = {}
    for name in model_folder.parameter_names():
        one = model_folder.quantised.get(name)
        if one is not None:
            kinds[name] = one.entries[0], model_folder.stored_dtype, one.shape
        elif not (model_folder.quantised and BESIDE.search(name)):
            entry = model_folder.tensors[name]
            kinds[name] = entry, entry.dtype, entry.shape
    n_files = len(model_folder.gguf)
    file_names = {
        path: f"model-{number:05}-of-{n_files:05}.safetensors" if n_files > 1 else WEIGHTS_NAME
        for number, path in enumerate(model_folder.gguf, 1)
    }
    shards: dict[str, dict[str, tuple[torch.dtype, Sequence[int]]]] = {}
    for name, (entry, dtype, shape) in sorted(kinds.items(), key=lambda item: item[1][0].offset):
        shard = shards.setdefault(file_names.get(entry.path, entry.path.name), {})
        shard[name] = merged.makers.get(name, (dtype, None))[0], shape
    return shards
