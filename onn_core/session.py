"""What the streamed layers of a model share, and how a parameter is bound to what is streamed."""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from onn_core.items import Item
from onn_core.stream import WeightStream


@dataclasses.dataclass(eq=False)
class Binding:
    """A parameter of a module that is filled by an item while its layer is visited."""

    module: nn.Module
    name: str
    item: Item
    absent: torch.Tensor  # one NaN seen as the whole shape, so that a use out of turn is loud

    def fill(self) -> None:
        self.module._parameters[self.name].data = self.item.tensor

    def clear(self) -> None:
        self.module._parameters[self.name].data = self.absent


@dataclasses.dataclass
class Session:
    """What all streamed layers of a model share."""

    stream: WeightStream
    n_layers: int
    head_units: list[int]
    device: torch.device
    micro_batch_size: int | None = None
    lowest: int | None = None  # lowest layer that backward reaches in this step
    seconds: Counter = dataclasses.field(default_factory=Counter)  # phase -> wall clock
    on_visit: Callable[[str, int], None] = lambda phase, unit: None
    trace: list[tuple[str, int, float, float]] | None = None  # phase, unit, start, stop

    def forward_pass(self) -> list[int]:
        """The units of a step from its first."""
        units = [*range(self.n_layers), *self.head_units]
        return units + self.backward_pass(self.n_layers - 1)

    def backward_pass(self, start: int) -> list[int]:
        """The units that backward visits from layer `start` on."""
        return [] if self.lowest is None else list(range(start, self.lowest - 1, -1))

    def boundaries(self, inputs: list[torch.Tensor]):
        """Where a layer's inputs are saved: in host memory if all layers' are too much for CUDA."""
        n_bytes = self.n_layers * sum(x.nbytes for x in inputs)
        if self.device.type == "cuda" and n_bytes > torch.cuda.mem_get_info(self.device)[0] // 4:
            return torch.autograd.graph.save_on_cpu(pin_memory=True)
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def visit(self, phase: str, unit: int, future: list[int]):
        """Enter `unit`, time what is done there, without the wait for its weights."""
        self.on_visit(phase, unit)
        self.stream.acquire(future)
        started = time.perf_counter()
        try:
            yield
        finally:
            stopped = time.perf_counter()
            self.seconds[phase] += stopped - started
            if self.trace is not None:
                self.trace.append((phase, unit, started, stopped))
