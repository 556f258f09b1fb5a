"""Checkpoints of a run as files: folders that are there whole or not at all.

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
import warnings
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


@dataclasses.dataclass
class Saved:
    """One checkpoint, read and found whole."""

    path: Path
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    record: RunRecord


class Checkpoints:
    """The last `keep` checkpoints in `output_dir`, each a folder that is there whole or not."""

    def __init__(self, output_dir: Path, keep: int):
        self.folder = output_dir / FOLDER
        self.keep = keep

    def paths(self) -> list[Path]:
        """The checkpoints, oldest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path for path in found if re.fullmatch(r"step-\d{8,}", path.name))

    def save(self, tensors: dict[str, torch.Tensor], state: dict, record: RunRecord) -> Path:
        """Write the checkpoint of the record's last step, then remove the oldest."""
        path = self.folder / f"step-{len(record.steps):08d}"
        if path.is_dir():  # of this run, so of the same numbers
            return path
        with new_folder(path) as temporary:
            safetensors.torch.save_file(tensors, temporary / FILES[0])  # without a copy in memory
            state = {"schema_version": SCHEMA_VERSION, **state}
            (temporary / FILES[1]).write_text(json.dumps(state, indent=1))
            record.save(temporary / FILES[2])
            sums = [f"{sha256_of(temporary / name)}  {name}\n" for name in FILES]
            (temporary / SUMS).write_text("".join(sums))
        _sync_folder(self.folder)
        for old in self.paths()[: -self.keep]:
            hidden = old.with_name(f"{old.name}.partial-")  # none is ever seen half-removed
            os.replace(old, hidden)
            shutil.rmtree(hidden)
        return path

    def load(self) -> Saved | None:
        """The newest checkpoint that is whole, or None without any; OnnError if all are damaged.

        A damaged one is passed over with a warning and renamed to `damaged-...`.
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

    def read(self, path: Path) -> Saved:
        """The checkpoint at `path`; OSError, ValueError, OnnError or SafetensorError if damaged."""
        sums = dict(
            reversed(line.split("  ", 1)) for line in (path / SUMS).read_text().splitlines()
        )
        for name in FILES:
            if sums.get(name) != sha256_of(path / name):
                raise ValueError(f"the hash of {name} is not the one in {SUMS}")
        state = json.loads((path / FILES[1]).read_bytes())
        if not isinstance(state, dict) or state.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"{FILES[1]} has not schema {SCHEMA_VERSION}")
        if not all(isinstance(state.get(k), dict) for k in ("settings", "scaler", "digests")):
            raise ValueError(f"{FILES[1]} lacks settings, scaler or digests")
        tensors = safetensors.torch.load((path / FILES[0]).read_bytes())
        return Saved(path, tensors, state, RunRecord.load(path / FILES[2]))


def require_writable(folder: Path) -> None:
    """ConfigError if nothing can be written to `folder`, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"output_dir {str(folder)!r} cannot be written ({error.strerror}): choose another."
        ) from error


def remove_left(output_dir: Path) -> None:
    """Remove what a run that was killed left behind under temporary names."""
    names = (".adapter.*", ".record.json.*", ".write-test-*", f"{FOLDER}/step-*.partial-*")
    for left in [path for name in names for path in output_dir.glob(name)]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
