"""The norm after the layers, in parts: the numbers of the whole."""

import pytest
import torch
from toy import (
    assert_same,
    in_memory,
    step,
    streamed,
    toy_batch,
    toy_dir,
    with_lora,
)

from onn_core.ops.norm import NormInParts


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_with_a_norm_in_parts(family, dtype, monkeypatch):
    folder, batch, parts = toy_dir(family, dtype), toy_batch(), []
    want = step(with_lora(in_memory(folder)), batch)
    monkeypatch.setattr("onn_core.ops.norm.ROWS_BYTES", 4 * batch["input_ids"].numel() * 32 // 3)
    model = with_lora(streamed(folder))
    norms = [x for x in model.modules() if isinstance(x.__dict__.get("forward"), NormInParts)]
    whole = [norm.forward.forward for norm in norms]
    for norm, forward in zip(norms, whole, strict=True):
        norm.forward.forward = lambda x, forward=forward: parts.append(x.shape) or forward(x)
    assert_same(step(model, batch), want)
    assert len(parts) >= 6  # three forward and three backward
