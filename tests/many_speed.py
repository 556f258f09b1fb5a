"""Many runs in one pass against one after another: `many_speed.py OUT.json [LAYERS] [FOLDER]`.

phi-4's geometry at random (8 layers), in a control group of 4 GiB, one sample of 16 tokens a step
and run, rows of real text. Each number of runs is trained in a process of its own, with other
learning rates and seeds. The ratio is n steps of the run alone over one step of n runs together;
its limit is the same ratio of the machine's ceilings, T_io = bytes read / bandwidth and T_c = 6 P
tokens / FLOP/s, each the larger of both. The FLOP/s are those at the rows of a shared product.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import onn_core
from onn_core.memory.together import SHARED_ROWS
from onn_core.record import describe_environment, write_json
from onn_core.run.estimate import geometry_of
from onn_core.weights.geometry import geometry
from onn_core.weights.random_model import prepare
from onn_workbench.bench import evict, measure_ceilings, memory_cap

N_RUNS = (1, 2, 4, 8, 16, 32)  # or as in ONN_RUNS=1,8
N_TOKENS = 16
N_STEPS = 4  # the first is not timed
CAP_BYTES, BUDGET_BYTES = 4 << 30, 3 << 30


def train(folder: str, n_runs: int) -> dict:
    """The median step of `n_runs` in one pass, and the bytes that it reads."""
    with tempfile.TemporaryDirectory() as scratch:
        configs = [
            onn_core.TrainConfig(
                model_dir=folder,
                data="chatterbot",
                output_dir=f"{scratch}/{number}",
                batch_size=1,
                max_length=N_TOKENS,
                packing=True,
                completion_only=False,
                max_steps=N_STEPS,
                learning_rate=1e-4 * (number + 1),
                seed=number,
                memory_budget=BUDGET_BYTES,
                device="cpu",
                checkpoint_minutes=0,
                progress=False,
            )
            for number in range(n_runs)
        ]
        records = onn_core.train_many(configs)
    steps = [record.steps[1:] for record in records]
    return {
        "runs": n_runs,
        "step_s": statistics.median(step.step_s for step in steps[0]),
        "step_s_all": [step.step_s for step in steps[0]],
        "bytes_read": statistics.median(step.bytes_read for step in steps[0]),
        "tokens": steps[0][0].tokens,
        "peak_memory_bytes": max(record.peak_memory_bytes for record in records),
        "status": sorted({record.status for record in records}),
    }


def measure(folder: Path, n_runs: int) -> dict:
    evict(folder)
    command = [sys.executable, __file__, "--worker", str(folder), str(n_runs)]
    with memory_cap(CAP_BYTES) as group:
        done = subprocess.run([*command, str(group or "")], capture_output=True, text=True)
    if done.returncode:
        return {"runs": n_runs, "failed": done.stderr.strip()[-300:]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1] == "--worker":
        folder, n_runs, group = sys.argv[2:]
        if group:
            Path(group).write_text(str(os.getpid()))
        print(json.dumps(train(folder, int(n_runs))))
        return
    all_n = [int(n) for n in os.environ.get("ONN_RUNS", "").split(",") if n] or N_RUNS
    n_layers = int(sys.argv[2]) if len(sys.argv) > 2 else 8
    # FOLDER: of the same geometry with a tokenizer, where the default model is not installed.
    folder = Path(sys.argv[3]) if len(sys.argv) > 3 else prepare("phi-4", n_layers)
    sizes = geometry_of(geometry("phi-4", n_layers))
    # forward, recompute and dL/dh of the layers; the head has no recompute
    run_flops = N_TOKENS * (6 * sizes.layer_parameters * n_layers + 4 * sizes.head_parameters)
    shared = {n: min(n * N_TOKENS, SHARED_ROWS) for n in all_n}  # rows of a product
    counts = sorted(set(shared.values()))
    before = measure_ceilings(folder, counts, "cpu")
    rows = []
    for n_runs in all_n:
        rows.append(measure(folder, n_runs))
        print(json.dumps(rows[-1]), flush=True)
    after = measure_ceilings(folder, counts, "cpu")
    ceilings = before.mean(after)
    alone, limits_s = rows[0], {}
    for row in rows:
        if "failed" in row:
            continue
        n = row["runs"]
        read_s = row["bytes_read"] / ceilings.read_bytes_per_s
        limits_s[n] = max(read_s, n * run_flops / ceilings.flops_per_s[shared[n]])
        row["ratio"] = n * alone["step_s"] / row["step_s"]
        row["limit_of_ratio"] = n * limits_s[1] / limits_s[n]
        row["percent_of_limit"] = 100 * limits_s[n] / row["step_s"]
        shown = ("runs", "step_s", "ratio", "limit_of_ratio", "percent_of_limit")
        print("  ".join(f"{name} {row[name]:.3g}" for name in shown))
    record = {
        "environment": describe_environment(),
        "layers": n_layers,
        "cap_bytes": CAP_BYTES,
        "budget_bytes": BUDGET_BYTES,
        "read_bytes_per_s": ceilings.read_bytes_per_s,
        "flops_per_s": ceilings.flops_per_s,
        "disturbed": before.disturbed(after, ("read", *counts)),
        "rows": rows,
    }
    write_json(sys.argv[1], record)


if __name__ == "__main__":
    main()
