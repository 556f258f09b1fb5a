"""Adapters that travel: merged, continued, loaded in memory and streamed, or refused."""

import json
import os
import shutil
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from toy import assert_same, in_memory, step, streamed, toy_batch, toy_dir, with_lora

import onn_core
from onn_core.adapters.folder import load_adapter
from onn_core.adapters.lora import add_adapter, describe_experts, trained_layers
from onn_core.errors import OnnError
from onn_core.weights.random_model import write_random_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* invalid shape"),  # of lora_bias
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
    "biases": {"bias": "all"},
    "layers": {"layers_to_transform": [1, 3]},
}


def saved_adapter(base, folder, **settings):
    """The folder of a random adapter of a toy model."""
    model = with_lora(in_memory(base), **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim == 1:  # biases, DoRA magnitudes
                parameter += 0.1 * torch.rand_like(parameter)
            elif parameter.requires_grad:  # values that no narrower dtype holds
                parameter *= 1.0001
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def merged_in_memory(base, adapter):
    return peft.PeftModel.from_pretrained(in_memory(base), adapter).merge_and_unload()


def assert_merges_like_peft(base, adapter, out):
    assert onn_core.merge(base, adapter, out) == out
    found, expected = in_memory(out).state_dict(), merged_in_memory(base, adapter).state_dict()
    before = in_memory(base).state_dict()
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype and torch.equal(found[name], values), name
    changed = [name for name in before if not torch.equal(before[name], found[name])]
    assert changed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2: Conv1D, fan_in_fan_out, tied head
def test_merge_equals_peft(family, kind, tmp_path):
    base = toy_dir(family, shard="40KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    settings = dict(KINDS[kind])
    if family == "gpt2" and kind == "patterns":
        settings = {"rank_pattern": {"c_fc": 2}, "alpha_pattern": {"c_attn": 5}}
    adapter = saved_adapter(base, tmp_path / "adapter", **settings)
    assert_merges_like_peft(base, adapter, tmp_path / "out")


def test_merge_in_bfloat16_does_not_round_the_adapter(tmp_path):
    base = toy_dir("llama", torch.bfloat16)
    assert_merges_like_peft(base, saved_adapter(base, tmp_path / "adapter"), tmp_path / "out")


@pytest.mark.parametrize("trainable", [False, True])
def test_a_loaded_adapter_has_the_values_that_are_stored(trainable, tmp_path):
    base = toy_dir("llama", torch.bfloat16)
    adapter = saved_adapter(base, tmp_path / "adapter")
    model = onn_core.load_adapter(streamed(base), adapter, trainable=trainable)
    want = dict(peft.PeftModel.from_pretrained(in_memory(base), adapter).named_parameters())
    got = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert got and all(torch.equal(p, want[name]) for name, p in got.items())


def test_merge_in_bfloat16_with_converted_experts(tmp_path):
    """Mixtral's experts are converted on loading and copied as they are; attention is merged."""
    base = toy_dir("mixtral", torch.bfloat16, "40KB")
    adapter = saved_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "o_proj"])
    assert_merges_like_peft(base, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9]},
        {"target_modules": ["q_proj"], "target_parameters": ["v_proj.weight"]},
    ],
    ids=["ends", "whole modules", "tokens", "parameters"],
)
def test_merge_of_more_than_decoder_layers_equals_peft(settings, tmp_path):
    base = toy_dir("llama")
    adapter = saved_adapter(base, tmp_path / "adapter", **settings)
    assert_merges_like_peft(base, adapter, tmp_path / "out")


def test_merge_of_lora_biases_equals_peft(tmp_path):
    adapter = saved_adapter(toy_dir("gpt2"), tmp_path / "adapter", lora_bias=True)
    assert_merges_like_peft(toy_dir("gpt2"), adapter, tmp_path / "out")


def test_merge_copies_the_rest_and_runs_as_a_command(smollm2_dir, tmp_path):
    base = shutil.copytree(toy_dir("llama-tied"), tmp_path / "base")
    for path in smollm2_dir.glob("*token*"):
        shutil.copy(path, base)
    (base / "code.py").write_text("raise SystemExit\n")
    adapter = saved_adapter(base, tmp_path / "adapter")
    command = [sys.executable, "-W", "error", "-m", "onn_core", "merge", base, adapter]
    made = subprocess.run([*command, tmp_path / "out"], check=True, capture_output=True, text=True)
    assert made.stdout.strip() == str(tmp_path / "out")
    names = {path.name for path in base.iterdir()} - {"code.py"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    with pytest.raises(OnnError, match="exists already"):
        onn_core.merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"]}, "shares its values"),
        ("llama-tied", {"modules_to_save": ["lm_head"]}, "shares its values"),
        ("mixtral", {"target_modules": ["gate"], "target_parameters": ["experts.down_proj"]},
         "makes from other"),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused(family, settings, message, tmp_path):
    adapter = saved_adapter(toy_dir(family), tmp_path / "adapter", **settings)
    with pytest.raises(OnnError, match=message):
        onn_core.merge(toy_dir(family), adapter, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_interrupted_merge_leaves_nothing(tmp_path, monkeypatch):
    adapter = saved_adapter(toy_dir("llama"), tmp_path / "adapter")
    monkeypatch.setattr("shutil.copyfile", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        onn_core.merge(toy_dir("llama"), adapter, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


# ---- training with every kind, streamed and in memory


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"bias": "all"},
        KINDS["patterns"],
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_equal_peft_in_memory(settings, dtype):
    base = toy_dir("llama", dtype)
    expected = step(with_lora(in_memory(base), **settings), toy_batch())
    assert_same(step(with_lora(streamed(base), **settings), toy_batch()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_continued_adapter_equals_peft_in_memory(kind, tmp_path):
    """Loaded to be trained further: the same gradients, bit for bit, and the same evaluation."""
    base = toy_dir("llama")
    adapter = saved_adapter(base, tmp_path, **KINDS[kind])
    models = [
        load_adapter(streamed(base), adapter, trainable=True),
        peft.PeftModel.from_pretrained(in_memory(base), adapter, is_trainable=True),
    ]
    assert_same(*(step(model.train(), toy_batch()) for model in models))
    plain = peft.PeftModel.from_pretrained(streamed(base), adapter)  # without onn_core's checks
    with torch.no_grad():
        losses = [model.eval()(**toy_batch()).loss for model in [*models, plain]]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
    ],
)
def test_what_needs_weights_in_memory_is_refused(settings, message):
    with pytest.raises(OnnError, match=message):
        step(with_lora(streamed(toy_dir("llama")), **settings), toy_batch())


def test_an_adapter_that_begins_as_nan_is_refused():
    model = with_lora(streamed(toy_dir("llama")))
    next(p for p in model.parameters() if p.requires_grad).data.fill_(torch.nan)
    with pytest.raises(OnnError, match="is NaN"):
        step(model, toy_batch())


# ---- experts of mixtures

EXPERTS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


def expert_settings(**changes):
    fixed = {"model_dir": "m", "data": "d", "output_dir": "o", "target_modules": ["q_proj"]}
    return onn_core.TrainConfig(**fixed | {"sparse_layers": [1, 3]} | changes)


def test_experts_that_are_left_out_are_told():
    for family, expected in (("mixtral", {"untrained_experts": EXPERTS}), ("llama", {})):
        model = streamed(toy_dir(family))
        add_adapter(model, expert_settings(sparse_layers="all", target_modules=None))
        assert describe_experts(model) == expected
    model = streamed(toy_dir("mixtral"))
    add_adapter(model, expert_settings(sparse_layers="all", target_parameters="gate_up_proj"))
    assert describe_experts(model) == {"untrained_experts": EXPERTS[:1]}


def test_experts_are_trained_in_the_layers_that_were_chosen_as_peft_does():
    settings = expert_settings(target_parameters=["experts.gate_up_proj", EXPERTS[0]])
    models = [add_adapter(load(toy_dir("mixtral")), settings) for load in (streamed, in_memory)]
    for model in models:
        assert trained_layers(model.get_base_model()) == [1, 3]
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # which begins as zero, so that lora_A would have no gradient
                torch.nn.init.ones_(parameter.data)
    found, expected = (step(model, toy_batch()) for model in models)
    assert len(expected[1]) == 2 * 2 * 3
    assert_same(found, expected)


def test_target_parameters_that_match_nothing_are_refused():
    for family, message in (("mixtral", "choose among mlp.experts.down_proj"), ("llama", "None")):
        with pytest.raises(OnnError, match=f"'experts.up' match no matrix .*{message}"):
            add_adapter(streamed(toy_dir(family)), expert_settings(target_parameters="experts.up"))


# ---- adapter folders that cannot be used


def edited(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def with_tensors(change):
    def build(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return build


def fewer(tensors):
    del tensors[sorted(tensors)[3]]


def other_shape(tensors):
    name = sorted(tensors)[0]
    tensors[name] = tensors[name][:-1].clone()


BAD_FOLDERS = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "can be read"),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "can be read"),
    "deep JSON": (lambda f: (f / "adapter_config.json").write_text("[" * 9**6), "can be read"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "no LoRA"),
    "other kind": (lambda f: edited(f, peft_type="IA3"), "no LoRA"),
    "unknown field": (lambda f: edited(f, init_lora_weights="pissa"), "changes the base model"),
    "imports a module": (lambda f: edited(f, megatron_config={"a": 1}), "megatron_config"),
    "layers repeated": (lambda f: edited(f, layer_replication=[[0, 2]]), "layer_replication"),
    "huge rank": (lambda f: edited(f, r=10**12), "does not fit|is not an adapter"),
    "no rank": (lambda f: edited(f, r="x"), "is not an adapter"),
    "rank -1": (lambda f: edited(f, r=-1), "is not an adapter"),
    "slow pattern": (lambda f: edited(f, target_modules=r"([\w.]+)+!"), "too long to match"),
    "slow rank pattern": (lambda f: edited(f, rank_pattern={"(.*)*x": 2}), "too long to match"),
    "slow module to save": (lambda f: edited(f, modules_to_save=["(.*)*x"]), "too long to match"),
    "pattern that is none": (lambda f: edited(f, target_modules="(q_proj*"), "is invalid"),
    "pattern a list": (lambda f: edited(f, target_modules=[["q_proj"]]), "no text or too long"),
    "pattern a number": (lambda f: edited(f, rank_pattern=3.5), "no text or too long"),
    "no such module": (lambda f: edited(f, target_modules=["nowhere"]), "is not an adapter"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "pickles"),
    "tensor missing": (with_tensors(fewer), "does not fit"),
    "tensor of another shape": (with_tensors(other_shape), "does not fit"),
    "tensor too many": (with_tensors(lambda t: t.update(a=torch.ones(2))), "does not fit"),
    "cut": (lambda f: os.truncate(f / "adapter_model.safetensors", 999), "is damaged"),
}


@pytest.mark.parametrize("build, message", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_adapter_folder_is_refused(build, message, tmp_path, monkeypatch):
    monkeypatch.setattr("onn_core.adapters.folder.MATCH_CPU_S", 1)
    base = toy_dir("llama")
    adapter = saved_adapter(base, tmp_path / "adapter")
    build(adapter)
    with pytest.raises(OnnError, match=message):
        load_adapter(streamed(base), adapter)
    with pytest.raises(OnnError, match=message):
        onn_core.merge(base, adapter, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


UNSLOTH = (  # as its get_peft_regex writes it
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": UNSLOTH},
        {"target_modules": r".*\.(?:q|v)_proj", "rank_pattern": {r"layers\.[13]\..*": 2}},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r"(?:.*\.)+1\..*q_proj"},
    ],
    ids=["unsloth", "ranks", "exclude"],
)
def test_adapters_with_regular_expressions_are_those_of_peft(settings, tmp_path):
    base = toy_dir("llama")
    adapter = saved_adapter(base, tmp_path / "adapter", **settings)
    models = [
        load_adapter(streamed(base), adapter, trainable=True),
        peft.PeftModel.from_pretrained(in_memory(base), adapter, is_trainable=True),
    ]
    assert_same(*(step(model.train(), toy_batch()) for model in models))
    assert_merges_like_peft(base, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, {"target_modules": ["q_proj"]}],
    ids=["targeted", "untouched"],
)
def test_embeddings_saved_with_an_adapter_are_compared_with_the_models_own(settings, tmp_path):
    base = toy_dir("llama")
    adapter = saved_adapter(base, tmp_path / "adapter", **settings)
    plain = load_file(adapter / "adapter_model.safetensors")
    with_lora(in_memory(base), **settings).save_pretrained(adapter, save_embedding_layers=True)
    saved = load_file(adapter / "adapter_model.safetensors")
    copies = sorted(saved.keys() - plain.keys())
    assert len(copies) == 2
    save_file(saved | plain, adapter / "adapter_model.safetensors")
    models = [
        load_adapter(streamed(base), adapter, trainable=True),
        peft.PeftModel.from_pretrained(in_memory(base), adapter, is_trainable=True),
    ]
    assert_same(*(step(model.train(), toy_batch()) for model in models))
    assert_merges_like_peft(base, adapter, tmp_path / "out")
    saved[copies[0]][-1, -1] += 1
    save_file(saved, adapter / "adapter_model.safetensors")
    with pytest.raises(OnnError, match="its values are not those of the model folder"):
        load_adapter(streamed(base), adapter)


def test_adapter_of_another_model_is_refused(tmp_path):
    adapter = saved_adapter(toy_dir("gpt2"), tmp_path)
    with pytest.raises(OnnError, match="not an adapter for this model"):
        load_adapter(streamed(toy_dir("llama")), adapter)


MERGE_AND_MEASURE = """
import gc, sys
import peft, onn_core
def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
before = status("VmRSS")
onn_core.merge(*sys.argv[1:])
print(status("VmHWM") - before)
"""


@pytest.mark.heavy
def test_merge_holds_one_module_at_a_time(tmp_path):
    """290 MB of base, whose largest matrix is 6 MB (25 MB of products in float32)."""
    sizes = {"vocab_size": 3000, "hidden_size": 1024, "intermediate_size": 1536}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=16, num_attention_heads=8)
    base = write_random_model(tmp_path / "base", config, progress=False)
    size_bytes = (base / "model.safetensors").stat().st_size
    assert size_bytes > 280e6
    adapter = saved_adapter(base, tmp_path / "adapter")
    command = [sys.executable, "-W", "ignore", "-c", MERGE_AND_MEASURE]
    command += [base, adapter, tmp_path / "out"]
    made = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(made.stdout) < size_bytes / 2
