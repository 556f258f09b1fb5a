"""Perplexity and answers of a streamed model, with and without its adapter in one pass.

Each batch holds its rows twice. A layer that is resident runs the first half with its adapters and
the second without, each in micro-batches of its own, so the numbers are those of two passes over
the weights for the reading of one.
"""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import peft
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedTokenizerBase

from onn_core import data
from onn_core.config import require_integer, require_learned
from onn_core.data.corpus import say_what_is_lost, tokenize_data
from onn_core.data.tokenizer import read_template, require_context, require_ids_fit
from onn_core.errors import ConfigError
from onn_core.ops.cross_entropy import IGNORED, shift_labels
from onn_core.streaming.head import Logits
from onn_core.streaming.model import StreamedModel
from onn_core.streaming.recompute import is_cache


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """What `perplexity` found: mean losses in nats a token, and their exponentials.

    base_loss, base_perplexity: of the model without its adapter; None if it has none.
    """

    tokens: int  # that were predicted
    loss: float
    perplexity: float
    base_loss: float | None = None
    base_perplexity: float | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model generated; base_answer: without its adapter, None if it has none."""

    prompt: str
    answer: str
    base_answer: str | None = None


def perplexity(
    model: Any,
    tokenizer: Any,
    text: Any,
    *,
    max_length: int = 128,
    batch_size: int = 32,
    chat_template: str | None = None,
    completion_only: bool = True,
    train_on: str = "all",
) -> Perplexity:
    """The perplexity of a streamed model, or a PeftModel of one, on what `TrainConfig.data` takes.

    Of a conversation the answers count, of plain text every token but the first of each piece of
    `max_length` tokens. The settings are those of TrainConfig; a line on stderr says what was cut.
    Raises ConfigError for a wrong setting, DataError for text that cannot be used.
    """
    require_integer("max_length", max_length, 2)
    require_integer("batch_size", batch_size)
    require_learned(completion_only, train_on)
    tokenizer = _with_template(tokenizer, chat_template)
    totals, n_tokens = 0.0, 0
    with _evaluating(model) as (base, n_ways):
        require_context(base.config, max_length, "max_length")
        learned = {"completion_only": completion_only, "train_on": train_on}
        dataset = tokenize_data(text, tokenizer, max_length, **learned)
        require_ids_fit(tokenizer, dataset.tokens.largest_id(), _n_embeddings(base))
        say_what_is_lost(dataset, max_length)
        examples = dataset.examples.longest_first()
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            batch = data.collate(part, _pad_id(tokenizer, base))
            with _halves(base, len(part)):
                losses = _token_losses(model, base, _repeated(batch, n_ways, base.device))
            totals = totals + losses.double().view(n_ways, -1).sum(-1).cpu()  # (n_ways,)
            n_tokens += sum(label != IGNORED for example in part for label in example.labels)
    losses = (totals / n_tokens).tolist()
    return Perplexity(n_tokens, *(x for loss in losses for x in (loss, _exponential(loss))))


def answers(
    model: Any,
    tokenizer: Any,
    prompts: str | Iterable[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    chat_template: str | None = None,
) -> list[Answer]:
    """What a streamed model, or a PeftModel of one, answers: the likeliest token each time.

    prompts: one or several. Each is a user's turn in the chat template, the tokenizer's or the one
    that is given as in TrainConfig; without one, a line. The whole batch goes through a layer at
    once: a pass over the weights gives one token to every answer. Raises ConfigError for a wrong
    setting, DataError for a prompt that the template or the model cannot take.
    """
    require_integer("max_new_tokens", max_new_tokens)
    require_integer("batch_size", batch_size)
    prompts = (
        [prompts]
        if isinstance(prompts, str) or not isinstance(prompts, Iterable)
        else list(prompts)
    )
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ConfigError(f'prompts must be texts such as ["What is AI?"], not {prompt!r:.60}.')
    tokenizer = _with_template(tokenizer, chat_template)
    asked = [data.prompt_ids(prompt, tokenizer) for prompt in prompts]
    found = []
    with _evaluating(model) as (base, n_ways):
        pad_id = _pad_id(tokenizer, base)
        for ids in asked:
            require_ids_fit(tokenizer, max(ids), _n_embeddings(base))
            require_context(base.config, len(ids) + max_new_tokens, "a prompt with max_new_tokens")
        for start in range(0, len(asked), batch_size):
            part = asked[start : start + batch_size]
            length, n_rows = max(map(len, part)), len(part)
            n_pads = [length - len(ids) for ids in part]
            padded = [[pad_id] * n + ids for n, ids in zip(n_pads, part, strict=True)]
            mask = [[0] * n + [1] * (length - n) for n in n_pads]
            batch = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}
            with _halves(base, n_rows):
                ids = model.generate(
                    **_repeated(batch, n_ways, base.device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    num_beams=1,  # beams would be more rows than the batch has
                    num_return_sequences=1,
                    pad_token_id=pad_id,
                )  # (n_ways * B, T)
            texts = tokenizer.batch_decode(ids[:, length:], skip_special_tokens=True)
            found += [texts[row::n_rows] for row in range(n_rows)]
    return [Answer(prompt, *texts) for prompt, texts in zip(prompts, found, strict=True)]


def _with_template(tokenizer: Any, chat_template: str | None) -> Any:
    """The tokenizer, or where there is a template a copy that has it."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(
            f"{type(tokenizer).__name__} is no tokenizer: give that of AutoTokenizer."
            "from_pretrained(model_dir)."
        )
    if chat_template is None:
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = read_template(chat_template)
    return tokenizer


def _n_embeddings(base: Any) -> int:
    return len(base.get_input_embeddings().weight)


def _pad_id(tokenizer: Any, base: Any) -> int:
    """The id to pad with; what it is does not matter, if the embedding has it."""
    pad_id = tokenizer.pad_token_id or 0
    return pad_id if pad_id < _n_embeddings(base) else 0


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[tuple[Any, int]]:
    """The streamed model inside `model`, and 2 if it has an adapter to compare with, else 1."""
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if not isinstance(base, StreamedModel):
        raise ConfigError(
            f"{type(model).__name__} is not streamed: give a model of onn_core.from_pretrained, or "
            "a PeftModel of one."
        )
    inside = {tuner for layer in base.streamed_layers for tuner in _tuners(layer.module)}
    if any(tuner not in inside for tuner in _tuners(base)):
        raise ConfigError(
            "an adapter outside the decoder layers cannot be switched off within a pass: evaluate "
            "with model.disable_adapter() and without."
        )
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield base, 2 if inside else 1
    finally:
        model.train(training)


@contextlib.contextmanager
def _halves(base: Any, n_rows: int) -> Iterator[None]:
    """Inside, each layer runs the first `n_rows` of a batch with its adapters, the rest without."""
    twins: dict[Any, Any] = {}  # cache -> that of the half without adapters

    def twin(value: Any) -> Any:
        return twins[value] if is_cache(value) else value

    @contextlib.contextmanager
    def by_half(layer: nn.Module, rows: slice, args: tuple, kwargs: dict) -> Iterator[Any]:
        for cache in filter(is_cache, pytree.tree_leaves((args, kwargs), is_leaf=is_cache)):
            if cache not in twins:
                twins[cache] = copy.deepcopy(cache)  # still empty
        adapted = rows.start < n_rows
        if not adapted:
            args, kwargs = pytree.tree_map(twin, (args, kwargs), is_leaf=is_cache)
        with _switched(layer, adapted):
            yield args, kwargs

    with base.rows_hook(by_half, group_size=n_rows):
        yield


@contextlib.contextmanager
def _switched(layer: nn.Module, adapted: bool) -> Iterator[None]:
    """Inside, the adapters of a layer are on or off; after, all is as it was."""
    tuners = [tuner for tuner in _tuners(layer) if tuner.disable_adapters == adapted]
    trained = [(p, p.requires_grad) for tuner in tuners for p in tuner.parameters()]
    for tuner in tuners:
        tuner.enable_adapters(adapted)
    try:
        yield
    finally:
        for tuner in tuners:
            tuner.enable_adapters(not adapted)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def _token_losses(model: Any, base: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The cross-entropy of each label, 0 where it is not counted: (B, T)."""
    labels = shift_labels(batch.pop("labels"))
    with base.deferred_logits():
        logits = model(**batch).logits  # (B, T, V)
    if isinstance(logits, Logits) and not logits.changed:
        return logits.token_losses(labels)
    logits = logits.float().transpose(1, 2)  # (B, V, T)
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)


def _tuners(module: nn.Module) -> list[BaseTunerLayer | AuxiliaryTrainingWrapper]:
    """What an adapter put into `module`: its layers, and copies of modules that are trained."""
    kinds = BaseTunerLayer | AuxiliaryTrainingWrapper
    return [part for part in module.modules() if isinstance(part, kinds)]


def _repeated(
    batch: dict[str, torch.Tensor], n_ways: int, device: torch.device
) -> dict[str, torch.Tensor]:
    return {name: values.repeat(n_ways, 1).to(device) for name, values in batch.items()}


def _exponential(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
