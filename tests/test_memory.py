"""Memory does not grow with the depth of the model, and a hard limit below its size is kept."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig

from onn_core.models import write_random_checkpoint

LAYER_BYTES = 4 * (4 * 512 * 512 + 3 * 512 * 1536)  # 13.6 MB of float32
N_LAYERS = 24
LIMIT_BYTES = 160 << 20  # beyond the libraries; the model has 327 MB
REFUSED = ("memory", "alloc", "thread")  # in what is said without it

# Runs in its own process: argv is a folder, how to limit memory, and what to do then.
CHILD = """
import gc, json, os, resource, sys, threading
import peft, torch, transformers.models.llama.modeling_llama
import onn_core
from onn_core.loss import IGNORED

folder, how, amount, task = sys.argv[1:]
torch.set_num_threads(1)

def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024

def train(folder, steps, **settings):
    model = onn_core.from_pretrained(folder, device="cpu", **settings)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    ids = torch.arange(3, 19).view(2, 8)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item(), model

gc.collect()
if how == "cgroup":
    with open(amount, "w") as file:
        file.write(str(os.getpid()))
elif how == "rlimit":
    limit = status("VmData") + int(amount)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
before = status("VmRSS")
if task == "train":
    loss, model = train(folder, 2)
    slots = model.base_model.model.session.stream.slots
    slots_bytes = sum(size * count for size, count in slots.items())
else:
    held = torch.ones(int(task), dtype=torch.uint8)
    loss, slots_bytes = held.sum().item(), 0
peak = status("VmHWM") - before
print(json.dumps({"loss": loss, "peak_bytes": peak, "slots_bytes": slots_bytes}))
"""


def run_child(folder, how="none", amount=0, task="train"):
    """What a process of its own prints: its loss, its peak memory beyond the libraries."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, folder, how, str(amount), task],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},
    )


def measured(child):
    assert child.returncode == 0, child.stderr[-2000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Layers -> the folder of a random model of so many equal layers."""
    made = {}
    for n_layers in (6, N_LAYERS):
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=n_layers,
            num_attention_heads=8,
            max_position_embeddings=64,
        )
        folder = tmp_path_factory.mktemp("memory") / str(n_layers)
        made[n_layers] = write_random_checkpoint(
            folder, config, dtype=torch.float32, progress=False
        )
    yield made
    for folder in made.values():
        for path in folder.glob("*.safetensors"):
            path.unlink()


def test_peak_memory_does_not_grow_with_depth(folders):
    peaks = {n: measured(run_child(folder)) for n, folder in folders.items()}
    print(peaks)
    more = peaks[N_LAYERS]["peak_bytes"] - peaks[6]["peak_bytes"]
    assert more < LAYER_BYTES  # of 18 layers more
