"""Rows -> tokens with labels -> deterministic padded batches.

A label of -100 is not counted. The labels are those of Hugging Face: labels[t] is input_ids[t], and
the model compares it with its prediction at t - 1; so labels[0] is always -100 here, and the number
of counted tokens is simply the number of labels that are not -100.

Tokens lie in a file, not in memory: an example is read when it is asked for.
"""

import array
import dataclasses
import hashlib
import os
import random
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from onn_core.data.chat import Rendered, render
from onn_core.data.rows import Row
from onn_core.data.tokenizer import explained
from onn_core.errors import DataError
from onn_core.ops.cross_entropy import IGNORED

SMALL_BYTES = 2**22  # of tokens that are read into memory at once
COUNTS = ("rows", "truncated", "dropped", "unanswered", "reasoning_left_out")
BATCH_ROWS, BATCH_CHARACTERS = 1024, 2**18  # that are tokenized at once
# Characters of a longer text that are tokenized as one, how many of the last ones again, and how
# many such windows at once.
WINDOW, OVERLAP, WINDOWS = 2**16, 2**11, 4
ANCHOR = 64  # tokens on which two windows must agree


@dataclasses.dataclass(frozen=True)
class Example:
    """One sample: token ids, and the same ids as labels where they count, -100 elsewhere.

    lengths: of the rows that are packed into it; empty if it is one row. ValueError if there are
    not as many labels as ids.
    """

    input_ids: list[int]
    labels: list[int]
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.input_ids):
            raise ValueError(f"{len(self.input_ids)} input_ids have {len(self.labels)} labels")


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two samples with the same prompt: the answer that was chosen and the one that was not."""

    chosen: Example
    rejected: Example


class Examples(Sequence[Example | Pair]):
    """Examples that are made when they are asked for; a slice is a list.

    get: example number i. lengths: their tokens (N,). prompts: equal where the tokens before the
    first counted one are (N,); None where nothing is to be split.
    """

    def __init__(
        self,
        get: Callable[[int], Example],
        lengths: np.ndarray,
        prompts: np.ndarray | None = None,
    ):
        self.get = get
        self.lengths = lengths
        self.prompts = prompts

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Examples":
        """`examples` as they are, with their lengths."""
        if isinstance(examples, Examples) and examples.prompts is not None:
            return examples
        lengths = np.array([len(x.input_ids) for x in examples], np.int32)
        prompts = [_prompt_number(x.input_ids, np.array(x.labels) != IGNORED) for x in examples]
        return cls(examples.__getitem__, lengths, np.array(prompts, np.int64))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, slice):
            return [self.get(i) for i in range(*which.indices(len(self)))]
        return self.get(range(len(self))[which])

    def select(self, order: Any) -> "Examples":
        """Those with the numbers in `order`, in that order."""
        order = np.asarray(order, np.int32)
        prompts = None if self.prompts is None else self.prompts[order]
        return Examples(lambda i: self.get(int(order[i])), self.lengths[order], prompts)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Tokenized examples, and what became of the rows.

    truncated: rows that were cut. dropped: rows that were left out, `unanswered` of them because
    nothing in them is to be learned. length_95: the tokens that 95 % of the conversations fit in.
    reasoning_left_out: answers whose reasoning the chat template does not repeat.
    unused: columns of the rows and files of the folder. tokens: the file of the examples.
    """

    examples: Examples
    rows: int
    truncated: int
    dropped: int
    unanswered: int = 0
    length_95: int = 0
    reasoning_left_out: int = 0
    unused: Sequence[str] = ()
    tokens: "TokenFile | None" = None


class TokenFile:
    """Tokens of examples one after another in a file: int32, ~id where a token is not counted."""

    def __init__(self, file: IO[bytes], start: int = 0):
        self.file = file
        weakref.finalize(self, file.close)  # with the last of the examples
        self.start = start  # in bytes
        self.lengths = array.array("i")
        self.prompts = array.array("q")

    def append(self, ids: np.ndarray, counted: np.ndarray) -> None:
        """One more example: ids (T,) and which of them count (T,)."""
        self.file.write(np.where(counted, ids, ~ids).astype(np.int32).tobytes())
        self.lengths.append(len(ids))
        self.prompts.append(_prompt_number(ids, counted))

    def blocks(self) -> Iterator[bytes]:
        """The bytes of all tokens."""
        self.file.seek(self.start)
        while block := self.file.read(2**20):
            yield block

    def largest_id(self) -> int:
        """The largest token id of all."""
        largest = 0
        for block in self.blocks():
            coded = np.frombuffer(block, np.int32)
            largest = max(largest, int(coded.max()), int((~coded).max()))
        return largest

    def digest(self) -> str:
        """A hash of all tokens, of which count, and of where each example ends."""
        found = hashlib.sha256(np.array(self.lengths, np.int32).tobytes())
        for block in self.blocks():
            found.update(block)
        return found.hexdigest()

    def examples(self) -> Examples:
        """All of them, read from the file one at a time; none can be appended after that."""
        self.file.flush()
        lengths, prompts = (
            np.frombuffer(self.lengths, np.int32),
            np.frombuffer(self.prompts, np.int64),
        )
        ends = 4 * np.cumsum(lengths, dtype=np.int64)
        n_bytes = int(ends[-1])
        self.file.seek(self.start)
        small = self.file.read(n_bytes) if n_bytes <= SMALL_BYTES else b""

        def get(i: int) -> Example:
            start, size = int(ends[i]) - 4 * int(lengths[i]), 4 * int(lengths[i])
            read = small[start : start + size]
            read = read or os.pread(self.file.fileno(), size, self.start + start)
            coded = np.frombuffer(read, np.int32)
            ids = np.where(coded < 0, ~coded, coded)
            return Example(ids.tolist(), np.where(coded < 0, IGNORED, ids).tolist())

        return Examples(get, lengths, prompts)


def tokenize(
    rows: Iterable[Row],
    tokenizer: Any,
    max_length: int,
    *,
    completion_only: bool = True,
    train_on: str = "all",
    folder: Path | None = None,
) -> Dataset:
    """Examples of at most `max_length` tokens, in a temporary file in `folder`.

    A conversation is rendered whole by the tokenizer's chat template (without one, turns are joined
    by newlines and answers end with the end-of-text token) and tokenized whole. The assistant's
    answers count with their end-of-turn token, "all" of them or the "last"; the rest is -100 unless
    `completion_only` is False. Too long a conversation is cut at its end. Of a text every token
    counts, and a long one becomes several examples.

    Raises DataError, with the row's number, for a row of which not all can be learned, and when
    nothing is left to train on.
    """
    tokens = TokenFile(temporary_file(folder))
    full_lengths, counts = array.array("i"), dict.fromkeys(COUNTS, 0)

    for text, ids, offsets in _tokenized(rows, tokenizer, train_on):
        counts["rows"] += 1
        if isinstance(text, str):
            counted = np.full(len(ids), bool(text.strip()))
            starts = range(0, len(ids), max_length)
        else:
            counts["reasoning_left_out"] += text.reasoning_left_out
            ids, counted = _counted(text, ids, offsets, completion_only)
            counts["truncated"] += len(ids) > max_length
            full_lengths.append(len(ids))
            starts = range(1)
        counts["unanswered"] += not counted[1:].any()
        n_before = len(tokens.lengths)
        for start in starts:  # a last piece of one token begins earlier, to learn that one, too
            piece = slice(min(start, max(0, len(ids) - 2)), start + max_length)
            counted[piece][:1] = False
            if counted[piece].any():
                tokens.append(ids[piece], counted[piece])
        counts["dropped"] += len(tokens.lengths) == n_before
    if not tokens.lengths:
        n_rows, advice = counts["rows"], f"within max_length {max_length}: raise it"
        if counts["unanswered"] == n_rows:
            advice = "at all: give text, or answers that are not empty and whose weight is not 0"
        raise DataError(f"none of {n_rows} rows has a token to learn {advice}.")
    lengths = np.array(full_lengths or [0])
    length_95 = int(np.quantile(lengths, 0.95, method="higher"))
    return Dataset(tokens.examples(), length_95=length_95, tokens=tokens, **counts)


def split(
    examples: Sequence[Example], held_out_fraction: float, seed: int
) -> tuple[Examples, Examples]:
    """(train, held out), fixed by the seed; one example at least is always in train.

    Examples with the same prompt (the tokens before the first counted one) stay on the same side,
    so that no held-out prompt was trained on. Groups are held out until the fraction is met, and
    one that would go far beyond it is trained on.
    """
    given = Examples.of(examples)
    _, first, group_of = np.unique(given.prompts, return_index=True, return_inverse=True)
    by_first = np.argsort(first, kind="stable")  # groups in the order of their first example
    members = np.argsort(group_of, kind="stable")
    sizes = np.bincount(group_of, minlength=len(first))
    starts = np.cumsum(sizes) - sizes
    order = array.array("q", by_first.tobytes())
    random.Random(f"split {seed}").shuffle(order)
    wanted = round(len(given) * held_out_fraction)
    if held_out_fraction > 0:
        wanted = max(wanted, 1)
    beyond = max(1, wanted // 10)  # as many more than wanted are close enough
    n_left, n_taken, held_out = len(order), 0, np.zeros(len(order), bool)
    for group in reversed(order):
        if n_taken < wanted and n_left > 1 and n_taken + sizes[group] <= wanted + beyond:
            held_out[group] = True
            n_taken, n_left = n_taken + int(sizes[group]), n_left - 1
    if n_taken < wanted and n_left > 1:  # the smallest that is left, if it brings nearer
        smallest = int(np.argmin(np.where(held_out, len(given) + 1, sizes)))
        held_out[smallest] = not n_taken or sizes[smallest] < 2 * (wanted - n_taken)

    def of_groups(groups: np.ndarray) -> Examples:
        n = sizes[groups]
        within = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
        return given.select(members[np.repeat(starts[groups], n) + within])

    groups = np.array(order, np.int64)
    return of_groups(groups[~held_out[groups]]), of_groups(groups[held_out[groups]][::-1])


def shuffle_targets(examples: Sequence[Example], seed: int | str) -> Examples:
    """The control that must not learn: the counted labels, permuted among all counted positions.

    The inputs stay as they are. Answers permuted as a whole would not do: the tokens of an answer
    still predict one another and its style, and that is most of what a model learns. Permuted
    labels hold nothing but how frequent each token is, so that the training loss may fall from its
    high start, but the loss on true held-out text must not.
    """
    given = Examples.of(examples)
    labels, ends = array.array("i"), array.array("q")
    for example in given:
        labels.extend(label for label in example.labels if label != IGNORED)
        ends.append(len(labels))
    random.Random(f"targets {seed}").shuffle(labels)

    def get(i: int) -> Example:
        example, left = given[i], iter(labels[ends[i - 1] if i else 0 : ends[i]])
        return Example(
            example.input_ids, [next(left) if x != IGNORED else x for x in example.labels]
        )

    return Examples(get, given.lengths)


def batches(
    examples: Sequence[Example],
    batch_size: int,
    seed: int,
    *,
    start_step: int = 0,
    n_samples: int | None = None,
) -> Iterator[list[Example]]:
    """Batches from number `start_step` on; number i depends on the seed and i alone.

    Every epoch is a new permutation, and a batch may span two: each has exactly `batch_size`
    examples, and every example is seen once an epoch. They have no end, or end when `n_samples`
    were seen from the first batch on, with a batch of what is left.
    """
    epoch, order = -1, array.array("i")
    for first in count(start_step * batch_size, batch_size):
        end = first + batch_size if n_samples is None else min(first + batch_size, n_samples)
        batch = []
        for position in range(first, end):
            if position // len(examples) != epoch:
                epoch = position // len(examples)
                order = array.array("i", range(len(examples)))
                random.Random(f"epoch {seed} {epoch}").shuffle(order)
            batch.append(examples[order[position % len(examples)]])
        if not batch:
            return
        yield batch


def pack(examples: Sequence[Example], max_length: int) -> Examples:
    """Rows of at most `max_length` tokens, put together into few samples that long.

    The longest first, each into the fullest sample that has room; the same every time.
    """
    given = Examples.of(examples)
    rows = np.argsort(-given.lengths, kind="stable").astype(np.int32)
    samples = np.empty_like(rows)  # into which each row goes
    with_room: dict[int, list[int]] = {}  # tokens of room -> samples
    n_samples = 0
    for place, row in enumerate(rows):
        length = int(given.lengths[row])
        room = next((room for room in range(length, max_length) if with_room.get(room)), max_length)
        if room == max_length:
            sample, n_samples = n_samples, n_samples + 1
        else:
            sample = with_room[room].pop()
        samples[place] = sample
        if room > length:
            with_room.setdefault(room - length, []).append(sample)
    rows = rows[np.argsort(samples, kind="stable")]  # one sample after another
    ends = np.cumsum(np.bincount(samples))

    def members(sample: int) -> np.ndarray:
        return rows[ends[sample - 1] if sample else 0 : ends[sample]]

    def get(sample: int) -> Example:
        parts = [given[int(row)] for row in members(sample)]
        return Example(
            [token for part in parts for token in part.input_ids],
            [label for part in parts for label in part.labels],
            tuple(len(part.input_ids) for part in parts),
        )

    lengths = [given.lengths[members(sample)].sum() for sample in range(n_samples)]
    return Examples(get, np.array(lengths, np.int32))


def collate(examples: Sequence[Example | Pair], pad_id: int | None = 0) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels, each (B, T) int64, padded at the right to the longest.

    P pairs are 2 P samples: the chosen ones, then the rejected ones.

    The attention mask tells padding from text: `pad_id` may also be the end token. With packed
    examples position_ids take its place: they begin at 0 with every row that is packed, and with
    the padding, by which transformers keeps the attention within each.
    """
    examples = list(examples)
    if isinstance(examples[0], Pair):
        examples = [pair.chosen for pair in examples] + [pair.rejected for pair in examples]

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], True, value)

    input_ids = padded([example.input_ids for example in examples], pad_id or 0)
    batch = {"input_ids": input_ids, "labels": padded([x.labels for x in examples], IGNORED)}
    if not any(example.lengths for example in examples):
        mask = padded([[1] * len(example.input_ids) for example in examples], 0)
        return batch | {"attention_mask": mask}
    rows = []
    for example in examples:
        tokens = len(example.input_ids)
        parts = (*(example.lengths or (tokens,)), input_ids.shape[1] - tokens)
        rows.append(torch.cat([torch.arange(part) for part in parts]))
    return batch | {"position_ids": torch.stack(rows)}


def rows_of(
    batch: dict[str, torch.Tensor], part: int, n_parts: int, n_sides: int = 1
) -> dict[str, torch.Tensor]:
    """The rows of a batch (B, T) that one of `n_parts` processes takes, as many as the others or
    one more or less.

    n_sides: rows of a sample; the first of all samples come first, as `collate` has pairs. One for
    which no sample is left takes the first with no label: it makes the passes of the others, and
    adds nothing to the loss.
    """
    n_samples = len(batch["labels"]) // n_sides
    start, stop = n_samples * part // n_parts, n_samples * (part + 1) // n_parts
    rows = slice(start, stop) if start < stop else slice(1)
    by_side = {name: values.unflatten(0, (n_sides, -1)) for name, values in batch.items()}
    own = {name: values[:, rows].flatten(0, 1) for name, values in by_side.items()}
    if start == stop:
        own["labels"] = torch.full_like(own["labels"], IGNORED)
    return own


def _prompt_number(ids: Sequence[int] | np.ndarray, counted: Any) -> int:
    """A number of the tokens before the first counted one; of all, if there is but one."""
    first = int(np.argmax(counted))
    prompt = np.array(ids[:first] if first > 1 else ids, np.int64)
    digest = hashlib.blake2b(prompt.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def temporary_file(folder: Path | None) -> IO[bytes]:
    """A file without a name, that is memory while it is small and ends with its last reader."""
    usable = folder is not None and os.access(folder, os.W_OK)
    return tempfile.SpooledTemporaryFile(SMALL_BYTES, dir=folder if usable else None)


def _tokenized(
    rows: Iterable[Row], tokenizer: Any, train_on: str
) -> Iterator[tuple[str | Rendered, np.ndarray, Any]]:
    """Each row's text or rendered conversation, its ids (T,) and their offsets in it (T, 2)."""
    batch: list[str | Rendered] = []
    size = first = 0
    for number, row in enumerate(rows, start=1):
        try:
            made = row["text"] if "text" in row else render(row, tokenizer, train_on)
        except DataError as error:
            raise DataError(
                f"row {number} {error}. Begin with the user, alternate with the assistant, or set "
                "chat_template to one that renders what the row holds."
            ) from error
        batch.append(made)
        size += len(made if isinstance(made, str) else made.text)
        if len(batch) >= BATCH_ROWS or size >= BATCH_CHARACTERS:
            yield from _encoded(batch, tokenizer, first + 1)
            batch, size, first = [], 0, number
    yield from _encoded(batch, tokenizer, first + 1)


def _encoded(
    batch: list[str | Rendered], tokenizer: Any, first: int
) -> Iterator[tuple[str | Rendered, np.ndarray, Any]]:
    bos, end = tokenizer.bos_token, tokenizer.eos_token_id
    texts = [made if isinstance(made, str) else made.text for made in batch]
    # What a template has rendered, here or before, holds its special tokens already.
    plain = [isinstance(made, str) and not (bos and made.startswith(bos)) for made in batch]
    encoded: list[Any] = [None] * len(batch)
    with explained(f"rows {first} to {first + len(batch) - 1} cannot be tokenized"):
        for i, text in enumerate(texts):
            if len(text) > WINDOW and tokenizer.is_fast:
                encoded[i] = _by_windows(text, tokenizer, plain[i])
        for special in (True, False):
            which = [i for i in range(len(batch)) if encoded[i] is None and plain[i] == special]
            if which:
                found = _tokens([texts[i] for i in which], tokenizer, special)
                for i, ids, offsets in zip(which, *found, strict=True):
                    encoded[i] = ids, offsets
    for made, (ids, offsets) in zip(batch, encoded, strict=True):
        if isinstance(made, str) and end is not None and ids[-1:].tolist() != [end]:
            ids = np.append(ids, end)
        yield made, ids, tokenizer if offsets is None else offsets


def _tokens(texts: list[str], tokenizer: Any, special: bool) -> tuple[list[Any], list[Any]]:
    """The ids of each text (T,), and their offsets (T, 2): None with special tokens, or none."""
    located = tokenizer.is_fast and not special
    settings = {"add_special_tokens": special, "return_offsets_mapping": located}
    settings |= {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    found = tokenizer(texts, **settings)
    offsets = [
        np.array(pairs, np.int64).reshape(-1, 2) for pairs in found.get("offset_mapping", [])
    ]
    return [np.array(ids, np.int64) for ids in found["input_ids"]], offsets or [None] * len(texts)


def _by_windows(text: str, tokenizer: Any, special: bool) -> tuple[np.ndarray, Any]:
    """The ids of a long text (T,) and their offsets (T, 2), in little memory.

    A tokenizer takes hundreds of bytes a character. Windows overlap, and two are joined behind
    ANCHOR tokens that both have at the same place; where they have none, as in a million times
    the same letter, all is done at once.
    """
    joined: list[np.ndarray] = []  # (T, 3) each: id, offsets
    for first in range(0, len(text), WINDOWS * WINDOW):
        places = range(first, min(first + WINDOWS * WINDOW, len(text)), WINDOW)
        starts = [max(0, place - OVERLAP) for place in places]
        windows = [text[a : b + WINDOW] for a, b in zip(starts, places, strict=True)]
        for start, ids, offsets in zip(starts, *_tokens(windows, tokenizer, False), strict=True):
            part = np.column_stack([ids, offsets + start])
            if joined:
                anchor = joined[-1][-2 * ANCHOR : -ANCHOR]
                ends = np.flatnonzero(part[:, 1] == (anchor[-1, 1] if len(anchor) else -1)) + 1
                ends = [n for n in ends if np.array_equal(part[max(0, n - ANCHOR) : n], anchor)]
                if not ends:
                    (ids,), (offsets,) = _tokens([text], tokenizer, special)
                    return ids, offsets
                joined[-1], part = joined[-1][:-ANCHOR], part[ends[0] :]
            joined.append(part)
    ids, offsets = np.concatenate(joined)[:, 0], np.concatenate(joined)[:, 1:]
    if special:  # what the tokenizer puts before and behind any text
        found = tokenizer("a", return_special_tokens_mask=True)
        plain = np.flatnonzero(np.array(found["special_tokens_mask"]) == 0)
        ends = found["input_ids"][: plain[0]], found["input_ids"][plain[-1] + 1 :]
        ids = np.concatenate([ends[0], ids, ends[1]]).astype(np.int64)
    return ids, offsets


def _counted(
    rendered: Rendered, ids: np.ndarray, offsets: Any, completion_only: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Ids up to the last one that counts, and which of them count.

    A token that lies across the beginning or the end of an answer belongs to it.
    """
    if not isinstance(offsets, np.ndarray):
        offsets = _offsets_by_prefix(rendered, ids, offsets)
    begins, ends = offsets[:, 0], offsets[:, 1]

    def inside(start: int, end: int) -> np.ndarray:
        return (begins < end) & ((ends > start) | (begins >= start) & (begins == ends))

    counted = np.full(len(ids), not completion_only)
    for span in rendered.learned:
        counted |= inside(*span)
    for span in rendered.unlearned if not completion_only else ():
        counted &= ~inside(*span)
    if completion_only:
        last = int(np.flatnonzero(counted)[-1]) + 1 if counted.any() else 0
        ids, counted = ids[:last], counted[:last]
    return ids, counted


def _offsets_by_prefix(rendered: Rendered, ids: np.ndarray, tokenizer: Any) -> np.ndarray:
    """Offsets as far as answers need them, of a tokenizer that gives none: (T, 2)."""
    places = {0, len(rendered.text)}
    places |= {place for span in rendered.learned + rendered.unlearned for place in span}
    offsets, done, before = np.zeros((len(ids), 2), np.int64), 0, 0
    for place in sorted(places)[1:]:
        prefix = tokenizer(rendered.text[:place], add_special_tokens=False)["input_ids"]
        if prefix != ids[: len(prefix)].tolist():
            raise DataError(
                "this tokenizer gives no offsets and joins an answer's end with what follows: "
                "copy the tokenizer.json of the original into the model folder."
            )
        offsets[done : len(prefix)] = before, place
        done, before = len(prefix), place
    return offsets
