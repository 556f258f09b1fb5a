"""Rows as a model is given them: which tokens are learned, cut or dropped, and their losses."""

import dataclasses
import html
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from matplotlib import colormaps, colors

from onn_core import data
from onn_core.config import TrainConfig
from onn_core.data.tokenizer import read_template
from onn_core.errors import DataError

N_LOOKED_AT = 300  # rows that are told apart, from the first on
NO_LIMIT = 1 << 30  # tokens
BOX = "font:13px/1.7 monospace;white-space:pre-wrap;overflow-wrap:anywhere;margin:0 0 8px;"
BOX += "padding:4px 8px;border-left:3px solid #bbb"
MARKS = {  # of a token: style, and what it means
    "learned": ("background:#b7e4c7;color:#123", "learned"),
    "given": ("color:#666", "given, not learned"),
    "cut": ("color:#b00020;text-decoration:line-through", "cut at the length, not seen"),
}
LEGEND = " ".join(f'<span style="{style}">{text}</span>' for style, text in MARKS.values())


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the data in pieces, each of tokens of one mark: (mark, text)."""

    number: int  # from 1
    pieces: list[tuple[str, str]]
    n_tokens: int
    n_learned: int
    why: str = ""  # nothing of it is learned

    @property
    def kind(self) -> str:
        return "dropped" if self.why else "cut" if "cut" in dict(self.pieces) else "whole"

    def html(self) -> str:
        """The row with its marks."""
        shown = (
            f'<span style="{MARKS[mark][0]}">{html.escape(text)}</span>'
            for mark, text in self.pieces
        )
        title = f"row {self.number}: {self.n_tokens} tokens, {self.n_learned} learned"
        title += f"; dropped: {html.escape(self.why)}" if self.why else ""
        return f'<b>{title}</b><div style="{BOX}">{"".join(shown)}</div>'


def tokenizer_of(config: TrainConfig) -> Any:
    """The tokenizer of a run, with the chat template that the run has."""
    tokenizer = data.load_tokenizer(config.model_dir)
    if config.chat_template is not None:
        tokenizer.chat_template = read_template(config.chat_template)
    return tokenizer


def rows(config: TrainConfig, tokenizer: Any) -> Iterator[Row]:
    """The first rows of the data as `tokenize` makes examples of them."""
    learns = {"completion_only": config.completion_only, "train_on": config.train_on}
    for number, row in enumerate(itertools.islice(data.read_rows(config.data), N_LOOKED_AT), 1):
        why = ""
        try:
            full = data.tokenize([row], tokenizer, NO_LIMIT, **learns).examples[0]
        except DataError as error:
            if "text" in row or not str(error).startswith("none of"):
                raise
            everything = learns | {"completion_only": False, "train_on": "all"}
            try:
                full = data.tokenize([row], tokenizer, NO_LIMIT, **everything).examples[0]
            except DataError:  # nor is there anything else in it
                full = data.Example([], [])
            why = "it holds nothing to learn"
        n_seen = NO_LIMIT if "text" in row else config.max_length  # a long text makes several
        marks = [
            "cut" if i >= n_seen else "given" if label == data.IGNORED or why else "learned"
            for i, label in enumerate(full.labels)
        ]
        if not why and "learned" not in marks:
            why = f"its prompt alone has {config.max_length} tokens or more"
        pieces = []
        for mark, group in itertools.groupby(range(len(marks)), marks.__getitem__):
            ids = [full.input_ids[i] for i in group]
            pieces.append((mark, tokenizer.decode(ids, clean_up_tokenization_spaces=False)))
        yield Row(number, pieces, len(marks), marks.count("learned"), why)


def losses_html(
    examples: Sequence[data.Example], losses: Sequence[torch.Tensor], tokenizer: Any
) -> str:
    """The samples that gained most and least, each token coloured by what its loss became.

    losses: of each example, (2, T) with the adapter and without, as `token_losses` gives them.
    """
    gains = []
    for number, (example, (after, before)) in enumerate(zip(examples, losses, strict=True)):
        n = sum(label != data.IGNORED for label in example.labels)
        gains.append((float(after.sum() / n), float(before.sum() / n), number))
    gains.sort(key=lambda x: x[0] - x[1])
    n_shown = min(3, (len(gains) + 1) // 2)
    parts = []
    for title, chosen in (("most gained", gains[:n_shown]), ("least gained", gains[-n_shown:])):
        parts.append(f"<h4>{title}</h4>")
        for mean_after, mean_before, number in chosen:
            title = f"<b>{mean_before:.3f} before, {mean_after:.3f} after</b>"
            tokens = _coloured(examples[number], *losses[number].tolist(), tokenizer)
            parts.append(f'{title}<div style="{BOX}">{tokens}</div>')
    return "".join(parts)


def _coloured(
    example: data.Example, after: Sequence[float], before: Sequence[float], tokenizer: Any
) -> str:
    """The tokens: green where the loss fell, red where it rose; the figures of each on hover."""
    pieces = []
    for token, label, new, old in zip(
        example.input_ids, example.labels, after, before, strict=True
    ):
        text = html.escape(tokenizer.decode([token]))
        if label == data.IGNORED:
            pieces.append(f'<span style="{MARKS["given"][0]}">{text}</span>')
            continue
        share = 0.5 + max(-0.4, min(0.4, (old - new) / 5))  # 2 nats are the full colour
        colour = colors.to_hex(colormaps["PiYG"](share))
        style = f"background:{colour};color:#111"
        title = f"{old:.2f} before, {new:.2f} after"
        pieces.append(f'<span style="{style}" title="{title}">{text}</span>')
    return "".join(pieces)
