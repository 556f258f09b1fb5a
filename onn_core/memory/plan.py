"""What fits a memory budget: chunk, micro-batch, resident layers, reserved graphs, boundaries."""

import dataclasses
import functools
import itertools
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from onn_core.errors import ConfigError
from onn_core.ops.cross_entropy import HEAD_TOKENS, LOGITS_BYTES, PLAIN_FRACTION
from onn_core.weights.dequantise import Converted
from onn_core.weights.slots import (
    StreamedWeight,
    count_dense,
    count_slots,
    few_slots,
    slots_bytes,
)

PROCESS_BYTES = 40 << 20  # on a CPU: library pages, small blocks, readers' buffers
# On a CPU the heap with its gaps, in activations: measured on phi-4 with 256 and 512 tokens.
HEAP_FACTOR = 1.95
# Of a budget, for what the sum does not see. A CUDA allocator is counted to the byte.
CPU_MARGIN = 1.05
CUDA_MARGIN = 1.03
TRAINED_BYTES = 16  # a parameter in float32, its gradient and the two moments of AdamW
# Where reading is the limit, reserved graphs take at most this part of a budget.
MAX_GRAPH_FRACTION = 1 / 8
# What is tried where the time of a step decides.
GRAPH_FRACTIONS = (0, MAX_GRAPH_FRACTION, 1 / 2)
# What CUDA graphs take in addition to what their visits make: cuBLAS's workspaces in their pool,
# two threads', and the graphs themselves. On an H200 the pool took 0.93 of what was counted.
CAPTURE_BYTES = 128 << 20
# Above, the kernels of a micro-batch take longer than their launches, and the pool is large.
MAX_CAPTURED_TOKENS = 4096
# From here on a micro-batch runs at full speed where that was not measured, and a CPU computes
# longer than it reads.
FULL_SPEED_TOKENS = 256

MOST_WEIGHED = 8  # plans that a record tells of: on a CPU those that came last, else the fastest


@dataclasses.dataclass(frozen=True)
class Sizes:
    """All that a plan needs to know of a model."""

    layers: Sequence[Sequence[StreamedWeight]]
    head: Sequence[Sequence[StreamedWeight]]
    held_bytes: int  # what is always resident
    work_bytes: int  # that making a packed weight dense takes, without its buffer
    hidden_bytes: int  # of a token between two layers
    visit_bytes: Callable[[int, int], tuple[int, int, int]]  # (B, T) -> see `footprint`
    on_cpu: bool = True
    n_trained: int = 0  # parameters
    n_back: int = 0  # layers that backward reaches
    full_speed_tokens: int = FULL_SPEED_TOKENS  # of a micro-batch; more are not faster
    # (sizes, plan, B, T) -> seconds of a step, the least of which is taken; None goes by rules.
    step_s: "Callable[[Sizes, Plan, int, int], float] | None" = None

    @property
    def layer_parameters(self) -> int:
        """Of the matrices of a layer, on average."""
        n_all = sum(math.prod(weight.shape) for unit in self.layers for weight in unit)
        return n_all // len(self.layers)

    @functools.cached_property
    def resident_slots(self) -> list[Counter]:
        """The slots for each number of resident layers, from 1 to all."""
        return [count_slots(self.layers, n + 1) for n in range(len(self.layers))]

    @functools.cached_property
    def slots_ahead(self) -> Counter:
        """Those for what is fetched while the layer before computes."""
        return self.resident_slots[0] - count_slots(self.layers, 1, prefetch=False)

    @property
    def margin(self) -> float:
        return CPU_MARGIN if self.on_cpu else CUDA_MARGIN


@dataclasses.dataclass(frozen=True)
class Terms:
    """The terms of a plan's peak memory, in bytes."""

    weights: int  # all slots
    always_there: int
    adapters: int  # with their gradients and the optimizer's state
    boundaries: int  # the layers' inputs, as far as they stay in memory
    activations: int  # of the largest visit
    graphs: int = 0  # reserved between forward and backward
    heap_gaps: int = 0  # what the heap may grow by before it is trimmed
    dense_copies: int = 0  # the scratch, what decoding takes, and small weights in float32
    captured_visits: int = 0  # the memory that CUDA graphs read, write and compute in

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        names = (name.replace("_", " ") for name in self.__dataclass_fields__)
        terms = zip(names, dataclasses.astuple(self), strict=True)
        shown = " + ".join(f"{size / 2**20:.0f} {name}" for name, size in terms if size)
        return f"{shown} = {self.total / 2**20:.0f} MiB"


@dataclasses.dataclass(frozen=True)
class HeadPlan:
    """How the head meets a batch on a device."""

    n_tokens: int  # that meet a block of the vocabulary at once
    n_rounds: int  # through the whole head, each with so many tokens; 1: with all of them


@dataclasses.dataclass(frozen=True)
class Weighed:
    """A plan that was weighed against the one that was taken."""

    micro_batch_size: int
    n_resident: int
    n_reserved: int
    boundaries: str
    captured: bool
    peak_bytes: int
    fits: bool
    step_s: float | None  # predicted, where the time decides; else the first that fits is taken


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a model runs, and what its peak memory is made of."""

    slots: Counter  # size in bytes -> how many
    n_resident: int  # layers that are resident at once; 0: a layer is streamed matrix by matrix
    micro_batch_size: int
    n_micro_batches: int
    n_reserved: int  # of the last layers, the graphs are reserved: they are not recomputed
    boundaries: str  # where the layers' inputs wait for backward: "memory", "host" or "disk"
    count_terms: Callable[[], Terms]  # traces a layer: only where a budget asks for it
    head: "HeadPlan | None" = None
    dense: Counter = dataclasses.field(default_factory=Counter)  # the scratch: size -> buffers
    captured: bool = False  # layer visits are replayed as CUDA graphs, where they can be
    captures_resident: bool = False  # the CUDA graphs, during an evaluation, too
    weighed: tuple[Weighed, ...] = ()  # at most MOST_WEIGHED, this plan with them
    casts_once: bool = False  # small matrices wait in the dtype that they are multiplied in, too

    @functools.cached_property
    def terms(self) -> Terms:
        return self.count_terms()

    @property
    def by_matrix(self) -> bool:
        return self.n_resident == 0

    def reserved(self, n_layers: int) -> range:
        """The layers whose graphs are reserved."""
        return range(n_layers - self.n_reserved, n_layers)

    @property
    def graph_bytes(self) -> int:
        """Of one layer whose graph is reserved."""
        return self.terms.graphs // self.n_reserved if self.n_reserved else 0

    @property
    def peak_bytes(self) -> int:
        return self.terms.total

    def with_terms(self, terms: Terms, **changes: Any) -> "Plan":
        return dataclasses.replace(self, count_terms=lambda: terms, **changes)


def work_bytes(layers: Sequence[Sequence[StreamedWeight]], device: torch.device) -> int:
    """What it takes to make one packed weight, or a block of it, dense, without its buffer."""
    packed = [weight for unit in layers for weight in unit if weight.packed]
    # What transformers makes of several matrices is in fresh memory first, and so are those.
    merged = [2 * w.dense_bytes for w in packed if type(w.source) is Converted]
    blocks = [weight.source.work_bytes(device) for weight in packed]
    return max(merged, default=0) + max(blocks, default=0)


def make_plan(
    sizes: Sizes,
    batch_size: int,
    n_tokens: int,
    budget: int | None = None,
    chunk_size: int = 1,
    micro_batch_size: int | None = None,
) -> Plan:
    """The plan for batches of (batch_size, n_tokens) that fits `budget`.

    With `sizes.step_s` the one whose step takes the least time; else the first candidate that fits,
    which reads least. Without a budget: `chunk_size` layers, the whole batch. ConfigError, with the
    arithmetic, if nothing fits.
    """
    if budget is None:
        micro_batch_size = micro_batch_size or batch_size
    plans: list[Plan] = []
    refused: list[Plan] = []
    for plan in _candidates(sizes, batch_size, n_tokens, chunk_size, micro_batch_size):
        if budget is None:
            return plan
        if sizes.margin * plan.peak_bytes > budget:
            refused.append(plan)
            continue
        fractions = (None,) if sizes.step_s is None else GRAPH_FRACTIONS
        heads = _plan_head(plan, sizes, budget, batch_size, n_tokens)
        for one, most in itertools.product(heads, fractions[:1] if plan.captured else fractions):
            full = _reserve_graphs(one, sizes, budget, batch_size, n_tokens, most)
            full = _add_residents(full, sizes, budget)
            plans.append(_make_captures_resident(full, sizes, budget, n_tokens))
        if sizes.step_s is None:
            break
    if not plans:
        raise ConfigError(
            f"memory_budget of {budget / 2**20:.0f} MiB is too small for a batch of {batch_size} x "
            f"{n_tokens} tokens: {plan.terms}, and {100 * sizes.margin - 100:.0f} % for safety: "
            "raise it, or lower chunk_size, batch_size or max_length."
        )
    if sizes.step_s is None:
        weighed = [*(_weigh(plan, fits=False) for plan in refused), _weigh(plans[0])]
        return dataclasses.replace(plans[0], weighed=tuple(weighed[-MOST_WEIGHED:]))
    timed = [(sizes.step_s(sizes, plan, batch_size, n_tokens), plan) for plan in plans]
    timed.sort(key=operator.itemgetter(0))
    # Some differ in the scratch alone, or in the rounds of the head.
    weighed = dict.fromkeys(_weigh(plan, step_s=step_s) for step_s, plan in timed)
    return dataclasses.replace(timed[0][1], weighed=tuple(weighed)[:MOST_WEIGHED])


def _weigh(plan: Plan, fits: bool = True, step_s: float | None = None) -> Weighed:
    how = (plan.micro_batch_size, plan.n_resident, plan.n_reserved, plan.boundaries, plan.captured)
    return Weighed(*how, plan.peak_bytes, fits, step_s)


def _candidates(
    sizes: Sizes, batch_size: int, n_tokens: int, chunk_size: int, micro_batch_size: int | None
) -> Iterator[Plan]:
    """All plans, with no graph reserved yet; in the order of preference, where no time decides."""
    head = count_slots(sizes.head, 1)
    weights = [(chunk_size, count_slots(sizes.layers, chunk_size) + head)]
    if chunk_size == 1 and not sizes.on_cpu:
        weights.append((1, count_slots(sizes.layers, 1, prefetch=False) + head))
    if chunk_size == 1:
        weights += [(0, few_slots(sizes.layers, n) + head) for n in (2, 1)]
    # A layer that is dense as a whole is made dense once a visit, not once a micro-batch.
    scratches = [count_dense(sizes.layers, whole_unit=whole) for whole in (True, False)]
    scratches = scratches[:1] if scratches[0] == scratches[1] else scratches
    places = ("memory", "disk" if sizes.on_cpu else "host")
    is_timed = sizes.step_s is not None
    if micro_batch_size is None:
        # 1, 2, 4 ... of them; timed, numbers in between, since each micro-batch costs its launches.
        quarters = (4, 5, 6, 7) if is_timed else (4,)
        counts = [n << place for place in range(batch_size.bit_length() + 1) for n in quarters]
        micro = sorted({-(-4 * batch_size // n) for n in counts}, reverse=True)
    else:
        micro = [min(micro_batch_size, batch_size)]
    tries = list(itertools.product(weights, places, micro, (False, True)[: 1 + is_timed]))
    if micro_batch_size is None and not is_timed:
        # None is larger than it takes to multiply at full speed; but matrix by matrix, where each
        # micro-batch reads all anew, the largest comes first.
        fast = min(
            (n for n in micro if n * n_tokens >= sizes.full_speed_tokens), default=batch_size
        )
        tries = [t for t in tries if t[2] <= fast or not t[0][0]]
        tries.sort(key=lambda t: (not t[0][0], 0 if t[0][0] else 1 / t[2]))
    for (n_resident, slots), place, size, captured in tries:
        if captured and (
            batch_size % size or not n_resident or size * n_tokens > MAX_CAPTURED_TOKENS
        ):
            continue
        # Graphs have the whole layer dense in memory of their own.
        for dense in scratches if n_resident and not captured else scratches[-1:]:
            given = (dense, slots, place, batch_size, size, n_tokens, captured)
            yield Plan(
                slots,
                n_resident,
                micro_batch_size=size,
                n_micro_batches=-(-batch_size // size),
                n_reserved=0,
                boundaries=place,
                count_terms=functools.partial(_count_terms, sizes, *given),
                dense=dense,
                captured=captured,
            )


def _reserve_graphs(
    plan: Plan, sizes: Sizes, budget: int, batch_size: int, n_tokens: int, most: float | None
) -> Plan:
    """`plan` with the graphs of as many of the last layers as `most` of the budget has room for.

    None: a byte of them saves more time than one of weights where matmul is the limit, with
    FULL_SPEED_TOKENS or more. With fewer they take a part of the budget: they are small.
    """
    graph_bytes = sizes.visit_bytes(batch_size, n_tokens)[2]  # of a layer
    if plan.boundaries != "memory":  # then its input is in memory only for the graph
        graph_bytes += batch_size * n_tokens * sizes.hidden_bytes
    room = int(budget / sizes.margin) - plan.peak_bytes
    if most is None:
        most = MAX_GRAPH_FRACTION if batch_size * n_tokens < FULL_SPEED_TOKENS else 1
    room = min(room, int(budget * most))
    n_reserved = min(room // graph_bytes, sizes.n_back) if plan.n_resident else 0
    if n_reserved <= 0:
        return plan
    terms = dataclasses.replace(plan.terms, graphs=n_reserved * graph_bytes)
    return plan.with_terms(terms, n_reserved=n_reserved)


def _add_residents(plan: Plan, sizes: Sizes, budget: int) -> Plan:
    """`plan` with as many resident layers as the budget has room for, and the head after all.

    What room is then left makes single matrices resident, the largest first, but for what the heap
    may grow by before it is trimmed, which costs time.
    """
    other_bytes = plan.peak_bytes - plan.terms.weights

    def fits(slots: Counter, gaps: int = 0) -> bool:
        return sizes.margin * (other_bytes + gaps + slots_bytes(slots)) <= budget

    n_layers, head = len(sizes.layers), sizes.head
    choices = [(n_layers, sizes.resident_slots[-1] + count_slots(head, len(head) or 1))]
    block = count_slots(head, 1)
    for n in range(n_layers, plan.n_resident or n_layers, -1):
        choices.append((n, sizes.resident_slots[n - 1] + block))
    choices.append((plan.n_resident, plan.slots.copy()))
    n_resident, slots = next(choice for choice in choices if fits(choice[1]))
    every = Counter(weight.slot_bytes for unit in sizes.layers for weight in unit)
    gaps = plan.terms.activations // 2 if sizes.on_cpu else 0
    for size in sorted(every if n_resident else (), reverse=True):
        while slots[size] < every[size] and fits(slots + Counter({size: 1}), gaps):
            slots[size] += 1
    terms = dataclasses.replace(plan.terms, weights=slots_bytes(slots))
    copies = sum(weight.wide_bytes for unit in sizes.layers for weight in unit)
    casts_once = n_resident == n_layers and copies and fits(slots, gaps + copies)
    if casts_once:
        terms = dataclasses.replace(terms, dense_copies=terms.dense_copies + copies)
    if any(slots[size] < count for size, count in every.items()):  # else there is room anyway
        room = int(budget / sizes.margin) - terms.total
        terms = dataclasses.replace(terms, heap_gaps=max(0, min(gaps, room)))
    return plan.with_terms(terms, n_resident=n_resident, slots=slots, casts_once=bool(casts_once))


def _count_terms(
    sizes: Sizes,
    dense: Counter,
    slots: Counter,
    place: str,
    batch_size: int,
    micro_batch_size: int,
    n_tokens: int,
    captured: bool = False,
) -> Terms:
    """The peak of a layer's visit, or of the head, with what it is given and makes.

    captured: layers have a pool of their own, and fixed memory for a layer's weights, inputs and
    outputs. There are no graphs yet when the first step runs as it is, nor in an evaluation, unless
    they are resident then: each has room in what the graphs take.

    Forward, the embedding is there too: transformers refers to it until the last layer is done.
    """
    batch_bytes = batch_size * n_tokens * sizes.hidden_bytes
    micro_bytes = micro_batch_size * n_tokens * sizes.hidden_bytes
    saved = len(sizes.layers) * batch_bytes if place == "memory" else 0
    forward, backward, _ = sizes.visit_bytes(micro_batch_size, n_tokens)
    largest, captured_visits = head_bytes(sizes, batch_size * n_tokens), 0
    if captured:
        largest = max(largest, batch_bytes)
        weights = [Counter(weight.captured_bytes for weight in unit) for unit in sizes.layers]
        captured_visits = slots_bytes(functools.reduce(operator.or_, weights)) + 6 * micro_bytes
        captured_visits += max(forward, backward) + CAPTURE_BYTES
        # What may be used at any time is dense in the scratch when a visit begins.
        units = [[w for w in unit if w.module is None] for unit in sizes.layers]
        dense = count_dense(units, whole_unit=False)
    else:
        if place == "host":  # a micro-batch's input is there, and the next comes
            backward += 2 * micro_bytes
        largest = max(largest, forward + batch_bytes, backward)
    return Terms(
        weights=slots_bytes(slots),
        always_there=sizes.held_bytes + (PROCESS_BYTES if sizes.on_cpu else 0),
        adapters=TRAINED_BYTES * sizes.n_trained,
        boundaries=saved,
        activations=int((HEAP_FACTOR if sizes.on_cpu else 1) * largest) + 2 * batch_bytes,
        dense_copies=slots_bytes(dense) + sizes.work_bytes,
        captured_visits=captured_visits,
    )


def _plan_head(plan: Plan, sizes: Sizes, budget: int, batch_size: int, n_tokens: int) -> list[Plan]:
    """On a device: `plan` with two ways for the head, if they differ.

    With as many tokens at once as a layer's activations have room for, and as the budget has: each
    round reads the whole head.
    """
    if sizes.on_cpu or len(sizes.head) < 2:
        return [plan]
    n = batch_size * n_tokens
    room = plan.terms.activations - 2 * n * sizes.hidden_bytes
    found: dict[int, Plan] = {}
    for allowed in (room, room + int(budget / sizes.margin) - plan.peak_bytes):
        n_rounds = 1
        while n > HEAD_TOKENS * n_rounds and head_bytes(sizes, n, -(-n // n_rounds)) > allowed:
            n_rounds += 1
        head = HeadPlan(-(-n // n_rounds), n_rounds)
        more = max(0, head_bytes(sizes, n, head.n_tokens) - room)
        terms = dataclasses.replace(plan.terms, activations=plan.terms.activations + more)
        found[n_rounds] = plan.with_terms(terms, head=head)
    return list(found.values())


def _make_captures_resident(plan: Plan, sizes: Sizes, budget: int, n_tokens: int) -> Plan:
    """`plan`, with its CUDA graphs resident during an evaluation, if there is room for both."""
    if not plan.captured:
        return plan
    forward = sizes.visit_bytes(plan.micro_batch_size, n_tokens)[0]
    terms = dataclasses.replace(
        plan.terms,
        activations=plan.terms.activations + forward,
        dense_copies=plan.terms.dense_copies + slots_bytes(plan.dense),
    )
    if sizes.margin * terms.total > budget:
        return plan
    return plan.with_terms(terms, captures_resident=True)


def head_bytes(sizes: Sizes, n_tokens: int, at_once: int = HEAD_TOKENS) -> int:
    """Peak of the head: the gradient so far, and the logits of a chunk of the tokens.

    In one block: log-softmax, its gradient and the loss's, in float32: 12 bytes a logit, and the
    gaps that many chunks leave. In several: the logits as they are, in float32 and as exponentials;
    and two float32 sums for the gradient, on a device only of the tokens that are there `at_once`,
    with a kernel that counts logits as they are, or a part of them in float32.
    """
    if not sizes.head:
        return 0
    n_rows, n_hidden = sizes.head[0][0].shape  # (v, C)
    most = max(1, LOGITS_BYTES // (4 * n_rows))
    gradient = n_tokens * sizes.hidden_bytes
    if len(sizes.head) == 1:
        return 2 * gradient + 14 * n_rows * min(n_tokens, most)
    chunk = min(n_tokens, at_once)
    if sizes.on_cpu:
        chunk = min(chunk, most)
        return gradient + 8 * n_hidden * n_tokens + chunk * (10 * n_rows + 10 * n_hidden)
    item = sizes.hidden_bytes / n_hidden
    made = max(item, 10 * PLAIN_FRACTION) * (n_rows + n_hidden)
    return gradient + math.ceil(chunk * ((4 + item) * n_hidden + made))


def weights_read(sizes: Sizes, plan: Plan, lowest: int = 0) -> Counter:
    """Size of a slot -> weights that a training step reads in the steady state.

    lowest: the lowest trained layer. What has a slot is resident at each turn, from forward to
    backward and from step to step, unless the layers below `lowest` come between.
    """
    found: Counter = Counter()
    every = Counter(weight.slot_bytes for unit in sizes.layers for weight in unit)
    below = Counter(weight.slot_bytes for unit in sizes.layers[:lowest] for weight in unit)
    for size, count in every.items():
        back, slots = count - below[size], plan.slots[size]
        if plan.by_matrix and slots * len(sizes.layers) < count:
            turns = slots * (len(sizes.layers) - lowest)  # from recompute to gradient
            found[size] += plan.n_micro_batches * (count + 2 * back) - turns
        elif plan.by_matrix:
            found[size] += count + back
        elif slots < count:
            found[size] += count - max(0, slots - below[size]) + max(0, back - slots)
    head = Counter(weight.slot_bytes for unit in sizes.head for weight in unit)
    n_rounds = plan.head.n_rounds if plan.head else 1
    return found + Counter({size: n_rounds * n for size, n in head.items() if n > plan.slots[size]})


def bytes_read(sizes: Sizes, plan: Plan, lowest: int = 0) -> int:
    """Bytes that a training step reads in the steady state."""
    return slots_bytes(weights_read(sizes, plan, lowest))
