"""A streamed model behaves as a transformers model does, or refuses in one sentence."""

import copy
import inspect
import io
from contextlib import redirect_stdout

import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from toy import (
    VOCABULARY,
    assert_same,
    in_memory,
    step,
    streamed,
    take_gradients,
    toy_batch,
    toy_dir,
    with_lora,
)
from transformers import AutoModelForCausalLM

from onn_core import OnnError

BOTH = (in_memory, streamed)
HEADS = ["llama", "llama-tied", "gemma2", "phi", "granitemoe"]  # tied, soft cap, bias, scaling


@pytest.fixture(params=[VOCABULARY, 10], ids=["one block", "ten blocks"])
def tolerance(request, monkeypatch):
    """Of a head in one block, equal to the bit, or in several."""
    monkeypatch.setattr("onn_core.streaming.head.HEAD_BLOCK_BYTES", request.param * 32 * 4)
    return None if request.param == VOCABULARY else 3e-6


@pytest.mark.parametrize("family", HEADS)
def test_own_loss_from_logits_beside_labels(family, tolerance):
    """What a trainer does that brings its own loss, and asks for the model's as well."""
    got = []
    for load in BOTH:
        model = with_lora(load(toy_dir(family)))
        batch = toy_batch()
        outputs = model(**batch)
        logits = outputs.logits[:, :-1].reshape(-1, VOCABULARY)
        own = F.cross_entropy(logits, batch["labels"][:, 1:].reshape(-1), label_smoothing=0.3)
        own.backward()
        shape, dtype = outputs.logits.shape, outputs.logits.dtype
        assert (shape, dtype) == ((5, 10, VOCABULARY), torch.float32)
        got.append((own.detach(), take_gradients(model) | {"theirs": outputs.loss.detach()}))
    assert_same(got[1], got[0], tolerance)


@pytest.mark.parametrize("family", HEADS)
def test_loss_from_hidden_states_and_the_head_s_weight(family, tolerance):
    """What TRL does: the backbone alone, then slices of the head's weight."""
    got = []
    for load in BOTH:
        model = with_lora(load(toy_dir(family)))
        base = model.get_base_model()
        batch = toy_batch()
        hidden = base.base_model(batch["input_ids"], batch["attention_mask"], use_cache=False)[0]
        weight = base.get_output_embeddings().weight
        assert isinstance(weight, torch.nn.Parameter) and weight.shape == (VOCABULARY, 32)
        logits = torch.cat([hidden @ weight[i : i + 30].t() for i in range(0, VOCABULARY, 30)], -1)
        loss = logits.float().log_softmax(-1)[..., 3].mean()
        loss.backward()
        got.append((loss.detach(), take_gradients(model) | {"whole": weight.detach() * 1.0}))
        if load is streamed:
            assert got[1][1]["whole"].isnan().all()  # detached, it is a placeholder
            assert torch.equal(weight * 1.0, got[0][1]["whole"])
            got[1][1]["whole"] = weight * 1.0
    assert_same(got[1], got[0], tolerance)


@pytest.mark.parametrize("change", ["in place", "under no_grad first", "cast"])
def test_logits_that_wait(change):
    got = []
    for load in BOTH:
        model = with_lora(load(toy_dir("gemma2")))
        logits = model(**toy_batch()).logits
        assert logits.requires_grad and logits.numel() == 5 * 10 * VOCABULARY
        if change == "in place":
            logits[..., 5] = 1.0
            logits *= 3
        elif change == "cast":
            logits = (logits.double() / 3).tanh()
        else:
            with torch.no_grad():
                assert not logits.argmax(-1).requires_grad
        loss = logits.square().mean()
        loss.backward()
        got.append((loss.detach(), take_gradients(model)))
    assert_same(got[1], got[0])


@pytest.mark.parametrize("settings", [{"target_modules": ["lm_head", "q_proj"]}, {"bias": "all"}])
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_adapters_on_the_head_and_biases(family, settings, tolerance):
    got = [step(with_lora(load(toy_dir(family)), **settings), toy_batch()) for load in BOTH]
    assert_same(got[1], got[0], tolerance)
    if "bias" in settings and family == "phi":
        assert any("lm_head.bias" in name for name in got[0][1])
    if "bias" not in settings:
        assert any("lm_head.lora_A" in name for name in got[0][1])


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_on_the_embedding(use_dora):
    settings = {"target_modules": ["embed_tokens", "q_proj"], "use_dora": use_dora}
    got = [step(with_lora(load(toy_dir("llama")), **settings), toy_batch()) for load in BOTH]
    assert_same(got[1], got[0])
    assert any("lora_embedding" in name for name in got[0][1])


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_trainable_tokens(family):
    settings = {"trainable_token_indices": toy_batch()["input_ids"][0, :2].tolist()}
    got = [step(with_lora(load(toy_dir(family)), **settings), toy_batch()) for load in BOTH]
    assert_same(got[1], got[0])
    assert any("trainable_tokens" in name for name in got[0][1])


def test_peft_saves_the_adapter_alone(tmp_path):
    got = []
    for load in BOTH:
        model = with_lora(load(toy_dir("llama-tied")))
        folder = tmp_path / load.__name__
        model.save_pretrained(folder)
        got.append(safetensors.torch.load_file(folder / "adapter_model.safetensors"))
    assert got[0].keys() == got[1].keys()
    assert all(torch.equal(got[0][name], got[1][name]) for name in got[0])
    again = peft.PeftModel.from_pretrained(streamed(toy_dir("llama-tied")), folder)
    with torch.no_grad():
        batch = toy_batch()
        assert torch.equal(again(**batch).loss, model.eval()(**batch).loss)


def test_a_streamed_model_says_what_it_is():
    models = [load(toy_dir("llama")) for load in BOTH]
    shown = []
    for model in models:
        with redirect_stdout(io.StringIO()) as text:
            print(model)
        shown.append(text.getvalue())
    assert shown[1] == shown[0]
    for question in (
        lambda model: model.num_parameters(),
        lambda model: model.num_parameters(exclude_embeddings=True),
        lambda model: {name: (p.shape, p.dtype) for name, p in model.named_parameters()},
        lambda model: (model.device, model.dtype),
        lambda model: inspect.signature(model.forward),
        lambda model: model.config.to_dict(),
    ):
        assert question(models[1]) == question(models[0])
    other = streamed(toy_dir("gpt2"))
    assert inspect.signature(other.forward) != inspect.signature(models[1].forward)
    assert "past_key_values" in inspect.signature(models[1].forward).parameters


def test_to_where_it_is_does_nothing():
    model = with_lora(streamed(toy_dir("llama")))
    assert model.to("cpu") is model and model.to(torch.float32) is model
    assert model.cpu().float() is model
    assert_same(step(model, toy_batch()), step(with_lora(in_memory(toy_dir("llama"))), toy_batch()))


REFUSED = {
    "to": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "state_dict": lambda model: model.state_dict(),
    "save": lambda model: model.save_pretrained("never-written"),
    "resize": lambda model: model.resize_token_embeddings(VOCABULARY + 1),
    "copy": copy.deepcopy,
    "modules_to_save": lambda model: with_lora(model, modules_to_save=["lm_head"]),
    "layer to save": lambda model: with_lora(
        model, target_modules=["q_proj"], modules_to_save=["down_proj"]
    ),
    "train all": lambda model: step(model.requires_grad_(True).train(), toy_batch()),
    "train head": lambda model: step(model.lm_head.requires_grad_(True) and model, toy_batch()),
    "change head": lambda model: model.lm_head.weight.mul_(2),
}


@pytest.mark.parametrize("ask", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(ask):
    with pytest.raises(OnnError) as caught:
        ask(streamed(toy_dir("llama")))
    assert str(caught.value).endswith(".") and len(str(caught.value)) < 300


def test_merging_in_place_fails_loudly():
    model = with_lora(streamed(toy_dir("llama")))
    with pytest.raises(Exception, match="."):
        model.merge_and_unload()


def test_trained_model_still_loads_plainly():
    """Streaming changes no class of transformers."""
    streamed(toy_dir("llama"))
    model = AutoModelForCausalLM.from_pretrained(toy_dir("llama"))
    assert type(model).__name__ == "LlamaForCausalLM" and model.state_dict()
