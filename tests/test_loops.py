"""The README's own loops: run as they stand, streamed and in memory, to the same adapter."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from toy import GROUPED, in_memory
from transformers import AutoModelForCausalLM, LlamaConfig

import onn_core

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
# Trainers warn of their own future.
pytestmark = pytest.mark.filterwarnings("ignore")


def example(title: str) -> str:
    """The first block of Python under a heading of the README."""
    return re.search(rf"^### {title}\n.*?```python\n(.*?)```", README, re.DOTALL | re.M)[1]


@pytest.fixture
def folder(tmp_path, monkeypatch, smollm2_dir):
    """A working directory with a toy model that has SmolLM2's tokenizer, and some text."""
    model_dir = tmp_path / "path" / "to" / "model"
    torch.manual_seed(0)
    config = LlamaConfig(**GROUPED | {"vocab_size": 49152, "num_hidden_layers": 3})
    AutoModelForCausalLM.from_config(config).save_pretrained(model_dir)
    for path in smollm2_dir.glob("*token*"):
        (model_dir / path.name).write_bytes(path.read_bytes())
    (model_dir / "chat_template.jinja").write_bytes(
        (smollm2_dir / "chat_template.jinja").read_bytes()
    )
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    (tmp_path / "my.txt").write_text("".join(f"{w} and {w} {w}\n" * 4 for w in words))
    rows = [{"prompt": f"Say {w}.", "completion": f" {w} it is, {w}."} for w in words * 4]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(text: str, adapter: str, monkeypatch=None) -> dict[str, torch.Tensor]:
    """The adapter that an example leaves in folder `adapter`; in memory if it can be patched."""
    if monkeypatch is not None:
        monkeypatch.setattr(onn_core, "from_pretrained", lambda path, **_: in_memory(path))
    torch.manual_seed(0)
    exec(compile(text, "README.md", "exec"), {"__name__": "__main__"})
    return load(adapter)


def load(adapter: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(f"{adapter}/adapter_model.safetensors")


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    assert all(want[name].any() for name in want)  # the B matrices begin at zero
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("title", "adapter", "needs"),
    [
        ("A loop of your own", "runs/loop", "torch"),
        ("transformers.Trainer", "runs/trainer/checkpoint-10", "torch"),
        ("TRL's SFTTrainer", "runs/sft/checkpoint-10", "trl"),
    ],
)
def test_example_trains_as_in_memory(title, adapter, needs, folder, monkeypatch):
    pytest.importorskip(needs)
    text = example(title)
    assert len(text.strip().splitlines()) <= 15
    got = run(text, adapter)
    assert_equal(got, run(text, adapter, monkeypatch))


@pytest.mark.parametrize(
    ("title", "needs"), [("transformers.Trainer", "torch"), ("TRL's SFTTrainer", "trl")]
)
def test_resumed_training_ends_in_the_same_adapter(title, needs, folder):
    pytest.importorskip(needs)
    text = example(title)
    name = re.search(r"\"(runs/\w+)\"", text)[1]
    want = run(text, f"{name}/checkpoint-10")
    saved = (folder / name / "checkpoint-10" / "adapter_model.safetensors").stat().st_mtime_ns
    resumed = text.replace(
        "trainer.train()", f"trainer.train(resume_from_checkpoint='{name}/checkpoint-5')"
    )
    assert resumed != text
    got = run(resumed, f"{name}/checkpoint-10")
    again = (folder / name / "checkpoint-10" / "adapter_model.safetensors").stat().st_mtime_ns
    assert again > saved
    assert_equal(got, want)


def test_accelerate_launch(folder, monkeypatch):
    text = example("accelerate launch")
    assert len(text.strip().splitlines()) <= 15
    (folder / "train.py").write_text(text)
    launch = "accelerate.commands.launch --num_processes 1 --num_machines 1 --dynamo_backend no"
    command = [sys.executable, "-m", *launch.split(), "--mixed_precision", "no", "train.py"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    got = load("runs/launched")
    loop = example("A loop of your own")
    assert text.count("accelerator") > 2
    assert got.keys() == run(loop, "runs/loop").keys()
    assert all(tensor.isfinite().all() and tensor.any() for tensor in got.values())


def test_first_run_and_its_reading(folder, monkeypatch, capsys):
    monkeypatch.setattr(onn_core, "prepare_default_model", lambda: folder / "path" / "to" / "model")
    first = example("A first run").replace("ends:4", "all")  # the toy has three layers
    run(first, "runs/first/adapter")
    # The toy has room for 64 tokens.
    reading = example("Reading the results").replace('AI?"])', 'AI?"], max_new_tokens=8)')
    exec(compile(reading, "README.md", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert "held-out loss" in printed and "gradient norm" in printed and "->" in printed
