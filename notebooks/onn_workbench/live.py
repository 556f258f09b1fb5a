"""The picture of a run while it goes on: loss, gradient norms, what was read and computed when."""

from collections.abc import Sequence

from onn_core.record import RunRecord
from onn_workbench.figure import Bars, Figure, Line, Panel

PHASES = ("read", "forward", "head", "backward")  # of the timeline, from the top
STEPS = "optimizer steps"


def figure(
    records: dict[str, RunRecord], events: Sequence[tuple[str, int, float, float]] = ()
) -> Figure:
    """Losses of all records, gradient norms of the first, and the timeline `events`."""
    losses = []
    for number, (label, record) in enumerate(records.items()):
        x, y = [step.step for step in record.steps], [step.loss for step in record.steps]
        losses.append(Line(f"{label}, training", x, y, number, width=1))
        if record.evals:
            x, y = [e.step for e in record.evals], [e.loss for e in record.evals]
            losses.append(Line(f"{label}, held-out", x, y, number, width=2.5))
    y = "gradient norm of a layer"
    top = [
        Panel(losses, STEPS, "loss (nats per counted token)"),
        Panel(_norms(next(iter(records.values()))), STEPS, y, log_y=True),
    ]
    timeline = Panel(_timeline(events), "time in the last step (s)", rows=PHASES, height=2)
    return Figure([top, [timeline]], "losses, gradient norms, timeline of the last step", width=10)


def _norms(record: RunRecord) -> list[Line]:
    """A line for each trained layer, dark for the first and light for the last."""
    from matplotlib import colormaps, colors

    layers, lines = list(record.steps[-1].grad_norm_by_layer), []
    for layer in layers:
        norms = [step.grad_norm_by_layer[layer] for step in record.steps]
        share = int(layer) / max(1, record.model["layers"] - 1)
        label = f"layer {layer}" if layer in (layers[0], layers[-1]) else ""
        colour = colors.to_hex(colormaps["viridis"](share))
        x = [step.step for step in record.steps]
        lines.append(Line(label, x, norms, width=1, colour=colour))
    return lines


def _timeline(events: Sequence[tuple[str, int, float, float]]) -> list[Bars]:
    """Bars of what went on in the last step: reads above, computing below."""
    begin = min((start for what, _, start, _ in events if what != "read"), default=0.0)
    bars = []
    for row, phase in enumerate(PHASES):
        spans = [(start - begin, stop - begin) for what, _, start, stop in events if what == phase]
        starts, stops = zip(*spans, strict=True) if spans else ((), ())
        bars.append(Bars("", [row] * len(spans), starts, stops, row, height=0.7))
    return bars
