"""Datasets in memory, packing with attention kept within each row, cached tokenization."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from toy import assert_same, in_memory, step, streamed, toy_dir, with_lora
from transformers import AutoTokenizer

import onn_core
from onn_core import data
from onn_core.data.corpus import prepare, require_packing
from onn_core.errors import OnnError

ROWS = [{"prompt": f"Count to {n}.", "response": "one two three " * n} for n in range(1, 8)]


def config(folder, **changes):
    fixed = {"model_dir": str(folder), "data": ROWS, "output_dir": "out", "max_length": 48}
    return onn_core.TrainConfig(**fixed | {"device": "cpu", "progress": False} | changes)


# ---- packing


def rows_of(*lengths):
    """Examples of random tokens whose first label is never counted."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]
    return [data.Example(ids, [-100, *ids[1:]]) for ids in rows]


def test_pack_keeps_every_row_whole_and_fills_samples():
    rows = rows_of(5, 3, 9, 2, 2, 7, 10, 1)
    packed = data.pack(rows, 10)
    assert len(packed) == 4 and all(len(sample.input_ids) <= 10 for sample in packed)
    found = []
    for sample in packed:
        start = 0
        for length in sample.lengths:
            part = slice(start, start := start + length)
            found.append(data.Example(sample.input_ids[part], sample.labels[part]))
        assert start == len(sample.input_ids)
    assert sorted(found, key=str) == sorted(rows, key=str)
    assert list(data.pack(rows, 10)) == list(packed)


def test_positions_begin_again_with_every_row_and_with_padding():
    batch = data.collate(data.pack(rows_of(4, 3, 5), 7))
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 3, 0, 1, 2]]
    assert "attention_mask" not in batch


@pytest.mark.parametrize("micro_batch_size", [None, 1])
@pytest.mark.parametrize(
    "family", ["llama", "phi3", "qwen2", "gemma2", "gpt2", "gpt_neox", "mixtral"]
)
def test_packed_gradients_equal_unpacked(family, micro_batch_size):
    """The loss and every gradient, to the roundings of float32 sums of other lengths."""
    rows = rows_of(6, 5, 9, 3, 2, 8)
    packed = data.pack(rows, 16)
    assert len(packed) == 3 and max(len(sample.lengths) for sample in packed) > 1
    folder = toy_dir(family)
    model = streamed(folder, micro_batch_size=micro_batch_size)
    require_packing(model)
    model = with_lora(model)
    unpacked = step(with_lora(in_memory(folder)), data.collate(rows))
    assert_same(step(model, data.collate(packed)), unpacked, 1e-5)


def test_without_restarted_positions_the_loss_differs():
    """The control: rows put together as one text see each other."""
    packed = data.pack(rows_of(6, 5, 5), 16)
    batch = data.collate(packed)
    whole = {name: batch[name] for name in ("input_ids", "labels")}
    model = streamed(toy_dir("llama"))
    with torch.no_grad():
        losses = [float(model(**inputs).loss) for inputs in (batch, whole)]
    assert abs(losses[0] - losses[1]) > 1e-2


def test_family_that_ignores_positions_is_refused(tmp_path):
    sizes = {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    model = transformers.BloomForCausalLM(transformers.BloomConfig(**sizes))
    model.save_pretrained(tmp_path)
    with pytest.raises(OnnError, match="bloom does not keep the attention"):
        require_packing(streamed(tmp_path))


def test_packed_run_trains_on_fewer_samples(toy_with_tokenizer, tmp_path):
    settings = {"output_dir": str(tmp_path), "batch_size": 2, "max_steps": 2, "lora_rank": 2}
    settings |= {"held_out_fraction": 0.0, "max_length": 128}
    records = [
        onn_core.ChunkedLoraTrainer(config(toy_with_tokenizer, **settings, packing=packing)).train()
        for packing in (False, True)
    ]
    plain, packed = (record.data for record in records)
    assert packed["packed_rows"] == plain["train"] == 7 > packed["train"]
    counted = [sum(step.counted_tokens for step in record.steps) for record in records]
    assert counted[1] > counted[0] and all(step.loss > 0 for step in records[1].steps)
    assert records[1].config["data"] == "list of 7 rows"


# ---- rows in memory


def test_rows_in_memory_equal_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "name": "x"}]
    rows = [*ROWS, {"text": "plain"}, {"messages": turns}, {"prompt": "a", "completion": "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert data.load_rows(rows) == data.load_rows(str(path))


def test_hugging_face_dataset_equals_a_list():
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    assert data.load_rows(dataset) == data.load_rows(ROWS)
    settings = {"model_dir": "m", "output_dir": "o"}
    made = onn_core.TrainConfig(data=dataset, **settings)
    assert made.to_dict()["data"] == "Dataset of 7 rows"
    stream = dataset.to_iterable_dataset()
    assert data.load_rows(stream) == data.load_rows(ROWS)
    assert onn_core.TrainConfig(data=stream, **settings).to_dict()["data"] == "IterableDataset"
    with pytest.raises(OnnError, match="choose a split"):
        onn_core.TrainConfig(data=datasets.DatasetDict({"train": dataset}), **settings)


@pytest.mark.parametrize("wrong", [{"train": ROWS}, 3, b""])
def test_what_is_not_rows_is_refused(wrong):
    with pytest.raises(OnnError, match="choose a split|data"):
        data.load_rows(onn_core.TrainConfig(model_dir="m", data=wrong, output_dir="o").data)


def test_half_a_character_is_refused():
    with pytest.raises(OnnError, match="row 1 of data holds half"):
        data.load_rows([{"text": "a\ud800b"}])


@pytest.mark.parametrize("row", [{}, 3, {"prompt": 1, "response": "x"}, {"messages": []}])
def test_wrong_row_is_named(row):
    with pytest.raises(OnnError, match="row 2 of data needs"):
        data.load_rows([ROWS[0], row])


# ---- the cache


def test_tokens_are_cached_until_something_changes(smollm2_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("ONN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    for path in smollm2_dir.glob("*token*"):
        shutil.copy(path, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def cached(**changes):
        corpus = prepare(config(folder, **changes), tokenizer)
        assert corpus.facts["tokenize_s"] >= 0
        return corpus.facts["tokens_cached"], list(corpus.train), list(corpus.held_out)

    first, again = cached(), cached()
    assert not first[0] and again[0] and first[1:] == again[1:]
    assert not cached(data=ROWS[:-1])[0] and not cached(max_length=47)[0]
    entries = sorted((tmp_path / "cache/tokens").iterdir())
    assert len(entries) == 3
    for path in entries:  # damaged: done without, and written again
        path.write_bytes(path.read_bytes()[:-9])
    damaged, mended = cached(), cached()
    assert not damaged[0] and mended[0] and damaged[1:] == mended[1:] == first[1:]
    with (folder / "tokenizer_config.json").open("a") as file:
        file.write("\n")
    assert not cached()[0]


def test_cache_that_cannot_be_written_is_done_without(smollm2_dir, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ONN_CACHE", str(tmp_path / "file"))
    corpus = prepare(config(smollm2_dir), AutoTokenizer.from_pretrained(smollm2_dir))
    assert not corpus.facts["tokens_cached"] and corpus.train


# ---- memory

BUDGET_BYTES = 400 * 10**6
# Runs in its own process: the peak of all it does beyond what its libraries take.
CHILD = """
import gc, json, sys, time
import peft, torch, transformers.models.llama.modeling_llama
import onn_core
from onn_core.memory.process import memory_bytes

gc.collect()
started, before = time.perf_counter(), memory_bytes()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
record = onn_core.ChunkedLoraTrainer(onn_core.TrainConfig(**json.loads(sys.argv[1]))).train()
found = {"peak_bytes": memory_bytes("VmHWM") - before, "steps": len(record.steps)}
print(json.dumps(found | {"seconds": time.perf_counter() - started, "data": record.data}))
"""


@pytest.mark.heavy
def test_a_corpus_of_a_gigabyte_trains_within_the_budget(toy_with_tokenizer, tmp_path):
    talk = [turn["content"] for row in data.load_rows("chatterbot") for turn in row["messages"]]
    words = " ".join(talk).split() * 200
    path, number = tmp_path / "corpus.jsonl", 0
    with path.open("w") as file:
        while file.tell() < 10**9:
            n_words = 10**6 if number % 100_000 == 0 else 50 + number * 31 % 300  # some are books
            start = number * 7919 % (len(words) - n_words)
            text = " ".join([str(number), *words[start : start + n_words]])
            file.write(json.dumps({"text": text}) + "\n")
            number += 1
    made = config(toy_with_tokenizer, data=str(path), output_dir=str(tmp_path / "out"))
    made = made.to_dict() | {"memory_budget": BUDGET_BYTES, "batch_size": 4, "max_steps": 2}
    found = json.loads(
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", CHILD, json.dumps(made | {"max_length": 128})],
            env=os.environ | {"ONN_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
    )
    print(found)
    path.unlink(), shutil.rmtree(tmp_path / "cache")
    assert found["steps"] == 2 and found["peak_bytes"] <= BUDGET_BYTES
