"""Speed against the limit and against peers: each system in a process of its own, one cap for all.

`python -m onn_workbench.bench MODEL_DIR --out record.json` measures this project and the systems of
`peers.SYSTEMS` on random tokens with the report's LoRA configuration. The machine's ceilings are
measured before and after.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from onn_core.config import parse_bytes
from onn_core.errors import ConfigError, OnnError
from onn_core.record import SCHEMA_VERSION, describe_environment, write_json
from onn_core.streaming.loading import from_pretrained
from onn_core.streaming.skeleton import resolve_device
from onn_core.weights.folder import ModelFolder
from onn_workbench.ceilings import Ceilings, measure_copy, measure_flops, sustained_read
from onn_workbench.peers import REPORTS_LAYERS, SYSTEMS, UNCAPPED, run_steps
from onn_workbench.speed import OWN, ratio_table, speed_table

RUNS = (
    "onn:1,onn:8,onn:32,onn:128,baseline:1,mapped:1,mapped:32,offload:1,in_memory:32,unbounded:32"
)
RUN = re.compile(r"(\w+):([1-9]\d*)(?:x([1-9]\d*))?(?:@([1-9]\d*))?")
LIBRARIES_BYTES = 1 << 30  # of a cap, what interpreter and libraries may take


def measure_ceilings(
    model_dir: str | os.PathLike, token_counts: list[int], device: str = "auto"
) -> Ceilings:
    """Reads of the model's own files, matmuls with its first layer's own matrices."""
    where = resolve_device(device)
    model_folder = ModelFolder.open(model_dir)
    model = from_pretrained(model_dir, device=device)
    items = model.layer_weights()
    shapes = [item.shape for item in items if len(item.shape) == 2]
    stored, dtype = items[0].dtype, model.dtype
    del model
    paths = list(dict.fromkeys(entry.path for entry in model_folder.tensors.values()))
    on_cuda = where.type == "cuda"
    rates = sustained_read(paths, to_device=on_cuda)
    shown = ", ".join(f"{rate / 1e9:.2f} ({n})" for n, rate in rates.items())
    print(f"GB/s that the disk sustains (readers): {shown}", flush=True)
    return Ceilings(
        max(rates.values()),
        {n: measure_flops(shapes, n, dtype, where, stored=stored) for n in token_counts},
        measure_copy(where) if on_cuda else None,
    )


def add_limits(rows: list[dict[str, Any]], ceilings: Ceilings, model_dir: str) -> None:
    """The percent of the limit of each row: of its own traffic, and of the matmuls it must do.

    A layer whose graph is resident is not recomputed. "percent_recomputed" is of the limit of a
    step in which all are: 6 P n.
    """
    sizes = ModelFolder.open(model_dir).config
    hidden, head_dim = sizes.hidden_size, sizes.hidden_size // sizes.num_attention_heads
    layer = hidden * (2 * hidden + 2 * sizes.num_key_value_heads * head_dim)
    layer += 3 * hidden * sizes.intermediate_size
    for row in rows:
        n_tokens = row["batch_size"] * row["sequence"]
        # forward, recompute, dL/dh: 6 P n; the head has no recompute: 4 P n
        twice = n_tokens * (6 * layer * row["layers"] + 4 * hidden * sizes.vocab_size)
        once = twice - n_tokens * 2 * layer * row["kept_layers"]
        limits_s = {
            "read": row["bytes_read"] / ceilings.read_bytes_per_s,
            "compute": once / ceilings.flops_per_s[n_tokens],
        }
        if ceilings.copy_bytes_per_s is not None and "bytes_streamed" in row:
            limits_s["copy"] = row["bytes_streamed"] / ceilings.copy_bytes_per_s
        row |= {f"limit_{what}_s": seconds for what, seconds in limits_s.items()}
        row["limited_by"] = max(limits_s, key=limits_s.get)
        limit_s, twice_s = max(limits_s.values()), twice / ceilings.flops_per_s[n_tokens]
        row["percent_of_limit"] = 100 * limit_s / row["step_s"]
        row["percent_recomputed"] = 100 * max(limit_s, twice_s) / row["step_s"]
        if ceilings.copy_bytes_per_s is not None and "copy" not in limits_s:  # a peer's
            row |= {"limited_by": "unknown", "percent_of_limit": None, "percent_recomputed": None}


@contextlib.contextmanager
def memory_cap(n_bytes: int | None) -> Iterator[Path | None]:
    """The file that takes a process into a control group of `n_bytes`; None where none can be."""
    root, limit = Path("/sys/fs/cgroup"), "memory.max"
    if (root / "memory").is_dir():  # version 1 of control groups
        root, limit = root / "memory", "memory.limit_in_bytes"
    group = root / f"onn-bench-{uuid.uuid4().hex[:8]}"
    try:
        if n_bytes is None:
            raise OSError
        group.mkdir()
        (group / limit).write_text(str(n_bytes))
    except OSError:
        yield None
        return
    try:
        yield group / "cgroup.procs"
    finally:
        for _ in range(50):  # a process that has ended may hold its group a little longer
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


def evict(model_dir: str | os.PathLike) -> None:
    """Drop the model's pages from the page cache."""
    if hasattr(os, "posix_fadvise"):
        for path in Path(model_dir).glob("*.safetensors"):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


@dataclasses.dataclass(frozen=True)
class Run:
    """What one process measures."""

    system: str  # of SYSTEMS
    batch_size: int
    sequence: int  # tokens of a sample
    layers: int | None = None  # the model's first layers; None is all of them

    def __str__(self) -> str:
        depth = "" if self.layers is None else f"@{self.layers}"
        return f"{self.system}:{self.batch_size}x{self.sequence}{depth}"


def parse_runs(text: str, sequence: int) -> list[Run]:
    """ "onn:1,mapped:32,onn:1x512,onn:1@4" -> runs; ConfigError for what is not understood.

    SYSTEM:BATCH, then perhaps xTOKENS of a sample (default: `sequence`), then perhaps @LAYERS.
    """
    runs = []
    for part in text.split(","):
        match = RUN.fullmatch(part.strip())
        if not match or match[1] not in SYSTEMS:
            form = "SYSTEM:BATCH, perhaps xTOKENS and @LAYERS, with a system of"
            raise ConfigError(f"run {part!r} is not {form} {', '.join(SYSTEMS)}.")
        batch_size, n_tokens, layers = (text and int(text) for text in match.groups()[1:])
        runs.append(Run(match[1], batch_size, n_tokens or sequence, layers))
    return runs


def benchmark(
    model_dir: str | os.PathLike,
    runs: Sequence[Run],
    *,
    cap: int | None = None,
    host_cap: int | None = None,
    budget: int | None = None,
    n_steps: int = 3,
    device: str = "auto",
    sparse_layers: str = REPORTS_LAYERS,
    quantize: str | None = None,
    on_record: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Each of `runs` in a process of its own, inside one cap: the record.

    cap: bytes of a process, on CUDA of the device's allocator. host_cap: on CUDA, bytes of the
    process, its files' pages included, except for "cached". budget: what this project may fill
    of them; None leaves LIBRARIES_BYTES of the cap, as for the peers. sparse_layers: with LoRA.
    quantize: of this project's runs, see `from_pretrained`. on_record: called with the record so
    far, without limits, before the first run and after each.
    """
    where = resolve_device(device)
    token_counts = sorted({run.batch_size * run.sequence for run in runs})
    before = measure_ceilings(model_dir, token_counts, device)
    room = None if cap is None else cap - LIBRARIES_BYTES
    budget = room if budget is None else budget
    rows, failed = [], {}
    record = {
        "schema_version": SCHEMA_VERSION,
        "environment": describe_environment(where),
        "cap_bytes": cap,
        "host_cap_bytes": host_cap,
        "capped": True,
        "budget_bytes": budget,
        "quantize": quantize,
        "ceilings": {"before": dataclasses.asdict(before)},
        "failed": failed,
        "rows": rows,
    }
    on_record(record)
    for run in runs:
        print(run, flush=True)
        evict(model_dir)
        own_cap = None if run.system in UNCAPPED else cap
        of_host, settings = own_cap, {}
        if where.type == "cuda":
            of_host = None if run.system in ("cached", *UNCAPPED) else host_cap
            settings = {"device_cap": own_cap}
        with first_layers(model_dir, run.layers) as folder, memory_cap(of_host) as group:
            record["capped"] &= group is not None or of_host is None
            settings |= dataclasses.asdict(run) | {"model_dir": str(folder), "n_steps": n_steps}
            own_room = None if run.system in UNCAPPED else room
            own = {"room_bytes": budget} | ({"quantize": quantize} if quantize else {})
            settings |= {"device": device, "sparse_layers": sparse_layers}
            settings |= own if run.system in OWN else {"room_bytes": own_room}
            row, why = _measure(settings, group)
        if row is None:
            failed[str(run)] = why
            print(f"    failed: {why}", flush=True)
        else:
            rows.append(row)
        on_record(record)
    after = measure_ceilings(model_dir, token_counts, device)
    add_limits(rows, before.mean(after), str(model_dir))
    computing = {r["batch_size"] * r["sequence"] for r in rows if r["limited_by"] == "compute"}
    limits = computing | {r["limited_by"] for r in rows} - {"compute", "unknown"}
    record["ceilings"]["after"] = dataclasses.asdict(after)
    return record | {"disturbed": before.disturbed(after, limits)}


def _measure(settings: dict[str, Any], group: Path | None) -> tuple[dict[str, Any] | None, str]:
    """The row that a worker prints, or None and its last words; its steps are shown as they end."""
    command = [sys.executable, "-m", "onn_workbench.bench", "--worker", json.dumps(settings)]
    command += ["--group", str(group)] if group else []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as worker:
        last = ""
        for line in worker.stdout:
            if line.startswith("    step"):
                print(line, end="", flush=True)
            last = line.strip() or last
    if worker.returncode:
        killed = " (killed: its memory cap)" if worker.returncode == -signal.SIGKILL else ""
        return None, f"status {worker.returncode}{killed}: {last[:300]}"
    return json.loads(last), ""


@contextlib.contextmanager
def first_layers(model_dir: str | os.PathLike, n_layers: int | None) -> Iterator[Path]:
    """A folder that shows the model with its first layers only; its files are links."""
    if n_layers is None:
        yield Path(model_dir)
        return
    with tempfile.TemporaryDirectory() as scratch:
        for path in Path(model_dir).resolve().iterdir():
            if path.name != "config.json":
                (Path(scratch) / path.name).symlink_to(path)
        settings = json.loads((Path(model_dir) / "config.json").read_text())
        settings["num_hidden_layers"] = n_layers
        if settings.get("layer_types"):
            settings["layer_types"] = settings["layer_types"][:n_layers]
        (Path(scratch) / "config.json").write_text(json.dumps(settings))
        yield Path(scratch)


def main() -> None:
    """Measure this project, the report's baseline and peers on one model."""
    parser = argparse.ArgumentParser(prog="python -m onn_workbench.bench", description=main.__doc__)
    parser.add_argument("model_dir", nargs="?", help="see python -m onn_core model")
    parser.add_argument("--out", type=Path, help="the JSON record")
    parser.add_argument("--runs", default=RUNS, help="SYSTEM:BATCH[xTOKENS][@LAYERS],...")
    parser.add_argument("--sequence", type=int, default=16, help="tokens of a sample")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one more")
    parser.add_argument("--cap", default="4GiB", help="memory of each process; none for no cap")
    parser.add_argument("--budget", help="memory_budget of this project; the cap less 1 GiB")
    parser.add_argument("--host-cap", help="on a GPU, memory of each process in the host")
    parser.add_argument("--sparse-layers", default=REPORTS_LAYERS, help="those with LoRA, or all")
    parser.add_argument("--quantize", help="int8 or nf4, of this project's runs")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--group", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        if arguments.worker:
            return _work(json.loads(arguments.worker), arguments.group)
        if arguments.model_dir is None or arguments.out is None:
            parser.error("a model folder and --out FILE are needed")
        record = benchmark(
            arguments.model_dir,
            parse_runs(arguments.runs, arguments.sequence),
            cap=None if arguments.cap == "none" else parse_bytes(arguments.cap),
            budget=None if arguments.budget is None else parse_bytes(arguments.budget),
            host_cap=None if arguments.host_cap is None else parse_bytes(arguments.host_cap),
            sparse_layers=arguments.sparse_layers,
            quantize=arguments.quantize,
            n_steps=arguments.steps,
            device=arguments.device,
            on_record=lambda record: write_json(arguments.out, record),
        )
    except OnnError as error:
        parser.exit(1, f"{error}\n")
    write_json(arguments.out, record)
    if not record["rows"]:
        parser.exit(1, "every run failed: see above\n")
    print(speed_table(record).to_string())
    if any(row["system"] not in OWN for row in record["rows"]):
        print(ratio_table(record).to_string())
    if record["disturbed"]:
        print("disturbed: a ceiling that limits differs by more than a quarter before and after")


def _work(settings: dict[str, Any], group: str | None) -> None:
    """Measure in this process, once it is under its caps, and print the row."""
    if group:
        Path(group).write_text(str(os.getpid()))
    settings.pop("layers", None)  # the folder shows no others
    device_cap = settings.pop("device_cap", None)
    if device_cap is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, device_cap / total))
    print(json.dumps(run_steps(**settings)))


if __name__ == "__main__":
    main()
