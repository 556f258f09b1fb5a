"""Text, JSONL or chat -> deterministic padded batches with labels.

A label of -100 is not counted. The labels are those of Hugging Face: labels[t] is input_ids[t], and
the model compares it with its prediction at t - 1; so labels[0] is always -100 here, and the number
of counted tokens is simply the number of labels that are not -100.
"""

import dataclasses
import os
import random
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch
from transformers import AutoTokenizer

from onn_core.data.rows import Message, Row
from onn_core.data.rows import load_rows as load_rows
from onn_core.errors import DataError

IGNORED = -100
NO_TOKENIZER = "no tokenizer can be loaded: copy tokenizer.json and its like from the original"


@dataclasses.dataclass(frozen=True)
class Example:
    """One sample: token ids, and the same ids as labels where they count, -100 elsewhere.

    lengths: of the rows that are packed into it; empty if it is one row.
    """

    input_ids: list[int]
    labels: list[int]
    lengths: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Tokenized examples, and what became of the rows: `truncated` were cut, `dropped` left out."""

    examples: list[Example]
    rows: int
    truncated: int
    dropped: int


def load_tokenizer(model_dir: str | os.PathLike) -> Any:
    """The tokenizer in a model's folder; DataError if none is there."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
        empty = len(tokenizer) <= len(tokenizer.all_special_ids)  # made up from config.json alone
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise DataError(f"{model_dir}: {NO_TOKENIZER} ({str(error)[:200]}).") from error
    if empty:
        raise DataError(f"{model_dir}: {NO_TOKENIZER}.")
    return tokenizer


def tokenize(rows: Sequence[Row], tokenizer: Any, max_length: int) -> Dataset:
    """Examples of at most `max_length` tokens.

    Of a conversation, the assistant's answers count with their end token, the rest is -100; it goes
    through the tokenizer's chat template, without one the turns are joined by newlines and the
    answers end with the end-of-text token. Too long a conversation is cut at its end. Of a text
    every token counts, and a long one becomes several examples.

    Raises DataError when the chat template refuses a row or nothing is left to train on.
    """
    from jinja2 import TemplateError

    examples, truncated, dropped = [], 0, 0
    for number, row in enumerate(rows, start=1):
        if "text" in row:
            ids = _text_ids(row["text"], tokenizer)
            pieces = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
            made = [_example(piece, [True] * len(piece)) for piece in pieces]
        else:
            try:
                ids, counted = _conversation_ids(row["messages"], tokenizer)
            except (TemplateError, ValueError) as error:
                raise DataError(
                    f"row {number} does not fit the model's chat template ({error}): begin with "
                    "the user, alternate with the assistant, or give one turn a row."
                ) from error
            truncated += len(ids) > max_length
            made = [_example(ids[:max_length], counted[:max_length])]
        usable = [example for example in made if any(label != IGNORED for label in example.labels)]
        dropped += not usable
        examples += usable
    if not examples:
        raise DataError(
            f"none of {len(rows)} rows has a token to learn within max_length {max_length}: raise "
            "max_length or check the rows."
        )
    return Dataset(examples, len(rows), truncated, dropped)


def split(
    examples: Sequence[Example], held_out_fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(train, held out), fixed by the seed; one example at least is always in train.

    Examples with the same prompt (the tokens before the first counted one) stay on the same side,
    so that no held-out prompt was trained on; the fraction is therefore met only nearly.
    """
    groups: dict[tuple[int, ...], list[Example]] = {}
    for example in examples:
        first = next(i for i, label in enumerate(example.labels) if label != IGNORED)
        prompt = tuple(example.input_ids[:first]) if first > 1 else tuple(example.input_ids)
        groups.setdefault(prompt, []).append(example)
    shuffled = list(groups.values())
    random.Random(f"split {seed}").shuffle(shuffled)
    held_out: list[Example] = []
    wanted = round(len(examples) * held_out_fraction)
    if held_out_fraction > 0:
        wanted = max(wanted, 1)
    while len(held_out) < wanted and len(shuffled) > 1:
        held_out += shuffled.pop()
    return [example for group in shuffled for example in group], held_out


def shuffle_targets(examples: Sequence[Example], seed: int | str) -> list[Example]:
    """The control that must not learn: the counted labels, permuted among all counted positions.

    The inputs stay as they are. Answers permuted as a whole would not do: the tokens of an answer
    still predict one another and its style, and that is most of what a model learns. Permuted
    labels hold nothing but how frequent each token is, so that the training loss may fall from its
    high start, but the loss on true held-out text must not.
    """
    labels = [label for example in examples for label in example.labels if label != IGNORED]
    random.Random(f"targets {seed}").shuffle(labels)
    left = iter(labels)
    return [
        Example(example.input_ids, [next(left) if i != IGNORED else i for i in example.labels])
        for example in examples
    ]


def batches(
    examples: Sequence[Example], batch_size: int, seed: int, *, start_step: int = 0
) -> Iterator[list[Example]]:
    """Batches without end, from number `start_step` on; number i depends on the seed and i alone.

    Every epoch is a new permutation, and a batch may span two: each has exactly `batch_size`
    examples, and every example is seen once an epoch.
    """
    epoch, order = -1, []
    for step in count(start_step):
        batch = []
        for position in range(step * batch_size, (step + 1) * batch_size):
            if position // len(examples) != epoch:
                epoch = position // len(examples)
                order = list(range(len(examples)))
                random.Random(f"epoch {seed} {epoch}").shuffle(order)
            batch.append(examples[order[position % len(examples)]])
        yield batch


def pack(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Rows of at most `max_length` tokens, put together into few samples that long.

    The longest first, each into the fullest sample that has room; the same every time.
    """
    members: list[list[Example]] = []
    with_room: dict[int, list[int]] = {}  # tokens of room -> samples
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
        length = len(example.input_ids)
        room = next((room for room in range(length, max_length) if with_room.get(room)), max_length)
        if room == max_length:
            members.append([])
            with_room.setdefault(room, []).append(len(members) - 1)
        sample = with_room[room].pop()
        members[sample].append(example)
        with_room.setdefault(room - length, []).append(sample)
    return [
        Example(
            [token for part in parts for token in part.input_ids],
            [label for part in parts for label in part.labels],
            tuple(len(part.input_ids) for part in parts),
        )
        for parts in members
    ]


def collate(examples: Sequence[Example], pad_id: int | None = 0) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels, each (B, T) int64, padded at the right to the longest.

    The attention mask tells padding from text: `pad_id` may also be the end token. With packed
    examples position_ids take its place: they begin at 0 with every row that is packed, and with
    the padding, by which transformers keeps the attention within each.
    """
    length = max(len(example.input_ids) for example in examples)
    shape = (len(examples), length)
    input_ids = torch.full(shape, pad_id or 0)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for row, example in enumerate(examples):
        tokens = len(example.input_ids)
        input_ids[row, :tokens] = torch.tensor(example.input_ids)
        attention_mask[row, :tokens] = 1
        labels[row, :tokens] = torch.tensor(example.labels)
        parts = (*(example.lengths or (tokens,)), length - tokens)
        position_ids[row] = torch.cat([torch.arange(part) for part in parts])
    batch = {"input_ids": input_ids, "labels": labels}
    if any(example.lengths for example in examples):
        return batch | {"position_ids": position_ids}
    return batch | {"attention_mask": attention_mask}


def _example(ids: list[int], counted: list[bool]) -> Example:
    labels = [token if counts else IGNORED for token, counts in zip(ids, counted, strict=True)]
    labels[:1] = [IGNORED] * len(labels[:1])
    return Example(ids, labels)


def _text_ids(text: str, tokenizer: Any) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _conversation_ids(messages: list[Message], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Token ids up to the last one that counts, and which of them count.

    Each answer is tokenized apart from what precedes it, as it is when a model generates it.
    """
    ids: list[int] = []
    counted: list[bool] = []
    for text, is_answer in conversation_segments(messages, tokenizer):
        segment = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer_tokens = len(segment) if is_answer else 0
        if is_answer and tokenizer.eos_token_id in segment:  # no newline after the end token
            answer_tokens -= segment[::-1].index(tokenizer.eos_token_id)
        ids += segment
        counted += [position < answer_tokens for position in range(len(segment))]
    while counted and not counted[-1]:
        counted.pop()
    return ids[: len(counted)], counted


def conversation_segments(messages: list[Message], tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """(text, is it an answer) of the parts that are tokenized one by one."""
    segments = _template_segments if tokenizer.chat_template else _plain_segments
    return segments(messages, tokenizer)


def _template_segments(messages: list[Message], tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """(text, is it an answer) as the chat template writes them."""
    done = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(
            messages[:turn], tokenize=False, add_generation_prompt=True
        )
        answered = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
        if not (prompt.startswith(done) and answered.startswith(prompt)):
            raise ValueError("it changes what it wrote for earlier turns")
        yield prompt[len(done) :], False
        yield answered[len(prompt) :], True
        done = answered


def _plain_segments(messages: list[Message], tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """(text, is it an answer) without a template: a newline after what is asked."""
    if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        yield tokenizer.bos_token, False
    for message in messages:
        if message["role"] == "assistant":
            yield message["content"] + (tokenizer.eos_token or ""), True
        else:
            yield message["content"] + "\n", False
