"""Outcomes of the stability study: a table, a figure, JSON out and in."""

import dataclasses
import math
import os
from typing import Any

import pandas as pd

from onn_core.record import (
    SCHEMA_VERSION,
    RunRecord,
    describe_environment,
    from_json,
    read_json,
    write_json,
)
from onn_workbench.figure import Figure, Line, Panel
from onn_workbench.stability import FIXES, Event, Outcome
from onn_workbench.tables import frame


def outcome_table(outcomes: dict[str, Outcome]) -> pd.DataFrame:
    """One row a variant: the first NaN or Inf, loss, and how large values became."""
    rows = []
    for label, outcome in outcomes.items():
        first, last = outcome.steps[0], outcome.steps[-1]
        after = outcome.cross_entropy_after
        rows.append(
            {
                "configuration": label,
                "first NaN or Inf": str(outcome.first[0]) if outcome.first else "none",
                "loss, step 1": f"{first['loss']:.4g}",
                "cross-entropy before": f"{first['cross_entropy']:.3f}",
                "after": f"{after:.3f}",
                "largest activation": f"{max(s['largest_activation'] for s in outcome.steps):,.0f}",
                "gradient norm, step 1": f"{first['grad_norm']:.3g}",
                "steps skipped": f"{outcome.steps_skipped} of {len(outcome.steps)}",
                "adapters": "finite" if outcome.adapter_finite else f"NaN, step {last['step']}",
                "learned": "YES" if outcome.learned else "NO",
            }
        )
    return frame(rows, "configuration")


def event_table(events: list[Event]) -> pd.DataFrame:
    """One row for the first NaN or Inf of each phase, in order of time."""
    phases = {"backward": "gradients of activations", "gradient": "gradients of adapters"}
    phases |= {"forward": "activations", "loss": "loss", "update": "adapters after the update"}
    rows = [
        {
            "among": phases[event.phase],
            "first": str(event),
            "its values not finite": f"{event.share:.0%}",
            "largest before": f"{event.largest:,.0f}" if event.largest else "none",
        }
        for event in events
    ]
    return frame(rows, "among")


def fix_table(outcomes: dict[str, Outcome]) -> Any:
    """What each fix does, added to the broken configuration and taken from the sound one."""

    def fate(outcome: Outcome) -> str:
        if not outcome.adapter_finite:
            return "NaN"
        if outcome.steps_skipped == len(outcome.steps):
            return "skips every step"
        return "learns" if outcome.learned else "does not learn"

    rows = [("none", fate(outcomes["broken"]), fate(outcomes["sound"]))]
    for name in FIXES:
        added, taken = outcomes[f"broken + {name}"], outcomes[f"sound - {name}"]
        rows.append((name, fate(added), fate(taken)))
    return pd.DataFrame(rows, columns=["fix", "added to broken", "taken from sound"])


def error_table(errors: list[dict[str, float]]) -> Any:
    """Errors of `gradient_errors`: one row a number of counted tokens, one column a loss scale."""
    rows: dict[str, dict[str, str]] = {}
    for row in errors:
        scale = "no scaling" if row["loss_scale"] == 1 else f"loss scale {row['loss_scale']:,.0f}"
        shown = rows.setdefault(f"{row['counted_tokens']:,.0f}", {})
        shown[f"error with {scale} (%)"] = f"{100 * row['error']:.1f}"
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("counted tokens")


def step_table(record: RunRecord) -> pd.DataFrame:
    """One row an optimizer step under loss scaling."""
    rows = [
        {
            "step": step.step,
            "loss": f"{step.loss:.3f}",
            "gradient norm": f"{step.grad_norm:.3g}",
            "loss scale": f"2^{math.log2(step.loss_scale):.0f}",
            "skipped": "yes" if step.skipped else "no",
        }
        for step in record.steps
    ]
    return frame(rows, "step")


def headroom(curves: dict[str, dict[int, float]]) -> Figure:
    """Largest values by layer against the range of float16."""
    levels = {"float16, largest": 65504.0, "float16, smallest normal": 2.0**-14}
    lines = [
        Line(label, sorted(values), [values[layer] for layer in sorted(values)], number)
        for number, (label, values) in enumerate(curves.items())
    ]
    y = "largest absolute value"
    panel = Panel(lines, "decoder layer", y, log_y=True, levels=levels, height=4)
    return Figure([[panel]], "largest values by layer")


def save(path: str | os.PathLike, outcomes: dict[str, Outcome], **more: Any) -> None:
    """Write the study as JSON; `more` are further JSON values."""
    runs = {label: dataclasses.asdict(outcome) for label, outcome in outcomes.items()}
    content = {"schema_version": SCHEMA_VERSION, "environment": describe_environment()}
    write_json(path, content | {"runs": runs} | more)


def load(path: str | os.PathLike) -> dict[str, Outcome]:
    """The outcomes that `save` wrote; OnnError if the file holds none."""

    def build(content: dict[str, Any]) -> dict[str, Outcome]:
        return from_json(dict[str, Outcome], content["runs"])

    return read_json(path, build, "a stability study", "run it again")
