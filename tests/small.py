"""A toy model with a small tokenizer of its own, and text to train on: a run takes a second."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def rows() -> list[dict[str, str]]:
    """Sums of two numbers in words."""
    return [
        {"prompt": f"What is {WORDS[a]} and {WORDS[b]}?", "response": f"It is {WORDS[a + b]}."}
        for a in range(6)
        for b in range(5)
    ]


def write_small(folder: Path, n_layers: int = 3, hidden_size: int = 32) -> tuple[Path, Path]:
    """The folder of a random model with a tokenizer, and a .jsonl file."""
    model_dir, data = folder / "model", folder / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text for row in rows() for text in row.values()], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>"
    ).save_pretrained(model_dir)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(model_dir, max_shard_size="50KB")
    return model_dir, data
