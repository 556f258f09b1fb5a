"""Where a parameter's values lie: one tensor of the model folder, or several that are converted.

transformers renames, merges and splits tensors when it loads a model folder (merged experts, split
projections). Its own conversion mapping is asked, so that no family needs code here. What is
quantised goes through it under the name, and with the values, of the dense matrix.
"""

import copy
import functools
import itertools
import re
import weakref
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from onn_core.errors import ModelFolderError
from onn_core.weights.dequantise import Converted, Source
from onn_core.weights.folder import ModelFolder


def find_sources(model: PreTrainedModel, model_folder: ModelFolder) -> dict[str, Source]:
    """Name in `model.state_dict()` -> its source, for every tensor that the model folder gives.

    ModelFolderError names a tensor that is missing or has the wrong shape. Tied parameters that
    the model folder stores once are left out.
    """
    wanted = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    sources: dict[str, Source] = {}
    groups: dict[str, tuple[WeightConverter, list[tuple[str, str]]]] = {}
    for key in sorted(model_folder.parameter_names(), key=dot_natural_key):
        prefix = model.base_model_prefix
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], prefix, wanted)
        if name not in wanted:
            continue
        if pattern is None:
            sources[name] = model_folder.source(key)
        else:
            groups.setdefault(name, (by_pattern[pattern], []))[1].append((pattern, key))
    for name, (converter, members) in groups.items():
        sources.update(_converted(model, model_folder, name, converter, members))
    _check(model, sources, wanted)
    return sources


def _converted(
    model: PreTrainedModel,
    model_folder: ModelFolder,
    name: str,
    converter: WeightConverter,
    members: list[tuple[str, str]],
) -> dict[str, Source]:
    """The sources of all parameters that one conversion makes; tried on meta tensors first."""
    before = [model_folder.source(key) for _, key in members]
    entries = tuple(entry for source in before for entry in source.entries)
    packed = any(source.packed for source in before)
    dtype = model.dtype
    owner = weakref.ref(model)  # which must not live as long as its stream

    def run(tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        transform = copy.deepcopy(converter)
        for (pattern, key), tensor in zip(members, tensors, strict=True):
            transform.add_tensor(name, key, pattern, tensor)
        made = transform.convert(name, model=owner(), config=owner().config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

    def convert(target: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        stored = iter(parts)
        each = [list(itertools.islice(stored, len(source.entries))) for source in before]
        return run([s.dense(own, dtype) for s, own in zip(before, each, strict=True)])[target]

    try:
        made = run([torch.empty(s.shape, dtype=s.entry.dtype, device="meta") for s in before])
    except Exception as error:
        raise ModelFolderError(
            f"{name} cannot be made from {members[0][1]} and {len(members) - 1} more tensors "
            f"({error}): save the model again with save_pretrained."
        ) from error
    sources: dict[str, Source] = {}
    for target, tensor in made.items():
        make = functools.partial(convert, target)
        sources[target] = Converted(target, entries, tuple(tensor.shape), make, packed=packed)
    return sources


def _check(
    model: PreTrainedModel, sources: dict[str, Source], wanted: dict[str, torch.Tensor]
) -> None:
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    for name, tensor in wanted.items():
        if name not in sources:
            if name in tied or any(pattern.search(name) for pattern in ignored):
                continue
            raise ModelFolderError(
                f"the model needs {name}, which no shard has: "
                "download the folder again or save it with save_pretrained."
            )
        shape = sources[name].shape
        if shape != tensor.shape:
            raise ModelFolderError(
                f"{sources[name].entry.name} has shape {list(shape)}, but config.json asks for "
                f"{list(tensor.shape)}: the two do not belong together."
            )
