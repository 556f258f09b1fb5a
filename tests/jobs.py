"""What children of `forks` do. Every function takes values of JSON."""

import json
import os
import resource
import signal
import socket
import sys
import threading
from pathlib import Path

import peft
import torch
from small import DIFFERENT, config, rows, trainer
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import onn_core.trainer
from onn_core.run.checkpoints import Checkpoints
from onn_core.run.resume import RunSaver
from onn_core.streaming import gathering
from onn_core.streaming.call import Call
from onn_core.streaming.layer import Recompute
from onn_core.trainer import ChunkedLoraTrainer
from onn_core.weights import gather
from onn_core.weights.reader import DirectFiles

PHASES = {
    "forward": (Call, "run_forward"),
    "backward": (Recompute, "backward"),
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


def run_with_small_files(
    small: list[str], output_dir: str, n_bytes: int, after: int, **changes: object
) -> None:
    """A run that can write no file above `n_bytes` after step `after`."""
    made = trainer(small, output_dir, **changes)

    def limit(record: onn_core.RunRecord) -> None:
        if len(record.steps) == after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))

    made.on_step = limit
    made.train()


def launched(n: int, each: str, **arguments: object) -> None:
    """`each` in `n` processes with the environment that a launcher gives them.

    The exit code is 0 if that of all is, else 1.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(n):
        pids.append(os.fork())
        if not pids[-1]:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(n), "MASTER_PORT": str(port)}
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            globals()[each](**arguments)
            return
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    sys.exit(int(any(codes)))


def run_gathering(small: list[str], output_dir: str, share: float, **changes: object) -> None:
    """A run that exchanges parts of weights, of any size, where a copy takes `share` of a step."""
    gathering.COPIED_SHARE, gather.SMALLEST_BYTES = share, 1
    (run_until if "how" in changes else run)(small, output_dir, **changes)


def run_each(small: list[str], output_dir: str, runs: dict, resume: bool = False) -> None:
    """Runs of these names one after another, each in a folder of its own."""
    for name, changes in runs.items():
        trainer(small, Path(output_dir, name), **changes).train(resume=resume)


def run_until(
    small: list[str], output_dir: str, rank: int, how: str, after: int, **changes: object
) -> None:
    """A run in which something happens to one process in the step that follows step `after`."""
    made = trainer(small, output_dir, **changes)
    call = Call.run_forward

    def happen(*args: object) -> object:
        if made.processes.rank == rank and len(made.record.steps) == after:
            if how == "stop":
                made.stop.request()
            elif how == "error":
                raise OSError("planted")
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return call(*args)

    Call.run_forward = happen
    try:
        made.train()
    except BaseException as error:
        notes = " ".join(getattr(error, "__notes__", ()))
        said = Path(output_dir, f"said-{made.processes.rank}")
        said.write_text(f"{type(error).__name__}: {error} {notes}")
        raise


def run_counting(small: list[str], output_dir: str, **changes: object) -> None:
    """A run after which a file says how many bytes of the weights this process read."""
    made = trainer(small, output_dir, **changes)
    made.train()
    units = made.base.streaming.stream.units
    weights = {weight for unit in units for weight in unit}
    found = {"read": made.base.counts().bytes_read}
    found["tensors"] = sum(len(weight.source.entries) for weight in weights)
    found["bytes"] = sum(weight.n_bytes for weight in weights)
    Path(output_dir, f"read-{made.processes.rank}").write_text(json.dumps(found))


def run_together(small: list[str], output_dir: str, runs: dict, fails: str) -> None:
    """Runs in one pass, of which one fails after step 2 in the process that calls `on_step`."""

    def fail(record: onn_core.RunRecord) -> None:
        if len(record.steps) == 2 and record.config["output_dir"] == fails:
            raise onn_core.OnnError("planted")

    configs = [config(small, Path(output_dir, name), **own) for name, own in runs.items()]
    onn_core.train_many(configs, on_step=fail)


def run_trainer(small: list[str], output_dir: str) -> None:
    """transformers.Trainer on batches of 4 rows of all processes, whose lengths differ."""
    n = int(os.environ["WORLD_SIZE"])
    sizes = {"per_device_train_batch_size": 4 // n, "max_steps": 4}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(output_dir, **sizes, **quiet, use_cpu=True, learning_rate=1e-2)
    tokenizer = AutoTokenizer.from_pretrained(small[0])
    data = [tokenizer(" and ".join(row.values())) for row in rows()]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    base = onn_core.from_pretrained(small[0], device="cpu")
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear"))
    Trainer(model, arguments, collator, train_dataset=data).train()
    if os.environ["RANK"] == "0":
        model.save_pretrained(output_dir)
