"""Signals to a process that trains: it saves, says how to go on, and ends."""

import gc
import math
import os
import signal
import time

import pytest
from forks import Forks
from small import trainer, write_small
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

import onn_core
from onn_core.record import EvalRecord
from onn_core.run.checkpoints import Checkpoints
from onn_core.run.stopping import early_stop

LONG = {"max_steps": 100_000, "checkpoint_every": 3, "eval_every": 0}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def forks():
    made = Forks()
    yield made
    made.close()


def wait_for(path):
    while not path.exists():
        time.sleep(0.01)


def test_sigterm_saves_then_ends_the_process_as_it_would_have(forks, small, tmp_path):
    pid = forks.start("run", tmp_path / "errors", small=small, output_dir=tmp_path, **LONG)
    wait_for(tmp_path / "checkpoints/step-00000003/SHA256SUMS")
    os.kill(pid, signal.SIGTERM)
    assert forks.wait() == -signal.SIGTERM
    n_done = len(onn_core.RunRecord.load(tmp_path / "record.json").steps)
    said = (tmp_path / "errors").read_text()
    assert f"stopped after step {n_done} of 100000: train(resume=True) continues from" in said
    assert Checkpoints(tmp_path, 2).load().path.name == f"step-{n_done:08d}"
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_read_that_hangs_delays_no_stop_and_a_second_signal_ends_at_once(
    second, forks, small, tmp_path
):
    """The first saves, and would then wait for the reader for ever; the second does not."""
    arguments = {"small": small, "output_dir": tmp_path, "close_s": 1e6, **LONG}
    pid = forks.start("run_hanging", tmp_path / "errors", **arguments)
    wait_for(tmp_path / "hangs")
    os.kill(pid, signal.SIGINT)
    wait_for(tmp_path / "record.json")
    os.kill(pid, second)
    assert forks.wait() == -second
    assert len(Checkpoints(tmp_path, 2).load().record.steps) == 3


def test_a_reader_that_hangs_does_not_keep_the_process_alive(forks, small, tmp_path):
    arguments = {"small": small, "output_dir": tmp_path, "close_s": 0.1, **LONG}
    pid = forks.start("run_hanging", tmp_path / "errors", **arguments)
    wait_for(tmp_path / "hangs")
    os.kill(pid, signal.SIGINT)
    assert forks.wait() == -signal.SIGINT
    assert "stopped after step 3 of 100000" in (tmp_path / "errors").read_text()


def test_two_hundred_steps_leave_no_descriptor_and_no_memory(small, tmp_path):
    def held():
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
        return len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGE_SIZE")

    gc.collect()  # what earlier tests have left
    seen, before = [], len(os.listdir("/proc/self/fd"))
    once = {"gradient_accumulation_steps": 1, "micro_batch_size": None, "lora_dropout": 0.0}
    made = trainer(small, tmp_path, **once, max_steps=200, eval_every=50, checkpoint_every=50)
    made.on_step = lambda record: seen.append(held())
    made.train()
    descriptors, resident = zip(*seen, strict=True)
    assert descriptors[-1] <= descriptors[1]
    assert max(resident[100:]) - max(resident[:100]) < 4 << 20  # of 20 MB that are read
    del made
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_early_stopping_is_that_of_transformers(patience, threshold):
    losses = [2.0, 1.9, 1.85, 1.95, 1.82, 1.81, 1.6, math.nan, 1.6, 1.61, 1.62]
    callback = EarlyStoppingCallback(patience, threshold)
    arguments = TrainingArguments("unused", metric_for_best_model="loss", greater_is_better=False)
    state, control = TrainerState(), TrainerControl()
    theirs, evals = [], []
    for step, loss in enumerate(losses):
        evals.append(EvalRecord(step, step, 0.0, loss))
        callback.on_evaluate(arguments, state, control, metrics={"eval_loss": loss})
        theirs.append(control.should_training_stop)
        assert bool(early_stop(evals, patience, threshold)) == theirs[-1]
        if theirs[-1]:
            break
        if state.best_metric is None or loss < state.best_metric:  # as the Trainer does, after
            state.best_metric = loss
    assert theirs[-1] and not early_stop(evals, None, threshold)
