"""The run in the background, the widgets, and the notebook in a real browser."""

import signal
import threading
import time
from pathlib import Path

import peft
import pytest
from transformers import AutoModelForCausalLM

import onn_core
from onn_workbench.background import BackgroundRun
from onn_workbench.explore import Explorer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def settings(output_dir, **changes):
    fixed = {"data": "chatterbot", "output_dir": str(output_dir), "device": "cpu"}
    fixed |= {"batch_size": 2, "max_steps": 3, "max_length": 64, "progress": False}
    return fixed | changes


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def loads_in_memory(model_dir, adapter_dir):
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    model = peft.PeftModel.from_pretrained(base, adapter_dir)
    return any(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)


def test_a_run_pauses_between_steps_goes_on_saves_and_stops(toy_with_tokenizer, tmp_path):
    seen, steps = [], []

    def watch(run):
        seen.append(run.state)
        steps.append(len(run.record.steps) if run.record else 0)
        if run.state == "running" and steps[-1] == 2 and "pausing" not in seen:
            run.pause()

    config = settings(tmp_path / "run", max_steps=1000, model_dir=str(toy_with_tokenizer))
    run = BackgroundRun(onn_core.TrainConfig(**config), watch)
    run.start()
    until(lambda: run.state == "paused")
    assert run.save_adapter(tmp_path / "saved") and len(run.record.steps) == 3
    assert loads_in_memory(toy_with_tokenizer, tmp_path / "saved")
    run.go_on()
    until(lambda: len(run.record.steps) > 3)
    run.stop()
    run.wait()
    assert run.state == "stopped" and not run.alive
    assert [state for state in seen if state != "running"][:2] == ["pausing", "paused"]
    saved = onn_core.RunRecord.load(tmp_path / "run" / "record.json")
    assert 3 < len(saved.steps) < 1000 and saved.status.startswith("stopped")
    kinds = {what for what, _, start, stop in run.events if stop >= start}
    assert kinds == {"read", "forward", "head", "backward"}


def test_a_run_that_fails_says_why(toy_with_tokenizer, tmp_path):
    config = settings(tmp_path, model_dir=str(toy_with_tokenizer), memory_budget="1KB")
    run = BackgroundRun(onn_core.TrainConfig(**config))
    run.start()
    run.wait()
    assert run.state == "failed" and "memory_budget" in run.error


def test_a_stop_while_paused_or_opening_ends_the_run(toy_with_tokenizer, tmp_path):
    config = settings(tmp_path, model_dir=str(toy_with_tokenizer), max_steps=1000)
    run = BackgroundRun(onn_core.TrainConfig(**config))
    run.start()
    run.stop()
    run.wait()
    assert run.state == "stopped"
    again = BackgroundRun(onn_core.TrainConfig(**config), lambda run: run.pause())
    again.start()
    until(lambda: again.state == "paused")
    again.stop()
    again.wait()
    assert again.state == "stopped" and len(again.record.steps) == 1
    assert threading.active_count() < 10


def test_an_interrupt_while_waiting_stops_the_run(toy_with_tokenizer, tmp_path):
    config = settings(tmp_path, model_dir=str(toy_with_tokenizer), max_steps=1000)
    run = BackgroundRun(onn_core.TrainConfig(**config))
    run.start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(1.0, signal.raise_signal, [signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            run.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    run.wait()
    assert run.state == "stopped"


@pytest.fixture
def explorer(toy_with_tokenizer, tmp_path):
    return Explorer({"toy": str(toy_with_tokenizer)}, **settings(tmp_path), sparse_layers="last:2")


def toggles(explorer):
    return explorer.picture.children[1:-1]


def test_the_picture_and_the_text_of_the_layers_agree(explorer, tmp_path):
    assert [toggle.value for toggle in toggles(explorer)] == [False, True, True]
    assert explorer.predicted["trainable"] == 2 * 8 * (4 * 64 + 3 * 96)
    toggles(explorer)[0].value = True
    toggles(explorer)[2].value = False
    assert explorer.layers.value == "0, 1" and explorer.config.sparse_layers == [0, 1]
    explorer.layers.value = "last:1"
    assert [toggle.value for toggle in toggles(explorer)] == [False, False, True]
    explorer.layers.value = "ends:9"
    assert 'role="alert"' in explorer.status.value and "sparse_layers" in explorer.status.value
    explorer.layers.value = "all"
    assert 'role="alert"' not in explorer.status.value


def test_what_is_predicted_is_what_is_trained(explorer):
    explorer.buttons["start"].click()
    explorer.wait()
    assert explorer.run.state == "finished", explorer.run.error
    assert explorer.run.record.model["trainable"] == explorer.predicted["trainable"]
    assert explorer.run.record.model["trained_layers"] == explorer.trained_layers
    assert len(explorer.past.options) == 1 and not explorer.past.value
    first = explorer.figure.value
    explorer.past.value = explorer.past.options[0]
    assert explorer.figure.value != first
    explorer.buttons["start"].click()
    explorer.wait()
    assert len(explorer.past.options) == 2
    explorer.buttons["save"].click()
    assert (Path(explorer.save_to.value) / "adapter_model.safetensors").is_file()
    bundle = explorer._repr_mimebundle_()
    assert "loss" in bundle["text/html"] and "<img " in bundle["text/html"]
