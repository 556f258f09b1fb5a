"""LoRA of 405 billion parameters on one GPU: `python tests/gpu_405b.py OUT.json`.

Writes NF4 of a geometry at random to --folder (209 GB for llama-3.1-405b), fills the host store
with one forward of 16 tokens, then trains steps of --batch-size x --tokens with LoRA on every
layer. Prints each stage as it ends and writes OUT.json anew. A step is only begun if it is likely
to end within --limit-s. Rehearse with `--geometry llama-3-70b`, or at toy size on a CPU:

    python tests/gpu_405b.py OUT.json --device cpu --geometry smollm2 --layers 4 --batch-size 2 \
        --tokens 32 --budget 500MB
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import json
import math
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]
# Slots, scratch and activations of one to two GB each must not leave gaps that none of them fits.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import peft  # noqa: E402
import torch  # noqa: E402

import onn_core  # noqa: E402
from onn_core.record import describe_environment, write_json  # noqa: E402
from onn_core.weights import quantise  # noqa: E402
from onn_core.weights.folder import INDEX_NAME  # noqa: E402
from onn_core.weights.geometry import (  # noqa: E402
    count_parameters,
    empty_model,
    geometry,
    save_configs,
    stored_tensors,
)
from onn_core.weights.reader import host_buffer  # noqa: E402
from onn_core.weights.shards import DTYPE_NAMES  # noqa: E402

PAGE = 4096
BLOCK_BYTES = 16 << 20  # of one write
ABSMAX = 0.045  # the 16 values have a standard deviation of 0.45: weights then have one of 0.02


def random_blocks() -> dict[str, torch.Tensor]:
    """A block of each kind of values that is written again and again, (n,) uint8."""
    torch.manual_seed(0)
    n = BLOCK_BYTES
    made = {
        "packed": torch.randint(256, (n,), dtype=torch.uint8),
        "absmax": (ABSMAX * (0.75 + 0.5 * torch.rand(n // 4))).view(torch.uint8),
        "bfloat16": (0.02 * torch.randn(n // 2)).bfloat16().view(torch.uint8),
    }
    blocks = {}
    for name, values in made.items():
        blocks[name] = host_buffer(n)  # page-aligned, for direct writes
        blocks[name].copy_(values)
    return blocks


def write_shard(path: Path, layout: dict, blocks: dict[str, torch.Tensor], direct: bool) -> int:
    """A safetensors file of a layout; direct: past the page cache, where the file system can."""
    header, stop = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, _) in layout.items():
        start, stop = stop, stop + math.prod(shape) * dtype.itemsize
        fields = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape)}
        header[name] = fields | {"data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % PAGE)
    begin = 8 + len(text)
    plain = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    past_cache = plain
    if direct:
        with contextlib.suppress(OSError):
            past_cache = os.open(path, os.O_WRONLY | os.O_DIRECT)
    with contextlib.suppress(OSError):
        os.posix_fallocate(plain, 0, begin + stop)
    os.pwrite(plain, (begin - 8).to_bytes(8, "little") + text, 0)
    for name, (_, _, content) in layout.items():
        at, end = (begin + offset for offset in header[name]["data_offsets"])
        if isinstance(content, bytes):
            os.pwrite(plain, content, at)
            continue
        block = memoryview(blocks[content].numpy())
        while at < end:
            n = min(len(block), end - at)
            aligned = at % PAGE == 0 and n % PAGE == 0
            at += os.pwrite(past_cache if aligned else plain, block[:n], at)
    for descriptor in {plain, past_cache}:  # one and the same without `direct`
        os.close(descriptor)
    return begin + stop


def layout_of(tensors: dict[str, torch.Tensor], is_matrix: set[str]) -> dict:
    """Name -> dtype, shape, and what is written: bytes, or the name of a random block."""
    large, small = {}, {}
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if name not in is_matrix:
            content = torch.ones(shape, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
            content = "bfloat16" if len(shape) > 1 else content
            (large if len(shape) > 1 else small)[name] = torch.bfloat16, shape, content
            continue
        parts = quantise.layout("nf4", name, shape)
        constant = quantise.quantise("nf4", torch.zeros(1, 64))
        names = list(parts)
        large[names[0]] = *parts[names[0]], "packed"
        large[names[1]] = *parts[names[1]], "absmax"
        small[names[2]] = *parts[names[2]], constant[2].view(torch.uint8).numpy().tobytes()
        small[names[3]] = *parts[names[3]], quantise.state(shape)
    return large | small


def write_folder(folder: Path, config, direct: bool, n_threads: int) -> int:
    """The random NF4 folder of a geometry, a file a layer; returns its bytes."""
    model = empty_model(config, torch.bfloat16)
    tensors = stored_tensors(model)
    config.dtype, config.architectures = torch.bfloat16, [type(model).__name__]
    folder.mkdir(parents=True)
    save_configs(config, folder)
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = quantise.settings("nf4")
    (folder / "config.json").write_text(json.dumps(content))
    shards: dict[str, dict[str, torch.Tensor]] = {}
    is_matrix = set()
    for name, tensor in tensors.items():
        parts = name.split(".")
        in_layer = "layers" in parts
        if in_layer and tensor.ndim == 2:
            is_matrix.add(name)
        key = f"layer-{int(parts[parts.index('layers') + 1]):03d}" if in_layer else "ends"
        shards.setdefault(f"{key}.safetensors", {})[name] = tensor
    layouts = {shard: layout_of(own, is_matrix) for shard, own in shards.items()}
    index = {name: shard for shard, own in layouts.items() for name in own}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": index}))
    blocks = random_blocks()
    with concurrent.futures.ThreadPoolExecutor(n_threads) as pool:
        jobs = [
            pool.submit(write_shard, folder / shard, own, blocks, direct)
            for shard, own in layouts.items()
        ]
        return sum(job.result() for job in jobs)


def free_files(folder: Path) -> None:
    """Give back what the files hold: memory, where they lie in memory. They look unchanged."""
    for path in folder.glob("*.safetensors"):
        found = path.stat()
        os.truncate(path, 0)
        os.truncate(path, found.st_size)
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def matmul_flops(device: torch.device, n_tokens: int, width: int, wide: int) -> float:
    """FLOP/s of a bf16 matmul of the model's shape, about as long as one of a step."""
    x = torch.randn(n_tokens, width, dtype=torch.bfloat16, device=device)
    weight = torch.randn(wide, width, dtype=torch.bfloat16, device=device)
    seconds = []
    for _ in range(8):
        wait(device)
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * n_tokens * width * wide / statistics.median(seconds[2:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/405b"), help="about 210 GB")
    parser.add_argument("--geometry", default="llama-3.1-405b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--budget", default="8GB")
    parser.add_argument("--host-budget", default="auto")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rank", type=int, default=8)
    # float32 adapters on all seven take 5 GB with their moments, more than 8 GB have room for
    parser.add_argument("--targets", default="q_proj,v_proj", help='or "all-linear"')
    parser.add_argument("--adapters", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--direct", action="store_true", help="write past the page cache")
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument(
        "--free-files", action="store_true", help="once the store is full, for files in /dev/shm"
    )
    parser.add_argument("--keep", action="store_true", help="do not delete the folder")
    parser.add_argument("--limit-s", type=float, default=570)
    given = parser.parse_args()
    started, device = time.perf_counter(), torch.device(given.device)
    config = geometry(given.geometry, given.layers)
    record = {"date": datetime.date.today().isoformat(), "geometry": given.geometry}
    record["environment"] = describe_environment(device)
    record["settings"] = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(given).items()
        if key not in ("out", "folder")
    }

    def note(**facts) -> None:
        record.update(facts)
        print(f"[{time.perf_counter() - started:.0f} s] {json.dumps(facts)}", flush=True)
        write_json(given.out, record)

    try:
        measure(given, config, device, note, started)
    finally:
        if not given.keep:
            shutil.rmtree(given.folder, ignore_errors=True)


def measure(given, config, device: torch.device, note, started: float) -> None:
    record: dict = {}
    if not given.folder.is_dir():
        begun = time.perf_counter()
        n_bytes = write_folder(given.folder, config, given.direct, given.threads)
        write_s = time.perf_counter() - begun
        note(write_s=write_s, folder_bytes=n_bytes, write_bytes_per_s=n_bytes / write_s)
    torch.manual_seed(0)
    begun = time.perf_counter()
    base = onn_core.from_pretrained(
        given.folder,
        memory_budget=given.budget,
        host_budget=given.host_budget,
        device=device,
        dtype="bfloat16",
    )
    targets = given.targets if given.targets == "all-linear" else given.targets.split(",")
    lora = peft.LoraConfig(
        r=given.rank, lora_alpha=2 * given.rank, target_modules=targets, task_type="CAUSAL_LM"
    )
    narrow = given.adapters == "bfloat16"
    model = peft.get_peft_model(base, lora, autocast_adapter_dtype=not narrow).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")
    base.fit(given.batch_size, given.tokens)
    plan, n_trained = base.plan, sum(p.numel() for p in trained)
    note(
        open_s=time.perf_counter() - begun,
        plan=str(plan.terms),
        micro_batch_size=plan.micro_batch_size,
        layers_resident=plan.n_resident,
        graphs_reserved=plan.n_reserved,
        boundaries=plan.boundaries,
        dense_buffers={str(size): n for size, n in plan.dense.items()},
        trained=n_trained,
    )
    generator = torch.Generator().manual_seed(0)

    def batch() -> torch.Tensor:
        shape = (given.batch_size, given.tokens)
        return torch.randint(config.vocab_size, shape, generator=generator).to(device)

    begun = time.perf_counter()
    with torch.no_grad():
        model(input_ids=batch()[:1, :16])
    wait(device)
    weights = [weight for unit in base.streaming.stream.units for weight in unit]
    store_bytes = sum(weight.n_bytes for weight in weights if weight.host is not None)
    note(fill_s=time.perf_counter() - begun, store_bytes=store_bytes)
    if given.free_files:
        if any(weight.host is None for weight in weights):
            raise SystemExit("the host store does not hold all weights: their files are needed.")
        free_files(given.folder)

    n_layer = base.sizes.layer_parameters
    tokens = given.batch_size * given.tokens
    micro_tokens = plan.micro_batch_size * given.tokens
    flops = matmul_flops(device, micro_tokens, config.hidden_size, config.intermediate_size)
    head = config.vocab_size * config.hidden_size
    n_decoder = n_layer * config.num_hidden_layers
    limit_s = (6 * n_decoder + 4 * head) * tokens / flops
    note(matmul_flops_per_s=flops, limit_s=limit_s, parameters=count_parameters(config))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for number in range(given.steps):
        left = given.limit_s - (time.perf_counter() - started)
        expected = seconds[-1] if seconds else 2 * limit_s
        if given.limit_s and left < expected and seconds:
            note(stopped=f"a step of {expected:.0f} s does not fit {left:.0f} s")
            break
        ids = batch()
        wait(device)
        begun, before = time.perf_counter(), base.counts()
        loss = model(input_ids=ids, labels=ids).loss
        forward_s = time.perf_counter() - begun
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait(device)
        seconds.append(time.perf_counter() - begun)
        losses.append(float(loss.detach()))
        step_s = min(seconds[1:] or seconds)  # the first one pins what waits for backward
        record |= {"seconds": seconds, "losses": losses, "step_s": step_s}
        record |= {"tokens_per_s": tokens / step_s, "percent_of_matmul": 100 * limit_s / step_s}
        record["wait_s"] = (base.counts() - before).wait_s
        record["bytes_read"] = (base.counts() - before).bytes_read
        if device.type == "cuda":
            record["reserved_bytes"] = torch.cuda.max_memory_reserved()
            record["allocated_bytes"] = torch.cuda.max_memory_allocated()
        note(step=number, forward_s=forward_s, **record)
    base.close()


if __name__ == "__main__":
    main()
