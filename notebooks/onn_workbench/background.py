"""A training run in a thread of its own: it can be paused, stopped and watched."""

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from onn_core.adapters.lora import save_adapter
from onn_core.config import TrainConfig
from onn_core.errors import OnnError
from onn_core.record import RunRecord
from onn_core.run.checkpoints import require_writable
from onn_core.streaming.visits import Event
from onn_core.trainer import ChunkedLoraTrainer
from onn_workbench import engine

ENDED = ("finished", "stopped", "failed")


class BackgroundRun:
    """Trains in a thread; the caller's thread, and with it a kernel's interrupt, stays free.

    on_change: called after each step and at each change of `state`, mostly in the run's thread.
    state: "ready", "running", "pausing", "paused", "stopping", then "finished", "stopped" or
    "failed". events: (phase or "read", unit, start, stop) of the last step, in seconds.
    """

    def __init__(
        self, config: TrainConfig, on_change: Callable[["BackgroundRun"], None] = lambda run: None
    ):
        self.config = config
        self.on_change = on_change
        self.state = "ready"
        self.record: RunRecord | None = None
        self.error = ""
        self.events: list[Event] = []
        self._trainer = _TracedTrainer(config, self._on_step)
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._go = threading.Event()
        self._go.set()
        self._stop = False
        self._save_to: str | os.PathLike | None = None
        self._thread = threading.Thread(target=self._run, name="onn-run", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the run has begun and not ended."""
        return self.state != "ready" and not self._ended.is_set()

    def start(self) -> None:
        """Begin; returns at once."""
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
        """End at the next layer; what the last whole step left is saved."""
        if self.state in ("running", "pausing", "paused"):
            self._stop = True
            self._set("stopping")
            self._trainer.stop.request()
            self._go.set()

    def wait(self) -> None:
        """Until the run has ended; an interrupt stops the run."""
        try:
            while self.alive:  # an interrupted Thread.join would forget the thread
                self._ended.wait(0.2)
        except KeyboardInterrupt:
            self.stop()
            raise

    def save_adapter(self, folder: str | os.PathLike) -> bool:
        """Save the adapter as it is between two steps; False if that comes after this step.

        ConfigError if the folder cannot be written.
        """
        require_writable(Path(folder))
        if self.state in ("running", "pausing", "stopping"):
            self._save_to = folder
            return False
        save_adapter(self._trainer.model, folder)
        return True

    def _set(self, state: str) -> None:
        with self._lock:
            if self.state in ENDED:  # just now, in the other thread
                return
            self.state = state
        self.on_change(self)

    def _run(self) -> None:
        try:
            self.record = self._trainer.train()
            state = "finished"
        except KeyboardInterrupt:
            state = "stopped"
        except Exception as error:  # told where the run is watched: nobody waits for the thread
            self.error = str(error) if isinstance(error, OnnError) else repr(error)
            state = "failed"
        try:
            if self._save_to is not None and state != "failed":
                save_adapter(self._trainer.model, self._save_to)
            self._set(state)
        finally:
            self._ended.set()

    def _on_step(self, record: RunRecord) -> None:
        self.record = record
        self.events = self._trainer.take_events()
        if self._save_to is not None:
            save_adapter(self._trainer.model, self._save_to)
            self._save_to = None
        if not self._go.is_set():
            self._set("paused")
            self._go.wait()
        if self._stop:
            self._trainer.stop.request()
        else:
            self.on_change(self)


class _TracedTrainer(ChunkedLoraTrainer):
    """Knows what was computed and read in the last step, and when."""

    def setup(self) -> None:
        super().setup()
        self.tracing = contextlib.ExitStack()
        self.events = self.tracing.enter_context(engine.trace(self.base))
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
