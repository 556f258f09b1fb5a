"""Toy models of several families: saved once, loaded in memory and streamed, and compared."""

import atexit
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from transformers import AutoModelForCausalLM

import onn_core
from onn_core.adapters.lora import linear_names
from onn_core.memory.plan import Plan
from onn_core.streaming.skeleton import decoder_layers

N_LAYERS = 5
VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large, so that no part of a model is nearly linear
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT2_SIZES = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": N_LAYERS, "n_head": 4}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
SETTINGS = {
    "llama": ("Llama", GROUPED),
    "llama-tied": ("Llama", GROUPED | {"tie_word_embeddings": True}),
    "phi3": ("Phi3", GROUPED),
    "qwen2": ("Qwen2", GROUPED | {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", GROUPED | CAPS | {"head_dim": 8, "sliding_window": 4}),
    "phi": ("Phi", SIZES),  # its head has a bias
    "gpt2": ("GPT2", GPT2_SIZES | NO_DROPOUT | {"n_positions": 64, "initializer_range": 0.2}),
    "gpt_neox": ("GPTNeoX", SIZES),
    "mixtral": ("Mixtral", GROUPED | {"num_local_experts": 4}),
    "granitemoe": ("GraniteMoe", GROUPED | {"num_local_experts": 4, "logits_scaling": 2.0}),
}


@functools.cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="onn-toy-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@functools.cache
def toy_dir(
    family: str,
    dtype: torch.dtype = torch.float32,
    shard: str = "5GB",
    n_layers: int = N_LAYERS,
) -> Path:
    """The folder of a random toy model; the same weights in every dtype and shard size."""
    name, settings = SETTINGS[family]
    depth = {"n_layer" if family == "gpt2" else "num_hidden_layers": n_layers}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings | depth)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases, else ones and zeros
                parameter += 0.1 * torch.randn_like(parameter)
    folder = _root() / f"{family}-{str(dtype).removeprefix('torch.')}-{shard}-{n_layers}"
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def in_memory(folder: Path, **settings) -> transformers.PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto"} | settings)


def streamed(folder: Path, **settings) -> transformers.PreTrainedModel:
    stored = transformers.AutoConfig.from_pretrained(folder).dtype  # on any CPU, for equality
    return onn_core.from_pretrained(folder, **{"device": "cpu", "dtype": stored} | settings)


def change_plan(model: transformers.PreTrainedModel, **changes):
    """A streamed model with another plan than its budget gave it."""
    planner = model.streaming.planner
    planner.plan = dataclasses.replace(planner.plan, **changes)
    return model


def reserving_graphs(model: transformers.PreTrainedModel, n_reserved: int = N_LAYERS):
    """A streamed model that reserves the graphs of its last layers, though not their weights."""
    terms = dataclasses.replace(model.plan.terms, graphs=n_reserved << 30)
    return change_plan(model, n_reserved=n_reserved, count_terms=lambda: terms)


def prefer_plans(model: transformers.PreTrainedModel, wanted: Callable[[Plan], bool]) -> None:
    """Let a streamed model with a budget take a plan that is `wanted` among those that fit."""
    planner = model.streaming.planner

    def step_s(sizes, plan, batch_size, n_tokens):
        return not wanted(plan), plan.n_reserved, plan.n_resident

    planner.sizes = dataclasses.replace(planner.sizes, step_s=step_s)


def toy_batch(batch_size: int = 5, n_tokens: int = 10, seed: int = 0) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels (B, T): uneven right padding, masked prompts."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (batch_size, n_tokens), generator=generator)
    positions = torch.arange(n_tokens)
    lengths = n_tokens - 2 * torch.arange(batch_size)[:, None] % (n_tokens - 3)
    prompts = 1 + torch.arange(batch_size)[:, None] % 3
    attention_mask = (positions < lengths).long()
    labels = input_ids.masked_fill((positions >= lengths) | (positions < prompts), -100)
    input_ids = input_ids.masked_fill(positions >= lengths, 0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


# In memory, float16 rounds the gradient of the logits before a loss scale has lifted it; the
# streamed head keeps it in float32 until then.
FLOAT16_TOLERANCE = 2e-2


def with_lora(model: transformers.PreTrainedModel, **settings) -> peft.PeftModel:
    """`model` in training mode with LoRA on all linear modules; A and B random, not zero."""
    targets = linear_names(decoder_layers(model))
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": targets}
    defaults |= {"init_lora_weights": False, "task_type": "CAUSAL_LM"}
    defaults["fan_in_fan_out"] = model.config.model_type == "gpt2"
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**defaults | settings)).train()


def step(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], **settings
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and every gradient of one batch; the model's gradients are None afterwards."""
    torch.manual_seed(2)
    loss = model(**batch, **settings).loss
    loss.backward()
    return loss.detach(), take_gradients(model)


def take_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = {name: p.grad for name, p in trained.items()}
    model.zero_grad(set_to_none=True)
    return gradients


def assert_same(got, want, tolerance: float | None = None) -> None:
    """Two (loss, gradients): bit-equal, or within `tolerance` of the largest of each tensor."""
    got_all, want_all = ({"loss": loss} | gradients for loss, gradients in (got, want))
    assert got_all.keys() == want_all.keys() and len(want_all) > 1
    for name, expected in want_all.items():
        found = got_all[name]
        if expected is None or found is None:
            assert found is expected, name
            continue
        assert expected.isfinite().all() and expected.abs().max() > 0, f"{name}: nothing to compare"
        assert found.dtype == expected.dtype, name
        if tolerance is None:
            assert torch.equal(found, expected), f"{name} differs by {difference(found, expected)}"
        else:
            off = difference(found, expected)
            assert off <= tolerance, f"{name} differs by {off}"


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value; NaN counts as infinite."""
    relative = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    return relative.nan_to_num(nan=torch.inf).item()
