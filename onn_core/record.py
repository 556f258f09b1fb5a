"""What a run measured: JSON out and in, schema versioned."""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import tempfile
import types
import typing
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from onn_core.errors import OnnError

SCHEMA_VERSION = 1
T = TypeVar("T")


@dataclasses.dataclass
class StepRecord:
    """One optimizer step. Times in seconds of wall clock, sizes in bytes."""

    step: int
    samples: int  # in this step
    tokens: int  # in this step, padding included
    counted_tokens: int  # with a label
    loss: float  # mean over counted tokens; over pairs with objective "dpo"
    learning_rate: float
    grad_norm: float  # before clipping
    grad_norm_by_layer: dict[str, float]
    step_s: float
    wait_s: float  # compute stood still for weights
    forward_s: float  # layers only, without waiting
    backward_s: float  # recompute included, without waiting
    head_s: float  # logits and loss, without waiting
    optimizer_s: float
    bytes_read: int
    layer_loads: int
    nonfinite: int = 0  # NaN or Inf seen in loss or gradients
    skipped: bool = False  # gradient scaling found an overflow
    loss_scale: float | None = None
    gathered: bool = False  # each GPU copied a part of the weights, and they exchanged the parts


@dataclasses.dataclass
class EvalRecord:
    """Held-out text before the first step (step 0) or after step `step`."""

    step: int
    samples_seen: int
    wall_s: float  # since the run began
    loss: float  # mean over counted tokens; over pairs with objective "dpo"
    accuracy: float | None = None  # of pairs: how often the chosen answer has the larger reward


@dataclasses.dataclass
class RunRecord:
    """One run: its settings, where it ran, what it measured."""

    config: dict[str, Any]
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: list[StepRecord] = dataclasses.field(default_factory=list)
    evals: list[EvalRecord] = dataclasses.field(default_factory=list)
    peak_memory_bytes: int = 0
    wall_s: float = 0.0
    status: str = "running"  # "finished", or "stopped: why"
    stopped_early: str = ""  # why it finished before max_steps: what early stopping saw
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """This record as JSON values."""
        return dataclasses.asdict(self)

    def save(self, path: str | os.PathLike) -> None:
        """Write this record to `path` as JSON, whole or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "RunRecord":
        """The record whose `to_dict` gave `fields`; TypeError or ValueError if it gave others."""
        return from_json(cls, {name: fields[name] for name in ("steps", "evals")} | fields)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "RunRecord":
        """Read a record that `save` wrote; OnnError if it is not one."""
        return read_json(path, cls.from_dict, "a run record", "run it again")


def read_json(
    path: str | os.PathLike,
    build: Callable[[dict[str, Any]], T],
    what: str,
    advice: str,
) -> T:
    """What `build` makes of the JSON in `path`.

    OnnError, which says what the file should be and gives `advice`, if it cannot be read or has
    another schema version.
    """
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        if (found := fields["schema_version"]) != SCHEMA_VERSION:
            raise ValueError(f"schema {found}, this version reads {SCHEMA_VERSION}")
        return build(fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OnnError(f"{path} is not {what} ({error}): {advice}.") from error


def from_json(kind: Any, value: Any, name: str = "the content") -> Any:
    """`value`, read from JSON, as `kind`, which a dataclass had before `write_json` wrote it.

    kind: a dataclass, or a type as its fields have them. Text such as "nan" becomes the float that
    it stands for. TypeError or ValueError, with `name`, for a value that does not fit.
    """
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is types.UnionType:  # float | None
        return value if type(value) in inner else from_json(inner[0], value, name)
    if kind is Any:
        return value
    if kind is float and isinstance(value, str):
        value = float(value)
    is_record = dataclasses.is_dataclass(kind)
    json_type = dict if is_record else int | float if kind is float else origin
    fits = isinstance(value, json_type) and isinstance(value, bool) == (kind is bool)
    if not fits or (kind is int and value < 0):  # all whole numbers here are counts
        raise TypeError(f"{name} is {str(value)[:100]!r}")
    if is_record:
        kinds = {field.name: field.type for field in dataclasses.fields(kind)}
        return kind(**{key: from_json(kinds.get(key, Any), x, key) for key, x in value.items()})
    if origin is dict:
        return {inner[0](key): from_json(inner[1], x, name) for key, x in value.items()}
    return [from_json(inner[0], x, name) for x in value] if origin is list else value


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as JSON, whole or not at all; a NaN becomes the text "NaN"."""
    write_atomic(path, (json.dumps(_plain(value), indent=1, allow_nan=False) + "\n").encode())


def cache_dir() -> Path:
    """$ONN_CACHE, else $XDG_CACHE_HOME/onn, else ~/.cache/onn; OnnError if there is no home."""
    try:
        if cache := os.environ.get("ONN_CACHE"):
            return Path(cache).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "onn"
    except RuntimeError as error:  # a container's unknown user without $HOME
        raise OnnError(
            "this user has no home directory for the cache: set ONN_CACHE to a folder."
        ) from error


def write_atomic(path: str | os.PathLike, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(content)
        temporary.chmod(0o644)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file that is synced and renamed to `path` when the block ends well, else removed."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        yield Path(name)
        os.fsync(descriptor)
        os.replace(name, path)
    finally:
        os.close(descriptor)
        Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well, whole or not at all.

    When another process has made `folder` in the meantime, that one is left as it is.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.partial-"))
    try:
        yield temporary
        for path in temporary.iterdir():
            path.chmod(0o644)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        temporary.chmod(0o755)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_environment(device: Any = "cpu") -> dict[str, Any]:
    """Hardware, versions and date of this run; no path and no host name."""
    import torch

    packages = ("torch", "transformers", "peft", "safetensors")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": _processor_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),  # on which the order of sums depends
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "device": torch.cuda.get_device_name() if str(device).startswith("cuda") else "cpu",
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in packages},
    }


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _plain(value: Any) -> Any:
    """`value` in JSON's own types; a non-finite float becomes text that float() reads."""
    if isinstance(value, float) and value - value != 0:
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
