"""A bar over optimizer steps that also shows the layer, the read rate and the time left."""

import sys
import time

from tqdm import tqdm

from onn_core.streaming.session import Session

UPDATE_S = 0.5  # between two updates within a step: one of a large model can take minutes


def step_bar(session: Session, n_steps: int, enabled: bool = True) -> tqdm:
    """A bar of `n_steps` on standard error that `session` keeps alive within a step."""
    bar = tqdm(total=n_steps, disable=not enabled, file=sys.stderr, unit="step", dynamic_ncols=True)
    began = shown = time.perf_counter()
    shown_bytes = n_visits = 0

    def show(phase: str, unit: int) -> None:
        nonlocal began, shown, shown_bytes, n_visits
        now, n_bytes = time.perf_counter(), session.stream.counts.bytes_read
        if unit == 0 and phase == "forward":
            n_visits, began = 0, now
        n_visits += 1
        if now - shown < UPDATE_S:
            return
        place = f"layer {unit + 1}/{session.n_layers}" if unit < session.n_layers else "head"
        rate = (n_bytes - shown_bytes) / (now - shown) / 1e9
        n_left = max(0, len(session.forward_pass()) - n_visits)
        left_s = (now - began) / n_visits * n_left
        bar.set_description_str(f"{phase} {place} {rate:.2f} GB/s, {left_s:.0f} s left in pass")
        shown, shown_bytes = now, n_bytes

    session.on_visit = show
    return bar
