"""The same code on CUDA: pinned staging, copies on a side stream, boundaries on the host."""

import os

import pytest
import torch
from toy import (
    FLOAT16_TOLERANCE,
    assert_same,
    in_memory,
    prefer_plans,
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


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "gpt2", "mixtral"])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_replayed_visits_are_those_that_run_as_they_are(family, micro_batch_size):
    batch = on_device(toy_batch(batch_size=4))
    steps = {}
    for captured in (False, True):
        base = streamed(
            toy_dir(family, torch.bfloat16),
            device="cuda",
            memory_budget="2GB",
            micro_batch_size=micro_batch_size,
        )
        prefer_plans(base, lambda plan, captured=captured: plan.captured == captured)
        model = with_lora(base)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        steps[captured] = []
        for _ in range(4):  # the first runs as it is, the second is captured
            with model.disable_adapter(), torch.no_grad():  # between two steps, as it is
                model(**batch)
            steps[captured].append(step(model, batch))
            for parameter, grad in zip(trained, steps[captured][-1][1].values(), strict=True):
                parameter.grad = grad
            optimizer.step()
        assert base.plan.captured == captured
        base.close()
    for got, want in zip(steps[True], steps[False], strict=True):
        assert_same(got, want)


def test_a_layer_with_dropout_is_not_replayed():
    batch = on_device(toy_batch(batch_size=4))
    found = {}
    for captured in (False, True):
        base = streamed(toy_dir("llama"), device="cuda", memory_budget="2GB")
        prefer_plans(base, lambda plan, captured=captured: plan.captured == captured)
        model = with_lora(base, lora_dropout=0.5)
        found[captured] = [step(model, batch) for _ in range(3)]
    for got, want in zip(found[True], found[False], strict=True):
        assert_same(got, want)
