"""What the streamed layers of a model share, and how a parameter is bound to what is streamed."""

import contextlib
import dataclasses
import functools
import operator
import time
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from onn_core.errors import ConfigError
from onn_core.memory.boundaries import OnDisk, OnHost
from onn_core.memory.plan import Plan, Sizes
from onn_core.memory.process import memory_bytes
from onn_core.streaming.batching import Batching
from onn_core.weights.host import HostMemory
from onn_core.weights.items import Item
from onn_core.weights.reader import give_back_memory
from onn_core.weights.stream import WeightStream


@dataclasses.dataclass(eq=False)
class Binding:
    """A parameter of a module that is filled by an item while its layer is visited."""

    module: nn.Module
    parameter: nn.Parameter
    item: Item
    absent: torch.Tensor  # one NaN seen as the whole shape, so that a use out of turn is loud

    def fill(self) -> None:
        self.parameter.data = self.item.tensor

    def clear(self) -> None:
        self.parameter.data = self.absent


@dataclasses.dataclass
class Session:
    """What all streamed layers of a model share."""

    stream: WeightStream
    n_layers: int
    head_units: list[int]
    device: torch.device
    sizes: Sizes
    plan: Plan
    planner: Callable[..., Plan]  # (sizes, B, T, budget) -> plan
    budget: int | None = None  # bytes; None plans nothing
    memory_before: int = 0  # of the process, when the model was opened
    micro_batch_size: int | None = None
    fitted: tuple[int, ...] = (0, 0, 0, 0)  # tokens, of a micro-batch, n_trained, n_back
    n_trained: int = 0  # parameters
    kept: Counter = dataclasses.field(default_factory=Counter)  # layer -> bytes of graphs that stay
    largest_graph: int = 0  # bytes of a layer's, under this plan
    part_rows: int | None = None  # no micro-batch or cache crosses these; None is the whole batch
    row: int = 0  # the first of the micro-batch that is in a layer
    batching: Batching = dataclasses.field(default_factory=Batching)
    host_memory: HostMemory = dataclasses.field(init=False)
    lowest: int | None = None  # lowest layer that backward reaches in this step
    seconds: Counter = dataclasses.field(default_factory=Counter)  # phase -> wall clock
    on_visit: Callable[[str, int], None] = lambda phase, unit: None
    trace: list[tuple[str, int, float, float]] | None = None  # phase, unit, start, stop
    checked: set[int] = dataclasses.field(default_factory=set)  # ids of trained parameters

    def __post_init__(self) -> None:
        self.host_memory = HostMemory(self.device)

    def forward_pass(self) -> list[int]:
        """The units of a step from its first."""
        units = [*range(self.n_layers), *self.head_units]
        return units + self.backward_pass(self.n_layers - 1)

    def backward_pass(self, start: int) -> list[int]:
        """The units that backward visits from layer `start` on; ~unit where a graph stays."""
        if self.lowest is None:
            return []
        return [~n if self.kept[n] else n for n in range(start, self.lowest - 1, -1)]

    def fit(self, batch_size: int, n_tokens: int) -> None:
        """Plan anew if batches (B, T) may take more than any before; ConfigError if none fits."""
        micro = min(self.micro_batch_size or batch_size, batch_size)
        n_back = 0 if self.lowest is None else self.n_layers - self.lowest
        n_back = max(n_back, self.fitted[3])  # an evaluation between steps changes nothing
        needed = (batch_size * n_tokens, micro * n_tokens, self.n_trained, n_back)
        if self.budget is None or all(map(operator.le, needed, self.fitted)):
            return
        sizes = dataclasses.replace(self.sizes, n_trained=self.n_trained, n_back=n_back)
        self.plan = self.planner(sizes, batch_size, n_tokens, self.budget)
        self.micro_batch_size = self.plan.micro_batch_size
        self.fitted = (needed[0], self.micro_batch_size * n_tokens, self.n_trained, n_back)
        self.largest_graph = 0
        if self.plan.slots != self.stream.slots:
            self.stream.close()  # what is there is given up
            self.stream.slots = self.plan.slots

    @property
    def kept_bytes(self) -> int:
        return self.kept.total()

    def keep(self, graph: Any, layer: int, n_bytes: int) -> None:
        """Count what a graph of a layer takes, for as long as something refers to it."""
        self.kept[layer] += n_bytes
        self.largest_graph = max(self.largest_graph, self.kept[layer])
        weakref.finalize(graph, self.kept.subtract, {layer: n_bytes})

    def boundaries(self, inputs: list[torch.Tensor]):
        """Where a layer's inputs are saved: in host memory if all layers' are too much for CUDA."""
        if self.plan.boundaries == "disk":
            return torch.autograd.graph.saved_tensors_hooks(OnDisk, OnDisk.read)
        n_bytes = self.n_layers * sum(x.nbytes for x in inputs)
        on_cuda, unplanned = self.device.type == "cuda", self.budget is None
        if self.plan.boundaries == "host" or (
            on_cuda and unplanned and n_bytes > torch.cuda.mem_get_info(self.device)[0] // 4
        ):
            save = functools.partial(OnHost, memory=self.host_memory)
            return torch.autograd.graph.saved_tensors_hooks(save, OnHost.read)
        return contextlib.nullcontext()

    def __deepcopy__(self, memo: Any) -> None:
        raise ConfigError(
            "a streamed module has no weights to copy: train it with LoRA (target_modules), not "
            "whole (modules_to_save)."
        )

    def check_trained(self, model: nn.Module) -> None:
        """ConfigError if a trained parameter was made from weights that were not there."""
        visited = {id(p) for layer in model.streamed_layers for p in layer.module.parameters()}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or id(parameter) in self.checked:
                continue
            self.checked.add(id(parameter))
            later = "lora_magnitude_vector" in name and id(parameter) in visited
            if not later and parameter.isnan().any():
                raise ConfigError(
                    f"{name} is NaN: it cannot be made from weights that are streamed; use LoRA or "
                    "DoRA with init_lora_weights True."
                )

    @contextlib.contextmanager
    def visit(self, phase: str, unit: int, future: list[int], wait: bool = True):
        """Enter `unit`, time what is done there, without the wait for its weights.

        future: the units from this one on, see `WeightStream.enter`.
        wait: for all of its weights at once; otherwise for each by `stream.wait`.
        """
        self.on_visit(phase, unit)
        if self.budget is not None and self.device.type == "cpu":
            grows = phase == "forward" and unit in self.plan.kept(self.n_layers)
            beside = self.budget - self.plan.parts["activations"] // 2
            beside -= self.plan.graph_bytes if grows else 0
            # the layers' gaps are too small for logits; the heap's gaps have grown
            if [unit] == self.head_units[:1] or memory_bytes() - self.memory_before > beside:
                give_back_memory()
        counts = self.stream.counts
        assert unit == max(future[0], ~future[0])  # else its items have no room
        items = self.stream.enter(future, wait or not self.plan.by_matrix)
        for item in items if wait else ():
            self.stream.wait(item)
        started, waited_s = time.perf_counter(), counts.wait_s
        try:
            yield
        finally:
            stopped = time.perf_counter()
            self.seconds[phase] += stopped - started - (counts.wait_s - waited_s)
            if self.trace is not None:
                self.trace.append((phase, unit, started, stopped))
