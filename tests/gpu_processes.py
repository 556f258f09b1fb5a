"""Seconds a step on 1, 2, 4 ... GPUs of one host: `python tests/gpu_processes.py OUT.json`.

On Llama-3-8B's geometry at random, LoRA of rank 8 on every projection of every layer in float32,
AdamW, 4 GB of each GPU. torchrun starts as many processes as GPUs for each number; a row is written
as soon as it is measured. "each": samples of each GPU, so that the total grows with their number;
"total": samples of all, so that each has fewer. "fetched_gb_s_each" is what a GPU
got of weights, over the seconds of a step.
"""

import argparse
import datetime
import gc
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import peft
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import onn_core  # noqa: E402
from onn_core.processes import Processes  # noqa: E402
from onn_core.record import describe_environment, write_json  # noqa: E402
from onn_core.run.step import optimizer_step  # noqa: E402
from onn_core.streaming.gathering import Gathering  # noqa: E402
from onn_core.streaming.skeleton import resolve_device  # noqa: E402
from onn_core.weights.geometry import geometry  # noqa: E402
from onn_core.weights.random_model import write_random_model  # noqa: E402

CASES = (("each", 1), ("each", 32), ("total", 4), ("total", 32))
SAME_SUMS = (("total", 4),)
N_TOKENS = 512
N_STEPS = 4  # timed, after two more
BUDGET = "4GB"


def fetched_bytes(base) -> float:
    """Bytes of the weights that have come into a slot of this process's device."""
    stream = base.streaming.stream
    return sum(
        n_loads * sum(weight.n_bytes for weight in stream.units[unit]) / len(stream.units[unit])
        for unit, n_loads in stream.counts.weight_loads.items()
    )


def measure(
    folder: Path, processes: Processes, device: torch.device, n_rows: int, gathers: bool
) -> dict:
    """A row of a model that is opened afresh; n_rows: of this process's part of a batch.

    gathers: weights reach the GPUs in parts that these exchange, if the rule says that it pays.
    """
    torch.manual_seed(0)
    opened = time.perf_counter()
    base = onn_core.from_pretrained(folder, memory_budget=BUDGET, device=device)
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    generator = torch.Generator().manual_seed(processes.rank)
    n_counted = n_rows * processes.size * (N_TOKENS - 1)
    gathering = Gathering(base, processes)
    shapes = [(n_rows, N_TOKENS, n_rows * (N_TOKENS - 1))]
    seconds, losses, fetched = [], [], []
    open_s = time.perf_counter() - opened
    for _ in range(N_STEPS + 2):
        ids = torch.randint(base.config.vocab_size, (n_rows, N_TOKENS), generator=generator)
        ids = ids.to(device)
        processes.meet()
        before = fetched_bytes(base)
        started = time.perf_counter()
        part = {"input_ids": ids, "labels": ids}
        before_s = seconds[-1] if seconds else math.inf
        fetching = gathering.step(shapes, before_s) if gathers else None
        given = {"processes": processes, "fetching": fetching}
        loss, _ = optimizer_step(model, [part], n_counted, optimizer, **given)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        fetched.append(fetched_bytes(base) - before)
        losses.append(loss)
        if len(seconds) == 1:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    step_s, n_read = statistics.median(seconds[2:]), base.counts().bytes_read
    read = [int(said) for said in processes.meet(str(n_read))]
    row = {
        "processes": processes.size,
        "gathers": gathering.in_step,
        "batch_size": n_rows * processes.size,
        "batch_size_each": n_rows,
        "sequence": N_TOKENS,
        "step_s": step_s,
        "step_s_all": seconds[2:],
        "first_step_s": seconds[0],
        "open_s": open_s,
        "bytes_read_each": read,
        "bytes_read": sum(read),
        "fetched_bytes_each": fetched[-1],
        "fetched_gb_s_each": fetched[-1] / step_s / 1e9,
        "tokens_s": n_rows * processes.size * N_TOKENS / step_s,
        "wait_s": base.counts().wait_s,
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "losses": losses,
        "micro_batch_size": base.plan.micro_batch_size,
        "layers_resident": base.plan.n_resident,
    }
    base.close()
    return row


def work(folder: Path, out: Path, gathers: bool, same_sums: bool) -> None:
    """What each process does: every case, whose rows the first adds to `out`.

    same_sums: the sums of every kernel have a fixed order, so that losses may be compared.
    """
    device = resolve_device("cuda")
    processes = Processes.of_run(device)
    ways = (False, True) if gathers and processes.size > 1 else (False,)
    if same_sums:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        # Each again and again: an exchange might lose a race now and then.
        ways = [way for way in ways for _ in range(8 if way else 2)]
    for (kind, size), way in itertools.product(SAME_SUMS if same_sums else CASES, ways):
        n_rows = size if kind == "each" else size // processes.size
        if not n_rows:
            continue
        row = {"kind": kind, "same_sums": same_sums}
        row |= measure(folder, processes, device, n_rows, way)
        if processes.is_first:
            record = json.loads(out.read_text())
            record["rows"].append(row)
            write_json(out, record)
            print(json.dumps(row), flush=True)
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gpus", default="1,2,4", help="numbers of them, one after another")
    parser.add_argument("--layers", type=int, help="decoder layers (default: all of them)")
    parser.add_argument("--folder", type=Path, help="the model, once it is written")
    parser.add_argument("--gather", action="store_true", help="also with parts that GPUs exchange")
    parser.add_argument(
        "--same-sums", action="store_true", help="compare losses: deterministic algorithms, slower"
    )
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.folder, arguments.out, arguments.gather, arguments.same_sums)
        return
    record = {"date": datetime.date.today().isoformat(), "rows": []}
    record["environment"] = describe_environment(torch.device("cuda"))
    write_json(arguments.out, record)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch) / "model"
        if not folder.is_dir():
            write_random_model(folder, geometry("llama-3-8b", arguments.layers))
        for n in map(int, arguments.gpus.split(",")):
            if n > torch.cuda.device_count():
                continue
            os.environ["ONN_GATHER"] = str(int(arguments.gather))
            if arguments.same_sums:
                os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
            own = [__file__, str(arguments.out), "--work", "--folder", str(folder)]
            own += ["--gather"] * arguments.gather + ["--same-sums"] * arguments.same_sums
            subprocess.run([sys.executable, *launch, *own], check=False)


if __name__ == "__main__":
    main()
