"""Mutated tokenizer folders: loaded and used, or refused by an OnnError; no other exception."""

import json
import random
import shutil
import warnings

import pytest
from small import write_small

from onn_core import data
from onn_core.errors import DataError, OnnError

pytestmark = pytest.mark.filterwarnings("ignore")
VALUES = [None, True, 0, -1, 3.5, 2**40, "", "x", "\x00", [], {}, [[]], {"a": 1}, "BPE", "Foo"]
ROWS = [{"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]}]
ROWS.append({"text": "It is two."})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("small"))[0]


def places(value, path=()):
    """Paths of all values inside a JSON value; of the vocabulary a few."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inside in list(items)[:40]:
        yield (*path, key)
        if isinstance(inside, dict | list):
            yield from places(inside, (*path, key))


def mutate(path, rng):
    text = path.read_text()
    kind = rng.randrange(5)
    if kind == 0:
        path.write_text(text[: rng.randrange(len(text))])
    elif kind == 1:
        at = rng.randrange(len(text))
        path.write_text(text[:at] + chr(rng.randrange(32, 127)) + text[at + 1 :])
    elif kind == 2:
        path.write_text(json.dumps(rng.choice(VALUES)))
    else:
        value = json.loads(text)
        *before, last = rng.choice(list(places(value)))
        inside = value
        for key in before:
            inside = inside[key]
        if kind == 3 and isinstance(inside, dict):
            inside.pop(last)
        else:
            inside[last] = rng.choice(VALUES)
        path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    "n_folders", [200, pytest.param(2000, marks=pytest.mark.faults)], ids="{} folders".format
)
def test_mutated_folders_raise_nothing_but_our_errors(folder, tmp_path, n_folders, capfd):
    rng, refused = random.Random(n_folders), 0
    for number in range(n_folders):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(folder / name, copy)
        mutate(copy / rng.choice(["tokenizer.json", "tokenizer_config.json"]), rng)
        try:
            with warnings.catch_warnings():
                tokenizer = data.load_tokenizer(copy)
                data.tokenize(ROWS, tokenizer, 40)
                data.prompt_ids("a b", tokenizer)
        except OnnError as error:
            assert 10 < len(str(error)) < 2000, number
            refused += 1
    assert n_folders / 10 < refused < n_folders


def test_code_of_a_folder_is_never_run(folder, tmp_path, monkeypatch):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    (tmp_path / "tok.py").write_text("raise SystemExit('the code of the folder was run')")
    path = tmp_path / "tokenizer_config.json"
    auto = {"tokenizer_class": "Foo", "auto_map": {"AutoTokenizer": ["tok.Foo", "tok.Foo"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | auto))
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("somebody was asked"))
    with pytest.raises(DataError, match="no tokenizer can be loaded"):
        data.load_tokenizer(tmp_path)


def test_a_tokenizer_without_a_pad_token_gets_one(folder, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("pad_token")
    path.write_text(json.dumps(settings))
    tokenizer = data.load_tokenizer(tmp_path)
    assert tokenizer.pad_token == "<end>"
    assert tokenizer(["a", "a b c"], padding=True, return_tensors="pt")["input_ids"].shape[0] == 2


def test_an_id_beyond_the_embedding_is_named(folder):
    tokenizer = data.load_tokenizer(folder)
    data.require_ids_fit(tokenizer, 40, 41)
    with pytest.raises(DataError, match="the token .* has id 40, .* has 40 rows"):
        data.require_ids_fit(tokenizer, 40, 40)
