"""One visit of a layer by the whole batch: without a graph forward, with a recompute backward."""

from collections import Counter
from typing import Any

import torch
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache

from onn_core.errors import ConfigError
from onn_core.items import Item


class Call:
    """One call of a layer on the whole batch."""

    def __init__(self, layer: Any, leaves: list[Any], spec: pytree.TreeSpec):
        self.layer = layer
        self.session = layer.session
        self.leaves = leaves  # tensors (B, ...) and others
        self.spec = spec
        self.out_leaves: list[Any] = []
        self.out_spec: pytree.TreeSpec | None = None
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self.batch_size = tensors[0].shape[0]
        size = self.session.micro_batch_size or self.batch_size
        if any(map(is_cache, leaves)):  # generation: a cache is filled in one go
            size = self.session.cache_rows or self.batch_size
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
        outputs, self.out_spec = pytree.tree_flatten(outputs, is_leaf=is_cache)
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

    def build_graph(self, rows: slice, number: int, inputs: list[torch.Tensor]) -> "Graph":
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
        self.layer.begin_micro_batch(False)
        graph = Graph(self.layer)
        devices = [self.session.device] if self.session.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.enable_grad(), torch.autocast(**self.autocast):
            _set_random_state(self.random_states[number], self.session.device)
            with torch.autograd.graph.saved_tensors_hooks(graph.pack, graph.unpack):
                outputs = self.run(leaves)
        graph.roots = roots
        graph.outputs = [leaf for leaf in outputs if isinstance(leaf, torch.Tensor)]
        return graph


_INPUT = object()  # where a differentiable input stood


class Graph:
    """The graph of one micro-batch through a layer; refers to weights by item, not by memory."""

    def __init__(self, layer: Any):
        self.layer = layer
        self.roots: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        self.release = False  # let each matrix go after its last use
        self._uses_left: Counter = Counter()
        self._previous: Item | None = None

    def pack(self, tensor: torch.Tensor) -> Any:
        item = self.layer.item_at.get(tensor.untyped_storage().data_ptr())
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
        self.layer.session.stream.claim(item)  # before another may take the room of `before`
        if self.release and before not in (None, item) and self._uses_left[before] == 0:
            self.layer.let_go(before)
        weight = self.layer.session.stream.wait(item)
        return weight.as_strided(shape, stride, weight.storage_offset() + offset)


class Visit(torch.autograd.Function):
    """The layer on the whole batch: no graph in forward, recompute in backward."""

    @staticmethod
    def forward(ctx: Any, call: Call, n_inputs: int, *tensors: torch.Tensor) -> Any:
        inputs = tensors[:n_inputs]
        ctx.call, ctx.n_inputs, ctx.trained = call, n_inputs, tensors[n_inputs:]
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
        future = [layer.number]  # matrix by matrix, all room is for what this layer needs again
        if not session.plan.by_matrix:
            future = session.backward_pass(layer.number) + session.forward_pass()
        input_grads: list[torch.Tensor | None] = [None] * len(inputs)
        trained_grads: list[torch.Tensor | None] = [None] * len(ctx.trained)
        with layer.visiting("backward", future or [layer.number]):
            for number, rows in enumerate(call.slices):
                graph = call.build_graph(rows, number, inputs)
                graph.release = session.plan.by_matrix or rows is call.slices[-1]
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
        if layer.number == session.lowest:  # before any optimizer step can use these gradients
            session.stream.check_files()
        return None, None, *input_grads, *trained_grads


def is_cache(value: Any) -> bool:
    return isinstance(value, Cache)


def _add_rows(
    totals: list[torch.Tensor | None],
    index: int,
    grad: torch.Tensor | None,
    like: torch.Tensor,
    call: Call,
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
