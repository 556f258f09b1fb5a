"""One call of a layer on the whole batch, in micro-batches, and the graphs of its gradients.

*Leaves* are the arguments of a layer, or what it returns, as a flat list. *Rows* are the samples of
a micro-batch; the *place* of a leaf says where it holds its samples.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any

import torch
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache

from onn_core.errors import ConfigError
from onn_core.streaming.batching import CANNOT_CUT, Place
from onn_core.streaming.layer_weights import LayerWeights
from onn_core.streaming.passes import random_state, set_random_state
from onn_core.weights.slots import StreamedWeight


class Call:
    """One call of a layer in a pass, in micro-batches.

    weights: of the layer. forward: its own. leaves: the arguments, of tensors (B, ...) and others,
    whose structure is `spec`.
    """

    def __init__(
        self, weights: LayerWeights, forward: Callable, leaves: list[Any], spec: pytree.TreeSpec
    ):
        self.weights = weights
        self.streaming = weights.streaming
        self.forward = forward
        self.leaves = leaves
        self.spec = spec
        passes, device_type = self.streaming.passes, self.streaming.device.type
        self.in_pass = passes.latest
        self.number = next(self.in_pass.calls)
        self.hook = passes.row_hook
        self.autocast = {
            "device_type": device_type,
            "dtype": torch.get_autocast_dtype(device_type),
            "enabled": torch.is_autocast_enabled(device_type),
        }
        of_pass = None if passes.running is None else self.in_pass.batch_size
        self.batch_size = of_pass or next(len(x) for x in leaves if torch.is_tensor(x))
        self.has_cache = any(map(is_cache, leaves))
        self.slices = self._split_batch()  # the rows of each micro-batch
        n_graded = self.batch_size if passes.n_graded is None else passes.n_graded
        self.graded = [i for i, rows in enumerate(self.slices) if rows.start < n_graded]
        self.places = self._find_places()  # of the leaves
        self.out_leaves: list[Any] = []
        self.out_spec: pytree.TreeSpec | None = None
        self.out_places: list[Place | None] = []  # of the output tensors
        self.random_states: list[Any] = []
        self.graphs: list[Graph | None] = []  # of each micro-batch, if they are reserved
        self.captured: Any = None  # a captured.CapturedLayer, if it is replayed

    def _split_batch(self) -> list[slice]:
        group = min(self.streaming.passes.group_size or self.batch_size, self.batch_size)
        size = self.streaming.planner.micro_batch_size or group
        if self.has_cache:  # generation: a cache is filled in one go
            size = group
        return [
            slice(start, min(start + size, begin + group, self.batch_size))
            for begin in range(0, self.batch_size, group)
            for start in range(begin, min(begin + group, self.batch_size), size)
        ]

    def _find_places(self) -> list[Place | None]:
        if len(self.slices) == 1:
            return [None] * len(self.leaves)
        if self.has_cache:  # which a probe would not grow
            fits = [torch.is_tensor(x) and x.shape[:1] == (self.batch_size,) for x in self.leaves]
            return [Place(0, 1) if fit else None for fit in fits]
        batching, name = self.streaming.batching, self._layer_name
        return batching.find_places(self.in_pass, self.number, self.leaves, name)

    @property
    def _layer_name(self) -> str:
        return type(self.weights.module).__name__

    def cut_leaves(self, rows: slice) -> list[Any]:
        return list(map(cut, self.leaves, self.places, repeat(rows)))

    def run(self, leaves: list[Any], rows: slice) -> list[Any]:
        """The layer's own forward on the rows of a micro-batch; its outputs as leaves."""
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        around = contextlib.nullcontext((args, kwargs))
        if self.hook is not None:
            around = self.hook(self.weights.module, rows, args, kwargs)
        with around as (args, kwargs):
            outputs = self.forward(*args, **kwargs)
        outputs, self.out_spec = pytree.tree_flatten(outputs, is_leaf=is_cache)
        return outputs

    def run_forward(self, inputs: Sequence[torch.Tensor] = ()) -> tuple[torch.Tensor, ...]:
        """Every micro-batch through the resident layer: the output tensors.

        Without a graph, or with one that is reserved, if the plan has room for it. inputs: those
        that wait for backward.
        """
        weights, planner = self.weights, self.streaming.planner
        captures = self.streaming.captures if planner.plan.captured else None
        reserves = planner.reserves_graph(weights.number) and not weights.wrapped
        with weights.visit("forward", self.in_pass), torch.no_grad():
            whole: list[Any] = []
            self.captured = None if captures is None else captures.of(self)
            if self.captured is not None:
                self.captured.fill()
            for number, rows in enumerate(self.slices):
                weights.begin_micro_batch(rows is self.slices[-1])
                part = self._run_micro_batch(number, inputs, reserves)
                if len(self.slices) == 1:
                    whole = part
                else:
                    self._put(whole, part, rows)
            weights.begin_micro_batch(False)
            if self.captured is None and captures is not None:
                after = random_state(self.streaming.device)
                if not all(map(torch.equal, self.random_states[0], after)):
                    captures.give_up("it draws random numbers")
        if len(self.slices) > 1 and not self.has_cache:
            batching, n = self.streaming.batching, self.batch_size
            batching.note(self.number, n, self.leaves, whole, self.out_places, self.out_spec)
        self.out_leaves = [_TENSOR if torch.is_tensor(leaf) else leaf for leaf in whole]
        return tuple(leaf for leaf in whole if torch.is_tensor(leaf))

    def _run_micro_batch(
        self, number: int, inputs: Sequence[torch.Tensor], reserves: bool
    ) -> list[Any]:
        """What the layer returns: replayed, with a graph that is reserved, or without one."""
        rows = self.slices[number]
        if self.captured is not None:
            return self.captured.forward(self, rows)
        self.random_states.append(random_state(self.streaming.device))
        if not (inputs and reserves and number in self.graded):
            return self.run(self.cut_leaves(rows), rows)
        graph = self.build_graph(number, inputs, reserves)
        self.streaming.planner.graphs.add(graph, self.weights.number, graph.saved.n_bytes)
        self.graphs.append(graph)
        return [x.detach() if torch.is_tensor(x) else x for x in graph.leaves]

    def _put(self, whole: list[Any], part: list[Any], rows: slice) -> None:
        """whole[rows] = part, for every output, each with its samples where an input has them."""
        n_rows = rows.stop - rows.start
        if rows.start == 0:
            places = list(dict.fromkeys([*filter(None, self.places), Place(0, 1)]))
            for value in part:
                fits = [x for x in places if torch.is_tensor(value) and x.holds(value, n_rows)]
                if not torch.is_tensor(value) or not fits:
                    whole.append(value)
                    continue
                shape = list(value.shape)
                shape[fits[0].axis] = self.batch_size * fits[0].per_sample
                whole.append(value.new_empty(shape))
                self.out_places.append(fits[0])
        tensors = [index for index, value in enumerate(part) if torch.is_tensor(value)]
        if len(tensors) != len(self.out_places):
            raise self._cannot_cut()
        for index, place in zip(tensors, self.out_places, strict=True):
            here = place.cut(whole[index], rows)
            if here.shape != part[index].shape:
                raise self._cannot_cut()
            here.copy_(part[index])

    def _cannot_cut(self) -> ConfigError:
        why = "what it returns does not follow the batch"
        return ConfigError(CANNOT_CUT.format(self._layer_name, why))

    def with_outputs(self, tensors: tuple[torch.Tensor, ...]) -> list[Any]:
        """The output leaves, with `tensors` in their places."""
        remaining = iter(tensors)
        return [next(remaining) if leaf is _TENSOR else leaf for leaf in self.out_leaves]

    def build_graph(
        self, number: int, inputs: Sequence[torch.Tensor], reserves: bool = False
    ) -> "Graph":
        """Run a micro-batch with a graph; `inputs` (B, ...) may need gradients."""
        rows, leaves, roots = self.slices[number], [], []
        for leaf, whole in self.leaves_of(number, inputs):
            if whole is not None:
                leaf = leaf.detach()
                if whole.requires_grad:
                    roots.append(leaf.requires_grad_())
            leaves.append(leaf)
        saved = SavedTensors(self.weights, filter(torch.is_tensor, leaves), counts=reserves)
        by_weight = torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack)
        with torch.enable_grad(), torch.autocast(**self.autocast), by_weight:
            return Graph(saved, roots, self.run(leaves, rows))

    def leaves_of(
        self, number: int, inputs: Sequence[torch.Tensor]
    ) -> list[tuple[Any, torch.Tensor | None]]:
        """The arguments of a micro-batch, each with the one of `inputs` that it is cut from."""
        remaining, found = iter(inputs), []
        for leaf, place in zip(self.leaves, self.places, strict=True):
            if any(leaf is x for x in (INPUT, *inputs)):
                whole = next(remaining)  # it may wait on the host
                found.append((self._on_device(whole, place, number), whole))
            else:
                found.append((cut(leaf, place, self.slices[number]), None))
        return found

    def _on_device(self, whole: torch.Tensor, place: Place | None, number: int) -> torch.Tensor:
        if whole.device == self.streaming.device:
            return cut(whole, place, self.slices[number])
        boundaries, n_parts = self.streaming.host_boundaries, len(self.graded)
        return boundaries.part(
            whole, lambda whole, n: cut(whole, place, self.slices[n]), number, n_parts
        )

    def graph_of(self, number: int, inputs: Sequence[torch.Tensor]) -> "Graph":
        """That of a micro-batch: reserved, or made by running it again as it ran before."""
        self.weights.begin_micro_batch(False)
        if self.graphs:
            graph, self.graphs[number] = self.graphs[number], None
            # None if backward runs a second time. Planned anew, there may be too few slots for it.
            if graph is not None and not self.streaming.planner.plan.by_matrix:
                return graph
        device = self.streaming.device
        if not self.random_states:  # it was captured, and drew none
            return self.build_graph(number, inputs)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            set_random_state(self.random_states[number], device)
            return self.build_graph(number, inputs)


INPUT = object()  # where a differentiable input stood
_TENSOR = object()  # where an output tensor stood


@dataclasses.dataclass
class Graph:
    """The graph of one micro-batch through a layer."""

    saved: "SavedTensors"
    roots: list[torch.Tensor]  # the inputs that need gradients
    leaves: list[Any]  # what the layer returned

    @property
    def outputs(self) -> list[torch.Tensor]:
        return [leaf for leaf in self.leaves if torch.is_tensor(leaf)]


class SavedTensors:
    """What a graph saves: a streamed weight by its name, not by the memory where it was.

    The graph refers to this, so this must not refer to the graph: nobody would collect the two.
    """

    def __init__(self, weights: LayerWeights, inputs: Iterable[torch.Tensor], counts: bool):
        self.weights = weights
        self.drops = False  # each weight after its last use
        self.counts = counts
        self.n_bytes = 0  # that the graph holds, without its inputs and what is always there
        known = [*inputs, *weights.parameters] if counts else ()
        self._known = {x.untyped_storage().data_ptr() for x in known}
        self._uses_left: Counter = Counter()
        self._previous: StreamedWeight | None = None

    def pack(self, tensor: torch.Tensor) -> Any:
        memory = tensor.untyped_storage()
        weight = self.weights.at_address.get(memory.data_ptr())
        if weight is None:
            if self.counts and memory.data_ptr() not in self._known:
                self.n_bytes += memory.nbytes()
                self._known.add(memory.data_ptr())
            return tensor, tensor._version
        self._uses_left[weight] += 1
        offset = tensor.storage_offset() - self.weights.values(weight).storage_offset()
        return weight, tensor.shape, tensor.stride(), offset, tensor.dtype

    def unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed[0], torch.Tensor):
            tensor, version = packed  # torch checks none that is packed
            if tensor._version != version:
                raise RuntimeError(
                    "a layer's output was changed in place, but its gradient needs it"
                )
            return tensor
        weight, shape, stride, offset, dtype = packed
        if not self.weights.is_filled:  # else all of the layer's are here, and none is dropped
            self._fetch(weight)
        tensor = self.weights.wait(weight)
        tensor = tensor.as_strided(shape, stride, tensor.storage_offset() + offset)
        return tensor.to(dtype)  # another plan may have or lack a copy in float32

    def _fetch(self, weight: StreamedWeight) -> None:
        """Ask for a weight, and drop the one before after its last use."""
        self._uses_left[weight] -= 1
        before, self._previous = self._previous, weight
        # Before another may take the room of `before`.
        self.weights.streaming.stream.request(weight)
        if self.drops and before not in (None, weight) and self._uses_left[before] == 0:
            self.weights.drop(before)


def is_cache(value: Any) -> bool:
    return isinstance(value, Cache)


def cut(value: Any, place: Place | None, rows: slice) -> Any:
    """The rows of a tensor that belong to a micro-batch; what has no samples whole."""
    return value if place is None else place.cut(value, rows)
