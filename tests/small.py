"""A toy model with a small tokenizer of its own, and text to train on: a run takes a second."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import onn_core
from onn_core.run.checkpoints import Checkpoints

# All that could go wrong on a resume, at once.
EVERYTHING = {
    "batch_size": 4,
    "max_steps": 7,
    "max_length": 80,
    "learning_rate": 1e-2,
    "lora_dropout": 0.3,
    "gradient_accumulation_steps": 2,
    "micro_batch_size": 3,
    "lr_schedule": "cosine",
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "loss_scale": "dynamic",
    "eval_every": 2,
    "eval_samples": 3,
    "checkpoint_every": 2,
    "device": "cpu",
    "progress": False,
}
# Each differs from EVERYTHING in what a run may have of its own.
DIFFERENT = {
    "everything": {},
    "seed": {"seed": 4, "lora_rank": 3, "learning_rate": 1e-3, "batch_size": 5},
    "last": {"sparse_layers": "last:1", "lora_dropout": 0.0, "max_steps": 4, "eval_every": 3},
    "short": {"max_length": 40, "micro_batch_size": None, "gradient_accumulation_steps": 3},
    "plain": {"loss_scale": None, "lr_schedule": "constant", "eval_every": 0, "max_steps": 9},
    "targets": {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 4, "eval_batch_size": 9},
    "packed": {"packing": True, "held_out_fraction": 0.2, "max_grad_norm": None},
    "shuffled": {"shuffle_targets": 3, "batch_size": 1, "micro_batch_size": 1, "weight_decay": 0},
}
TIMES = ("step_s", "wait_s", "forward_s", "backward_s", "head_s", "optimizer_s")
TIMES += ("bytes_read", "layer_loads", "wall_s", "gathered")

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def rows() -> list[dict[str, str]]:
    """Sums of two numbers in words."""
    return [
        {"prompt": f"What is {WORDS[a]} and {WORDS[b]}?", "response": f"It is {WORDS[a + b]}."}
        for a in range(6)
        for b in range(5)
    ]


def write_small(
    folder: Path, n_layers: int = 3, hidden_size: int = 32, family: str = "llama", **own: int
) -> tuple[Path, Path]:
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
    config = AutoConfig.for_model(
        family,
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=0,
        **own,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(model_dir, max_shard_size="50KB")
    return model_dir, data


class OverflowingTrainer(onn_core.ChunkedLoraTrainer):
    """Its gradient scale overflows at first: steps are skipped and it is halved."""

    def setup(self):
        super().setup()
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(self.scaler.state_dict() | {"scale": 2.0**127})


def config(small, output_dir, **changes):
    model_dir, data = small
    paths = {"model_dir": str(model_dir), "data": str(data), "output_dir": str(output_dir)}
    return onn_core.TrainConfig(**EVERYTHING | paths | changes)


def trainer(small, output_dir, **changes):
    return OverflowingTrainer(config(small, output_dir, **changes))


def adapter(folder):
    return load_file(folder / "adapter/adapter_model.safetensors")


def numbers(folder):
    """All of a record that must be equal."""
    record = json.loads((folder / "record.json").read_text())
    for entry in record["steps"] + record["evals"]:
        for name in TIMES:
            entry.pop(name, None)
    return record["steps"], record["evals"], record["status"], record["stopped_early"]


def require_equal(folder, other):
    ours, theirs = adapter(folder), adapter(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert numbers(folder) == numbers(other)
    states = [
        load_file(Checkpoints(f, 1).paths()[-1] / "state.safetensors") for f in (folder, other)
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
