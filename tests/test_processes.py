"""Several processes train what one trains: the same numbers, one writer, one end for all."""

import pytest
from forks import Forks
from small import adapter, numbers, trainer, write_small
from toy import difference

import onn_core

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
    forks.start("launched", folder / "errors", n=n, job=job, **arguments)
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
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4, nan_ok=True)
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
