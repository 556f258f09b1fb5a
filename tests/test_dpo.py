"""Preference training: the loss and the gradients are those of TRL's DPOTrainer."""

import dataclasses

import peft
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from small import adapter, config, require_equal, write_small
from toy import assert_same, in_memory, reserving_graphs, streamed, take_gradients
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

import onn_core
from onn_core import data
from onn_core.adapters.preference import run_pairs, train_adapters_only
from onn_core.errors import ConfigError, DataError
from onn_core.streaming import head

BETA = 0.3
WORDS = ("red", "green", "blue", "white", "black")
TOLERANCE = 1e-5  # of the largest gradient in float32: sums are rounded in another order
LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
DPO = {"objective": "dpo", "dpo_beta": 0.5, "loss_scale": None, "max_steps": 5, "eval_samples": 5}


def texts(n=20):
    return [
        {
            "prompt": f"Name {i % 5 + 1} of the {i} colours:",
            "chosen": " " + " ".join(WORDS[: i % 5 + 1]),
            "rejected": " I would rather not" + " at all" * (i % 3),
        }
        for i in range(n)
    ]


def messages(row):
    """A row of texts as messages."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {name: [{"role": roles[name], "content": row[name].strip()}] for name in row}


def implicit(row):
    return {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}


FORMS = {
    "texts": texts(),
    "messages": [messages(row) for row in texts()],
    "texts that begin alike": [implicit(row) for row in texts()],
    "conversations": [implicit(messages(row)) for row in texts()],
}


def pairs(rows, tokenizer, max_length=64):
    dataset = data.tokenize_pairs(data.read_pairs(rows), tokenizer, max_length)
    return list(data.pair_up(dataset.examples))


def dpo_trainer(model, tokenizer, rows, folder, **lora):
    """TRL's own, with the very settings of these tests."""
    quiet = {"report_to": "none", "bf16": False, "use_cpu": True, "disable_tqdm": True}
    quiet |= {"gradient_checkpointing": False, "save_strategy": "no"}
    arguments = DPOConfig(str(folder), beta=BETA, max_length=64, **quiet)
    peft_config = peft.LoraConfig(**LORA | lora, task_type="CAUSAL_LM")
    return DPOTrainer(
        model,
        None,
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def with_weights_of(theirs, base, **lora):
    """A streamed model with the adapter of another model."""
    settings = peft.LoraConfig(**LORA | lora, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, settings)
    weights = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(weights[name])
    train_adapters_only(model)
    return model


def gradients(model, loss):
    loss.backward()
    return loss.detach(), take_gradients(model)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model, and pairs as text in a file."""
    folder = tmp_path_factory.mktemp("small")
    model_dir, _ = write_small(folder)
    return model_dir, write_pairs(folder / "pairs.jsonl", texts(30))


def write_pairs(path, rows):
    Dataset.from_list(rows).to_json(path)
    return path


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def family(request, tmp_path_factory):
    """A folder, TRL's batch of four pairs, and its loss and gradients; Gemma caps its logits."""
    folder = tmp_path_factory.mktemp(request.param)
    own = {"sliding_window": 4, "head_dim": 8} if request.param == "gemma2" else {}
    model_dir, _ = write_small(folder, family=request.param, **own)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    trainer = dpo_trainer(in_memory(model_dir), tokenizer, texts(), folder / "trl")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    found = gradients(trainer.model, trainer.compute_loss(trainer.model, batch))
    return model_dir, tokenizer, trainer.model, batch, found


@pytest.mark.parametrize(
    "how",
    [{}, {"micro_batch_size": 3}, {"graphs": 2}, {"blocks": 3000}, {"chunk_size": 2}],
    ids=str,
)
def test_loss_and_gradients_are_those_of_trl(how, family, monkeypatch):
    model_dir, tokenizer, theirs, batch, expected = family
    settings = {name: value for name, value in how.items() if name not in ("graphs", "blocks")}
    if "blocks" in how:
        monkeypatch.setattr(head, "HEAD_BLOCK_BYTES", how["blocks"])
    base = streamed(model_dir, **settings)
    if "graphs" in how:
        base = reserving_graphs(base, how["graphs"])
    model = with_weights_of(theirs, base)
    ours = data.collate(pairs(texts(), tokenizer)[:4], tokenizer.pad_token_id)
    assert torch.equal(ours["input_ids"], batch["input_ids"])
    output = run_pairs(model, base, ours, BETA, 4)
    assert_same(gradients(model, output.loss), expected, TOLERANCE)
    assert abs(float(expected[0]) - 0.6931) > 0.01  # policy and reference differ


@pytest.mark.parametrize("block_bytes", [1 << 20, 3000])
def test_the_loss_is_the_definition_in_float64(block_bytes, small, monkeypatch):
    """Policy and reference one after another, all logits at once."""
    monkeypatch.setattr(head, "HEAD_BLOCK_BYTES", block_bytes)
    tokenizer = AutoTokenizer.from_pretrained(small[0])
    batch = data.collate(pairs(texts(), tokenizer)[:4], tokenizer.pad_token_id)

    def log_probability(model):
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        logits, labels = model(**inputs).logits[:, :-1], batch["labels"][:, 1:]
        each = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return each.masked_fill(labels == -100, 0.0).sum(-1).view(2, -1)  # (2, P)

    torch.manual_seed(0)
    settings = peft.LoraConfig(**LORA, task_type="CAUSAL_LM")
    plain = peft.get_peft_model(in_memory(small[0], dtype=torch.float64), settings)
    policy = log_probability(plain)
    with torch.no_grad(), plain.disable_adapter():
        base = log_probability(plain)
    chosen, rejected = policy - base
    margins = BETA * (chosen - rejected)
    expected = gradients(plain, -F.logsigmoid(margins).mean())
    ours = streamed(small[0], dtype=torch.float64, micro_batch_size=3)
    model = with_weights_of(plain, ours)
    output = run_pairs(model, ours, batch, BETA, 4)
    assert_same(gradients(model, output.loss), expected, 1e-12)
    assert output.n_right == int((margins > 0).sum())


def test_the_reference_is_not_recomputed_and_the_adapter_is_as_it_was(small):
    tokenizer = AutoTokenizer.from_pretrained(small[0])
    batch = data.collate(pairs(texts(), tokenizer)[:4], tokenizer.pad_token_id)
    base = streamed(small[0], micro_batch_size=3)
    model = peft.get_peft_model(base, peft.LoraConfig(**LORA, task_type="CAUSAL_LM"))
    n_rows = {True: 0, False: 0}  # in backward, in forward

    def count(module, args):
        n_rows[torch.is_grad_enabled()] += len(args[0])

    base.streamed_layers[1].module.mlp.register_forward_pre_hook(count)
    run_pairs(model, base, batch, BETA, 4).loss.backward()
    assert n_rows == {True: 8, False: 16}
    tuners = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert tuners and not any(tuner.disable_adapters for tuner in tuners)
    assert all(p.requires_grad for tuner in tuners for p in tuner.lora_A.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_rows_become_the_tokens_of_trl(form, toy_with_tokenizer, tmp_path):
    """With a real chat template; a row whose prompt is too long is dropped, others are cut."""
    tokenizer = AutoTokenizer.from_pretrained(toy_with_tokenizer)
    rows = [*FORMS[form]]
    long = texts(1)[0] | {"prompt": "Name these colours: " + "red " * 70}
    long = long if "texts" in form else messages(long)
    rows.insert(3, long if "prompt" in rows[0] else implicit(long))
    trainer = dpo_trainer(in_memory(toy_with_tokenizer), tokenizer, rows, tmp_path)
    theirs = trainer.data_collator(list(trainer.train_dataset))
    made = pairs(rows, tokenizer)
    ours = data.collate(made, tokenizer.pad_token_id)
    assert len(made) == len(trainer.train_dataset) == 20
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(ours[name], theirs[name])
    assert torch.equal(ours["labels"][:, 1:] != -100, theirs["completion_mask"][:, 1:] == 1)
    shorter = ours["input_ids"].shape[1] - 3
    cut = data.collate(pairs(rows, tokenizer, shorter), tokenizer.pad_token_id)
    assert torch.equal(cut["input_ids"], ours["input_ids"][:, :shorter])


def test_a_step_reads_less_than_that_of_trl_on_the_same_streamed_model(small, tmp_path):
    """Forward and backward; TRL reads the weights once more, for the reference."""
    tokenizer = AutoTokenizer.from_pretrained(small[0])
    base = streamed(small[0])
    trainer = dpo_trainer(base, tokenizer, texts(), tmp_path)
    theirs_batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    ours_batch = data.collate(pairs(texts(), tokenizer)[:4], tokenizer.pad_token_id)

    def their_step(model):
        return trainer.compute_loss(model, theirs_batch)

    def our_step(model):
        return run_pairs(model, base, ours_batch, BETA, 4).loss

    n_bytes, found = [], []
    for step in (their_step, our_step):
        for _ in range(2):  # the second begins with what the first has left
            before = base.counts()
            found.append(gradients(trainer.model, step(trainer.model)))
        done = base.counts() - before
        n_bytes.append(done.bytes_read)
    assert_same(found[3], found[1], TOLERANCE)
    print(f"bytes a step: {n_bytes[0]} by TRL, {n_bytes[1]} here")
    assert n_bytes[1] < 0.75 * n_bytes[0]


def test_a_run_learns_and_its_record_has_the_accuracy(small, tmp_path):
    longer = {"max_steps": 12, "batch_size": 6, "eval_every": 6, "lora_dropout": 0.0}
    settings = config(small, tmp_path / "run", **DPO | longer | {"micro_batch_size": None})
    record = onn_core.ChunkedLoraTrainer(settings).train()
    first, *_, last = record.evals
    assert first.loss == pytest.approx(0.6931, abs=1e-4) and first.accuracy == 0.0
    assert last.loss < 0.4 and last.accuracy == 1.0
    assert record.steps[0].samples == 12 and record.data["held_out"] == 3
    loaded = onn_core.RunRecord.load(tmp_path / "run/record.json")
    assert loaded == record


def test_accumulation_is_the_mean_over_all_pairs(small, tmp_path):
    whole = {"batch_size": 6, "gradient_accumulation_steps": 1, "max_steps": 1, "eval_every": 0}
    whole |= {"lora_dropout": 0.0, "warmup_steps": 0, "micro_batch_size": None}
    losses = []
    for name, own in {
        "one": {},
        "parts": {"batch_size": 2, "gradient_accumulation_steps": 3},
    }.items():
        settings = config(small, tmp_path / name, **DPO | whole | own)
        losses.append(onn_core.ChunkedLoraTrainer(settings).train().steps[0])
    one, parts = losses
    assert one.samples == parts.samples == 6 and one.counted_tokens == parts.counted_tokens
    assert one.loss == pytest.approx(parts.loss, rel=1e-6)
    assert one.grad_norm == pytest.approx(parts.grad_norm, rel=1e-5) and one.grad_norm > 0


def test_runs_of_both_objectives_in_one_pass_and_a_resume(small, tmp_path):
    """Equal bit for bit to each alone, though one is stopped and goes on."""
    sums = small[0].parent / "sums.jsonl"
    runs = {
        "dpo": DPO,
        "wide": DPO | {"batch_size": 5, "lora_rank": 3, "micro_batch_size": None, "seed": 2},
        "sft": {"data": str(sums), "max_steps": 4},
    }
    configs = [config(small, tmp_path / "many" / name, **own) for name, own in runs.items()]

    def fail(record):
        if len(record.steps) == 3 and record.config["seed"] == 2:
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        onn_core.train_many(configs, on_step=fail)
    records = onn_core.train_many(configs, resume=True)
    assert [len(record.steps) for record in records] == [5, 5, 4]
    for name, own in runs.items():
        onn_core.ChunkedLoraTrainer(config(small, tmp_path / "alone" / name, **own)).train()
        require_equal(tmp_path / "many" / name, tmp_path / "alone" / name)
    changed = dataclasses.replace(configs[0], dpo_beta=0.1)
    with pytest.raises(onn_core.OnnError, match="dpo_beta was 0.5 and is 0.1"):
        onn_core.ChunkedLoraTrainer(changed).train(resume=True)


def test_a_budget_plans_for_all_rows_of_a_visit(small, tmp_path):
    """What a budget plans changes how fast a run goes, and its last bits alone."""
    quick = {"max_steps": 2, "lora_dropout": 0.0, "micro_batch_size": None}
    weights = []
    for name, own in {"free": {}, "planned": {"memory_budget": "1GB"}}.items():
        settings = config(small, tmp_path / name, **DPO | quick | own)
        onn_core.ChunkedLoraTrainer(settings).train()
        weights.append(adapter(tmp_path / name))
    for name, values in weights[0].items():
        torch.testing.assert_close(weights[1][name], values, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "response": "b"}, "line 1 needs prompt, chosen and rejected"),
        ({"prompt": "a", "chosen": "b"}, "line 1 needs prompt, chosen and rejected"),
        (
            {"prompt": "a", "chosen": "b", "rejected": [{"role": "user", "content": "c"}]},
            "line 1 n",
        ),
        (
            {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"},
            "one kind",
        ),
        ({"chosen": "same", "rejected": "same and more"}, "beginning of the other"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "images": ["x"]}, '"images" would change'),
    ],
)
def test_what_is_no_pair_is_refused(row, says, small, tmp_path):
    path = write_pairs(tmp_path / "rows.jsonl", [row])
    settings = config(small, tmp_path / "run", **DPO, data=str(path))
    with pytest.raises(DataError, match=says):
        onn_core.ChunkedLoraTrainer(settings).train()


def test_pairs_for_sft_are_pointed_to_dpo_and_to_trl(small, tmp_path):
    with pytest.raises(DataError, match='objective="dpo".*DPOTrainer'):
        onn_core.ChunkedLoraTrainer(config(small, tmp_path)).train()


def test_settings_that_pairs_do_not_take_are_refused(small, tmp_path):
    for wrong in ({"packing": True}, {"shuffle_targets": 1}, {"train_on": "last"}):
        with pytest.raises(ConfigError, match=f'objective "dpo" takes no {next(iter(wrong))}'):
            config(small, tmp_path, **DPO | wrong)
    with pytest.raises(ConfigError, match="dpo_beta must be"):
        config(small, tmp_path, **DPO | {"dpo_beta": 0})
    with pytest.raises(ConfigError, match="objective must be one of sft, dpo"):
        config(small, tmp_path, objective="ppo")


@pytest.mark.heavy
def test_smollm2_against_trl(smollm2_dir, tmp_path):
    """The real model and its chat template, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    rows = FORMS["messages"]
    theirs = in_memory(smollm2_dir, dtype=torch.float32)
    trainer = dpo_trainer(theirs, tokenizer, rows, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    expected = gradients(trainer.model, trainer.compute_loss(trainer.model, batch))
    base = streamed(smollm2_dir, dtype=torch.float32)
    model = with_weights_of(trainer.model, base)
    ours = data.collate(pairs(rows, tokenizer)[:4], tokenizer.pad_token_id)
    assert torch.equal(ours["input_ids"], batch["input_ids"])
    found = gradients(model, run_pairs(model, base, ours, BETA, 4).loss)
    print("loss of TRL", expected[0].item(), "here", found[0].item())
    assert_same(found, expected, 1e-4)
