"""Toy models as GGUF files, with names, row orders and types as llama.cpp writes them."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from transformers.convert_slow_tokenizer import bytes_to_unicode

VOCABULARY = 100
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,  # a row has whole blocks of every type
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
# architecture in the file -> class of the configuration, its settings
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 128}),
    "phi3": ("Phi3", {}),
    "gemma2": ("Gemma2", {"head_dim": 64, "tie_word_embeddings": True, "sliding_window": 4}),
    "gemma3": ("Gemma3Text", {"head_dim": 64, "tie_word_embeddings": True, "sliding_window": 4}),
    "qwen3moe": ("Qwen3Moe", MOE | {"head_dim": 64, "norm_topk_prob": True}),
    "qwen2moe": ("Qwen2Moe", MOE | {"shared_expert_intermediate_size": 256}),
}
# Of which gguf quantises nothing itself: a scale, or two, lies at these bytes of each block.
SCALES = {
    **{Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2)},
    **{Type.Q6_K: (208,), Type.IQ2_XXS: (0,), Type.IQ2_XS: (0,), Type.IQ2_S: (0,)},
    **{Type.IQ3_XXS: (0,), Type.IQ3_S: (0,), Type.IQ1_S: (0,), Type.IQ4_NL: (0,)},
    **{Type.IQ4_XS: (0,), Type.TQ1_0: (52,), Type.TQ2_0: (64,)},
    **dict.fromkeys((Type.Q4_0, Type.Q5_0, Type.Q8_0), (0,)),
    **dict.fromkeys((Type.Q4_1, Type.Q5_1), (0, 2)),
}


def toy_model(family: str, **sizes: int) -> transformers.PreTrainedModel:
    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | settings | sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases, else ones and zeros
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def random_blocks(shape: tuple[int, ...], kind: Type, seed: int = 0) -> np.ndarray:
    """Rows of blocks of any bits, with scales of which weights of usual size come."""
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (*shape[:-1], shape[-1] // block, n_bytes), np.uint8)
    for start in SCALES.get(kind, ()):
        scale = generator.uniform(2e-4, 1e-3, blocks.shape[:-1]).astype(np.float16)
        blocks[..., start : start + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def quantised(values: np.ndarray, kind: Type, seed: int) -> np.ndarray:
    """As it is stored: as gguf quantises it, or random where it cannot."""
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:
        return random_blocks(values.shape, kind, seed)


def stored_as(family: str, model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """Name in the file -> values in the order of llama.cpp's conversion."""
    config = model.config
    names = gguf.get_tensor_name_map(
        {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[family],
        config.num_hidden_layers,
    )
    tensors = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        stem, _, suffix = name.rpartition(".")
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            block = name.split(".")[2]
            ends = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}[suffix]
            for end, part in zip(ends, np.split(values, len(ends), 1), strict=True):
                tensors[f"blk.{block}.ffn_{end}_exps.weight"] = np.ascontiguousarray(part)
            continue
        if family == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads
            heads = heads if stem.endswith("q_proj") else config.num_key_value_heads
            turned = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
            values = turned.swapaxes(1, 2).reshape(values.shape)
        if family.startswith("gemma") and stem.endswith("norm"):
            values = values + 1
        if stem.endswith("shared_expert_gate"):
            values = values[0]
        tensors[f"{names.get_name(stem)}.{suffix}"] = values
    return tensors


def write_gguf(
    path: Path,
    family: str = "llama",
    kind: Callable[[str], Type] | Type = Type.Q8_0,
    model: transformers.PreTrainedModel | None = None,
    split: int = 0,
    more: dict[str, np.ndarray] | None = None,
) -> Path:
    """A toy model's file; matrices in the type `kind`, or in what it gives for a tensor's name.

    split: tensors in a file, of several. more: tensors that no parameter takes.
    """
    model = model or toy_model(family)
    config = model.config
    options = {"split_max_tensors": split} if split else {}
    writer = gguf.GGUFWriter(path, family, **options)
    writer.add_name("toy")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    if family in ("llama", "phi3"):
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    elif hasattr(config, "head_dim"):
        writer.add_key_length(config.head_dim)
    if family.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if family.endswith("moe"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        if family == "qwen2moe":
            writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    write_tokenizer(writer)
    tensors = stored_as(family, model) | (more or {})
    for number, (name, values) in enumerate(tensors.items()):
        this = kind(name) if callable(kind) else kind
        if values.ndim == 1 or "ffn_gate_inp" in name:
            this = Type.F32
        stored = quantised(values, this, number)
        writer.add_tensor(name, stored, raw_dtype=this)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tokenizer(writer: gguf.GGUFWriter) -> None:
    """A vocabulary of GPT-2's bytes, those of ASCII text, and one merge."""
    letters = [bytes_to_unicode()[byte] for byte in (10, *range(32, 127))]
    tokens = ["<pad>", "<s>", "</s>", *letters, "he"]
    assert len(tokens) == VOCABULARY
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
    )
