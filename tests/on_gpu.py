"""The report's own setting on a machine with a CUDA device: `python tests/on_gpu.py OUT`.

Writes phi-4's geometry at random to a scratch folder (as deep as the disk allows), measures the
report's table in 4 GiB of device memory, looks at a profiler's trace for the overlap of copies and
kernels, and runs the tests that need CUDA. OUT/training_benchmark.json, written after each of the
three, is what `make report PROFILE=gpu` shows.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from gpu_profile import both, length, merged

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

from onn_core.record import write_json  # noqa: E402
from onn_core.weights import geometry, random_model  # noqa: E402
from onn_workbench import bench, peers  # noqa: E402

LAYER_BYTES = 681_594_880  # of phi-4 in bfloat16
ENDS_BYTES = 2 * 100352 * 5120 * 2
DEPTH = 40
CAP = 4 << 30
HOST_CAP = 12 << 30  # less than the weights of 16 layers or more: they come from the disk
BUDGET = int(1.53 * 2**30)  # the report's largest figure
RUNS = "onn:32,onn:128,baseline:1,onn:1@16,offload:1@8,cached:32,cached:1@8"
# what is profiled: layers, samples, tokens of a sample, budget, whether its files are cached, dtype
CASES = [
    (8, 32, 128, BUDGET, False, "bfloat16"),
    (8, 32, 128, BUDGET, True, "bfloat16"),
    (8, 32, 128, CAP, True, "bfloat16"),
    (8, 32, 128, CAP, True, "float32"),  # its products take as long as a small card's
]


def deepest(scratch: Path) -> int:
    """Decoder layers that fit on the disk beside 4 GiB for everything else."""
    room = shutil.disk_usage(scratch).free - ENDS_BYTES - (4 << 30)
    return max(1, min(DEPTH, room // LAYER_BYTES))


def exactness(chosen: str) -> dict:
    """What pytest says of the tests that need CUDA."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests/test_cuda.py"]
    command += ["--no-header", "--tb=short", "-k", chosen] if chosen else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-3000:], flush=True)
    return {"status": done.returncode, "summary": done.stdout.strip().splitlines()[-1]}


def overlap(
    model_dir: Path,
    batch_size: int,
    sequence: int,
    budget: int,
    cached: bool,
    dtype: str,
    scratch: Path,
) -> dict:
    """One profiled step: seconds of the weights' copies, of kernels, and of both at once."""
    device = torch.device("cuda", 0)
    base, read_so_far = peers.open_system("cached", str(model_dir), device, budget, dtype=dtype)
    base.streaming.stream.files.cached = cached
    model, _ = peers.add_adapters(base, device)
    ids = torch.randint(model.config.vocab_size, (batch_size, sequence), device=device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        torch.cuda.synchronize()

    step()
    counts = base.streaming.stream.counts
    wait_s, n_bytes, n_streamed = counts.wait_s, read_so_far(), counts.bytes_fetched
    activities = [torch.profiler.ProfilerActivity.CUDA]  # the CPU's would slow the step
    with torch.profiler.profile(activities=activities) as profiler:
        started = time.perf_counter()
        step()
        step_s = time.perf_counter() - started
    trace = scratch / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    spans: dict[str, list] = {"kernel": [], "gpu_memcpy": []}
    launched = Counter(e["args"]["stream"] for e in events if e.get("cat") == "kernel")
    # the other stream copies the weights; its casts count as neither
    compute = max(launched, key=launched.get)
    for event in events:
        kind = event.get("cat")
        if kind in spans and (event["args"]["stream"] == compute) == (kind == "kernel"):
            start = event["ts"] / 1e6
            spans[kind].append((start, start + event["dur"] / 1e6))
    copies, kernels = merged(spans["gpu_memcpy"]), merged(spans["kernel"])
    base.close()
    return {
        "layers": model.config.num_hidden_layers,
        "batch_size": batch_size,
        "sequence": sequence,
        "budget_bytes": budget,
        "dtype": dtype,
        "bytes_read": read_so_far() - n_bytes,
        "bytes_streamed": counts.bytes_fetched - n_streamed,
        "step_s": step_s,
        "copies_s": length(copies),
        "kernels_s": length(kernels),
        "both_s": both(copies, kernels),
        "waiting_for_weights_s": counts.wait_s - wait_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scratch", type=Path, default=Path.cwd() / "runs" / "gpu")
    parser.add_argument("--layers", type=int, help="instead of as many as fit")
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--runs", default=RUNS)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tests", default="", help="only those that pytest's -k chooses")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:2:16:8"  # as on the report's card
    started = time.perf_counter()

    def say(what: str) -> None:
        print(f"[{time.perf_counter() - started:.0f} s] {what}", flush=True)

    layers = arguments.layers or deepest(arguments.scratch)
    folder = arguments.scratch / f"phi-4-{layers}"
    if not folder.is_dir():
        say(f"writing {layers} layers")
        random_model.write_random_model(folder, geometry.geometry("phi-4", layers))
    say("the table")
    runs = bench.parse_runs(arguments.runs, arguments.sequence)
    record = bench.benchmark(
        folder,
        runs,
        cap=CAP,
        host_cap=HOST_CAP,
        budget=BUDGET,
        n_steps=arguments.steps,
        device="cuda",
        on_row=lambda record: write_json(arguments.out / "rows.json", record),
    )
    write_json(arguments.out / "training_benchmark.json", record)
    print(bench.speed_table(record).to_string(), record["failed"], flush=True)
    say("overlap")  # a model that streams, then one that fits: what is read decides who waits
    record["overlap"] = []
    for n_layers, *case in CASES:
        with bench.first_layers(folder, min(n_layers, layers)) as shallow:
            seen = overlap(shallow, *case, arguments.scratch)
        print(json.dumps(seen), flush=True)
        record["overlap"].append(seen)
        write_json(arguments.out / "training_benchmark.json", record)
    say("exactness")
    record["exactness"] = exactness(arguments.tests)
    write_json(arguments.out / "training_benchmark.json", record)
    say("done")


if __name__ == "__main__":
    main()
