"""The same code on CUDA: pinned staging, copies on a side stream, boundaries on the host."""

import os

import pytest
import torch
from toy import (
    FLOAT16_TOLERANCE,
    assert_same,
    in_memory,
    reserving_graphs,
    step,
    streamed,
    toy_batch,
    toy_dir,
    with_lora,
)

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning"),
]


def on_device(batch):
    return {name: values.cuda() for name, values in batch.items()}


@pytest.fixture(autouse=True)
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "gpt2", "mixtral"])
@pytest.mark.parametrize(
    ("dtype", "micro_batch_size"),
    [("float32", None), ("float32", 2), ("bfloat16", None), ("float16", None)],
)
def test_gradients_are_those_of_peft_in_memory(family, dtype, micro_batch_size):
    folder = toy_dir(family, getattr(torch, dtype))
    want = step(with_lora(in_memory(folder).cuda()), on_device(toy_batch()))
    model = with_lora(streamed(folder, device="cuda", micro_batch_size=micro_batch_size))
    for _ in range(3):  # later steps reuse slots that earlier compute has read
        got = step(model, on_device(toy_batch()))
        rounding = FLOAT16_TOLERANCE if dtype == "float16" else None
        assert_same(got, want, rounding if micro_batch_size is None else 4e-6)


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_graphs_that_are_kept_while_the_weights_go(micro_batch_size):
    folder, batch = toy_dir("phi3"), on_device(toy_batch())
    want = step(with_lora(in_memory(folder).cuda()), batch)
    base = streamed(folder, device="cuda", micro_batch_size=micro_batch_size)
    model = with_lora(reserving_graphs(base))
    for _ in range(3):
        loss = model(**batch).loss
        assert base.streaming.planner.graphs.total
        del loss
        assert_same(step(model, batch), want, None if micro_batch_size is None else 4e-6)


def test_direct_reads(monkeypatch):
    batch = on_device(toy_batch())
    want = step(with_lora(streamed(toy_dir("llama"), device="cuda")), batch)
    monkeypatch.setattr("onn_core.weights.stream.host_memory_bytes", lambda: 0)
    assert_same(step(with_lora(streamed(toy_dir("llama"), device="cuda")), batch), want)


def test_cast_on_the_way():
    got, want = (
        step(
            with_lora(streamed(toy_dir("llama", stored), device="cuda", dtype="bfloat16")),
            on_device(toy_batch()),
        )
        for stored in (torch.float32, torch.bfloat16)
    )
    assert_same(got, want)


def test_boundaries_on_the_host(monkeypatch):
    batch = on_device(toy_batch())
    want = step(with_lora(streamed(toy_dir("llama"), device="cuda")), batch)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (0, 0))
    assert_same(step(with_lora(streamed(toy_dir("llama"), device="cuda")), batch), want)


def test_sums_of_the_head_on_the_host(monkeypatch):
    batch = on_device(toy_batch())
    monkeypatch.setattr("onn_core.streaming.head.HEAD_BLOCK_BYTES", 1 << 10)
    want = step(with_lora(streamed(toy_dir("gemma2"), device="cuda")), batch)
    monkeypatch.setattr("onn_core.ops.cross_entropy.GRADIENT_BYTES", 0)
    assert_same(step(with_lora(streamed(toy_dir("gemma2"), device="cuda")), batch), want, 1e-6)
