"""Checkpoints of a run as files: each is a folder that is complete or does not exist.

checkpoints/step-00000012/
  state.safetensors    adapter, optimizer, random states
  state.json           settings, fingerprints of weights and text, scaler
  record.json          what was measured so far
  SHA256SUMS           of these; `sha256sum -c SHA256SUMS` checks them too
"""

import dataclasses
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from onn_core.errors import ConfigError, OnnError
from onn_core.record import RunRecord, new_folder, sha256_of

SCHEMA_VERSION = 1
FOLDER = "checkpoints"
FILES = ("state.safetensors", "state.json", "record.json")
SUMS = "SHA256SUMS"
FLOAT_MAX = torch.finfo(torch.float32).max
# Of torch.amp.GradScaler; torch takes the floats as float32, the whole numbers as int32.
SCALER_FIELDS: dict[str, tuple[type, Callable[[Any], bool]]] = {
    "scale": (float, lambda value: 0 < value <= FLOAT_MAX),
    "growth_factor": (float, lambda value: 1 < value <= FLOAT_MAX),
    "backoff_factor": (float, lambda value: 0 < value < 1),
    "growth_interval": (int, lambda value: 1 <= value < 2**31),
    "_growth_tracker": (int, lambda value: 0 <= value < 2**31),
}


@dataclasses.dataclass
class Checkpoint:
    """One saved run, read and checked."""

    path: Path
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    record: RunRecord

    def pack(self) -> bytes:
        """All of it, as one safetensors file, for the other processes of a run."""
        texts = {"state": json.dumps(self.state), "record": json.dumps(self.record.to_dict())}
        return safetensors.torch.save(self.tensors, texts)

    @classmethod
    def unpack(cls, content: bytes) -> "Checkpoint":
        """What `pack` packed."""
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        state, record = (json.loads(header["__metadata__"][name]) for name in ("state", "record"))
        record = RunRecord.from_dict(record)
        return cls(Path(), safetensors.torch.load(content), state, record)


class Checkpoints:
    """The newest `n_retained` checkpoints in `output_dir`."""

    def __init__(self, output_dir: Path, n_retained: int):
        self.folder = output_dir / FOLDER
        self.n_retained = n_retained

    def paths(self) -> list[Path]:
        """The checkpoints, oldest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path for path in found if re.fullmatch(r"step-\d{8,}", path.name))

    def save(self, tensors: dict[str, torch.Tensor], state: dict, record: RunRecord) -> Path:
        """Write the checkpoint of the record's last step, then remove the oldest."""
        path = self.folder / f"step-{len(record.steps):08d}"
        if path.is_dir():  # the same step of the same run has the same numbers
            return path
        with new_folder(path) as temporary:
            safetensors.torch.save_file(tensors, temporary / FILES[0])
            state = {"schema_version": SCHEMA_VERSION, **state}
            (temporary / FILES[1]).write_text(json.dumps(state, indent=1))
            record.save(temporary / FILES[2])
            sums = [f"{sha256_of(temporary / name)}  {name}\n" for name in FILES]
            (temporary / SUMS).write_text("".join(sums))
        _sync_folder(self.folder)
        for old in self.paths()[: -self.n_retained]:
            # Renamed first, so that nobody ever sees a checkpoint of which a part is gone.
            hidden = old.with_name(f"{old.name}.partial-")
            os.replace(old, hidden)
            shutil.rmtree(hidden)
        return path

    def load(self) -> Checkpoint | None:
        """The newest checkpoint that is sound, or None if there is none at all.

        A damaged one is passed over with a warning and renamed to `damaged-...`. OnnError if all
        of them are damaged.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                return self.read(path)
            except (OSError, ValueError, OnnError, safetensors.SafetensorError) as error:
                reason = error
            number = len(list(self.folder.glob("damaged-*")))
            os.replace(path, path.with_name(f"damaged-{number}-{path.name}"))
            warnings.warn(
                f"{FOLDER}/{path.name} is damaged ({reason}): the one before is used.",
                stacklevel=3,
            )
        if paths:
            raise OnnError(
                f"every checkpoint in {self.folder} is damaged: start again without resume."
            )
        return None

    def set_aside(self) -> None:
        """Make room for a new run: what an earlier one saved goes to `checkpoints-before`."""
        if self.paths():
            before = self.folder.with_name(f"{FOLDER}-before")
            shutil.rmtree(before, ignore_errors=True)
            os.replace(self.folder, before)

    def read(self, path: Path) -> Checkpoint:
        """The checkpoint at `path`; OSError, ValueError, OnnError or SafetensorError if damaged."""
        sums = dict(
            reversed(line.split("  ", 1)) for line in (path / SUMS).read_text().splitlines()
        )
        for name in FILES:
            if sums.get(name) != sha256_of(path / name):
                raise ValueError(f"the hash of {name} is not the one in {SUMS}")
        state = json.loads((path / FILES[1]).read_bytes())
        require_state(state)
        tensors = safetensors.torch.load((path / FILES[0]).read_bytes())
        return Checkpoint(path, tensors, state, RunRecord.load(path / FILES[2]))


def require_state(state: Any) -> None:
    """ValueError unless `state` has the fields of state.json, each of its type and range.

    A scaler of 2.5 steps or of a negative scale would otherwise fail in the first step, inside
    torch.
    """
    if not isinstance(state, dict) or state.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{FILES[1]} has not schema {SCHEMA_VERSION}")
    kinds = {"settings": dict, "weights": str, "text": str, "scaler": dict, "digests": dict}
    for name, kind in kinds.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"{FILES[1]} lacks {name}")
    scaler = state["scaler"]
    if scaler and scaler.keys() != SCALER_FIELDS.keys():  # one that is not enabled has no fields
        raise ValueError(f"the scaler in {FILES[1]} has other fields than GradScaler")
    for name, value in scaler.items():
        kind, is_in_range = SCALER_FIELDS[name]
        number = isinstance(value, int | kind) and not isinstance(value, bool)
        if not number or not is_in_range(value):
            raise ValueError(f"the scaler in {FILES[1]} has {name} {str(value)[:100]}")
    if not all(isinstance(digest, str) for digest in state["digests"].values()):
        raise ValueError(f"{FILES[1]} has digests that are no text")


def require_writable(folder: Path) -> None:
    """ConfigError if nothing can be written to `folder`, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.NamedTemporaryFile(dir=folder, prefix=".write-test-").close()
    except OSError as error:
        raise ConfigError(
            f"output_dir {str(folder)!r} cannot be written ({error.strerror}): choose another."
        ) from error


def remove_leftovers(output_dir: Path) -> None:
    """Remove what a run that was killed left behind under temporary names."""
    names = (".adapter.*", ".record.json.*", ".write-test-*", f"{FOLDER}/step-*.partial-*")
    for path in [path for name in names for path in output_dir.glob(name)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
