"""Large folders as they are published, on a CPU within 4 GiB: `python tests/stored_formats.py OUT`.

Writes gpt-oss-20b's geometry in MXFP4 (14 GB) and Qwen3-32B's in fp8 with blocks of 128 x 128
(34 GB) at random, one after the other, and trains LoRA on one sample of 16 tokens in a control
group. OUT.json says for each the seconds of a step, what it read, what is reading's part of that
(of the disk's own speed, measured before and after), and the peak of memory.
"""

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import peft
import torch
from gpu_405b import random_blocks, write_shard
from transformers import AutoConfig

import onn_core
from onn_core.memory.process import memory_bytes
from onn_core.record import cache_dir, describe_environment, write_json
from onn_core.weights.folder import INDEX_NAME
from onn_core.weights.geometry import empty_model, save_configs, stored_tensors
from onn_core.weights.reader import host_buffer
from onn_workbench.bench import evict, measure_ceilings, memory_cap

CAP_BYTES, BUDGET_BYTES = 4 << 30, 3 << 30
N_TOKENS = 16
N_STEPS = 2  # the first is not timed
BLOCK = 128  # of fp8's scales

SETTINGS = {
    "gpt-oss-20b": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "qwen3-32b": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
}


def config_of(name: str, n_layers: int | None):
    if name == "gpt-oss-20b":
        shape = {"num_hidden_layers": n_layers or 24, "num_local_experts": 32}
        return AutoConfig.for_model("gpt_oss", **shape)
    shape = {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": n_layers or 64}
    shape |= {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}
    return AutoConfig.for_model("qwen3", **shape, vocab_size=151936, tie_word_embeddings=False)


def blocks_of_values() -> dict[str, torch.Tensor]:
    """As `random_blocks`, with those of the formats here."""
    blocks = random_blocks()
    n = len(blocks["packed"])
    made = {
        "scales": torch.randint(118, 124, (n,), dtype=torch.uint8),  # powers of two, from 2 ** -9
        "fp8": torch.randn(n).to(torch.float8_e4m3fn).view(torch.uint8),
        "scale": torch.full((n // 4,), 0.02).view(torch.uint8),
    }
    for name, values in made.items():
        blocks[name] = host_buffer(n)
        blocks[name].copy_(values)
    return blocks


def layout_of(kind: str, tensors: dict[str, torch.Tensor]) -> dict:
    """Name -> dtype, shape, and what is written: bytes, or the name of a random block."""
    large, small = {}, {}
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if kind == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")):
            n_experts, n_in, n_out = shape
            parts = (n_experts, n_out, n_in // 32)
            large[f"{name}_blocks"] = torch.uint8, (*parts, 16), "packed"
            large[f"{name}_scales"] = torch.uint8, parts, "scales"
        elif kind == "fp8" and name.endswith("proj.weight"):
            parts = tuple(-(-size // BLOCK) for size in shape)
            large[name] = torch.float8_e4m3fn, shape, "fp8"
            large[f"{name}_scale_inv"] = torch.float32, parts, "scale"
        elif len(shape) > 1:
            large[name] = torch.bfloat16, shape, "bfloat16"
        else:
            fill = torch.zeros if name.endswith(("bias", "sinks")) else torch.ones
            content = fill(shape, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
            small[name] = torch.bfloat16, shape, content
    return large | small


def write_folder(folder: Path, name: str, n_layers: int | None) -> int:
    """The random folder of a model, a file a layer; returns its bytes."""
    config, settings = config_of(name, n_layers), SETTINGS[name]
    model = empty_model(config, torch.bfloat16)
    config.dtype, config.architectures = torch.bfloat16, [type(model).__name__]
    folder.mkdir(parents=True)
    save_configs(config, folder)
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(content))
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in stored_tensors(model).items():
        parts = key.split(".")
        number = parts[parts.index("layers") + 1] if "layers" in parts else "ends"
        shards.setdefault(f"model-{number}.safetensors", {})[key] = tensor
    layouts = {shard: layout_of(settings["quant_method"], own) for shard, own in shards.items()}
    index = {key: shard for shard, own in layouts.items() for key in own}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": index}))
    blocks = blocks_of_values()
    return sum(write_shard(folder / shard, own, blocks, True) for shard, own in layouts.items())


def train(folder: Path) -> dict:
    """What a process measures: seconds of steps, bytes that each read, the peak of memory."""
    torch.manual_seed(0)
    before = memory_bytes()
    base = onn_core.from_pretrained(folder, memory_budget=BUDGET_BYTES, device="cpu")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    seconds, n_read, losses, waited = [], [], [], []
    for _ in range(N_STEPS):
        ids = torch.randint(base.config.vocab_size, (1, N_TOKENS))
        started, done = time.perf_counter(), base.counts()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        done = base.counts() - done
        n_read.append(done.bytes_read)
        waited.append(done.wait_s)
        losses.append(float(loss.detach()))
        print(f"{seconds[-1]:.1f} s, loss {losses[-1]:.3f}", file=sys.stderr, flush=True)
    peak = [
        int(x.split()[1])
        for x in Path("/proc/self/status").read_text().splitlines()
        if x.startswith("VmHWM")
    ]
    return {
        "step_s": statistics.median(seconds[1:]),
        "step_s_all": seconds[1:],
        "first_step_s": seconds[0],
        "bytes_read": n_read[-1],
        "wait_s": waited[-1],
        "losses": losses,
        "peak_bytes": peak[0] * 1024 - before,
        "dtype": str(base.dtype).removeprefix("torch."),
        "layers_resident": base.plan.n_resident,
    }


def measure(folder: Path) -> dict:
    evict(folder)
    command = [sys.executable, __file__, "--worker", str(folder)]
    with memory_cap(CAP_BYTES) as group:
        done = subprocess.run([*command, str(group or "")], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"failed": done.returncode}
    return json.loads(done.stdout.splitlines()[-1]) | {"capped": group is not None}


def main() -> None:
    if sys.argv[1] == "--worker":
        folder, group = sys.argv[2:]
        if group:
            Path(group).write_text(str(os.getpid()))
        print(json.dumps(train(Path(folder))))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", default=",".join(SETTINGS))
    parser.add_argument("--layers", type=int, help="decoder layers (default: all of them)")
    arguments = parser.parse_args()
    record = {"date": datetime.date.today().isoformat(), "environment": describe_environment()}
    record |= {"cap_bytes": CAP_BYTES, "budget_bytes": BUDGET_BYTES, "tokens": N_TOKENS, "rows": []}
    for name in arguments.models.split(","):
        folder = cache_dir() / f"stored-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            n_bytes = write_folder(folder, name, arguments.layers)
            before = measure_ceilings(folder, [N_TOKENS], "cpu")
            row = measure(folder)
            after = measure_ceilings(folder, [N_TOKENS], "cpu")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        ceilings = before.mean(after)
        row = {"model": name, "quantised": SETTINGS[name]["quant_method"], "bytes": n_bytes} | row
        row["read_bytes_per_s"] = ceilings.read_bytes_per_s
        row["disturbed"] = before.disturbed(after, ("read",))
        if "failed" not in row:
            read_s = row["bytes_read"] / ceilings.read_bytes_per_s
            row["percent_of_reading"] = 100 * read_s / row["step_s"]
        record["rows"].append(row)
        write_json(arguments.out, record)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
