"""`TrainConfig`: every setting of a run, as plain values that papermill can set."""

import dataclasses
import itertools
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onn_core.errors import ConfigError

DEFAULT_STEPS = 100
LR_SCHEDULES = ("constant", "linear", "cosine")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
PREFIXES = "KMGT"  # of bytes: powers of 1000, or of 1024 with an "i" behind them
SIZE_PATTERN = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(?:([KMGT])(I?)B?|B)")


def parse_bytes(size: int | float | str | None) -> int | None:
    """Bytes of `size`: a number of bytes, or text such as "4GB", "4G" (10^9) or "1.5 GiB" (2^30).

    None stays None. ConfigError for what is neither, or less than one byte.
    """
    if size is None:
        return None
    size_bytes = 0
    if isinstance(size, str) and (match := SIZE_PATTERN.fullmatch(size.strip().upper())):
        number, prefix, binary = match.groups()
        power = PREFIXES.index(prefix) + 1 if prefix else 0
        size_bytes = int(float(number) * (1024 if binary else 1000) ** power)
    elif isinstance(size, int | float) and not isinstance(size, bool) and 0 < size < 2**63:
        size_bytes = int(size)
    if size_bytes < 1:
        raise ConfigError(
            f"memory size {size!r} is not understood: write text with its unit, such as "
            '"4GB", "500M" or "1.5 GiB", or a number of bytes.'
        )
    return size_bytes


def dtype_name(dtype: Any) -> str:
    """The name of `dtype`, a torch.dtype or text: "bfloat16" of "bf16" and "torch.bfloat16"."""
    name = str(dtype).removeprefix("torch.")
    return DTYPE_ALIASES.get(name, name)


def expand_home(path: str | os.PathLike) -> str | os.PathLike:
    """`path` with a leading "~" or "~user" as that home; ConfigError if that is not known.

    Or if `path` is none.
    """
    if not isinstance(path, str | os.PathLike) or "\0" in str(path):
        raise ConfigError(f"{path!r:.60} is no path: give one as text.")
    if not str(path).startswith("~"):
        return path
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{path} begins with a home directory that is not known here: write the whole path."
        ) from error


def _setting(default: Any, **rule: Any) -> Any:
    """A field of TrainConfig and what `_require` asks of its value."""
    return dataclasses.field(default=default, metadata=rule)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run; validated when made.

    model_dir: Hugging Face folder with config.json and safetensors, or a GGUF file.
    data: "chatterbot", the path of a file (.json, .jsonl, .csv, .parquet, .txt ...) or of a folder
        of files, a `datasets.Dataset`, or an iterable of rows; `data.read_rows` says of what form.
    output_dir: where the adapter, the checkpoints and record.json go.
    adapter: a PEFT folder to continue from; sparse_layers, target_modules and lora_rank, lora_alpha
        and lora_dropout are then its own.
    sparse_layers: the decoder layers that get adapters: "all", "ends:4", "last:8" or numbers.
    target_modules: names of linear modules in a layer; None or "all-linear" is all of them. The
        experts of a mixture are usually no modules but three-dimensional parameters, which this
        leaves out.
    target_parameters: names of parameters in a layer that get adapters as well, such as
        "mlp.experts.gate_up_proj"; lora_dropout must then be 0.
    micro_batch_size: samples that go through a layer together; None is the whole batch.
    memory_budget: bytes or "4GB"; plans what is not given. None makes `chunk_size` layers resident.
    host_budget: bytes or "4GB" of host memory that may hold weights for a device; "auto" is what is
        free, less an eighth. The processes of a host share it, also on a CPU, which needs none for
        one process. In addition each process pins what its largest layer takes, to read ahead.
    quantize: "int8" or "nf4": quantise a dense folder once, into the cache; None streams it as it
        is stored.
    objective: "sft" learns answers; "dpo" prefers chosen answers to rejected ones (rows of prompt,
        chosen and rejected), against the base without any adapter, also where `adapter` continues
        one. batch_size then counts pairs, micro_batch_size single answers.
    dpo_beta: how strongly the base holds what is trained, as TRL's beta.
    lora_dtype: "float32" (sound) or "model", the model's own dtype.
    checkpoint_every, checkpoint_minutes: steps, minutes from one checkpoint to the next, whichever
        comes first; 0 is never. The end of a run, whatever its cause, writes one as well.
    keep_checkpoints: how many of the newest checkpoints are retained.
    verify_weights: hash every streamed piece and compare it with what it was at first; else a
        changed shard is told by its size and modification time alone.
    max_steps, num_train_epochs: as in transformers, max_steps is taken where both are given; 100
        steps where none is.
    chat_template: the text of a chat template or the path of a .jinja file; None is the
        tokenizer's own.
    completion_only: learn the assistant's answers alone; False: every token of a conversation.
    train_on: learn "all" answers of a conversation, or the "last".
    packing: put short rows together into samples of max_length; attention stays within each row.
    loss_scale: None, a fixed factor, or "dynamic" (for float16: from 2^16 on, halved when a step
        overflows, doubled after 2000 that do not). A step that overflows is skipped.
    shuffle_targets: 0, or the number of a shuffle of all training targets, for a control.
    eval_batch_size: samples in a batch of the evaluation; None is `batch_size`.
    early_stopping_patience, early_stopping_threshold: as in transformers, stop when the held-out
        loss was not below its best by more than the threshold in so many evaluations in a row; None
        never stops early. The adapter is that of the last step.
    """

    model_dir: str
    data: str | Iterable[dict[str, Any]]
    output_dir: str
    # adapter
    adapter: str | None = None
    sparse_layers: str | Sequence[int] = "all"
    lora_rank: int = _setting(8, least=1)
    lora_alpha: float = _setting(16, above=0)
    lora_dropout: float = _setting(0.0, least=0, below=1)
    target_modules: str | Sequence[str] | None = None
    target_parameters: str | Sequence[str] | None = None
    lora_dtype: str = _setting("float32", choices=("float32", "model"))
    # streaming
    chunk_size: int = _setting(1, least=1)
    batch_size: int = _setting(32, least=1)
    micro_batch_size: int | None = _setting(None, least=1)
    memory_budget: int | str | None = None
    host_budget: int | str | None = "auto"
    quantize: str | None = _setting(None, choices=(None, "int8", "nf4"))
    device: str = "auto"
    dtype: str = _setting("auto", choices=DTYPES)
    # optimisation
    objective: str = _setting("sft", choices=("sft", "dpo"))
    dpo_beta: float = _setting(0.1, above=0)
    max_steps: int | None = None
    num_train_epochs: float | None = _setting(None, above=0)
    gradient_accumulation_steps: int = _setting(1, least=1)
    learning_rate: float = _setting(2e-4, least=0)
    lr_schedule: str = _setting("linear", choices=LR_SCHEDULES)
    warmup_steps: int = _setting(0, least=0)
    weight_decay: float = _setting(0.0, least=0)
    max_grad_norm: float | None = _setting(1.0, above=0)
    loss_scale: float | str | None = _setting(None, above=0, also=("dynamic",))
    # data and evaluation
    max_length: int = _setting(128, least=1)
    chat_template: str | None = None
    completion_only: bool = True
    train_on: str = "all"
    held_out_fraction: float = _setting(0.1, least=0, below=1)
    packing: bool = False
    shuffle_targets: int = _setting(0, least=0)
    eval_every: int = _setting(0, least=0)
    eval_samples: int = _setting(64, least=1)
    eval_batch_size: int | None = _setting(None, least=1)
    early_stopping_patience: int | None = _setting(None, least=1)
    early_stopping_threshold: float = _setting(0.0, least=0)
    seed: int = _setting(0, least=0)
    # checkpoints
    checkpoint_every: int = _setting(0, least=0)
    checkpoint_minutes: float = _setting(10.0, least=0)
    keep_checkpoints: int = _setting(2, least=1)
    verify_weights: bool = False
    progress: bool = True

    def __post_init__(self):
        for name in ("model_dir", "data", "output_dir", "adapter"):
            value = getattr(self, name)
            if name == "adapter" and value is None or name == "data" and _is_dataset(value):
                continue
            if not isinstance(value, str | os.PathLike) or not str(value):
                raise ConfigError(f"{name} must be a path, not {value!r}.")
            self._set(name, str(expand_home(value)))
        if self.target_modules == "all-linear":
            self._set("target_modules", None)
        for name in ("target_modules", "target_parameters"):
            self._set(name, _names(name, getattr(self, name)))
        self._set("dtype", dtype_name(self.dtype))
        for field in dataclasses.fields(self):
            _require(field, getattr(self, field.name))
        self._set("max_steps", self._choose_steps())
        require_learned(self.completion_only, self.train_on)
        if self.early_stopping_patience is not None and not self.eval_every:
            raise ConfigError("early_stopping_patience counts evaluations: set eval_every.")
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ConfigError(
                f"micro_batch_size {self.micro_batch_size} is larger than batch_size "
                f"{self.batch_size}: lower it or leave it None."
            )
        if self.objective == "dpo":
            for name in ("packing", "shuffle_targets", "completion_only", "train_on"):
                default = type(self).__dataclass_fields__[name].default
                if getattr(self, name) != default:
                    raise ConfigError(f'objective "dpo" takes no {name}: set it to {default!r}.')
        if self.chat_template is not None:
            if not isinstance(self.chat_template, str | os.PathLike) or not str(self.chat_template):
                raise ConfigError("chat_template must be the text or the path of a template.")
            self._set("chat_template", str(self.chat_template))
        if self.target_parameters and self.lora_dropout:
            raise ConfigError("target_parameters cannot take lora_dropout: set it to 0.")
        parse_bytes(self.memory_budget)
        if self.host_budget not in ("auto", 0):
            parse_bytes(self.host_budget)

    def _set(self, name: str, value: Any) -> None:
        """Set a field of this frozen object while it is made."""
        object.__setattr__(self, name, value)

    def _choose_steps(self) -> int | None:
        """`max_steps` as a number; None while `num_train_epochs` alone says how long a run is."""
        if self.num_train_epochs is not None and self.max_steps in (None, 0, -1):
            return None  # as in transformers
        steps = DEFAULT_STEPS if self.max_steps is None else self.max_steps
        require_integer("max_steps", steps)
        return steps

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if _is_dataset(self.data):
            size = f" of {len(self.data)} rows" if hasattr(self.data, "__len__") else ""
            values["data"] = type(self.data).__name__ + size
        return {
            name: list(value) if isinstance(value, tuple | range | list) else value
            for name, value in values.items()
        }

    def without_paths(self) -> dict[str, Any]:
        """The settings as JSON values, with names in place of paths of this machine."""
        values = self.to_dict()
        names = ["model_dir", "data", "output_dir", "adapter"]
        if "{" not in (values["chat_template"] or ""):
            names.append("chat_template")
        return values | {name: Path(values[name]).name for name in names if values[name]}


def expand_grid(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The settings of every run that `settings` means: of each combination of its grid.

    settings: of TrainConfig; beside them "grid" may hold settings with a list of values each. A
    run's output_dir is then a folder of the common one, named for its values.
    """
    common = dict(settings)
    grid = common.pop("grid", None)
    if grid is None:
        return [common]
    if not isinstance(grid, Mapping) or not all(isinstance(x, list) and x for x in grid.values()):
        raise ConfigError(f"grid must map settings to lists of values, not {grid!r}.")
    runs = []
    for values in itertools.product(*grid.values()):
        own = dict(zip(grid, values, strict=True))
        name = ",".join(f"{key}={value}" for key, value in own.items())
        folder = re.sub(r"[^\w.,=+-]+", "-", re.sub(r"[\[\]' ]", "", name))
        runs.append(common | own | {"output_dir": str(Path(common["output_dir"]) / folder)})
    return runs


def _is_dataset(value: Any) -> bool:
    """Whether `value` holds rows in memory; ConfigError for what holds several datasets."""
    if isinstance(value, Mapping):
        raise ConfigError(
            f"data must be a path or rows, not {type(value).__name__}: choose a split such as "
            'dataset["train"].'
        )
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | os.PathLike)


def _names(field: str, value: Any) -> list[str] | None:
    """The list of names that a setting gives as one text or several; ConfigError for another."""
    if value is None:
        return None
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, Sequence) or not all(isinstance(n, str) and n for n in names):
        raise ConfigError(f'{field} must be names such as ["q_proj"], or None, not {value!r}.')
    return list(names)


def require_integer(name: str, value: Any, at_least: int = 1, at_most: int | None = None) -> None:
    """ConfigError, naming the setting `name`, unless `value` is a whole number within bounds."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < at_least or (at_most is not None and value > at_most):
        bounds = f"at least {at_least}" if at_most is None else f"{at_least} to {at_most}"
        raise ConfigError(f"{name} must be a whole number of {bounds}, not {value!r}.")


def _require(field: dataclasses.Field, value: Any) -> None:
    """ConfigError unless `value` is of the type of `field` and keeps to its rule.

    The rule says the "least" number or what the number is "above", what it is "below", what it may
    be "also", or the "choices".
    """
    kinds, rule = typing.get_args(field.type) or (field.type,), field.metadata
    if field.type is bool:
        _require_switch(field.name, value)
    elif value is None and types.NoneType in kinds:
        return
    elif "choices" in rule:
        _require_choice(field.name, value, rule["choices"])
    elif rule and float not in kinds:
        require_integer(field.name, value, rule["least"])
    elif rule and value not in rule.get("also", ()):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        least, below = rule.get("least", rule.get("above")), rule.get("below", float("inf"))
        if not number or not least <= value < below or value == rule.get("above"):
            bounds = f"{'above' if 'above' in rule else 'at least'} {least}"
            bounds += f" and below {below}" if "below" in rule else ""
            raise ConfigError(f"{field.name} must be a finite number {bounds}, not {value!r}.")


def require_learned(completion_only: Any, train_on: Any) -> None:
    """ConfigError unless these settings say together which tokens of a conversation count."""
    _require_switch("completion_only", completion_only)
    _require_choice("train_on", train_on, ("all", "last"))
    if train_on == "last" and not completion_only:
        raise ConfigError('train_on "last" needs completion_only: without, all is learned.')


def _require_switch(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, not {value!r}.")


def _require_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(map(str, choices))}, not {value!r}.")
