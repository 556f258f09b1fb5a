"""Rows of text from a file, from the default corpus, or from a dataset in memory."""

import json
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from onn_core.errors import DataError

Message = dict[str, str]  # role, content
Row = dict[str, Any]  # {"messages": [Message, ...]} or {"text": str}


def load_rows(data: Any) -> list[Row]:
    """Rows of "chatterbot", of a .jsonl file, of the paragraphs of a .txt file, or of a dataset.

    A JSONL line, or a row of a dataset (a Hugging Face `datasets.Dataset`, a list of dicts), holds
    messages (role, content), prompt and response (or completion), or text. What is returned is
    {"messages": [...]} or {"text": ...}. Raises DataError, with the row's number where there is
    one, for what cannot be read.
    """
    if not isinstance(data, str | os.PathLike):
        rows = [_row(row, f"row {number} of data") for number, row in enumerate(data, start=1)]
        if not rows:
            raise DataError("data is empty: give at least one row.")
        return rows
    if data == "chatterbot":
        return _chatterbot_rows()
    path = Path(data)
    if path.suffix not in (".jsonl", ".txt"):
        raise DataError(f'data {data!r} is not known: give "chatterbot", a .jsonl or a .txt file.')
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{data} cannot be read as UTF-8 text ({error}): check the file."
        ) from error
    if path.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), start=1)
        rows = [_json_row(line, f"{data} line {number}") for number, line in lines if line.strip()]
    else:
        paragraphs = "\n".join(line.rstrip() for line in text.splitlines()).split("\n\n")
        rows = [{"text": paragraph.strip()} for paragraph in paragraphs if paragraph.strip()]
    if not rows:
        raise DataError(f"{data} is empty: give at least one row.")
    return rows


def _chatterbot_rows() -> list[Row]:
    """The first two turns of each English conversation of chatterbot-corpus, each pair once.

    Later turns are left out: in most files they are other answers to the first turn.
    """
    import yaml

    try:
        files = metadata.files("chatterbot-corpus") or []
    except metadata.PackageNotFoundError as error:
        raise DataError(
            'data "chatterbot" comes in a package: pip install chatterbot-corpus.'
        ) from error
    pairs = {}  # a dict, for its order
    for file in sorted(files, key=str):
        if file.match("data/english/*.yml"):
            conversations = yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]
            two = [turns[:2] for turns in conversations if isinstance(turns, list)]
            pairs |= dict.fromkeys((prompt.strip(), response.strip()) for prompt, response in two)
    return [_pair_row(prompt, response) for prompt, response in pairs]


def _json_row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}): mend or remove it.") from error
    return _row(row, where)


def _row(row: Any, where: str) -> Row:
    made = _made(row, where)
    try:
        json.dumps(made, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} holds half a character (a lone surrogate): mend it.") from error
    return made


def _made(row: Any, where: str) -> Row:
    row = row if isinstance(row, Mapping) else {}
    if _all_text(row, "prompt", "response"):
        return _pair_row(row["prompt"], row["response"])
    if _all_text(row, "prompt", "completion"):  # TRL's name
        return _pair_row(row["prompt"], row["completion"])
    if _all_text(row, "text"):
        return {"text": row["text"]}
    turns = row.get("messages")
    if isinstance(turns, list) and turns and all(_all_text(t, "role", "content") for t in turns):
        return {"messages": [{key: turn[key] for key in ("role", "content")} for turn in turns]}
    raise DataError(f"{where} needs messages (role, content), prompt and response, or text.")


def _all_text(value: Any, *keys: str) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(key), str) for key in keys)


def _pair_row(prompt: str, response: str) -> Row:
    turns = (("user", prompt), ("assistant", response))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}
