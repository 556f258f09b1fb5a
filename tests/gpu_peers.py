"""Seconds a step of another system that streams a frozen base: `gpu_peers.py SYSTEM FOLDER`.

SYSTEM is soup (soup-cli) or trainstream, installed by hand: neither is needed for anything else.
The same cases, tokens, LoRA and optimizer as in `gpu_steps.py`, which starts this in a process of
its own for each system; a JSON row a case on stdout.
"""

import importlib.metadata
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import peft
import torch
from transformers import AutoConfig

CASES = ((1, 512), (8, 128), (32, 128), (32, 512), (128, 128))
MODULES = {"soup": "soup_cli", "trainstream": "trainstream"}
PACKAGES = {"soup": "soup-cli", "trainstream": "trainstream"}
N_STEPS = 5  # timed, after one more
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def is_installed(system: str) -> bool:
    return importlib.util.find_spec(MODULES[system]) is not None


def open_soup(folder: Path, scratch: Path):
    """Its layers in pinned host memory; the model, and what gives its loss from ids."""
    from soup_cli.utils.layer_shard import read_shard_index, shard_checkpoint
    from soup_cli.utils.layer_stream import stream_arch_of
    from soup_cli.utils.layer_stream_runtime import build_streamed_model

    shards = str(scratch / "soup")
    shard_checkpoint(
        str(folder),
        shards,
        dtype="bfloat16",
        arch=stream_arch_of(AutoConfig.from_pretrained(folder)),
        quant="none",
        notify=lambda text: None,
    )
    model, _ = build_streamed_model(
        model_id=str(folder),
        shard_dir=shards,
        index=read_shard_index(shards),
        lora_config=peft.LoraConfig(target_modules=PROJECTIONS, **LORA),
        device="cuda",
        dtype="bfloat16",
        pin=True,
        require_pin=True,
        quant="none",
        tier="ram",
    )
    return model.train(), lambda ids: model(input_ids=ids, labels=ids).loss, lambda optimizer: None


def open_trainstream(folder: Path, scratch: Path):
    """Every layer's weights streamed from host memory; the loss as its own trainer takes it."""
    import trainstream
    from trainstream.integrations import huggingface as hf

    base = hf.load_model(str(folder), quantize="none")
    base.config.use_cache = False
    base.gradient_checkpointing_enable({"use_reentrant": False})
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=PROJECTIONS, **LORA)).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)
    model, optimizer = trainstream.wrap(
        adapted,
        optimizer,
        device="cuda",
        blocks=hf.decoder_layers(adapted),
        param_offload=True,
        activation_offload=False,
        quantize="none",
        profile=False,
        check_memory=False,
    )
    head = hf.lm_head_of(model)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with hf._CaptureHidden(head) as captured:
            model(input_ids=ids)
        return hf.causal_lm_loss(captured.hidden, head.weight, ids, head.bias, chunk_size=1024)

    return model, loss_of, lambda _: optimizer


def main() -> None:
    system, folder = sys.argv[1], Path(sys.argv[2])
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        opened = {"soup": open_soup, "trainstream": open_trainstream}[system](folder, Path(scratch))
        model, loss_of, wrapped = opened
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = wrapped(trained) or torch.optim.AdamW(trained, lr=1e-4)
        for batch_size, n_tokens in CASES:
            generator, seconds, losses = torch.Generator().manual_seed(0), [], []
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            for _ in range(N_STEPS + 1):
                shape = (batch_size, n_tokens)
                ids = torch.randint(vocabulary, shape, generator=generator).to("cuda")
                torch.cuda.synchronize()
                started = time.perf_counter()
                loss = loss_of(ids)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
                losses.append(float(loss.detach()))
            row = {
                "system": f"{PACKAGES[system]} {importlib.metadata.version(PACKAGES[system])}",
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
