"""Several processes train what one trains: the same numbers, one writer, one end for all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from forks import Forks
from safetensors.torch import load_file
from small import adapter, config, numbers, require_equal, rows, trainer, write_small
from toy import difference

import onn_core
from onn_core.run.checkpoints import Checkpoints

# Without dropout, whose draws are each process's own. 27 rows are trained on.
SAME = {"lora_dropout": 0.0, "max_steps": 5}
RUNS = {
    "uneven": SAME | {"batch_size": 5, "micro_batch_size": 2},
    "fewer rows than processes": SAME | {"batch_size": 1, "micro_batch_size": 1},
    "a short batch at the end": SAME
    | {"batch_size": 6, "max_steps": None, "num_train_epochs": 1, "loss_scale": None}
    | {"gradient_accumulation_steps": 1},
    "packed": SAME | {"packing": True, "gradient_accumulation_steps": 3, "loss_scale": None},
}
# Of the largest value of a tensor. Adam divides a gradient by its own size: where the rows'
# gradients nearly cancel, the rounding of their sum becomes a part of the step: 6e-5 was seen on
# one processor, less than 2e-5 on another.
ROUNDING = 5e-4


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory):
    """The folder of the runs of one process."""
    folder = tmp_path_factory.mktemp("alone")
    for name, changes in RUNS.items():
        trainer(small, folder / name, **changes).train()
    return folder


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONN_CACHE", str(tmp_path_factory.mktemp("cache")))
        made = Forks()
        yield made
    made.close()


def launch(forks, n, job, small, folder, **arguments):
    """`job` of `jobs` in `n` processes: the exit code, and what they wrote to standard error."""
    folder.mkdir(exist_ok=True)
    arguments |= {"small": [str(path) for path in small], "output_dir": str(folder)}
    forks.start("launched", folder / "errors", n=n, each=job, **arguments)
    return forks.wait(), (folder / "errors").read_text()


def require_close(folder, other):
    """Equal to float32 rounding, in adapters and losses; equal in all that is counted."""
    ours, theirs = adapter(folder), adapter(other)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert expected.abs().max() > 0 and difference(ours[name], expected) <= ROUNDING, name
    ours, evals, *ended = numbers(folder)
    theirs, evals_theirs, *ended_theirs = numbers(other)
    assert len(ours) == len(theirs) and ended == ended_theirs
    for step, expected in zip(ours, theirs, strict=True):
        for key in ("samples", "tokens", "counted_tokens", "skipped", "loss_scale"):
            assert step[key] == expected[key], key
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        norm, expected_norm = float(step["grad_norm"]), float(expected["grad_norm"])
        assert norm == pytest.approx(expected_norm, rel=1e-4, nan_ok=True)
    assert [e["loss"] for e in evals] == pytest.approx([e["loss"] for e in evals_theirs], rel=1e-5)
    assert [e["accuracy"] for e in evals] == [e["accuracy"] for e in evals_theirs]


@pytest.mark.parametrize("n", [2, 3])
def test_processes_train_what_one_trains(n, forks, small, alone, tmp_path):
    code, errors = launch(forks, n, "run_each", small, tmp_path, runs=RUNS)
    assert code == 0, errors
    for name in RUNS:
        require_close(tmp_path / name, alone / name)
        record = onn_core.RunRecord.load(tmp_path / name / "record.json")
        assert record.environment["processes"] == n
        assert len(record.steps) == 5


def require_as_alone(forks, small, folder, changes):
    """Two processes and one train the same; returns the record of the two."""
    code, errors = launch(forks, 2, "run_each", small, folder, runs={"two": changes})
    assert code == 0, errors
    trainer(small, folder / "one", **changes).train()
    require_close(folder / "two", folder / "one")
    return onn_core.RunRecord.load(folder / "two/record.json")


@pytest.mark.parametrize("batch_size", [1, 5])
def test_processes_train_pairs_as_one_does(batch_size, forks, small, tmp_path):
    """Also where one of them has no pair, in training or of the three that are held out."""
    pairs = [{"prompt": r["prompt"], "chosen": r["response"], "rejected": "No."} for r in rows()]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    changes = SAME | {"objective": "dpo", "dpo_beta": 0.5, "data": str(path), "loss_scale": None}
    changes |= {"batch_size": batch_size, "micro_batch_size": 1, "eval_batch_size": 2}
    record = require_as_alone(forks, small, tmp_path, changes)
    assert [step.samples for step in record.steps] == [2 * batch_size] * 5
    assert record.evals[0].accuracy == 0 and record.evals[-1].accuracy > 0


def test_processes_stop_early_as_one_does(forks, small, tmp_path):
    early = {"eval_every": 1, "early_stopping_patience": 2, "early_stopping_threshold": 10.0}
    changes = SAME | early | {"loss_scale": None}
    record = require_as_alone(forks, small, tmp_path, changes)
    assert "by more than 10 in 2 evaluations" in record.stopped_early and len(record.steps) == 2


def saved_step(folder):
    return Checkpoints(folder, 1).paths()[-1].name


def test_a_run_resumes_on_another_number_of_processes(forks, small, alone, tmp_path):
    """2 processes stop at step 3, 1 goes on to step 4, 3 end the run."""
    cut, name = tmp_path / "cut", "uneven"
    changes = RUNS[name] | {"after": 3, "rank": 1, "how": "stop"}
    code, errors = launch(forks, 2, "run_until", small, cut, **changes)
    assert code == 1 and saved_step(cut) == "step-00000003", errors
    made = trainer(small, cut, **RUNS[name])
    made.on_step = lambda record: made.stop.request() if len(record.steps) == 4 else None
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="threads or processes"):
        made.train(resume=True)
    cut.rename(tmp_path / name)
    code, errors = launch(
        forks, 3, "run_each", small, tmp_path, runs={name: RUNS[name]}, resume=True
    )
    assert code == 0 and "threads or processes" not in errors, errors
    require_close(tmp_path / name, alone / name)


def test_with_dropout_a_resumed_run_of_processes_is_equal_bit_for_bit(forks, small, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    changes = {"max_steps": 4, "eval_every": 0}
    code, errors = launch(forks, 2, "run_each", small, tmp_path, runs={"whole": changes})
    assert code == 0, errors
    changes |= {"after": 2, "rank": 0, "how": "stop"}
    assert launch(forks, 2, "run_until", small, cut, **changes)[0] == 1
    changes = {"max_steps": 4, "eval_every": 0}
    code, errors = launch(forks, 2, "run_each", small, tmp_path, runs={"cut": changes}, resume=True)
    assert code == 0, errors
    require_equal(cut, whole)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("how", "rank", "said"),
    [
        ("stop", 2, "KeyboardInterrupt: stopped after step 2 of 5: train(resume=True)"),
        ("error", 1, "planted stopped after step 2 of 5: train(resume=True)"),
        ("kill", 0, "has ended without a word"),
        ("kill", 2, "has ended without a word"),
    ],
)
def test_what_ends_one_process_ends_all_with_the_last_step_saved(
    how, rank, said, forks, small, tmp_path
):
    changes = RUNS["uneven"] | {"after": 2, "rank": rank, "how": how}
    code, errors = launch(forks, 3, "run_until", small, tmp_path, **changes)
    assert code == 1 and saved_step(tmp_path) == "step-00000002", errors
    record = onn_core.RunRecord.load(tmp_path / "record.json")
    assert len(record.steps) == 2 and record.status.startswith("stopped: ")
    sentences = [path.read_text() for path in sorted(tmp_path.glob("said-*"))]
    assert len(sentences) == 3 - (how == "kill")
    assert all(said in sentence for sentence in sentences), sentences


QUANTIZED = [pytest.param(name, marks=pytest.mark.heavy) for name in ("int8", "nf4")]


@pytest.mark.parametrize("quantize", [None, *QUANTIZED])
def test_processes_of_a_host_read_the_model_once(quantize, forks, small, tmp_path):
    """Together, and never again: in five steps of twice two passes, and evaluations."""
    changes = RUNS["uneven"] | {"host_budget": "1GB", "quantize": quantize}
    code, errors = launch(forks, 3, "run_counting", small, tmp_path, **changes)
    assert code == 0, errors
    found = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("read-*"))]
    assert len(found) == 3
    n_tensors, weights_bytes = found[0]["tensors"], found[0]["bytes"]
    read = sum(one["read"] for one in found)
    assert weights_bytes <= read <= weights_bytes + 2 * 4096 * n_tensors  # in whole pages
    apart = {"apart": changes | {"host_budget": None}}  # each reads all by itself, again and again
    code, errors = launch(forks, 3, "run_each", small, tmp_path, runs=apart)
    assert code == 0, errors
    require_equal(tmp_path, tmp_path / "apart")


@pytest.mark.faults
def test_a_full_disk_ends_all_with_one_sentence(forks, small, tmp_path):
    changes = RUNS["uneven"] | {"n_bytes": 100, "after": 2}
    code, errors = launch(forks, 2, "run_with_small_files", small, tmp_path, **changes)
    # The first, which fails, can write to its standard error no more either: the other says it.
    assert code == 1 and "OnnError" in errors and "cannot be written" in errors, errors


def test_many_runs_of_processes(forks, small, alone, tmp_path):
    """Three runs in one pass, one of which fails in one process."""
    names = ["a short batch at the end", "uneven", "packed"]
    runs = {name: RUNS[name] for name in names}
    code, errors = launch(forks, 2, "run_together", small, tmp_path, runs=runs, fails="uneven")
    assert code == 0, errors
    for name in (names[0], names[2]):
        require_close(tmp_path / name, alone / name)
    record = onn_core.RunRecord.load(tmp_path / "uneven" / "record.json")
    assert record.status == "stopped: planted" and len(record.steps) == 2
    assert saved_step(tmp_path / "uneven") == "step-00000002"


def test_trainer_of_transformers_under_a_launcher(forks, small, tmp_path):
    """By plain DistributedDataParallel: the adapters are those of one process."""
    for n in (1, 2):
        code, errors = launch(forks, n, "run_trainer", small, tmp_path / str(n))
        assert code == 0, errors
    ours, theirs = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "21")
    assert ours.keys() == theirs.keys() and any(theirs[name].any() for name in theirs)
    for name, expected in theirs.items():
        assert difference(ours[name], expected) <= ROUNDING, name


def torchrun(settings, path, *more):
    """The command line on two processes, as a user starts it."""
    path.write_text(yaml.safe_dump(settings.to_dict()))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, "-m", "onn_core", "train", str(path), *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=Path(__file__).parents[1], **pipes)


def test_torchrun_of_the_command_line(small, alone, tmp_path):
    settings = config(small, tmp_path / "run", **RUNS["packed"])
    running = torchrun(settings, tmp_path / "run.yaml")
    out, errors = running.communicate()
    assert running.returncode == 0, errors
    assert out.count("finished after 5 steps") == 1  # one process speaks
    require_close(tmp_path / "run", alone / "packed")


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_ends_within_a_minute_when_one_process_is_killed(rank, small, tmp_path):
    changes = {"max_steps": 10_000, "checkpoint_every": 0, "eval_every": 0, "progress": True}
    settings = config(small, tmp_path / "run", **SAME | changes)
    running = torchrun(settings, tmp_path / "run.yaml", "checkpoint_minutes=0")
    seen = ""
    while "3/10000" not in seen:
        assert (more := running.stderr.read(1)), seen
        seen += more
    found = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True)
    of_rank = {int(environment(pid)["RANK"]): int(pid) for pid in found.stdout.split()}
    os.kill(of_rank[rank], signal.SIGKILL)
    killed = time.monotonic()
    _, errors = running.communicate()
    assert time.monotonic() - killed < 60 and running.returncode != 0
    n_done = int(saved_step(tmp_path / "run").removeprefix("step-"))
    assert n_done >= 3
    assert f"stopped after step {n_done} of 10000: train(resume=True) continues" in errors, errors
    assert onn_core.RunRecord.load(tmp_path / "run" / "record.json").steps[-1].step == n_done


def environment(pid):
    """The environment variables of a process."""
    content = Path(f"/proc/{pid}/environ").read_text()
    return dict(entry.split("=", 1) for entry in content.split("\0") if "=" in entry)
