"""Seconds a step, of ours, of peers and of PEFT all on the GPU: `tests/gpu_steps.py OUT.json`.

On Llama-3-8B's geometry at random, LoRA of rank 8 on every projection of every layer in float32,
AdamW: each system opens the folder afresh for every case, in this process. A row is written as soon
as it is measured. Memory is what the allocator reserves after the first step. Peers that are
installed (see `gpu_peers.py`) run in processes of their own.
"""

import datetime
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM

import onn_core
from onn_core.record import describe_environment, write_json
from onn_core.weights.geometry import geometry
from onn_core.weights.random_model import write_random_model
from onn_workbench import streamers

CASES = ((1, 512), (8, 128), (32, 128), (32, 512), (128, 128))
# (memory_budget, quantize); no budget: PEFT, all resident
SETTINGS = (("4GB", None), (None, None), ("40GB", None), ("2.5GB", "nf4"))
N_STEPS = 5  # timed, after one more


def open_base(folder: Path, budget: str | None, quantize: str | None):
    if budget is not None:
        return onn_core.from_pretrained(
            folder, memory_budget=budget, quantize=quantize, device="cuda"
        )
    base = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map={"": "cuda"})
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()
    base.config.use_cache = False
    return base


def measure(
    folder: Path, budget: str | None, quantize: str | None, batch_size: int, n_tokens: int
) -> dict:
    torch.manual_seed(0)
    base = open_base(folder, budget, quantize)
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    generator, seconds, losses = torch.Generator().manual_seed(0), [], []
    for _ in range(N_STEPS + 1):
        shape = (batch_size, n_tokens)
        ids = torch.randint(base.config.vocab_size, shape, generator=generator).to("cuda")
        torch.cuda.synchronize()
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        losses.append(float(loss.detach()))
        if len(seconds) == 1:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    row = {
        "system": "PEFT, all resident" if budget is None else "onn",
        "memory_budget": budget,
        "quantize": quantize,
        "batch_size": batch_size,
        "sequence": n_tokens,
        "step_s": statistics.median(seconds[1:]),
        "step_s_all": seconds[1:],
        "first_step_s": seconds[0],
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "losses": losses,
    }
    if budget is not None:
        plan = base.plan
        row |= {"micro_batch_size": plan.micro_batch_size, "layers_resident": plan.n_resident}
        row |= {"graphs_reserved": plan.n_reserved, "boundaries": plan.boundaries}
        row["captured"] = plan.captured
        base.close()
    return row


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_random_model(Path(scratch) / "model", geometry("llama-3-8b"))
        record = {"date": datetime.date.today().isoformat(), "rows": rows}
        record["environment"] = describe_environment(torch.device("cuda"))

        def run(setting: tuple) -> None:
            for case in CASES:
                rows.append(measure(folder, *setting, *case))
                print(json.dumps(rows[-1]), flush=True)
                write_json(Path(sys.argv[1]), record)
                gc.collect()
                torch.cuda.empty_cache()

        for setting in SETTINGS[:2]:  # peers in the middle: a machine's speed may drift
            run(setting)
        for system in filter(streamers.is_installed, streamers.PACKAGES):
            command = [sys.executable, Path(__file__).with_name("gpu_peers.py"), system, folder]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout
            found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
            print(*map(json.dumps, found), sep="\n", flush=True)
            rows += found
            write_json(Path(sys.argv[1]), record)
        for setting in SETTINGS[2:]:
            run(setting)


if __name__ == "__main__":
    main()
