"""Seconds a step of another system that streams a frozen base: `gpu_peers.py SYSTEM FOLDER`.

SYSTEM is one of `onn_workbench.streamers`, installed by hand: neither is needed for anything else.
The same cases, tokens, LoRA and optimizer as in `gpu_steps.py`, which starts this in a process of
its own for each system; a JSON row a case on stdout.
"""

import importlib.metadata
import json
import statistics
import sys
import time
from pathlib import Path

import peft
import torch
from transformers import AutoConfig

from onn_workbench import streamers

CASES = ((1, 512), (8, 128), (32, 128), (32, 512), (128, 128))
N_STEPS = 5  # timed, after one more
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    system, folder = sys.argv[1], Path(sys.argv[2])
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    lora = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=PROJECTIONS, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    model = streamers.OPENERS[system](folder, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = getattr(model, "optimizer", None) or torch.optim.AdamW(trained, lr=1e-4)
    _, package = streamers.PACKAGES[system]
    for batch_size, n_tokens in CASES:
        generator, seconds, losses = torch.Generator().manual_seed(0), [], []
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(N_STEPS + 1):
            shape = (batch_size, n_tokens)
            ids = torch.randint(vocabulary, shape, generator=generator).to("cuda")
            torch.cuda.synchronize()
            started = time.perf_counter()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
            losses.append(float(loss.detach()))
        row = {
            "system": f"{package} {importlib.metadata.version(package)}",
            "batch_size": batch_size,
            "sequence": n_tokens,
            "step_s": statistics.median(seconds[1:]),
            "step_s_all": seconds[1:],
            "first_step_s": seconds[0],
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "losses": losses,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
