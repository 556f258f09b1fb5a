"""A whole run on a toy model with a real tokenizer and real text."""

import json
import math
import shutil

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import onn_core
from onn_core.errors import NonFiniteError, OnnError
from onn_core.trainer import MAX_SKIPS, ChunkedLoraTrainer, learning_rate


def settings(folder, output_dir, **changes):
    fixed = {"model_dir": str(folder), "data": "chatterbot", "output_dir": str(output_dir)}
    fixed |= {"batch_size": 4, "max_steps": 3, "max_length": 80, "learning_rate": 1e-2}
    return onn_core.TrainConfig(**fixed | {"device": "cpu", "progress": False} | changes)


def run(folder, output_dir, **changes):
    return ChunkedLoraTrainer(settings(folder, output_dir, **changes)).train()


def adapter(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter/adapter_model.safetensors")


def test_same_seed_same_adapter_and_it_loads_in_memory(toy_with_tokenizer, tmp_path):
    first = run(toy_with_tokenizer, tmp_path / "a", eval_every=2, eval_samples=4)
    second = run(toy_with_tokenizer, tmp_path / "b")
    run(toy_with_tokenizer, tmp_path / "c", seed=1)
    a, b, c = (adapter(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)
    assert [s.loss for s in first.steps] == [s.loss for s in second.steps]
    assert [e.step for e in first.evals] == [0, 2, 3]
    assert first.status == "finished" and first.steps[-1].bytes_read > 0

    streamed = peft.PeftModel.from_pretrained(
        onn_core.from_pretrained(toy_with_tokenizer, device="cpu"), tmp_path / "a/adapter"
    )
    in_memory = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(toy_with_tokenizer), tmp_path / "a/adapter"
    )
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        logits = [model.eval()(input_ids=ids).logits for model in (streamed, in_memory)]
        bare = AutoModelForCausalLM.from_pretrained(toy_with_tokenizer)(input_ids=ids).logits
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], bare)

    record = onn_core.RunRecord.load(tmp_path / "a/record.json")
    assert record == first
    assert str(tmp_path) not in json.dumps(record.to_dict())


def test_training_continues_from_an_adapter(toy_with_tokenizer, tmp_path):
    """Its held-out loss before the first step is the one that the first run ended with."""
    short = {"max_steps": 1, "eval_every": 1, "eval_samples": 4}
    first = run(toy_with_tokenizer, tmp_path / "a", lora_rank=3, sparse_layers=[1], **short)
    more = {"adapter": str(tmp_path / "a/adapter")} | short
    second = run(toy_with_tokenizer, tmp_path / "b", **more)
    assert second.evals[0].loss == first.evals[-1].loss != second.evals[-1].loss
    assert second.model["trained_layers"] == [1]
    assert second.model["trainable"] == first.model["trainable"]
    assert second.config["adapter"] == "adapter"
    frozen = run(toy_with_tokenizer, tmp_path / "c", learning_rate=0.0, **more)
    assert frozen.evals[-1].loss == first.evals[-1].loss
    before, after = adapter(tmp_path / "a"), adapter(tmp_path / "c")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_loss_is_the_mean_over_all_counted_tokens(toy_with_tokenizer, tmp_path):
    """Two accumulated batches of 4, in micro-batches of 3, are one batch of 8."""
    accumulated = run(
        toy_with_tokenizer,
        tmp_path / "a",
        gradient_accumulation_steps=2,
        micro_batch_size=3,
        max_steps=2,
    )
    whole = run(toy_with_tokenizer, tmp_path / "b", batch_size=8, max_steps=2)
    for left, right in zip(accumulated.steps, whole.steps, strict=True):
        assert left.counted_tokens == right.counted_tokens
        assert left.loss == pytest.approx(right.loss, rel=1e-6)
        assert left.grad_norm == pytest.approx(right.grad_norm, rel=1e-5)


def test_learning_rate_zero_changes_nothing(toy_with_tokenizer, tmp_path):
    record = run(toy_with_tokenizer, tmp_path, learning_rate=0.0, eval_every=3, eval_samples=4)
    assert record.evals[0].loss == record.evals[-1].loss
    assert all(step.grad_norm > 0 for step in record.steps)


def test_sparse_layers_train_only_those(toy_with_tokenizer, tmp_path):
    record = run(toy_with_tokenizer, tmp_path, sparse_layers="last:1", max_steps=1)
    assert list(record.steps[0].grad_norm_by_layer) == ["2"]
    assert record.model["trained_layers"] == [2]


def test_a_non_finite_loss_stops_and_keeps_the_last_good_adapter(toy_with_tokenizer, tmp_path):
    with pytest.raises(NonFiniteError, match=r"step \d+: .*layer|head"):
        run(toy_with_tokenizer, tmp_path, learning_rate=1e30, max_grad_norm=None, max_steps=9)
    kept = adapter(tmp_path)
    assert kept and all(values.dtype == torch.float32 for values in kept.values())
    record = onn_core.RunRecord.load(tmp_path / "record.json")
    assert record.status.startswith("stopped: step") and 0 < len(record.steps) < 9


def test_a_skipped_step_leaves_the_optimizer_bit_equal(toy_with_tokenizer, tmp_path):
    """float16: the second step overflows for real, because its scale was raised."""
    states = []

    def raise_scale(record):
        own = trainer.optimizer.state_dict()["state"].values()
        tensors = [value for state in own for value in state.values()] + trainer.trained
        states.append([tensor.detach().clone() for tensor in tensors])
        if record.steps[-1].step == 1:
            trainer.scaler.update(2.0**40)
        if record.steps[-1].step == 2:
            assert trainer.scaler.get_scale() == 2.0**39
            trainer.scaler.update(2.0**10)

    config = settings(toy_with_tokenizer, tmp_path, dtype="float16", loss_scale="dynamic")
    trainer = ChunkedLoraTrainer(config, raise_scale)
    record = trainer.train()
    assert [step.skipped for step in record.steps] == [False, True, False]
    assert [step.nonfinite for step in record.steps] == [0, 1, 0]
    assert [step.loss_scale for step in record.steps] == [2.0**16, 2.0**40, 2.0**10]
    assert len(states[0]) == 4 * len(trainer.trained)  # step, two moments, and the adapter
    assert all(map(torch.equal, states[0], states[1]))
    assert not any(map(torch.equal, states[1], states[2]))
    assert onn_core.RunRecord.load(tmp_path / "record.json").steps[1].skipped


def test_a_fixed_loss_scale_stays_and_ends_the_run_when_nothing_is_left(
    toy_with_tokenizer, tmp_path
):
    fixed = {"dtype": "float16", "loss_scale": 2.0**8, "max_steps": 2, "max_length": 40}
    steps = run(toy_with_tokenizer, tmp_path, **fixed).steps
    assert [(step.loss_scale, step.skipped) for step in steps] == [(2.0**8, False)] * 2
    with pytest.raises(NonFiniteError, match=f"step {MAX_SKIPS}: the gradient of layer"):
        run(
            toy_with_tokenizer,
            tmp_path,
            **fixed | {"loss_scale": 2.0**40, "max_steps": 99, "batch_size": 1},
        )
    assert len(onn_core.RunRecord.load(tmp_path / "record.json").steps) == MAX_SKIPS - 1


def test_schedules():
    config = {"model_dir": "m", "data": "d", "output_dir": "o", "learning_rate": 1.0}
    config |= {"max_steps": 12, "warmup_steps": 2}

    def rates(schedule):
        made = onn_core.TrainConfig(**config, lr_schedule=schedule)
        return [learning_rate(made, step) for step in (1, 2, 3, 8, 12)]

    assert rates("constant") == [0.5, 1, 1, 1, 1]
    assert rates("linear") == pytest.approx([0.5, 1, 1, 0.5, 0.1])
    assert rates("cosine") == pytest.approx([0.5, 1, 1, 0.5, 0.5 * (1 + math.cos(0.9 * math.pi))])


def test_progress_shows_step_layer_rate_and_time_left(
    toy_with_tokenizer, tmp_path, capsys, request
):
    request.getfixturevalue("monkeypatch").setattr("onn_core.run.progress.UPDATE_S", 0.0)
    run(toy_with_tokenizer, tmp_path, progress=True, max_steps=1)
    shown = capsys.readouterr().err
    for text in (
        "forward layer 2/3",
        "head",
        "backward layer 1/3",
        "GB/s",
        "s left in pass",
        "1/1",
    ):
        assert text in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparse_layers": [0, 3]}, "numbers from 0 to 2"),
        ({"sparse_layers": [1, 1]}, "different numbers"),
        ({"sparse_layers": []}, "sparse_layers must be"),
        ({"sparse_layers": "ends:9"}, "sparse_layers must be"),
        ({"target_modules": ["q_prox"]}, "q_prox.*choose among"),
        ({"chunk_size": 4}, "chunk_size must be .* 1 to 3"),
        ({"max_length": 5000}, "context of 2048"),
        ({"max_length": 8}, "no.* token to learn|none of"),
        ({"device": "tpu"}, "device"),
        ({"memory_budget": "200KB"}, "too small"),
        ({"data": "nowhere.jsonl"}, "cannot be read"),
        ({"held_out_fraction": 0.0, "eval_every": 1}, "held-out"),
        ({"model_dir": "nowhere"}, "nowhere"),
        ({"dtype": "float16", "lora_dtype": "model", "loss_scale": "dynamic"}, "lora_dtype"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_step(
    changes, message, toy_with_tokenizer, tmp_path
):
    with pytest.raises(OnnError, match=message):
        run(toy_with_tokenizer, tmp_path, **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("chunk_size", 0), ("batch_size", 0), ("lora_rank", 0), ("lora_rank", True)),
        *(("micro_batch_size", 9), ("lora_dropout", 1.0), ("learning_rate", float("nan"))),
        *(("memory_budget", "lots"), ("lr_schedule", "steps"), ("dtype", "int8")),
        *(("loss_scale", "often"), ("target_modules", [3]), ("model_dir", "")),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    fixed = {"model_dir": "m", "data": "d", "output_dir": "o", "batch_size": 8}
    with pytest.raises(OnnError, match=name if name != "memory_budget" else "memory size"):
        onn_core.TrainConfig(**fixed | {name: value})


def test_output_folder_that_cannot_be_written(toy_with_tokenizer, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OnnError, match="cannot be written"):
        run(toy_with_tokenizer, tmp_path / "file/below")


def test_broken_line_is_named_and_long_rows_are_counted(toy_with_tokenizer, tmp_path):
    good = json.dumps({"prompt": "Say it.", "response": "word " * 200})
    (tmp_path / "bad.jsonl").write_text(good + '\n{"prompt": \n')
    with pytest.raises(OnnError, match="line 2"):
        run(toy_with_tokenizer, tmp_path / "out", data=str(tmp_path / "bad.jsonl"))
    other = json.dumps({"prompt": "Say that.", "response": "word"})
    (tmp_path / "good.jsonl").write_text(good + "\n" + other + "\n")
    record = run(toy_with_tokenizer, tmp_path / "out", data=str(tmp_path / "good.jsonl"))
    assert record.data["rows"] == 2 and record.data["truncated"] == 1


def test_encoder_only_and_encoder_decoder_models_are_refused(tmp_path):
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    bert = transformers.BertConfig(vocab_size=50, num_hidden_layers=1, **sizes)
    t5 = transformers.T5Config(vocab_size=50, d_model=16, d_ff=32, num_layers=1, num_heads=2)
    for kind, config in (("BertForMaskedLM", bert), ("T5ForConditionalGeneration", t5)):
        getattr(transformers, kind)(config).save_pretrained(tmp_path / kind)
        with pytest.raises(OnnError, match=f"{kind}.*not a causal language model"):
            onn_core.from_pretrained(tmp_path / kind)


def test_missing_and_misshapen_tensors_are_named(toy_with_tokenizer, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(toy_with_tokenizer, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    kept = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(OnnError, match=name):
        onn_core.from_pretrained(tmp_path)
    save_file(tensors | {name: kept[:-1].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(OnnError, match=r"shape \[63, 32\]"):
        onn_core.from_pretrained(tmp_path)


def test_smollm2_learns_within_a_few_steps(smollm2_dir, tmp_path):
    """The real model: two steps lower the loss on held-out conversations by more than 2 %."""
    record = run(
        smollm2_dir,
        tmp_path,
        max_steps=2,
        max_length=48,
        learning_rate=4e-3,
        sparse_layers="ends:4",
        eval_every=2,
        eval_samples=4,
    )
    assert record.model["trainable"] == 651_264
    assert record.evals[-1].loss < 0.98 * record.evals[0].loss
