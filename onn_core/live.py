"""The picture of a run while it goes on: loss, gradient norms, what was read and computed when."""

import io
from collections.abc import Sequence
from typing import Any

from onn_core.record import RunRecord
from onn_core.report import COLOURS

ROWS = ("read", "forward", "head", "backward")  # of the timeline, from the top


def figure(
    records: dict[str, RunRecord], events: Sequence[tuple[str, int, float, float]] = ()
) -> bytes:
    """A PNG: losses of all records, gradient norms of the first, and the timeline `events`."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 6), layout="constrained")
    grid = drawn.add_gridspec(2, 2, height_ratios=(3, 2))
    losses = drawn.add_subplot(grid[0, 0])
    for (label, record), colour in zip(records.items(), COLOURS, strict=False):
        steps = [step.step for step in record.steps]
        style = {"color": colour, "linewidth": 1, "marker": "."}
        values = [step.loss for step in record.steps]
        losses.plot(steps, values, label=f"{label}, training", **style)
        if record.evals:
            style |= {"linewidth": 2, "linestyle": "--", "marker": "s", "markersize": 4}
            at, values = [e.step for e in record.evals], [e.loss for e in record.evals]
            losses.plot(at, values, label=f"{label}, held-out", **style)
    losses.set(xlabel="optimizer steps", ylabel="loss (nats per counted token)")
    losses.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=2)
    _draw_norms(drawn, drawn.add_subplot(grid[0, 1]), next(iter(records.values())))
    _draw_timeline(drawn.add_subplot(grid[1, :]), events)
    for axes in drawn.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _draw_norms(drawn: Any, axes: Any, record: RunRecord) -> None:
    """A line for each trained layer, dark for the first and light for the last."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = Normalize(0, max(1, record.model["layers"] - 1))
    steps = [step.step for step in record.steps]
    for layer in record.steps[-1].grad_norm_by_layer:
        norms = [step.grad_norm_by_layer[layer] for step in record.steps]
        colour = colormaps["viridis"](scale(int(layer)))
        axes.plot(steps, norms, color=colour, linewidth=1, marker=".")
    axes.set(xlabel="optimizer steps", ylabel="gradient norm of a layer", yscale="log")
    drawn.colorbar(ScalarMappable(scale, "viridis"), ax=axes, label="layer")
    for side in (axes, drawn.axes[0]):
        side.xaxis.get_major_locator().set_params(integer=True)


def _draw_timeline(axes: Any, events: Sequence[tuple[str, int, float, float]]) -> None:
    """Bars of what went on in the last step: reads above, computing below."""
    begin = min((start for what, _, start, _ in events if what != "read"), default=0.0)
    for row, (what, colour) in enumerate(zip(ROWS, COLOURS, strict=False)):
        spans = [(start - begin, stop - start) for w, _, start, stop in events if w == what]
        axes.broken_barh(spans, (row - 0.35, 0.7), facecolors=colour)
    axes.set_yticks(range(len(ROWS)), ROWS)
    axes.set_ylim(len(ROWS) - 0.5, -0.5)
    axes.set(xlabel="time in the last step (s)")
