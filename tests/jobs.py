"""What children of `forks` do. Every function takes values of JSON."""

import os
import resource
import signal
import sys
import threading
from pathlib import Path

import torch
from small import DIFFERENT, config, trainer

import onn_core.trainer
from onn_core.run.checkpoints import Checkpoints
from onn_core.run.resume import RunSaver
from onn_core.streaming.call import Call
from onn_core.streaming.recompute import Visit
from onn_core.trainer import ChunkedLoraTrainer
from onn_core.weights.reader import DirectFiles

PHASES = {
    "forward": (Call, "run_forward"),
    "backward": (Visit, "backward"),
    "optimizer": (torch.optim.AdamW, "step"),
    "evaluation": (ChunkedLoraTrainer, "evaluate"),
    "checkpoint": (Checkpoints, "save"),
    "end": (RunSaver, "save"),
}


def run(small: list[str], output_dir: str, resume: bool = False, **changes: object) -> None:
    trainer(small, output_dir, **changes).train(resume=resume)


def run_many(small: list[str], output_dir: str, names: list[str], resume: bool = False) -> None:
    """The runs of these names in one pass, each in a folder of its own."""
    configs = [config(small, Path(output_dir, name), **DIFFERENT[name]) for name in names]
    onn_core.train_many(configs, resume=resume)


def run_hanging(small: list[str], output_dir: str, close_s: float, **changes: object) -> None:
    """A run whose reads never return after step 3; then the file `hangs` is there."""
    onn_core.trainer.CLOSE_S = close_s
    made = trainer(small, output_dir, **changes)
    read = DirectFiles.read

    def hang(*args: object) -> int:
        if len(made.record.steps) < 3:
            return read(*args)
        Path(output_dir, "hangs").touch()
        threading.Event().wait()

    DirectFiles.read = hang
    made.train()


def run_killed(small: list[str], output_dir: str, phase: str, at: int, **changes: object) -> None:
    """A run that kills itself at the `at`-th call or return of any function within a phase.

    at 0 kills nothing; the file `events` then says how many there are.
    """
    owner, name = PHASES[phase]
    function, n_events = getattr(owner, name), 0

    def count(*_: object) -> None:
        nonlocal n_events
        n_events += 1
        if n_events == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(*args: object, **kwargs: object) -> object:
        sys.setprofile(count)
        try:
            return function(*args, **kwargs)
        finally:
            sys.setprofile(None)

    is_static = isinstance(vars(owner).get(name), staticmethod)
    setattr(owner, name, staticmethod(counted) if is_static else counted)
    trainer(small, output_dir, **changes).train()
    Path(output_dir, "events").write_text(str(n_events))


def run_limited(small: list[str], output_dir: str, n_bytes: int, **changes: object) -> None:
    """A resumed run that may have `n_bytes` more of memory than its empty model has."""
    made = trainer(small, output_dir, **changes)
    setup = made.setup

    def setup_then_limit() -> None:
        setup()
        with open("/proc/self/status") as file:
            used = next(int(line.split()[1]) for line in file if line.startswith("VmData"))
        limit = used * 1024 + n_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    made.setup = setup_then_limit
    made.train(resume=True)


def run_with_small_files(small: list[str], output_dir: str, n_bytes: int, after: int) -> None:
    """A run that can write no file above `n_bytes` after step `after`."""
    made = trainer(small, output_dir)

    def limit(record: onn_core.RunRecord) -> None:
        if len(record.steps) == after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))

    made.on_step = limit
    made.train()
