"""The benchmark on the real pretrained model: its runs, its limits, its record, its pages."""

import json

import pytest

from onn_core.errors import ConfigError, OnnError
from onn_core.weights import random_model
from onn_workbench import bench, speed
from onn_workbench.ceilings import Ceilings


def test_runs_are_read():
    assert [str(run) for run in bench.parse_runs("onn:1, mapped:32,onn:2x64@4", 16)] == [
        *("onn:1x16", "mapped:32x16", "onn:2x64@4")
    ]


@pytest.mark.parametrize("text", ["", "onn", "onn:0", "onn:1@0", "other:1", "onn:1;rm"])
def test_what_is_no_run_is_refused(text):
    with pytest.raises(ConfigError, match="SYSTEM:BATCH"):
        bench.parse_runs(text, 16)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    runs = bench.parse_runs("onn:2,baseline:1,mapped:2,onn:2@2,onn:1@31", 16)  # one layer too many
    with bench.first_layers(random_model.prepare("smollm2"), 6) as folder:
        found = bench.benchmark(folder, runs, cap=4 << 30, n_steps=1)
    path = tmp_path_factory.mktemp("bench") / "training_benchmark.json"
    bench.write_json(path, found)
    return path


def test_systems_train_alike_and_rows_say_what_was_done(record):
    result = speed.load_benchmark(record)
    assert list(result["failed"]) == ["onn:1x16@31"]
    onn, baseline, mapped, shallow = result["rows"]
    assert onn["losses"] == pytest.approx(mapped["losses"], rel=2e-2)  # bf16, equal random ids
    assert baseline["bytes_read"] > onn["bytes_read"] == 0  # all of it stays in the budget
    assert (onn["layers"], shallow["layers"]) == (6, 2)
    assert {what for what, *_ in onn["timeline"]} == {"forward", "head", "backward"}
    for row in result["rows"]:
        assert row["peak_memory_bytes"] < result["budget_bytes"]
        limits = [row["limit_read_s"], row["limit_compute_s"]]
        assert row["percent_of_limit"] == pytest.approx(100 * max(limits) / row["step_s"])


def test_a_run_is_disturbed_if_what_limits_its_steps_has_changed():
    before = Ceilings(2e9, {16: 1e11, 512: 8e11}, copy_bytes_per_s=5e10)
    slower = Ceilings(1.7e9, {16: 0.5e11, 512: 6e11}, copy_bytes_per_s=2e10)
    assert not before.disturbed(slower, {"read"})  # by less than a quarter
    for limit in (16, 512, "copy"):
        assert before.disturbed(slower, {"read", limit}) and slower.disturbed(before, {limit})


def test_tables_and_verdict_come_from_the_record(record):
    result = speed.load_benchmark(record)
    assert len(speed.speed_table(result)) == 4
    assert len(speed.ratio_table(result)) == 2  # the shallow run is compared with nothing
    assert "the best peer" in speed.headline(result)
    assert "NOT COMPARABLE (no batch of 32 to 128 beside a baseline" in speed.reading(result)
    baseline = [row for row in result["rows"] if row["system"] == "mapped"]
    assert speed.reading(result | {"rows": baseline}).endswith("no verdict.")


def test_another_schema_is_refused(record, tmp_path):
    other = json.loads(record.read_text()) | {"schema_version": 99}
    path = tmp_path / "other.json"
    path.write_text(json.dumps(other))
    with pytest.raises(OnnError, match="measure again"):
        speed.load_benchmark(path)


def test_a_failed_run_is_named_with_its_reason(record):
    assert "layers.30" in speed.load_benchmark(record)["failed"]["onn:1x16@31"]
