"""One decoder layer whose weights are there only while it is visited.

The layer's own forward is kept; this module decides when it runs. In training, a visit of the
forward pass runs it without a graph and saves its input, the *boundary activation*; the visit of
the backward pass runs it again with a graph and takes the gradients of its inputs and adapters
(activation checkpointing, Chen et al. 2016, whose recompute also reloads the weights). The whole
batch goes through one visit in micro-batches: the vertical, or layer-major, schedule of FlexGen
(Sheng et al. 2023) and GreedySnake (2025).
"""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache

from onn_core.errors import ConfigError
from onn_core.stream import Item, WeightStream


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
    boundary_bytes: int | None = None  # of boundary activations to keep on the device; None: all
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

    @contextlib.contextmanager
    def visit(self, phase: str, unit: int, future: list[int]):
        """Enter `unit`, time what is done there, without the wait for its weights."""
        self.on_visit(phase, unit)
        yield_from = self.stream.acquire(future)
        started = time.perf_counter()
        try:
            yield yield_from
        finally:
            stopped = time.perf_counter()
            self.seconds[phase] += stopped - started
            if self.trace is not None:
                self.trace.append((phase, unit, started, stopped))


class StreamedLayer:
    """Takes the place of `module.forward`.

    number: the layer's unit in the stream. bindings: its parameters that are streamed.
    """

    def __init__(self, module: nn.Module, number: int, bindings: list[Binding], session: Session):
        self.module = module
        self.number = number
        self.session = session
        self.bindings = bindings
        self.forward = module.forward  # the class's own
        self._by_item: dict[Item, list[Binding]] = {}
        for binding in bindings:
            self._by_item.setdefault(binding.item, []).append(binding)
        self._calls: Counter = Counter()  # of each owner, in this micro-batch
        self._usual_calls: Counter = Counter()
        self._previous: nn.Module | None = None
        self._last_micro_batch = False
        self._kept: _Graph | None = None
        for owner in {binding.module for binding in bindings}:
            owner.register_forward_pre_hook(self._enter_owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=_is_cache)
        call = _Call(self, leaves, spec)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        inputs = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
        if not torch.is_grad_enabled() or not (trained or inputs):
            outputs = call.run_forward()
        else:
            if any(map(_is_cache, leaves)):
                raise ConfigError("training cannot fill a key-value cache: pass use_cache=False.")
            outputs = _Visit.apply(call, len(inputs), *inputs, *trained)
        return pytree.tree_unflatten(call.with_outputs(outputs), call.out_spec)

    # --- visits -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def visiting(self, phase: str, future: list[int], keep: bool = False):
        """The layer's weights are there inside; with `keep` also afterwards, until the next."""
        with self.session.visit(phase, self.number, future):
            for binding in self.bindings:
                binding.fill()
            self._previous = None
            try:
                yield
            finally:
                if not keep:
                    self.leave()

    def leave(self) -> None:
        """Let go of every weight that is still there."""
        self._kept = None
        for item in self._by_item:
            self._let_go(item)

    def _let_go(self, item: Item) -> None:
        for binding in self._by_item[item]:
            binding.clear()
        self.session.stream.release(item)

    def begin_micro_batch(self, last: bool) -> None:
        if self._calls:
            self._usual_calls |= self._calls
        self._calls = Counter()
        self._previous = None
        self._last_micro_batch = last

    def _enter_owner(self, owner: nn.Module, args: Any) -> None:
        """Let the matrices of the module before go, if it is done in this visit."""
        self._calls[owner] += 1
        before, self._previous = self._previous, owner
        if torch.is_grad_enabled() or not self._last_micro_batch or before in (None, owner):
            return
        if self._calls[before] == self._usual_calls[before]:
            for item, bindings in self._by_item.items():
                if [binding.module for binding in bindings] == [before]:
                    self._let_go(item)


class _Call:
    """One call of a layer on the whole batch."""

    def __init__(self, layer: StreamedLayer, leaves: list[Any], spec: pytree.TreeSpec):
        self.layer = layer
        self.session = layer.session
        self.leaves = leaves  # tensors (B, ...) and others
        self.spec = spec
        self.out_leaves: list[Any] = []
        self.out_spec: pytree.TreeSpec | None = None
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self.batch_size = tensors[0].shape[0]
        size = self.session.micro_batch_size or self.batch_size
        if any(map(_is_cache, leaves)):  # generation: a cache is filled for the whole batch
            size = self.batch_size
        self.slices = [
            slice(start, min(start + size, self.batch_size))
            for start in range(0, self.batch_size, size)
        ]
        self.random_states: list[Any] = []
        device_type = self.session.device.type
        self.autocast = {
            "device_type": device_type,
            "dtype": torch.get_autocast_dtype(device_type),
            "enabled": torch.is_autocast_enabled(device_type),
        }

    def cut(self, value: Any, rows: slice) -> Any:
        """The rows of a tensor (B, ...) that belong to a micro-batch; anything else whole."""
        whole = len(self.slices) == 1 or not isinstance(value, torch.Tensor)
        return value if whole or value.shape[:1] != (self.batch_size,) else value[rows]

    def run(self, leaves: list[Any]) -> list[Any]:
        """The layer's own forward; its outputs as leaves."""
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        outputs = self.layer.forward(*args, **kwargs)
        outputs, self.out_spec = pytree.tree_flatten(outputs, is_leaf=_is_cache)
        return outputs

    def run_forward(self) -> tuple[torch.Tensor, ...]:
        """Every micro-batch through the resident layer, without a graph: the output tensors."""
        session, layer = self.session, self.layer
        future = [*range(layer.number, session.n_layers), *session.head_units]
        future += session.backward_pass(session.n_layers - 1) + session.forward_pass()
        with layer.visiting("forward", future), torch.no_grad():
            whole: list[Any] = []
            for rows in self.slices:
                layer.begin_micro_batch(rows is self.slices[-1])
                self.random_states.append(_random_state(session.device))
                part = self.run([self.cut(leaf, rows) for leaf in self.leaves])
                if len(self.slices) == 1:
                    whole = part
                else:
                    self._place(whole, part, rows)
            layer.begin_micro_batch(False)
        self.out_leaves = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in whole]
        return tuple(leaf for leaf in whole if isinstance(leaf, torch.Tensor))

    def _place(self, whole: list[Any], part: list[Any], rows: slice) -> None:
        """whole[rows] = part, for every output (B, ...)."""
        n_rows = rows.stop - rows.start
        for index, value in enumerate(part):
            is_tensor = isinstance(value, torch.Tensor)
            if is_tensor and value.shape[:1] != (n_rows,):
                raise ConfigError(
                    f"{type(self.layer.module).__name__} returns values that cannot be cut into "
                    "micro-batches: set micro_batch_size to None."
                )
            if rows.start == 0:
                shape = (self.batch_size, *value.shape[1:]) if is_tensor else None
                whole.append(value.new_empty(shape) if is_tensor else value)
            if is_tensor:
                whole[index][rows] = value

    def with_outputs(self, tensors: tuple[torch.Tensor, ...]) -> list[Any]:
        """The output leaves, with `tensors` in their places."""
        remaining = iter(tensors)
        return [next(remaining) if leaf is None else leaf for leaf in self.out_leaves]

    def build_graph(self, rows: slice, number: int, inputs: list[torch.Tensor]) -> "_Graph":
        """Run a micro-batch again with a graph; `inputs` (B, ...) are those that need gradients."""
        remaining = iter(inputs)
        leaves, roots = [], []
        for leaf in self.leaves:
            if leaf is _INPUT:
                leaf = self.cut(next(remaining), rows).detach().requires_grad_()
                roots.append(leaf)
            else:
                leaf = self.cut(leaf, rows)
            leaves.append(leaf)
        graph = _Graph(self.layer)
        devices = [self.session.device] if self.session.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.enable_grad(), torch.autocast(**self.autocast):
            _set_random_state(self.random_states[number], self.session.device)
            with torch.autograd.graph.saved_tensors_hooks(graph.pack, graph.unpack):
                outputs = self.run(leaves)
        graph.roots = roots
        graph.outputs = [leaf for leaf in outputs if isinstance(leaf, torch.Tensor)]
        return graph


_INPUT = object()  # where a differentiable input stood


class _Graph:
    """The graph of one micro-batch through a layer; refers to weights by item, not by memory."""

    def __init__(self, layer: StreamedLayer):
        self.layer = layer
        self.roots: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        self.release = False  # let each matrix go after its last use
        self._uses_left: Counter = Counter()
        self._previous: Item | None = None
        self._items = {
            item.tensor.untyped_storage().data_ptr(): item
            for item in layer._by_item
            if item.tensor is not None
        }

    def pack(self, tensor: torch.Tensor) -> Any:
        item = self._items.get(tensor.untyped_storage().data_ptr()) if self._items else None
        if item is None:
            return tensor
        self._uses_left[item] += 1
        offset = tensor.storage_offset() - item.tensor.storage_offset()
        return item, tensor.shape, tensor.stride(), offset

    def unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        item, shape, stride, offset = packed
        self._uses_left[item] -= 1
        before, self._previous = self._previous, item
        if self.release and before not in (None, item) and self._uses_left[before] == 0:
            self.layer._let_go(before)
        weight = item.tensor
        return weight.as_strided(shape, stride, weight.storage_offset() + offset)


class _Visit(torch.autograd.Function):
    """The layer on the whole batch: no graph in forward, recompute in backward."""

    @staticmethod
    def forward(ctx: Any, call: _Call, n_inputs: int, *tensors: torch.Tensor) -> Any:
        inputs = tensors[:n_inputs]
        ctx.call, ctx.n_inputs, ctx.trained = call, n_inputs, tensors[n_inputs:]
        ctx.mark_non_differentiable()
        outputs = call.run_forward()
        call.leaves = [
            _INPUT if isinstance(leaf, torch.Tensor) and leaf.requires_grad else leaf
            for leaf in call.leaves
        ]
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(*(x for x in outputs if not x.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        call, session, layer = ctx.call, ctx.call.session, ctx.call.layer
        inputs = list(ctx.saved_tensors)
        future = session.backward_pass(layer.number) + session.forward_pass()
        input_grads: list[torch.Tensor | None] = [None] * len(inputs)
        trained_grads: list[torch.Tensor | None] = [None] * len(ctx.trained)
        with layer.visiting("backward", future or [layer.number]):
            for number, rows in enumerate(call.slices):
                graph = call.build_graph(rows, number, inputs)
                graph.release = rows is call.slices[-1]
                grad_of = [
                    (out, call.cut(grad, rows))
                    for out, grad in zip(graph.outputs, grads, strict=True)
                    if grad is not None and out.requires_grad
                ]
                found = torch.autograd.grad(
                    [out for out, _ in grad_of],
                    [*graph.roots, *ctx.trained],
                    [grad for _, grad in grad_of],
                    allow_unused=True,
                )
                for index, grad in enumerate(found[: len(inputs)]):
                    _add_rows(input_grads, index, grad, inputs[index], call, rows)
                for index, grad in enumerate(found[len(inputs) :]):
                    if grad is not None:
                        total = trained_grads[index]
                        trained_grads[index] = grad if total is None else total.add_(grad)
                del graph, found, grad_of
        return None, None, *input_grads, *trained_grads


def _is_cache(value: Any) -> bool:
    return isinstance(value, Cache)


def _add_rows(
    totals: list[torch.Tensor | None],
    index: int,
    grad: torch.Tensor | None,
    like: torch.Tensor,
    call: _Call,
    rows: slice,
) -> None:
    """totals[index][rows] = grad where the input was cut, else totals[index] += grad."""
    if grad is None or len(call.slices) == 1:
        totals[index] = grad if grad is not None else totals[index]
        return
    if totals[index] is None:
        totals[index] = torch.zeros_like(like)
    if like.shape[:1] == (call.batch_size,):
        totals[index][rows] = grad
    else:
        totals[index] += grad


def _random_state(device: torch.device) -> Any:
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_device


def _set_random_state(state: Any, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
