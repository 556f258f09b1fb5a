"""What the workbench asks of a streamed model; no other module here reaches into one."""

import contextlib
from collections.abc import Iterator
from typing import Any

from onn_core.memory.plan import Sizes
from onn_core.weights.items import Item

Event = tuple[str, int, float, float]  # phase or "read", unit, start and stop by time.perf_counter
PHASES = ("forward", "head", "backward")


def is_streamed(model: Any) -> bool:
    """Whether `model` is this project's, and not one of a peer."""
    return hasattr(model, "session")


def units(model: Any) -> list[list[Item]]:
    """The weights of each decoder layer, then those of the head."""
    return model.session.stream.units


def sizes(model: Any) -> Sizes:
    """Of the model, as predictions take them."""
    return model.session.sizes


def counts(model: Any) -> dict[str, float]:
    """Seconds and bytes since the model was opened; nothing for a peer's."""
    if not is_streamed(model):
        return {}
    seconds, stream = model.session.seconds, model.session.stream
    found = {f"{phase}_s": seconds[phase] for phase in PHASES}
    return found | {"wait_s": stream.counts.wait_s, "bytes_streamed": stream.counts.bytes_read}


def count_resident_graphs(model: Any) -> int:
    """Layers whose graph is resident between forward and backward, so that none is recomputed."""
    return len(+model.session.kept) if is_streamed(model) else 0


@contextlib.contextmanager
def trace(model: Any) -> Iterator[list[Event]]:
    """A list to which the model adds what it reads and computes, and when."""
    events: list[Event] = []
    if is_streamed(model):
        model.session.trace = model.session.stream.trace = events
    try:
        yield events
    finally:
        if is_streamed(model):
            model.session.trace = model.session.stream.trace = None
