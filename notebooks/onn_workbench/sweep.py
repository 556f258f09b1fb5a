"""Many runs in one pass over the weights: which settings, what came of each, what it cost."""

import contextlib
import dataclasses
import functools
import io
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

import onn_core
from onn_core.__main__ import SettingsLoader
from onn_core.config import TrainConfig, expand_grid
from onn_core.errors import ConfigError
from onn_core.record import SCHEMA_VERSION, RunRecord, from_json, read_json, write_json
from onn_workbench.figure import Figure, Line, Panel, Parallel, Scale
from onn_workbench.peers import process_bytes
from onn_workbench.report import Once
from onn_workbench.study import compare, fall, thinned
from onn_workbench.tables import frame

LOSS = "held-out loss"
CHANGE = f"change of {LOSS}"  # from the first evaluation to the last; below 0 it fell


@dataclasses.dataclass
class Alone:
    """The first steps of a run by itself, and what all its steps would cost at that rate."""

    losses: list[float]  # of the first steps
    bytes_read: int
    step_s: float


@dataclasses.dataclass
class Sweep:
    """The runs of a sweep by name; `settings` are those in which they differ."""

    settings: dict[str, dict[str, Any]]
    runs: dict[str, RunRecord]
    bytes_read: int  # by all of them together
    alone: dict[str, Alone] = dataclasses.field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def save(self, path: str | os.PathLike) -> None:
        """Write the sweep as JSON."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Sweep":
        """Read a sweep that `save` wrote; OnnError if it is not one."""
        build = functools.partial(from_json, cls)
        return read_json(path, build, "a sweep", "run 07_sweep again")

    @property
    def finished(self) -> dict[str, RunRecord]:
        """The runs that came to their end, the one whose held-out loss fell most first.

        Not the one that ends lowest: another seed holds out other samples.
        """
        found = {name: run for name, run in self.runs.items() if run.status == "finished"}
        return dict(sorted(found.items(), key=lambda pair: _change(pair[1])))


def configs(text: str, **common: Any) -> dict[str, TrainConfig]:
    """The runs that `text` (YAML) means, by name: their folder in the common output_dir.

    A map from settings to lists of values means each combination, a list of maps a run each.
    ConfigError for what is neither.
    """
    try:
        choice = yaml.load(text, SettingsLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"the grid cannot be read ({error}): write YAML.") from error
    if isinstance(choice, Mapping):
        grids = [choice]
    elif isinstance(choice, list) and choice and all(isinstance(own, Mapping) for own in choice):
        grids = [{name: [value] for name, value in own.items()} for own in choice]
    else:
        raise ConfigError(
            f"a sweep is a map such as {{lora_rank: [4, 16]}} or a list of maps, not {text!r}."
        )
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown := sorted({str(name) for grid in grids for name in grid} - known):
        raise ConfigError(
            f"{', '.join(unknown)} is no setting of a run: choose among {', '.join(sorted(known))}."
        )
    runs = [own for grid in grids for own in expand_grid(common | {"grid": dict(grid)})]
    return {Path(own["output_dir"]).name: TrainConfig(**own) for own in runs}


def train(
    chosen: Mapping[str, TrainConfig],
    on_step: Callable[[RunRecord], None] = lambda record: None,
    resume: bool = False,
) -> Sweep:
    """Train all in one pass; a run that fails leaves the others going. OnnError if all fail."""
    before = process_bytes("rchar")
    with contextlib.redirect_stderr(Once(sys.stderr)):
        records = onn_core.train_many(list(chosen.values()), resume, on_step)
    n_bytes = process_bytes("rchar") - before
    runs = {name: thinned(run) for name, run in zip(chosen, records, strict=True)}
    names = [
        field.name
        for field in dataclasses.fields(TrainConfig)
        if field.name != "output_dir"
        and len({repr(getattr(config, field.name)) for config in chosen.values()}) > 1
    ]
    settings = {
        run: {name: _plain(getattr(config, name)) for name in names}
        for run, config in chosen.items()
    }
    return Sweep(settings, runs, n_bytes)


def train_alone(config: TrainConfig, n_steps: int) -> Alone:
    """Train the first steps of a run by itself, and say what the whole of it would read."""
    with tempfile.TemporaryDirectory() as folder:
        whole = {"max_steps": config.max_steps, "eval_every": config.eval_every}
        changes = {"max_steps": n_steps, "eval_every": n_steps, "output_dir": folder}
        short = dataclasses.replace(config, **changes, progress=False)
        before = process_bytes("rchar")
        with contextlib.redirect_stderr(io.StringIO()):  # what it says of the data was said before
            record = onn_core.ChunkedLoraTrainer(short).train()
        n_bytes = process_bytes("rchar") - before
    last = record.steps[-1]
    of_evals = (n_bytes - sum(step.bytes_read for step in record.steps)) / len(record.evals)
    n_evals = 1 + -(-whole["max_steps"] // whole["eval_every"])
    return Alone(
        [step.loss for step in record.steps],
        round(whole["max_steps"] * last.bytes_read + n_evals * of_evals),
        last.step_s,
    )


def table(sweep: Sweep) -> pd.DataFrame:
    """One row a run, the best first: its settings, what it trained, held-out loss, its end."""
    rows = []
    for name, run in (sweep.finished | sweep.runs).items():
        row: dict[str, Any] = {**sweep.settings[name]}
        row["trained parameters"] = run.model.get("trainable")
        row["steps"] = run.steps[-1].step if run.steps else 0
        if run.status == "finished":
            losses = [run.evals[0].loss, run.evals[-1].loss]
            row |= {f"{LOSS} before": round(losses[0], 3), "after": round(losses[1], 3)}
            row["change (%)"] = round(-100 * fall(run), 1)
            row["gradient norm, most"] = round(max(step.grad_norm for step in run.steps), 2)
        rows.append(row | {"status": run.status})
    return pd.DataFrame(rows, dtype=object)


def cost_table(sweep: Sweep) -> pd.DataFrame:
    """What the pass read, beside its runs alone; a step of every run, in seconds."""
    alone = sweep.alone.values()
    together_s = max(
        statistics.median(step.step_s for step in run.steps) for run in sweep.finished.values()
    )
    gib = 2**30
    rows = [
        ("all runs in one pass", sweep.bytes_read / gib, together_s),
        ("the run alone that reads most", max(one.bytes_read for one in alone) / gib, None),
        (
            "the sum of all runs alone",
            sum(one.bytes_read for one in alone) / gib,
            sum(one.step_s for one in alone),
        ),
    ]
    names = ("what", "read (GiB)", "one step of every run (s)")
    return frame([dict(zip(names, row, strict=True)) for row in rows], "what")


def best(sweep: Sweep) -> str:
    """The name of the best run: of the seeds of the best settings, the one that fell most."""
    return min(ranked(sweep)[0], key=lambda name: _change(sweep.runs[name]))


def answer(sweep: Sweep) -> str:
    """Which run is best, by how much, and whether that passes the noise over the seeds."""
    name = best(sweep)
    run, groups = sweep.runs[name], ranked(sweep)
    said = f"Best of {len(sweep.runs)} runs: {name}, {LOSS} {run.evals[0].loss:.3f} to "
    said += f"{run.evals[-1].loss:.3f} ({-100 * fall(run):+.1f} %)."
    if fall(run) <= 0:
        said += "\nNot even that one learned."
    if len(groups) == 1:
        return said
    first, second = ([sweep.runs[name] for name in names] for names in groups[:2])
    gap = _mean_change(sweep, groups[1]) - _mean_change(sweep, groups[0])
    said += f"\nThe next settings ({groups[1][0]}) end {gap:.3f} higher"
    if not len(first) == len(second) > 1:
        return f"{said}; one seed cannot tell whether that is more than chance."
    _, noise, words = compare(first, second)
    passes = "more" if words == "higher" else "no more"
    return f"{said} over {len(first)} seeds, {passes} than their noise of {noise:.3f}."


def effects(sweep: Sweep) -> str:
    """Of each setting: its best value, the others, and how far the mean losses differ.

    Of what they changed by: a run of another seed may begin higher.
    """
    lines = []
    for setting in next(iter(sweep.settings.values()), ()):
        by_value: dict[Any, list[float]] = {}
        for name, run in sweep.finished.items():
            by_value.setdefault(sweep.settings[name][setting], []).append(_change(run))
        means = {value: statistics.fmean(losses) for value, losses in by_value.items()}
        if setting != "seed" and len(means) > 1:
            least, most = (choose(means, key=means.__getitem__) for choose in (min, max))
            span = means[most] - means[least]
            lines.append((span, f"{setting}: {least} is best, {most} ends {span:.3f} higher"))
    lines.sort(reverse=True)
    return "\n".join(line for _, line in lines) or "Fewer than two values of a setting: no effect."


def cost(sweep: Sweep) -> str:
    """How much the pass read, against the hungriest run alone and the sum of all; equality."""
    alone = [one.bytes_read for one in sweep.alone.values()]
    ratio, spared = sweep.bytes_read / max(alone), sum(alone) / sweep.bytes_read
    holds = "YES" if ratio <= 1.1 else "NO"
    return (
        f"{len(sweep.runs)} runs in one pass read {ratio:.2f} times what the hungriest does alone "
        f"(at most 1.1: {holds}), and all of them alone would read {spared:.1f} times as much."
    )


def equal_to_alone(sweep: Sweep) -> bool:
    """Whether the first losses of each run in the pass are those of the run alone, bit for bit."""
    return all(
        [step.loss for step in sweep.runs[name].steps[: len(one.losses)]] == one.losses
        for name, one in sweep.alone.items()
    )


def parallel(sweep: Sweep) -> Parallel:
    """Settings and by how much held-out loss changed, a line a run."""
    runs = sweep.finished
    names = list(next(iter(sweep.settings.values())))
    axes = {name: [sweep.settings[run][name] for run in runs] for name in names}
    axes[CHANGE] = [round(_change(run), 4) for run in runs.values()]
    return Parallel(axes, f"settings of every run and {CHANGE}")


def curves(sweep: Sweep) -> Figure:
    """Held-out loss of every run against its steps, coloured by its change."""
    runs = sweep.finished
    changes = list(map(_change, runs.values()))
    scale, chosen = Scale(CHANGE, min(changes), max(changes)), best(sweep)
    lines = []
    for name, run in reversed(runs.items()):  # the best on top
        x, y = zip(*((done.step, done.loss) for done in run.evals), strict=True)
        label, width = (f"best: {name}", 4) if name == chosen else ("", 1.5)
        lines.append(Line(label, x, y, width=width, colour=scale.colour(_change(run))))
    y = "held-out loss (nats per counted token)"
    panel = Panel(lines, "optimizer steps", y, scale=scale, height=4)
    return Figure([[panel]], "held-out loss of every run")


def ranked(sweep: Sweep) -> list[list[str]]:
    """The finished runs, those that differ in the seed alone together, the best settings first."""
    groups: dict[str, list[str]] = {}
    for name, own in sweep.settings.items():
        if name in sweep.finished:
            key = repr({setting: value for setting, value in own.items() if setting != "seed"})
            groups.setdefault(key, []).append(name)
    return sorted(groups.values(), key=lambda names: _mean_change(sweep, names))


def _change(run: RunRecord) -> float:
    """Of held-out loss, from the first evaluation to the last."""
    return run.evals[-1].loss - run.evals[0].loss


def _mean_change(sweep: Sweep, names: list[str]) -> float:
    return statistics.fmean(_change(sweep.runs[name]) for name in names)


def _plain(value: Any) -> Any:
    """A setting as JSON and a table hold it."""
    return value if value is None or isinstance(value, int | float | str) else str(value)
