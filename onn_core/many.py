"""`train_many`: several runs for the price of one pass over the weights."""

import dataclasses
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from onn_core.config import TrainConfig
from onn_core.errors import ConfigError, OnnError, TooManyRunsError
from onn_core.record import RunRecord
from onn_core.run.checkpoints import Checkpoints
from onn_core.run.stopping import Stop
from onn_core.streaming.passes import random_state, set_random_state
from onn_core.streaming.skeleton import resolve_device
from onn_core.streaming.together import Together
from onn_core.trainer import ChunkedLoraTrainer

# One base on one device, in one memory; all else may differ.
IN_COMMON = ("model_dir", "dtype", "device", "memory_budget", "quantize")

JOIN_S = 0.2


def train_many(
    configs: Sequence[TrainConfig],
    resume: bool = False,
    on_step: Callable[[RunRecord], None] = lambda record: None,
) -> list[RunRecord]:
    """Train every run of `configs`; a layer that is resident takes the batches of all.

    The runs share model_dir, dtype, device, memory_budget and quantize, and may differ in all
    else. Each run's adapter, losses and evaluations are equal bit for bit to those of the run
    alone, and so are its files; its times and bytes are those of the passes that it shares. On a
    CPU, micro-batches of fewer than 256 tokens are multiplied together, best of one length. More
    runs than the budget has room for go one group after another.

    resume: continue each run from its newest checkpoint, and begin those that have none. on_step:
    called after each optimizer step of a run with its record so far.

    A run that fails leaves the others going, and its record's status says why. Where all fail,
    the first OnnError is raised; an error that is none is raised once the others have ended.
    """
    configs = list(configs) if isinstance(configs, Iterable) else [configs]
    if not all(isinstance(config, TrainConfig) for config in configs):
        raise ConfigError("train_many takes a list of TrainConfig: give [TrainConfig(...), ...].")
    runs = [_Run(config) for config in configs]
    device = _require_one_base([run.config for run in runs])
    before = random_state(device)
    with Stop() as stop:
        while waiting := [run for run in runs if run.record is None]:
            group = _set_up(waiting, on_step, stop, before, device)
            _run_group(group, resume)
            if stop.requested:
                notes = [run.error.args for run in group if run.error is not None]
                raise KeyboardInterrupt(*next(iter(notes), ()))
    set_random_state(before, device)
    errors = [run.error for run in runs]
    for error in errors:
        if error is not None and (all(errors) or not isinstance(error, OnnError)):
            raise error
    return [run.record for run in runs]


@dataclasses.dataclass
class _Run:
    """One of the runs: its trainer while it is in a group, then its record, and why it failed."""

    config: TrainConfig
    trainer: ChunkedLoraTrainer | None = None
    random: Any = None  # its state after the set-up
    record: RunRecord | None = None
    error: BaseException | None = None

    def work(self, resume: bool) -> None:
        """The whole run, in a thread of its own."""
        trainer, self.trainer = self.trainer, None
        resume = resume and bool(Checkpoints(trainer.output_dir, 1).paths())
        try:
            trainer.base.streaming.member.run(lambda: trainer.run(resume), self.random)
        except BaseException as error:  # raised by the caller, when the others have ended
            self.error = error
            trainer.part(error)
        self.record = trainer.record


def _require_one_base(configs: Sequence[TrainConfig]) -> torch.device:
    """The device of all runs; ConfigError unless they can go together."""
    if not configs:
        raise ConfigError("train_many needs at least one TrainConfig.")
    for name in IN_COMMON:
        first, *others = (getattr(config, name) for config in configs)
        for other in others:
            if other != first:
                raise ConfigError(
                    f"runs in one pass share {name}, but it is {first!r} and {other!r}: set it to "
                    "one of them, or train these runs apart."
                )
    folders = [Path(config.output_dir).resolve() for config in configs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ConfigError(f"two runs have output_dir {folder}: give each its own.")
    return resolve_device(configs[0].device)


def _set_up(
    waiting: Sequence[_Run],
    on_step: Callable[[RunRecord], None],
    stop: Stop,
    before: Any,
    device: torch.device,
) -> list[_Run]:
    """Set up as many of the runs as the budget has room for; before: the random state alone."""
    together, group = Together(), []
    for run in waiting:
        members = list(together.members)
        set_random_state(before, device)
        trainer = ChunkedLoraTrainer(run.config, on_step, together)
        trainer.stop = stop
        try:
            trainer.setup()
            member, config = trainer.base.streaming.member, trainer.config
            member.n_passes = config.max_steps * config.gradient_accumulation_steps
            if config.eval_every:
                n_samples = config.eval_batch_size or config.batch_size
                with trainer.processes.together():
                    member.expect(trainer.n_rows(n_samples), config.max_length)
            run.trainer, run.random = trainer, random_state(device)
            group.append(run)
        except OnnError as error:
            together.members[:] = members
            for layer in getattr(getattr(trainer, "base", None), "streamed_layers", ()):
                layer.weights.look_away()
            if isinstance(error, TooManyRunsError):
                break
            status = f"stopped: {error}"
            run.error, run.record = error, RunRecord(run.config.without_paths(), status=status)
    return group


def _run_group(group: Sequence[_Run], resume: bool) -> None:
    """Run those that are set up, to the end of the last."""
    if not group:
        return
    together = group[0].trainer.together
    threads = [threading.Thread(target=run.work, args=(resume,), daemon=True) for run in group]
    for thread in threads:
        thread.start()
    together.next()
    for thread in threads:
        while thread.is_alive():  # a signal that another thread took is handled between two waits
            thread.join(JOIN_S)
