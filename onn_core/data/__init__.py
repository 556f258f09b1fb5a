"""Rows of text -> tokens -> batches with labels."""

from onn_core.data.examples import (
    IGNORED,
    Dataset,
    Example,
    batches,
    collate,
    conversation_segments,
    load_tokenizer,
    pack,
    shuffle_targets,
    split,
    tokenize,
)
from onn_core.data.rows import load_rows

__all__ = [
    "IGNORED",
    "Dataset",
    "Example",
    "batches",
    "collate",
    "conversation_segments",
    "load_rows",
    "load_tokenizer",
    "pack",
    "shuffle_targets",
    "split",
    "tokenize",
]
