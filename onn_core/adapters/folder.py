"""A PEFT adapter folder: checked against a model before anything is allocated, then loaded."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from onn_core.config import expand_home
from onn_core.errors import ConfigError, ModelFolderError
from onn_core.ops.making import MAKING
from onn_core.streaming.skeleton import skeleton
from onn_core.weights.dequantise import Plain
from onn_core.weights.folder import ModelFolder
from onn_core.weights.formats import find_sources
from onn_core.weights.shards import read_tensor_index

MAX_CONFIG_BYTES = 1 << 20
# The starts of an adapter that leave the base model as it is.
UNCHANGED_BASE = (True, False, "gaussian", "orthogonal", "eva")
# Settings that change the base model, or import a module that the file names.
REFUSED = (
    *("megatron_config", "layer_replication", "loftq_config", "corda_config", "lora_ga_config"),
    *("arrow_config", "use_bdlora", "alora_invocation_tokens", "use_qalora", "velora_config"),
    *("monteclora_config", "kasa_config"),
)
# The settings that PEFT matches against the names of modules -> the regular expression it makes of
# each. Lists of target_modules and exclude_modules are compared as plain text.
PATTERNS = {
    "target_modules": "{}",
    "exclude_modules": "{}",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
}
PLAIN_LISTS = ("target_modules", "exclude_modules")
MAX_PATTERN_LENGTH = 10_000
MATCH_CPU_S = 2  # Unsloth's patterns take milliseconds on a thousand names
MATCH_WALL_S = 120  # where the processor is shared with much else
# Python's matching cannot be interrupted, so all of it is tried in a process that can be ended.
MATCH_ALL = f"""
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, ({MATCH_CPU_S}, {MATCH_CPU_S}))
except ImportError:
    pass
patterns, names = json.load(sys.stdin)
try:
    for pattern in patterns:
        compiled = re.compile(pattern)
        for name in names:
            compiled.fullmatch(name), compiled.match(name)
except (re.error, RecursionError, OverflowError, MemoryError) as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}"[:200])
"""
COMPARED_ROWS = 4096  # of an embedding, at a time


def read_adapter(folder: str | os.PathLike) -> peft.LoraConfig:
    """The configuration of a LoRA adapter; ConfigError if the folder has none that is supported.

    Its patterns are only safe to match once `check_adapter` has tried them.
    """
    folder = expand_home(folder)
    path = Path(folder) / CONFIG_NAME
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"it is larger than {MAX_CONFIG_BYTES:,} bytes")
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{folder} holds no {CONFIG_NAME} that can be read ({reason}): give the folder that "
            "save_pretrained wrote."
        ) from error
    if not isinstance(fields, dict) or fields.get("peft_type") != "LORA":
        raise ConfigError(f"{path} describes no LoRA adapter: only LoRA and DoRA are supported.")
    for name in REFUSED:
        if fields.get(name):
            raise ConfigError(
                f"{path} sets {name}, which is not supported: use plain LoRA or DoRA."
            )
    start = fields.get("init_lora_weights", True)
    if start not in UNCHANGED_BASE:
        raise ConfigError(
            f"{path} says init_lora_weights {start!r}, which changes the base model: save the "
            "adapter again with path_initial_model_for_weight_conversion."
        )
    for name in PATTERNS:
        values = fields.get(name) or []
        for value in values if isinstance(values, list | dict) else [values]:
            if not isinstance(value, str) or not value or len(value) > MAX_PATTERN_LENGTH:
                raise ConfigError(
                    f"{path} has a pattern in {name} that is no text or too long: list the "
                    "modules by name."
                )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.LoraConfig.from_pretrained(folder)
    except Exception as error:  # what a bad file raises differs from field to field
        raise _unfit(folder, error) from error


def check_adapter(
    model_folder: ModelFolder, folder: str | os.PathLike
) -> tuple[peft.LoraConfig, list[str]]:
    """The adapter's configuration, once its tensors are those that it needs on this model.

    Names and shapes are compared with the adapter made on the meta device: nothing is allocated.
    Also returns the names of tensors that are copies of the model's own, as PEFT writes them with
    save_embedding_layers: they need not be loaded. ConfigError if anything else does not fit.
    """
    config = read_adapter(folder)
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not os.path.isfile(path):
        raise ConfigError(f"{folder} has no {path.name}; pickles are not loaded.")
    stored = {entry.name: entry.shape for entry in read_tensor_index(path)}
    model = skeleton(model_folder, torch.float32, torch.device("cpu"))
    _require_quick_patterns(config, folder, [name for name, _ in model.named_modules()])
    try:
        with MAKING, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
            needed = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    except Exception as error:
        raise _unfit(folder, error) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in needed.items()}
    copies = [name for name in stored if name not in shapes and _names_a_base_matrix(name)]
    _require_copies(model_folder, path, copies)
    for name in sorted(shapes.keys() | stored.keys() - set(copies)):
        if shapes.get(name) != stored.get(name):
            raise ConfigError(
                f"{folder} does not fit this model: {name[:200]} has shape {stored.get(name)} in "
                f"the file and should have {shapes.get(name)}: use the model it was trained on."
            )
    return read_adapter(folder), copies  # afresh: the one above is bound to the meta model


def load_adapter(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    *,
    model_folder: ModelFolder | None = None,
    trainable: bool = False,
    float32: bool = True,
    adapter_name: str = "default",
) -> peft.PeftModel:
    """`model` with the LoRA or DoRA adapter of a PEFT folder, as `peft.PeftModel`.

        model = onn_core.from_pretrained("~/models/phi-4")
        model = onn_core.load_adapter(model, "runs/first/adapter")
        model.generate(...)

    folder: what `save_pretrained` of PEFT, or a run of `ChunkedLoraTrainer`, wrote; a leading ~ is
    the home. trainable: to train it further; else it is frozen, for evaluation. float32: whether
    the adapter is held in float32 whatever the model's dtype, as PEFT does, or in the model's.
    adapter_name: as PEFT's; a PeftModel gets one more adapter under it.
    model_folder: only for a model that `onn_core.from_pretrained` did not make: the opened folder
    of its weights.

    The folder is checked before anything is allocated: ConfigError says what does not fit, and
    ModelFolderError that its weights are damaged.
    """
    folder = expand_home(folder)
    model_folder = model_folder or getattr(model, "model_folder", None)
    if model_folder is None:
        raise ConfigError(
            f"{type(model).__name__} is not streamed: give a model of onn_core.from_pretrained."
        )
    config, copies = check_adapter(model_folder, folder)
    room = tempfile.TemporaryDirectory() if copies else contextlib.nullcontext()
    with MAKING, room as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        try:
            path = _without_copies(Path(folder), copies, Path(temporary)) if copies else folder
            how = {"is_trainable": trainable, "autocast_adapter_dtype": float32}
            # No random values at first, which another run's generator would miss.
            how["low_cpu_mem_usage"] = frozen = float32 and not trainable
            if isinstance(model, peft.PeftModel):
                model.load_adapter(path, adapter_name, **how)
            else:
                model = peft.PeftModel.from_pretrained(
                    model, path, adapter_name, config=config, **how
                )
            if frozen:  # PEFT has rounded the values to the base's dtype on their way
                values = load_peft_weights(str(path), device="cpu")
                peft.set_peft_model_state_dict(model, values, adapter_name)
            return model
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            raise _unfit(folder, error) from error


def _require_quick_patterns(
    config: peft.LoraConfig, folder: str | os.PathLike, names: list[str]
) -> None:
    """ConfigError if a pattern of `config` is invalid or takes too long to match with `names`."""
    patterns = []
    for field, form in PATTERNS.items():
        values = getattr(config, field) or []
        if isinstance(values, str):
            values = [values]
        elif field in PLAIN_LISTS:
            continue
        patterns += [form.replace("{}", value) for value in values]
    if not any(character in pattern for pattern in patterns for character in "*+{"):
        return
    problem = "takes too long to match"
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", MATCH_ALL],
            input=json.dumps([patterns, names]),
            capture_output=True,
            text=True,
            timeout=MATCH_WALL_S,
        )
        if done.returncode == 0:
            return
        problem = f"is invalid ({done.stderr.strip()[-200:]})" if done.returncode == 1 else problem
    except subprocess.TimeoutExpired:
        pass
    raise ConfigError(
        f"{folder} has a pattern in {', '.join(PATTERNS)} that {problem}: list the modules by name."
    )


def _names_a_base_matrix(name: str) -> bool:
    """Whether `name`, of a tensor in an adapter, may be that of an embedding or a head."""
    inside = any(part in name for part in (".lora_", ".modules_to_save.", ".original_module."))
    return name.endswith(".weight") and not inside


def _require_copies(model_folder: ModelFolder, path: Path, names: list[str]) -> None:
    """ConfigError unless the tensors `names` of an adapter have the values of the model folder."""
    if not names:
        return
    sources = find_sources(skeleton(model_folder, torch.float32, torch.device("cpu")), model_folder)
    with safe_open(path, "pt") as file:
        for name in names:
            in_base = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            source, values = sources.get(in_base), file.get_slice(name)
            if (
                source is None
                or type(source) is not Plain
                or tuple(values.get_shape()) != source.entry.shape
                or not _are_equal(values, model_folder, source.entry.name, source.entry.shape[0])
            ):
                raise ConfigError(
                    f"{path.parent} holds a matrix of the base model as well ({name[:200]}), and "
                    "its values are not those of the model folder: use the model it was trained "
                    "on, or save the adapter with save_embedding_layers=False."
                )


def _are_equal(values: Any, model_folder: ModelFolder, name: str, n_rows: int) -> bool:
    """Whether a safetensors slice has the values of the tensor `name`, compared by rows."""
    for start in range(0, n_rows, COMPARED_ROWS):
        stop = min(start + COMPARED_ROWS, n_rows)
        own = model_folder.read_rows(name, torch.arange(start, stop))
        if not torch.equal(values[start:stop].to(torch.float64), own.to(torch.float64)):
            return False
    return True


def _without_copies(folder: Path, copies: Iterable[str], temporary: Path) -> Path:
    """The adapter of `folder` in the folder `temporary`, without the tensors `copies`."""
    shutil.copyfile(folder / CONFIG_NAME, temporary / CONFIG_NAME)
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in set(file.keys()) - set(copies)}
    save_file(tensors, temporary / SAFETENSORS_WEIGHTS_NAME)
    return temporary


def _unfit(folder: str | os.PathLike, error: Exception) -> ConfigError:
    if isinstance(error, ModelFolderError | ConfigError):
        return error
    reason = " ".join(str(error).split())[:300]
    return ConfigError(f"{folder} is not an adapter for this model: {reason}")
