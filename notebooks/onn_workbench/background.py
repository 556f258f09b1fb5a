"""Training in a thread of its own: it can be paused, stopped, asked and watched."""

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from onn_core.adapters.lora import save_adapter
from onn_core.config import TrainConfig
from onn_core.errors import OnnError
from onn_core.many import train_many
from onn_core.record import RunRecord
from onn_core.run.checkpoints import require_writable
from onn_core.streaming.visits import Event
from onn_core.trainer import ChunkedLoraTrainer

ENDED = ("finished", "stopped", "failed")
_going: list["BackgroundRun"] = []  # those of this process that have begun and not ended


class BackgroundRun:
    """Trains in a thread; the caller's thread, and with it a kernel's interrupt, stays free.

    configs: of one run, or of several that share one pass over the weights. resume: whether each
    continues from its newest checkpoint. on_change: called after each step and at each change of
    `state`, mostly in the run's thread.

    state: "ready", "running", "pausing", "paused", "stopping", then "finished", "stopped" or
    "failed". error: why, or which of several runs ended early. records: folder's name -> the record
    so far. events: (phase or "read", unit, start, stop) of the last step of a single run, in
    seconds.
    """

    def __init__(
        self,
        configs: TrainConfig | Sequence[TrainConfig],
        on_change: Callable[["BackgroundRun"], None] = lambda run: None,
        resume: bool = False,
    ):
        self.configs = [configs] if isinstance(configs, TrainConfig) else list(configs)
        self.config = self.configs[0]
        self.on_change = on_change
        self.resume = resume
        self.state = "ready"
        self.records: dict[str, RunRecord] = {}
        self.error = ""
        self.events: list[Event] = []
        self.trainer: _TracedTrainer | None = None  # of a single run
        if len(self.configs) == 1:
            self.trainer = _TracedTrainer(self.config, self._on_step)
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._between, self._acts = threading.Lock(), []
        self._go = threading.Event()
        self._go.set()
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="onn-run", daemon=True)

    @classmethod
    def going_under(cls, folder: str | os.PathLike) -> "BackgroundRun | None":
        """The run of this process that goes on in `folder`, or None."""
        folder = Path(folder).resolve()
        inside = (run for run in _going if folder in Path(run.config.output_dir).resolve().parents)
        return next(inside, None)

    @property
    def record(self) -> RunRecord | None:
        """The record of the run, or of the first of several, once there is one."""
        return next(iter(self.records.values()), None)

    @property
    def alive(self) -> bool:
        """Whether the run has begun and not ended; who watches it may still draw its end."""
        return self.state not in ("ready", *ENDED)

    def start(self) -> None:
        """Begin; returns at once."""
        _going.append(self)
        self._set("running")
        self._thread.start()

    def pause(self) -> None:
        """Stand still after the current step, until `go_on` or `stop`."""
        if self.state == "running":
            self._go.clear()
            self._set("pausing")

    def go_on(self) -> None:
        """Continue a paused run."""
        if self.state in ("pausing", "paused"):
            self._set("running")
            self._go.set()

    def stop(self) -> None:
        """End at the next layer (several: after a step); what the last step left is saved."""
        if self.state in ("running", "pausing", "paused"):
            self._stop = True
            self._set("stopping")
            if self.trainer is not None:
                self.trainer.stop.request()
            self._go.set()

    def wait(self) -> None:
        """Until the run has ended and `on_change` has seen it; an interrupt stops the run first."""
        try:
            # an interrupted Thread.join would forget the thread
            while self.state != "ready" and not self._ended.wait(0.2):
                pass
        except KeyboardInterrupt:
            self.stop()
            self._ended.wait()
            raise

    def between_steps(self, act: Callable[[ChunkedLoraTrainer], Any]) -> bool:
        """Do `act(trainer)` where no step runs; False if that comes after this step."""
        if self.state in ("running", "pausing", "stopping"):
            self._acts.append(act)
            return False
        with self._between:
            act(self.trainer)
        return True

    def save_adapter(self, folder: str | os.PathLike) -> bool:
        """Save the adapter as it is between two steps; False if that comes after this step.

        ConfigError if the folder cannot be written.
        """
        require_writable(Path(folder))
        return self.between_steps(lambda trainer: save_adapter(trainer.model, folder))

    def _set(self, state: str) -> None:
        with self._lock:
            if self.state in ENDED:  # just now, in the other thread
                return
            self.state = state
        self.on_change(self)

    def _run(self) -> None:
        try:
            if self.trainer is not None:
                self.trainer.train(resume=self.resume)
            else:
                records = train_many(self.configs, resume=self.resume, on_step=self._on_step)
                ended = (f"{r.config['output_dir']} {r.status}" for r in records)
                self.error = "; ".join(text for text in ended if not text.endswith(" finished"))
            state = "finished"
        except KeyboardInterrupt:
            state = "stopped"
        except Exception as error:  # told where the run is watched: nobody waits for the thread
            self.error = str(error) if isinstance(error, OnnError) else repr(error)
            state = "failed"
        try:
            if state != "failed":
                self._do_acts()
            self._set(state)
        finally:
            _going.remove(self)
            self._ended.set()

    def _do_acts(self) -> None:
        while self._acts:
            self._acts.pop(0)(self.trainer)

    def _on_step(self, record: RunRecord) -> None:
        self.records[record.config["output_dir"]] = record
        if self.trainer is not None:
            self.events = self.trainer.take_events()
            self._do_acts()
        if not self._go.is_set():
            self._set("paused")
            self._go.wait()
            with self._between:  # what was begun meanwhile ends first
                pass
        if not self._stop:
            self.on_change(self)
        elif self.trainer is None:
            raise KeyboardInterrupt
        else:
            self.trainer.stop.request()


class _TracedTrainer(ChunkedLoraTrainer):
    """Knows what was computed and read in the last step, and when."""

    def setup(self) -> None:
        super().setup()
        self.tracing = contextlib.ExitStack()
        self.events = self.tracing.enter_context(self.base.trace())
        self.stop.check()  # a stop that was asked for meanwhile

    def take_events(self) -> list[Event]:
        """The events of the step that has ended, without evaluations; those before are dropped."""
        n_events = len(self.events)  # reading ahead adds more meanwhile
        events = sorted(self.events[:n_events], key=lambda event: event[2])
        del self.events[:n_events]
        backward = [event for event in events if event[0] == "backward"]
        if not backward:
            return []
        begin = max(e[2] for e in events if e[:2] == ("forward", 0) and e[2] < backward[0][2])
        end = max(event[3] for event in backward)
        return [event for event in events if event[3] >= begin and event[2] <= end]
