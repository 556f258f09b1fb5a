import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub


@pytest.fixture(scope="session")
def smollm2_dir():
    """The folder of SmolLM2-135M-Instruct, a real pretrained model."""
    from onn_core.models import prepare_default_model

    return prepare_default_model()


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
