"""Records -> pandas tables and figures, for the notebooks."""

import io
import statistics
from collections.abc import Sequence
from typing import Any

from onn_core.record import RunRecord

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
DASHES = (("solid", "-"), ("dash", "--"), ("dot", ":"), ("dashdot", "-."))


def summary_table(records: dict[str, RunRecord]) -> Any:
    """One row a run: what it trained, and its held-out loss before and after."""
    import pandas as pd

    rows = []
    for label, record in records.items():
        first, last = record.evals[0].loss, record.evals[-1].loss
        norms = [step.grad_norm for step in record.steps]
        rows.append(
            {
                "run": label,
                "steps": len(record.steps),
                "samples": sum(step.samples for step in record.steps),
                "held-out before": round(first, 3),
                "held-out after": round(last, 3),
                "change (%)": round(100 * (last - first) / first, 1),
                "gradient norm, least": round(min(norms), 3),
                "gradient norm, most": round(max(norms), 3),
                "NaN or Inf": sum(step.nonfinite for step in record.steps),
                "s per step, median": round(statistics.median(s.step_s for s in record.steps), 2),
            }
        )
    return pd.DataFrame(rows, dtype=object).set_index("run")  # counts stay whole when transposed


def learned(records: Sequence[RunRecord], least_fall: float = 0.02) -> bool:
    """Whether held-out loss fell, in every run, by more than `least_fall` of where it began."""
    falls = [1 - record.evals[-1].loss / record.evals[0].loss for record in records]
    return min(falls) > least_fall


def learning_curve(
    records: dict[str, RunRecord], against: str = "samples", training: bool = True
) -> None:
    """Show held-out (marked) and training (thin) loss against "samples" seen or "steps"."""
    curves = []
    for label, record in records.items():
        samples = 0
        train_x, train_y = [], []
        for step in record.steps if training else ():
            samples += step.samples
            train_x.append(samples if against == "samples" else step.step)
            train_y.append(step.loss)
        held_x = [e.samples_seen if against == "samples" else e.step for e in record.evals]
        curves.append((label, train_x, train_y, held_x, [e.loss for e in record.evals]))
    x_title = "samples seen" if against == "samples" else "optimizer steps"
    show_both(_plotly_curve(curves, x_title), _matplotlib_curve(curves, x_title), "learning curve")


def show_both(live: dict[str, Any], picture: bytes, text: str) -> None:
    """One output that is live in JupyterLab and a picture everywhere else."""
    import base64

    from IPython.display import display

    bundle = {"application/vnd.plotly.v1+json": live, "text/plain": text}
    display({**bundle, "image/png": base64.b64encode(picture).decode()}, raw=True)


def png(figure: Any) -> bytes:
    """A matplotlib figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


class LiveLine:
    """An `on_step` that keeps one line of output up to date."""

    def __init__(self, n_steps: int | None = None, label: str = ""):
        self.of = f" of {n_steps}" if n_steps else ""
        self.label = label and f"{label}: "
        self.handle = None

    def __call__(self, record: RunRecord) -> None:
        from IPython.display import display

        step = record.steps[-1]
        held_out = f", held-out loss {record.evals[-1].loss:.3f}" if record.evals else ""
        text = f"{self.label}step {step.step}{self.of}: loss {step.loss:.3f}{held_out}"
        bundle = {"text/plain": f"{text}, {record.wall_s:.0f} s"}
        if self.handle is None:
            self.handle = display(bundle, raw=True, display_id=True)
        else:
            self.handle.update(bundle, raw=True)


def _plotly_curve(curves: list[tuple], x_title: str) -> dict[str, Any]:
    traces = []
    for number, (label, train_x, train_y, held_x, held_y) in enumerate(curves):
        colour, dash = COLOURS[number % 6], DASHES[number % 4][0]
        thin = {"color": colour, "width": 1, "dash": dash}
        if train_x:
            traces.append(
                {"type": "scatter", "x": train_x, "y": train_y, "name": f"{label}, training"}
                | {"mode": "lines", "line": thin, "opacity": 0.6}
            )
        traces.append(
            {"type": "scatter", "x": held_x, "y": held_y, "name": f"{label}, held-out"}
            | {"mode": "lines+markers", "line": {"color": colour, "width": 3, "dash": dash}}
        )
    y_title = "loss (nats per counted token)"
    layout = {"xaxis": {"title": {"text": x_title}}, "yaxis": {"title": {"text": y_title}}}
    return {"data": traces, "layout": layout | {"height": 420, "template": "plotly_white"}}


def _matplotlib_curve(curves: list[tuple], x_title: str) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, (label, train_x, train_y, held_x, held_y) in enumerate(curves):
        style = {"color": COLOURS[number % 6], "linestyle": DASHES[number % 4][1]}
        if train_x:
            axes.plot(train_x, train_y, linewidth=1, alpha=0.6, label=f"{label}, training", **style)
        axes.plot(held_x, held_y, linewidth=2.5, marker="o", label=f"{label}, held-out", **style)
    axes.set_xlabel(x_title)
    axes.set_ylabel("loss (nats per counted token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    return png(figure)
