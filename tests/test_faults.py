"""Faults on purpose: whatever ends a run, nothing is half-written and a resumed run is equal."""

import contextlib
import errno
import os
import random
import re
import signal
import statistics
import subprocess
import threading
import time
import warnings

import pytest
import torch
from forks import Forks
from jobs import PHASES
from safetensors.torch import load_file
from small import numbers, require_equal, trainer, write_small

import onn_core
from onn_core.errors import ModelFolderError, OnnError
from onn_core.run.checkpoints import Checkpoints

pytestmark = [
    pytest.mark.faults,
]
N_KILLS = 9  # for each phase
SEED = 0


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the forked jobs: sums are in the order of the threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def forks():
    made = Forks()
    yield made
    made.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def whole(small, forks, tmp_path_factory):
    """The folder of the run that nothing happened to."""
    output_dir = tmp_path_factory.mktemp("whole")
    run(forks, "run", small, output_dir)
    return output_dir


def run(forks, job, small, output_dir, **arguments):
    """A job that must end well."""
    errors = output_dir.with_name(f"{output_dir.name}-errors")
    forks.start(job, errors, small=small, output_dir=output_dir, **arguments)
    code = forks.wait()
    assert code == 0, errors.read_text()[-3000:]


def require_nothing_half_written(output_dir):
    """Every checkpoint that is there is whole, and so are the adapter and the record."""
    found = Checkpoints(output_dir, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a damaged one
        for path in found.paths():
            found.read(path)
    weights = output_dir / "adapter/adapter_model.safetensors"
    if weights.exists():
        assert load_file(weights) and (output_dir / "adapter/adapter_config.json").stat().st_size
    if (output_dir / "record.json").exists():
        onn_core.RunRecord.load(output_dir / "record.json")


def require_tidy(output_dir):
    """A resumed run leaves nothing of the killed one behind."""
    names = [path.name for path in [*output_dir.iterdir(), *(output_dir / "checkpoints").iterdir()]]
    assert not [name for name in names if name.startswith(".") or "partial" in name]


@pytest.mark.parametrize("phase", PHASES)
def test_killed_at_random_moments_within_a_phase(
    phase, forks, small, whole, tmp_path, record_property
):
    """At any call or return of any function within it, with a seed of its own."""
    run(forks, "run_killed", small, tmp_path / "dry", phase=phase, at=0)
    require_equal(tmp_path / "dry", whole)
    n_events = int((tmp_path / "dry/events").read_text())
    chance, finished = random.Random(f"{SEED} {phase}"), set()
    for at in sorted(chance.sample(range(1, n_events + 1), N_KILLS)):
        output_dir = tmp_path / str(at)
        arguments = {"small": small, "output_dir": output_dir, "phase": phase, "at": at}
        forks.start("run_killed", tmp_path / "errors", **arguments)
        assert forks.wait() == -signal.SIGKILL
        require_nothing_half_written(output_dir)
        finished.add(tuple(path.name for path in Checkpoints(output_dir, 2).paths()))
        run(forks, "run", small, output_dir, resume=True)
        require_equal(output_dir, whole)
        require_tidy(output_dir)
    assert len(finished) > 1 or phase == "end"  # not always in the same step
    record_property(f"kills, {phase}", N_KILLS)


def test_killed_at_random_times(forks, small, whole, tmp_path, record_property):
    """Killed by another process, again and again, until the run is done."""
    chance, n_kills = random.Random(SEED), 0
    for number in range(12):
        output_dir, code = tmp_path / str(number), -9
        for attempt in range(20):
            arguments = {"small": small, "output_dir": output_dir, "resume": attempt > 0}
            pid = forks.start("run", tmp_path / "errors", **arguments)
            if attempt < 3:
                time.sleep(chance.uniform(0.2, 1.5))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            code = forks.wait()
            if code == 0:
                break
            assert code == -signal.SIGKILL
            n_kills += 1
            if output_dir.exists():
                require_nothing_half_written(output_dir)
        assert code == 0
        require_equal(output_dir, whole)
        require_tidy(output_dir)
    assert n_kills > 12
    record_property("kills, at random times", n_kills)


def test_many_runs_killed_at_random_times(forks, small, tmp_path, record_property):
    """All of them continue, each from its own newest checkpoint."""
    names, chance, n_kills = ["everything", "seed", "last", "plain"], random.Random(SEED), 0
    arguments = {"small": small, "names": names}
    run(forks, "run_many", output_dir=tmp_path / "whole", **arguments)
    for number in range(6):
        output_dir, code = tmp_path / str(number), -9
        for attempt in range(20):
            again = {"output_dir": output_dir, "resume": attempt > 0}
            pid = forks.start("run_many", tmp_path / "errors", **arguments, **again)
            if attempt < 3:
                time.sleep(chance.uniform(1, 6))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            code = forks.wait()
            if code == 0:
                break
            assert code == -signal.SIGKILL, (tmp_path / "errors").read_text()[-3000:]
            n_kills += 1
            for folder in output_dir.glob("*"):
                require_nothing_half_written(folder)
        assert code == 0
        for name in names:
            require_equal(output_dir / name, tmp_path / "whole" / name)
            require_tidy(output_dir / name)
    assert n_kills > 6
    record_property("kills, many runs", n_kills)


# --- the disk that is written to ------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here ({mounted.stderr.strip()})")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(path, n_free):
    """Fill the file system of `path` up to `n_free` bytes."""
    free = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize
    path.write_bytes(bytes(free - n_free))


@pytest.mark.parametrize("n_free", [0, 4096, 20_480, 65_536, 98_304])
@pytest.mark.parametrize("after", [4, 7], ids=["checkpoint", "end"])
def test_disk_full(n_free, after, small, whole, disk):
    made = trainer(small, disk / "out")
    filler = disk / "filler"
    made.on_step = lambda record: fill(filler, n_free) if len(record.steps) == after else None
    with pytest.raises(OnnError, match="cannot be written .*No space left.*make room.*resume=True"):
        made.train()
    require_nothing_half_written(disk / "out")
    assert [path.name for path in made.saver.checkpoints.paths()]
    filler.unlink()
    trainer(small, disk / "out").train(resume=True)
    require_equal(disk / "out", whole)
    require_tidy(disk / "out")


@pytest.mark.parametrize("n_bytes", [0, 1000, 30_000])
def test_files_may_not_grow(n_bytes, forks, small, whole, tmp_path):
    """A quota, for machines where nothing can be mounted."""
    arguments = {"small": small, "output_dir": tmp_path / "out", "n_bytes": n_bytes, "after": 4}
    forks.start("run_with_small_files", tmp_path / "errors", **arguments)
    assert forks.wait() == 1
    require_nothing_half_written(tmp_path / "out")
    assert Checkpoints(tmp_path / "out", 2).paths()[-1].name == "step-00000002"
    run(forks, "run", small, tmp_path / "out", resume=True)
    require_equal(tmp_path / "out", whole)


def test_the_output_folder_becomes_read_only(small, whole, disk):
    def remount(how):
        subprocess.run(["mount", "-o", f"remount,{how}", disk], check=True)

    made = trainer(small, disk / "out")
    made.on_step = lambda record: remount("ro") if len(record.steps) == 4 else None
    with pytest.raises(OnnError, match="cannot be written .*Read-only"):
        made.train()
    require_nothing_half_written(disk / "out")
    with pytest.raises(OnnError, match="cannot be written .*Read-only.*choose another"):
        trainer(small, disk / "out").train(resume=True)
    remount("rw")
    trainer(small, disk / "out").train(resume=True)
    require_equal(disk / "out", whole)


def test_the_clock_is_set_back(small, whole, tmp_path, monkeypatch):
    """Newer checkpoints then have older times; all that counts is their number."""
    made = trainer(small, tmp_path)

    def set_back(record):
        if len(record.steps) == 3:
            monkeypatch.setattr("time.time", lambda: 0.0)
            for path in made.saver.checkpoints.paths():
                os.utime(path, (2e9, 2e9))
        if len(record.steps) == 5:
            raise RuntimeError("planted")

    made.on_step = set_back
    with pytest.raises(RuntimeError, match="planted"):
        made.train()
    os.utime(made.saver.checkpoints.paths()[-1], (0, 0))
    resumed = trainer(small, tmp_path)
    started = []
    resumed.on_step = lambda record: started.append(len(record.steps))
    resumed.train(resume=True)
    assert started == [6, 7]
    require_equal(tmp_path, whole)
    assert all(step.step_s >= 0 for step in resumed.record.steps)


# --- the disk that is read from -------------------------------------------------------------


@pytest.mark.parametrize("at_read", [40, 150, 300])
def test_a_read_error(at_read, small, whole, tmp_path, monkeypatch):
    preadv, n_reads = os.preadv, 0

    def failing(descriptor, buffers, offset, *rest):
        nonlocal n_reads
        n_reads += threading.current_thread().name.startswith("onn-reader")
        if n_reads == at_read:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, buffers, offset, *rest)

    monkeypatch.setattr("os.preadv", failing)
    with pytest.raises(ModelFolderError, match="cannot be read at byte .*Input/output error"):
        trainer(small, tmp_path).train()
    require_nothing_half_written(tmp_path)
    monkeypatch.undo()
    trainer(small, tmp_path).train(resume=True)
    require_equal(tmp_path, whole)


def test_short_reads_are_continued(small, whole, tmp_path, monkeypatch):
    """Each read brings one page, as on a busy network disk."""
    preadv, n_short = os.preadv, 0

    def short(descriptor, buffers, offset, *rest):
        nonlocal n_short
        n_short += len(buffers[0]) > 4096
        return preadv(descriptor, [memoryview(buffers[0])[:4096]], offset, *rest)

    monkeypatch.setattr("os.preadv", short)
    trainer(small, tmp_path).train()
    assert n_short > 100
    require_equal(tmp_path, whole)


def test_a_memory_limit(forks, tmp_path):
    """Too much resident for the memory there is: an error that says so; with less it goes on."""
    model = write_small(tmp_path, n_layers=16, hidden_size=512)  # 16 layers of 10.5 MB
    quick = {"max_steps": 3, "eval_every": 0, "checkpoint_every": 1, "batch_size": 3}
    run(forks, "run", model, tmp_path / "whole", **quick)
    run(forks, "run", model, tmp_path / "out", **quick | {"max_steps": 3})
    newest = Checkpoints(tmp_path / "out", 2).paths()[-1]
    for path in [*newest.iterdir(), newest]:  # as if it had ended after step 2
        path.rmdir() if path.is_dir() else path.unlink()
    limited = {"small": model, "output_dir": tmp_path / "out", "n_bytes": 100 << 20, **quick}
    forks.start("run_limited", tmp_path / "errors", **limited, chunk_size=16)
    assert forks.wait() == 1
    said = (tmp_path / "errors").read_text()
    plan = re.search(r"of 1\d\d MB only \d+ MB could be had; load it with chunk_size=(\d+)", said)
    assert "there is no memory for the resident layers" in said and 1 <= int(plan[1]) < 16
    require_nothing_half_written(tmp_path / "out")
    fits = {"chunk_size": int(plan[1]), "n_bytes": 100 << 20}
    run(forks, "run_limited", model, tmp_path / "out", **quick, **fits)
    require_equal(tmp_path / "out", tmp_path / "whole")


# --- the long haul --------------------------------------------------------------------------


def test_two_thousand_steps(small, tmp_path):
    """Memory, descriptors and the work of a step stay what they were; prints the pace."""
    seen = []

    def look(record):
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
        seen.append((pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))))

    quick = {"gradient_accumulation_steps": 1, "micro_batch_size": None, "loss_scale": None}
    settings = {**quick, "max_steps": 2000, "eval_every": 100, "checkpoint_every": 50}
    made = trainer(small, tmp_path, **settings)
    made.on_step = look
    record = made.train()
    resident, descriptors = zip(*seen, strict=True)
    assert len(set(descriptors[1:])) == 1
    assert max(resident[1000:]) - max(resident[200:1000]) < 8 << 20  # the record grows by 2 MB
    assert len({step.bytes_read for step in record.steps[101:]}) < 20
    paces = [statistics.median(s.step_s for s in part) for part in batched(record.steps, 500)]
    print("median seconds of a step, by 500:", *(f"{pace:.4f}" for pace in paces))
    assert record.evals[-1].loss < record.evals[0].loss and numbers(tmp_path)[2] == "finished"


def batched(values, size):
    return [values[start : start + size] for start in range(0, len(values), size)]
