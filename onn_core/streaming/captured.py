"""Layer visits as CUDA graphs: one launch for a micro-batch in place of hundreds.

Where micro-batches are small, a GPU waits for Python between two kernels. So the kernels of a
layer's forward, and those of its recompute with the gradients, are captured once each and replayed
with other values: the same kernels, so the same numbers. A graph always reads and writes the same
memory. The weights of the visited layer are copied or decoded there from their slots, which are
free again at once; arguments, outputs and gradients are copied in and out; all else is in one pool,
which the graphs of all layers share because one runs at a time.

What a graph cannot repeat runs as it is: random numbers, caches, hooks inside a layer, several
adapters in one pass, code that asks for values.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils import _pytree as pytree

from onn_core.streaming.batching import Place
from onn_core.streaming.call import Call
from onn_core.streaming.layer_weights import LayerWeights
from onn_core.weights.slots import StreamedWeight

PLAIN = (type(None), bool, int, float, str)  # arguments that a graph may be told by


class Captures:
    """The graphs of a model's layers for one shape of a training step, and their memory.

    A shape is captured when it comes a second time in a row, since by then every kernel has run.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.impossible: str | None = None  # why a layer could not be captured
        self._shape: Any = None
        self._first_pass: Any = None  # of this shape: it runs as it is
        self.layers: dict[int, CapturedLayer] = {}  # by number
        self.clear()

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        dropped, self.layers = list(self.layers.values()), {}
        if dropped:  # one may run still
            torch.cuda.synchronize(self.device)
        for layer in dropped:  # which the calls of a pass refer to for as long as its loss
            layer.drop()
        self._fixed: dict[Any, torch.Tensor] = {}
        self._source: dict[Any, tuple[weakref.ref, int]] = {}  # what was copied there last
        self._pool = self._stream = None
        if dropped:  # the memory of their pool is of use to others only then
            torch.cuda.empty_cache()

    def give_up(self, why: str) -> None:
        """Nothing is captured from here on."""
        self.impossible = why
        self.clear()

    def of(self, call: Call) -> "CapturedLayer | None":
        """What runs a call of a layer in a training pass; None if the call runs as it is.

        Then all graphs are dropped, unless they are planned to be resident. They are captured again
        when two passes of one shape follow each other.
        """
        found, resident = self._find(call), call.streaming.planner.plan.captures_resident
        if found is None and self.layers and not resident:
            self.clear()
            self._shape = None
        return found

    def _find(self, call: Call) -> "CapturedLayer | None":
        in_pass, weights = call.in_pass, call.weights
        if self.impossible or in_pass.lowest is None or call.hook is not None or weights.wrapped:
            return None
        sizes = {rows.stop - rows.start for rows in call.slices}
        shape = (call.batch_size, in_pass.n_tokens, weights.module.training, *sizes)
        if shape != self._shape:
            self.clear()
            self._shape, self._first_pass = shape, weakref.ref(in_pass)
        if len(sizes) > 1 or self._first_pass() is in_pass:
            return None
        if len({p.dtype for p in weights.own_parameters if p.requires_grad}) > 1:
            return None
        state, resident = layer_state(weights), call.streaming.planner.plan.captures_resident
        captured = self.layers.get(weights.number)
        if captured is None or captured.key != (state, call_key(call)):
            if not (is_plain(weights) and all(map(self._can_hold, call.leaves))):
                if not resident:  # else all would be captured anew in each pass, for nothing
                    self.give_up("a layer is more than its own code and LoRA")
                return None
            if captured is not None:
                captured.drop()
            if self._pool is None:
                if not resident:
                    call.streaming.stream.scratch.trim()
                torch.cuda.empty_cache()  # of the passes before, whose memory the graphs take over
                self._pool = torch.cuda.graph_pool_handle()
                self._stream = capture_stream(self.device)
            captured = CapturedLayer(self, call, (state, call_key(call)))
            self.layers[weights.number] = captured
        return captured if captured.can_run_forward(call) else None

    @property
    def state(self) -> str:
        """What decides whether the next visits are replayed."""
        return f"{self.impossible} {self._shape} {sorted(self.layers)}"

    def _can_hold(self, leaf: Any) -> bool:
        if torch.is_tensor(leaf):
            return leaf.device == self.device
        return isinstance(leaf, PLAIN)

    def fixed(self, what: Any, like: torch.Tensor) -> torch.Tensor:
        """The memory of `what`, of the shape and dtype of `like`.

        RuntimeError in a capture that finds none: what it takes from the pool it may use for more.
        """
        key = (what, like.shape, like.dtype)
        if key not in self._fixed:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(f"a layer's {what} has another shape than its input")
            self._fixed[key] = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        return self._fixed[key]

    def load(self, what: Any, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` in the memory of `what`; copied, unless it was the last that was."""
        fixed = self.fixed(what, tensor)
        key = (what, tensor.shape, tensor.dtype)
        source, version = self._source.get(key, (lambda: None, 0))
        if source() is not tensor or version != tensor._version:
            fixed.copy_(tensor)
            self._source[key] = weakref.ref(tensor), tensor._version
        return fixed

    def memory_of(self, weights: Sequence[StreamedWeight]) -> list[torch.Tensor]:
        """Where the weights of the visited layer lie for its graphs, each in its shape."""
        found, taken = [], {}
        for weight in weights:
            size = weight.captured_bytes
            number = taken[size] = taken.get(size, -1) + 1
            like = torch.empty(size, dtype=torch.uint8, device="meta")
            memory = self.fixed(("weight", number), like)
            found.append(weight.values_in(memory))
        return found

    def capture(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """A graph of the kernels that `run` would launch; None if there can be none."""
        graph, now = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        self._stream.wait_stream(now)
        why = None
        try:
            with torch.cuda.stream(self._stream):
                # Other threads go on reading and copying meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    run()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            why = str(error)
        if why is not None:  # here nothing refers to tensors of the pool any more
            del graph
            self.give_up(why)
            return None
        now.wait_stream(self._stream)
        return graph


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all models: cuBLAS keeps memory for each stream that it has seen, for good."""
    return torch.cuda.Stream(device)


class CapturedLayer:
    """The two graphs of a layer, each captured when it is first needed."""

    def __init__(self, captures: Captures, call: Call, key: Any):
        self.captures, self.weights, self.key = captures, call.weights, key
        own = self.weights.all
        self._at = dict(zip(own, captures.memory_of(own), strict=True))
        self._forward: torch.cuda.CUDAGraph | None = None
        self._backward: torch.cuda.CUDAGraph | None = None
        self._outputs: list[Any] = []
        self._out_spec: pytree.TreeSpec | None = None
        self._found: list[torch.Tensor | None] = []  # gradients, of the input first

    def drop(self) -> None:
        """Give up the graphs and what they wrote; it cannot run any more."""
        self._forward = self._backward = None
        self._at, self._outputs, self._found = {}, [], []

    def fill(self) -> None:
        """Write the layer's weights to where its graphs read them."""
        for weight in self.weights.all:
            self.weights.move(weight, self._at[weight])

    def can_run_forward(self, call: Call) -> bool:
        """Captures the forward graph at need, for which no weight need be there."""
        if self._forward is None:
            fixed = self._load(call.cut_leaves(call.slices[0]))
            self.captures.fixed("output", next(filter(torch.is_tensor, fixed)))
            run = functools.partial(self._run_forward, call, fixed)
            self._forward = self.captures.capture(run)
        return self._forward is not None

    def forward(self, call: Call, rows: slice) -> list[Any]:
        """As `call.run`; of several micro-batches, the next overwrites what this returns."""
        self._load(call.cut_leaves(rows))
        self._forward.replay()
        call.out_spec = self._out_spec
        if len(call.slices) == 1:  # else they are copied to where they belong
            return [x.clone() if torch.is_tensor(x) else x for x in self._outputs]
        return self._outputs

    def can_run_backward(
        self, call: Call, whole: torch.Tensor, trained: Sequence[torch.Tensor]
    ) -> bool:
        """As `can_run_forward`, for the arguments of `backward`."""
        same = self.captures.layers.get(self.weights.number) is self
        if not same or self.key[0] != layer_state(self.weights):
            return False
        if self._backward is None:
            leaves = call.leaves_of(0, [whole])
            fixed = self._load([leaf for leaf, _ in leaves])
            at = next(number for number, (_, given) in enumerate(leaves) if given is not None)
            wants_input = whole.requires_grad
            for what in ("gradient", "input gradient"):
                self.captures.fixed(what, fixed[at])
            self._flat(trained)
            run = functools.partial(self._run_backward, call, fixed, at, wants_input, trained)
            self._backward = self.captures.capture(run)
        return self._backward is not None

    def backward(
        self,
        call: Call,
        whole: torch.Tensor,
        trained: Sequence[torch.Tensor],
        grad: torch.Tensor,
        place: Place | None,
    ) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """The gradients of the input (B, T, C) and of the trained parameters, by recompute.

        whole: the input, which may wait on the host; its samples are at `place`. grad: of the
        output.
        """
        single = len(call.slices) == 1
        of_input, total = None, None
        for number, rows in enumerate(call.slices):
            self._load([leaf for leaf, _ in call.leaves_of(number, [whole])])
            if number == 0:  # not before: what `fill` makes room for would fill the bus first
                self.fill()
            part = grad if single else call.out_places[0].cut(grad, rows)
            self.captures.fixed("gradient", part).copy_(part)
            self._backward.replay()
            found, flat = self._found[0], self._flat(trained)
            if found is not None and single:
                of_input = found.clone()
            elif found is not None:
                if of_input is None:
                    of_input = torch.empty(whole.shape, dtype=whole.dtype, device=found.device)
                place.cut(of_input, rows).copy_(found)
            total = flat.clone() if total is None else total.add_(flat)
        grads, begin = [], 0
        for parameter, there in zip(trained, self._found[1:], strict=True):
            view = total[begin : begin + parameter.numel()].view(parameter.shape)
            grads.append(None if there is None else view)
            begin += parameter.numel()
        return of_input, grads

    def _load(self, leaves: list[Any]) -> list[Any]:
        load = self.captures.load
        return [
            load(number, leaf) if torch.is_tensor(leaf) else leaf
            for number, leaf in enumerate(leaves)
        ]

    def _flat(self, trained: Sequence[torch.Tensor]) -> torch.Tensor:
        """The memory of the gradients of all trained parameters, one after another."""
        n = sum(parameter.numel() for parameter in trained)
        like = torch.empty(n, dtype=trained[0].dtype if trained else torch.float32, device="meta")
        return self.captures.fixed("trained", like)

    def _run_forward(self, call: Call, leaves: list[Any]) -> None:
        with self._in_place(call):
            outputs = call.run(leaves, call.slices[0])
        self._out_spec, self._outputs = call.out_spec, []
        if sum(torch.is_tensor(value) for value in outputs) != 1:
            raise RuntimeError("a graph gives one output")  # and all runs as it is
        for value in outputs:
            if torch.is_tensor(value):
                value = self.captures.fixed("output", value).copy_(value)
            self._outputs.append(value)

    def _run_backward(
        self,
        call: Call,
        leaves: list[Any],
        at: int,
        wants_input: bool,
        trained: Sequence[torch.Tensor],
    ) -> None:
        with self._in_place(call), self._aliases(trained) as aliases, torch.enable_grad():
            leaves = list(leaves)
            leaves[at] = root = leaves[at].detach().requires_grad_(wants_input)
            outputs = call.run(leaves, call.slices[0])
            out = next(x for x in outputs if torch.is_tensor(x))
            wanted = [*([root] if wants_input else []), *aliases]
            grad = self.captures.fixed("gradient", out.detach())
            found = list(torch.autograd.grad([out], wanted, [grad], allow_unused=True))
        flat, begin, self._found = self._flat(trained), 0, [None]
        if wants_input:
            self._found = [self.captures.fixed("input gradient", root).copy_(found.pop(0))]
        for parameter, value in zip(trained, found, strict=True):
            view = flat[begin : begin + parameter.numel()].view(parameter.shape)
            self._found.append(None if value is None else view.copy_(value))
            begin += parameter.numel()

    @contextlib.contextmanager
    def _in_place(self, call: Call) -> Iterator[None]:
        """Inside, the layer finds its weights where its graphs read them."""
        autocast = call.autocast | {"cache_enabled": False}
        with self.weights.at(self._at), torch.autocast(**autocast):
            yield

    @contextlib.contextmanager
    def _aliases(self, trained: Sequence[torch.Tensor]) -> Iterator[list[nn.Parameter]]:
        """Inside, the layer has others in place of its trained parameters, in the same memory.

        Each parameter has a node of autograd that belongs to the stream where it was first used;
        a gradient of the parameter itself would tie the capture to that stream.
        """
        aliases = {id(one): nn.Parameter(one.detach()) for one in trained}
        places = [
            (module._parameters, name, one)
            for module in (self.weights.module, *self.weights.inside)
            for name, one in module._parameters.items()
            if id(one) in aliases
        ]
        try:
            for parameters, name, one in places:
                parameters[name] = aliases[id(one)]
            yield [aliases[id(one)] for one in trained]
        finally:
            for parameters, name, one in places:
                parameters[name] = one


def call_key(call: Call) -> Any:
    """What a graph is bound to in a call, but for the values of tensors."""
    leaves = tuple(
        (leaf.shape, leaf.dtype, leaf.requires_grad) if torch.is_tensor(leaf) else leaf
        for leaf in call.leaves
    )
    return leaves, call.spec, tuple(call.autocast.items())


def layer_state(weights: LayerWeights) -> Any:
    """What a graph is bound to in a layer: its adapters, modes and hooks, and where they lie."""
    state: list[Any] = []
    for module in weights.inside:
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        state.append((module.training, *map(len, hooks)))
    for tuner in weights.inside:
        if not isinstance(tuner, BaseTunerLayer):
            continue
        active = tuner._active_adapter
        active = active if isinstance(active, str) else tuple(active)
        scaling = tuple(getattr(tuner, "scaling", {}).values())
        state.append((active, tuner._disable_adapters, tuple(tuner.merged_adapters), scaling))
    state += [(p.data_ptr(), p.requires_grad) for p in weights.own_parameters]
    return state


def is_plain(weights: LayerWeights) -> bool:
    """Whether all that runs in a layer is its own code and LoRA's."""
    for module in weights.inside:
        n_own = int(module in weights.by_module)
        if len(module._forward_pre_hooks) != n_own or module._forward_hooks:
            return False
        if module._backward_hooks or module._backward_pre_hooks:
            return False
        if isinstance(module, BaseTunerLayer) and type(module) is not lora.Linear:
            return False
        if "forward" in vars(module) and type(module) is not lora.Linear:
            return False
    return True
