"""Where a parameter's values lie: one tensor of the model folder, or several that are converted.

transformers renames, merges and splits tensors when it loads a model folder (merged experts, split
projections). Its own conversion mapping is asked, so that no family needs code here. What is
quantised goes through it under the name, and with the values, of the dense matrix.
"""

import copy
import dataclasses
import functools
import itertools
import re
import weakref
from collections.abc import Callable

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
from onn_core.weights.dequantise import Quantised
from onn_core.weights.folder import ModelFolder
from onn_core.weights.shards import TensorEntry

COMPARED_BYTES = 8 << 20  # of two tensors at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """The tensors of the model folder that one parameter is made of.

    convert: makes it of them, on the device that they are on. quantised: set if they are one
    quantised matrix and `convert` does no more than make it dense. packed: quantised matrices are
    among them.
    """

    entries: tuple[TensorEntry, ...]
    convert: Callable[[list[torch.Tensor]], torch.Tensor] | None = None
    converted_shape: torch.Size | None = None
    quantised: Quantised | None = None
    packed: bool = False

    @property
    def entry(self) -> TensorEntry:
        return self.entries[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        return self.converted_shape or self.entry.shape

    @property
    def direct(self) -> bool:
        """Whether the file's bytes, cast at most, are the parameter's values in order."""
        return self.convert is None and self.entry.offset % self.entry.dtype.itemsize == 0

    @property
    def n_bytes(self) -> int:
        return sum(entry.n_bytes for entry in self.entries)

    def read(self, model_folder: ModelFolder) -> torch.Tensor:
        """The parameter's values, in the model folder's dtype and in fresh memory."""
        return self.made_of([model_folder.read_entry(entry) for entry in self.entries])

    def made_of(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """The parameter's values, of the stored tensors."""
        return self.convert(tensors) if self.convert else tensors[0]

    def same_bytes(self, other: "Source") -> bool:
        """Whether two sources hold the same values; reads both, a piece at a time."""
        mine, theirs = self.entry, other.entry
        if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape) or self.convert:
            return False
        with mine.path.open("rb") as one, theirs.path.open("rb") as two:
            one.seek(mine.offset)
            two.seek(theirs.offset)
            pieces = range(0, mine.n_bytes, COMPARED_BYTES)
            sizes = [min(COMPARED_BYTES, mine.n_bytes - start) for start in pieces]
            return all(one.read(size) == two.read(size) for size in sizes)

    @property
    def by_rows(self) -> bool:
        """Whether rows of the parameter can be made of the same rows of what is stored."""
        return self.convert is None or (self.quantised is not None and self.quantised.by_rows)

    def rows(self, start: int, stop: int) -> "Source":
        """The source of rows start:stop of a matrix that is stored by rows."""
        entry = self.entry
        row_bytes = entry.n_bytes // entry.shape[0]
        part = dataclasses.replace(
            entry,
            offset=entry.offset + start * row_bytes,
            n_bytes=(stop - start) * row_bytes,
            shape=(stop - start, *entry.shape[1:]),
        )
        if self.quantised is None:
            return Source((part,))
        # Another name, for what a read is told apart by.
        part = dataclasses.replace(part, name=f"{entry.name} from row {start}")
        shape = (stop - start, *self.shape[1:])
        one = dataclasses.replace(self.quantised, entries=(part,), shape=shape)
        return _dense(one, self.convert.keywords["dtype"], packed=False)

    def gathered(self, stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """stored (U, ...), rows of a matrix that is stored by rows -> their values (U, C)."""
        if self.quantised is None:
            return stored.to(dtype)
        shape = (len(stored), *self.shape[1:])
        return dataclasses.replace(self.quantised, shape=shape).dense([stored], dtype)


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
    plan = [re.compile(rule) for rule in model._get_dtype_plan(model.dtype)]
    for key in sorted(model_folder.parameter_names(), key=dot_natural_key):
        prefix = model.base_model_prefix
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], prefix, wanted)
        if name not in wanted:
            continue
        if pattern is None:
            in_float32 = any(rule.search(name) for rule in plan)
            dtype = torch.float32 if in_float32 else wanted[name].dtype
            sources[name] = _source(model_folder, key, dtype)
        else:
            groups.setdefault(name, (by_pattern[pattern], []))[1].append((pattern, key))
    for name, (converter, members) in groups.items():
        sources.update(_converted(model, model_folder, name, converter, members))
    _check(model, sources, wanted)
    return sources


def _source(model_folder: ModelFolder, key: str, dtype: torch.dtype) -> Source:
    """What the tensor `key` of an unquantised folder is made of; dense in `dtype`."""
    one = model_folder.quantised.get(key)
    if one is None:
        return Source((model_folder.tensors[key],))
    return _dense(one, dtype, packed=True)


def _dense(one: Quantised, dtype: torch.dtype, packed: bool) -> Source:
    convert = functools.partial(one.dense, dtype=dtype)
    return Source(one.entries, convert, torch.Size(one.shape), one, packed)


def _converted(
    model: PreTrainedModel,
    model_folder: ModelFolder,
    name: str,
    converter: WeightConverter,
    members: list[tuple[str, str]],
) -> dict[str, Source]:
    """The sources of all parameters that one conversion makes; tried on meta tensors first."""
    before = [_source(model_folder, key, model.dtype) for _, key in members]
    entries = tuple(entry for source in before for entry in source.entries)
    owner = weakref.ref(model)  # which must not live as long as its stream

    def run(tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        transform = copy.deepcopy(converter)
        for (pattern, key), tensor in zip(members, tensors, strict=True):
            transform.add_tensor(name, key, pattern, tensor)
        made = transform.convert(name, model=owner(), config=owner().config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

    def maker(target: str) -> Callable[[list[torch.Tensor]], torch.Tensor]:
        def convert(tensors: list[torch.Tensor]) -> torch.Tensor:
            parts = iter(tensors)
            each = [itertools.islice(parts, len(source.entries)) for source in before]
            return run([s.made_of(list(own)) for s, own in zip(before, each, strict=True)])[target]

        return convert

    try:
        made = run([torch.empty(s.shape, dtype=s.entry.dtype, device="meta") for s in before])
    except Exception as error:
        raise ModelFolderError(
            f"{name} cannot be made from {members[0][1]} and {len(members) - 1} more tensors "
            f"({error}): save the model again with save_pretrained."
        ) from error
    packed = any(source.packed for source in before)
    return {
        target: Source(entries, maker(target), made[target].shape, packed=packed) for target in made
    }


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
