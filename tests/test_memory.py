"""Memory does not grow with the depth of the model, and a hard limit below its size is kept."""

import functools
import json
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from onn_core.memory.plan import CPU_MARGIN as MARGIN
from onn_core.memory.plan import PROCESS_BYTES
from onn_core.weights.geometry import geometry
from onn_core.weights.random_model import write_random_model

LAYER_BYTES = 4 * (4 * 512 * 512 + 3 * 512 * 1536)  # 13.6 MB of float32
N_LAYERS = 24
MODEL_BYTES = N_LAYERS * LAYER_BYTES  # 327 MB
LIMIT_BYTES = 100 << 20  # beyond what the libraries take

# Runs in its own process: argv is a folder, how to limit memory, and what to do then.
CHILD = """
import gc, json, os, resource, sys
import peft, torch, transformers.models.llama.modeling_llama
import onn_core

folder, how, amount, n_resident, budget = sys.argv[1:]
torch.set_num_threads(1)

def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024

gc.collect()
if how == "cgroup":
    with open(amount, "w") as file:
        file.write(str(os.getpid()))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts here
before = status("VmRSS")
torch.manual_seed(0)
model = onn_core.from_pretrained(folder, device="cpu", chunk_size=int(n_resident),
                                 memory_budget=int(budget) or None)
if how == "rlimit":  # a limit on addresses; the empty model has used some, without memory in them
    limit = status("VmData") + int(amount)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
streaming = model.streaming
model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
ids = torch.arange(3, 19).view(2, 8)
losses = []
for _ in range(2):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
peak_bytes = status("VmHWM") - before
plan = streaming.planner.plan
slots_bytes = sum(size * count for size, count in streaming.stream.schedule.slots.items())
print(json.dumps({"losses": losses, "peak_bytes": peak_bytes, "slots_bytes": slots_bytes,
                  "n_resident": plan.n_resident, "planned_bytes": plan.peak_bytes}))
"""


def run_child(folder, how="none", amount=0, n_resident=1, budget=0):
    """Two steps in a process of its own, which prints its losses and its peak memory."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, folder, how]
        + [str(amount), str(n_resident), str(budget)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def measured(child):
    assert child.returncode == 0, child.stderr[-2000:]
    return json.loads(child.stdout.splitlines()[-1])


@functools.cache
def unlimited(folder):
    return measured(run_child(folder))


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
        made[n_layers] = write_random_model(folder, config, dtype=torch.float32, progress=False)
    yield made
    for folder in made.values():
        for path in folder.glob("*.safetensors"):
            path.unlink()


def test_peak_memory_is_that_of_the_slots_at_any_depth(folders):
    shallow, deep = (unlimited(folder) for folder in folders.values())
    assert deep["slots_bytes"] == shallow["slots_bytes"] < 2 * LAYER_BYTES
    assert deep["peak_bytes"] - shallow["peak_bytes"] < LAYER_BYTES  # 18 layers are 245 MB
    assert deep["peak_bytes"] < deep["slots_bytes"] + (64 << 20)
    resident = measured(run_child(folders[N_LAYERS], n_resident=N_LAYERS))
    assert resident["peak_bytes"] > MODEL_BYTES  # so this measure does see weights
    assert resident["losses"] == deep["losses"]


@pytest.fixture
def cgroup():
    """The file that takes a process into a control group of LIMIT_BYTES."""
    root = Path("/sys/fs/cgroup")
    first, limit = root / "memory", "memory.limit_in_bytes"  # version 1
    if not first.is_dir():
        first, limit = root, "memory.max"
    group = first / f"onn-test-{uuid.uuid4().hex[:8]}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group for memory can be made here ({error.strerror})")
    try:
        (group / limit).write_text(str(LIMIT_BYTES))
        if limit == "memory.max":
            (group / "memory.swap.max").write_text("0")
        yield group / "cgroup.procs"
    except OSError as error:
        pytest.skip(f"memory cannot be limited in a control group here ({error.strerror})")
    finally:
        group.rmdir()


def test_a_model_larger_than_a_hard_limit_trains_inside_it(folders, cgroup):
    limited = measured(run_child(folders[N_LAYERS], "cgroup", cgroup))
    assert limited["losses"] == unlimited(folders[N_LAYERS])["losses"]
    killed = run_child(folders[N_LAYERS], "cgroup", cgroup, n_resident=N_LAYERS)
    assert killed.returncode == -signal.SIGKILL  # so the limit is one


def test_a_model_larger_than_the_data_it_may_have_trains_inside_it(folders):
    """For machines without control groups; here a refusal is an error that says what to do."""
    limited = measured(run_child(folders[N_LAYERS], "rlimit", LIMIT_BYTES))
    assert limited["losses"] == unlimited(folders[N_LAYERS])["losses"]
    refused = run_child(folders[N_LAYERS], "rlimit", LIMIT_BYTES, n_resident=N_LAYERS)
    assert refused.returncode == 1
    assert "ConfigError: there is no memory for the resident layers" in refused.stderr


def test_budgets_are_kept_from_matrix_by_matrix_to_the_whole_model(folders):
    n_resident = []
    for n_layers in (0, 8, 30):  # what the budget has room for beside the rest
        budget = int(MARGIN * (PROCESS_BYTES + (8 << 20) + n_layers * LAYER_BYTES))
        found = measured(run_child(folders[N_LAYERS], budget=budget))
        assert found["losses"] == unlimited(folders[N_LAYERS])["losses"]
        assert found["peak_bytes"] <= budget
        assert found["planned_bytes"] <= budget
        n_resident.append(found["n_resident"])
    assert n_resident[0] == 0 < 5 < n_resident[1] < n_resident[2] == N_LAYERS


@pytest.mark.heavy
@pytest.mark.parametrize("budget", [None, 3 << 29])
def test_phi4_geometry_trains_within_one_and_a_half_gib(tmp_path, budget):
    folder = write_random_model(tmp_path / "phi-4", geometry("phi-4", 2), progress=False)
    settings = {"system": "onn", "model_dir": str(folder), "batch_size": 32, "sequence": 16}
    settings |= {"n_steps": 3, "device": "cpu", "room_bytes": budget}
    child = subprocess.run(
        [sys.executable, "-m", "onn_workbench.bench", "--worker", json.dumps(settings)],
        capture_output=True,
        text=True,
    )
    assert measured(child)["peak_memory_bytes"] <= 3 << 29
