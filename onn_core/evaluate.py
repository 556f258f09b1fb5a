"""Perplexity and answers of a streamed model, with and without its adapter in one pass."""

import contextlib
import copy
import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import peft
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from onn_core import data
from onn_core.adapters.by_rows import Choice, by_rows, find_tuners, repeated
from onn_core.adapters.folder import load_adapter
from onn_core.config import require_integer, require_learned
from onn_core.data.corpus import say_what_is_lost, tokenize_data
from onn_core.data.tokenizer import read_template, require_context, require_ids_fit
from onn_core.errors import ConfigError
from onn_core.ops.cross_entropy import IGNORED
from onn_core.streaming.model import StreamedModel


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
    adapters: Sequence[str | os.PathLike] | None = None,
) -> Perplexity | list[Perplexity]:
    """The perplexity of a streamed model, or a PeftModel of one, on what `TrainConfig.data` takes.

    Of a conversation the answers count, of plain text every token but the first of each piece of
    `max_length` tokens. The settings are those of TrainConfig; a line on stderr says what was cut.

    adapters: PEFT folders; `model` then has no adapter yet, and has none afterwards. Returns what
    each of them gives by itself, in their order, for one pass over the weights a batch: all of them
    and the base are evaluated in it. Equal bit for bit to each alone, with the same micro-batches.
    Raises ConfigError for a wrong setting, DataError for text that cannot be used.
    """
    require_integer("max_length", max_length, 2)
    require_integer("batch_size", batch_size)
    require_learned(completion_only, train_on)
    tokenizer = _with_template(tokenizer, chat_template)
    with _adapted(model, adapters) as (adapted, choices):
        base, _ = streamed_base(adapted)
        require_context(base.config, max_length, "max_length")
        learned = {"completion_only": completion_only, "train_on": train_on}
        dataset = tokenize_data(text, tokenizer, max_length, **learned)
        require_ids_fit(tokenizer, dataset.tokens.largest_id(), _n_embeddings(base))
        say_what_is_lost(dataset, max_length)
        longest_first = np.argsort(-dataset.examples.lengths, kind="stable")  # for little padding
        batches = dataset.examples.select(longest_first), _pad_id(tokenizer, base), batch_size
        totals, n_tokens = 0.0, 0
        for part, of_tokens in _losses_by_batch(adapted, base, choices, *batches):
            totals = totals + of_tokens.double().flatten(1).sum(-1).cpu()
            n_tokens += sum(label != IGNORED for example in part for label in example.labels)
        losses = (totals / n_tokens).tolist()  # means, one of each choice
    if adapters is None:
        return _perplexity(n_tokens, losses)
    return [_perplexity(n_tokens, [loss, losses[-1]]) for loss in losses[:-1]]


def token_losses(
    model: Any, tokenizer: Any, examples: Sequence[data.Example], *, batch_size: int = 32
) -> list[torch.Tensor]:
    """The loss of each token of each example, in nats: (2, T) with the adapter and without it.

    (1, T) of a model without an adapter. A token that is not counted has 0.
    """
    found, (base, choices) = [], streamed_base(model)
    pad_id = _pad_id(tokenizer, base)
    for part, losses in _losses_by_batch(model, base, choices, examples, pad_id, batch_size):
        losses = F.pad(losses, (1, 0)).cpu()  # each was at the token before
        found += [losses[:, row, : len(own.input_ids)] for row, own in enumerate(part)]
    return found


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
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        prompts = [prompts]
    prompts = list(prompts)
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ConfigError(f'prompts must be texts such as ["What is AI?"], not {prompt!r:.60}.')
    tokenizer = _with_template(tokenizer, chat_template)
    asked = [data.prompt_ids(prompt, tokenizer) for prompt in prompts]
    base, choices = streamed_base(model)
    pad_id, found = _pad_id(tokenizer, base), []
    for ids in asked:
        require_ids_fit(tokenizer, max(ids), _n_embeddings(base))
        require_context(base.config, len(ids) + max_new_tokens, "a prompt with max_new_tokens")
    with _evaluating(model):
        for start in range(0, len(asked), batch_size):
            part = asked[start : start + batch_size]
            length, n_rows = max(map(len, part)), len(part)
            n_pads = [length - len(ids) for ids in part]
            padded = [[pad_id] * n + ids for n, ids in zip(n_pads, part, strict=True)]
            mask = [[0] * n + [1] * (length - n) for n in n_pads]
            batch = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}
            with by_rows(base, n_rows, choices):
                ids = model.generate(
                    **repeated(batch, len(choices), base.device),
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


def streamed_base(model: Any) -> tuple[StreamedModel, list[Choice]]:
    """The streamed model inside `model`; what to compare: as it is, and without its adapter.

    ConfigError if none is inside, or the adapter cannot be switched off within a pass.
    """
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if not isinstance(base, StreamedModel):
        raise ConfigError(
            f"{type(model).__name__} is not streamed: give a model of onn_core.from_pretrained, or "
            "a PeftModel of one."
        )
    inside = {tuner for layer in base.streamed_layers for tuner in find_tuners(layer.module)}
    if any(tuner not in inside for tuner in find_tuners(base)):
        raise ConfigError(
            "an adapter outside the decoder layers cannot be switched off within a pass: evaluate "
            "with model.disable_adapter() and without."
        )
    return base, [True, False] if inside else [True]


def _losses_by_batch(
    model: Any,
    base: StreamedModel,
    choices: Sequence[Choice],
    examples: Sequence[data.Example],
    pad_id: int | None,
    batch_size: int,
) -> Iterator[tuple[Sequence[data.Example], torch.Tensor]]:
    """Batches of examples, each with the losses of its next tokens: (choices, B, T)."""
    with _evaluating(model):
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            batch = repeated(data.collate(part, pad_id), len(choices), base.device)
            with by_rows(base, len(part), choices):
                losses = base.token_losses(model, batch)  # (choices * B, T)
            yield part, losses.unflatten(0, (len(choices), -1))


def _perplexity(n_tokens: int, losses: Sequence[float]) -> Perplexity:
    pairs = [(loss, math.exp(loss) if loss < 700 else math.inf) for loss in losses]
    return Perplexity(n_tokens, *(x for pair in pairs for x in pair))


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextlib.contextmanager
def _adapted(
    model: Any, adapters: Sequence[str | os.PathLike] | None
) -> Iterator[tuple[Any, list[Choice]]]:
    """The model to run, inside with the `adapters` if there are any, and what to choose of them."""
    if adapters is None:
        yield model, streamed_base(model)[1]
        return
    if isinstance(adapters, str | os.PathLike) or not isinstance(adapters, Iterable):
        raise ConfigError(f"adapters must be a list of folders, not {adapters!r:.60}.")
    if not isinstance(model, StreamedModel) or find_tuners(model):
        raise ConfigError(
            "adapters are evaluated on a model of onn_core.from_pretrained that has none yet: give "
            "that, or leave adapters out."
        )
    names: list[Choice] = []
    try:
        for folder in adapters:
            name = f"adapter{len(names)}"
            model = load_adapter(model, folder, adapter_name=name)
            names.append(name)
        yield model, [*names, False]
    finally:
        if names:
            model.unload()
