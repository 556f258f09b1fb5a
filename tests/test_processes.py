"""Several processes train what one trains: the same numbers, one writer, one end for all."""

import json

import pytest
from forks import Forks
from small import adapter, numbers, require_equal, trainer, write_small
from toy import difference

import onn_core
from onn_core.run.checkpoints import Checkpoints

# Without dropout, whose draws are each process's own. 27 rows are trained on.
SAME = {"lora_dropout": 0.0, "max_steps": 5}
RUNS = {
    "uneven": SAME | {"batch_size": 5, "micro_batch_size": 2},
    "fewer rows than processes": SAME | {"batch_size": 1, "micro_batch_size": 1},
    "a short batch at the end": SAME
    | {"batch_size": 6, "max_steps": None, "num_train_epochs": 1, "loss_scale": None},
    "packed": SAME | {"packing": True, "gradient_accumulation_steps": 3},
}
ROUNDING = 2e-5  # of the largest value of a tensor


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
def forks():
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
    (ours, evals, status), (theirs, evals_theirs, status_theirs) = numbers(folder), numbers(other)
    assert len(ours) == len(theirs) and status == status_theirs
    for step, expected in zip(ours, theirs, strict=True):
        for key in ("samples", "tokens", "counted_tokens", "skipped", "loss_scale"):
            assert step[key] == expected[key], key
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        norm, expected_norm = float(step["grad_norm"]), float(expected["grad_norm"])
        assert norm == pytest.approx(expected_norm, rel=1e-4, nan_ok=True)
    assert [e["loss"] for e in evals] == pytest.approx([e["loss"] for e in evals_theirs], rel=1e-5)


@pytest.mark.parametrize("n", [2, 3])
def test_processes_train_what_one_trains(n, forks, small, alone, tmp_path):
    code, errors = launch(forks, n, "run_each", small, tmp_path, runs=RUNS)
    assert code == 0, errors
    for name in RUNS:
        require_close(tmp_path / name, alone / name)
        record = onn_core.RunRecord.load(tmp_path / name / "record.json")
        assert record.environment["processes"] == n
        assert len(record.steps) == 5


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


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("stop", "KeyboardInterrupt: stopped after step 2 of 5: train(resume=True)"),
        ("error", "planted stopped after step 2 of 5: train(resume=True)"),
        ("kill", "has ended without a word"),
    ],
)
def test_what_ends_one_process_ends_all_with_the_last_step_saved(
    how, said, rank, forks, small, tmp_path
):
    changes = RUNS["uneven"] | {"after": 2, "rank": rank, "how": how}
    code, errors = launch(forks, 3, "run_until", small, tmp_path, **changes)
    assert code == 1 and saved_step(tmp_path) == "step-00000002", errors
    record = onn_core.RunRecord.load(tmp_path / "record.json")
    assert len(record.steps) == 2 and record.status.startswith("stopped: ")
    sentences = [path.read_text() for path in sorted(tmp_path.glob("said-*"))]
    assert len(sentences) == 3 - (how == "kill")
    assert all(said in sentence for sentence in sentences), sentences


def test_processes_of_a_host_read_the_model_once(forks, small, tmp_path):
    """Together, and never again: in five steps of twice two passes, and evaluations."""
    changes = RUNS["uneven"] | {"host_budget": "1GB"}
    code, errors = launch(forks, 3, "run_counting", small, tmp_path, **changes)
    assert code == 0, errors
    found = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("read-*"))]
    assert len(found) == 3
    n_weights, weights_bytes = found[0]["weights"], found[0]["bytes"]
    read = sum(one["read"] for one in found)
    assert weights_bytes <= read <= weights_bytes + 2 * 4096 * n_weights  # in whole pages


def test_a_full_disk_ends_all_with_one_sentence(forks, small, tmp_path):
    changes = RUNS["uneven"] | {"n_bytes": 100, "after": 2}
    code, errors = launch(forks, 2, "run_with_small_files", small, tmp_path, **changes)
    assert code == 1 and errors.count("OnnError") >= 2 and "cannot be written" in errors, errors
