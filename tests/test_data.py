"""Rows, labels, splits and batches."""

import json
import math
from collections import Counter
from itertools import islice

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from onn_core import data
from onn_core.errors import DataError

TALK = [
    {"role": "user", "content": "What is the capital of Portugal?"},
    {"role": "assistant", "content": "Lisbon."},
    {"role": "user", "content": "And of Spain?"},
    {"role": "assistant", "content": "Madrid, on the Manzanares."},
]


@pytest.fixture(scope="module")
def chat_tokenizer(smollm2_dir):
    return AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token a byte, an end token, no chat template."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def counted_text(example, tokenizer):
    return tokenizer.decode([label for label in example.labels if label != data.IGNORED])


def numbered(count, length=3):
    """Examples that differ in every token, the first of which does not count."""
    return [
        data.Example(ids, [data.IGNORED, *ids[1:]])
        for ids in (list(range(i * length, (i + 1) * length)) for i in range(count))
    ]


def test_chatterbot_pairs():
    rows = data.load_rows("chatterbot")
    assert len(rows) == 897
    assert len({json.dumps(row) for row in rows}) == 897
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(message["content"] for message in row["messages"])


def test_every_form_of_jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    given = [{"messages": TALK}, {"prompt": "Hi\u2028you", "response": "Yes"}, {"text": "Rain."}]
    lines = [json.dumps(row, ensure_ascii=False) for row in given]
    path.write_text("\ufeff" + "\n\n".join(lines) + "\r\n", encoding="utf-8")
    talk, pair, text = data.load_rows(str(path))
    assert talk == {"messages": TALK}
    assert [message["content"] for message in pair["messages"]] == ["Hi\u2028you", "Yes"]
    assert text == {"text": "Rain."}


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "cut',
        "[1, 2]",
        '{"prompt": "alone"}',
        '{"text": 3}',
        '{"messages": []}',
        '{"messages": [{"role": "user"}]}',
    ],
)
def test_bad_jsonl_line_is_named(line, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + '\n{"text": "good"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl line 3 "):
        data.load_rows(str(path))


def test_paragraphs_of_a_text_file(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("One line,\nand another.\n\n \n\nSecond.\r\n")
    assert data.load_rows(str(path)) == [{"text": "One line,\nand another."}, {"text": "Second."}]
    path.write_text("\n  def f():\n    x\u2028y\x0b \r\n", newline="", encoding="utf-8")
    assert data.load_rows(str(path)) == [{"text": "  def f():\n    x\u2028y\x0b "}]


def test_unusable_files_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    for name, reason in (
        ("empty.txt", "empty"),
        ("latin.txt", "UTF-8"),
        ("absent.jsonl", "cannot be read"),
        ("table.csv", "chatterbot"),
    ):
        with pytest.raises(DataError, match=reason):
            data.load_rows(str(tmp_path / name))


def test_chat_answers_count_with_their_end_token(chat_tokenizer):
    made = data.tokenize([{"messages": TALK}], chat_tokenizer, 128)
    (example,) = made.examples
    assert (made.rows, made.truncated, made.dropped) == (1, 0, 0)
    assert counted_text(example, chat_tokenizer) == (
        "Lisbon.<|im_end|>Madrid, on the Manzanares.<|im_end|>"
    )
    rendered = chat_tokenizer.apply_chat_template(TALK, tokenize=False)
    assert chat_tokenizer.decode(example.input_ids) == rendered.rstrip("\n")
    assert example.input_ids == chat_tokenizer(rendered.rstrip("\n"))["input_ids"]
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (token, data.IGNORED)
    assert example.labels[-1] == chat_tokenizer.eos_token_id == chat_tokenizer.pad_token_id


def test_unanswered_turn_is_left_out(chat_tokenizer):
    whole, answered = (
        data.tokenize([{"messages": TALK[:turns]}], chat_tokenizer, 128).examples[0]
        for turns in (3, 2)
    )
    assert whole == answered


def test_without_a_template_answers_end_with_the_end_token(byte_tokenizer):
    (example,) = data.tokenize([{"messages": TALK[:2]}], byte_tokenizer, 128).examples
    assert byte_tokenizer.decode(example.input_ids) == (
        "What is the capital of Portugal?\nLisbon.<end>"
    )
    assert counted_text(example, byte_tokenizer) == "Lisbon.<end>"


def test_long_conversations_are_cut_and_counted(byte_tokenizer):
    rows = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": "yes"}]}
        for prompt in ("ok?", "really ok?", "are you really sure that this is ok?")
    ]
    made = data.tokenize(rows, byte_tokenizer, 13)  # 8, 15 and more tokens, of which 4 count
    assert (made.rows, made.truncated, made.dropped) == (3, 2, 1)
    assert [counted_text(e, byte_tokenizer) for e in made.examples] == ["yes<end>", "ye"]
    with pytest.raises(DataError, match="none of 1 rows"):
        data.tokenize(rows[2:], byte_tokenizer, 13)


def test_long_text_becomes_windows(byte_tokenizer):
    made = data.tokenize([{"text": "abcdefg"}, {"text": "abc"}], byte_tokenizer, 3)
    texts = [byte_tokenizer.decode(example.input_ids) for example in made.examples]
    assert texts == ["abc", "def", "g<end>", "abc", "c<end>"]  # no end token is alone
    assert (made.truncated, made.dropped) == (0, 0)
    assert [counted_text(e, byte_tokenizer) for e in made.examples] == [
        "bc",
        "ef",
        "<end>",
        "bc",
        "<end>",
    ]


def test_template_that_refuses_roles_is_explained(byte_tokenizer, chat_tokenizer):
    backwards = [{"messages": TALK[1::-1]}]
    with pytest.raises(DataError, match="row 1 .*chat template"):
        data.tokenize(backwards, chat_tokenizer, 128)


def test_first_label_never_counts(byte_tokenizer):
    for example in data.tokenize([{"text": "abc"}], byte_tokenizer, 8).examples:
        assert example.labels[0] == data.IGNORED != example.labels[1]


def test_split_is_fixed_and_complete():
    examples = numbered(50)
    train, held_out = map(list, data.split(examples, 0.2, seed=3))
    assert [train, held_out] == [list(part) for part in data.split(examples, 0.2, seed=3)]
    assert len(held_out) == 10
    assert sorted(e.input_ids for e in [*train, *held_out]) == [e.input_ids for e in examples]
    assert held_out != list(data.split(examples, 0.2, seed=4)[1])


@pytest.mark.parametrize(
    ("count", "fraction", "sizes"),
    [(1, 0.5, (1, 0)), (2, 0.01, (1, 1)), (5, 0.0, (5, 0)), (4, 0.99, (1, 3))],
)
def test_split_of_few_examples(count, fraction, sizes):
    assert tuple(map(len, data.split(numbered(count), fraction, seed=0))) == sizes


def test_no_prompt_is_on_both_sides():
    examples = [
        data.Example([prompt, prompt, answer], [data.IGNORED, data.IGNORED, answer])
        for prompt in range(20)
        for answer in range(3)
    ]
    train, held_out = data.split(examples, 0.3, seed=0)
    assert held_out and not {e.input_ids[0] for e in train} & {e.input_ids[0] for e in held_out}


def test_every_example_once_an_epoch():
    examples = numbered(7)
    seen = [e.input_ids[0] for batch in islice(data.batches(examples, 3, seed=0), 7) for e in batch]
    epochs = [seen[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == [e.input_ids[0] for e in examples] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_epochs_end_after_their_samples():
    seen = list(data.batches(numbered(7), 4, seed=0, n_samples=14))
    assert [len(batch) for batch in seen] == [4, 4, 4, 2]
    assert Counter(e.input_ids[0] for batch in seen for e in batch) == dict.fromkeys(
        range(0, 21, 3), 2
    )
    assert list(data.batches(numbered(7), 4, seed=0, start_step=3, n_samples=14)) == seen[3:]


def test_a_long_text_has_the_tokens_of_the_whole(chat_tokenizer, monkeypatch):
    monkeypatch.setattr("onn_core.data.examples.WINDOW", 2**13)
    for text in (" ".join(str(n * n) for n in range(9000)), "a b\n" * 9000):
        (example,) = data.tokenize([{"text": text}], chat_tokenizer, 10**6).examples
        assert example.input_ids[:-1] == chat_tokenizer(text, verbose=False)["input_ids"]


@pytest.mark.parametrize(
    "rows", [[{"text": " "}], [{"messages": [TALK[0], TALK[1] | {"weight": 0}]}]]
)
def test_rows_that_hold_nothing_are_told_from_long_ones(rows, chat_tokenizer):
    with pytest.raises(DataError, match="weight is not 0"):
        data.tokenize(rows, chat_tokenizer, 64)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 16])
@pytest.mark.parametrize("start_step", [1, 4, 11])
def test_batches_resume_at_any_step(batch_size, start_step):
    examples = numbered(7)
    whole = list(islice(data.batches(examples, batch_size, seed=5), start_step + 4))
    resumed = data.batches(examples, batch_size, seed=5, start_step=start_step)
    assert list(islice(resumed, 4)) == whole[start_step:]
    assert all(len(batch) == batch_size for batch in whole)
    assert whole[:4] != list(islice(data.batches(examples, batch_size, seed=6), 4))


def test_padding_is_uneven_and_masked():
    end = 2
    rows = [data.Example([5, 6, end], [data.IGNORED, 6, end]), data.Example([7, end], [-100, end])]
    batch = data.collate(rows, pad_id=end)
    assert batch["input_ids"].tolist() == [[5, 6, end], [7, end, end]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, end], [-100, end, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert data.collate(rows[1:], pad_id=None)["input_ids"].tolist() == [[7, end]]


def test_an_example_has_a_label_for_each_token():
    with pytest.raises(ValueError, match="3 input_ids have 2 labels"):
        data.Example([5, 6, 7], [6, 7])


def test_shuffled_targets_keep_inputs_masks_and_frequencies():
    examples = numbered(40, length=6)
    shuffled, again, others = (list(data.shuffle_targets(examples, seed)) for seed in (0, 0, 1))
    assert shuffled == again != others
    assert [e.input_ids for e in shuffled] == [e.input_ids for e in examples]
    before, after = ([label for e in made for label in e.labels] for made in (examples, shuffled))
    assert [label == -100 for label in before] == [label == -100 for label in after]
    assert Counter(before) == Counter(after)
    kept = sum(a == b for a, b in zip(before, after, strict=True) if a != -100)
    assert kept <= math.ceil(0.05 * len(before))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path, smollm2_dir):
    """transformers makes an empty tokenizer up from config.json alone."""
    (tmp_path / "config.json").write_bytes((smollm2_dir / "config.json").read_bytes())
    with pytest.raises(DataError, match="no tokenizer can be loaded"):
        data.load_tokenizer(tmp_path)
    assert len(data.load_tokenizer(smollm2_dir)) == 49152


def test_a_long_text_is_tokenized_as_if_it_were_whole(smollm2_dir):
    """Also one that says the same again and again, whose parts cannot be told by their tokens."""
    tokenizer = data.load_tokenizer(smollm2_dir)
    phrase = "It was the best of times, it was the worst of times; 1859.\n"
    for text in (phrase * 1200, "".join(map(chr, range(32, 36_000))) * 2, "a" * 70_000):
        found = data.tokenize([{"text": text}], tokenizer, 1000).examples
        ids = [token for example in found for token in example.input_ids]
        assert ids == [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
