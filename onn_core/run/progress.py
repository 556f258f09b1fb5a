"""A bar over optimizer steps that also shows the layer, the read rate and the time left."""

import contextlib
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

from onn_core.streaming.model import StreamedModel

UPDATE_S = 0.5  # between two updates within a step: one of a large model can take minutes


@contextlib.contextmanager
def step_bar(
    model: StreamedModel, n_steps: int, enabled: bool = True, name: str = ""
) -> Iterator[tqdm]:
    """A bar of `n_steps` on standard error that the visits of `model` keep alive within a step.

    name: of the run, where several have a bar each.
    """
    how = {"disable": not enabled, "file": sys.stderr, "dynamic_ncols": True}
    bar = tqdm(desc=name or None, total=n_steps, unit="step", **how)
    n_layers = len(model.streamed_layers)
    began = shown = time.perf_counter()
    shown_bytes = n_visits = 0

    def show(phase: str, unit: int) -> None:
        nonlocal began, shown, shown_bytes, n_visits
        now, n_bytes = time.perf_counter(), model.counts().bytes_read
        if unit == 0 and phase == "forward":
            n_visits, began = 0, now
        n_visits += 1
        if now - shown < UPDATE_S:
            return
        place = f"layer {unit + 1}/{n_layers}" if unit < n_layers else "head"
        rate = (n_bytes - shown_bytes) / (now - shown) / 1e9
        left_s = (now - began) / n_visits * max(0, model.n_visits_in_step() - n_visits)
        what = f"{name} {phase} {place}".lstrip()
        bar.set_description_str(f"{what} {rate:.2f} GB/s, {left_s:.0f} s left in pass")
        shown, shown_bytes = now, n_bytes

    handle = model.on_visit(show)
    try:
        with bar:
            yield bar
    finally:
        handle.remove()
