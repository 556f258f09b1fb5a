"""The weights of one decoder layer: each is fetched before its module runs, and dropped after."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from onn_core.errors import ConfigError
from onn_core.ops.lora import fuse_lora
from onn_core.streaming.experts import looks_at_experts
from onn_core.streaming.lazy import StreamedParameter, find_parameters
from onn_core.streaming.passes import Pass
from onn_core.streaming.visits import Streaming
from onn_core.weights.slots import StreamedWeight


@dataclasses.dataclass(eq=False)
class Binding:
    """A parameter of a module that holds a streamed weight while its layer is visited."""

    module: nn.Module
    parameter: StreamedParameter
    absent: torch.Tensor  # one NaN expanded to the whole shape, so that a use out of turn is loud

    @property
    def weight(self) -> StreamedWeight:
        return self.parameter.weight

    def clear(self) -> None:
        self.parameter.set(self.absent)


class LayerWeights:
    """Fills the parameters of `module` during its visits.

    number: the layer's, which is its unit in the stream. bindings: its streamed parameters.

    A module takes its weights in a hook before its forward; the first micro-batch shows how often
    each module is called in which order. From then on the weights are fetched in that order, and
    in the last micro-batch each is dropped after its last call, so that its slot is free early.
    """

    def __init__(
        self, module: nn.Module, number: int, bindings: list[Binding], streaming: Streaming
    ):
        self.module = module
        self.number = number
        self.streaming = streaming
        self.at_address: dict[int, StreamedWeight] = {}  # of the memory where it is now
        self._bindings = bindings
        # A weight may be in several modules, and a module has several weights.
        self._by_weight: dict[StreamedWeight, list[Binding]] = {}
        self.by_module: dict[nn.Module, list[Binding]] = {}
        for binding in bindings:
            self._by_weight.setdefault(binding.weight, []).append(binding)
            self.by_module.setdefault(binding.module, []).append(binding)
        self._calls: Counter = Counter()  # of each module, in this micro-batch
        self._usual_calls: Counter = Counter()  # in any micro-batch
        modules = self.by_module.keys()
        # A module that holds others may need its own weights after theirs.
        self._holders = {m for m in modules if not modules.isdisjoint(set(m.modules()) - {m})}
        # Where an adapter wraps an expert's parameter, it takes the weight before the module runs.
        self.wrapped: set[nn.Module] = set()
        self.parameters: list[nn.Parameter] = []  # of the layer and its adapters now
        self.inside: list[nn.Module] = []  # the modules in the layer now, without itself
        self._is_new = True  # adapters came or went
        self._fetches = True
        self.is_filled = False  # for the whole of a visit
        self._previous: nn.Module | None = None
        self._last_micro_batch = False
        self._initialised: set[nn.Module] = set()  # DoRA's magnitudes that have their values
        self._looked_at: set[StreamedWeight] = set()  # of those that go by blocks
        # Weights that stay dense in this visit: nobody knows when they are used.
        self._always_dense: set[StreamedWeight] = set()
        for own in modules:
            own.register_forward_pre_hook(self._enter_module)

    def find_parameters(self) -> list[nn.Parameter]:
        """Look which parameters the layer and its adapters have now."""
        found = find_parameters(self.module)
        if list(map(id, found)) != list(map(id, self.parameters)):
            self.parameters, self._is_new = found, True
            self.find_looked_at()
            self.inside = [m for m in self.module.modules() if m is not self.module]
        return self.parameters

    @property
    def all(self) -> list[StreamedWeight]:
        """The layer's weights, in the order in which they are fetched."""
        return list(self._by_weight)

    @property
    def own_parameters(self) -> list[nn.Parameter]:
        """Those that are always resident: adapters, norms."""
        return [p for p in self.parameters if not isinstance(p, StreamedParameter)]

    @property
    def _by_matrix(self) -> bool:
        return self.streaming.planner.plan.by_matrix

    @contextlib.contextmanager
    def visit(self, phase: str, in_pass: Pass) -> Iterator[None]:
        """Inside, each weight is there when its module runs.

        Those of modules that are not known to be called are there from the beginning.
        """
        is_new, self._is_new = self._is_new, False
        if is_new:  # learn calls anew
            self._usual_calls.clear()
            fuse_lora(self.module)
        with self.streaming.visit(phase, self.number, in_pass, wait=False):
            self._previous = None
            try:
                if not is_new and self._fill_at_once():
                    yield
                    return
                if self._by_matrix:
                    self._request_from(0)
                for weight, bindings in () if self._by_matrix else self._by_weight.items():
                    modules = {binding.module for binding in bindings}
                    known = all(map(self._usual_calls.get, modules))
                    # In the first visit, too: a layer may be large when it is dense.
                    if self._is_dense(weight):
                        known = weight.module is not None
                    if not known or modules & self.wrapped:
                        self._fetch(weight)
                        self._always_dense.add(weight)
                if is_new:
                    self._fill_magnitudes()
                yield
            finally:
                self._always_dense.clear()
                if self.is_filled:  # the next visit releases what this one has entered
                    self.is_filled = False
                    self.at_address.clear()
                    for binding in self._bindings:
                        binding.clear()
                else:
                    for weight in self._by_weight:
                        self.drop(weight)

    def _fill_at_once(self) -> bool:
        """Fill all parameters if all layers are resident: then nobody waits for an early drop."""
        plan, device = self.streaming.planner.plan, self.streaming.device
        if plan.n_resident < self.streaming.n_layers or device.type != "cpu" or self.wrapped:
            return False
        if any(
            weight.packed or weight.tensor is None or self._is_dense(weight)
            for weight in self._by_weight
        ):
            return False
        for weight in self._by_weight:
            self._fetch(weight)
        self.is_filled = True
        return True

    @contextlib.contextmanager
    def at(self, memory: Mapping[StreamedWeight, torch.Tensor]) -> Iterator[None]:
        """Inside, each of the layer's weights is in `memory`; none is fetched."""
        self._fetches = False
        try:
            for binding in self._bindings:
                binding.parameter.set(memory[binding.weight])
            yield
        finally:
            for binding in self._bindings:
                binding.clear()
            self._fetches = True

    def begin_micro_batch(self, last: bool) -> None:
        """Another micro-batch, or a gradient, comes; weights are dropped early in the `last`."""
        if self._calls:
            if not self._usual_calls:
                self._sort(list(self._calls))
            self._usual_calls |= self._calls
        if self._by_matrix and self._previous is not None:
            for weight in self._by_weight:  # of the micro-batch before
                self.drop(weight)
        self._calls = Counter()
        self._previous = None
        self._last_micro_batch = last

    def wait(self, weight: StreamedWeight) -> torch.Tensor:
        """Wait until a weight is there; returns what `values` gives."""
        if self.is_filled:
            return self.values(weight)
        tensor = self.streaming.stream.wait(weight)
        if weight.wide_bytes and weight.wide is None and self.streaming.stream.casts_once:
            weight.wide = tensor.to(weight.wide_dtype)
        if self._is_dense(weight) and weight.dense is None:
            # A function may need all weights of its module at once.
            modules = {binding.module for binding in self._by_weight[weight]} | self._holders
            busy = {one.weight for module in modules for one in self.by_module[module]}
            scratch = self.streaming.stream.scratch
            evicted = scratch.fill(weight, busy | self._always_dense)
            for binding in self._by_weight.get(evicted, ()):
                binding.clear()
        values = self.values(weight)
        self.at_address[values.untyped_storage().data_ptr()] = weight
        return values

    def move(self, weight: StreamedWeight, memory: torch.Tensor) -> None:
        """Write the values of a weight to `memory` (shape); this visit needs its slot no longer."""
        self.streaming.stream.wait(weight)
        if weight.dense is None:
            weight.write_values(memory)
        else:  # of experts, from the beginning of the visit
            memory.copy_(weight.dense)
        self.drop(weight)

    def values(self, weight: StreamedWeight) -> torch.Tensor | None:
        """The values (shape) of a resident weight, or what is stored where that is multiplied."""
        if self._is_dense(weight):
            return weight.dense
        return weight.tensor if weight.wide is None else weight.wide

    def _is_dense(self, weight: StreamedWeight) -> bool:
        """Whether its values are in a scratch while this layer uses them."""
        return weight.packed and not weight.by_blocks or weight in self._looked_at

    def drop(self, weight: StreamedWeight) -> None:
        """This visit needs the weight no longer."""
        if self.is_filled:
            return
        for binding in self._by_weight[weight]:
            binding.clear()
        if (values := self.values(weight)) is not None:
            self.at_address.pop(values.untyped_storage().data_ptr(), None)
        self.streaming.stream.scratch.free(weight)
        self.streaming.stream.release(weight)

    def find_looked_at(self) -> None:
        """Note the weights of which more is used than their matmul.

        DoRA does, an adapter on a parameter, and experts that are not multiplied by group.
        """
        looked_at, self.wrapped = set(), set()
        for module, own in self.by_module.items():
            if looks_at_experts(module):
                looked_at |= {binding.weight for binding in own}
        for tuner in self.module.modules():
            plain = type(tuner) is lora.Linear and not tuner.lora_variant
            if not isinstance(tuner, BaseTunerLayer) or plain:
                continue
            base = tuner.get_base_layer()
            own = self.by_module.get(base, [])
            if own and isinstance(tuner, lora.ParamWrapper):
                self.wrapped.add(base)
                adapted = base._parameters.get(tuner.parameter_name)
                own = [binding for binding in own if binding.parameter is adapted]
            looked_at |= {binding.weight for binding in own}
        looked_at = {weight for weight in looked_at if weight.by_blocks}
        if looked_at != self._looked_at:
            self.look_away()
            self._looked_at = looked_at
            for weight in looked_at:
                weight.lookers.add(self)
            self.streaming.planner.forget()

    def look_away(self) -> None:
        """Nothing here looks at weights any more, which other runs may share."""
        for weight in self._looked_at:
            weight.lookers.discard(self)
        self._looked_at = set()

    def _sort(self, modules: list[nn.Module]) -> None:
        """Fetch in the order of the calls, which need not be that of the definition."""
        turn = {module: number for number, module in enumerate(modules)}
        last = len(modules)
        by_turn = sorted(
            self._by_weight.items(), key=lambda pair: min(turn.get(b.module, last) for b in pair[1])
        )
        self._by_weight = dict(by_turn)
        self.streaming.stream.reorder(self.number, list(self._by_weight))

    def _request_from(self, first: int) -> None:
        """Matrix by matrix: request the next weights, in order, as far as there are slots."""
        stream, weights = self.streaming.stream, list(self._by_weight)
        if not self._usual_calls:  # nor is the order known
            return
        slots = stream.schedule.slots
        room = slots - Counter(weight.slot_bytes for weight in weights if weight.in_use)
        for weight in weights[first:]:
            if not weight.in_use:
                if not room[weight.slot_bytes]:
                    break
                room[weight.slot_bytes] -= 1
                stream.request(weight)

    def _fetch(self, weight: StreamedWeight) -> None:
        if self._by_matrix:
            self._request_from(list(self._by_weight).index(weight))
        values, as_stored = self.wait(weight), weight.by_blocks and not self._is_dense(weight)
        for binding in self._by_weight[weight]:
            binding.parameter.as_stored = as_stored
            if not as_stored:
                binding.parameter.set(values)

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        """Drop the weights of the module before, if this visit is done with it; fetch its own."""
        if self.is_filled or not self._fetches:
            return
        self._calls[module] += 1
        before, self._previous = self._previous, module
        last = (self._by_matrix or self._last_micro_batch) and before not in self._holders
        usual = self._usual_calls[before] or int(self._by_matrix)
        if last and before not in (None, module) and self._calls[before] == usual:
            for binding in self.by_module[before]:
                if all(other.module is before for other in self._by_weight[binding.weight]):
                    self.drop(binding.weight)
        own = module._parameters.values()
        if any(all(b.parameter is not one for one in own) for b in self.by_module[module]):
            if self._by_matrix:
                raise ConfigError(
                    "adapters on parameters need a whole layer in memory: raise memory_budget."
                )
            self.wrapped.add(module)
            return
        for binding in self.by_module[module]:
            self._fetch(binding.weight)

    @torch.no_grad()
    def _fill_magnitudes(self) -> None:
        """The first magnitudes of DoRA, which PEFT wanted from weights that were not there."""
        for tuner in self.module.modules():
            for name, part in getattr(tuner, "lora_magnitude_vector", {}).items():
                if part in self._initialised:
                    continue
                self._initialised.add(part)
                if part.weight.isnan().all():  # else loaded from an adapter
                    base = tuner.get_base_layer()
                    of_base = self.by_module[base]
                    for binding in of_base:
                        self._fetch(binding.weight)
                    dtype = of_base[0].absent.dtype
                    weight = base.weight.to(dtype)
                    a, b = tuner.lora_A[name].weight.to(dtype), tuner.lora_B[name].weight.to(dtype)
                    part.weight.copy_(part.get_weight_norm(weight, b @ a, tuner.scaling[name]))
