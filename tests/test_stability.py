"""Where a NaN comes from, on the real model in float16; and what loss scaling must not lose."""

import dataclasses
import json

import pytest
import torch
from toy import difference, in_memory, step, streamed, toy_batch, toy_dir, with_lora

from onn_core import data
from onn_core.errors import OnnError
from onn_workbench import stability, stability_report
from onn_workbench.stability import BROKEN, SOUND


@pytest.fixture(scope="module")
def study(smollm2_dir):
    ids = [504, 2141, 314, 260, 1029]
    batch = data.collate([data.Example(ids, [-100, *ids[1:]])])
    study = stability.Study(str(smollm2_dir), batch, "float16", sparse_layers="ends:1")
    yield study
    study.close()


def test_the_broken_configuration_overflows_at_the_last_layer(study):
    outcome = study.run(BROKEN, 3)
    loss, backward, gradient, update = outcome.first
    assert (loss.phase, loss.value, loss.step) == ("loss", "Inf", 1)
    assert (backward.phase, backward.layer, backward.tensor) == ("backward", 29, "output")
    assert 1e4 < backward.largest < 65504
    assert (gradient.layer, update.layer) == (0, 0)
    assert not outcome.adapter_finite and not outcome.learned and len(outcome.steps) == 1


def test_float16_adapters_become_nan_in_the_optimizer_alone(study):
    narrow = dataclasses.replace(SOUND, adapter_float32=False)
    outcome = study.run(narrow, 3)
    assert [event.phase for event in outcome.first] == ["update"]
    assert torch.tensor(outcome.steps[0]["grad_norm"]).isfinite()


def test_scaling_skips_every_step_of_a_raw_sum(study):
    outcome = study.run(dataclasses.replace(BROKEN, scaling=True), 3)
    assert outcome.adapter_finite and outcome.steps_skipped == 3
    assert [s["loss_scale"] for s in outcome.steps] == [
        stability.FIRST_SCALE / 2**i for i in (0, 1, 2)
    ]


def test_a_proper_loss_and_float32_adapters_learn_and_are_read_back(study, tmp_path):
    outcomes = {"sound": study.run(SOUND, 2), "broken": study.run(BROKEN, 2)}
    assert outcomes["sound"].learned and not outcomes["sound"].first
    assert outcomes["sound"].largest_by_layer["forward"].keys() == set(range(30))
    path = tmp_path / "stability.json"
    stability_report.save(path, outcomes, more=[1])
    back = stability_report.load(path)
    assert str(back) == str(outcomes)  # NaN is not equal to itself
    content = json.loads(path.read_text())
    assert content["schema_version"] == 1 and content["more"] == [1]
    path.write_text(json.dumps(content | {"schema_version": 99}))
    with pytest.raises(OnnError, match="schema 99"):
        stability_report.load(path)
    with pytest.raises(OnnError, match="run it again"):
        stability_report.load(tmp_path / "absent.json")


def test_a_run_begins_from_the_same_adapters(study):
    first, again = study.run(SOUND, 1), study.run(SOUND, 1)
    assert first.steps == again.steps
    with pytest.raises(OnnError, match="bfloat16"):
        study.run(dataclasses.replace(SOUND, dtype="bfloat16"), 1)


def test_tables_say_which_fix_decides(study):
    outcomes = {label: study.run(v, 1) for label, v in stability.variants().items()}
    rows = stability_report.fix_table(outcomes).to_numpy().tolist()
    assert rows == [
        ["none", "NaN", "learns"],
        ["LoRA kept in float32", "NaN", "NaN"],
        ["inputs cast to float32", "NaN", "learns"],
        ["a proper loss", "NaN", "skips every step"],
        ["gradient scaling", "skips every step", "learns"],
    ]
    table = stability_report.outcome_table(outcomes)
    assert table.loc["broken", "first NaN or Inf"] == "step 1: sum loss is Inf"
    assert table.loc["sound", "steps skipped"] == "0 of 1"
    events = stability_report.event_table(outcomes["broken"].first)
    assert events.loc["loss", "largest before"] == "none" and len(events) == 4


def test_gradients_of_large_batches_are_lost_without_a_scale():
    exact, narrow = (
        stability.Study(str(toy_dir("llama")), toy_batch(), dtype)
        for dtype in ("float32", "float16")
    )
    errors = stability.gradient_errors(narrow, exact, [10, 10**7], [1.0, 2.0**10])
    found = [error["error"] for error in errors]
    assert max(found[:2]) < 0.05 < 0.5 < found[2] and found[3] < found[2]
    table = stability_report.error_table(errors)
    assert list(table.index) == ["10", "10,000,000"] and len(table.columns) == 2


def test_loss_scale_lifts_gradients_that_float16_would_lose():
    """The mean over many counted tokens: scaled before it is rounded, even at one block of head."""
    batch = toy_batch() | {"num_items_in_batch": 10**7}
    want = step(with_lora(in_memory(toy_dir("llama"))), batch)[1]
    errors = []
    for scale in (1.0, 2.0**16):
        model = with_lora(streamed(toy_dir("llama"), dtype="float16"))
        (model(**batch).loss * scale).backward()
        found = {n: p.grad.float() / scale for n, p in model.named_parameters() if p.requires_grad}
        errors.append(max(difference(found[name], want[name]) for name in want))
    assert errors[1] < 0.05 < 0.5 < errors[0]
