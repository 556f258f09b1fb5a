"""The forms in which people have data: each is read as the same rows, or refused by its name."""

import csv
import gzip
import json

import pytest

import onn_core
from onn_core import data
from onn_core.data.corpus import prepare, with_steps
from onn_core.errors import DataError

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "NA"}
PAIR = {"messages": [USER, ANSWER]}
CALL = {"function": {"name": "f", "arguments": {}}}
FORMS = {
    "Alpaca": {"instruction": "a", "input": "", "output": "NA"},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "NA"}]
    },
    "questions": {"question": "a", "answer": "NA"},
    "TRL": {"prompt": [USER], "completion": [ANSWER]},
    "parts": {"messages": [USER | {"content": [{"type": "text", "text": "a"}]}, ANSWER]},
    "text of a table": {"messages": json.dumps([USER, ANSWER])},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_row(form):
    assert data.load_rows([FORMS[form]]) == [PAIR]
    assert data.load_rows(row for row in [FORMS[form]] * 2) == [PAIR] * 2


def test_what_stands_beside_the_messages_is_learned():
    row = {"system": "S", "instruction": "a", "input": "b", "output": "NA", "tools": [CALL]}
    (made,) = data.load_rows([row])
    assert [turn["content"] for turn in made["messages"]] == ["S", "a\n\nb", "NA"]
    assert made["tools"] == [CALL]
    (made,) = data.load_rows(
        [{"messages": [USER, ANSWER | {"content": None, "tool_calls": [CALL]}]}]
    )
    assert made["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    (made,) = data.load_rows([{"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}])
    assert [turn.get("weight", 1) for turn in made["messages"]] == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "DPOTrainer"),
        ({"prompt": "a", "response": "b", "history": [["c", "d"]]}, '"history"'),
        ({"messages": [USER | {"role": "narrator"}]}, '"narrator" is not known'),
        ({"messages": [USER | {"mood": "good"}, ANSWER]}, '"mood" of a message'),
        ({"messages": [USER | {"content": [{"type": "image"}]}]}, "of type 'image'"),
        ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "weight"),
        ({"prompt": "a", "answer": 4}, "answer is not text"),
        ({"Question": "a", "Answer": "b"}, "or text: it has Question, Answer"),
        ({"text": "a", "images": ["x.png"]}, '"images"'),
        ({"text": "a", "tools": [CALL]}, '"tools"'),
        ({"text": "a", "system": "S"}, '"system"'),
        ({"conversations": [{"from": "human", "value": "a", "content": "b"}]}, '"value" of a'),
        (PAIR | {"tools": [{"function": {"description": "d"}}]}, "must have a name"),
    ],
)
def test_what_is_not_understood_is_named(row, reason):
    with pytest.raises(DataError, match=reason):
        data.load_rows([row])


def test_an_input_alone_is_the_prompt():
    (made,) = data.load_rows([{"instruction": "", "input": "b", "output": "c"}])
    assert made["messages"][0]["content"] == "b"


def test_arrays_and_data_frames():
    numpy, pandas = pytest.importorskip("numpy"), pytest.importorskip("pandas")
    assert data.load_rows([{"messages": numpy.array([USER, ANSWER], dtype=object)}]) == [PAIR]
    frame = pandas.DataFrame([FORMS["questions"] | {"system": None}, FORMS["questions"]])
    assert data.load_rows(frame) == [PAIR] * 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.json", '{"version": "1, [", "data": [{"question": "a", "answer": "NA"}], "n": [1]}'),
        ("x.csv", "question;answer\na;NA\n"),
        ("x.csv", "question\tanswer\na\tNA\n"),
    ],
)
def test_objects_with_data_and_other_separators(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    assert data.load_rows(tmp_path / name) == [PAIR]


def test_files_that_are_not_read_are_named(tmp_path):
    write(tmp_path / "x.json", [FORMS["questions"]])
    for name in ("notes.docx", "LICENSE", "dataset_info.json", ".hidden.py"):
        (tmp_path / name).write_text("x")
    unused = set()
    assert list(data.read_rows(tmp_path, unused)) == [PAIR]
    assert unused == {"file notes.docx"}


def write(path, rows):
    kind, open_ = path.name.lower(), gzip.open if path.suffix == ".gz" else open
    with open_(path, "wt", newline="") as file:
        if ".csv" in kind:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            as_lines = ".jsonl" in kind or ".ndjson" in kind or "lines" in kind
            file.write("\n".join(map(json.dumps, rows)) if as_lines else json.dumps(rows, indent=1))


NAMES = [
    "x.json",
    "lines.json",
    "x.jsonl",
    "X.JSONL",
    "x.ndjson",
    "x.csv",
    "x.csv.gz",
    "x.jsonl.gz",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_form_of_a_file(tmp_path, name):
    write(tmp_path / name, [{"question": "a", "answer": "NA"}] * 3)
    (tmp_path / "README.md").write_text("About the data.")
    for given in (tmp_path / name, str(tmp_path)):
        assert data.load_rows(given) == [PAIR] * 3


def test_parquet_and_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    talk = {"messages": [USER, ANSWER | {"content": None, "tool_calls": [CALL | {"id": "1"}]}]}
    dataset = datasets.Dataset.from_list([PAIR, {"messages": [USER, ANSWER]}])
    dataset.to_parquet(tmp_path / "x.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    assert data.load_rows(tmp_path / "x.parquet") == [PAIR] * 2
    assert data.load_rows(str(tmp_path / "saved")) == [PAIR] * 2
    assert data.load_rows([talk])[0]["messages"][1]["tool_calls"] == [CALL | {"id": "1"}]


def test_a_large_array_is_read_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr("onn_core.data.rows.BLOCK", 7)
    write(tmp_path / "x.json", [{"text": f"number {i}, [{i}]"} for i in range(20)])
    rows = data.load_rows(tmp_path / "x.json")
    assert [row["text"] for row in rows] == [f"number {i}, [{i}]" for i in range(20)]
    (tmp_path / "x.json").write_text('[{"text": "a"}, {"text": ')
    with pytest.raises(DataError, match="row 2 is not JSON"):
        data.load_rows(tmp_path / "x.json")


def test_nothing_is_fetched():
    for name in ("tatsu-lab/alpaca", "https://example.com/x.jsonl", "hf://datasets/a/b"):
        with pytest.raises(DataError, match="never fetched"):
            data.load_rows(name)


def test_epochs_and_steps(tmp_path):
    def made(**settings):
        return onn_core.TrainConfig(model_dir="m", data="d", output_dir="o", **settings)

    assert made().max_steps == 100 and made(max_steps=100, num_train_epochs=2).max_steps == 100
    epochs = made(num_train_epochs=1.5, batch_size=4, gradient_accumulation_steps=2)
    assert epochs.max_steps is None
    steps, n_samples = with_steps(epochs, 17)
    assert (steps.max_steps, n_samples) == (4, 26)  # 25.5 samples of 8 a step
    assert with_steps(made(num_train_epochs=1.1, batch_size=1), 10)[1] == 11  # 11.000000000000002
    assert with_steps(made(max_steps=3, num_train_epochs=2), 10)[1] is None
    assert made(max_steps=None, num_train_epochs=1).max_steps is None
    assert made(max_steps=None).max_steps == 100


def test_what_is_cut_is_said(smollm2_dir, capfd):
    rows = [{"prompt": "word " * 2 * i, "response": "yes " * 30} for i in range(40)]
    rows.append({"messages": [USER], "source": "web"})
    rows.append({"question": "a", "answer": " "})
    given = {"model_dir": str(smollm2_dir), "data": rows, "output_dir": "o", "max_length": 80}
    for _ in range(2):  # the second time from the cache
        prepare(onn_core.TrainConfig(**given), data.load_tokenizer(smollm2_dir))
        said = capfd.readouterr().err
        assert "of 42 rows were cut at max_length 80" in said and "would keep 95 % whole" in said
        assert "2 of 42 rows were dropped" in said and "not used: column source" in said


def test_a_big_group_does_not_swallow_the_split():
    rows = [(prompt, answer) for prompt in range(50) for answer in range(200 if prompt == 3 else 2)]
    examples = [data.Example([p, p, a], [-100, -100, a]) for p, a in rows]
    for seed in range(20):
        train, held_out = data.split(examples, 0.1, seed)
        assert abs(len(held_out) - 0.1 * len(examples)) <= 3
        assert not {e.input_ids[0] for e in train} & {e.input_ids[0] for e in held_out}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "prompt,response\nhi,yes, sure\n", "more cells than the header"),
        ("x.csv", "prompt,response,response\nhi,yes,no\n", "twice"),
        ("x.json", '[{"prompt": "a", "response": "b"}]\n[]', "goes on after its array"),
        ("x.json", '{\n "prompt": "a",\n "response": "b"\n}', "is one object"),
        (
            "x.jsonl",
            '{"messages": [{"role": "user", "content": [{"type": "text", "value": "a"}]}]}',
            "without its text",
        ),
    ],
)
def test_what_would_be_dropped_is_refused(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        list(data.read_rows(str(tmp_path / name)))


def test_a_folder_with_a_test_file_is_refused(tmp_path):
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a", "response": "b"}')
    with pytest.raises(DataError, match="test.jsonl"):
        list(data.read_rows(str(tmp_path)))
