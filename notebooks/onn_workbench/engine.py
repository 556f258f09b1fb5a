"""What the workbench asks of a model that may be this project's or a peer's."""

import contextlib
from typing import Any

from onn_core.streaming.model import StreamedModel
from onn_core.streaming.visits import Event

PHASES = ("forward", "head", "backward")


def counts(model: Any) -> dict[str, float]:
    """Seconds and bytes since the model was opened; nothing for a peer's."""
    if not isinstance(model, StreamedModel):
        return {}
    done = model.counts()
    found = {f"{phase}_s": done.seconds[phase] for phase in PHASES}
    return found | {"wait_s": done.wait_s, "bytes_streamed": done.bytes_read}


def count_reserved_graphs(model: Any) -> int:
    """Layers whose graph is reserved between forward and backward, so that none is recomputed."""
    return model.count_reserved_graphs() if isinstance(model, StreamedModel) else 0


def trace(model: Any) -> contextlib.AbstractContextManager[list[Event]]:
    """A list to which the model adds what it reads and computes, and when."""
    return model.trace() if isinstance(model, StreamedModel) else contextlib.nullcontext([])
