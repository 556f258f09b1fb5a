"""Rows of any form that people have -> conversations and texts of one form, one at a time.

Files are read here and not by `datasets`, which guesses types: it would make numbers of the answers
"4" and "NA" in a CSV file, and give every message of a JSONL file the fields of all others.
"""

import bz2
import csv
import gzip
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import IO, Any

from onn_core.errors import DataError

Message = dict[str, Any]  # role, content, and what else MESSAGE_FIELDS names
Row = dict[str, Any]  # {"messages": [Message, ...], "tools": [...]} or {"text": str}

SYSTEM_ROLES = ("system", "developer")
ROLES = {role: role for role in (*SYSTEM_ROLES, "user", "assistant", "tool")}
ROLES |= {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
ROLES |= {"chatgpt": "assistant", "observation": "tool", "ipython": "tool"}
MESSAGE_FIELDS = ("role", "content", "name", "weight", "tool_calls", "tool_call_id")
MESSAGE_FIELDS += ("reasoning_content", "reasoning", "thinking")
TURNS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "instruction", "question", "query")
INPUTS = ("input", "context")  # what a prompt is about, written after it
ANSWERS = ("response", "completion", "answer", "output")
BESIDE = ("system", "tools", "chat_template_kwargs")  # what goes along with messages
# These would change what is learned, and no rule says how; of a text, a label would not.
REFUSED_FIELDS = ("history", "documents", "functions", "function_call", "reasoning", "thinking")
REFUSED_FIELDS += ("reasoning_content", "image", "images", "video", "videos", "audio", "audios")
REFUSED_FIELDS += ("weight", "system_prompt", "continue_final_message")
LABELS = ("label", "labels")
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
UNREADABLE = (OSError, ValueError, EOFError, zlib.error, lzma.LZMAError, csv.Error)
MAX_PARAGRAPH = 2**18  # characters; a longer one of a text file ends at the next line
BLOCK = 2**20  # characters of a JSON array that are read at once
# The beginning of a JSON file that is an array, or an object with an array as its "data".
ARRAY = re.compile(
    r'(\{(\s*"[^"\\]*"\s*:\s*("([^"\\]|\\.)*"|[^\s\[\]{}",]+)\s*,)*\s*"data"\s*:\s*)?\['
)
FORMS = "messages (role, content), prompt and response, or text"


def load_rows(data: Any) -> list[Row]:
    """All that `read_rows` yields, in memory."""
    return list(read_rows(data))


def read_rows(
    data: Any,
    unused: set[str] | None = None,
    make: Callable[[Any, str, set[str]], Row] | None = None,
) -> Iterator[Row]:
    """Rows of "chatterbot", of a file, of a folder of files, or of rows in memory, one at a time.

    A file is .json, .jsonl, .ndjson, .csv, .tsv, .parquet, .txt or .md, or one of these compressed
    (.gz, .bz2, .xz); of a text file each paragraph is a row. A folder may also be what
    `datasets.Dataset.save_to_disk` wrote. Rows in memory are a `datasets.Dataset`, a pandas
    DataFrame, or any iterable of dicts.

    A row holds messages (or ShareGPT's conversations), a prompt (or instruction, question) and a
    response (or completion, answer, output), or text; with these system, tools, and the input of
    a prompt. What is yielded is {"messages": [...]}, perhaps with "tools" and
    "chat_template_kwargs", or {"text": ...}. What is left out, columns of the rows and files of the
    folder, is added to `unused`. make: a row of another form, of what was read, its place, and
    `unused`.

    Raises DataError, with the row's place where there is one, for what cannot be read.
    """
    unused, empty = set() if unused is None else unused, True
    for where, raw in _raw_rows(data, unused):
        try:
            row = (make or _row)(_plain(raw), where, unused)
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where} holds half a character (a lone surrogate): fix it."
            ) from error
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{where} holds what JSON cannot ({error}): make it text.") from error
        yield row
        empty = False
    if empty:
        name = data if isinstance(data, str | os.PathLike) else "data"
        raise DataError(f"{name} is empty (or a generator was read before): give at least one row.")


def files_of(path: Path, unused: set[str] | None = None) -> list[Path]:
    """The files that `path` stands for; DataError if there is none that can be read.

    Files of a folder that no reader takes are added to `unused`, but for what describes the others.
    """
    found = [path]
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if file.is_file()]
        found = [file for file in found if not _is_about(file.relative_to(path))]
    files = [file for file in found if _kind(file) in READERS]
    if path.is_dir():
        held_out = [file for file in files if re.match(r"(test|valid|dev|eval)", file.stem.lower())]
        if held_out and any(file.stem.lower().startswith("train") for file in files):
            raise DataError(
                f"{path} holds files to train on and to test on ({held_out[0].name}): give the "
                "training file, or a folder of those alone."
            )
    if not files:
        known = ", ".join(READERS)
        raise DataError(
            f'data "{path}" is not known: give "chatterbot", or a file ({known}, also compressed '
            f"as {', '.join(OPENERS)}) or a folder of them."
        )
    if unused is not None:
        unused |= {f"file {file.relative_to(path)}" for file in set(found) - set(files)}
    return files


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets.Dataset.save_to_disk` wrote this folder."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _raw_rows(data: Any, unused: set[str]) -> Iterator[tuple[str, Any]]:
    """(where it is, the row as it is written)."""
    if isinstance(data, Mapping):
        raise DataError('data holds several datasets: choose a split such as dataset["train"].')
    if not isinstance(data, str | os.PathLike):
        if not isinstance(data, Iterable) or isinstance(data, bytes):
            raise DataError(f"data must be a path or rows, not {type(data).__name__}.")
        table = hasattr(data, "features") or hasattr(data, "itertuples")  # with a cell everywhere
        for number, row in enumerate(_rows_of_frame(data), start=1):
            yield f"row {number} of data", _plain(row, drop_none=table)
        return
    if data == "chatterbot":
        yield from (("chatterbot", row) for row in _chatterbot_rows())
        return
    path = Path(data).expanduser()
    if not str(data) or not path.exists():
        raise DataError(
            f'data "{data}" cannot be read: it is no file or folder here, and not "chatterbot". '
            "Datasets are never fetched: load one with datasets.load_dataset and give that."
        )
    if path.is_dir() and is_saved_dataset(path):
        import datasets

        saved = datasets.load_from_disk(str(path))
        yield from _raw_rows(saved, unused)
        return
    for file in files_of(path, unused):
        try:
            yield from READERS[_kind(file)](file)
        except UNREADABLE as error:
            raise DataError(
                f"{file} cannot be read as UTF-8 text or as what its name says ({error}): check "
                "the file."
            ) from error


def _kind(path: Path) -> str:
    """Which of READERS reads a file: its last suffix that is not of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in OPENERS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _is_about(path: Path) -> bool:
    """Whether a file of a folder describes the others, as in folders of the Hub, or is hidden."""
    names = ("readme", "license", "licence", "dataset_info", "dataset_infos", "dataset_dict")
    hidden = any(part.startswith(".") for part in path.parts)
    return hidden or path.stem.lower() in (*names, "state")


def _rows_of_frame(data: Any) -> Iterable[Any]:
    """The rows of a pandas DataFrame, None where a value is missing; other rows as they are."""
    if not hasattr(data, "itertuples"):
        return data
    _require_once(list(data), "data")
    values = data.astype(object).where(data.notna(), None).itertuples(index=False, name=None)
    return (dict(zip(data, row, strict=True)) for row in values)


def _require_once(names: list[Any], where: Any) -> None:
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{where} has the column {name!r} twice: rename one of them.")


def _open(path: Path, newline: str | None = None) -> IO[str]:
    return OPENERS.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8-sig", newline=newline)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path, newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path} line {number}", _json(line, f"{path} line {number}")


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}): fix or remove it.") from error


def _json_file(path: Path) -> Iterator[tuple[str, Any]]:
    """The items of an array, read block by block; or JSON lines, as many .json files hold.

    The array may be the "data" of an object.
    """
    with _open(path) as file:
        text = file.read(BLOCK).lstrip()
        array = ARRAY.match(text)
        if not array:
            first, more, _ = text.partition("\n")
            if more and first.startswith("{") and not first.rstrip().endswith("}"):
                raise DataError(
                    f"{path} is one object and not a list of rows: write a list of them, or each "
                    "in a line."
                )
            yield from _json_lines(path)
            return
        decode, number = json.JSONDecoder().raw_decode, 1
        before, text = text[: array.end() - 1], text[array.end() :]
        while not (text := text.lstrip().removeprefix(",").lstrip()).startswith("]"):
            try:
                item, end = decode(text)
                whole = text[end : end + 1] in (",", "]") or text[end:].lstrip()[:1] in (",", "]")
            except (ValueError, RecursionError) as error:
                whole, problem = False, error
            else:
                problem = "it ends too early"
            if whole:
                yield f"{path} row {number}", item
                text, number = text[end:], number + 1
            elif more := file.read(max(BLOCK, len(text))):  # twice as much: each is read again
                text += more
            else:
                raise DataError(f"{path} row {number} is not JSON ({problem}): fix the file.")
        try:
            json.loads(f"{before}0{text[1:]}{file.read()}")
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} goes on after its array: fix the file.") from error


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a table; what stands most often in the header separates its cells."""
    csv.field_size_limit(2**31 - 1)
    with _open(path, newline="") as file:
        header = file.readline()
        separator = "\t" if _kind(path) == ".tsv" else max(",;\t", key=header.count)
        rows = csv.DictReader(chain([header], file), delimiter=separator, strict=True)
        _require_once(list(rows.fieldnames or []), path)
        for number, row in enumerate(rows, start=1):
            if None in row:
                raise DataError(
                    f"{path} row {number} has more cells than the header: put quotes around a "
                    f"cell that holds a {separator!r}."
                )
            yield f"{path} row {number}", row


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", _plain(row, drop_none=True)
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error


def _paragraphs(path: Path) -> Iterator[tuple[str, Any]]:
    """Lines up to an empty one, as they are: \\n and \\r\\n alone end a line."""
    with _open(path, newline="\n") as file:
        lines: list[str] = []
        size = number = 0
        while True:
            line = file.readline(MAX_PARAGRAPH)
            if line.strip():
                lines.append(line.removesuffix("\n").removesuffix("\r"))
                size += len(line)
            if lines and (not line.strip() or size >= MAX_PARAGRAPH):
                number += 1
                yield f"{path} paragraph {number}", {"text": "\n".join(lines)}
                lines, size = [], 0
            if not line:
                return


READERS = {".json": _json_file, ".jsonl": _json_lines, ".ndjson": _json_lines, ".csv": _table}
READERS |= {".tsv": _table, ".parquet": _parquet, ".txt": _paragraphs, ".md": _paragraphs}


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
    safe_loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C, where PyYAML has it
    pairs = {}  # a dict, for its order
    for file in sorted(files, key=str):
        if file.match("data/english/*.yml"):
            text = file.read_text(encoding="utf-8")
            conversations = yaml.load(text, safe_loader)["conversations"]
            two = [turns[:2] for turns in conversations if isinstance(turns, list)]
            pairs |= dict.fromkeys((prompt.strip(), response.strip()) for prompt, response in two)
    return [{"prompt": prompt, "response": response} for prompt, response in pairs]


def _row(raw: Any, where: str, unused: set[str]) -> Row:
    """The one form of a row, whatever it was written in."""
    fields = fields_of(raw)
    if "chosen" in fields or "rejected" in fields:
        raise DataError(
            f'{where} is a preference pair (chosen, rejected): train on it with objective="dpo", '
            "or with TRL's DPOTrainer and a model of onn_core.from_pretrained."
        )
    for name in (*TURNS, "tools"):
        if isinstance(fields.get(name), str):  # a column of a table
            fields[name] = _json(fields[name] or "[]", f"{where}: {name}")
    prompt = next((name for name in PROMPTS if name in fields), None)
    answer = next((name for name in ANSWERS if name in fields), None)
    turns = next((name for name in TURNS if name in fields), None)
    messages, used, refused = [], {*BESIDE}, {*REFUSED_FIELDS, *INPUTS, *LABELS}
    if prompt and answer:
        messages = _pair(fields, prompt, answer, where)
        used |= {prompt, answer, *INPUTS}
    elif turns and isinstance(fields[turns], list) and fields[turns]:
        messages = [message_of(turn, where) for turn in fields[turns]]
        used |= {turns}
    elif isinstance(fields.get("text"), str):
        used, refused = {"text"}, refused.union(BESIDE).difference(LABELS)
    else:
        has = ", ".join(map(str, fields))[:200] or "none of them"
        raise DataError(f"{where} needs {FORMS}: it has {has}.")
    sort_out(fields, used, refused, where, unused)
    if not messages:
        return {"text": fields["text"]}
    if not _is_empty(fields.get("system")):
        if messages[0]["role"] in SYSTEM_ROLES:
            raise DataError(f"{where} has a system field and a system turn: keep one of them.")
        messages.insert(0, message_of({"role": "system", "content": fields["system"]}, where))
    row: Row = {"messages": messages}
    for name, kind in (("tools", list), ("chat_template_kwargs", dict)):
        if not _is_empty(fields.get(name)):
            if not isinstance(fields[name], kind):
                raise DataError(f"{where}: {name} must be a {kind.__name__}.")
            row[name] = fields[name]
    _require_names(row.get("tools", []), where, "tool")
    return row


def fields_of(raw: Any) -> dict[str, Any]:
    """The fields of a row or a message that hold something; none of what is not a dict."""
    return {key: x for key, x in raw.items() if x is not None} if isinstance(raw, dict) else {}


def sort_out(
    fields: dict[str, Any], used: Set[str], refused: Collection[str], where: str, unused: set[str]
) -> None:
    """Add the columns that are not `used` to `unused`; DataError for one that is `refused`."""
    for name in sorted(fields.keys() - used, key=str):
        if name in refused and not _is_empty(fields[name]):
            raise DataError(
                f'{where}: the field "{name}" would change what is learned and is not '
                "understood here: write it into the messages, or remove it."
            )
        unused.add(f"column {name}")


def _pair(fields: dict[str, Any], prompt: str, answer: str, where: str) -> list[Message]:
    """The messages of a prompt and its answer, each a text or, as TRL has them, messages.

    Of messages in the prompt nothing is learned.
    """
    sides = []
    for name, role in ((prompt, "user"), (answer, "assistant")):
        value = fields[name]
        if isinstance(value, str):
            value = [{"role": role, "content": value}]
        if not isinstance(value, list) or not value:
            raise DataError(f"{where} needs {FORMS}: its {name} is not text.")
        sides.append([message_of(turn, where) for turn in value])
    for message in sides[0]:
        if message["role"] == "assistant":
            message["weight"] = 0
    for name in INPUTS:
        if not _is_empty(fields.get(name)):
            if not isinstance(fields[name], str):
                raise DataError(f'{where}: its field "{name}" is not text.')
            parts = sides[0][-1]["content"], fields[name]
            sides[0][-1]["content"] = "\n\n".join(filter(None, parts))
    return [*sides[0], *sides[1]]


def message_of(turn: Any, where: str) -> Message:
    fields = fields_of(turn)
    for theirs, ours in (("from", "role"), ("value", "content")):  # ShareGPT
        if theirs in fields and not fields.get(ours):
            fields[ours] = fields.pop(theirs)
    if fields.get("content") is None and not fields.get("tool_calls"):
        raise DataError(f"{where} needs {FORMS}.")
    role = fields.get("role")
    if not isinstance(role, str):
        raise DataError(f"{where} needs {FORMS}: its role is {role!r}.")
    if role.lower() not in ROLES:
        raise DataError(f'{where}: the role "{role}" is not known: use {", ".join(ROLES)}.')
    for name in fields.keys() - set(MESSAGE_FIELDS):
        raise DataError(f'{where}: the field "{name}" of a message is not understood: remove it.')
    message = fields | {"role": ROLES[role.lower()], "content": _text(fields.get("content"), where)}
    weight = message.pop("weight", 1)
    if weight not in (0, 1):
        raise DataError(f"{where}: the weight of a message is 0 or 1, not {weight!r}.")
    _require_names(message.get("tool_calls", []), where, "tool call")
    return message if weight else message | {"weight": 0}


def _text(content: Any, where: str) -> str:
    """A message's content as text; it may be None with tool calls, or a list of parts."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = []
    for part in parts:
        part = part if isinstance(part, dict) else {"type": "text", "text": part}
        if part.get("type", "text") != "text":
            raise DataError(f"{where} has content of type {part['type']!r}: only text is trained.")
        if content is not None and part.get("text") is None:
            raise DataError(f"{where} has a part of content without its text: fix it.")
        texts.append("" if content is None else part["text"])
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where} needs {FORMS}: a content is not text.")
    return "".join(texts)


def _require_names(functions: Any, where: str, what: str) -> None:
    """DataError unless `functions` is a list of tools, or of calls of them, that have a name."""
    for function in functions if isinstance(functions, list) else [None]:
        inside = function.get("function", function) if isinstance(function, dict) else None
        if not isinstance(inside, dict) or not isinstance(inside.get("name"), str):
            raise DataError(f"{where}: each {what} in a list of them must have a name.")


def _plain(value: Any, drop_none: bool = False) -> Any:
    """`value` made of dicts and lists, for what may also be other mappings, tuples and arrays.

    drop_none: leave out what is None, because a table gives every dict the keys of all others.
    """
    if isinstance(value, Mapping):
        kept = ((key, x) for key, x in value.items() if not drop_none or x is not None)
        return {key: _plain(x, drop_none) for key, x in kept}
    value = value.tolist() if hasattr(value, "tolist") else value  # a numpy array or number
    return [_plain(x, drop_none) for x in value] if isinstance(value, list | tuple) else value


def _is_empty(value: Any) -> bool:
    return value is None or isinstance(value, str | list | dict) and not value
