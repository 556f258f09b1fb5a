"""Saves all that training changes and restores it: a resumed run is equal bit for bit.

The batches of a step, its learning rate and what its dropout draws depend on the seed and the
step's number alone, so that number stands for the position in the data and in the schedule.
"""

import hashlib
import time
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import SafetensorError

from onn_core.adapters.lora import save_adapter
from onn_core.config import TrainConfig
from onn_core.errors import OnnError
from onn_core.processes import ALONE, Processes
from onn_core.record import RunRecord
from onn_core.run.checkpoints import Checkpoint, Checkpoints, remove_leftovers
from onn_core.weights.folder import ModelFolder

# A resumed run may have other values of these settings: they change where a run is and how fast it
# goes, not its numbers.
MAY_DIFFER = {
    *("model_dir", "data", "output_dir", "adapter", "chunk_size", "memory_budget", "progress"),
    *("host_budget", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints"),
    *("verify_weights", "early_stopping_patience", "early_stopping_threshold"),
}
ADAMW_STATE = {"step", "exp_avg", "exp_avg_sq"}  # of each parameter that has had a gradient


class TrainingState:
    """Everything that an optimizer step changes."""

    def __init__(
        self,
        model: peft.PeftModel,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ):
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = optimizer  # of these parameters, in this order
        self.scaler = scaler

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state after the last finished step, on the CPU."""
        tensors = {f"adapter/{name}": p.detach() for name, p in self.trained.items()}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value.detach()
        return {name: values.cpu().contiguous() for name, values in tensors.items()}

    def restore(self, tensors: dict[str, torch.Tensor], scaler: dict[str, Any]) -> None:
        """Set everything to what `tensors` and `scaler` say; OnnError if they do not fit.

        scaler: the state of a GradScaler, checked by `require_state`.
        """
        numbers = {name: number for number, name in enumerate(self.trained)}
        state: dict[int, dict[str, torch.Tensor]] = {}
        try:
            for name, values in tensors.items():
                key, _, name = name.partition("/")
                if key == "random":  # of an earlier version
                    continue
                parameter = self.trained[name]
                _require_like(f"{key} of {name}", values, parameter, key)
                if key != "adapter":
                    state.setdefault(numbers[name], {})[key] = values
            if not all(own.keys() == ADAMW_STATE for own in state.values()):
                raise ValueError("the optimizer's state lacks some tensors")
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(tensors[f"adapter/{name}"])
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
            self.scaler.load_state_dict(scaler)
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise OnnError(
                f"the checkpoint does not fit this model ({error}): start again without resume."
            ) from error


def _require_like(what: str, values: torch.Tensor, parameter: torch.nn.Parameter, key: str) -> None:
    """ValueError unless `values` has the shape and dtype of the state `key` of `parameter`."""
    if key == "step":  # a float32 number of steps
        if values.shape or values.dtype != torch.float32 or not 1 <= float(values) < 2**24:
            raise ValueError(f"{what} is no number of steps")
    elif (values.shape, values.dtype) != (parameter.shape, parameter.dtype):
        raise ValueError(f"{what} has shape {list(values.shape)}, {values.dtype}")


class RunSaver:
    """Saves a run after any finished step, and restores it.

    run: what `describe_run` says. digests: hashes of the weights that were read, if they are
    verified; readers add to it. processes: of the run, of which one writes. whole: False while a
    step is changing the state, which must not be saved then.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: peft.PeftModel,
        state: TrainingState,
        run: dict[str, Any],
        digests: dict[str, str] | None = None,
        processes: Processes = ALONE,
    ):
        self.processes = processes
        self.config = config
        self.model = model
        self.state = state
        self.run = run
        self.digests = digests
        self.whole = True
        self.output_dir = Path(config.output_dir)
        self.checkpoints = Checkpoints(self.output_dir, config.keep_checkpoints)
        self._saved_at = time.monotonic()  # unlike time.time(), it is never set back

    def begin(self, fresh: RunRecord, resume: bool) -> RunRecord:
        """The record to continue: `fresh`, or that of the newest checkpoint, once restored.

        resume: whether to look for one; else earlier ones are set aside. OnnError if the newest is
        of another run or does not fit.
        """
        if self.processes.size == 1:
            saved = self._find(resume)
        else:
            found = self.processes.share(lambda: (s := self._find(resume)) and s.pack() or b"")
            saved = Checkpoint.unpack(found) if found else None
        if saved is None:
            return fresh
        require_same_run(saved.state, self.run, len(saved.record.steps))
        self.state.restore(saved.tensors, saved.state["scaler"])
        if self.digests is not None:
            self.digests.update(saved.state["digests"])
        one = {"processes": 1}  # of an earlier version
        ours, theirs = (one | r.environment | {"date": ""} for r in (fresh, saved.record))
        if ours != theirs and self.processes.is_first:
            warnings.warn(
                "the checkpoint is of another machine, other versions or another number of "
                "threads or processes: the resumed run may differ from a whole one in the last "
                "bits, and in what dropout draws.",
                stacklevel=3,
            )
        saved.record.config, saved.record.status = fresh.config, "running"
        saved.record.stopped_early = ""
        return saved.record

    def _find(self, resume: bool) -> Checkpoint | None:
        """The checkpoint to continue from, in the process that writes; what is in the way goes."""
        remove_leftovers(self.output_dir)
        if not resume:
            self.checkpoints.set_aside()
            return None
        saved = self.checkpoints.load()
        if saved is None:
            warnings.warn(f"{self.output_dir} has no checkpoint: starts at step 1.", stacklevel=4)
        return saved

    def save_if_due(self, record: RunRecord) -> None:
        """Save a checkpoint if enough steps or minutes have passed since the last."""
        every, minutes = self.config.checkpoint_every, self.config.checkpoint_minutes
        by_time = minutes and time.monotonic() - self._saved_at >= 60 * minutes
        due = by_time or (every and len(record.steps) % every == 0)
        if due and self.processes.is_first:
            self._save_checkpoint(record)
            self._saved_at = time.monotonic()

    def save(self, record: RunRecord) -> None:
        """Save a checkpoint, the adapter and the record; OnnError if they cannot be written.

        One process does; of those that have lost one, each that knows no later step.
        """
        with self.processes.writing(self.output_dir) as writes:
            last = [path.name for path in self.checkpoints.paths()[-1:]]
            if not writes or self.processes.lost and last > [f"step-{len(record.steps):08d}"]:
                return
            self._save_checkpoint(record)
            try:
                save_adapter(self.model, self.output_dir / "adapter")
                record.save(self.output_dir / "record.json")
            except (OSError, SafetensorError) as error:
                raise self._cannot_write(error) from error

    def save_stopped(self, record: RunRecord, error: BaseException) -> None:
        """Save what the last finished step left, and note in `error` how to continue."""
        record.status = f"stopped: {str(error) or type(error).__name__}"
        if not self.whole:
            return
        try:
            self.save(record)
            done = f"stopped after step {len(record.steps)} of {self.config.max_steps}"
            note = f"{done}: train(resume=True) continues from there"
        except OnnError as problem:
            note = str(problem)
        if not error.args:  # a KeyboardInterrupt
            error.args = (note,)
        elif note != str(error):
            error.add_note(note)

    def _save_checkpoint(self, record: RunRecord) -> None:
        try:
            digests = dict(self.digests or {})  # a copy: readers add to it meanwhile
            state = {**self.run, "scaler": self.state.scaler.state_dict(), "digests": digests}
            self.checkpoints.save(self.state.tensors(), state, record)
        except (OSError, SafetensorError) as error:
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: Exception) -> OnnError:
        return OnnError(
            f"{self.output_dir} cannot be written ({getattr(error, 'strerror', None) or error}): "
            "make room or allow it; train(resume=True) then continues from the last checkpoint."
        )


def describe_run(config: TrainConfig, model_folder: ModelFolder, text: str) -> dict[str, Any]:
    """What must be equal for a resumed run to be the same run, as JSON values.

    The weights' fingerprint covers every tensor's name, dtype, shape and first row. text: that of
    all tokens.
    """
    weights = hashlib.sha256()
    for name, entry in sorted(model_folder.tensors.items()):
        weights.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
        if entry.n_bytes:
            row = torch.zeros(1, dtype=torch.int64)
            first = model_folder.read_rows(name, row) if entry.shape else model_folder.read(name)
            weights.update(first.flatten().view(torch.uint8).numpy())
    settings = {k: v for k, v in config.to_dict().items() if k not in MAY_DIFFER}
    return {"settings": settings, "weights": weights.hexdigest(), "text": text}


def require_same_run(saved: dict[str, Any], now: dict[str, Any], n_steps: int) -> None:
    """OnnError if a run that is `now` would not continue the one that was `saved`.

    More steps are allowed where they change nothing of those that were done.
    """
    before, after = dict(saved["settings"]), dict(now["settings"])
    if after["lr_schedule"] == "constant" and after["max_steps"] >= n_steps:
        before.pop("max_steps", None), after.pop("max_steps")
    names = sorted(before.keys() | after.keys())
    changed = [
        f"{name} was {before.get(name)!r} and is {after.get(name)!r}"
        for name in names
        if before.get(name) != after.get(name)
    ]
    changed += ["the weights are others"] if saved.get("weights") != now["weights"] else []
    changed += ["the text is another"] if saved.get("text") != now["text"] else []
    if changed:
        raise OnnError(
            f"the run cannot be resumed: {'; '.join(changed)}. Set it back, or train without "
            "resume (the old checkpoints are set aside)."
        )
