"""Records -> metric rows -> JSONL, AIM or TensorBoard; `python -m onn_workbench.tracking`.

A row {name, value, step, epoch, context} holds the arguments of AIM's `run.track`. An exporter is a
function (runs, folder) -> names of the runs that were new there; one line in EXPORTERS adds it.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from onn_core.errors import ConfigError, OnnError
from onn_core.record import RunRecord, write_atomic

AIM_PORT = 53800
RECORD_FIELDS = {"schema_version", "config", "steps", "evals"}
BENCHMARK_FIELDS = {"schema_version", "environment", "ceilings", "rows"}
PARAMETERS = ("config", "model", "data", "environment", "status")


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """A record as trackers want it."""

    group: str  # the folder of the record: its profile
    name: str
    digest: str  # of the record's file: what was exported once is not exported again
    parameters: dict[str, Any]
    rows: list[dict[str, Any]]


def metric_rows(record: RunRecord) -> Iterator[dict[str, Any]]:
    """Every number that `record` measured; the context tells training from held-out, and layers."""
    n_train = record.data.get("train") or math.inf
    samples_seen = 0

    def row(name: str, value: float, step: int, seen: int, **context: str) -> dict[str, Any]:
        epoch = int(seen // n_train)
        fields = {"name": name, "value": float(value), "step": step, "epoch": epoch}
        return fields | {"context": context}

    for done in record.steps:
        before, samples_seen = samples_seen, samples_seen + done.samples
        for name, value in (vars(done) | {"samples_seen": samples_seen}).items():
            if isinstance(value, dict):
                for layer, norm in value.items():
                    short = name.removesuffix("_by_layer")
                    yield row(short, norm, done.step, before, subset="train", layer=layer)
            elif name != "step" and value is not None:
                yield row(name, value, done.step, before, subset="train")
    for held in record.evals:
        for name, value in (("loss", held.loss), ("accuracy", held.accuracy)):
            if value is not None:
                yield row(name, value, held.step, held.samples_seen, subset="held_out")
    last = record.steps[-1].step if record.steps else 0
    for name in ("wall_s", "peak_memory_bytes"):
        yield row(name, getattr(record, name), last, samples_seen)


def benchmark_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Every number of a speed benchmark; the context tells which system, and its sizes."""
    sizes = ("layers", "batch_size", "sequence")
    return [
        {"name": name, "value": float(value), "step": 0, "epoch": 0}
        | {"context": {"system": row["system"]} | {size: row[size] for size in sizes}}
        for row in record["rows"]
        for name, value in row.items()
        if name not in sizes and isinstance(value, int | float) and not isinstance(value, bool)
    ]


def write_metrics(folder: str | os.PathLike) -> list[Path]:
    """Write the rows of every record in `folder` beside it; the files' paths.

    learning_NAME.jsonl of the record NAME, and benchmark_training.jsonl of
    training_benchmark.json. A NaN becomes the text "NaN", which float() reads.
    """
    files = {
        path.with_name(f"learning_{path.stem}.jsonl"): metric_rows(RunRecord.load(path))
        for path in find_records(folder)
    }
    for path in sorted(Path(folder).rglob("training_benchmark.json")):
        rows = benchmark_rows(json.loads(path.read_text(encoding="utf-8")))
        files[path.with_name("benchmark_training.jsonl")] = rows
    for target, rows in files.items():
        lines = []
        for row in rows:
            value = row["value"] if math.isfinite(row["value"]) else str(row["value"])
            lines.append(json.dumps(row | {"value": value}, allow_nan=False) + "\n")
        write_atomic(target, "".join(lines).encode())
    return list(files)


def find_records(folder: str | os.PathLike) -> list[Path]:
    """The files under `folder` that are a run record each, but for those inside checkpoints."""
    return [path for path, fields in _json_files(folder) if _is_record(fields)]


def load_runs(folder: str | os.PathLike) -> list[TrackedRun]:
    """Every record under `folder`, also those inside a study, and benchmarks; OnnError if none."""
    runs: dict[str, TrackedRun] = {}  # by digest: a study's records may stand beside it
    for path, fields in _json_files(folder):
        group = "" if path.parent == Path(folder) else path.relative_to(folder).parts[0]
        own_name = path.parent.name if path.stem == "record" else path.stem
        for name, found in _records_in(fields, own_name):
            if _is_record(found):
                record = RunRecord.from_dict(found)
                parameters = {part: getattr(record, part) for part in PARAMETERS}
                rows = list(metric_rows(record))
            else:
                parameters, rows = {"environment": found["environment"]}, benchmark_rows(found)
            text = json.dumps(found, sort_keys=True)
            digest = hashlib.sha256(text.encode()).hexdigest()[:12]
            runs.setdefault(digest, TrackedRun(group, name, digest, parameters, rows))
    if not runs:
        raise OnnError(f"there is no run record under {folder}: make report writes some.")
    return list(runs.values())


def _json_files(folder: str | os.PathLike) -> Iterator[tuple[Path, Any]]:
    for path in sorted(Path(folder).rglob("*.json")):
        if "checkpoints" not in path.relative_to(folder).parts:
            with contextlib.suppress(OSError, ValueError):
                yield path, json.loads(path.read_text(encoding="utf-8"))


def _is_record(fields: Any) -> bool:
    return isinstance(fields, dict) and fields.keys() >= RECORD_FIELDS


def _records_in(fields: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The run records and benchmarks at any depth of a JSON value, named by where they are."""
    if _is_record(fields) or isinstance(fields, dict) and fields.keys() >= BENCHMARK_FIELDS:
        yield name, fields
        return
    parts = fields.items() if isinstance(fields, dict) else enumerate(fields, start=1)
    for key, part in parts:
        if isinstance(part, dict | list):
            yield from _records_in(part, f"{name}/{key}")


# --- exporters ------------------------------------------------------------------------------


def to_aim(runs: Sequence[TrackedRun], folder: str | os.PathLike) -> list[str]:
    """Into the AIM repository `folder`/.aim, made if need be."""
    aim = _import_aim()
    repo = aim.Repo.from_path(str(folder), init=True)
    if repo.list_all_runs():
        _reindex(folder)  # a run is read back only once it is indexed
    known = {run.get("digest") for run in repo.iter_runs()}
    new = [run for run in runs if run.digest not in known]
    for run in new:
        settings = {"system_tracking_interval": None, "capture_terminal_logs": False}
        entry = aim.Run(repo=repo, experiment=run.group or "runs", **settings)
        entry.name = run.name
        for name, value in run.parameters.items():
            entry[name] = value
        for row in run.rows:
            entry.track(**row)
        entry["digest"] = run.digest  # last: a run that was cut short is exported again
        entry.close()
    _reindex(folder)
    return [run.name for run in new]


def to_tensorboard(runs: Sequence[TrackedRun], folder: str | os.PathLike) -> list[str]:
    """Into event files under `folder`/tensorboard, for `tensorboard --logdir`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        said = "TensorBoard is not installed: pip install -e '.[tensorboard]'."
        raise ConfigError(said) from error
    new = []
    for run in runs:
        name = re.sub(r"\W+", "_", run.name)
        target = Path(folder) / "tensorboard" / run.group / f"{name}-{run.digest}"
        if (target / "done").exists():
            continue
        with SummaryWriter(target) as writer:
            for row in run.rows:
                tag = "/".join([row["name"], *map(str, row["context"].values())])
                writer.add_scalar(tag, row["value"], row["step"])
            writer.add_text("parameters", f"```\n{json.dumps(run.parameters, indent=1)}\n```")
        (target / "done").touch()
        new.append(run.name)
    return new


EXPORTERS = {"aim": to_aim, "tensorboard": to_tensorboard}


def show_aim(folder: str | os.PathLike, port: int = AIM_PORT) -> None:
    """Become AIM's dashboard of `folder` on 127.0.0.1; it says where it is, and ends by Ctrl-C."""
    aim = _import_aim()
    if not aim.Repo.exists(str(folder)):
        raise ConfigError(f"{folder} has no AIM repository yet: make track fills one.")
    _reindex(folder)
    arguments = ["up", "--host", "127.0.0.1", "--port", str(port), "--repo", str(folder)]
    os.execv(sys.executable, [*_aim_command(), *arguments, "--workers", "1", "--yes"])


def _import_aim() -> Any:
    try:
        import aim
    except ImportError as error:
        raise ConfigError(
            "AIM is not installed: with Python 3.11 or 3.12, pip install -e '.[aim]'; "
            "newer Pythons have TensorBoard, make track TRACKER=tensorboard."
        ) from error
    return aim


def _aim_command() -> list[str]:
    return [sys.executable, "-c", "from aim.cli.cli import cli_entry_point as run; run()"]


def _reindex(folder: str | os.PathLike) -> None:
    command = [*_aim_command(), "storage", "--repo", str(folder), "reindex", "--yes"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OnnError(f"AIM could not index {folder}: {done.stderr.strip()[-300:]}")


def main() -> None:
    """Export the records under a folder, or show those that AIM has."""
    program = "python -m onn_workbench.tracking"
    parser = argparse.ArgumentParser(prog=program, description=main.__doc__)
    parser.add_argument("what", choices=[*EXPORTERS, "show"])
    parser.add_argument("--records", default="results", help="folder of the run records")
    parser.add_argument("--folder", default=".", help="where .aim or tensorboard is")
    parser.add_argument("--port", type=int, default=AIM_PORT, help="of the dashboard")
    arguments = parser.parse_args()
    try:
        if arguments.what == "show":
            show_aim(arguments.folder, arguments.port)
            return
        runs = load_runs(arguments.records)
        new = EXPORTERS[arguments.what](runs, arguments.folder)
        print(f"{len(runs)} runs, {len(new)} of them new: {', '.join(new) or 'none'}")
    except OnnError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
