"""Perplexity and answers of a streamed model, with and without its adapter in one pass."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import peft
import torch
import torch.nn.functional as F

from onn_core import data
from onn_core.adapters.by_rows import Choice, by_rows, find_tuners, repeated
from onn_core.adapters.folder import load_adapter
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
    adapters: Sequence[str | os.PathLike] | None = None,
) -> Perplexity | list[Perplexity]:
    """The perplexity of a streamed model, or a PeftModel of one, on what `TrainConfig.data` takes.

    Of a conversation the answers count, of plain text every token but the first of each piece of
    `max_length` tokens.

    adapters: PEFT folders; `model` then has no adapter yet, and has none afterwards. Returns what
    each of them gives by itself, in their order, for one pass over the weights a batch: all of them
    and the base are evaluated in it. Equal bit for bit to each alone, with the same micro-batches.
    """
    examples = data.tokenize(data.read_rows(text), tokenizer, max_length).examples
    batches = examples.longest_first(), tokenizer.pad_token_id, batch_size
    if adapters is None:
        base, has_adapter = streamed_base(model)
        return _perplexity(*_mean_losses(model, base, [True, False][: 1 + has_adapter], *batches))
    with _loaded(model, adapters) as (adapted, names):
        base, _ = streamed_base(adapted)
        n_tokens, losses = _mean_losses(adapted, base, [*names, False], *batches)
    return [_perplexity(n_tokens, [loss, losses[-1]]) for loss in losses[:-1]]


def token_losses(
    model: Any, tokenizer: Any, examples: Sequence[data.Example], *, batch_size: int = 32
) -> list[torch.Tensor]:
    """The loss of each token of each example, in nats: (2, T) with the adapter and without it.

    (1, T) of a model without an adapter. A token that is not counted has 0.
    """
    found, (base, has_adapter) = [], streamed_base(model)
    of = model, base, [True, False][: 1 + has_adapter], examples, tokenizer.pad_token_id
    for part, losses in _losses_by_batch(*of, batch_size):
        losses = F.pad(losses, (1, 0)).cpu()  # each was at the token before
        found += [losses[:, row, : len(own.input_ids)] for row, own in enumerate(part)]
    return found


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
) -> list[Answer]:
    """What a streamed model, or a PeftModel of one, answers: the likeliest token each time.

    Each prompt is a user's turn in the tokenizer's chat template; without one, a line. The whole
    batch goes through a layer at once: a pass over the weights gives one token to every answer.
    """
    asked = [data.prompt_ids(prompt, tokenizer) for prompt in prompts]
    pad_id, found = tokenizer.pad_token_id or 0, []
    base, has_adapter = streamed_base(model)
    choices = [True, False][: 1 + has_adapter]
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


def streamed_base(model: Any) -> tuple[StreamedModel, bool]:
    """The streamed model inside `model`, and whether it has an adapter to compare with.

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
    return base, bool(inside)


def _mean_losses(
    model: Any,
    base: StreamedModel,
    choices: Sequence[Choice],
    examples: Sequence[data.Example],
    pad_id: int | None,
    batch_size: int,
) -> tuple[int, list[float]]:
    """The tokens that count in `examples`, and their mean loss under each choice of adapters."""
    totals, n_tokens = 0.0, 0
    for part, losses in _losses_by_batch(model, base, choices, examples, pad_id, batch_size):
        totals = totals + losses.double().flatten(1).sum(-1).cpu()
        n_tokens += sum(label != IGNORED for example in part for label in example.labels)
    return n_tokens, (totals / n_tokens).tolist()


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
    return Perplexity(n_tokens, *(x for loss in losses for x in (loss, _exponential(loss))))


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
def _loaded(model: Any, folders: Sequence[str | os.PathLike]) -> Iterator[tuple[Any, list[Choice]]]:
    """Inside, a streamed model has the adapters of `folders`, under the names that come along."""
    if not isinstance(model, StreamedModel) or find_tuners(model):
        raise ConfigError(
            "adapters are evaluated on a model of onn_core.from_pretrained that has none yet: give "
            "that, or leave adapters out."
        )
    names: list[Choice] = []
    try:
        for folder in folders:
            name = f"adapter{len(names)}"
            model = load_adapter(model, folder, adapter_name=name)
            names.append(name)
        yield model, names
    finally:
        if names:
            model.unload()


def _exponential(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
