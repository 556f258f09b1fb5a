"""One plan for several models that run together: their weights are shared, all else adds up.

`streaming/together.py` runs them, in turns, over one stream.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence

from onn_core.errors import ConfigError, TooManyRunsError
from onn_core.memory.plan import Plan, make_plan
from onn_core.memory.planner import Planner

# What a model holds while it waits for another between two layers, in boundary activations: its
# present one with its gradient, and at a head of several blocks two float32 sums.
WAITING = 6
# Rows in one product on a CPU, at most: more are not faster, and the activations of the models that
# share it are in memory at once.
SHARED_ROWS = 256


@dataclasses.dataclass
class Part:
    """What one of the models asks for, at most; its micro-batch is the one it would have alone."""

    planner: Planner
    chunk_size: int
    batch_size: int = 1
    n_tokens: int = 1  # of a sample
    micro_batch_size: int = 1
    n_trained: int = 0  # parameters
    visit_bytes: int = 0  # of its largest visit

    @property
    def n_rows(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch_size * self.n_tokens

    def batch_bytes(self) -> int:
        """A boundary activation of the whole batch."""
        return self.batch_size * self.n_tokens * self.planner.sizes.hidden_bytes

    def ask(self, batch_size: int, n_tokens: int, n_trained: int, plan: Plan) -> None:
        """Alone, the model would have `plan` for batches (B, T)."""
        self.n_trained = n_trained
        visit_bytes = plan.terms.activations + plan.terms.captured_visits
        if self.planner.budget is not None and visit_bytes > self.visit_bytes:
            self.batch_size, self.n_tokens = batch_size, n_tokens
            self.micro_batch_size = plan.micro_batch_size
            self.visit_bytes = visit_bytes


def plan_together(parts: Sequence[Part]) -> list[Plan]:
    """The plan of each model, with the slots of all; no graph is reserved.

    TooManyRunsError, with the sum and how many would fit, if the budget has no room for all.
    """
    budget = parts[0].planner.budget
    if budget is None:
        slots = functools.reduce(operator.or_, (part.planner.plan.slots for part in parts))
        n_resident = max(part.planner.plan.n_resident for part in parts)
        dense = functools.reduce(operator.or_, (part.planner.plan.dense for part in parts))
        changes = {"slots": slots, "n_resident": n_resident, "dense": dense}
        return [dataclasses.replace(part.planner.plan, **changes) for part in parts]
    away = "disk" if parts[0].planner.sizes.on_cpu else "host"
    for place in ("memory", away):
        try:
            whole = _plan_sum(parts, place, budget)
        except ConfigError as error:
            if place == "memory":
                continue
            if len(parts) == 1:
                raise
            fits = next(n for n in range(len(parts) - 1, 0, -1) if n == 1 or _fits(parts[:n]))
            raise TooManyRunsError(
                f"{len(parts)} runs in one pass need {_plan_sum(parts, place, None).terms}, which "
                f"a memory_budget of {budget / 2**20:.0f} MiB has no room for: at most {fits} fit."
            ) from error
        if place == "memory" and whole.boundaries != place:  # those of the others have no room
            continue
        changes = {
            "slots": whole.slots,
            "n_resident": whole.n_resident,
            "n_reserved": 0,
            "dense": whole.dense,
            "casts_once": whole.casts_once,
            "boundaries": place,
        }
        # A run that went in rounds through the head would visit it more often than the others.
        changes["head"] = whole.head and dataclasses.replace(whole.head, n_rounds=1)
        return [part.planner.plan.with_terms(whole.terms, **changes) for part in parts]
    raise AssertionError("the last place returns or raises")


def _fits(parts: Sequence[Part]) -> bool:
    try:
        return bool(plan_together(parts))
    except ConfigError:
        return False


def _plan_sum(parts: Sequence[Part], place: str, budget: int | None) -> Plan:
    """The plan of the part with the largest visit, beside all that the others hold."""
    largest = max(parts, key=lambda part: part.visit_bytes)
    n_layers = len(largest.planner.sizes.layers)
    others = [part for part in parts if part is not largest]
    saved = sum(n_layers * part.batch_bytes() for part in others) if place == "memory" else 0
    held = sum(part.planner.sizes.held_bytes + WAITING * part.batch_bytes() for part in others)
    visit_bytes = largest.planner.sizes.visit_bytes
    if largest.planner.sizes.on_cpu:  # models that share products are in a visit at once
        at_once = min(SHARED_ROWS, sum(part.n_rows for part in parts))
        visit_bytes = _scaled(visit_bytes, max(1, at_once / largest.n_rows))
    else:  # its head has the sums of all tokens, in one round
        held += WAITING * largest.batch_bytes()
    sizes = dataclasses.replace(
        largest.planner.sizes,
        visit_bytes=visit_bytes,
        held_bytes=largest.planner.sizes.held_bytes + held + saved,
        n_trained=sum(part.n_trained for part in parts),
        n_back=0,
    )
    plan = make_plan(
        sizes,
        largest.batch_size,
        largest.n_tokens,
        budget,
        max(part.chunk_size for part in parts),
        largest.micro_batch_size,
    )
    terms = plan.terms
    there, boundaries = terms.always_there - saved, terms.boundaries + saved
    return plan.with_terms(dataclasses.replace(terms, always_there=there, boundaries=boundaries))


def _scaled(
    visit_bytes: Callable[[int, int], tuple[int, int, int]], factor: float
) -> Callable[[int, int], tuple[int, int, int]]:
    """What so many visits of (B, T) take at once."""
    return lambda batch_size, n_tokens: visit_bytes(math.ceil(factor * batch_size), n_tokens)
