"""Records -> pandas tables and figures, for the notebooks."""

import io
import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import pandas as pd
from IPython.display import display

from onn_core.config import TrainConfig
from onn_core.record import RunRecord
from onn_workbench.figure import Figure, Line, Panel, Scale
from onn_workbench.tables import frame


def summary_table(records: dict[str, RunRecord]) -> pd.DataFrame:
    """One row a run: what it trained, and its held-out loss before and after."""
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
    return frame(rows, "run")


def learned(records: Sequence[RunRecord], least_fall: float = 0.02) -> bool:
    """Whether held-out loss fell, in every run, by more than `least_fall` of where it began."""
    falls = [1 - record.evals[-1].loss / record.evals[0].loss for record in records]
    return min(falls) > least_fall


def answers_reading(answers: Sequence[Any]) -> str:
    """How the answers changed, in numbers; answers: of `onn_core.answers`, with an adapter."""
    changed = sum(one.answer != one.base_answer for one in answers)
    before, after = (
        statistics.fmean(len(getattr(one, name).split()) for one in answers)
        for name in ("base_answer", "answer")
    )
    lengths = f"{before:.0f} words before and {after:.0f} after, on average"
    return f"{changed} of {len(answers)} answers changed; {lengths}."


def learning_curve(records: dict[str, RunRecord]) -> Figure:
    """Held-out and training loss against samples seen."""
    lines = loss_lines(records, "samples_seen")
    panel = Panel(lines, "samples seen", "loss (nats per counted token)")
    return Figure([[panel]], "learning curve")


def loss_lines(records: dict[str, RunRecord], against: str) -> list[Line]:
    """Training (thin) and held-out loss of each record; against: "step" or "samples_seen"."""
    lines = []
    for number, (label, record) in enumerate(records.items()):
        x = [step.step for step in record.steps]
        if against == "samples_seen":
            x = list(itertools.accumulate(step.samples for step in record.steps))
        losses = [step.loss for step in record.steps]
        lines.append(Line(f"{label}, training", x, losses, number, width=1))
        x, losses = [getattr(e, against) for e in record.evals], [e.loss for e in record.evals]
        if record.evals:
            lines.append(Line(f"{label}, held-out", x, losses, number))
    return lines


def norm_lines(record: RunRecord, scale: Scale, mode: str) -> list[Line]:
    """The gradient norm of each trained layer over the steps."""
    lines = []
    for layer in record.steps[-1].grad_norm_by_layer:
        norms = [step.grad_norm_by_layer[layer] for step in record.steps]
        x, colour = [step.step for step in record.steps], scale.colour(int(layer))
        lines.append(Line("", x, norms, mode=mode, width=1, colour=colour))
    return lines


class LiveLine:
    """An `on_step` that shows the last step of a run, or of each of several, in a line.

    n_steps, label: of one run. configs: of several, by label.
    """

    def __init__(
        self,
        n_steps: int | None = None,
        label: str = "",
        configs: Mapping[str, TrainConfig] | None = None,
    ):
        self.n_steps, self.label = n_steps, label
        self.configs = {name: own.without_paths() for name, own in (configs or {}).items()}
        self.lines: dict[str, str] = {}
        self.handle = None

    def __call__(self, record: RunRecord) -> None:
        step, configs = record.steps[-1], self.configs
        label = next((name for name, own in configs.items() if own == record.config), self.label)
        n_steps = record.config["max_steps"] if configs else self.n_steps
        text = (f"{label}: " if label else "") + f"step {step.step}"
        text += (f" of {n_steps}" if n_steps else "") + f": loss {step.loss:.3f}"
        text += f", held-out loss {record.evals[-1].loss:.3f}" if record.evals else ""
        self.lines[label] = text if configs else f"{text}, {record.wall_s:.0f} s"
        known = [self.lines[name] for name in [*configs, self.label] if name in self.lines]
        bundle = {"text/plain": "\n".join(known)}
        if self.handle is None:
            self.handle = display(bundle, raw=True, display_id=True)
        else:
            self.handle.update(bundle, raw=True)


class Once(io.TextIOBase):
    """Instead of standard error for several runs: what each of them says of the data, once."""

    def __init__(self, target: TextIO):
        self.target, self.before, self.line = target, set(), ""

    def write(self, text: str) -> int:
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            if line not in self.before:
                self.before.add(line)
                self.target.write(f"{line}\n")
        return len(text)
