"""The plan of a streamed model, made anew when a batch may take more than any before."""

import dataclasses
import weakref
from collections import Counter
from typing import Any

from onn_core.memory.plan import Plan, Sizes, make_plan


@dataclasses.dataclass(frozen=True)
class Load:
    """What a plan was made for."""

    n_tokens: int = 0  # of a batch
    length: int = 0  # of a sample, in tokens: attention's mask grows with its square
    n_trained: int = 0  # parameters
    n_back: int = 0  # layers that backward reaches

    def within(self, other: "Load") -> bool:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return all(mine <= theirs for mine, theirs in pairs)


class ReservedGraphs:
    """Bytes of the graphs that are reserved between forward and backward, by layer."""

    def __init__(self) -> None:
        self.by_layer: Counter = Counter()
        self.largest = 0  # bytes of one layer's, under the present plan

    @property
    def total(self) -> int:
        return self.by_layer.total()

    def add(self, graph: Any, layer: int, n_bytes: int) -> None:
        """Count what a graph of a layer takes, for as long as something refers to it."""
        self.by_layer[layer] += n_bytes
        self.largest = max(self.largest, self.by_layer[layer])
        weakref.finalize(graph, self.by_layer.subtract, {layer: n_bytes})


class Planner:
    """The present plan, and what it was made from.

    budget: bytes; None plans nothing and reserves `chunk_size` layers and the whole batch.
    micro_batch_size: the user's; None leaves it to the plan.
    """

    def __init__(
        self, sizes: Sizes, budget: int | None, chunk_size: int, micro_batch_size: int | None
    ):
        self.sizes, self.budget = sizes, budget
        self._chunk_size, self._micro_batch_size = chunk_size, micro_batch_size
        self._load = Load()
        self._length = 1  # tokens of a sample now
        self._is_stale = False
        self.graphs = ReservedGraphs()
        self.plan: Plan = make_plan(sizes, 1, 1, budget, chunk_size, micro_batch_size)

    @property
    def micro_batch_size(self) -> int | None:
        """Samples of a micro-batch, as many as have the tokens that are planned; None is all."""
        if self._micro_batch_size is not None or not self._load.n_tokens:
            return self._micro_batch_size
        return max(1, self.plan.micro_batch_size * self._load.length // self._length)

    def leave_room(self, host_bytes: int) -> None:
        """In the next plans, room for what else is in host memory, if that is this budget's."""
        if self.sizes.on_cpu:
            held = self.sizes.held_bytes + host_bytes
            self.sizes = dataclasses.replace(self.sizes, held_bytes=held)

    def forget(self) -> None:
        """What plans are made of has changed: the next `fit` plans anew."""
        self._is_stale = True

    def fit(self, batch_size: int, n_tokens: int, n_trained: int, n_back: int) -> None:
        """Plan anew if batches (B, T) may take more than any before; ConfigError if none fits.

        n_trained: parameters. n_back: layers that backward reaches; an evaluation between two
        steps, which reaches none, changes nothing.
        """
        n_back = max(n_back, self._load.n_back)
        load = Load(batch_size * n_tokens, n_tokens, n_trained, n_back)
        self._length = n_tokens
        if not self._is_stale and (self.budget is None or load.within(self._load)):
            return
        sizes = dataclasses.replace(self.sizes, n_trained=n_trained, n_back=n_back)
        self.plan = make_plan(
            sizes, batch_size, n_tokens, self.budget, self._chunk_size, self._micro_batch_size
        )
        self._is_stale = False
        if self.budget is not None:
            self._load = load
        self.graphs.largest = 0

    def reserves_graph(self, layer: int) -> bool:
        """Whether there is room for the graph of a layer, of what others have left."""
        plan = self.plan
        if layer not in plan.reserved(len(self.sizes.layers)):
            return False
        a_graph = max(plan.graph_bytes, self.graphs.largest)
        return self.graphs.total + a_graph <= plan.terms.graphs + plan.graph_bytes // 2
