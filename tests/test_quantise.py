"""`quantize="int8"` and "nf4": made once, in the layout of bitsandbytes, and trained from there."""

import json
import os
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from test_models import ENGLISH
from toy import assert_same, in_memory, step, streamed, toy_batch, toy_dir, with_lora
from transformers import AutoTokenizer, BitsAndBytesConfig

import onn_core
from onn_core.errors import ConfigError, ModelFolderError
from onn_core.weights import quantise
from onn_core.weights.folder import ModelFolder

pytestmark = pytest.mark.filterwarnings("ignore")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ONN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def folder_of(cache):
    """The one folder in the cache."""
    (folder,) = cache.iterdir()
    return folder


def dense_of(folder):
    """Every matrix of a quantised folder, made dense by the reader of published folders."""
    model_folder = ModelFolder.open(folder)
    return {name: model_folder.read_dense(name) for name in model_folder.quantised}


@pytest.mark.parametrize("kind", quantise.KINDS)
@pytest.mark.parametrize(("family", "n_matrices"), [("llama", 14), ("phi3", 8), ("mixtral", 32)])
def test_gradients_are_those_of_what_was_written(kind, family, n_matrices, cache):
    base = streamed(toy_dir(family, n_layers=2), quantize=kind)
    got = step(with_lora(base), toy_batch())
    dense = dense_of(folder_of(cache))
    assert len(dense) == n_matrices
    entries = ModelFolder.open(folder_of(cache)).tensors.values()
    assert all(entry.offset % entry.dtype.itemsize == 0 for entry in entries)
    model = in_memory(toy_dir(family, n_layers=2))
    shards = load_file(toy_dir(family, n_layers=2) / "model.safetensors")
    for name, matrix in dense.items():
        off = (matrix - shards[name]).abs().max() / shards[name].abs().max()
        assert off < (0.005 if kind == "int8" else 0.2), name
    if family != "mixtral":  # whose experts transformers merges
        model.load_state_dict(dense, strict=False)
        want = step(with_lora(model), toy_batch())
        assert_same(got, want, 1e-5 if kind == "int8" else None)


def test_what_is_written_is_what_bitsandbytes_writes(cache):
    functional = pytest.importorskip("bitsandbytes", reason="the extra formats").functional
    streamed(toy_dir("llama", torch.bfloat16, n_layers=2), quantize="nf4")
    stored = load_file(folder_of(cache) / "model.safetensors")
    dense = load_file(toy_dir("llama", torch.bfloat16, n_layers=2) / "model.safetensors")
    names = [name for name in dense if name.split(".")[-2] in LINEAR]
    assert len(names) == 14
    for name in names:
        packed, state = functional.quantize_4bit(dense[name], blocksize=64, quant_type="nf4")
        assert torch.equal(stored[name], packed)
        for part, tensor in state.as_dict(packed=True).items():
            if "quant_state" in part:
                assert json.loads(bytes(stored[f"{name}.{part}"])) == json.loads(bytes(tensor))
            else:
                assert torch.equal(stored[f"{name}.{part}"], tensor)


@pytest.mark.parametrize("kind", quantise.KINDS)
def test_transformers_reads_it_with_bitsandbytes(kind, cache):
    pytest.importorskip("bitsandbytes", reason="the extra formats")
    streamed(toy_dir("llama", torch.bfloat16, n_layers=2), quantize=kind)
    loaded = in_memory(folder_of(cache), device_map="cpu").dequantize().state_dict()
    for name, matrix in dense_of(folder_of(cache)).items():
        torch.testing.assert_close(loaded[name].float(), matrix.float(), rtol=0.01, atol=1e-4)


@pytest.mark.parametrize("block", [1, 1 << 24])
@pytest.mark.parametrize("shape", [(256, 96), (7, 10), (1, 2), (130, 64)])
def test_rows_at_a_time(shape, block, monkeypatch):
    matrix = torch.randn(shape)
    want = [quantise.quantise(kind, matrix) for kind in quantise.KINDS]
    monkeypatch.setattr(quantise, "BLOCK_ELEMENTS", block)
    for kind, parts in zip(quantise.KINDS, want, strict=True):
        assert all(map(torch.equal, parts, quantise.quantise(kind, matrix)))
        shapes = [(part.dtype, tuple(part.shape)) for part in parts]
        assert shapes == list(quantise.layout(kind, "a.weight", shape).values())


def test_zeros_stay_zeros():
    for kind in quantise.KINDS:
        parts = quantise.quantise(kind, torch.zeros(4, 64))
        dense = quantise.stored_as(kind, (4, 64)).dense(parts[:3], torch.float32)
        assert torch.equal(dense, torch.zeros(4, 64))


def test_it_is_made_once_and_again_where_a_file_changed(cache):
    first = step(with_lora(streamed(toy_dir("llama"), quantize="int8")), toy_batch())
    path = folder_of(cache) / "model.safetensors"
    before = path.stat()
    streamed(toy_dir("llama"), quantize="int8")
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    os.utime(path)  # touched, not changed
    streamed(toy_dir("llama"), quantize="int8")
    assert path.stat().st_ino == before.st_ino
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert_same(step(with_lora(streamed(toy_dir("llama"), quantize="int8")), toy_batch()), first)
    assert path.read_bytes() != content


def test_what_was_interrupted_goes_on(cache, monkeypatch):
    base = toy_dir("llama", shard="20KB", n_layers=2)
    n_shards = len(list(base.glob("*.safetensors")))
    assert n_shards > 3
    real, done = quantise.quantise, []

    def interrupted(kind, matrix):
        done.append(matrix)
        if len(done) == 9:
            raise KeyboardInterrupt
        return real(kind, matrix)

    monkeypatch.setattr(quantise, "quantise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        streamed(base, quantize="nf4")
    partial = folder_of(cache)
    written = {path.name: path.stat().st_ino for path in partial.glob("model*.safetensors")}
    assert 0 < len(written) < n_shards
    got = step(with_lora(streamed(base, quantize="nf4")), toy_batch())
    now = {path.name: path.stat().st_ino for path in folder_of(cache).glob("model*.safetensors")}
    assert len(now) == n_shards and written.items() <= now.items()
    assert not list(folder_of(cache).glob(".*"))
    whole = step(with_lora(streamed(toy_dir("llama", n_layers=2), quantize="nf4")), toy_batch())
    assert_same(got, whole)


def test_a_model_in_one_part_with_an_index(tmp_path):
    folder, part = tmp_path / "model", "model-00001-of-00001.safetensors"
    shutil.copytree(toy_dir("llama", n_layers=2), folder)
    (folder / "model.safetensors").rename(folder / part)
    index = {"weight_map": dict.fromkeys(load_file(folder / part), part)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    got = step(with_lora(streamed(folder, quantize="int8")), toy_batch())
    whole = step(with_lora(streamed(toy_dir("llama", n_layers=2), quantize="int8")), toy_batch())
    assert_same(got, whole)


def test_room_is_asked_for_before(monkeypatch):
    small = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: small)
    with pytest.raises(ConfigError, match="in nf4 takes 0.0 GB more in"):
        streamed(toy_dir("llama"), quantize="nf4")


def test_an_adapter_names_the_model_that_was_given(tmp_path, cache):
    base = toy_dir("llama", n_layers=2)
    model = with_lora(streamed(base, quantize="nf4"))
    model.save_pretrained(tmp_path / "adapter")
    assert peft.LoraConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == str(
        base
    )
    again = onn_core.load_adapter(streamed(base, quantize="nf4"), tmp_path / "adapter")
    ids = toy_batch()["input_ids"]
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


CONFIGS = [
    ({"load_in_8bit": True}, "int8"),
    ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
]


@pytest.mark.parametrize(("settings", "kind"), CONFIGS)
def test_a_config_of_transformers_says_the_same(settings, kind, cache):
    streamed(toy_dir("llama", n_layers=2), quantization_config=BitsAndBytesConfig(**settings))
    assert f"-{kind}-" in folder_of(cache).name


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"quantize": "int4"}, "quantize must be int8 or nf4"),
        ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, "only NF4"),
        ({"quantization_config": {"load_in_8bit": True}}, "must be a BitsAndBytesConfig"),
        ({"quantization_config": BitsAndBytesConfig()}, "must say load_in_8bit"),
        ({"load_in_4bit": True}, 'give quantize="nf4"'),
    ],
)
def test_what_cannot_be_made_is_refused(given, match):
    with pytest.raises(ConfigError, match=match):
        streamed(toy_dir("llama", n_layers=2), **given)


def test_a_quantised_folder_is_not_quantised_again(cache):
    streamed(toy_dir("llama", n_layers=2), quantize="nf4")
    with pytest.raises(ConfigError, match="is quantised already"):
        streamed(folder_of(cache), quantize="int8")


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ONN_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelFolderError, match="set ONN_CACHE"):
        streamed(toy_dir("llama", n_layers=2), quantize="nf4")


@pytest.mark.heavy
@pytest.mark.parametrize(("kind", "rise"), [("int8", 0.005), ("nf4", 0.15)])
def test_loss_of_a_real_model_hardly_rises(kind, rise, smollm2_dir):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    losses = [
        onn_core.perplexity(
            streamed(smollm2_dir, quantize=how), tokenizer, [{"text": ENGLISH}, {"text": readme}]
        ).loss
        for how in (None, kind)
    ]
    assert abs(losses[1] / losses[0] - 1) < rise, losses
