"""Settings in the forms in which people write them."""

import contextlib
import dataclasses

import pytest
import torch

import onn_core
from onn_core.__main__ import read_settings
from onn_core.adapters.lora import select_layers
from onn_core.config import TrainConfig, dtype_name, parse_bytes, require_integer
from onn_core.errors import ConfigError, OnnError
from onn_core.record import cache_dir


def made(**changes):
    return TrainConfig(**{"model_dir": "m", "data": "d", "output_dir": "o"} | changes)


@pytest.mark.parametrize(
    ("size", "n_bytes"),
    [
        *((None, None), (4096, 4096), (4e9, 4 * 10**9), ("4G", 4 * 10**9), ("4GB", 4 * 10**9)),
        *(("500M", 500 * 10**6), ("1.5 GiB", 3 << 29), ("1 tb", 10**12), (" 2ki ", 2048)),
        *(("100 B", 100), (".5kb", 500)),
    ],
)
def test_memory_sizes(size, n_bytes):
    assert parse_bytes(size) == n_bytes


@pytest.mark.parametrize(
    "size", ["4", "4000000000", "", "GB", "-1GB", "1e9", "4 Gb/s", "0.1B", 0, -1, True, 1e400, []]
)
def test_memory_sizes_that_say_too_little_are_refused_with_the_units(size):
    with pytest.raises(ConfigError, match="unit, such as .*4GB"):
        parse_bytes(size)


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", "torch.bfloat16", torch.bfloat16])
def test_names_of_a_dtype(dtype):
    assert dtype_name(dtype) == made(dtype=dtype).dtype == "bfloat16"


@pytest.mark.parametrize("name", ["completion_only", "packing", "verify_weights", "progress"])
@pytest.mark.parametrize("value", ["yes", 1, None])
def test_a_switch_is_true_or_false(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be true or false"):
        made(**{name: value})


@pytest.mark.parametrize("value", ["lots", -1, True])
def test_a_host_budget_that_says_too_little_is_refused(value):
    with pytest.raises(ConfigError, match="unit, such as"):
        made(host_budget=value)
    assert made(host_budget=0).host_budget == 0 and made().host_budget == "auto"


def test_target_modules_as_text():
    assert made(target_modules="all-linear") == made(target_modules=None)
    assert made(target_modules="q_proj").target_modules == ["q_proj"]
    assert made(target_parameters="experts.down_proj").target_parameters == ["experts.down_proj"]
    with pytest.raises(ConfigError, match="cannot take lora_dropout"):
        made(target_parameters="experts.down_proj", lora_dropout=0.1)


def test_a_home_is_expanded_and_other_paths_are_as_written(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = made(model_dir="~/model", data="~/rows.jsonl", output_dir="runs/", adapter="~")
    assert config.model_dir == str(tmp_path / "model") and config.data == str(
        tmp_path / "rows.jsonl"
    )
    assert config.output_dir == "runs/" and config.adapter == str(tmp_path)
    with pytest.raises(ConfigError, match="home directory that is not known"):
        made(model_dir="~nobody-of-this-name/model")


def test_without_a_home_the_cache_asks_for_a_folder(monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ONN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.expanduser", no_home)
    with pytest.raises(OnnError, match="set ONN_CACHE"):
        cache_dir()


@pytest.mark.parametrize("value", [0, 4, 2.0, True, "2", None])
def test_whole_numbers_within_bounds(value):
    require_integer("chunk_size", 3, at_most=3)
    with pytest.raises(ConfigError, match="chunk_size must be a whole number of 1 to 3, not"):
        require_integer("chunk_size", value, at_most=3)


HOSTILE = [5, -1, 1.5, float("nan"), True, None, "", "xyz", "\0", b"x", [], [None], ["a"], [1, 2]]
HOSTILE += [{}, {"a": 1}, {1}, object(), torch.float32, 10**30, range(3), (1,), "~nobody/x"]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainConfig)])
def test_a_setting_of_any_type_is_taken_or_refused_in_a_sentence(name):
    for value in HOSTILE:
        with contextlib.suppress(OnnError):
            made(**{name: value}).without_paths()


@pytest.mark.parametrize("value", [5, None, 1.5, {}, [True], ["0"], b"0", object], ids=repr)
def test_layers_of_any_type_are_refused_in_a_sentence(value):
    with pytest.raises(ConfigError, match="sparse_layers must be"):
        select_layers(value, 4)


@pytest.mark.parametrize("value", [5, None, 1.5, {}, b"x", "a\0b"], ids=repr)
def test_what_is_no_path_is_refused_in_a_sentence(value):
    for call in (onn_core.from_pretrained, lambda path: onn_core.merge("m", "a", path)):
        with pytest.raises(ConfigError, match="is no path"):
            call(value)


@pytest.mark.parametrize("value", [5, None, "xyz", [None], [made().to_dict()]], ids=str)
def test_runs_that_are_no_settings_are_refused_in_a_sentence(value):
    with pytest.raises(ConfigError, match="takes a list of TrainConfig"):
        onn_core.train_many(value)


def test_numbers_in_a_file_are_those_that_people_write(tmp_path):
    file, text = tmp_path / "run.yaml", "model_dir: m\ndata: 1e-3.txt\noutput_dir: o\n"
    file.write_text(text + "learning_rate: 1e-3\ngrid: {weight_decay: [0, 5E-2, -.5e1]}\n")
    settings = read_settings(file, ["dpo_beta=+2.e-1", "chat_template=e1"])
    assert settings["learning_rate"] == 0.001 and settings["dpo_beta"] == 0.2
    assert settings["grid"] == {"weight_decay": [0, 0.05, -5.0]}
    assert settings["data"] == "1e-3.txt" and settings["chat_template"] == "e1"
