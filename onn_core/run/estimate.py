"""Will it fit, and how long does a step take: from a transformers config alone."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from onn_core.adapters.lora import linear_names, select_layers
from onn_core.config import parse_bytes, require_integer
from onn_core.errors import ConfigError
from onn_core.memory.costs import Costs
from onn_core.memory.footprint import Footprint
from onn_core.memory.plan import Sizes, bytes_read, make_plan, work_bytes
from onn_core.ops.matmul import cast_in_cache, in_one_block
from onn_core.streaming.experts import groups_experts
from onn_core.streaming.head import split_rows
from onn_core.streaming.skeleton import decoder_layers
from onn_core.weights.dequantise import Quantised, Source
from onn_core.weights.folder import ModelFolder
from onn_core.weights.geometry import GEOMETRIES, empty_model, geometry
from onn_core.weights.quantise import stored_as, takes
from onn_core.weights.slots import StreamedWeight


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The sizes of a model that need not be here."""

    sizes: Sizes
    n_parameters: int
    layer_parameters: int  # of one layer's matrices
    head_parameters: int


def geometry_of(
    config: Any,
    *,
    sparse_layers: Any = "all",
    lora_rank: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    compute_dtype: torch.dtype | None = None,
    on_cpu: bool = True,
    quantize: str | None = None,
    stored: Mapping[str, Quantised] | None = None,
) -> Geometry:
    """The geometry of a transformers config, with LoRA on all linear modules of some layers.

    dtype: of the weights in memory. compute_dtype: of the activations, if another. quantize: how
    the linear layers' matrices are stored, None, "int8" or "nf4". stored: of a quantised folder,
    the matrices by the names of their parameters.
    """
    compute_dtype, stored = compute_dtype or dtype, stored or {}
    model = empty_model(config, dtype)
    layers = decoder_layers(model)
    names = {id(p): name for name, p in model.named_parameters()}
    modules = [module for layer in layers for module in layer.modules()]
    linear = {id(module.weight) for module in modules if type(module) is nn.Linear}
    expert = {id(p) for m in modules if groups_experts(m) for p in m._parameters.values()}

    def weight(place: int, source: Source | None, parameter: nn.Parameter) -> StreamedWeight:
        made = StreamedWeight(source, tuple(parameter.shape), dtype, not on_cpu, place)
        if on_cpu and source is not None:
            made.by_blocks = id(parameter) in linear or source.by_expert and id(parameter) in expert
        is_cast = cast_in_cache(dtype, compute_dtype, torch.device("cpu" if on_cpu else "cuda"))
        if is_cast and source is None and in_one_block(made.shape):
            made.wide_dtype = compute_dtype
        return made

    units = [
        [weight(place, *one) for place, one in enumerate(_matrices(layer, names, quantize, stored))]
        for layer in layers
    ]
    n_rows, hidden_size = model.get_output_embeddings().weight.shape
    blocks = split_rows(n_rows, hidden_size * dtype.itemsize)
    targets, trained = linear_names(layers), select_layers(sparse_layers, len(layers))
    widths = [
        sum(module.weight.shape)
        for number in trained
        for name, module in layers[number].named_modules()
        if name.split(".")[-1] in targets
    ]
    inside = {id(p) for layer in layers for p in layer.parameters() if p.ndim > 1}
    ends = {id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    held = [p for p in model.parameters() if id(p) not in inside | ends]
    sizes = Sizes(
        layers=units,
        head=[
            [StreamedWeight(None, (rows.stop - rows.start, hidden_size), dtype, not on_cpu)]
            for rows in blocks
        ],
        held_bytes=sum(p.nbytes for p in held),
        work_bytes=work_bytes(units, torch.device("cpu" if on_cpu else "cuda")),
        hidden_bytes=hidden_size * compute_dtype.itemsize,
        visit_bytes=Footprint(config, compute_dtype),
        on_cpu=on_cpu,
        step_s=None if on_cpu else Costs().step_s,
        n_trained=lora_rank * sum(widths),
        n_back=len(layers) - trained[0],
    )
    return Geometry(
        sizes,
        n_parameters=model.num_parameters(),
        layer_parameters=sum(p.numel() for p in layers[0].parameters() if p.ndim > 1),
        head_parameters=n_rows * hidden_size,
    )


def _matrices(
    layer: nn.Module,
    names: Mapping[int, str],
    quantize: str | None,
    stored: Mapping[str, Quantised],
) -> Iterator[tuple[Source | None, nn.Parameter]]:
    """The matrices of a layer, each with the source it would have, if it is quantised."""
    linear = {id(m.weight) for m in layer.modules() if type(m) is nn.Linear}
    for parameter in layer.parameters():
        shape = tuple(parameter.shape)
        one = stored.get(names[id(parameter)])
        if quantize is not None and id(parameter) in linear and takes(quantize, shape):
            one = stored_as(quantize, shape)
        if one is not None:
            yield one, parameter
        elif len(shape) > 1:
            yield None, parameter


def predict(
    geometry: Geometry,
    batch_size: int,
    n_tokens: int,
    *,
    read_bytes_per_s: float,
    flops_per_s: float,
    memory_budget: int | str | None = None,
    chunk_size: int = 1,
    micro_batch_size: int | None = None,
    one_layer: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Peak memory, bytes read and seconds of a step on (batch_size, n_tokens).

    read_bytes_per_s, flops_per_s: the machine's ceilings. one_layer: a benchmark's row of the
    model's first layer alone (forward_s, backward_s, head_s, optimizer_s, and kept_layers, 1 if its
    forward was done once), instead of its matmuls at the ceiling.
    What does not fit has "refused", the arithmetic.
    """
    require_integer("batch_size", batch_size)
    require_integer("tokens", n_tokens)
    sizes, n = geometry.sizes, batch_size * n_tokens
    n_layers, n_back = len(sizes.layers), sizes.n_back
    found: dict[str, Any] = {"parameters": geometry.n_parameters, "trainable": sizes.n_trained}
    try:
        plan = make_plan(
            sizes, batch_size, n_tokens, parse_bytes(memory_budget), chunk_size, micro_batch_size
        )
    except ConfigError as error:
        return found | {"refused": str(error)}
    if one_layer is None:  # 2 P n forward; recompute and dL/dh 4 P n; the head 4 V C n
        layer_s = 2 * geometry.layer_parameters * n / flops_per_s
        one_layer = {"forward_s": layer_s, "backward_s": 2 * layer_s}
        one_layer["head_s"] = 4 * geometry.head_parameters * n / flops_per_s
    head_bytes = bytes_read(dataclasses.replace(sizes, layers=[]), plan)
    layer_bytes = bytes_read(sizes, plan, n_layers - n_back) - head_bytes
    forward_bytes = layer_bytes * n_layers // (n_layers + n_back)
    backward_s = one_layer["backward_s"] + one_layer.get("kept_layers", 0) * one_layer["forward_s"]
    reserved_s = plan.n_reserved * one_layer["forward_s"]  # are not done again
    passes = (
        (forward_bytes, n_layers * one_layer["forward_s"]),
        (head_bytes, one_layer["head_s"]),
        (layer_bytes - forward_bytes, n_back * backward_s - reserved_s),
    )
    read_s = sum(size for size, _ in passes) / read_bytes_per_s
    compute_s = sum(seconds for _, seconds in passes)
    # where a pass ends every slot holds what is used next: nothing is read for a layer's visit
    turn_s = one_layer["forward_s"] if layer_bytes else 0.0
    step_s = sum(
        max(size / read_bytes_per_s + min(turn_s, seconds), seconds) for size, seconds in passes
    )
    return found | {
        "plan": plan,
        "peak_bytes": plan.peak_bytes,
        "bytes_read": layer_bytes + head_bytes,
        "read_s": read_s,
        "compute_s": compute_s,
        "step_s": step_s + one_layer.get("optimizer_s", 0.0) * len(sizes.layers),
        "limited_by": "reading" if read_s > compute_s else "computing",
    }


def describe_plan(
    model: str,
    *,
    batch_size: int,
    n_tokens: int,
    read_bytes_per_s: float,
    flops_per_s: float,
    layers: int | None = None,
    sparse_layers: str = "all",
    memory_budget: int | str | None = None,
    quantize: str | None = None,
) -> str:
    """The plan and the predicted step of a model folder or a named geometry, as text.

    Raises ConfigError, with the arithmetic, for what does not fit.
    """
    stored: Mapping[str, Quantised] = {}
    if model in GEOMETRIES:
        config = geometry(model, layers)
    else:
        model_folder = ModelFolder.open(model)
        config, stored = model_folder.config, model_folder.quantised
        if layers is not None:
            config.num_hidden_layers = layers
    found = predict(
        geometry_of(config, sparse_layers=sparse_layers, quantize=quantize, stored=stored),
        batch_size,
        n_tokens,
        read_bytes_per_s=read_bytes_per_s,
        flops_per_s=flops_per_s,
        memory_budget=memory_budget,
    )
    if "refused" in found:
        raise ConfigError(found["refused"])
    plan = found["plan"]
    return (
        f"{found['parameters'] / 1e9:.2f} B parameters, {found['trainable']:,} trained\n"
        f"memory: {plan.terms}\n"
        f"{plan.n_resident or 'no whole'} layers resident, micro-batches of "
        f"{plan.micro_batch_size} samples, boundary activations in {plan.boundaries}\n"
        f"a step: {found['bytes_read'] / 1e9:.1f} GB read, {found['step_s']:.1f} s, limited by "
        f"{found['limited_by']}"
    )
