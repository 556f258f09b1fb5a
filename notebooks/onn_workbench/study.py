"""Does it learn? Runs over several seeds, a verdict from a stated rule, a file that holds them."""

import contextlib
import dataclasses
import io
import math
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from onn_core import data
from onn_core.adapters.lora import add_adapter
from onn_core.config import TrainConfig
from onn_core.data.corpus import prepare
from onn_core.errors import NonFiniteError
from onn_core.many import train_many
from onn_core.record import (
    SCHEMA_VERSION,
    EvalRecord,
    RunRecord,
    StepRecord,
    from_json,
    read_json,
    write_json,
)
from onn_core.run.checkpoints import FOLDER, Checkpoints
from onn_core.run.step import optimizer_step
from onn_core.trainer import ChunkedLoraTrainer, learning_rate
from onn_workbench.report import Once

WHOLE_STEPS = 8  # first steps of a run that are rows of their own
SUMMED = ("samples", "tokens", "counted_tokens", "bytes_read", "layer_loads", "nonfinite")
RULE = (
    "YES when held-out loss, averaged over the seeds, falls by more than its noise, ends lower "
    "than after the same samples with shuffled targets by more than that difference's noise, and "
    "every gradient norm is finite and above 0; else NO. Noise: twice the standard deviation over "
    "the seeds."
)
Runs = dict[str, list[RunRecord]]  # label -> one run a seed


@dataclasses.dataclass
class Study:
    """All runs of 02_learning_curves; `save` adds what the rule says of them."""

    runs: Runs  # a configuration -> its runs
    controls: Runs  # what must not learn
    reference: list[RunRecord]  # shuffled targets, in another order than the control's
    layouts: Runs  # sparse_layers -> runs of equal training time
    in_memory: dict[str, list[float]]  # a configuration -> losses of its first seed in memory
    answers: list[dict[str, str]] = dataclasses.field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def save(self, path: str | os.PathLike) -> None:
        """Write the study as JSON, with its rule and verdicts."""
        verdicts = {
            label: verdict(records, self.reference)
            for label, records in (self.runs | self.controls).items()
        }
        write_json(path, dataclasses.asdict(self) | {"rule": RULE, "verdicts": verdicts})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Study":
        """Read a study that `save` wrote; OnnError if it is not one."""

        def build(fields: dict[str, Any]) -> "Study":
            del fields["rule"], fields["verdicts"]
            return from_json(cls, fields)

        return read_json(path, build, "a study", "run 02_learning_curves again")


def train(
    config: TrainConfig,
    on_step: Callable[[RunRecord], None] = lambda record: None,
    seconds: float | None = None,
    resume: bool = False,
) -> RunRecord:
    """One run. `seconds`: stop after that much time in optimizer steps. A NaN ends it, recorded.

    resume: a run of these settings that finished is read, one that was cut goes on.
    """
    folder = Path(config.output_dir)
    if resume and (record := _finished(config)):
        on_step(record)
        return thinned(record)

    def watch(record: RunRecord) -> None:
        on_step(record)
        if seconds is not None and sum(step.step_s for step in record.steps) >= seconds:
            raise _TimeSpent

    trainer = ChunkedLoraTrainer(config, watch)
    try:
        trainer.train(resume and bool(Checkpoints(folder, 1).paths()))
    except NonFiniteError:
        return thinned(trainer.record)
    except _TimeSpent:
        record = trainer.record
        if record.evals[-1].step < len(record.steps):
            samples = sum(step.samples for step in record.steps)
            loss, _ = trainer.evaluate()
            record.evals.append(EvalRecord(len(record.steps), samples, record.wall_s, loss))
            trainer.base.close()
        record.status = "finished"
        record.save(folder / "record.json")
    shutil.rmtree(folder / FOLDER)  # its record and its adapter are all that is used
    return thinned(trainer.record)


def train_all(
    configs: Sequence[TrainConfig],
    on_step: Callable[[RunRecord], None] = lambda record: None,
    resume: bool = False,
) -> list[RunRecord]:
    """All runs in one pass over the weights; each is equal, bit for bit, to the run alone.

    A NaN ends its run, recorded. resume: runs of these settings that finished are read, others go
    on. The times of a step are those of a pass that all runs share.
    """
    done = [_finished(config) if resume else None for config in configs]
    chosen = [config for config, record in zip(configs, done, strict=True) if record is None]
    try:
        with contextlib.redirect_stderr(Once(sys.stderr)):
            records = train_many(chosen, resume, on_step) if chosen else []
    except NonFiniteError:  # of all runs
        records = [RunRecord.load(Path(config.output_dir) / "record.json") for config in chosen]
    for config in chosen:  # its record and its adapter are all that is used
        shutil.rmtree(Path(config.output_dir) / FOLDER, ignore_errors=True)
    trained = iter(records)
    return [thinned(record or next(trained)) for record in done]


def _finished(config: TrainConfig) -> RunRecord | None:
    """The record of a run of these settings that came to its end before."""
    path = Path(config.output_dir) / "record.json"
    record = RunRecord.load(path) if path.is_file() else None
    ended = record and record.status == "finished" and record.config == config.without_paths()
    return record if ended else None


def thinned(record: RunRecord, n_rows: int = 48) -> RunRecord:
    """The run with about `n_rows` rows for its steps: a row of a stretch holds sums and means.

    No stretch goes beyond an evaluation. The first steps, the steps of the largest and the least
    gradient norm of a layer and those with a NaN or Inf are rows of their own, so that extremes
    and sums are those of all steps; a norm of a stretch is its median.
    """
    steps, size = record.steps, math.ceil(len(record.steps) / n_rows)
    if size == 1:
        return record
    norms = {n: step.grad_norm_by_layer.values() for n, step in enumerate(steps)}
    apart = {min(norms, key=lambda n: min(norms[n])), max(norms, key=lambda n: max(norms[n]))}
    apart |= {*range(WHOLE_STEPS)} | {n for n, step in enumerate(steps) if step.nonfinite}
    ends = {done.step for done in record.evals}
    rows, stretch = [], []
    for number, step in enumerate(steps):
        if number in apart and stretch:
            rows.append(_joined(stretch))
            stretch = []
        stretch.append(step)
        if number in apart or step.step in ends or len(stretch) == size:
            rows.append(_joined(stretch))
            stretch = []
    rows += [_joined(stretch)] if stretch else []
    return dataclasses.replace(record, steps=rows)


def _joined(steps: list[StepRecord]) -> StepRecord:
    """One row for several steps, named by the last of them."""
    if len(steps) == 1:
        return steps[0]
    last, n_counted = steps[-1], sum(step.counted_tokens for step in steps)
    summed = {
        name: sum(getattr(step, name) for step in steps)
        for name in (*SUMMED, *(name for name in vars(last) if name.endswith("_s")))
    }
    by_layer = {
        layer: statistics.median(step.grad_norm_by_layer[layer] for step in steps)
        for layer in last.grad_norm_by_layer
    }
    return dataclasses.replace(
        last,
        **summed,
        loss=sum(step.loss * step.counted_tokens for step in steps) / n_counted,
        grad_norm=statistics.median(step.grad_norm for step in steps),
        grad_norm_by_layer=by_layer,
        skipped=any(step.skipped for step in steps),
    )


def in_memory_losses(config: TrainConfig, dtype: str, n_steps: int) -> list[float]:
    """Training losses of the first steps of `config` through transformers and PEFT alone.

    All weights are in memory, in `dtype`; data, order, adapter and optimizer are the same.
    """
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    tokenizer = data.load_tokenizer(config.model_dir)
    with contextlib.redirect_stderr(io.StringIO()):  # the streamed run said it of the data
        examples = prepare(config, tokenizer).train
    model = AutoModelForCausalLM.from_pretrained(config.model_dir, dtype=getattr(torch, dtype))
    model = add_adapter(model.to(device), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=config.weight_decay)
    batches = data.batches(examples, config.batch_size, config.seed)
    losses = []
    for step in range(1, n_steps + 1):
        batch = data.collate(next(batches), tokenizer.pad_token_id)
        n_counted = int((batch["labels"] != data.IGNORED).sum())
        batch = {name: values.to(device) for name, values in batch.items()}
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        loss, _ = optimizer_step(
            model, [batch], n_counted, optimizer, max_grad_norm=config.max_grad_norm
        )
        losses.append(loss)
    return losses


def fall(record: RunRecord) -> float:
    """The fall of held-out loss from the first to the last evaluation, as a fraction."""
    return 1 - record.evals[-1].loss / record.evals[0].loss


def verdict(records: Sequence[RunRecord], reference: Sequence[RunRecord]) -> dict[str, Any]:
    """What `RULE` says of the runs of one configuration; one seed alone has no noise to pass.

    Shuffled targets hold how frequent tokens are and nothing else, and that alone lowers the loss
    of a model that was too sure of other words: a fall by itself is no sign of learning.
    """
    falls = [fall(record) for record in records]
    steps = [step for record in records for step in record.steps]
    norms = [norm for step in steps for norm in step.grad_norm_by_layer.values()]
    noise = 2 * statistics.stdev(falls) if len(falls) > 1 else math.inf
    sound = all(record.status == "finished" for record in records)
    sound = sound and all(0 < norm < math.inf for norm in norms)
    gain, gain_noise, words = compare(reference, records)
    return {
        "seeds": len(records),
        "loss_before": statistics.fmean(record.evals[0].loss for record in records),
        "loss_after": statistics.fmean(record.evals[-1].loss for record in records),
        "fall": statistics.fmean(falls),
        "noise": noise,
        "against_shuffled": gain,
        "against_shuffled_noise": gain_noise,
        "grad_norm_least": min(norms),
        "grad_norm_most": max(norms),
        "nonfinite": sum(step.nonfinite for step in steps)
        + sum(record.status != "finished" for record in records),
        "learned": "YES"
        if sound and statistics.fmean(falls) > noise and words == "lower"
        else "NO",
    }


def compare(one: Sequence[RunRecord], other: Sequence[RunRecord]) -> tuple[float, float, str]:
    """Final held-out loss of `other` against `one`, seed by seed: mean difference, noise, words.

    The same seed holds out the same samples, so that the difference is of the training alone.
    """
    differences = [b.evals[-1].loss - a.evals[-1].loss for a, b in zip(one, other, strict=True)]
    mean = statistics.fmean(differences)
    noise = 2 * statistics.stdev(differences) if len(differences) > 1 else math.inf
    if abs(mean) <= noise:
        return mean, noise, "no difference beyond the noise"
    return mean, noise, "lower" if mean < 0 else "higher"


class _TimeSpent(Exception):
    pass
