"""The same code on CUDA: pinned staging, copies on a side stream, boundaries on the host."""

import os

import pytest
import torch
import torch.nn.functional as F
from quantise import quantised
from test_quantised import with_small_scratch
from toy import (
    FLOAT16_TOLERANCE,
    assert_same,
    difference,
    in_memory,
    prefer_plans,
    reserving_graphs,
    step,
    streamed,
    toy_batch,
    toy_dir,
    with_lora,
)

from onn_core.memory.boundaries import HostBoundaries
from onn_core.ops import four_bit
from onn_core.ops.cross_entropy import IGNORED, OnlineCrossEntropy, kernels

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


@pytest.mark.parametrize("host_budget", ["auto", 0])  # 0: what has no slot yet is read ahead
def test_direct_reads(host_budget, monkeypatch):
    batch = on_device(toy_batch())
    want = step(with_lora(streamed(toy_dir("llama"), device="cuda")), batch)
    monkeypatch.setattr("onn_core.weights.stream.host_memory_bytes", lambda: 0)
    model = with_lora(streamed(toy_dir("llama"), device="cuda", host_budget=host_budget))
    for _ in range(3):
        assert_same(step(model, batch), want)


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


@pytest.mark.parametrize("captured", [False, True])
def test_no_layer_overwrites_a_boundary_that_is_still_leaving(captured, monkeypatch):
    batch = on_device(toy_batch(batch_size=64, n_tokens=40))
    begin = HostBoundaries.stream

    def late(boundaries):
        stream = begin(boundaries)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**7)  # several ms, in which a layer would be done
        return stream

    monkeypatch.setattr(HostBoundaries, "stream", late)
    steps = []
    for place in ("memory", "host"):
        base = streamed(toy_dir("llama"), device="cuda", memory_budget="2GB", micro_batch_size=32)
        wanted = (place, captured)
        prefer_plans(base, lambda plan, wanted=wanted: (plan.boundaries, plan.captured) == wanted)
        model = with_lora(base)
        steps.append([step(model, batch) for _ in range(4)])
        assert (base.plan.boundaries, base.plan.captured) == wanted
        base.close()
    for got, want in zip(*steps, strict=True):
        assert_same(got, want)


def test_boundaries_after_a_backward_that_was_abandoned(monkeypatch):
    batch, other = on_device(toy_batch(batch_size=4)), on_device(toy_batch(batch_size=4, seed=1))
    want = step(with_lora(in_memory(toy_dir("llama")).cuda()), batch)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (0, 0))
    base = streamed(toy_dir("llama"), device="cuda", micro_batch_size=2)
    model = with_lora(base)

    def interrupt(phase, layer):
        if (phase, layer) == ("backward", 0):
            raise KeyboardInterrupt

    for _ in range(3):
        with base.on_visit(interrupt), pytest.raises(KeyboardInterrupt):
            step(model, other)
        assert_same(step(model, batch), want, 4e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])  # plain, soft cap, bias
def test_rounds_through_the_head(family, monkeypatch):
    batch = on_device(toy_batch())
    want = step(with_lora(streamed(toy_dir(family), device="cuda")), batch)
    monkeypatch.setattr("onn_core.streaming.head.HEAD_BLOCK_BYTES", 1 << 10)
    for sums_bytes in (1 << 30, 5000):  # one round, many
        monkeypatch.setattr("onn_core.streaming.head.SUMS_BYTES", sums_bytes)
        got = step(with_lora(streamed(toy_dir(family), device="cuda")), batch)
        assert_same(got, want, 3e-6)


def test_kernels_of_the_head():
    """On float32, bfloat16 and float16 logits, in blocks of uneven rows, with counted tokens."""
    generator = torch.Generator("cuda").manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)):
        hidden = torch.randn(33, 64, device="cuda", generator=generator).to(dtype)
        weight = torch.randn(5000, 64, device="cuda", generator=generator).to(dtype)
        labels = torch.randint(5000, (33,), device="cuda", generator=generator)
        labels[::5] = IGNORED
        exact = hidden.double().requires_grad_()
        losses = F.cross_entropy(
            exact @ weight.double().T, labels, ignore_index=IGNORED, reduction="none"
        )
        losses.sum().backward()
        got = OnlineCrossEntropy(hidden, labels, None, with_grad=True)
        assert kernels(hidden.device) is not None
        for first in (0, 1024, 4096):
            got.add(first, weight[first : {0: 1024, 1024: 4096, 4096: 5000}[first]], None)
        assert difference(got.token_losses(), losses) < tolerance
        assert difference(got.gradient(), exact.grad) < tolerance


# ---- packed weights


@pytest.mark.parametrize("kind", ["nf4-nested", "nf4", "llm-int8", "fp8-block", "gptq4-order"])
@pytest.mark.parametrize(
    ("family", "reserves", "micro_batch_size"),
    [("llama", False, None), ("llama", True, 2), ("mixtral", False, None)],
)
@pytest.mark.parametrize("host_budget", ["auto", None])
def test_packed_weights(kind, family, reserves, micro_batch_size, host_budget, tmp_path):
    """From the host store or from disk, with a scratch that all layers share."""
    folder, dense = quantised(toy_dir(family, n_layers=2), kind, tmp_path)
    batch = on_device(toy_batch())
    given = {"device": "cuda", "micro_batch_size": micro_batch_size}
    want = step(with_lora(streamed(dense, **given)), batch)
    base = with_small_scratch(streamed(folder, host_budget=host_budget, **given))
    model = with_lora(reserving_graphs(base, 2) if reserves else base)
    for _ in range(3):
        assert_same(step(model, batch), want, 1e-5 if kind == "llm-int8" else None)


def test_direct_reads_of_packed_weights(monkeypatch, tmp_path):
    folder, dense = quantised(toy_dir("llama", n_layers=2), "nf4-nested", tmp_path)
    batch = on_device(toy_batch())
    want = step(with_lora(streamed(dense, device="cuda")), batch)
    monkeypatch.setattr("onn_core.weights.slots.READ_BYTES", 4096)
    monkeypatch.setattr("onn_core.weights.stream.host_memory_bytes", lambda: 0)
    model = with_lora(with_small_scratch(streamed(folder, device="cuda", host_budget=None)))
    for _ in range(3):
        assert_same(step(model, batch), want)


@pytest.mark.parametrize("is_nf4", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_of_four_bits(is_nf4, dtype):
    kernel = four_bit.kernel(torch.device("cuda", 0), is_nf4)
    assert kernel is not None, "neither triton nor bitsandbytes makes four bits dense here"
    code = torch.tensor(four_bit.NF4, device="cuda")
    for n, begin in ((64, 0), (4096 * 3, 1), (1 << 20, 7), (5 * 2048 + 64, 0)):
        memory = torch.randint(256, (begin + n // 2,), dtype=torch.uint8, device="cuda")
        absmax = torch.rand(-(-n // 64), device="cuda")
        given = (memory[begin:], absmax, code if is_nf4 else code**3, 64)  # begins anywhere
        want, got = (torch.zeros(n, dtype=dtype, device="cuda") for _ in range(2))
        four_bit.in_plain_torch(*given, want)
        kernel(*given, got)
        assert torch.equal(got, want)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "gpt2", "mixtral"])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize("resident", [True, False])  # the graphs, while an evaluation runs
def test_replayed_visits_are_those_that_run_as_they_are(
    family, micro_batch_size, resident, monkeypatch
):
    if not resident:
        monkeypatch.setattr("onn_core.memory.plan._make_captures_resident", lambda plan, *_: plan)
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
        for number in range(6):  # of each three the second is captured, if none is resident
            if number % 3 == 0:
                with model.disable_adapter(), torch.no_grad():
                    model(**batch)
            steps[captured].append(step(model, batch))
            for parameter, grad in zip(trained, steps[captured][-1][1].values(), strict=True):
                parameter.grad = grad
            optimizer.step()
        assert (base.plan.captured, base.plan.captures_resident) == (
            captured,
            captured and resident,
        )
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
