"""The fused LoRA function against PEFT's own forward, which stays the oracle and the fallback."""

import contextlib
import copy
import pickle

import peft
import pytest
import torch
from torch import nn
from toy import difference
from transformers.pytorch_utils import Conv1D

from onn_core.ops import lora as ops
from onn_core.ops.lora import LoraAdd, fuse_lora

C, V, RANK = 48, 80, 4


class Layer(nn.Module):
    """Holds one linear layer, as a decoder layer holds several."""

    def __init__(self, base):
        super().__init__()
        self.linear = base

    def forward(self, x):
        return self.linear(x)


def adapted(dtype=torch.float32, kind=nn.Linear, bias=False, device="cpu", **settings):
    """A base layer in `dtype` with a random adapter, in float32 if that is wider."""
    torch.manual_seed(0)
    base = Conv1D(V, C) if kind is Conv1D else kind(C, V, bias=bias)
    defaults = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["linear"]}
    defaults |= {"init_lora_weights": False, "fan_in_fan_out": kind is Conv1D}
    config = peft.LoraConfig(**defaults | settings)
    return peft.get_peft_model(Layer(base.to(device, dtype)), config).train()


def fused(model):
    model = copy.deepcopy(model)
    fuse_lora(model)
    return model


def inputs(dtype=torch.float32, shape=(2, 7, C), device="cpu"):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator).to(device, dtype)


def results(model, x, wanted=("x", "A", "B"), around=contextlib.nullcontext):
    """The output, and the gradients of those of x, A and B that are wanted; None elsewhere."""
    x = x.clone().requires_grad_("x" in wanted)
    matrices = [p for name, p in model.named_parameters() if "lora_" in name]
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name and any(f"lora_{letter}" in name for letter in wanted))
    with around():
        out = model(x.clone())  # autocast would keep the cast of a leaf for all who cast it
    generator = torch.Generator().manual_seed(2)
    towards = torch.randn(out.shape, generator=generator).bfloat16().to(out)
    if out.requires_grad:
        out.backward(towards)
    found = [out.detach(), x.grad, *(p.grad for p in matrices)]
    model.zero_grad()
    return found


def assert_equal(model, x, tolerance=0.0, **settings):
    want = results(model, x, **settings)
    got = results(fused(model), x, **settings)
    for found, expected in zip(got, want, strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            assert found.dtype == expected.dtype and found.shape == expected.shape
            assert torch.equal(found, expected) or difference(found, expected) <= tolerance


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """How often the fused function ran."""
    seen, add = [], LoraAdd.add
    monkeypatch.setattr(LoraAdd, "add", lambda *args: seen.append(args[-1]) or add(*args))
    return seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [2 * RANK, 3])  # whose scaling is no power of two
@pytest.mark.parametrize(("kind", "bias"), [(nn.Linear, False), (nn.Linear, True), (Conv1D, True)])
def test_bits_are_those_of_peft(dtype, alpha, kind, bias, calls):
    model = adapted(dtype, kind, bias, lora_alpha=alpha)
    assert_equal(model, inputs(dtype))
    assert_equal(model, inputs(dtype, (5, C)))
    assert calls == 2 * [torch.float64 if dtype == torch.float64 else torch.float32]


@pytest.mark.parametrize("wanted", ["", "x", "A", "B", "AB", "xA", "xB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_needs_no_gradient_has_none(wanted, dtype, calls):
    assert_equal(adapted(dtype), inputs(dtype), wanted=wanted)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [2 * RANK, 3])
def test_autocast_computes_in_its_dtype(dtype, alpha, calls):
    around = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    assert_equal(adapted(dtype, lora_alpha=alpha), inputs(dtype), around=around)
    assert calls == [torch.bfloat16]


def test_adapters_in_the_models_dtype(calls):
    model = adapted(torch.bfloat16).to(torch.bfloat16)
    assert_equal(model, inputs(torch.bfloat16))
    assert calls == [torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_in_blocks(dtype, monkeypatch):
    """Blocks round the sums over the tokens elsewhere: a few float32 roundings (6e-8 each)."""
    monkeypatch.setattr(ops, "BLOCK_BYTES", 4 * V * 16)
    assert_equal(adapted(dtype), inputs(dtype, (3, 17, C)), 1e-6)


def test_no_tokens():
    assert_equal(adapted(), inputs(shape=(0, C)))


def test_a_large_output_is_added_to_in_one_step(monkeypatch):
    monkeypatch.setattr(ops, "BLOCK_BYTES", 0)
    assert_equal(adapted(), inputs(), 1e-6)


def test_a_layer_that_is_used_twice(calls):
    class Twice(Layer):
        def forward(self, x):
            return self.linear(self.linear(x)).tanh_()  # what it returns may be changed in place

    model = peft.get_peft_model(
        Twice(nn.Linear(C, C)), peft.LoraConfig(target_modules=["linear"], init_lora_weights=False)
    )
    assert_equal(model, inputs())
    assert len(calls) == 2


SPLIT = {"_splits": lambda x, out, compute: True, "_product": lambda a, b: a.float() @ b.float()}


def test_products_of_parts_are_those_of_float32(monkeypatch):
    """The matrices of float32 are split without a rest; the output alone is rounded to bf16."""
    matrix = torch.randn(5, 6)
    parts = ops._parts(matrix, (0, 1, 2), 1).view(5, 3, 6)
    assert torch.equal(parts.double().sum(1), matrix.double())
    for name, value in SPLIT.items():
        monkeypatch.setattr(ops, name, value)
    model, x = adapted(torch.bfloat16, lora_alpha=3), inputs(torch.bfloat16)
    got, want = results(fused(model), x), results(model.double(), x.double())
    for found, expected in zip(got, want, strict=True):
        assert difference(found, expected) < (1e-6 if found.dtype == torch.float32 else 2**-7)


def add_second(model):
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["linear"]))


def both(model):
    add_second(model)
    model.base_model.set_adapter(["default", "second"])


def hooked(model):
    linear = model.base_model.model.linear.lora_A["default"]
    linear.register_forward_hook(lambda module, args, out: 2 * out)


FALLBACKS = {
    "dropout": ({"lora_dropout": 0.5}, lambda model: None),
    "DoRA": ({"use_dora": True}, lambda model: None),
    "bias": ({"lora_bias": True, "bias": True}, lambda model: None),
    "two adapters": ({}, both),
    "merged": ({}, lambda model: model.merge_adapter()),
    "disabled": ({}, lambda model: model.base_model.disable_adapter_layers()),
    "hooks": ({}, hooked),
}


@pytest.mark.parametrize(("settings", "change"), FALLBACKS.values(), ids=FALLBACKS)
def test_what_is_not_plain_runs_as_peft_has_it(settings, change, calls):
    bias = settings.get("bias", False)
    model = adapted(bias=bias, **{k: v for k, v in settings.items() if k != "bias"})
    model = fused(model)
    change(model)
    torch.manual_seed(3)
    got = model(inputs())
    for module in model.modules():
        module.__dict__.pop("forward", None)
    torch.manual_seed(3)
    assert torch.equal(got, model(inputs())) and not calls


def test_dropout_that_does_not_act_is_none(calls):
    model = adapted(lora_dropout=0.5).eval()
    assert torch.equal(fused(model)(inputs()), model(inputs())) and len(calls) == 1


def test_the_output_belongs_to_who_holds_it(calls):
    """A hook on the base layer may keep what it was given."""
    model, kept = fused(adapted()), []
    base = model.base_model.model.linear.base_layer
    base.register_forward_hook(lambda module, args, out: kept.append(out))
    model(inputs())
    assert torch.equal(kept[0], nn.functional.linear(inputs(), base.weight)) and calls


def test_what_peft_does_to_a_fused_layer(calls):
    plain = adapted()
    model, x = fused(plain), inputs()
    with torch.no_grad():
        want, base = plain(x), plain.base_model.model.linear.base_layer(x)
        for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), want)
        with model.disable_adapter():
            assert torch.equal(model(x), base)
        add_second(model)
        model.set_adapter("second")
        assert torch.equal(model(x), base)  # its B is zero
        assert torch.equal(model.base_model.model.linear(x, adapter_names=["default"] * 2), want)
        model.set_adapter("default")
        model.delete_adapter("second")
        assert torch.equal(model(x), want) and len(calls) == 5
        copied = copy.deepcopy(model)
        copied.base_model.model.linear.lora_B["default"].weight.zero_()
        assert torch.equal(copied(x), base) and torch.equal(model(x), want)
        assert torch.equal(model.unload()(x), base)
        assert isinstance(fused(plain).merge_and_unload().linear, nn.Linear)


@pytest.mark.cuda
@pytest.mark.parametrize("n_tokens", [64, ops.SPLIT_TOKENS])
@pytest.mark.parametrize("alpha", [2 * RANK, 3])
def test_bf16_on_the_device(n_tokens, alpha, calls):
    """float32 adapters: float32's error (C roundings) where nothing is rounded to bf16.

    The output and the gradient of x are sums of two that are rounded, each by 2^-9 of itself.
    """
    model = adapted(torch.bfloat16, device="cuda", lora_alpha=alpha)
    x = inputs(torch.bfloat16, (n_tokens, C), device="cuda")
    got, want = results(fused(model), x), results(model.double(), x.double())
    assert len(calls) == 1
    for found, expected in zip(got, want, strict=True):
        assert difference(found, expected) < (4e-6 if found.dtype == torch.float32 else 2**-7)
    a = model.base_model.model.linear.lora_A["default"].weight.float()
    h = ops._product(x, ops._parts(a, (0, 1, 2), 0).t()).view(n_tokens, 3, RANK).sum(1)
    assert difference(h, x.double() @ a.double().t()) < 1e-6
