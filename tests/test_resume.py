"""A resumed run is equal, bit for bit, to one that was never stopped."""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import numbers, require_equal, trainer, write_small

import onn_core
from onn_core.errors import NonFiniteError, OnnError
from onn_core.run.checkpoints import Checkpoints, require_state


class Ended(BaseException):
    """Stands for the sudden end of the process."""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a toy model, and text."""
    return write_small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """The folder of the run that was never stopped."""
    output_dir = tmp_path_factory.mktemp("whole")
    record = trainer(small, output_dir).train()
    assert record.steps[0].skipped and not record.steps[-1].skipped
    return output_dir


def stopped(small, output_dir, at_visit, stop, error=Ended, **changes):
    """A run in which `stop()` is called at the n-th visit of a layer: its trainer, its error."""
    made = trainer(small, output_dir, **changes)
    setup, n_visits = made.setup, 0

    def setup_and_count():
        setup()

        def count(phase, unit):
            nonlocal n_visits
            n_visits += 1
            if n_visits == at_visit:
                stop()

        made.base.on_visit(count)
        if error is Ended:
            made.saver.save_stopped = lambda *_: None

    made.setup = setup_and_count
    with pytest.raises(error) as raised:
        made.train()
    return made, raised.value


def end():
    raise Ended


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


# A step visits 3 layers, the head, 3 layers, twice (accumulation); an evaluation 3 and the head.
@pytest.mark.parametrize("at_visit", [40, 51, 66, 98])
def test_ended_anywhere_a_resumed_run_is_equal_bit_for_bit(at_visit, small, whole, tmp_path):
    made, _ = stopped(small, tmp_path, at_visit, end)
    assert 2 <= len(made.record.steps) < 7 and not (tmp_path / "record.json").exists()
    trainer(small, tmp_path).train(resume=True)
    require_equal(tmp_path, whole)


def test_ended_before_the_first_checkpoint_a_run_starts_again(small, whole, tmp_path):
    stopped(small, tmp_path, 9, end)
    with pytest.warns(UserWarning, match="has no checkpoint: starts at step 1"):
        trainer(small, tmp_path).train(resume=True)
    require_equal(tmp_path, whole)


def test_ended_twice_and_resumed_with_other_residency(small, whole, tmp_path):
    stopped(small, tmp_path, 50, end)
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "checkpoints").rename(moved / "checkpoints")
    made = trainer(small, moved, chunk_size=2, checkpoint_every=1)
    made.on_step = lambda record: end() if len(record.steps) == 5 else None
    with pytest.raises(Ended):
        made.train(resume=True)
    trainer(small, moved, memory_budget="1GB").train(resume=True)
    require_equal(moved, whole)


@pytest.mark.parametrize("at_visit", [1, 24, 34])
def test_ctrl_c_saves_the_last_finished_step_and_says_how_to_go_on(
    at_visit, small, whole, tmp_path
):
    handler = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where it is ignored
    try:
        made, error = stopped(small, tmp_path, at_visit, interrupt, KeyboardInterrupt)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)
    n_done = len(made.record.steps)
    done = f"stopped after step {n_done} of 7"
    assert str(error) == f"{done}: train(resume=True) continues from there"
    assert made.saver.checkpoints.paths()[-1].name == f"step-{n_done:08d}"
    assert onn_core.RunRecord.load(tmp_path / "record.json").status == "stopped: KeyboardInterrupt"
    resumed = trainer(small, tmp_path).train(resume=True)
    assert len(resumed.steps) == 7
    require_equal(tmp_path, whole)


def test_a_stop_can_be_asked_for_from_another_thread(small, whole, tmp_path):
    raised = []

    def work():
        made = trainer(small, tmp_path)
        made.on_step = lambda record: made.stop.request() if len(record.steps) == 3 else None
        try:
            made.train()
        except KeyboardInterrupt as error:
            raised.append(str(error))

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert raised == ["stopped after step 3 of 7: train(resume=True) continues from there"]
    trainer(small, tmp_path).train(resume=True)
    require_equal(tmp_path, whole)


def test_an_error_also_saves_the_last_finished_step(small, whole, tmp_path):
    def fail():
        raise OSError("planted")

    made, error = stopped(small, tmp_path, 52, fail, OSError)
    assert error.__notes__ == ["stopped after step 3 of 7: train(resume=True) continues from there"]
    trainer(small, tmp_path).train(resume=True)
    require_equal(tmp_path, whole)


def test_another_number_of_threads_is_warned_of(small, tmp_path):
    """Before the first step, which is the only one: threads that share a processor are slow."""
    stopped(small, tmp_path, 50, end)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        made = trainer(small, tmp_path)
        made.on_step = lambda record: end()
        with pytest.warns(UserWarning, match="another number of threads"), pytest.raises(Ended):
            made.train(resume=True)
    finally:
        torch.set_num_threads(threads)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, flip) for name in ("state.safetensors", "record.json")),
        ("state.safetensors", lambda path: os.truncate(path, path.stat().st_size // 2)),
        ("SHA256SUMS", lambda path: path.write_bytes(b"\xff\n")),
        ("state.safetensors", Path.unlink),
    ],
    ids=["flip", "flip", "cut", "sums", "gone"],
)
def test_a_damaged_newest_checkpoint_is_passed_over(name, damage, small, whole, tmp_path):
    stopped(small, tmp_path, 78, end)
    paths = Checkpoints(tmp_path, 2).paths()
    assert [path.name for path in paths] == ["step-00000002", "step-00000004"]
    damage(paths[1] / name)
    with pytest.warns(UserWarning, match="checkpoints/step-00000004 is damaged .* the one before"):
        trainer(small, tmp_path).train(resume=True)
    require_equal(tmp_path, whole)


def test_all_checkpoints_damaged_is_an_error(small, tmp_path):
    stopped(small, tmp_path, 50, end)
    for path in Checkpoints(tmp_path, 2).paths():
        flip(path / "state.json")
    with pytest.warns(UserWarning), pytest.raises(OnnError, match="every checkpoint"):
        trainer(small, tmp_path).train(resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 2e-2}, "learning_rate was 0.01 and is 0.02"),
        ({"batch_size": 8, "seed": 1}, "batch_size was 4 and is 8; seed was 0 and is 1"),
        ({"max_steps": 9}, "max_steps was 7 and is 9"),
        ({"micro_batch_size": None}, "micro_batch_size was 3 and is None"),
    ],
)
def test_another_run_is_refused(changes, message, small, whole):
    before = numbers(whole)
    with pytest.raises(OnnError, match=f"cannot be resumed: {message}"):
        trainer(small, whole, **changes).train(resume=True)
    assert numbers(whole) == before


def test_other_weights_and_other_text_are_refused(small, whole, tmp_path):
    model_dir, data = small
    lines = data.read_text().splitlines(keepends=True)
    (tmp_path / "sums.jsonl").write_text("".join(lines[::-1]))
    with pytest.raises(OnnError, match="the text is another"):
        trainer((model_dir, tmp_path / "sums.jsonl"), whole).train(resume=True)
    shutil.copytree(model_dir, tmp_path / "model")
    trainer((tmp_path / "model", data), whole).train(resume=True)  # a copy is the same
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    header_bytes = int.from_bytes(content[:8], "little")
    content[8 + header_bytes] ^= 1
    shard.write_bytes(content)
    with pytest.raises(OnnError, match="the weights are others"):
        trainer((tmp_path / "model", data), whole).train(resume=True)


def test_a_finished_run_resumes_to_itself_and_a_new_one_sets_it_aside(small, whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    resumed = trainer(small, tmp_path)
    record = resumed.train(resume=True)
    assert len(record.steps) == 7 and resumed.base.streaming.stream.counts.bytes_read == 0
    require_equal(tmp_path, whole)
    trainer(small, tmp_path, seed=1, max_steps=1, checkpoint_every=0).train()
    assert [path.name for path in Checkpoints(tmp_path, 2).paths()] == ["step-00000001"]
    assert (tmp_path / "checkpoints-before/step-00000007/state.safetensors").is_file()


def test_under_a_constant_rate_a_finished_run_can_be_made_longer(small, tmp_path):
    constant = {"lr_schedule": "constant", "eval_every": 0}
    trainer(small, tmp_path / "long", **constant).train()
    trainer(small, tmp_path / "grown", max_steps=3, **constant).train()
    trainer(small, tmp_path / "grown", **constant).train(resume=True)
    require_equal(tmp_path / "grown", tmp_path / "long")


def test_the_last_checkpoints_are_kept_and_their_sums_are_standard(small, tmp_path):
    trainer(small, tmp_path, checkpoint_every=1, keep_checkpoints=3).train()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (5, 6, 7)]
    folder = tmp_path / "checkpoints" / names[-1]
    assert sorted(path.suffix for path in folder.iterdir()) == [
        "",
        ".json",
        ".json",
        ".safetensors",
    ]
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, check=True)


def test_checkpoints_by_time_follow_no_clock_that_can_be_set(small, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Checkpoints, "save", lambda *args: saved.append(len(args[-1].steps)))
    monkeypatch.setattr("time.time", lambda: 0.0)  # the clock was set back
    trainer(small, tmp_path, checkpoint_every=0, checkpoint_minutes=1e-9).train()
    assert saved == [1, 2, 3, 4, 5, 6, 7, 7]
    saved.clear()
    trainer(small, tmp_path, checkpoint_every=0, checkpoint_minutes=1e9).train()
    assert saved == [7]


def test_a_run_that_became_nan_keeps_the_last_good_state(small, tmp_path):
    bad = {"learning_rate": 1e30, "max_grad_norm": None, "loss_scale": None, "warmup_steps": 0}
    made = trainer(small, tmp_path, **bad)
    with pytest.raises(NonFiniteError):
        made.train()
    state = load_file(made.saver.checkpoints.paths()[-1] / "state.safetensors")
    assert all(torch.isfinite(values.float()).all() for values in state.values())


def test_numbers_that_are_not_finite_survive_a_record(small, whole, tmp_path):
    record = onn_core.RunRecord.load(whole / "record.json")
    record.steps[0].grad_norm = float("inf")
    record.steps[0].grad_norm_by_layer["0"] = float("-inf")
    record.save(tmp_path / "record.json")
    assert str(onn_core.RunRecord.load(tmp_path / "record.json")) == str(record)  # nan is not nan


def change(path, keep_time=False):
    """One byte of the last tensor becomes another."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-3, os.SEEK_END)
        file.write(bytes([byte ^ 0x40]))
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("fault", "changes", "message"),
    [
        (change, {}, "was changed while it was in use"),
        (Path.unlink, {}, "cannot be read"),
        (lambda path: os.truncate(path, 4096), {}, "became shorter|was changed"),
        (lambda path: change(path, True), {"verify_weights": True}, "has other values"),
    ],
    ids=["changed", "deleted", "cut", "changed-with-time-kept"],
)
def test_a_shard_that_changes_under_the_run_is_noticed_before_the_step(
    fault, changes, message, small, whole, tmp_path
):
    """In the forward pass of step 4; restored, the run goes on from step 3."""
    model_dir, data = small
    shutil.copytree(model_dir, tmp_path / "model")
    shard = tmp_path / "model/model-00003-of-00005.safetensors"
    shutil.copy2(shard, tmp_path / "shard")
    moved, out = (tmp_path / "model", data), tmp_path / "out"
    made, error = stopped(moved, out, 52, lambda: fault(shard), OnnError, **changes)
    assert re.search(message, str(error)) and "after step 3 of 7" in error.__notes__[0]
    shutil.copy2(tmp_path / "shard", shard)
    trainer(moved, out, **changes).train(resume=True)
    require_equal(out, whole)


def test_a_shard_that_changed_between_two_runs_is_noticed_where_asked(small, tmp_path):
    model_dir, data = small
    shutil.copytree(model_dir, tmp_path / "model")
    moved, out, asked = (tmp_path / "model", data), tmp_path / "out", {"verify_weights": True}
    stopped(moved, out, 40, end, **asked)
    change(tmp_path / "model/model-00003-of-00005.safetensors")
    with pytest.raises(OnnError, match="has other values"):
        trainer(moved, out, **asked).train(resume=True)


def test_every_guarantee_in_the_readme_names_a_test_that_is_there():
    tests = Path(__file__).parent
    page = (tests / "README.md").read_text().split("## What is guaranteed")[1]
    named = re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", page.split("\n## ")[0])
    assert len(named) > 15
    text = ""
    for file, name in named:
        text = (tests / file).read_text() if file else text
        assert f"def {name}(" in text


BAD_STATES = {
    "an interval that is no whole number": ({"growth_interval": 3.5}, "growth_interval 3.5"),
    "a negative interval": ({"growth_interval": -2000}, "growth_interval -2000"),
    "a tracker below zero": ({"_growth_tracker": -1}, "_growth_tracker -1"),
    "a scale of zero": ({"scale": 0}, "scale 0"),
    "a scale that is text": ({"scale": "65536"}, "scale 65536"),
    "a scale that is true": ({"scale": True}, "scale True"),
    "a factor that shrinks": ({"growth_factor": 0.5}, "growth_factor 0.5"),
    "an interval beyond torch's": ({"growth_interval": 2**31}, "growth_interval 2147483648"),
    "a scale beyond float32": ({"scale": 1e300}, "scale 1e\\+300"),
    "a field of another scaler": ({"other": 1}, "other fields"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_STATES.values(), ids=BAD_STATES)
def test_a_state_of_other_types_or_signs_is_refused(changes, message, whole):
    saved = Checkpoints(whole, 2).load()
    state = json.loads((saved.path / "state.json").read_text())
    require_state(state)
    with pytest.raises(ValueError, match=message):
        require_state(state | {"scaler": state["scaler"] | changes})
    with pytest.raises(ValueError, match="lacks settings"):
        require_state(state | {"settings": []})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: next(iter(t.items()))[1].unsqueeze(0), "has shape"),
        (lambda t: next(iter(t.items()))[1].to(torch.int32), "torch.int32"),
        (lambda t: None, "lacks some tensors"),
    ],
    ids=["shape", "dtype", "missing"],
)
def test_an_optimizer_state_that_does_not_fit_is_refused(change, message, small, whole, tmp_path):
    made = trainer(small, tmp_path)
    made.setup()
    saved = Checkpoints(whole, 2).load()
    name = next(name for name in saved.tensors if name.startswith("exp_avg/"))
    values = change({name: saved.tensors.pop(name)})
    saved.tensors |= {} if values is None else {name: values}
    with pytest.raises(OnnError, match=f"does not fit this model .*{message}"):
        made.saver.state.restore(saved.tensors, saved.state["scaler"])


@pytest.mark.parametrize(
    "changes", [{"loss": [1.0]}, {"tokens": -1}, {"tokens": 1.5}, {"skipped": 1}, {"step": True}]
)
def test_a_record_of_other_types_is_refused(changes, whole, tmp_path):
    record = json.loads((whole / "record.json").read_text())
    record["steps"][1] |= changes
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(OnnError, match=f"is not a run record .*{next(iter(changes))} is"):
        onn_core.RunRecord.load(tmp_path / "record.json")
