"""From settings to examples: rows, tokenized once, split, and packed where that is asked for."""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.utils import _pytree as pytree

from onn_core.config import TrainConfig
from onn_core.data.examples import (
    Dataset,
    Examples,
    TokenFile,
    pack,
    shuffle_targets,
    split,
    tokenize,
)
from onn_core.data.pairs import pair_up, read_pairs, tokenize_pairs
from onn_core.data.rows import files_of, is_saved_dataset, read_rows
from onn_core.data.tokenizer import read_template, require_ids_fit
from onn_core.errors import ConfigError, OnnError
from onn_core.record import cache_dir, replacing, sha256_of
from onn_core.weights.gguf import gguf_files
from onn_core.weights.reader import give_back_memory
from onn_core.weights.shards import write_tensors

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
FORMAT = 4  # of a file of the cache, or of what is in it
BYTES_PER_EXAMPLE = 32  # its length, place, prompt, and its number in the split and in an epoch
MAX_NAMED = 9  # columns and files that are not used
# What such a file says of a Dataset apart from its tokens.
FACTS = ("rows", "truncated", "dropped", "unanswered", "length_95", "reasoning_left_out", "unused")
SEGMENTED = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]).bool()


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What a run trains and evaluates on.

    facts: what its record says of it, JSON values. digest: a hash of all tokens. held_bytes: what
    of it is in memory, not in the file.
    """

    train: Examples
    held_out: Examples
    facts: dict[str, Any]
    digest: str
    held_bytes: int


def prepare(config: TrainConfig, tokenizer: Any, n_embeddings: int | None = None) -> Corpus:
    """The examples of a run, and a line on stderr if rows were cut or dropped.

    `config.chat_template` becomes the tokenizer's. n_embeddings: rows of the model's embedding.
    Raises DataError if the data cannot be used, or a token of it has no row in the embedding.
    """
    started = time.perf_counter()
    if config.chat_template is not None:
        tokenizer.chat_template = read_template(config.chat_template)
    dataset, cached = tokenize_once(config, tokenizer)
    seconds = time.perf_counter() - started
    if n_embeddings is not None:
        require_ids_fit(tokenizer, dataset.tokens.largest_id(), n_embeddings)
        if (tokenizer.pad_token_id or 0) >= n_embeddings:  # it is never looked at
            tokenizer.pad_token = tokenizer.eos_token
    say_what_is_lost(dataset, config.max_length)
    examples = pair_up(dataset.examples) if config.objective == "dpo" else dataset.examples
    train, held_out = split(examples, config.held_out_fraction, config.seed)
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
    facts |= {"packed_rows": n_rows} if config.packing else {}
    digest, n_examples = dataset.tokens.digest(), len(dataset.examples)
    give_back_memory()  # of the tokenizer: the plan counts on it
    return Corpus(train, held_out, facts, digest, BYTES_PER_EXAMPLE * n_examples)


def with_steps(config: TrainConfig, n_train: int) -> tuple[TrainConfig, int | None]:
    """The settings with `max_steps` in place of `num_train_epochs` over `n_train` samples.

    And how many samples these epochs are, or None where `max_steps` was given.
    """
    if config.max_steps is not None:
        return config, None
    n_samples = math.ceil(Fraction(str(config.num_train_epochs)) * n_train)  # 1.1 as it is written
    steps = math.ceil(n_samples / (config.batch_size * config.gradient_accumulation_steps))
    return dataclasses.replace(config, max_steps=steps), n_samples


def say_what_is_lost(dataset: Dataset, max_length: int) -> None:
    """A line on stderr for each way in which less is learned than the rows hold."""
    said, rows = [], dataset.rows
    if lost := dataset.dropped - dataset.unanswered:
        said.append(f"{lost} dropped, whose prompt alone is as long")
    if dataset.truncated or lost:
        said.insert(0, f"{dataset.truncated} of {rows} rows were cut at max_length {max_length}")
        said.append(f"max_length {dataset.length_95} would keep 95 % whole")
    if dataset.unanswered:
        said.append(f"{dataset.unanswered} of {rows} rows were dropped: they hold nothing to learn")
    if dataset.reasoning_left_out:
        said.append(
            f"the chat template leaves out the reasoning of {dataset.reasoning_left_out} answers"
        )
    if dataset.unused:
        more = f" and {len(dataset.unused) - MAX_NAMED} more" * (len(dataset.unused) > MAX_NAMED)
        said.append(f"not used: {', '.join(dataset.unused[:MAX_NAMED])}{more}")
    if said:
        print(f"data: {'; '.join(said)}.", file=sys.stderr)


def tokenize_once(config: TrainConfig, tokenizer: Any) -> tuple[Dataset, bool]:
    """`data.tokenize` of a run's data, cached in a folder; and whether it was there already.

    The key is a hash of the data, the tokenizer's files, the chat template, the settings and the
    versions. A cache that cannot be read or written is done without. A generator, which can be
    read only once, is not cached.
    """
    try:
        folder = cache_dir() / "tokens"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, OnnError):  # no home, or one that cannot be written
        folder = Path(tempfile.mkdtemp(prefix="onn-tokens-"))
        weakref.finalize(tokenizer, shutil.rmtree, folder, ignore_errors=True)
    path = folder / f"{_key(config, tokenizer)}.safetensors"
    once = isinstance(config.data, Iterator)
    if not once and (dataset := read_tokens(path)) is not None:
        return dataset, True
    of_sft = {"completion_only": config.completion_only, "train_on": config.train_on}
    settings = {"folder": folder} | (of_sft if config.objective == "sft" else {})
    dataset = tokenize_data(
        config.data, tokenizer, config.max_length, objective=config.objective, **settings
    )
    if not once:
        with contextlib.suppress(OSError, ValueError):
            write_tokens(path, dataset)
            dataset = read_tokens(path) or dataset
    return dataset, False


def tokenize_data(
    source: Any, tokenizer: Any, max_length: int, *, objective: str = "sft", **settings: Any
) -> Dataset:
    """The tokens of what `read_rows`, or for "dpo" `read_pairs`, takes, and what is not used."""
    read, make = (read_pairs, tokenize_pairs) if objective == "dpo" else (read_rows, tokenize)
    unused: set[str] = set()
    dataset = make(read(source, unused), tokenizer, max_length, **settings)
    return dataclasses.replace(dataset, unused=sorted(unused))


def _key(config: TrainConfig, tokenizer: Any) -> str:
    template = str(tokenizer.chat_template)
    today = str(datetime.date.today()) if "strftime_now" in template else ""  # it writes the date
    versions = [metadata.version(name) for name in ("transformers", "tokenizers")]
    settings = [config.max_length, config.completion_only, config.train_on, config.objective]
    key = hashlib.sha256(json.dumps([FORMAT, template, today, versions, settings]).encode())
    folder = Path(config.model_dir)
    if gguf_files(folder):  # the tokenizer is in the file, with all the weights
        key.update(tokenizer.backend_tokenizer.to_str().encode())
    for path in sorted({path for names in TOKENIZER_FILES for path in folder.glob(names)}):
        if path.is_file():
            key.update(f"{path.name} {sha256_of(path)}".encode())
    path = Path(config.data).expanduser() if isinstance(config.data, str) else None
    if path is not None and path.exists() and not is_saved_dataset(path):
        for file in files_of(path):
            key.update(f"{file.relative_to(path.parent)} {sha256_of(file)}".encode())
    elif not isinstance(config.data, Iterator):
        for row in (read_pairs if config.objective == "dpo" else read_rows)(config.data):
            key.update(json.dumps(row).encode() + b"\n")
    return key.hexdigest()


def write_tokens(path: Path, dataset: Dataset) -> None:
    """The tokens as a safetensors file, ids last, whole or not at all."""
    tokens = dataset.tokens
    facts = json.dumps({name: getattr(dataset, name) for name in FACTS}).encode()
    layout = {
        "prompts": (torch.int64, [len(tokens.prompts)]),
        "lengths": (torch.int32, [len(tokens.lengths)]),
        "facts": (torch.uint8, [len(facts)]),
        "ids": (torch.int32, [sum(tokens.lengths)]),
    }
    small = {"prompts": tokens.prompts, "lengths": tokens.lengths, "facts": facts}
    with replacing(path) as temporary:
        write_tensors(temporary, layout, lambda n: [small[n]] if n in small else tokens.blocks())


def read_tokens(path: Path) -> Dataset | None:
    """What `write_tokens` wrote, if the file is there and whole; its tokens stay in the file."""
    with contextlib.suppress(OSError, SafetensorError, ValueError, KeyError, TypeError):
        with safe_open(path, "np") as file:
            lengths, prompts = (file.get_tensor(name) for name in ("lengths", "prompts"))
            (n_tokens,) = file.get_slice("ids").get_shape()
            facts = json.loads(file.get_tensor("facts").tobytes())
        whole = len(lengths) == len(prompts) > 0 and lengths.min() > 0
        if not whole or lengths.sum(dtype=np.int64) != n_tokens:
            raise ValueError("the lengths do not fit")
        opened = open(path, "rb")  # noqa: SIM115 - the TokenFile closes it
        tokens = TokenFile(opened, path.stat().st_size - 4 * n_tokens)
        tokens.lengths.frombytes(lengths.tobytes())
        tokens.prompts.frombytes(prompts.tobytes())
        return Dataset(tokens.examples(), tokens=tokens, **{name: facts[name] for name in FACTS})
    return None


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
