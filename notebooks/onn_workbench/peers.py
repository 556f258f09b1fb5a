"""The systems that the benchmark compares, and the timed steps of one of them."""

import contextlib
import functools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from onn_core.adapters.lora import linear_names, select_layers
from onn_core.memory.process import memory_bytes, peak_memory_bytes, reset_peak_memory
from onn_core.ops.matmul import has_fast_matmul
from onn_core.run.step import optimizer_step
from onn_core.streaming.loading import open_streamed
from onn_core.streaming.model import StreamedModel
from onn_core.streaming.skeleton import decoder_layers, resolve_device
from onn_core.streaming.visits import Event
from onn_core.weights.folder import ModelFolder
from onn_core.weights.geometry import empty_model
from onn_core.weights.host import Staging
from onn_core.weights.reader import ReaderCount
from onn_core.weights.schedule import Use
from onn_core.weights.slots import StreamedWeight
from onn_core.weights.stream import WeightStream
from onn_workbench import streamers

SYSTEMS = {
    "onn": "this project",
    "cached": "this project, on CUDA, in a host with memory to spare for its files",
    "baseline": "the report's baseline: a layer is fetched when entered, dropped when left",
    "mapped": "transformers + PEFT, activation checkpointing, weights mapped from their files, or "
    "cast when they are loaded where a CPU needs float32 and has room for it",
    "offload": "accelerate's disk offload of what does not fit, activation checkpointing",
    "soup": "soup-cli's streaming, weights in pinned host memory, no cap (where it is installed)",
    "trainstream": "TrainStream, weights in host memory, no cap (where it is installed)",
    "in_memory": "transformers + PEFT, activation checkpointing, all weights in memory, no cap",
    "unbounded": "transformers + PEFT, all weights and activations in memory, no cap",
}
REPORTS_LAYERS = "ends:4"  # those that have LoRA in the report: the first four and the last
UNCAPPED = ("soup", "trainstream", "in_memory", "unbounded")


class NothingResident(WeightStream):
    """The report's baseline: a layer is read when it is entered, and dropped when it is left."""

    def __init__(self, *given: Any, **settings: Any):
        super().__init__(*given, **settings)
        self.reader_count = ReaderCount((1,))  # the thread that computes

    @functools.cached_property
    def staging(self) -> Staging:
        return Staging(self.copy_stream)

    def enter(self, future: Sequence[Use], request: bool = True) -> list[StreamedWeight]:
        weights, started = self.units[future[0].unit], time.perf_counter()
        for weight in weights:
            weight.slot = self.new_slot(weight.slot_bytes)
            self.counts.bytes_fetched += weight.n_bytes
            for read in weight.reads():
                self.fetch(weight, read, self.staging)
            if self.copy_stream is not None:
                self.copy_stream.synchronize()
            weight.tensor, weight.in_use = weight.view(weight.slot.memory), True
        self.counts.wait_s += time.perf_counter() - started
        return weights

    def release(self, weight: StreamedWeight) -> None:
        weight.slot = weight.tensor = None
        weight.in_use = False


def run_steps(
    system: str,
    model_dir: str,
    batch_size: int,
    sequence: int,
    n_steps: int,
    device: str = "auto",
    room_bytes: int | None = None,
    sparse_layers: str = REPORTS_LAYERS,
    **settings: Any,
) -> dict[str, Any]:
    """`n_steps` timed training steps, after one more, of one system: a row of the table.

    room_bytes: what the system may fill; sparse_layers: those with LoRA, see `TrainConfig`;
    settings: those of `from_pretrained`. Peak memory counts from before the model was opened. The
    row's `timeline` is the last step's.
    """
    torch.manual_seed(0)
    where = resolve_device(device)
    memory_before = memory_bytes()
    reset_peak_memory(where)
    if system in streamers.OPENERS:
        lora, trained = lora_config(AutoConfig.from_pretrained(model_dir), sparse_layers)
        base = model = streamers.OPENERS[system](Path(model_dir), lora)
        read_so_far = functools.partial(process_bytes, "read_bytes")
    else:
        base, read_so_far = open_system(system, model_dir, where, room_bytes, **settings)
        model, trained = add_adapters(base, where, sparse_layers)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = getattr(model, "optimizer", None) or torch.optim.AdamW(parameters, lr=1e-4)
    own = base if isinstance(base, StreamedModel) else None  # which tells more than a peer's
    n_resident, update_started = 0, 0.0

    def forward_is_done(*_: Any) -> None:
        nonlocal n_resident
        n_resident = own.count_reserved_graphs()

    def update_begins(*_: Any) -> None:
        nonlocal update_started
        update_started = time.perf_counter()

    if own is not None:
        model.register_forward_hook(forward_is_done)
    optimizer.register_step_pre_hook(update_begins)
    steps, losses = [], []
    for number in range(n_steps + 1):
        ids = torch.randint(model.config.vocab_size, (batch_size, sequence)).to(where)
        read_before, before = read_so_far(), own and own.counts()
        with own.trace() if own else contextlib.nullcontext([]) as events:
            started = time.perf_counter()
            batch = {"input_ids": ids, "labels": ids}
            loss, _ = optimizer_step(model, [batch], None, optimizer)
            if where.type == "cuda":
                torch.cuda.synchronize(where)
            stopped = time.perf_counter()
        losses.append(loss)
        step = {"step_s": stopped - started, "bytes_read": read_so_far() - read_before}
        step["optimizer_s"] = stopped - update_started
        if own is not None:
            done = own.counts() - before
            step |= {f"{phase}_s": done.seconds[phase] for phase in ("forward", "head", "backward")}
            step |= {"wait_s": done.wait_s, "bytes_streamed": done.bytes_fetched}
        steps.append(step)
        print(f"    step {number}: {step['step_s']:.2f} s", flush=True)
    middle = {name: statistics.median(step[name] for step in steps[1:]) for name in steps[0]}
    step_s, n_layers = middle["step_s"], base.config.num_hidden_layers
    plan: dict[str, Any] = {"micro_batch_size": batch_size}
    if own is not None:
        plan = {
            "micro_batch_size": own.micro_batch_size or batch_size,
            "resident_layers": own.plan.n_resident,
            "boundaries": own.plan.boundaries,
            "captured": own.plan.captured,
            "planned_peak_bytes": own.plan.peak_bytes,
            "readers": own.streaming.stream.reader_count.now,
        }
    return {
        "system": system,
        "layers": n_layers,
        "trained_layers": trained,
        "kept_layers": n_layers if system == "unbounded" else n_resident,
        "trainable": sum(p.numel() for p in parameters),
        "dtype": str(getattr(model, "dtype", base.config.dtype)).removeprefix("torch."),
        "batch_size": batch_size,
        **plan,
        "sequence": sequence,
        **middle,
        "step_s_all": [step["step_s"] for step in steps[1:]],
        "first_step_s": steps[0]["step_s"],
        "ms_per_sample": 1e3 * step_s / batch_size,
        "samples_per_s": batch_size / step_s,
        "tokens_per_s": batch_size * sequence / step_s,
        "peak_memory_bytes": peak_memory_bytes(where, memory_before),
        "reserved_bytes": torch.cuda.max_memory_reserved(where) if where.type == "cuda" else None,
        "losses": losses,
        "timeline": merge_reads(events, started),
    }


def process_bytes(field: str) -> int:
    """A count of bytes of this process, in the words of /proc/self/io.

    "read_bytes" came from a disk, by reads or by mapped pages; "rchar" by calls to read.
    """
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines).get(field, 0))


def merge_reads(events: list[Event], started: float) -> list[Event]:
    """(what, unit, start, stop) in seconds of the step; the reads of a unit in a row are one."""
    merged: list[list] = []
    open_reads: dict[int, list] = {}
    for what, unit, start, stop in sorted(events, key=lambda event: event[2]):
        span = [what, unit, start - started, stop - started]
        last = open_reads.get(unit) if what == "read" else None
        if last is not None and span[2] - last[3] < 0.05:
            last[3] = max(last[3], span[3])
            continue
        merged.append(span)
        if what == "read":
            open_reads[unit] = span
    return [(what, unit, round(start, 4), round(stop, 4)) for what, unit, start, stop in merged]


def open_system(
    system: str, model_dir: str, device: torch.device, room_bytes: int | None, **settings: Any
) -> tuple[PreTrainedModel, Callable[[], int]]:
    """One of SYSTEMS as a base model, and a function that tells the bytes read so far.

    room_bytes: memory that it may fill (None: no limit). settings: those of `from_pretrained`.
    """
    disk_bytes = functools.partial(process_bytes, "read_bytes")
    if system in ("onn", "cached", "baseline"):
        budget = None if system == "baseline" else room_bytes
        stream = NothingResident if system == "baseline" else WeightStream
        settings |= {"memory_budget": budget, "stream_class": stream}
        settings |= {"host_budget": "auto" if system == "cached" else 0}
        model = open_streamed(model_dir, device=device, **settings)
        if model.reads_page_cache:  # what a stream counts may come from there
            return model, disk_bytes
        return model, lambda: model.counts().bytes_read
    where: Any = {"device_map": device}
    if system == "offload":  # what does not fit stays in the model folder's own files
        memory = {"cpu": 0} | {"cpu" if device.type == "cpu" else device.index: room_bytes}
        where = {"device_map": "auto", "max_memory": memory}
    dtype = peer_dtype(model_dir, device, room_bytes)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, **where)
    if system != "unbounded":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.config.use_cache = False
    return model, disk_bytes


def peer_dtype(model_dir: str, device: torch.device, room_bytes: int | None) -> torch.dtype | str:
    """float32 where a CPU multiplies it many times faster and has room for it; else as stored.

    This project computes in float32 there, too, so that a ratio is not one of dtypes.
    """
    folder = ModelFolder.open(model_dir)
    n_parameters = sum(math.prod(entry.shape) for entry in folder.tensors.values())
    fits = room_bytes is None or 5 * n_parameters <= room_bytes  # with a fifth for all else
    slow = device.type == "cpu" and not has_fast_matmul(folder.stored_dtype)
    return torch.float32 if slow and fits else "auto"


def lora_config(config: PreTrainedConfig, sparse_layers: str) -> tuple[peft.LoraConfig, list[int]]:
    """The report's LoRA on the linear layers of `sparse_layers`, and which those are.

    A model of 8 layers or fewer has it in all of them.
    """
    n_layers = config.num_hidden_layers
    trained = select_layers(sparse_layers if n_layers > 8 else "all", n_layers)
    lora = peft.LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=linear_names(decoder_layers(empty_model(config, torch.float32))),
        layers_to_transform=None if len(trained) == n_layers else trained,
        task_type="CAUSAL_LM",
    )
    return lora, trained


def add_adapters(
    model: PreTrainedModel, device: torch.device, sparse_layers: str = REPORTS_LAYERS
) -> tuple[Any, list[int]]:
    """The model with `lora_config`, and which layers have it."""
    lora, trained = lora_config(model.config, sparse_layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, lora).train()
    for module in model.modules():  # PEFT leaves adapters of offloaded weights on meta
        if isinstance(module, peft.tuners.lora.LoraLayer) and any(
            parameter.is_meta for parameter in module.lora_A.parameters()
        ):
            module.lora_A.to_empty(device=device)
            module.lora_B.to_empty(device=device)
            module.reset_lora_parameters("default", True)
    return model, trained
