"""From settings to examples: rows, tokenized once, split, and packed where that is asked for."""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.utils import _pytree as pytree

from onn_core.config import TrainConfig
from onn_core.data.examples import IGNORED, Dataset, Example, pack, shuffle_targets, split, tokenize
from onn_core.data.rows import Row, load_rows
from onn_core.errors import ConfigError
from onn_core.record import cache_dir, write_atomic

# What decides how a folder's tokenizer works.
TOKENIZER_FILES = (
    "*token*",
    "vocab*",
    "merges*",
    "*.model",
    "chat_template*",
    "added*",
    "*.tiktoken",
)
SEGMENTED = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]).bool()


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What a run trains and evaluates on; facts: what its record says of it, JSON values."""

    train: list[Example]
    held_out: list[Example]
    facts: dict[str, Any]


def prepare(config: TrainConfig, tokenizer: Any) -> Corpus:
    """The examples of a run; DataError if its data cannot be used."""
    started = time.perf_counter()
    rows = load_rows(config.data)
    dataset, cached = tokenize_once(rows, tokenizer, config.model_dir, config.max_length)
    seconds = time.perf_counter() - started
    train, held_out = split(dataset.examples, config.held_out_fraction, config.seed)
    if config.shuffle_targets:
        train = shuffle_targets(train, f"{config.seed} {config.shuffle_targets}")
    n_rows = len(train)
    if config.packing:
        train = pack(train, config.max_length)
    facts = {
        "name": Path(config.to_dict()["data"]).name,
        "rows": dataset.rows,
        "truncated": dataset.truncated,
        "dropped": dataset.dropped,
        "train": len(train),
        "held_out": len(held_out),
        "tokenize_s": round(seconds, 3),
        "tokens_cached": cached,
    }
    return Corpus(train, held_out, facts | ({"packed_rows": n_rows} if config.packing else {}))


def tokenize_once(
    rows: Sequence[Row], tokenizer: Any, model_dir: str, max_length: int
) -> tuple[Dataset, bool]:
    """`data.tokenize`, kept in the cache folder; and whether it was there already.

    The key is a hash of the rows, the tokenizer's files, `max_length` and the versions. A cache
    that cannot be read or written is done without.
    """
    key = hashlib.sha256(json.dumps([rows, max_length, _versions()]).encode())
    for path in sorted({p for pattern in TOKENIZER_FILES for p in Path(model_dir).glob(pattern)}):
        if path.is_file():
            key.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    path = cache_dir() / "tokens" / f"{key.hexdigest()}.safetensors"
    if (dataset := _read_or_none(path)) is not None:
        return dataset, True
    dataset = tokenize(rows, tokenizer, max_length)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, _packed_bytes(dataset))
    return dataset, False


def _versions() -> list[str]:
    return [metadata.version(name) for name in ("transformers", "tokenizers")]


def _packed_bytes(dataset: Dataset) -> bytes:
    examples = dataset.examples
    counted = [label != IGNORED for example in examples for label in example.labels]
    tensors = {
        "ids": torch.tensor([i for e in examples for i in e.input_ids], dtype=torch.int32),
        "counted": torch.tensor(counted),
        "lengths": torch.tensor([len(example.input_ids) for example in examples]),
    }
    counts = {name: getattr(dataset, name) for name in ("rows", "truncated", "dropped")}
    return save(tensors, {"counts": json.dumps(counts)})


def _read_or_none(path: Path) -> Dataset | None:
    """What `_packed_bytes` wrote, if the file is there and whole."""
    with contextlib.suppress(OSError, SafetensorError, ValueError, KeyError, TypeError):
        return _read(path)
    return None


def _read(path: Path) -> Dataset:
    with safe_open(path, "pt") as file:
        ids, counted, lengths = (file.get_tensor(name) for name in ("ids", "counted", "lengths"))
        counts = json.loads(file.metadata()["counts"])
    labels = torch.where(counted, ids, IGNORED).tolist()
    ids, examples, start = ids.tolist(), [], 0
    for length in lengths.tolist():
        examples.append(Example(ids[start : start + length], labels[start : start + length]))
        start += length
    if start != len(ids) or not examples:
        raise ValueError("the lengths do not fit")
    return Dataset(examples, **counts)


def require_packing(model: Any) -> None:
    """ConfigError unless a streamed model keeps the attention within each packed row.

    Two rows of two tokens go as far as the first layer, whose attention mask is looked at; the
    other layers must be attention, too.
    """

    class Seen(Exception):
        pass

    def look(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        raise Seen(pytree.tree_leaves((args, kwargs)))

    kinds = set(getattr(model.config, "layer_types", None) or ())
    masks = []
    hook = model.streamed_layers[0].module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        ids = torch.zeros(1, 4, dtype=torch.int64, device=model.device)
        with torch.no_grad():
            model(
                input_ids=ids,
                position_ids=ids + torch.tensor([0, 1, 0, 1]).to(ids),
                use_cache=False,
            )
    except Seen as seen:
        masks = [x for x in seen.args[0] if isinstance(x, torch.Tensor) and x.shape[2:] == (4, 4)]
    except TypeError:  # it takes no position_ids
        pass
    finally:
        hook.remove()
    allowed = [mask if mask.dtype == torch.bool else mask == 0 for mask in masks]
    segmented = allowed and all((mask.cpu() == SEGMENTED).all() for mask in allowed)
    if not segmented or kinds - {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"{model.config.model_type} does not keep the attention within packed rows: set "
            "packing to False."
        )
