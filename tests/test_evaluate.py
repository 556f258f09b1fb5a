"""Perplexity and answers, with and without the adapter in one pass over the weights."""

import json
import math

import peft
import pytest
import torch
from toy import in_memory, streamed, toy_dir, with_lora
from transformers import AutoTokenizer

import onn_core
from onn_core import data
from onn_core.errors import OnnError


@pytest.fixture
def folder(toy_with_tokenizer):
    return toy_with_tokenizer


@pytest.fixture
def text(tmp_path):
    """Eleven rows of uneven length."""
    rows = [{"prompt": f"Count to {n}.", "response": "one two three " * n} for n in range(1, 11)]
    rows.append({"text": "A line of plain text, of which every token counts but the first."})
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mean_loss(model, tokenizer, path):
    """The definition: one row at a time, summed over the counted tokens."""
    examples = data.tokenize(data.load_rows(str(path)), tokenizer, 40).examples
    total = n_tokens = 0
    with torch.no_grad():
        for example in examples:
            batch = data.collate([example])
            total += float(model(**batch, num_items_in_batch=1).loss)
            n_tokens += int((batch["labels"] != -100).sum())
    return total / n_tokens, n_tokens


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"layers_to_transform": [1]}], ids=str
)
@pytest.mark.parametrize(
    ("how", "batch_size"),
    [
        ({}, 32),
        ({"micro_batch_size": 2}, 5),
        ({"micro_batch_size": 3}, 4),
        ({"memory_budget": "4GB"}, 32),  # plans its micro-batches within the pass
    ],
)
def test_perplexity_equals_two_passes_in_memory(folder, text, settings, how, batch_size):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = with_lora(streamed(folder, **how), **settings)
    expected = with_lora(in_memory(folder), **settings).eval()
    found = onn_core.perplexity(model, tokenizer, text, max_length=40, batch_size=batch_size)
    loss, n_tokens = mean_loss(expected, tokenizer, text)
    with expected.disable_adapter():
        base_loss, _ = mean_loss(expected, tokenizer, text)
    assert abs(loss - base_loss) > 1e-3
    assert found.tokens == n_tokens
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert found.base_loss == pytest.approx(base_loss, rel=1e-6)
    assert found.perplexity == math.exp(found.loss)
    assert found.base_perplexity == math.exp(found.base_loss)
    assert model.training and not any(
        module.disable_adapters for module in model.modules() if hasattr(module, "lora_A")
    )


def test_with_and_without_adapter_is_one_pass_over_the_weights(folder, text):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    visits = []
    for wrap in (lambda model: model, with_lora):
        base = streamed(folder)
        with base.trace() as events:
            found = onn_core.perplexity(wrap(base), tokenizer, text, max_length=40)
        visits.append([(phase, unit) for phase, unit, _, _ in events if phase != "read"])
    assert visits[0] == visits[1] == [("forward", 0), ("forward", 1), ("forward", 2), ("head", 3)]
    assert found.base_loss is not None


def test_perplexity_without_adapter(folder, text):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = onn_core.perplexity(streamed(folder), tokenizer, text, max_length=40, batch_size=3)
    loss, _ = mean_loss(in_memory(folder).eval(), tokenizer, text)
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert found.base_loss is None and found.base_perplexity is None


def generate_in_memory(model, tokenizer, prompt):
    turns = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**ids, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_answers_equal_generation_in_memory(smollm2_dir):
    """A real model: each prompt alone, with the adapter and without it."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    prompts = ["What is the capital of France?", "Name a colour.", "Say hello to my old friend."]
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    models = []
    for load in (streamed, in_memory):
        torch.manual_seed(0)
        model = load(smollm2_dir, dtype=torch.float32)
        models.append(peft.get_peft_model(model, peft.LoraConfig(**lora)).eval())
    found = onn_core.answers(models[0], tokenizer, prompts, max_new_tokens=8, batch_size=2)
    assert [answer.prompt for answer in found] == prompts
    assert "Paris" in found[0].base_answer
    assert [a.answer for a in found] == [
        generate_in_memory(models[1], tokenizer, prompt) for prompt in prompts
    ]
    with models[1].disable_adapter():
        expected = [generate_in_memory(models[1], tokenizer, prompt) for prompt in prompts]
    assert [a.base_answer for a in found] == expected
    assert all(a.answer != a.base_answer for a in found)
    assert onn_core.answers(models[0], tokenizer, []) == []


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "embed_tokens"]}])
def test_adapter_outside_the_layers_is_refused(settings, text, folder):
    model = with_lora(streamed(toy_dir("llama")), **settings)
    with pytest.raises(OnnError, match="outside the decoder layers"):
        onn_core.perplexity(model, AutoTokenizer.from_pretrained(folder), text)


def test_model_in_memory_is_refused(folder, text):
    with pytest.raises(OnnError, match="not streamed"):
        onn_core.perplexity(in_memory(folder), AutoTokenizer.from_pretrained(folder), text)


def test_evaluation_takes_the_settings_of_a_run_and_says_what_was_cut(folder, capsys):
    model, tokenizer = streamed(folder), AutoTokenizer.from_pretrained(folder)
    turns = [{"role": role, "content": "one two"} for role in ("user", "assistant") * 2]
    rows, template = [{"messages": turns, "source": "web"}], tokenizer.chat_template

    def tokens(**settings):
        return onn_core.perplexity(model, tokenizer, rows, **settings).tokens

    learned = [tokens(), tokens(train_on="last"), tokens(completion_only=False)]
    assert learned[1] < learned[0] < learned[2]
    assert "column source" in capsys.readouterr().err
    plain = "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"
    assert tokens(completion_only=False, chat_template=plain) < learned[2]
    assert tokenizer.chat_template == template
    assert tokens(completion_only=False, max_length=8) == 7
    assert "1 of 1 rows were cut at max_length 8" in capsys.readouterr().err
    one, several = (onn_core.answers(model, tokenizer, x, max_new_tokens=2) for x in ("a", ["a"]))
    assert one == several


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": ""}, 'data "" cannot be read'),
        ({"max_length": 1}, "max_length must be a whole number"),
        ({"max_length": 10**9}, "more than the model's context"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"train_on": "first"}, "train_on must be one of"),
        ({"chat_template": 5}, "is no"),
        ({"tokenizer": "gpt2"}, "is no tokenizer"),
        ({"prompts": 5}, "prompts must be texts"),
        ({"prompts": ["a", None]}, "prompts must be texts"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number"),
        ({"prompts": "a", "max_new_tokens": 10**9}, "more than the model's context"),
    ],
    ids=str,
)
def test_wrong_arguments_are_sentences(folder, settings, message):
    given = {"model": streamed(folder), "tokenizer": AutoTokenizer.from_pretrained(folder)}
    call = onn_core.perplexity
    if settings.keys() & {"prompts", "max_new_tokens"}:
        call, given["prompts"] = onn_core.answers, ["a"]
    else:
        given["text"] = [{"text": "a b c"}]
    with pytest.raises(OnnError, match=message):
        call(**given | settings)


LORAS = (
    {"r": 2},
    {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    {"layers_to_transform": [1]},
)


@pytest.mark.parametrize("how", [{}, {"micro_batch_size": 2}], ids=str)
def test_several_adapters_and_the_base_in_one_pass_equal_each_alone(how, folder, text, tmp_path):
    """Ranks, modules and layers differ; bytes are those of one pass, and the model is as it was."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    paths = []
    for number, own in enumerate([*LORAS, {"use_dora": True}]):
        made = with_lora(in_memory(folder), **own)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1 + 0.1 * number)
        made.save_pretrained(tmp_path / str(number))
        paths.append(tmp_path / str(number))
    alone = []
    for path in paths:
        model = onn_core.load_adapter(streamed(folder, **how), path)
        alone.append(onn_core.perplexity(model, tokenizer, text, max_length=40, batch_size=4))
    model = streamed(folder, **how)
    for _ in range(2):  # the second time, nothing of the first is left
        before = model.counts().bytes_read
        with model.trace() as events:
            found = onn_core.perplexity(
                model, tokenizer, text, max_length=40, batch_size=4, adapters=paths
            )
        assert found == alone
    visits = [unit for phase, unit, _, _ in events if phase != "read"]
    assert visits == 3 * [0, 1, 2, 3]  # batches of 4, 4 and 3 rows
    base = streamed(folder, **how)
    expected = onn_core.perplexity(base, tokenizer, text, max_length=40, batch_size=4)
    assert {one.base_loss for one in found} == {expected.loss} and len(set(found)) == 4
    again = model.counts().bytes_read
    assert onn_core.perplexity(model, tokenizer, text, max_length=40, batch_size=4) == expected
    assert model.counts().bytes_read - again == again - before


def test_adapters_are_evaluated_on_a_model_that_has_none(folder, text):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(OnnError, match="that has none yet"):
        onn_core.perplexity(with_lora(streamed(folder)), tokenizer, text, adapters=["a"])
    model = streamed(folder)
    with pytest.raises(OnnError, match="adapter_config.json"):
        onn_core.perplexity(model, tokenizer, text, adapters=["no-such-folder"])
    assert onn_core.perplexity(model, tokenizer, text, adapters=[]) == []
