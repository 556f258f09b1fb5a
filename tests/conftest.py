import os
import shutil
from collections import defaultdict

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub


@pytest.fixture(scope="session")
def smollm2_dir():
    """The folder of SmolLM2-135M-Instruct, a real pretrained model."""
    from onn_core.weights.default_model import prepare_default_model

    return prepare_default_model()


@pytest.fixture(scope="session")
def toy_with_tokenizer(smollm2_dir, tmp_path_factory):
    """A random three-layer model with the tokenizer of SmolLM2."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = tmp_path_factory.mktemp("toy")
    for path in smollm2_dir.glob("*token*"):
        shutil.copy(path, folder)
    for path in smollm2_dir.glob("chat_template*"):
        shutil.copy(path, folder)
    sizes = {"vocab_size": 49152, "hidden_size": 32, "intermediate_size": 64}
    config = LlamaConfig(**sizes, num_hidden_layers=3, num_attention_heads=4, pad_token_id=2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


def pytest_terminal_summary(terminalreporter):
    """How much `make test-faults` did: what its tests recorded as "KIND, WHERE"."""
    found = defaultdict(dict)
    for report in terminalreporter.getreports("passed"):
        for name, count in report.user_properties:
            kind, where = name.split(", ")
            found[kind][where] = count
    for kind, counts in found.items():
        each = ", ".join(f"{where} {count}" for where, count in counts.items())
        terminalreporter.write_line(f"{sum(counts.values())} {kind}: {each}")
