"""A quantised folder trains with exactly the weights that its format means."""

import json
import math

import peft
import pytest
import torch
import transformers
from quantise import FORMATS, quantised
from safetensors.torch import load_file, save_file
from toy import (
    GROUPED,
    assert_same,
    change_plan,
    in_memory,
    reserving_graphs,
    step,
    streamed,
    toy_batch,
    toy_dir,
    with_lora,
)

import onn_core
from onn_core.errors import ConfigError, ModelFolderError
from onn_core.weights.dequantise import FourBit
from onn_core.weights.folder import ModelFolder
from onn_core.weights.slots import count_dense, few_slots, slots_bytes

pytestmark = pytest.mark.filterwarnings("ignore")
CLOSE = 1e-5  # LLM.int8 multiplies by a 127th, the reference divides by 127
FAMILIES = {"llama": list(FORMATS)} | {
    family: ["nf4-nested", "llm-int8", "fp8-block", "ct-int4-zeros", "gptq4-order", "awq"]
    for family in ("qwen2", "phi3", "mixtral")
}
KINDS = [(family, kind) for family in FAMILIES for kind in FAMILIES[family]]
QWEN_MOE = GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT_OSS = GROUPED | {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2}


def both(family, kind, folder, dtype=torch.float32):
    """The folders of a toy model: quantised, and with the dense weights that are meant."""
    return quantised(toy_dir(family, n_layers=2), kind, folder, dtype)


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_gradients_are_those_of_the_dense_weights_in_memory(family, kind, tmp_path):
    packed, dense = both(family, kind, tmp_path)
    want = step(with_lora(in_memory(dense)), toy_batch())
    got = step(with_lora(streamed(packed)), toy_batch())
    assert_same(got, want, CLOSE if kind == "llm-int8" else None)


@pytest.mark.parametrize("kind", ["nf4-nested", "fp8-block", "ct-int4-zeros", "gptq4", "awq"])
def test_qwen3_with_experts(kind, tmp_path):
    config = transformers.Qwen3MoeConfig(**QWEN_MOE, head_dim=8, mlp_only_layers=[0])
    config.num_hidden_layers = 2
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    packed, dense = quantised(tmp_path / "base", kind, tmp_path)
    want = step(with_lora(in_memory(dense)), toy_batch())
    assert_same(step(with_lora(streamed(packed)), toy_batch()), want)


@pytest.mark.parametrize("kind", ["nf4-nested", "fp8-ragged", "gptq4", "awq"])
def test_in_bfloat16_every_weight_is_rounded_once(kind, tmp_path):
    packed, dense = both("llama", kind, tmp_path, torch.bfloat16)
    want = step(with_lora(in_memory(dense)), toy_batch())
    assert_same(step(with_lora(streamed(packed)), toy_batch()), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_experts_of_gpt_oss(dtype, tmp_path):
    config = transformers.GptOssConfig(**GPT_OSS, head_dim=8)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    packed, dense = quantised(tmp_path / "base", "mxfp4", tmp_path, dtype)
    settings = {"attn_implementation": "eager", "dtype": dtype}
    whole = in_memory(dense, **settings)
    for name, matrix in whole.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            # In memory as in the scratch: how a matmul of bfloat16 is summed depends on it.
            matrix.data = matrix.data.mT.contiguous().mT
    want = step(with_lora(whole), toy_batch())
    model = with_lora(streamed(packed, **settings))
    assert_same(step(model, toy_batch()), want)
    assert not model.base_model.model.plan.dense  # each expert's is made where it is used
    model.base_model.model.set_experts_implementation("eager")
    assert_same(step(model, toy_batch()), want, CLOSE)
    assert model.base_model.model.streaming.stream.scratch.n_bytes
    model.base_model.model.set_experts_implementation("grouped_mm")
    model.config._experts_implementation = "eager"  # past the model
    with pytest.raises(ConfigError, match="set_experts_implementation"):
        step(model, toy_batch())


def gpt_oss(folder, dtype=torch.float32):
    """A toy model whose experts' matrices are (E, in, out), and its tensors."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.GptOssConfig(**GPT_OSS, head_dim=8), dtype=dtype
    )
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def test_fp8_experts_that_are_stored_as_the_parameter_is(tmp_path):
    tensors, dense = gpt_oss(tmp_path), {}
    for name, tensor in list(tensors.items()):
        if name.endswith(("gate_up_proj", "down_proj")):
            scale = tensor.abs().amax((1, 2), keepdim=True) / 448
            tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
            dense[name] = tensors[name].float() * scale
    config = json.loads((tmp_path / "config.json").read_text())
    settings = {"attn_implementation": "eager"}
    save_file(tensors | dense, tmp_path / "model.safetensors", metadata={"format": "pt"})
    want = step(with_lora(in_memory(tmp_path, **settings)), toy_batch())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(step(with_lora(streamed(tmp_path, **settings)), toy_batch()), want)


@pytest.mark.parametrize("block_bytes", [None, 4 * 32 * 16])
@pytest.mark.parametrize("on_experts", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_of_bfloat16_are_cast_one_after_another(
    family, on_experts, block_bytes, tmp_path, monkeypatch
):
    """On a CPU without bfloat16 matmul: a slot holds them as they are stored, and no scratch is."""
    if block_bytes is not None:
        monkeypatch.setattr("onn_core.ops.matmul.BLOCK_BYTES", block_bytes)
    settings = {"dtype": torch.float32}
    if family == "gpt_oss":
        gpt_oss(tmp_path, torch.bfloat16)
        folder, settings["attn_implementation"] = tmp_path, "eager"
    else:
        folder = toy_dir(family, torch.bfloat16, n_layers=2)
    lora = {"target_modules": ["q_proj"]}
    if on_experts:
        lora["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
    want = step(with_lora(in_memory(folder, **settings), **lora), toy_batch())
    model = with_lora(streamed(folder, **settings), **lora)
    assert_same(step(model, toy_batch()), want, block_bytes and CLOSE)
    base = model.base_model.model
    experts = [weight for weight in base.layer_weights() if len(weight.shape) == 3]
    assert experts and all(weight.dtype == torch.bfloat16 for weight in experts)
    assert bool(base.streaming.stream.scratch.n_bytes) == on_experts


@pytest.mark.parametrize("kind", ["nf4", "llm-int8"])
def test_an_adapter_on_the_parameter_of_a_linear_layer(kind, tmp_path):
    packed, dense = both("llama", kind, tmp_path)
    lora = {"target_modules": ["q_proj"], "target_parameters": ["v_proj.weight"]}
    want = step(with_lora(in_memory(dense), **lora), toy_batch())
    model = with_lora(streamed(packed), **lora)
    for _ in range(2):
        assert_same(step(model, toy_batch()), want, CLOSE)
    base = model.unload()
    plain = {"target_modules": ["q_proj"]}
    want = step(with_lora(in_memory(dense), **plain), toy_batch())
    assert_same(step(with_lora(base, **plain), toy_batch()), want, CLOSE)
    assert not base.streaming.stream.scratch.n_bytes


def zamba(folder, kind):
    """The folders of a model that has one attention for two layers, quantised and dense."""
    config = transformers.ZambaConfig(
        **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6},
        **{"attn_layer_period": 3, "attn_layer_offset": 1, "num_attention_heads": 4},
        **{"num_key_value_heads": 4, "use_mamba_kernels": False, "pad_token_id": 0},
        **{"mamba_d_state": 4, "n_mamba_heads": 2, "mamba_dt_rank": 4},
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    return quantised(folder / "base", kind, folder)


@pytest.mark.parametrize("kind", ["nf4", "llm-int8"])
def test_layers_that_share_their_packed_weights(kind, tmp_path):
    packed, dense = zamba(tmp_path, kind)
    lora = {"target_modules": ["q_proj", "v_proj"]}
    want = step(with_lora(in_memory(dense), **lora), toy_batch())
    assert_same(step(with_lora(streamed(packed), **lora), toy_batch()), want, CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_bytes", [None, 4 * 32 * 16])
@pytest.mark.parametrize(("family", "kind"), [("qwen2", "nf4"), ("mixtral", None)])
def test_autocast(family, kind, block_bytes, dtype, tmp_path, monkeypatch):
    if block_bytes is not None:
        monkeypatch.setattr("onn_core.ops.matmul.BLOCK_BYTES", block_bytes)
    packed = dense = toy_dir(family, dtype, n_layers=2)
    if kind is not None:
        packed, dense = quantised(packed, kind, tmp_path, torch.float32)
    models = [
        with_lora(make(folder, dtype=torch.float32))
        for make, folder in ((in_memory, dense), (streamed, packed))
    ]
    with torch.autocast("cpu", torch.bfloat16):
        want, got = (step(model, toy_batch()) for model in models)
    assert_same(got, want, 5e-2 if block_bytes or dtype == torch.bfloat16 else None)


def test_bitsandbytes_words_of_the_models_dtype_are_decoded_by_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("onn_core.ops.matmul.BLOCK_BYTES", 4 * 32 * 16)
    packed, _ = both("llama", "fp4-in-bf16", tmp_path, torch.bfloat16)
    rows, n_made = FourBit.rows, []

    def counted(self, parts, start, stop):
        n_made.append((stop - start) * self.shape[1])
        return rows(self, parts, start, stop)

    monkeypatch.setattr(FourBit, "rows", counted)
    step(with_lora(streamed(packed)), toy_batch())
    assert n_made and max(n_made) <= 64 * 16


@pytest.mark.parametrize("later", [{"target_parameters": ["experts.gate_up_proj"]}, {}])
def test_the_plan_is_made_anew_for_a_later_adapter(later, tmp_path):
    gpt_oss(tmp_path, torch.bfloat16)
    base = streamed(
        tmp_path, memory_budget="64MB", dtype=torch.float32, attn_implementation="eager"
    )
    model = with_lora(base, target_modules=["q_proj"], r=16)
    step(model, toy_batch())
    assert not base.plan.dense
    model.delete_adapter("default")
    model = with_lora(model.unload(), target_modules=["q_proj"], r=2, **later)
    step(model, toy_batch())
    assert bool(base.plan.dense) == bool(later)


@pytest.mark.parametrize("on_experts", [False, True])
def test_the_plan_counts_experts_that_an_adapter_looks_at(on_experts, tmp_path):
    lora = {"target_parameters": ["experts.gate_up_proj"]} if on_experts else {}
    gpt_oss(tmp_path, torch.bfloat16)
    base = streamed(
        tmp_path, memory_budget="64MB", dtype=torch.float32, attn_implementation="eager"
    )
    step(with_lora(base, target_modules=["q_proj"], **lora), toy_batch())
    assert bool(base.plan.dense) == on_experts


# ---- stored bytes in the slots, and a scratch in which a weight is dense while it is used


def as_on_a_device(model):
    """A streamed model whose packed weights are made dense as a whole, as no CPU does."""
    for number in range(len(model.sizes.layers)):
        for weight in model.layer_weights(number):
            weight.by_blocks = False
    return model


def with_small_scratch(model):
    """A streamed model whose scratch holds the weights of one module: all layers share it."""
    as_on_a_device(model)
    dense = count_dense(model.sizes.layers, whole_unit=False)
    assert slots_bytes(dense) < slots_bytes(count_dense(model.sizes.layers, whole_unit=True))
    model.streaming.stream.set_slots(model.plan.slots, dense)
    return change_plan(model, dense=dense)


@pytest.mark.parametrize(
    ("family", "kind", "reserves", "micro_batch_size"),
    [
        ("llama", "nf4-nested", False, None),
        ("llama", "nf4-nested", True, 2),
        ("phi3", "gptq4-order", False, 2),
        ("mixtral", "fp8-block", True, None),
        ("mixtral", "fp8-block", False, 2),
    ],
)
def test_weights_that_share_a_scratch(family, kind, reserves, micro_batch_size, tmp_path):
    """Two layers of one shape: what one saves for backward is overwritten by the other."""
    packed, dense = both(family, kind, tmp_path)
    want = step(with_lora(streamed(dense, micro_batch_size=micro_batch_size)), toy_batch())
    base = with_small_scratch(streamed(packed, micro_batch_size=micro_batch_size))
    model = with_lora(reserving_graphs(base, 2) if reserves else base)
    for _ in range(2):
        assert_same(step(model, toy_batch()), want)
    assert base.streaming.stream.scratch.n_bytes == slots_bytes(base.plan.dense)


def test_matrix_by_matrix(tmp_path):
    packed, dense = both("llama", "nf4-nested", tmp_path)
    want = step(with_lora(streamed(dense)), toy_batch())
    base = with_small_scratch(streamed(packed))
    slots = few_slots(base.sizes.layers, 1) + few_slots(base.sizes.head, 1)
    base.streaming.stream.set_slots(slots)
    model = with_lora(change_plan(base, slots=slots, n_resident=0))
    for _ in range(2):
        assert_same(step(model, toy_batch()), want)


def test_dora_and_adapters_on_experts(tmp_path):
    packed, dense = both("mixtral", "fp8-block", tmp_path)
    settings = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    settings |= {"target_modules": ["q_proj"], "use_dora": False}
    want = step(with_lora(in_memory(dense), **settings), toy_batch())
    assert_same(step(with_lora(streamed(packed), **settings), toy_batch()), want, 1e-6)
    packed, dense = both("llama", "nf4", tmp_path)
    dora = {"use_dora": True, "init_lora_weights": True}
    models = [with_lora(in_memory(dense), **dora)]
    models.append(with_lora(with_small_scratch(streamed(packed)), **dora))
    for model in models:
        model(**toy_batch())  # the first forward makes the magnitudes
        torch.manual_seed(4)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    want, got = (step(model, toy_batch()) for model in models)
    assert_same(got, want, 1e-6)


@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["llm-int8", "nf4-nested", "fp8-ragged", "gptq4-order", "awq"])
def test_a_few_rows_are_multiplied_at_a_time(kind, dora, micro_batch_size, tmp_path, monkeypatch):
    """Without a scratch, where no adapter looks at the weight itself, as DoRA does."""
    monkeypatch.setattr("onn_core.ops.matmul.BLOCK_BYTES", 4 * 32 * 16)
    packed, dense = both("qwen2", kind, tmp_path)
    settings = {"use_dora": dora, "init_lora_weights": dora}
    models = [with_lora(in_memory(dense), **settings)]
    models.append(with_lora(streamed(packed, micro_batch_size=micro_batch_size), **settings))
    for model in models:
        model(**toy_batch())
        torch.manual_seed(4)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    want, got = (step(model, toy_batch()) for model in models)
    assert_same(got, want, CLOSE)
    assert bool(models[1].base_model.model.streaming.stream.scratch.n_bytes) == dora


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llm-int8", "nf4", "fp8-block"])
def test_a_few_rows_in_a_narrow_dtype(kind, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("onn_core.ops.matmul.BLOCK_BYTES", 4 * 32 * 16)
    packed, dense = both("llama", kind, tmp_path, dtype)
    want = step(with_lora(in_memory(dense, dtype=torch.float32)), toy_batch())
    assert_same(step(with_lora(streamed(packed)), toy_batch()), want, 0.1)


def test_slots_and_plan_count_what_is_stored(tmp_path):
    base = toy_dir("llama", torch.bfloat16)
    packed, dense = quantised(base, "nf4", tmp_path, torch.bfloat16)
    small, large = (streamed(folder, memory_budget="64MB") for folder in (packed, dense))
    pages = 4096 * 2 * 3  # a matrix's three tensors each begin anywhere in a page
    for mine, theirs in zip(small.layer_weights(), large.layer_weights(), strict=True):
        assert mine.n_bytes < 0.4 * theirs.n_bytes
        assert mine.slot_bytes < mine.n_bytes + pages
    layer = sum(weight.n_bytes for weight in large.layer_weights())
    small.fit(2, 8)
    assert (
        not small.plan.dense and small.plan.terms.dense_copies and not large.plan.terms.dense_copies
    )
    as_on_a_device(small).fit(3, 8)
    assert slots_bytes(small.plan.dense) == layer
    assert small.plan.terms.dense_copies > layer
    n_bytes = sum(
        entry.n_bytes for one in small.model_folder.quantised.values() for entry in one.entries
    )
    step(with_lora(small), toy_batch())
    head = sum(weight.n_bytes for unit in small.sizes.head for weight in unit)
    assert (
        n_bytes
        <= small.counts().bytes_read - head
        < n_bytes + pages * len(small.model_folder.quantised)
    )


def test_a_file_that_aligns_nothing(tmp_path):
    packed, dense = both("llama", "ct-int4-zeros", tmp_path)
    want = step(with_lora(in_memory(dense)), toy_batch())
    path = packed / "model.safetensors"
    content = path.read_bytes()
    stop = 8 + int.from_bytes(content[:8], "little")
    header = content[8:stop] + b" " * 3
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[stop:])
    assert_same(step(with_lora(streamed(packed)), toy_batch()), want)


def test_a_block_of_rows_is_that_part_of_the_matrix(tmp_path, monkeypatch):
    """Few rows at a time, so that no matrix ends with a whole block."""
    monkeypatch.setitem(onn_core.weights.dequantise.BLOCK_ELEMENTS, "cpu", 5 * 32)
    for kind in FORMATS:
        packed, dense = both("llama", kind, tmp_path)
        model_folder, want = ModelFolder.open(packed), load_file(dense / "model.safetensors")
        for name, one in model_folder.quantised.items():
            torch.testing.assert_close(model_folder.read_dense(name), want[name], rtol=1e-6, atol=0)
            scratch = one.laid_out(torch.empty(math.prod(one.shape), dtype=torch.bfloat16))
            parts = [model_folder.read(entry.name) for entry in one.entries]
            assert one.dense(parts, torch.bfloat16, out=scratch) is scratch
            assert torch.equal(scratch, one.dense(parts, torch.float32).bfloat16())


@pytest.mark.cuda
def test_a_cuda_device_makes_the_same_values(tmp_path):
    for kind in FORMATS:
        model_folder = ModelFolder.open(both("llama", kind, tmp_path)[0])
        for one in model_folder.quantised.values():
            parts = [model_folder.read(entry.name) for entry in one.entries]
            want = one.dense(parts, torch.bfloat16)
            got = one.dense([part.cuda() for part in parts], torch.bfloat16)
            assert torch.equal(got.cpu(), want), (kind, one.name)


def test_old_gptq_has_its_settings_in_a_file_of_their_own(tmp_path):
    packed, dense = both("llama", "gptq4", tmp_path)
    config = json.loads((packed / "config.json").read_text())
    settings = config.pop("quantization_config")
    del settings["quant_method"]
    (packed / "config.json").write_text(json.dumps(config))
    (packed / "quantize_config.json").write_text(json.dumps(settings))
    want = step(with_lora(in_memory(dense)), toy_batch())
    assert_same(step(with_lora(streamed(packed)), toy_batch()), want)


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "nf4-nested"), ("phi3", "gptq4-order"), ("mixtral", "fp8-block")]
)
def test_merge_into_a_quantised_base_is_dense_and_equal_to_peft(family, kind, tmp_path):
    packed, dense = both(family, kind, tmp_path, torch.bfloat16)
    with_lora(streamed(packed)).save_pretrained(tmp_path / "adapter")
    merged = in_memory(onn_core.merge(packed, tmp_path / "adapter", tmp_path / "merged"))
    assert merged.dtype == torch.bfloat16
    assert "quantization_config" not in (tmp_path / "merged/config.json").read_text()
    adapted = peft.PeftModel.from_pretrained(in_memory(dense), tmp_path / "adapter")
    want = adapted.merge_and_unload().state_dict()
    got = merged.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


# ---- what is refused, before a matrix is read

Q = "model.layers.0.self_attn.q_proj"


def without(name):
    return lambda tensors, settings: tensors.pop(f"{Q}.{name}")


def replaced(name, make):
    def change(tensors, settings):
        tensors[f"{Q}.{name}"] = make(tensors[f"{Q}.{name}"])

    return change


def state(**changes):
    def change(old):
        text = json.dumps(json.loads(bytes(old.tolist())) | changes)
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    return replaced("weight.quant_state.bitsandbytes__nf4", change)


def settings(**changes):
    return lambda tensors, settings: settings.update(changes)


REFUSED = [
    ("nf4", settings(quant_method="hqq"), "quantised with 'hqq', which is none of"),
    ("nf4", settings(quant_method=["nf4"]), "which is none of"),
    ("nf4", without("weight.absmax"), "absmax' is missing"),
    ("nf4", without("weight.quant_state.bitsandbytes__nf4"), "lacks its other parts"),
    ("nf4", replaced("weight.absmax", lambda t: t[1:].clone()), "has shape"),
    ("nf4", state(shape=[2**30, 2**30]), "values of half a byte"),
    ("nf4", state(shape=[-1, -64]), "states the shape"),
    ("nf4", state(shape="x"), "states the shape"),
    ("nf4", state(blocksize=0), "has a blocksize of 0"),
    ("nf4", state(blocksize=True), "has a blocksize of True"),
    ("nf4-nested", state(nested_offset=float("nan")), "has a nested_offset of nan"),
    ("nf4-nested", state(nested_blocksize=None), "has a nested_blocksize of None"),
    ("llm-int8", without("SCB"), "lacks its other parts"),
    ("llm-int8", replaced("weight_format", lambda t: t + 1), "layout of one processor"),
    ("fp8-block", without("weight_scale_inv"), "lacks its other parts"),
    ("fp8-block", replaced("weight_scale_inv", lambda t: t[:, :3].clone()), "has shape"),
    ("fp8-block", replaced("weight_scale_inv", torch.Tensor.long), "has dtype int64"),
    ("ct-int4", without("weight_scale"), "weight_scale' is missing"),
    ("ct-int4", replaced("weight_shape", lambda t: t * 2**20), "for .33554432, 33554432."),
    ("ct-int4", settings(transform_config={"a": {}}), "transform_config"),
    ("ct-int4-order", replaced("weight_g_idx", lambda t: t + 9), "names groups that are not"),
    ("gptq4", without("scales"), "scales' is missing"),
    ("gptq4", settings(checkpoint_format="marlin"), "checkpoint_format 'marlin'"),
    ("gptq4-order", replaced("g_idx", lambda t: t - 1), "names groups that are not"),
    ("gptq4", replaced("qzeros", lambda t: t[:, :1].clone()), "has shape"),
    ("awq", without("qweight"), "lacks its other parts"),
    ("awq", settings(version="gemv"), "version 'gemv'"),
    ("ct-int8", settings(sparsity_config={"format": "sparse-24"}), "sparsity_config"),
]


@pytest.mark.parametrize(("kind", "change", "match"), REFUSED)
def test_what_cannot_be_decoded_is_refused(kind, change, match, tmp_path):
    packed, _ = both("llama", kind, tmp_path)
    tensors = load_file(packed / "model.safetensors")
    config = json.loads((packed / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, packed / "model.safetensors")
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFolderError, match=match):
        streamed(packed)


def test_a_quantised_head_is_refused(tmp_path):
    packed, _ = both("llama", "fp8-block", tmp_path)
    tensors = load_file(packed / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    tensors["lm_head.weight_scale_inv"] = torch.ones(1)
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(ModelFolderError, match="lm_head is quantised"):
        streamed(packed)
