"""One decoder layer whose weights are there only while it is visited.

The layer's own forward is kept; this module decides when it runs. In training, a visit of the
forward pass runs it without a graph and saves its input, the *boundary activation*; the visit of
the backward pass runs it again with a graph and takes the gradients of its inputs and adapters
(activation checkpointing, Chen et al. 2016, whose recompute also reloads the weights). Where a
plan has room, the visit of the forward pass keeps its graph, whose weights still go. The whole
batch goes through one visit in micro-batches: the vertical, or layer-major, schedule of FlexGen
(Sheng et al. 2023) and GreedySnake (2025).
"""

import contextlib
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from onn_core.errors import ConfigError
from onn_core.memory.plan import GRAPHS
from onn_core.streaming.recompute import Call, Visit, is_cache
from onn_core.streaming.session import Binding, Session
from onn_core.weights.items import Item


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
        self._items_of: dict[nn.Module, list[Item]] = {}
        self.item_at: dict[int, Item] = {}  # address of memory -> the item that is there now
        for binding in bindings:
            self._by_item.setdefault(binding.item, []).append(binding)
            self._items_of.setdefault(binding.module, []).append(binding.item)
        self._calls: Counter = Counter()  # of each owner, in this micro-batch
        self._usual_calls: Counter = Counter()
        owners = self._items_of.keys()  # one that holds others may need its own after theirs
        self._holders = {x for x in owners if not owners.isdisjoint(set(x.modules()) - {x})}
        self._wrapped: set[nn.Module] = set()  # others take their weights before they are called
        self._n_parameters = 0
        self._previous: nn.Module | None = None
        self._last_micro_batch = False
        self._settled: set[nn.Module] = set()  # DoRA's layers whose magnitudes are there
        for owner in self._items_of:
            owner.register_forward_pre_hook(self._enter_owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=is_cache)
        if self.session.batching.probing:
            return self.session.batching.answer(leaves)
        if self.number == 0:
            *_, n_tokens, _ = leaves[0].shape  # (B, T, C), or streams (4, B, T, C)
            self.session.fit(self.session.batching.batch_size or len(leaves[0]), n_tokens)
        call = Call(self, leaves, spec)
        parameters = list(self.module.parameters())
        if len(parameters) != self._n_parameters:  # adapters came or went: learn the calls anew
            self._n_parameters = len(parameters)
            self._usual_calls.clear()
        trained = [p for p in parameters if p.requires_grad]
        inputs = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
        if not inputs:  # of the first layer: it waits for backward as the others do
            inputs = [x for x in leaves if isinstance(x, torch.Tensor) and x is leaves[0]]
        if not torch.is_grad_enabled() or not (trained or any(x.requires_grad for x in inputs)):
            outputs = call.run_forward()
        else:
            if any(map(is_cache, leaves)):
                raise ConfigError("training cannot fill a key-value cache: pass use_cache=False.")
            with self.session.boundaries(inputs):
                outputs = Visit.apply(call, len(inputs), *inputs, *trained)
        return pytree.tree_unflatten(call.with_outputs(outputs), call.out_spec)

    # --- visits -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def visiting(self, phase: str, future: list[int]):
        """Inside, each weight is there when its module is called.

        Those of modules that are not known to be called are there from the beginning.
        """
        with self.session.visit(phase, self.number, future, wait=False):
            self._previous = None
            try:
                if self.session.plan.by_matrix:
                    self._claim_from(0)
                for item, bindings in () if self.session.plan.by_matrix else self._by_item.items():
                    owners = {binding.module for binding in bindings}
                    if not all(map(self._usual_calls.get, owners)) or owners & self._wrapped:
                        self._bring(item)
                self._fill_magnitudes()
                yield
            finally:
                for item in self._by_item:
                    self.let_go(item)

    def _sort(self, owners: list[nn.Module]) -> None:
        """Fetch in the order of the calls, which need not be that of the definition."""
        last = len(owners)
        turn = {owner: number for number, owner in enumerate(owners)}
        by_turn = sorted(
            self._by_item.items(), key=lambda pair: min(turn.get(b.module, last) for b in pair[1])
        )
        self._by_item = dict(by_turn)
        self.session.stream.reorder(self.number, list(self._by_item))

    def _claim_from(self, first: int) -> None:
        """Matrix by matrix: ask for the next items, in order, as far as there is room for them."""
        stream, items = self.session.stream, list(self._by_item)
        if not self._usual_calls:  # nor is the order known
            return
        room = stream.slots - Counter(item.slot_bytes for item in items if item.in_use)
        for item in items[first:]:
            if not item.in_use:
                if not room[item.slot_bytes]:
                    break
                room[item.slot_bytes] -= 1
                stream.claim(item)

    def _bring(self, item: Item) -> None:
        if self.session.plan.by_matrix:
            self._claim_from(list(self._by_item).index(item))
        memory = self.session.stream.wait(item).untyped_storage()
        self.item_at[memory.data_ptr()] = item
        for binding in self._by_item[item]:
            binding.fill()

    @torch.no_grad()
    def _fill_magnitudes(self) -> None:
        """The first magnitudes of DoRA, which PEFT wanted from weights that were not there."""
        for tuner in self.module.modules():
            for name, part in getattr(tuner, "lora_magnitude_vector", {}).items():
                if part in self._settled:
                    continue
                self._settled.add(part)
                if part.weight.isnan().all():  # else loaded from an adapter
                    base = tuner.get_base_layer()
                    for item in self._items_of.get(base, ()):
                        self._bring(item)
                    dtype = next(b.absent.dtype for b in self.bindings if b.module is base)
                    weight = base.weight.to(dtype)
                    a, b = tuner.lora_A[name].weight.to(dtype), tuner.lora_B[name].weight.to(dtype)
                    part.weight.copy_(part.get_weight_norm(weight, b @ a, tuner.scaling[name]))

    def let_go(self, item: Item) -> None:
        for binding in self._by_item[item]:
            binding.clear()
        if item.tensor is not None:
            self.item_at.pop(item.tensor.untyped_storage().data_ptr(), None)
        self.session.stream.release(item)

    def keeps_graph(self) -> bool:
        """Whether the plan has room for the graph of the batch, of what others have left of it."""
        session, plan = self.session, self.session.plan
        if self.number not in plan.kept(session.n_layers) or self._wrapped:
            return False
        a_graph = max(plan.graph_bytes, session.largest_graph)
        return session.kept_bytes + a_graph <= plan.parts[GRAPHS] + plan.graph_bytes // 2

    def begin_micro_batch(self, last: bool) -> None:
        if self._calls:
            if not self._usual_calls:
                self._sort(list(self._calls))
            self._usual_calls |= self._calls
        if self.session.plan.by_matrix and self._previous is not None:
            for item in self._by_item:  # of the micro-batch before
                self.let_go(item)
        self._calls = Counter()
        self._previous = None
        self._last_micro_batch = last

    def _enter_owner(self, owner: nn.Module, args: Any) -> None:
        """Let the matrices of the module before go, if it is done in this visit; bring its own."""
        self._calls[owner] += 1
        before, self._previous = self._previous, owner
        by_matrix = self.session.plan.by_matrix
        last = (by_matrix or self._last_micro_batch) and before not in self._holders
        if last and before not in (None, owner) and self._is_done(before):
            for item in self._items_of[before]:
                if all(binding.module is before for binding in self._by_item[item]):
                    self.let_go(item)
        own = {id(parameter) for parameter in owner._parameters.values()}
        if any(id(b.parameter) not in own for b in self.bindings if b.module is owner):
            if by_matrix:
                raise ConfigError(
                    "adapters on expert tensors need a whole layer in memory: raise memory_budget."
                )
            self._wrapped.add(owner)
            return
        for item in self._items_of[owner]:
            self._bring(item)

    def _is_done(self, owner: nn.Module) -> bool:
        usual = self._usual_calls[owner] or int(self.session.plan.by_matrix)
        return self._calls[owner] == usual
