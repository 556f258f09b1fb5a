"""`from_pretrained`: a transformers model whose decoder layers are streamed from disk.

transformers owns the forward pass; only how its parts get their weights changes: matrices of
decoder layers are streamed, the embedding and the head are read as needed, all else is resident.
"""

import functools
import os
import re
import weakref
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from onn_core.config import parse_bytes, require_integer
from onn_core.errors import ConfigError, ModelFolderError
from onn_core.memory.boundaries import HostBoundaries
from onn_core.memory.costs import measure_costs
from onn_core.memory.footprint import Footprint
from onn_core.memory.full_speed import full_speed_tokens
from onn_core.memory.plan import FULL_SPEED_TOKENS, Sizes, work_bytes
from onn_core.memory.planner import Planner
from onn_core.memory.process import library_bytes, memory_bytes
from onn_core.memory.together import Part
from onn_core.ops.matmul import (
    PackedMatrix,
    cast_in_cache,
    in_one_block,
    linear,
    packed_linear,
    prepare_linear,
    use_matmul,
)
from onn_core.ops.norm import NormInParts, is_norm
from onn_core.processes import n_local
from onn_core.streaming.captured import Captures
from onn_core.streaming.embedding import EmbeddingRows
from onn_core.streaming.experts import StreamedExperts, groups_experts
from onn_core.streaming.head import StreamedHead, head_blocks
from onn_core.streaming.layer import StreamedLayer
from onn_core.streaming.layer_weights import Binding, LayerWeights
from onn_core.streaming.lazy import LazyWeight, StreamedParameter, nan_of
from onn_core.streaming.model import require_no_sharding, streamed_class
from onn_core.streaming.skeleton import all_layers, decoder_layers, resolve_device, skeleton
from onn_core.streaming.together import Together
from onn_core.streaming.visits import Streaming
from onn_core.weights.dequantise import Plain, Quantised, Source
from onn_core.weights.folder import ModelFolder
from onn_core.weights.formats import find_sources
from onn_core.weights.host import HostMemory
from onn_core.weights.quantise import KINDS, takes
from onn_core.weights.quantised_copy import quantised_copy
from onn_core.weights.reader import hold_freed_memory, host_memory_bytes
from onn_core.weights.shared import is_shared
from onn_core.weights.slots import StreamedWeight
from onn_core.weights.stream import WeightStream

# What to do in place of arguments of transformers' from_pretrained.
INSTEAD = {
    "device_map": "a streamed model is on one device: give device",
    "torch_dtype": "give dtype",
    "trust_remote_code": "code of a model folder is never run: choose a model that transformers "
    "knows by itself",
    "use_safetensors": "pickled weights are never loaded: convert the folder to safetensors",
    "max_memory": "give memory_budget",
    "load_in_4bit": 'give quantize="nf4"',
    "load_in_8bit": 'give quantize="int8"',
    None: "leave it out",
}


def from_pretrained(
    model_dir: str | os.PathLike,
    *,
    chunk_size: int = 1,
    micro_batch_size: int | None = None,
    memory_budget: int | str | None = None,
    host_budget: int | str | None = "auto",
    quantize: str | None = None,
    quantization_config: Any = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    **of_transformers: Any,
) -> PreTrainedModel:
    """A causal language model whose frozen weights stay in `model_dir` until they are needed.

    model_dir: a Hugging Face folder with config.json and safetensors, or a GGUF file, or the
        folder of one; read in place.
    chunk_size: decoder layers resident together, 1 to all of them.
    micro_batch_size: samples that go through a layer together; None is the whole batch.
    memory_budget: bytes or text such as "4GB", of the device, or of the process beyond its start:
        plans the micro-batch, the resident layers, and where boundary activations wait, at the
        first forward of a batch size. None makes `chunk_size` layers resident. On a CPU a layer is
        timed for some seconds when a model is first opened with a budget; the cache remembers it.
    host_budget: bytes or text, of host memory that may hold weights for a device, from where they
        are copied instead of read; "auto" is what is free, less an eighth. The processes of a host
        share it, also on a CPU, which needs none for one. In addition each process pins as much as
        its largest layer takes, for what is read of a disk ahead.
    quantize: "int8" or "nf4": the matrices of linear layers in decoder layers are quantised once,
        into a folder in the cache, and streamed from there. quantization_config: a
        BitsAndBytesConfig that says the same.
    device: "auto" is CUDA if there is one. dtype: "auto" is the folder's own, but float32 on a CPU
        that has no matmul of it (measured 7 times as fast as bfloat16 there).
    of_transformers: `attn_implementation`, as in transformers; the others of its `from_pretrained`
        are refused by name.

    Returns a model in evaluation mode for PEFT, any training loop, and `generate`.
    Raises ModelFolderError or ConfigError, before any weight is read.
    """
    attention = of_transformers.pop("attn_implementation", None)
    harmless = {"trust_remote_code": False, "local_files_only": True, "use_safetensors": True}
    for name, value in of_transformers.items():
        if name not in harmless or value not in (None, harmless[name]):
            raise ConfigError(f"{name}={value!r} is not taken: {INSTEAD.get(name, INSTEAD[None])}.")
    return open_streamed(
        model_dir,
        chunk_size=chunk_size,
        micro_batch_size=micro_batch_size,
        memory_budget=memory_budget,
        host_budget=host_budget,
        quantize=_quantize_of(quantization_config) or quantize,
        device=device,
        dtype=dtype,
        attn_implementation=attention,
    )


def open_streamed(
    model_dir: str | os.PathLike,
    *,
    chunk_size: int = 1,
    micro_batch_size: int | None = None,
    memory_budget: int | str | None = None,
    host_budget: int | str | None = "auto",
    quantize: str | None = None,
    progress: bool = True,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    stream_class: type[WeightStream] = WeightStream,
    together: Together | None = None,
) -> PreTrainedModel:
    """`from_pretrained` with another stream: a benchmark has one that reserves nothing.

    together: what this model has in common with others of the same folder.
    """
    require_no_sharding()
    model_folder = ModelFolder.open(model_dir)
    if quantize is not None:
        model_folder = _quantised(model_folder, quantize, progress)
    if attn_implementation is not None:
        model_folder.config._attn_implementation = attn_implementation
    device = resolve_device(device)
    memory_before = memory_bytes() if together is None else together.memory_before
    try:
        model = skeleton(model_folder, dtype, device, streamed_class)
    except ModelFolderError as error:
        if attn_implementation is None:
            raise
        raise ConfigError(
            f"attn_implementation={attn_implementation!r} cannot be used ({error.__cause__}): "
            "leave it out."
        ) from error
    layers = decoder_layers(model)
    require_integer("chunk_size", chunk_size, at_most=len(layers))
    if micro_batch_size is not None:
        require_integer("micro_batch_size", micro_batch_size)

    # Every parameter gets its values, or a placeholder and a weight that is streamed.
    sources = find_sources(model, model_folder)
    _untie(model, sources, model_folder)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    by_rows = isinstance(embedding, nn.Embedding)
    in_blocks = isinstance(head, nn.Linear)
    ends = [end for end, is_streamed in ((embedding, by_rows), (head, in_blocks)) if is_streamed]
    bindings, end_sources = _fill(model, layers, ends, sources, model_folder, device)
    blocks = []
    if in_blocks:
        source, in_memory = end_sources[head], head.weight.dtype
        stored = source.entry.dtype if type(source) is Plain else in_memory
        in_memory = stored if cast_in_cache(stored, in_memory, device) else in_memory
        blocks = head_blocks(source, *head.weight.shape, in_memory, device)
    if together is not None:
        blocks = together.same_weights(bindings, blocks)

    # What is visited at once, the plan of what is resident when, and who fetches it.
    units = [list({binding.weight: None for binding in layer}) for layer in bindings]
    head_units = [[weight] for _, weight in blocks]
    budget, footprint = parse_bytes(memory_budget), Footprint(model_folder.config, model.dtype)
    first, full_speed = next(iter(units[0]), None), FULL_SPEED_TOKENS
    if device.type == "cpu" and budget is not None and first and not first.packed:
        given = (model_folder.config, model.dtype, first.dtype, footprint, budget)
        full_speed = full_speed_tokens(*given)
    sizes = Sizes(
        layers=units,
        head=head_units,
        # of what is always resident; a placeholder has one element
        held_bytes=sum(p.untyped_storage().nbytes() for p in model.parameters())
        + library_bytes(device),
        work_bytes=work_bytes(units, device),
        hidden_bytes=model.config.get_text_config().hidden_size * model.dtype.itemsize,
        visit_bytes=footprint,
        full_speed_tokens=full_speed,
        on_cpu=device.type == "cpu",
        step_s=measure_costs(device, model.dtype).step_s if device.type == "cuda" else None,
    )
    planner = Planner(sizes, budget, chunk_size, micro_batch_size)
    if device.type == "cpu":
        hold_freed_memory(budget is not None)  # whose plan says when to trim
    largest = max(sum(weight.host_bytes for weight in unit) for unit in units)
    host_bytes = _host_bytes(host_budget, device, budget, largest)
    member = None
    make_stream = functools.partial(
        stream_class,
        model_folder,
        units + head_units,
        planner.plan.slots,
        device,
        host_bytes,
        planner.plan.dense,
    )
    if together is None:
        stream = make_stream()
    else:
        stream = member = together.join(model, make_stream, Part(planner, chunk_size))

    # The layers, the ends and the norms between them run by their own forwards no longer.
    host_memory = HostMemory(device)
    streaming = Streaming(
        stream,
        planner,
        n_layers=len(units),
        head_units=range(len(units), len(units) + len(blocks)),
        host_boundaries=HostBoundaries(host_memory, device),
        device=device,
        memory_before=memory_before,
        member=member,
        captures=Captures(device) if device.type == "cuda" and member is None else None,
    )
    streamed_layers = []
    for number, (layer, own) in enumerate(zip(layers, bindings, strict=True)):
        weights = LayerWeights(layer, number, own, streaming)
        if member is not None and device.type == "cpu":  # products may be those of all members
            for binding in own:
                if not binding.weight.packed:
                    use_matmul(binding.module)
        streamed_layers.append(StreamedLayer(layer, weights))
        layer.forward = streamed_layers[-1]
    rows = None
    if by_rows:
        source = end_sources[embedding]
        fits = source.n_bytes <= host_bytes - stream.store.budget_used
        in_store = fits and device.type == "cuda"
        rows = EmbeddingRows(embedding, model_folder, source, device, host_memory, in_store)
        embedding.forward = rows
    streamed_head = None
    if in_blocks:
        head.forward = streamed_head = StreamedHead(head, blocks, streaming)
    inside = {part for layer in layers for part in layer.modules()}
    for module in model.modules():
        if is_norm(module) and module not in inside:
            module.forward = NormInParts(module)
    model.connect(streaming, model_folder, streamed_layers, streamed_head, rows)
    weakref.finalize(model, stream.close)
    weakref.finalize(model, host_memory.close)
    if streaming.captures is not None:
        weakref.finalize(model, streaming.captures.clear)
    return model.eval()


def _quantize_of(given: Any) -> str | None:
    """ "int8" or "nf4", of a BitsAndBytesConfig; ConfigError for one that means something else."""
    if given is None:
        return None
    if not isinstance(given, BitsAndBytesConfig):
        raise ConfigError("quantization_config must be a BitsAndBytesConfig.")
    four = given.load_in_4bit
    if four and (given.bnb_4bit_quant_type != "nf4" or given.bnb_4bit_use_double_quant):
        raise ConfigError(
            "of 4-bit types only NF4 with single quantisation is made: set "
            'bnb_4bit_quant_type="nf4" and bnb_4bit_use_double_quant=False.'
        )
    if not four and not given.load_in_8bit or given.llm_int8_skip_modules:
        raise ConfigError(
            "quantization_config must say load_in_8bit or load_in_4bit, and llm_int8_skip_modules "
            "must be left out: the head and the embedding always stay as they are."
        )
    return "nf4" if four else "int8"


def _quantised(model_folder: ModelFolder, kind: str, progress: bool) -> ModelFolder:
    """The folder with the matrices of its decoder layers quantised; made once."""
    if kind not in KINDS:
        raise ConfigError(f"quantize must be {' or '.join(KINDS)}, or None, not {kind!r}.")
    if model_folder.quantised:
        raise ConfigError(
            f"{model_folder.model_dir.name} is quantised already and is streamed as it is stored: "
            "leave quantize out."
        )
    model = skeleton(model_folder, torch.float32, torch.device("cpu"))
    sources, names = find_sources(model, model_folder), set()
    for layer in decoder_layers(model):
        for module in layer.modules():
            for name, parameter in module._parameters.items():
                linear = type(module) is nn.Linear and name == "weight"
                if parameter is not None and (linear or parameter.ndim > 2):  # or experts
                    names.add(parameter)
    wanted = {
        entry.name
        for name, parameter in model.named_parameters()
        if parameter in names and name in sources
        for entry in sources[name].entries
        if takes(kind, entry.shape) and entry.dtype.is_floating_point
    }
    return quantised_copy(model_folder, kind, wanted, progress)


def _host_bytes(
    host_budget: int | str | None, device: torch.device, memory_budget: int | None, unit_bytes: int
) -> int:
    """Bytes of the host store; "auto" leaves an eighth of what is free to the rest.

    On a CPU only several processes have one, and "auto" leaves each its own memory as well; on a
    device what each reads ahead, `unit_bytes`.
    """
    on_cpu = device.type == "cpu"
    if on_cpu and not is_shared():
        return 0
    if host_budget == "auto":
        free = host_memory_bytes()
        own = n_local() * unit_bytes
        if on_cpu:
            own = n_local() * memory_budget if memory_budget is not None else free // 2
        return max(0, free - own) * 7 // 8
    return parse_bytes(host_budget or None) or 0


def _untie(model: PreTrainedModel, sources: dict[str, Source], model_folder: ModelFolder) -> None:
    """As transformers does: what the config ties, but the folder stores apart, is not tied."""
    for target, source in list((getattr(model, "all_tied_weights_keys", None) or {}).items()):
        stored = [sources.get(name) for name in (target, source)]
        if None in stored or model_folder.same_bytes(*stored):
            continue
        parent, _, name = target.rpartition(".")
        meta = model.get_parameter(target).detach().clone()
        setattr(model.get_submodule(parent), name, nn.Parameter(meta, requires_grad=False))
        model.all_tied_weights_keys.pop(target)


def _fill(
    model: PreTrainedModel,
    layers: list[nn.Module],
    ends: list[nn.Module],
    sources: dict[str, Source],
    model_folder: ModelFolder,
    device: torch.device,
) -> tuple[list[list[Binding]], dict[nn.Module, Source]]:
    """Give every parameter its values, or, where they are streamed, a placeholder.

    Returns the bindings of each layer and the sources of the weights of `ends`.
    """
    number_of = {part: number for number, layer in enumerate(layers) for part in layer.modules()}
    # Layers that see or hear are not visited in text: their matrices are read at each use.
    others = {part for layer in all_layers(model) for part in layer.modules()} - number_of.keys()
    plan = model._get_dtype_plan(next(model.parameters()).dtype)
    source_of: dict[int, Source] = {}  # id of a parameter; tied ones have one source
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in sources:
            source_of.setdefault(id(parameter), sources[name])
    # id of a parameter on meta -> what takes its place, its weight, its placeholder
    made: dict[int, tuple[nn.Parameter, StreamedWeight | None, torch.Tensor]] = {}
    bindings: list[list[Binding]] = [[] for _ in layers]
    end_sources: dict[nn.Module, Source] = {}
    for place, (module_name, module) in enumerate(list(model.named_modules())):
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            source, number = source_of[id(parameter)], number_of.get(module)
            if module in ends and name == "weight":
                if not source.by_rows:
                    raise ModelFolderError(
                        f"{module_name} is quantised or stored in parts, but its rows are read as "
                        "they are stored: use a version of the model that leaves it as it was."
                    )
                end_sources[module] = source
            if id(parameter) not in made:
                in_float32 = any(re.search(rule, f"{module_name}.{name}") for rule in plan)
                dtype = torch.float32 if in_float32 else parameter.dtype
                weight = None
                if parameter.ndim > 1 and number is not None:
                    weight = _streamed(module, place, source, parameter, dtype, device)
                absent = nan_of(parameter.shape, dtype, device)
                if weight is not None:
                    of_experts = weight.by_blocks and weight.module is None
                    kind = StreamedExperts if of_experts else StreamedParameter
                    own = kind(absent, requires_grad=False)
                    own.weight = weight
                elif module in end_sources and name == "weight":
                    own = nn.Parameter(absent, requires_grad=False)
                elif module in others and parameter.ndim > 1:
                    read = functools.partial(_read, source, model_folder, absent)
                    own = LazyWeight.of(absent, lambda start, stop, read=read: read()[start:stop])
                else:
                    own = nn.Parameter(_read(source, model_folder, absent), requires_grad=False)
                made[id(parameter)] = own, weight, absent
            module._parameters[name], weight, _ = own, _, absent = made[id(parameter)]
            if weight is not None:
                bindings[number].append(Binding(module, own, absent))
                if weight.by_blocks and type(module) is nn.Linear:
                    multiply_as_stored(module)
                else:
                    prepare_linear(module, weight.dtype, absent.dtype, device)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                source = sources.get(f"{module_name}.{name}".lstrip("."))
                values = buffer
                if source is not None:
                    values = model_folder.read_source(source, buffer.dtype).to(buffer.dtype)
                module._buffers[name] = values.to(device)
    return bindings, end_sources


def _streamed(
    module: nn.Module,
    place: int,
    source: Source,
    parameter: nn.Parameter,
    dtype: torch.dtype,
    device: torch.device,
) -> StreamedWeight:
    """How a matrix of `module`, whose number is `place`, is streamed and multiplied in `dtype`."""
    shape, on_device = tuple(parameter.shape), device.type != "cpu"
    of_experts = len(shape) == 3 and not on_device and groups_experts(module)
    stored = dtype
    if source.direct or of_experts and not source.packed:
        (stored, *others) = {entry.dtype for entry in source.entries}
        stored = dtype if others else stored
    by_parts = of_experts or type(module) is nn.Linear
    in_memory = stored if by_parts and cast_in_cache(stored, dtype, device) else dtype
    alone = place if type(module) is nn.Linear else None
    weight = StreamedWeight(source, shape, in_memory, on_device, alone)
    if in_memory != dtype and (of_experts or in_one_block(shape)):
        weight.wide_dtype = dtype
    if not on_device and alone is not None and isinstance(source, Quantised):
        weight.by_blocks = True
    elif of_experts:
        weight.by_blocks = source.by_expert or in_memory != dtype
    return weight


def multiply_as_stored(module: nn.Linear) -> None:
    """Let a linear layer multiply by what is stored, unless its weight's values are there."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight = module.weight
        if not getattr(weight, "as_stored", False):  # or an adapter's, in its place
            return linear(x, weight, module.bias)
        stored = weight.weight

        def matrix() -> PackedMatrix:
            return stored.source.matrix(stored.stored_tensors())

        return packed_linear(x, stored.tensor, module.bias, matrix)

    module.forward = forward


def _read(source: Source, model_folder: ModelFolder, like: torch.Tensor) -> torch.Tensor:
    """The values of a parameter, of the shape and dtype and on the device of `like`."""
    values = model_folder.read_source(source, like.dtype)
    return values.to(like.device, like.dtype).view(like.shape)
