"""What the workbench asks of a model that may be this project's or a peer's."""

import contextlib
from pathlib import Path
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
    return found | {"wait_s": done.wait_s, "bytes_streamed": done.bytes_fetched}


def count_reserved_graphs(model: Any) -> int:
    """Layers whose graph is reserved between forward and backward, so that none is recomputed."""
    return model.count_reserved_graphs() if isinstance(model, StreamedModel) else 0


def plan(model: Any) -> dict[str, Any]:
    """What a step was planned as; nothing for a peer's."""
    if not isinstance(model, StreamedModel):
        return {}
    taken = model.plan
    return {
        "resident_layers": taken.n_resident,
        "boundaries": taken.boundaries,
        "captured": taken.captured,
        "planned_peak_bytes": taken.peak_bytes,
        "readers": model.streaming.stream.reader_count.now,
    }


def micro_batch_size(model: Any, batch_size: int) -> int:
    """Samples that go through a layer together; a peer's are all of them."""
    own = model.micro_batch_size if isinstance(model, StreamedModel) else None
    return own or batch_size


def process_bytes(field: str) -> int:
    """A count of bytes of this process, in the words of /proc/self/io.

    "read_bytes" came from a disk, by reads or by mapped pages; "rchar" by calls to read.
    """
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines).get(field, 0))


def trace(model: Any) -> contextlib.AbstractContextManager[list[Event]]:
    """A list to which the model adds what it reads and computes, and when."""
    return model.trace() if isinstance(model, StreamedModel) else contextlib.nullcontext([])
