"""The run in the background, and the widgets, without a browser."""

import json
import signal
import threading
import time
from pathlib import Path

import peft
import pytest
import torch
from small import adapter, numbers, write_small
from transformers import AutoModelForCausalLM

import onn_core
from onn_core import data
from onn_core.__main__ import read_settings
from onn_core.evaluate import token_losses
from onn_workbench import live, panels, preview, runs
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
    seen, steps, alive = [], [], {}

    def watch(run):
        seen.append(run.state)
        alive[run.state] = run.alive  # what is told to have ended can be merged, or followed
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
    assert {state for state in alive if not alive[state]} == {"stopped"}
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


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("small"), max_position_embeddings=512)


@pytest.fixture
def explorer(small, tmp_path):
    own = settings(tmp_path / "runs", data=str(small[1]), batch_size=4)
    return Explorer({"toy": str(small[0])}, **own, sparse_layers="last:2")


def toggles(explorer):
    return explorer.picture.children


def finish(explorer):
    explorer.buttons["start"].click()
    explorer.wait()
    assert explorer.run.state == "finished", explorer.run.error


def do(panel, text, state='role="status"'):
    """Press the only button of a panel and wait for what it shows."""
    panels.guarded(panel.act, panel.out)
    assert text in panel.out.value and state in panel.out.value, panel.out.value
    return panel.out.value


def test_the_picture_and_the_text_of_the_layers_agree(explorer):
    assert [toggle.value for toggle in toggles(explorer)] == [False, True, True]
    assert explorer.predicted["trainable"] == 2 * 8 * (4 * 64 + 3 * 96)
    toggles(explorer)[0].value = True
    toggles(explorer)[2].value = False
    assert explorer.layers.value == "0, 1" and explorer.config.sparse_layers == [0, 1]
    explorer.layers.value = "last:1"
    assert [toggle.value for toggle in toggles(explorer)] == [False, False, True]


WRONG = (
    ("lora_rank", "0", "lora_rank must be a whole number of at least 1, not 0"),
    ("lora_rank", "abc", "not &#x27;abc&#x27;"),
    ("learning_rate", "fast", "not &#x27;fast&#x27;"),
    ("memory_budget", "4", "memory_budget 4 has no unit"),
    ("memory_budget", "much", "memory size"),
    ("memory_budget", "1KB", "memory_budget"),
    ("data", "nowhere.jsonl", "nowhere.jsonl is not there"),
    ("sparse_layers", "ends:9", "sparse_layers must be"),
    ("sparse_layers", "first", "sparse_layers must be"),
    ("sparse_layers", "", "sparse_layers must be"),
)


def test_a_wrong_setting_is_told_at_once_and_its_mending_is_seen(explorer):
    for name, text, said in WRONG:
        field = explorer.fields.get(name, explorer.layers)
        before, field.value = field.value, text
        assert field.value == text
        shown = explorer.prediction.value
        assert 'role="alert"' in shown and said in shown and "Trainable" not in shown
        explorer.buttons["start"].click()  # that cannot be, and leaves nothing
        assert 'role="alert"' in explorer.status.value and explorer.run is None
        steps, explorer.fields["max_steps"].value = explorer.fields["max_steps"].value, "many"
        assert "alert" not in explorer.status.value  # it was of what was chosen before
        explorer.fields["max_steps"].value = steps
        field.value = before
        assert "Trainable" in explorer.prediction.value
    assert "alert" not in explorer.prediction.value + explorer.status.value
    assert not list(Path(explorer.settings["output_dir"]).glob("*"))


def test_what_is_predicted_is_what_is_trained(explorer):
    finish(explorer)
    assert explorer.run.record.model["trainable"] == explorer.predicted["trainable"]
    assert explorer.run.record.model["trained_layers"] == explorer.trained_layers
    assert "GB/s" in explorer.status.value and "waiting" in explorer.status.value
    assert explorer.files == ["adapter", "checkpoints", "record.json", "settings.yaml"]
    explorer.buttons["save"].click()
    assert (Path(explorer.save_to.value) / "adapter_model.safetensors").is_file()
    bundle = explorer._repr_mimebundle_()
    assert "loss" in bundle["text/html"] and "<img " in bundle["text/html"]


def test_a_run_that_cannot_begin_leaves_the_one_before(explorer):
    finish(explorer)
    before = explorer.run
    explorer.fields["max_length"].value = "600"  # the model's context is 512
    explorer.buttons["start"].click()
    until(lambda: "context" in explorer.status.value)
    until(lambda: explorer.run is before)
    assert not explorer.buttons["save"].disabled and not explorer.buttons["start"].disabled
    root = Path(explorer.settings["output_dir"])
    until(lambda: sorted(path.name for path in root.iterdir()) == ["1"])


def test_a_new_explorer_watches_the_run_that_goes_on(explorer, small):
    explorer.fields["max_steps"].value = "1000"
    explorer.start()
    until(lambda: explorer.run.record and explorer.run.record.steps)
    again = Explorer({"toy": str(small[0])}, **explorer.settings)
    assert again.run is explorer.run and "running" in again.badge.value
    assert again.first_run() is not None and again.run.alive  # it does not begin or await one
    again.fields["max_length"].value = "48"  # nor does a prediction disturb it
    steps = len(again.run.record.steps)
    until(lambda: len(again.run.record.steps) > steps)
    assert "not measured during a run" in again.prediction.value
    assert again.buttons["start"].disabled
    again.stop()
    again.wait()
    assert again.run.state == "stopped" and "stopped" in again.badge.value


def test_the_data_is_shown_with_what_is_learned_cut_and_dropped(explorer, tmp_path):
    rows = [
        {"prompt": "one and two?", "response": "It is three."},
        {"prompt": "one and two?", "response": "three " * 100},
        {"prompt": "why " * 100, "response": "No."},
        {"messages": [{"role": "user", "content": "<b>hello</b>"}]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    explorer.fields["data"].value = str(path)
    shown = do(explorer.data, f"<b>4</b> rows of {path}: <b>2</b> cut")
    assert "<b>2</b> dropped" in shown and "&lt;b&gt;hello" in shown and "<b>hello" not in shown
    config, tokenizer = explorer.config, preview.tokenizer_of(explorer.config)
    found = list(preview.rows(config, tokenizer))
    assert [row.kind for row in found] == ["whole", "cut", "dropped", "dropped"]
    assert "".join(text for _, text in found[0].pieces).strip() == "one and two?\nIt is three.<end>"
    assert dict(found[0].pieces)["learned"].strip().startswith("It is three.")
    examples = data.tokenize(data.read_rows(str(path)), tokenizer, config.max_length).examples
    learned = [sum(label != data.IGNORED for label in x.labels) for x in examples]
    assert [row.n_learned for row in found if not row.why] == learned
    explorer.data.kind.value = "cut"
    assert "row 2:" in do(explorer.data, "line-through") and "row 1:" not in explorer.data.out.value


def test_the_table_sorts_draws_and_continues(explorer):
    for rank in ("4", "8"):
        explorer.fields["lora_rank"].value = rank
        explorer.fields["max_steps"].value = "1000" if rank == "8" else "3"
        explorer.start()
        until(lambda: explorer.run.record and len(explorer.run.record.steps) > 1)
        if rank == "8":
            until(lambda: len(explorer.run.record.steps) > 3)
            explorer.stop()
        explorer.wait()
    table = explorer.runs
    assert [row["run"] for row in table.shown] == ["runs/1", "runs/2"]
    assert [row["state"] for row in table.shown] == ["finished", "stopped"]
    assert "lora_rank 4" in table.shown[0]["settings that differ"]
    assert table.shown[0]["held-out before"] > 0 and table.shown[0]["% of limit"] > 0
    table.sort("steps"), table.sort("steps")
    assert [row["run"] for row in table.shown] == ["runs/2", "runs/1"]
    table.checks["runs/1"].value = table.checks["runs/2"].value = True
    assert "runs/1: loss" in explorer.figure.value and "run 2: loss" in explorer.figure.value
    assert "runs/2: loss" not in explorer.figure.value  # it is the present one
    assert "runs/2</td>" in table.html() and table.html().count("<tr>") == 3
    done = len(explorer.run.record.steps)
    explorer.go_on_with(explorer.past["runs/2"])
    until(lambda: explorer.run.record and len(explorer.run.record.steps) > done)
    explorer.stop()
    explorer.wait()
    assert explorer.run.state == "stopped" and explorer.run.config.output_dir.endswith("2")


def test_losses_of_other_held_out_samples_have_axes_of_their_own(explorer):
    finish(explorer)
    one = explorer.run.record
    same, other = one.from_dict(one.to_dict()), one.from_dict(one.to_dict())
    other.config["max_length"] += 1
    panels = [panel for row in live.figure({"a": one, "b": same, "c": other}).rows for panel in row]
    losses = [[line.label for line in panel.parts] for panel in panels if "loss" in panel.y]
    assert [{label[0] for label in labels} for labels in losses] == [{"a", "b"}, {"c"}]


def test_a_paused_run_answers_and_goes_on_as_if_nothing_was_asked(small, tmp_path):
    common = settings(tmp_path / "alone", data=str(small[1]), batch_size=4, max_steps=6)
    common |= {"lora_dropout": 0.2, "eval_every": 2, "model_dir": str(small[0])}
    onn_core.ChunkedLoraTrainer(onn_core.TrainConfig(**common)).train()
    common.pop("model_dir")
    explorer = Explorer({"toy": str(small[0])}, **common | {"output_dir": str(tmp_path / "runs")})
    explorer.run = BackgroundRun(
        onn_core.TrainConfig(**explorer.config.to_dict() | {"output_dir": str(tmp_path / "asked")}),
        lambda run: run.pause() if run.record and len(run.record.steps) == 2 else None,
    )
    explorer.run.start()
    until(lambda: explorer.run.state == "paused")
    explorer.ask.n_tokens.value = "3"
    assert "with the adapter" in do(explorer.ask, "answers to")
    assert "before, " in do(explorer.tokens, "held-out samples")
    explorer.run.on_change = lambda run: None
    explorer.run.go_on()
    explorer.wait()
    ours, theirs = adapter(tmp_path / "asked"), adapter(tmp_path / "alone")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert numbers(tmp_path / "asked") == numbers(tmp_path / "alone")
    do(explorer.ask, "answers to")  # of the run that has ended, too


def test_token_losses_are_those_of_the_perplexity(small, explorer):
    finish(explorer)
    model = onn_core.from_pretrained(small[0], device="cpu")
    model = onn_core.load_adapter(model, Path(explorer.run.config.output_dir) / "adapter")
    tokenizer = data.load_tokenizer(small[0])
    examples = data.tokenize(data.read_rows(str(small[1])), tokenizer, 128).examples
    losses = token_losses(model, tokenizer, examples, batch_size=7)
    assert all(own.shape == (2, len(x.input_ids)) for own, x in zip(losses, examples, strict=True))
    for own, example in zip(losses, examples, strict=True):
        counted = torch.tensor(example.labels) != data.IGNORED
        assert (own[:, ~counted] == 0).all() and (own[:, counted] > 0).all()
    whole = onn_core.perplexity(model, tokenizer, str(small[1]))
    with_and_without = torch.cat(losses, 1).double().sum(1) / whole.tokens
    expected = torch.tensor([whole.loss, whole.base_loss]).double()
    assert torch.allclose(with_and_without, expected, rtol=1e-6)


def test_a_run_is_merged_and_written_as_yaml_and_python(explorer, tmp_path):
    do(explorer.export, "no run has begun", 'role="alert"')
    finish(explorer)
    explorer.export.into.value = str(tmp_path / "merged")
    do(explorer.export, "merged into")
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    do(explorer.export, "exists already", 'role="alert"')
    config = explorer.config
    path = tmp_path / "run.yaml"
    path.write_text(runs.to_yaml(config))
    assert onn_core.TrainConfig(**read_settings(path, ())) == config
    made = {}
    exec(runs.to_python(config).rpartition("record =")[0], made)
    assert made["config"] == config
    shown = explorer.export.texts.value
    assert "copy as YAML" in shown and "progress" not in shown
    assert f"output_dir: {Path(config.output_dir).resolve() / 'by_command'}\n" in shown


def test_a_sweep_is_started_watched_and_in_the_table(explorer):
    explorer.sweep.grid.value = "rank: 4"
    do(explorer.sweep, "rank is no setting", 'role="alert"')
    explorer.sweep.grid.value = "learning_rate: [1e-3, 2e-3]"  # which YAML takes for text
    do(explorer.sweep, "2 runs")
    do(explorer.ask, "choose one of them", 'role="alert"')
    assert explorer.run.record is None or "2 runs" in explorer.status.value
    explorer.wait()
    assert explorer.run.state == "finished", explorer.run.error
    assert list(explorer.run.records) == ["learning_rate=0.001", "learning_rate=0.002"]
    names = ["runs/1/learning_rate=0.001", "runs/1/learning_rate=0.002"]
    assert [row["run"] for row in explorer.runs.shown] == names
    assert "run learning_rate=0.002: loss" in explorer.figure.value
    explorer.ask.refresh()
    explorer.ask.of.value = names[1]
    do(explorer.ask, "answers to")


def test_runs_of_a_sweep_that_cannot_begin_are_told_and_leave_nothing(explorer):
    explorer.sweep.grid.value = "sparse_layers: ['last:2', 'ends:9']"
    do(explorer.sweep, "sparse_layers must be", 'role="alert"')
    explorer.sweep.grid.value = "max_length: [600, 700]"  # the model's context is 512
    do(explorer.sweep, "2 runs")
    until(lambda: "context" in explorer.status.value and explorer.run is None)
    until(lambda: not list(Path(explorer.settings["output_dir"]).iterdir()))
    explorer.sweep.grid.value = "max_length: [8, 600]"
    do(explorer.sweep, "2 runs")
    explorer.wait()
    assert explorer.run.state == "finished" and list(explorer.run.records) == ["max_length=8"]
    assert "finished: 2 runs" in explorer.status.value
    assert "max_length=600 stopped: max_length of 600" in explorer.status.value


def test_an_interrupted_cell_says_a_sentence(explorer, capsys):
    explorer.fields["max_steps"].value = "1000"
    explorer.start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(1.0, signal.raise_signal, [signal.SIGINT]).start()
        explorer.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    assert "interrupted" in capsys.readouterr().out and explorer.run.state == "stopped"
