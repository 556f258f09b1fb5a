"""GGUF files of llama.cpp: the header, checked by hand, and whose parameters its tensors are.

transformers' own mapping is asked for both the configuration and the tensors. It reads whole files
and trusts what they count, so it never sees one: it is shown the few settings of a checked header,
and row numbers in place of rows, from which the order of the rows is seen.
"""

import dataclasses
import math
import os
import re
import struct
import tempfile
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import transformers

from onn_core.errors import ModelFolderError, OnnError
from onn_core.weights.dequantise import Quantised
from onn_core.weights.geometry import empty_model
from onn_core.weights.ggml import FLOATS, Ggml, Processed, dense_rows
from onn_core.weights.shards import TensorEntry, damaged, reading, short

SUFFIX = ".gguf"
SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
TEXT, ARRAY = 8, 9  # the other types of a value
MAX_TEXT_BYTES = 1 << 24  # of a value; a chat template has thousands
MAX_NUMBERS = 1024  # of an array that may be a setting, one a layer
MAX_ROWS = 1 << 28  # fewer than these are of one tensor
MAX_DIMENSIONS = 4  # in ggml
NAMED = 5  # tensors, in a warning
WIDTHS_OF_EXPERTS = {  # which transformers 5.23 takes to be those of the smallest model
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}


@dataclasses.dataclass
class Stored:
    """A tensor as a header describes it; shape as torch has it, kind the number of the type."""

    name: str
    path: Path
    kind: int
    shape: tuple[int, ...]
    row_bytes: int
    offset: int

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape[:-1])

    def row_numbers(self, owner: int) -> np.ndarray:
        """(..., 1): a number of each row, from which its tensor is seen as well."""
        rows = np.arange(self.n_rows).reshape(*self.shape[:-1], 1)
        return rows + owner * MAX_ROWS

    def entry(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> TensorEntry:
        n_bytes = self.n_rows * self.row_bytes
        return TensorEntry(name, self.path, self.offset, n_bytes, dtype, tuple(shape))


@dataclasses.dataclass
class Header:
    """What a file says: its settings, those that are numbers or text also as bytes; its tensors."""

    settings: dict[str, Any]
    stored_settings: list[bytes]
    tensors: list[Stored]


def gguf_files(model_dir: Path) -> list[Path]:
    """The GGUF file, or all parts of a split one, that `model_dir` is or holds; [] if none.

    Safetensors in a folder go first. ModelFolderError if it holds several models or lacks a part.
    """
    paths = [model_dir] if model_dir.suffix == SUFFIX and os.path.isfile(model_dir) else []
    if os.path.isdir(model_dir):
        with reading(model_dir):
            names = sorted(os.listdir(model_dir))
        if any(name.endswith(".safetensors") for name in names):
            return []
        paths = [model_dir / name for name in names if name.endswith(SUFFIX)]
        paths = [path for path in paths if not path.name.startswith((".", "mmproj"))]
    sets = {tuple(_all_parts(path)) for path in paths}
    if len(sets) > 1:
        raise ModelFolderError(
            f"{model_dir} holds several GGUF models ({', '.join(p.name for p in paths)[:300]}): "
            "give the path of one of them."
        )
    files = list(next(iter(sets), ()))
    for path in files:
        if not os.path.isfile(path):
            raise ModelFolderError(f"{path.parent} lacks {path.name}: finish the download.")
    return files


def _all_parts(path: Path) -> list[Path]:
    match = SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    n_parts = int(match[3])
    return [path.with_name(f"{match[1]}-{n:05}-of-{match[3]}.gguf") for n in range(1, n_parts + 1)]


def read_gguf(
    paths: Sequence[Path],
) -> tuple[transformers.PreTrainedConfig, dict[str, TensorEntry], dict[str, Quantised]]:
    """The configuration, the tensors that are stored and the matrices that are to be decoded.

    Of the files of one model; no tensor data is read. ModelFolderError if a header lies, or
    transformers does not map the architecture.
    """
    headers = [read_header(path) for path in paths]
    settings = headers[0].settings
    tensors = [tensor for header in headers for tensor in header.tensors]
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise damaged(paths[0], "a tensor is there twice")
    if settings.get("split.count", len(paths)) != len(paths):
        raise damaged(paths[0], f"it is one of {short(settings['split.count'])} parts")
    architecture = settings.get("general.architecture")
    n_layers = settings.get(f"{architecture}.block_count")
    if type(n_layers) is not int or not 0 < n_layers <= len(tensors):
        raise damaged(paths[0], f"it has {short(n_layers)} blocks and {len(tensors):,} tensors")
    try:
        mapping = _Mapping(paths[0], architecture, headers[0], tensors)
    except OnnError:
        raise
    except Exception as error:  # what a bad header raises differs from family to family
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ModelFolderError(
            f"{paths[0]} is of the architecture {short(architecture)} and not as transformers "
            f"{transformers.__version__} reads it ({reason}): use the model's safetensors."
        ) from error
    kinds = {tensor.kind for tensor in tensors}
    dtype = torch.bfloat16
    if kinds <= FLOATS.keys() and 30 not in kinds:
        dtype = torch.float16 if 1 in kinds else torch.float32
    mapping.config.dtype = dtype
    return mapping.config, mapping.tensors, mapping.quantised


def gguf_tokenizer(path: Path) -> Any:
    """The tokenizer in a file, the first of a split one, as AutoTokenizer makes it.

    That asks for a class by the configuration, for which it reads the vocabulary for half a minute.
    """
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    header = read_header(path)
    config, _ = _config(header, header.settings["general.architecture"], header.tensors)
    made = TOKENIZER_MAPPING.get(type(config), transformers.PreTrainedTokenizerFast)
    return made.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)


# ---- the header


class _Bytes:
    """The bytes of a file in their order, never more than there are."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size
        self.place = 0

    def take(self, n: int) -> bytes:
        self.require(n)
        content = self.file.read(n)
        self.place += n
        if len(content) < n:
            raise damaged(self.path, "it is shorter than it was")
        return content

    def skip(self, n: int) -> None:
        self.require(n)
        self.place += n
        self.file.seek(self.place)

    def require(self, n: int) -> None:
        if n > self.size - self.place:
            raise damaged(self.path, f"its header goes on behind its {self.size:,} bytes")

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        n = self.number("Q")
        if n > MAX_TEXT_BYTES:
            raise damaged(self.path, f"it has a text of {n:,} bytes")
        try:
            return self.take(n).decode("utf-8")
        except UnicodeDecodeError as error:
            raise damaged(self.path, f"a text of its header is not UTF-8: {error}") from error

    def value(self) -> tuple[Any, bool]:
        """A setting, and whether it is one of few bytes; of a long array only its length."""
        kind, count = self.number("I"), None
        if kind == ARRAY:
            kind, count = self.number("I"), self.number("Q")
        if kind != TEXT and kind not in SCALARS:
            raise damaged(self.path, f"a value of its header is of type {kind}")
        if count is None:
            return self.text() if kind == TEXT else self.number(SCALARS[kind]), True
        if kind == TEXT:
            if 8 * count > self.size - self.place:
                raise damaged(self.path, f"it has no room for {count:,} texts")
            for _ in range(count):
                self.skip(self.number("Q"))
        elif count <= MAX_NUMBERS:
            return [self.number(SCALARS[kind]) for _ in range(count)], True
        else:
            self.skip(count * struct.calcsize(f"<{SCALARS[kind]}"))
        return count, False


def read_header(path: Path) -> Header:
    """The header of one file; ModelFolderError unless it backs all that it states."""
    with reading(path), open(path, "rb") as file:
        source = _Bytes(file, path)
        if source.take(4) != b"GGUF":
            raise damaged(path, "it does not begin as a GGUF file")
        version, n_tensors, n_settings = source.number("I"), source.number("Q"), source.number("Q")
        if version not in (2, 3):
            raise ModelFolderError(
                f"{path} is of GGUF version {version}, not 2 or 3 for this machine's order of "
                "bytes: convert it again with llama.cpp."
            )
        settings: dict[str, Any] = {}
        stored = []
        for _ in range(n_settings):
            start, name = source.place, source.text()
            if name in settings:
                raise damaged(path, f"{short(name)} is there twice")
            settings[name], is_small = source.value()
            if is_small and name != "general.alignment":
                file.seek(start)
                stored.append(file.read(source.place - start))
        tensors = [_tensor(source) for _ in range(n_tensors)]
        alignment = settings.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise damaged(path, f"its alignment is {short(alignment)}")
        begin = end = -(-source.place // alignment) * alignment  # of the tensors' bytes
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            if tensor.offset % alignment:
                raise damaged(path, f"tensor {short(tensor.name)} begins at byte {tensor.offset:,}")
            tensor.offset += begin
            if tensor.offset < end:
                raise damaged(path, f"tensor {short(tensor.name)} overlaps another")
            end = tensor.offset + tensor.n_rows * tensor.row_bytes
        if end > source.size:
            raise damaged(path, f"its tensors end at byte {end:,} of {source.size:,}")
    return Header(settings, stored, tensors)


def _tensor(source: _Bytes) -> Stored:
    """A tensor, if its shape is possible; its offset is yet from where all tensors begin."""
    path, name, n_dims = source.path, source.text(), source.number("I")
    if not 1 <= n_dims <= MAX_DIMENSIONS:
        raise damaged(path, f"tensor {short(name)} has {n_dims:,} dimensions")
    shape = tuple(source.number("Q") for _ in range(n_dims))[::-1]
    kind, offset = source.number("I"), source.number("Q")
    block, block_bytes, type_name = _block(path, name, kind)
    if min(shape) <= 0 or math.prod(shape) >= 1 << 62 or math.prod(shape[:-1]) >= MAX_ROWS:
        raise damaged(path, f"tensor {short(name)} has the shape {list(shape)}")
    if shape[-1] % block or (block > 1 and len(shape) == 1):
        raise damaged(path, f"tensor {short(name)} of type {type_name} has shape {list(shape)}")
    return Stored(name, path, kind, shape, shape[-1] // block * block_bytes, offset)


def _block(path: Path, name: str, kind: int) -> tuple[int, int, str]:
    """Values and bytes of a block and the name of a type; ModelFolderError if none decodes it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        type_name = GGMLQuantizationType(kind).name
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        dense_rows(torch.zeros(1, block_bytes, dtype=torch.uint8), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ModelFolderError(
            f"{path} has tensor {short(name)} of ggml type {kind}, which cannot be read: use "
            "another version of the model."
        ) from error
    return block, block_bytes, type_name


# ---- what transformers makes of it


def _config(
    header: Header, architecture: str, tensors: Sequence[Stored]
) -> tuple[transformers.PreTrainedConfig, dict[str, Any]]:
    """The configuration, and the settings that transformers makes it of."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    stored, settings = list(header.stored_settings), header.settings
    n_tokens = settings.get("tokenizer.ggml.tokens")  # the vocabulary itself is left out
    if n_tokens is not None and f"{architecture}.vocab_size" not in settings:
        name = f"{architecture}.vocab_size".encode()
        stored.append(struct.pack("<Q", len(name)) + name + struct.pack("<II", 4, n_tokens))
    # Only the names matter: each tensor is the same number.
    names = [tensor.name.encode() for tensor in tensors]
    listed = [struct.pack("<Q", len(n)) + n + struct.pack("<IQIQ", 1, 1, 0, 0) for n in names]
    count = struct.pack("<IQQ", 3, len(tensors), len(stored))
    content = b"".join([b"GGUF", count, *stored, *listed])
    with tempfile.NamedTemporaryFile(suffix=SUFFIX) as file:
        file.write(content + bytes(-len(content) % 32 + 4))
        file.flush()
        parsed = load_gguf_checkpoint(file.name)["config"]
    config = transformers.AutoConfig.for_model(**parsed)
    for name, of_config in WIDTHS_OF_EXPERTS.items():
        if hasattr(config, of_config) and (width := settings.get(f"{architecture}.{name}")):
            setattr(config, of_config, width)
    return config, parsed


class _Mapping:
    """transformers' mapping of tensors, for one architecture."""

    def __init__(self, path: Path, architecture: str, header: Header, tensors: Sequence[Stored]):
        from transformers import modeling_gguf_pytorch_utils as loader

        self.path, self.architecture = path, architecture
        self.config, parsed = _config(header, architecture, tensors)
        self.processor = loader.TENSOR_PROCESSORS.get(architecture, loader.TensorProcessor)(parsed)
        self.model = empty_model(self.config, None)
        # The mapping goes into all parts of a model, which takes minutes, and only Bloom needs it.
        whole = types.SimpleNamespace(
            config=self.config, state_dict=self.model.state_dict, named_children=tuple
        )
        self.names = loader.get_gguf_hf_weights_map(whole, self.processor)
        self.tensors: dict[str, TensorEntry] = {}
        self.quantised: dict[str, Quantised] = {}
        self.orders: dict[bytes, torch.Tensor] = {}  # each once, for all layers
        self._find(tensors, header.settings)

    def _find(self, tensors: Sequence[Stored], settings: dict[str, Any]) -> None:
        """Find `tensors`, those that need no change by the parameter's name, and `quantised`."""
        groups: dict[str, list[Stored]] = {}
        for tensor in tensors:
            block = re.match(r"blk\.\d+\.", tensor.name)
            groups.setdefault(block[0] if block else tensor.name, []).append(tensor)
        unused = [name for group in groups.values() for name in self._add(group)]
        unused += [name for name in settings if ".rope.scaling." in name]
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        found = self.tensors.keys() | self.quantised.keys()
        for name in self.model.state_dict():
            if name not in found and name not in tied:
                raise self._unmapped(f"gives no tensor to {name}")
        if unused:
            warnings.warn(
                f"{self.path.name}: transformers leaves {', '.join(sorted(unused)[:NAMED])} out "
                f"({len(unused)} tensors and settings), and so does this.",
                stacklevel=2,
            )

    def _add(self, group: list[Stored]) -> list[str]:
        """Add the tensors of one block; returns the names of those that no parameter takes."""
        made: dict[str, np.ndarray | torch.Tensor] = {}
        unused = []
        for owner, tensor in enumerate(group, 1):  # of 0 would be what no tensor was put in
            is_vector = len(tensor.shape) == 1
            values = tensor.row_numbers(owner)
            if is_vector:
                values = np.arange(tensor.shape[0], dtype=np.float32)
            result = self._process(tensor, values, made)
            if result.name is None:
                continue
            if result.name not in self.names:
                unused.append(tensor.name)
            elif is_vector:
                self._add_vector(self.names[result.name], tensor, values, result.weights)
            else:
                made[self.names[result.name]] = result.weights
        for name, order in made.items():
            self._add_matrix(name, group, np.asarray(order))
        return unused

    def _process(self, tensor: Stored, values: np.ndarray, made: dict[str, Any]) -> Any:
        return self.processor.process(
            weights=values,
            name=tensor.name,
            tensor_key_mapping=self.names,
            parsed_parameters={"tensors": made},
        )

    def _add_vector(
        self, name: str, tensor: Stored, values: np.ndarray, changed: np.ndarray
    ) -> None:
        dtype = FLOATS[tensor.kind]
        if changed.shape == values.shape and (changed == values).all():
            self.tensors[name] = tensor.entry(name, tensor.shape, dtype)
            return

        def change(values: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(np.copy(self._process(tensor, values.numpy(), {}).weights))

        entry = self.tensors[tensor.name] = tensor.entry(tensor.name, tensor.shape, dtype)
        self.quantised[name] = Processed(name, (entry,), changed.shape, change)

    def _add_matrix(self, name: str, group: list[Stored], order: np.ndarray) -> None:
        """order (..., 1): the number of the row that each row of the parameter is."""
        if order.dtype != np.int64 or order.shape[-1:] != (1,):
            raise self._unmapped(f"changes the values of {name}")
        owners = order.flat[: math.prod(order.shape[:2])] // MAX_ROWS
        owners = list(dict.fromkeys(owners.tolist()))  # each once, in their order
        tensors = [group[owner - 1] for owner in owners]
        shape = (*order.shape[:-1], tensors[0].shape[-1])
        permuted = None
        if len(tensors) > 1:
            numbers = [t.row_numbers(owner) for t, owner in zip(tensors, owners, strict=True)]
            fits = np.array_equal(order, np.concatenate(numbers, 1))
        else:
            rows, in_order = order.flatten() - owners[0] * MAX_ROWS, np.arange(tensors[0].n_rows)
            fits = np.array_equal(np.sort(rows), in_order)
            if fits and not np.array_equal(rows, in_order):
                permuted = self.orders.setdefault(rows.tobytes(), torch.from_numpy(rows))
        if not fits or len({tensor.shape[-1] for tensor in tensors}) > 1:
            raise self._unmapped(f"mixes the rows of {name}")
        if len(tensors) == 1 and permuted is None and tensors[0].kind in FLOATS:
            self.tensors[name] = tensors[0].entry(name, shape, FLOATS[tensors[0].kind])
            return
        entries = []
        for tensor in tensors:
            stored_shape = (*tensor.shape[:-1], tensor.row_bytes)
            entries.append(tensor.entry(tensor.name, stored_shape, torch.uint8))
            self.tensors[tensor.name] = entries[-1]
        kinds = tuple(tensor.kind for tensor in tensors)
        self.quantised[name] = Ggml(name, tuple(entries), shape, kinds, permuted)

    def _unmapped(self, reason: str) -> ModelFolderError:
        return ModelFolderError(
            f"{self.path} is of the architecture {short(self.architecture)}, for which "
            f"transformers {transformers.__version__} {reason}: use the model's safetensors."
        )
