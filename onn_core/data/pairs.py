"""Preference pairs: a prompt, an answer that was chosen and one that was rejected.

Rows and what counts in them are as TRL's DPOTrainer takes them. The prompt is a column of its own,
or what both answers begin with. Answers are text, which follows the prompt as it is and ends with
the end-of-text token, or messages, which the chat template renders. What counts is all that
follows the prompt. A pair that is longer than max_length is cut at its end.
"""

import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from onn_core.data.chat import n_common, render
from onn_core.data.examples import Dataset, Examples, Pair, TokenFile, temporary_file
from onn_core.data.rows import REFUSED_FIELDS, Row, fields_of, message_of, read_rows, sort_out
from onn_core.data.tokenizer import explained
from onn_core.errors import DataError

FORM = 'prompt, chosen and rejected, each a text or messages, for objective "dpo"'
SIDES = ("chosen", "rejected")
MORE_FIELDS = ("tools", "chat_template_kwargs")


def read_pairs(data: Any, unused: set[str] | None = None) -> Iterator[Row]:
    """Rows as `read_rows` reads them: {"prompt", "chosen", "rejected"}, each a text or messages.

    Messages may come with "tools" and "chat_template_kwargs". DataError for what is no pair.
    """
    return read_rows(data, unused, _pair)


def _pair(raw: Any, where: str, unused: set[str]) -> Row:
    fields = fields_of(raw)
    sides = [fields.get(name) for name in SIDES]
    kinds = {type(side) for side in sides}
    if not all(sides) or kinds not in ({str}, {list}):
        raise DataError(f"{where} needs {FORM}.")
    prompt = fields.get("prompt")
    if type(prompt) not in kinds:  # with whole conversations a prompt may stand once more
        if prompt is not None and kinds == {str}:
            raise DataError(f"{where} needs {FORM}: all three of one kind.")
        prompt, sides = _split(*sides)
    if not all(sides):
        raise DataError(f"{where}: one answer is the beginning of the other: give the prompt.")
    row: Row = dict(zip(("prompt", *SIDES), (prompt, *sides), strict=True))
    if kinds == {list}:
        row = {key: [message_of(turn, where) for turn in turns] for key, turns in row.items()}
        row |= {name: fields[name] for name in MORE_FIELDS if fields.get(name)}
    sort_out(fields, row.keys(), (*REFUSED_FIELDS, "system"), where, unused)
    return row


def _split(chosen: Any, rejected: Any) -> tuple[Any, list[Any]]:
    """What two texts or lists of messages begin with, and the rest of each, as TRL splits them."""
    n = n_common(chosen, rejected)
    if 0 < n < min(len(chosen), len(rejected)) and chosen[n - 1] == " ":
        n -= 1
    return chosen[:n], [chosen[n:], rejected[n:]]


def tokenize_pairs(
    rows: Iterable[Row], tokenizer: Any, max_length: int, *, folder: Path | None = None
) -> Dataset:
    """Pairs of examples of at most `max_length` tokens, one after another, for `pair_up`.

    A row whose prompt alone is as long is dropped. DataError, with the row's number, for a row that
    the chat template does not take, and when nothing is left.
    """
    tokens, lengths = TokenFile(temporary_file(folder)), array.array("i")
    n_rows = truncated = dropped = 0
    for n_rows, row in enumerate(rows, start=1):
        try:
            with explained("cannot be tokenized"):
                prompt, *both = _ids(row, tokenizer)
        except DataError as error:
            raise DataError(
                f"row {n_rows} {str(error).rstrip('.')}. Begin with the user, let an assistant "
                "answer, or set chat_template to one that renders what the row holds."
            ) from error
        start = min(n_common(prompt, ids) for ids in both)
        lengths.append(max(map(len, both)))
        if not max(start, 1) < min(max_length, *map(len, both)):
            dropped += 1
            continue
        truncated += lengths[-1] > max_length
        for ids in both:
            ids = np.array(ids[:max_length], np.int64)
            tokens.append(ids, np.arange(len(ids)) >= max(start, 1))
    if not tokens.lengths:
        raise DataError(
            f"none of {n_rows} pairs has a token to learn within max_length {max_length}: raise it."
        )
    length_95 = int(np.quantile(np.array(lengths), 0.95, method="higher"))
    return Dataset(
        tokens.examples(), n_rows, truncated, dropped, length_95=length_95, tokens=tokens
    )


def pair_up(examples: Examples) -> Examples:
    """Of chosen and rejected examples in turn: `Pair`s, as long as the longer of the two."""

    def get(i: int) -> Pair:
        return Pair(examples[2 * i], examples[2 * i + 1])

    lengths = np.maximum(examples.lengths[::2], examples.lengths[1::2])
    return Examples(get, lengths, examples.prompts[::2])


def _ids(row: Row, tokenizer: Any) -> list[list[int]]:
    """The tokens of the prompt, and of the prompt with either answer."""
    prompt, answers = row["prompt"], [row[name] for name in SIDES]
    if isinstance(prompt, str):
        end = tokenizer.eos_token or ""
        answers = [text if end and text.endswith(end) else text + end for text in answers]
        return tokenizer([prompt, *(prompt + text for text in answers)], verbose=False)["input_ids"]
    more = {name: row[name] for name in MORE_FIELDS if name in row}
    texts = [render({"messages": prompt, **more}, tokenizer, for_answer=True).text]
    texts += [render({"messages": prompt + turns, **more}, tokenizer).text for turns in answers]
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
