"""Runs that are there: what each was, in one table, and what is needed to go on with one."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from onn_core.__main__ import read_settings
from onn_core.config import TrainConfig
from onn_core.errors import OnnError
from onn_core.record import RunRecord, write_atomic
from onn_workbench.tracking import find_records

SETTINGS = "settings.yaml"  # in the folder of a run: what `python -m onn_core train` takes
COLUMNS = {  # of the table -> format of its values
    "run": "{}",
    "state": "{}",
    "steps": "{}",
    "held-out before": "{:.3f}",
    "after": "{:.3f}",
    "s a step": "{:.2f}",
    "minutes": "{:.1f}",
    "peak MiB": "{:,.0f}",
    "% of limit": "{:.0f}",
    "settings that differ": "{}",
}
NOT_COMPARED = ("output_dir", "progress", "checkpoint_every", "checkpoint_minutes")
# Runs with equal values of these settings, and equal data, are evaluated on the same samples.
HELD_OUT = ("data", "seed", "held_out_fraction", "max_length", "eval_samples", "chat_template")
HELD_OUT += ("completion_only", "train_on")


@dataclasses.dataclass(frozen=True)
class PastRun:
    """A record and where it is."""

    label: str
    path: Path
    record: RunRecord

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def can_continue(self) -> bool:
        """Whether it was stopped, and what is needed to go on with it is there."""
        unfinished = self.record.status != "finished"
        return unfinished and all((self.folder / x).exists() for x in (SETTINGS, "checkpoints"))

    @property
    def has_adapter(self) -> bool:
        return all((self.folder / x).exists() for x in (SETTINGS, "adapter"))

    def config(self) -> TrainConfig:
        """The settings of the run; OnnError if its folder does not tell them."""
        return TrainConfig(**read_settings(self.folder / SETTINGS, ()))


def to_yaml(config: TrainConfig) -> str:
    """The settings that are not the defaults, as `python -m onn_core train` takes them."""
    return yaml.safe_dump(_chosen(config), sort_keys=False, allow_unicode=True)


def to_python(config: TrainConfig) -> str:
    """The run as a Python script."""
    settings = "".join(f"    {name}={value!r},\n" for name, value in _chosen(config).items())
    made = f"config = onn_core.TrainConfig(\n{settings})\n"
    return f"import onn_core\n\n{made}record = onn_core.ChunkedLoraTrainer(config).train()\n"


def _chosen(config: TrainConfig) -> dict[str, Any]:
    fields, values = TrainConfig.__dataclass_fields__, config.to_dict()
    return {name: values[name] for name in values if values[name] != fields[name].default}


def with_whole_paths(config: TrainConfig) -> TrainConfig:
    """The same settings for any working folder."""
    paths = {"output_dir": str(Path(config.output_dir).resolve())}
    for name in ("model_dir", "data", "adapter"):
        value = getattr(config, name)
        if value and Path(value).exists():
            paths[name] = str(Path(value).resolve())
    return dataclasses.replace(config, **paths)


def save_settings(config: TrainConfig) -> None:
    """Write the settings of a run into its folder: it may be continued from elsewhere."""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / SETTINGS, to_yaml(with_whole_paths(config)).encode())


def find_runs(folders: Sequence[str]) -> list[PastRun]:
    """Every record under each of `folders` that can be read, by name and number."""
    found: dict[str, PastRun] = {}
    for folder in folders:
        own, outside = {}, Path(Path(folder).resolve().name)
        for path in find_records(folder):
            label = (outside / path.relative_to(folder)).with_suffix("").as_posix()
            label = label.removesuffix("/record")
            try:
                own[label] = PastRun(label, path, RunRecord.load(path))
            except OnnError:  # of another version
                continue
        for run in sorted(own.values(), key=lambda run: (run.folder.parent, *_natural(run.label))):
            found.setdefault(run.label, run)
    return list(found.values())


def table(
    runs: Sequence[PastRun], limit_s: Callable[[RunRecord], float | None]
) -> list[dict[str, Any]]:
    """A row of COLUMNS for each run; None where nothing was measured."""
    settings = [
        {k: v for k, v in run.record.config.items() if k not in NOT_COMPARED} for run in runs
    ]
    names = [name for name in TrainConfig.__dataclass_fields__ if name not in NOT_COMPARED]
    differ = [name for name in names if len({str(own.get(name)) for own in settings}) > 1]
    rows = []
    for run, own in zip(runs, settings, strict=True):
        record = run.record
        defaults = TrainConfig.__dataclass_fields__
        chosen = {n: own[n] for n in differ if n in own and own[n] != defaults[n].default}
        said = [f"{n} {v:.4g}" if type(v) is float else f"{n} {v}" for n, v in chosen.items()]
        step_s = statistics.median(s.step_s for s in record.steps) if record.steps else None
        limit = limit_s(record) if record.steps else None
        values = (
            run.label,
            record.status.partition(":")[0],
            len(record.steps),
            record.evals[0].loss if record.evals else None,
            record.evals[-1].loss if len(record.evals) > 1 else None,
            step_s,
            record.wall_s / 60,
            record.peak_memory_bytes / 2**20,
            # what was faster than the limit shows that other work slowed its measurement
            100 * limit / step_s if limit and limit <= step_s else None,
            ", ".join(said),
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def held_out_key(record: RunRecord) -> tuple[str, ...]:
    """Equal for runs whose held-out losses are of the same samples and tokens."""
    config = record.config
    rows = (record.data.get(name) for name in ("rows", "held_out"))
    return tuple(map(str, (record.model.get("name"), *rows, *(config.get(n) for n in HELD_OUT))))


def _natural(label: str) -> tuple[Any, ...]:
    """Numbers in a label are compared as numbers."""
    last = label.rpartition("/")[2]
    return (int(last), "") if last.isdigit() else (0, label)
