"""Rows of text -> tokens -> batches with labels."""

from onn_core.data.chat import prompt_ids
from onn_core.data.examples import (
    IGNORED,
    Example,
    Pair,
    batches,
    collate,
    pack,
    rows_of,
    shuffle_targets,
    split,
    tokenize,
)
from onn_core.data.pairs import pair_up, read_pairs, tokenize_pairs
from onn_core.data.rows import load_rows, read_rows
from onn_core.data.tokenizer import load_tokenizer, require_ids_fit

__all__ = [
    "IGNORED",
    "Example",
    "Pair",
    "batches",
    "collate",
    "load_rows",
    "load_tokenizer",
    "pack",
    "pair_up",
    "prompt_ids",
    "read_pairs",
    "read_rows",
    "require_ids_fit",
    "rows_of",
    "shuffle_targets",
    "split",
    "tokenize",
    "tokenize_pairs",
]
