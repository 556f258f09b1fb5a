"""Products with a matrix that is cast block by block are those with the whole matrix."""

import pytest
import torch
import torch.nn.functional as F
from toy import assert_same, difference, in_memory, step, streamed, toy_batch, toy_dir, with_lora

from onn_core.ops import matmul


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_tokens", [1, 7, 64, 65, 200])
@pytest.mark.parametrize("n_rows", [16, 17, 300])
@pytest.mark.parametrize("trained_bias", [None, False, True])
def test_linear(stored, n_tokens, n_rows, trained_bias, monkeypatch):
    """Sums over another order of rows: float32 roundings apart, in float64 almost nothing."""
    monkeypatch.setattr(matmul, "BLOCK_BYTES", 16 * 4 * 48)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n_rows, 48, generator=generator).to(stored)
    bias = None
    if trained_bias is not None:
        bias = torch.randn(n_rows, generator=generator).double().requires_grad_(trained_bias)
    x = torch.randn(1, n_tokens, 48, generator=generator).double().requires_grad_()
    towards = torch.randn(1, n_tokens, n_rows, generator=generator).double()
    wanted = [x, *([bias] if trained_bias else [])]
    expected = F.linear(x, weight.double(), bias)
    found = matmul.linear(x, weight, bias)
    assert difference(found, expected) < 1e-14
    pairs = [torch.autograd.grad(out, wanted, towards) for out in (found, expected)]
    assert all(difference(*pair) < 1e-14 for pair in zip(*pairs, strict=True))


@pytest.mark.parametrize("n_tokens", [3, 200])
def test_float16_is_float32_rounded_once(n_tokens, monkeypatch):
    monkeypatch.setattr(matmul, "BLOCK_BYTES", 16 * 4 * 48)
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(40, *n, generator=generator).half() for n in ((48,), ()))
    x = torch.randn(2, n_tokens, 48, generator=generator).half().requires_grad_()
    towards = torch.randn(2, n_tokens, 40, generator=generator).half()
    found = matmul.linear(x, weight, bias)
    (grad,) = torch.autograd.grad(found, x, towards)
    assert found.dtype == grad.dtype == torch.float16
    assert difference(found, F.linear(x.double(), weight.double(), bias.double())) < 2**-11
    assert difference(grad, towards.double() @ weight.double()) < 2**-11


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi"])
@pytest.mark.parametrize(("block_bytes", "tolerance"), [(matmul.BLOCK_BYTES, None), (2048, 3e-6)])
def test_float32_over_narrow_weights_is_in_memory_float32(
    family, stored, block_bytes, tolerance, monkeypatch
):
    """Bit for bit where a matrix is one block; else sums over rows round elsewhere."""
    monkeypatch.setattr(matmul, "BLOCK_BYTES", block_bytes)
    folder = toy_dir(family, stored)
    model = with_lora(streamed(folder, dtype="float32"))
    want = step(with_lora(in_memory(folder, dtype=torch.float32)), toy_batch())
    for _ in range(2):
        got = step(model, toy_batch())
        assert_same(got, want, tolerance)


def test_a_narrow_matrix_stays_narrow_in_memory():
    narrow, wide = (
        streamed(toy_dir("llama", stored), dtype="float32").sizes.layers
        for stored in (torch.bfloat16, torch.float32)
    )
    for small, large in zip(narrow, wide, strict=True):
        assert [2 * item.n_bytes for item in small] == [item.n_bytes for item in large]
