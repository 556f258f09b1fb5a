"""The picture of a run while it goes on: loss, gradient norms, what was read and computed when."""

from collections.abc import Callable, Sequence

from onn_core.record import RunRecord
from onn_core.streaming.visits import Event
from onn_workbench.figure import Bars, Figure, Panel, Scale
from onn_workbench.report import loss_lines, norm_lines
from onn_workbench.runs import held_out_key

PHASES = ("read", "forward", "head", "backward")  # of a timeline, from the top
STEPS = "optimizer steps"


def figure(records: dict[str, RunRecord], events: Sequence[Event] = ()) -> Figure:
    """Losses of all records, gradient norms of the first, and the timeline `events`.

    Held-out losses of other samples cannot be compared, so they have axes of their own.
    """
    first, title = next(iter(records.values())), "losses, gradient norms, timeline of the last step"
    kinds: dict[tuple[str, ...], list[str]] = {}
    for label, record in records.items():
        kinds.setdefault(held_out_key(record), []).append(label)
    lines, top = loss_lines(records, "step"), []
    for labels in kinds.values():
        own = [line for line in lines if line.label.rpartition(", ")[0] in labels]
        name = f"held-out samples of {labels[0]}" if len(kinds) > 1 else ""
        top.append(Panel(own, STEPS, "loss (nats per counted token)", title=name))
    scale = Scale("decoder layer", 0, first.model["layers"] - 1)
    lines = norm_lines(first, scale, mode="lines+markers")
    name = next(iter(records)) if len(records) > 1 else ""
    norms = Panel(lines, STEPS, "gradient norm of a layer", name, log_y=True, scale=scale)
    begin = min((start for what, _, start, _ in events if what != "read"), default=0.0)
    bars = phase_bars(events, lambda phase, _: PHASES.index(phase), height=0.7, begin=begin)
    timeline = Panel(bars, "time in the last step (s)", rows=PHASES, height=2)
    pairs = [*top, norms]
    rows = [pairs[i : i + 2] for i in range(0, len(pairs), 2)]
    return Figure([*rows, [timeline]] if events else rows, title)


def phase_bars(
    events: Sequence[Event],
    row_of: Callable[[str, int], float],
    height: float,
    begin: float = 0.0,
) -> list[Bars]:
    """Bars of what was read and computed, in seconds after `begin`; row_of: phase, unit -> row."""
    bars = []
    for number, phase in enumerate(PHASES):
        chosen = [event for event in events if event[0] == phase]
        rows = [row_of(phase, unit) for _, unit, _, _ in chosen]
        spans = ([event[place] - begin for event in chosen] for place in (2, 3))
        bars.append(Bars(phase, rows, *spans, number, height))
    return bars
