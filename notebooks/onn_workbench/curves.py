"""A study -> tables, and learning curves with a band over the seeds."""

import itertools
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from onn_core.record import RunRecord, write_atomic
from onn_workbench import pages
from onn_workbench.figure import Figure, Line, Panel, Scale
from onn_workbench.report import norm_lines
from onn_workbench.study import RULE, Runs, Study, compare, fall, verdict
from onn_workbench.tables import frame, two_digits

AXES = {"samples_seen": "samples seen", "step": "optimizer steps (logarithmic)"}
SHUFFLED = "control, shuffled targets"
STILL = "control, learning rate 0"
MARKED = 20  # points at most of a line of gradient norms whose points are marked
Curve = list[tuple[float, float, float, float]]  # x, mean, lowest, highest over the seeds


def verdict_table(runs: Runs, reference: Sequence[RunRecord]) -> pd.DataFrame:
    """One row a configuration: held-out loss before and after, and what the rule says."""
    rows = []
    for label, records in runs.items():
        found = verdict(records, reference)
        against = f"{found['against_shuffled']:+.3f} ± {found['against_shuffled_noise']:.3f}"
        norms = [two_digits(found[f"grad_norm_{which}"]) for which in ("least", "most")]
        rows.append(
            {
                "configuration": label,
                "seeds": found["seeds"],
                "steps": records[0].steps[-1].step,
                "held-out loss before": f"{found['loss_before']:.3f}",
                "after": f"{found['loss_after']:.3f}",
                "fall ± noise (%)": f"{100 * found['fall']:.1f} ± {100 * found['noise']:.1f}",
                "against shuffled targets ± noise": against,
                "gradient norms": " to ".join(norms),
                "NaN or Inf": found["nonfinite"],
                "learned": found["learned"],
            }
        )
    return frame(rows, "configuration")


def comparison_table(runs: Runs) -> pd.DataFrame:
    """Final held-out loss of each configuration against the first, seed by seed."""
    first, *others = runs
    rows = []
    for label in others:
        mean, noise, words = compare(runs[first], runs[label])
        rows.append(
            {
                "configuration": label,
                f"final held-out loss against {first} ± noise": f"{mean:+.3f} ± {noise:.3f}",
                "reading": words,
            }
        )
    return frame(rows, "configuration")


def layout_table(layouts: Runs) -> pd.DataFrame:
    """One row a choice of layers, all trained for the same time."""
    rows = []
    for label, records in layouts.items():
        falls = [100 * fall(record) for record in records]
        steps = [step for record in records for step in record.steps]
        spread = f"{min(falls):.1f} to {max(falls):.1f}" if len(falls) > 1 else "one seed"
        rows.append(
            {
                "layers with adapters": label,
                "trained parameters": records[0].model["trainable"],
                "training time (s)": round(sum(s.step_s for s in steps) / len(records), 1),
                "steps": round(statistics.fmean(r.steps[-1].step for r in records)),
                "samples": round(sum(step.samples for step in steps) / len(records)),
                "fall of held-out loss (%)": round(statistics.fmean(falls), 1),
                "over the seeds (%)": spread,
            }
        )
    return frame(rows, "layers with adapters")


def layout_reading(layouts: Runs) -> str:
    """Which choice of layers lowered held-out loss most, and whether that passes the noise."""
    if not layouts:
        return "Not compared in this profile: one seed of a few seconds would tell nothing."
    ranked = sorted(layouts, key=lambda label: -statistics.fmean(map(fall, layouts[label])))
    best, second = ranked[:2]
    _, noise, words = compare(layouts[second], layouts[best])
    settled = "by more than the noise over the seeds"
    if noise == float("inf"):
        settled = "one seed cannot tell whether that is more than chance"
    elif words != "lower":
        settled = f"but not {settled}"
    return f"Lowest held-out loss at equal time: {best}, before {second}; {settled}."


def norm_table(runs: Runs) -> pd.DataFrame:
    """Median gradient norm of each trained layer, over all steps and seeds."""
    columns = {}
    for label, records in runs.items():
        steps = [step for record in records for step in record.steps]
        columns[label] = {
            int(layer): f"{statistics.median(s.grad_norm_by_layer[layer] for s in steps):.2g}"
            for layer in steps[0].grad_norm_by_layer
        }
    return pd.DataFrame(columns).rename_axis("layer")


def answer_table(study: Study) -> pd.DataFrame:
    """The model's answers before and after, side by side."""
    return pd.DataFrame(study.answers).set_index("prompt")


def held_out_curve(records: Sequence[RunRecord], against: str) -> Curve:
    """The change of held-out loss since the start: seeds differ far more in where they start.

    against: a field of `EvalRecord`.
    """
    runs = []
    for record in records:
        first = record.evals[0].loss
        runs.append([(getattr(done, against), done.loss - first) for done in record.evals])
    return _band(runs)


def training_curve(records: Sequence[RunRecord], against: str) -> Curve:
    """Mean training loss since the evaluation before, at each evaluation."""
    runs = []
    for record in records:
        points = []
        for first, last in itertools.pairwise(record.evals):
            steps = [step for step in record.steps if first.step < step.step <= last.step]
            loss = sum(step.loss * step.counted_tokens for step in steps)
            n_counted = sum(step.counted_tokens for step in steps)
            points.append((getattr(last, against), loss / n_counted))
        runs.append(points)
    return _band(runs)


def study_figure(runs: Runs, controls: Runs) -> Figure:
    """Held-out and training loss against samples and steps.

    The shuffled control, whose losses are far from the others, has panels of its own; the one with
    learning rate 0, which does not train, has no training loss.
    """
    numbers = {label: number for number, label in enumerate([*runs, *controls])}
    columns = [(against, runs | controls, title, "") for against, title in AXES.items()]
    for _, shown, _, _ in columns:
        shown.pop(SHUFFLED, None)
    if SHUFFLED in controls:
        alone = {SHUFFLED: controls[SHUFFLED]}
        columns.append(("samples_seen", alone, AXES["samples_seen"], SHUFFLED))
    rows = []
    for curve, y in (
        (held_out_curve, "change of held-out loss"),
        (training_curve, "training loss"),
    ):
        panels = []
        for against, chosen, x_title, title in columns:
            lines = []
            for label, records in chosen.items():
                if curve is training_curve and label == STILL:
                    continue  # the loss of its one step, of few samples, would stretch the axis
                points = curve(records, against)
                if against == "step":  # a logarithm has no place for the start
                    points = [point for point in points if point[0] > 0]
                x, mean, *band = zip(*points, strict=True)
                lines.append(Line(label, x, mean, numbers[label], band))
            y_title = f"{y} (nats/token)"
            panels.append(Panel(lines, x_title, y_title, title, log_x=against == "step"))
        rows.append(panels)
    return Figure(rows, "learning curves")


def norm_figure(runs: Runs) -> Figure:
    """Gradient norm of every trained layer over the steps of each configuration's first seed."""
    panels = []
    for label, (record, *_) in runs.items():
        scale = Scale("decoder layer", 0, record.model["layers"] - 1)
        mode = "lines" if len(record.steps) > MARKED else "lines+markers"
        lines = norm_lines(record, scale, mode=mode)
        y = "gradient norm of a layer"
        panels.append(Panel(lines, "optimizer steps", y, label, log_y=True, scale=scale))
    rows = [panels[start : start + 2] for start in range(0, len(panels), 2)]
    return Figure(rows, "gradient norms by layer")


def answer(runs: Runs, controls: Runs, reference: Sequence[RunRecord]) -> str:
    """The answer to the study's two questions: does it learn, and as well in large batches?"""
    first, *others = runs
    learned = {
        label: verdict(records, reference)["learned"]
        for label, records in (runs | controls).items()
    }
    lines = []
    for label, records in runs.items():
        found = verdict(records, reference)
        fell = f"held-out loss falls by {100 * found['fall']:.1f} ± {100 * found['noise']:.1f} %"
        lines.append(f"Does it learn? {label}: {learned[label]}, {fell}.")
    for label in others:
        mean, noise, words = compare(runs[first], runs[label])
        by = f"{abs(mean):.3f} ± {noise:.3f} than {first}"
        said = {"lower": f"YES, better by {by}", "higher": f"NO, worse by {by}"}
        still = f"{words}, {mean:+.3f} ± {noise:.3f} against {first}"
        lines.append(f"As well as in the smallest batch? {label}: {said.get(words, still)}.")
    fooled = [label for label in controls if learned[label] == "YES"]
    lines.append("A control learned: no answer above counts." if fooled else "No control learned.")
    return "\n".join(lines)


def exactness(study: Study) -> str:
    """In words, how far the streamed losses are from those of in-memory PEFT."""
    lines = []
    for label, losses in study.in_memory.items():
        steps = study.runs[label][0].steps
        apart = [abs(step.loss - loss) for step, loss in zip(steps, losses, strict=False)]
        found = f"{max(apart):.1g} apart at most" if max(apart) else "equal to the last bit"
        first = f"{apart[0]:.1g} in the first step"
        both = f"{label}, {len(losses)} steps: streamed and in-memory losses are"
        lines.append(f"{both} {found}; {first}.")
    return "\n".join(lines)


def write_files(study: Study, folder: str | Path) -> None:
    """learning_results.json, learning_curves.png, learning_validation.html and, for trackers, the
    record of each configuration's first seed, in `folder`."""
    folder = Path(folder)
    picture = study_figure(study.runs, study.controls).png()
    study.save(folder / "learning_results.json")
    write_atomic(folder / "learning_curves.png", picture)
    for label, records in (study.runs | study.controls).items():
        name = re.sub(r"\W+", "_", label)
        records[0].save(folder / f"02_{name}.json")
    record = next(iter(study.runs.values()))[0]
    model, corpus, machine = record.model, record.data, record.environment
    sections = {
        "Answer": [pages.code(answer(study.runs, study.controls, study.reference))],
        "Verdicts": [
            pages.paragraph(RULE),
            pages.table(verdict_table(study.runs | study.controls, study.reference)),
        ],
        "Learning curves": [
            pages.picture(picture, "held-out and training loss"),
            pages.paragraph(
                "Line: mean over the seeds; band: lowest to highest. Held-out loss is shown as its "
                "change since the start, because each seed holds out other samples."
            ),
        ],
        "Against the baseline": [pages.table(comparison_table(study.runs))],
        "Against PEFT in memory": [pages.code(exactness(study))],
        "Gradient norms: median of each trained layer": [pages.table(norm_table(study.runs))],
        "Which layers, at equal training time": [
            pages.table(layout_table(study.layouts)),
            pages.paragraph(layout_reading(study.layouts)),
        ],
        "Answers": [pages.table(answer_table(study))],
    }
    about = pages.paragraph(
        f"{model['name']}, {model['parameters']:,} parameters, {model['trainable']:,} trained, on "
        f"{corpus['name']}: {corpus['train']} training and {corpus['held_out']} held-out samples. "
        f"{machine['processor']}, {machine['cores']} cores, device {machine['device']}, "
        f"{machine['date']}."
    )
    pages.write_page(
        folder / "learning_validation.html", "Learning validation", sections, before=[about]
    )


def _band(runs: list[list[tuple[float, float]]]) -> Curve:
    curve = []
    for points in zip(*runs, strict=False):  # a run that stopped ends the band
        xs, losses = zip(*points, strict=True)
        curve.append((statistics.fmean(xs), statistics.fmean(losses), min(losses), max(losses)))
    return curve
