"""What other libraries do to a streamed model: as in memory, or one sentence."""

import copy

import peft
import pytest
import torch
import torch.distributed
from small import trainer, write_small
from toy import assert_same, in_memory, step, streamed, toy_batch, toy_dir, with_lora
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

import onn_core

BELOW = {
    "LoRA on the embedding": peft.LoraConfig(
        r=4, target_modules=["embed_tokens"], init_lora_weights=False
    ),
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16
    ),
    "trainable tokens": peft.TrainableTokensConfig(
        token_indices=list(range(3, 60)), target_modules=["embed_tokens"]
    ),
}


def adapted(model, config):
    torch.manual_seed(1)
    return peft.get_peft_model(model, copy.deepcopy(config)).train()


@pytest.mark.parametrize("config", BELOW.values(), ids=BELOW)
def test_what_is_trained_below_the_layers(config):
    want = step(adapted(in_memory(toy_dir("llama")), config), toy_batch())
    assert_same(step(adapted(streamed(toy_dir("llama")), config), toy_batch()), want)


def test_prefix_tuning_is_refused():
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(onn_core.OnnError, match="prefix tuning"):
        step(adapted(streamed(toy_dir("llama")), config), toy_batch())


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_the_class_is_the_familys_own(family):
    plain, model = in_memory(toy_dir(family)), streamed(toy_dir(family))
    for name in ("__name__", "__qualname__", "__module__"):
        assert getattr(type(model), name) == getattr(type(plain), name)
    assert isinstance(model, type(plain))
    assert model.config.architectures == plain.config.architectures


def test_label_smoothing_shifts_the_labels(tmp_path):
    rows = [{name: values[0] for name, values in toy_batch(1, seed=n).items()} for n in range(8)]

    def losses(model):
        set_seed(0)
        settings = {"label_smoothing_factor": 0.1, "max_steps": 3, "logging_steps": 1}
        settings |= {"report_to": "none", "use_cpu": True, "save_strategy": "no"}
        arguments = TrainingArguments(tmp_path, **settings)
        done = Trainer(with_lora(model), arguments, train_dataset=rows)
        done.train()
        return [entry["loss"] for entry in done.state.log_history if "loss" in entry]

    want = losses(in_memory(toy_dir("llama")))
    assert len(want) == 3 and losses(streamed(toy_dir("llama"))) == want


def test_a_saved_adapter_names_the_familys_class(tmp_path):
    lora = peft.LoraConfig(r=2, target_modules="all-linear")
    peft.get_peft_model(streamed(toy_dir("llama")), lora).save_pretrained(tmp_path)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.get_base_model(), type(in_memory(toy_dir("llama"))))


def test_torch_compile_trains_the_same():
    want = step(with_lora(in_memory(toy_dir("llama"))), toy_batch())
    model = torch.compile(with_lora(streamed(toy_dir("llama"))), backend="eager")
    loss, gradients = step(model, toy_batch())
    plain = {name.removeprefix("_orig_mod."): grad for name, grad in gradients.items()}
    assert_same((loss, plain), want)


@pytest.fixture
def one_of_one(monkeypatch):
    """This process, as the only one of its group."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_data_parallel_of_one_process_reduces_the_adapters(one_of_one):
    want = step(with_lora(in_memory(toy_dir("llama"))), toy_batch())
    model = with_lora(streamed(toy_dir("llama")))
    model = torch.nn.parallel.DistributedDataParallel(model)
    loss, gradients = step(model, toy_batch())
    plain = {name.removeprefix("module."): grad for name, grad in gradients.items()}
    assert_same((loss, plain), want)


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_sharding_of_the_weights_is_refused(name, monkeypatch):
    model = streamed(toy_dir("llama"))
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")  # as its launcher and Trainer do
    with pytest.raises(onn_core.OnnError, match=f"{name} cannot hold .* torchrun"):
        model(**toy_batch())
    with pytest.raises(onn_core.OnnError, match=f"{name} cannot hold .* torchrun"):
        streamed(toy_dir("llama"))


def test_data_parallel_in_one_process_is_refused():
    """By what nn.DataParallel asks of each module of which it makes replicas for several GPUs."""
    with pytest.raises(onn_core.OnnError, match="DataParallel cannot hold .* torchrun"):
        for module in with_lora(streamed(toy_dir("llama"))).modules():
            module._replicate_for_data_parallel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_made_from_the_weights_are_refused(start, dtype):
    lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=start)
    with pytest.raises(onn_core.OnnError, match="init_lora_weights=True"):
        peft.get_peft_model(streamed(toy_dir("llama", dtype)), lora)


def test_merging_into_weights_that_are_absent_is_refused():
    model = with_lora(streamed(toy_dir("llama")))
    with pytest.raises(onn_core.OnnError, match="onn_core.merge"):
        model.merge_and_unload()


@pytest.mark.parametrize(
    "given", [{"device_map": "auto"}, {"trust_remote_code": True}, {"load_in_4bit": True}]
)
def test_arguments_of_transformers_are_refused_by_name(given):
    with pytest.raises(onn_core.OnnError, match=next(iter(given))):
        onn_core.from_pretrained(toy_dir("llama"), **given)


def test_the_attention_of_transformers_is_honoured():
    folder, batch = toy_dir("llama"), toy_batch()
    want = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    got = streamed(folder, attn_implementation="eager", trust_remote_code=False)
    assert got.config._attn_implementation == "eager"
    assert_same(step(with_lora(got), batch), step(with_lora(want), batch))


def test_several_processes_that_do_not_know_how_to_meet_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(onn_core.OnnError, match="WORLD_SIZE is 2, but RANK, MASTER_ADDR"):
        trainer(write_small(tmp_path), tmp_path / "run").train()
