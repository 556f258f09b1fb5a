"""`ChunkedLoraTrainer`: read this first. A whole training run, from settings to a record."""

import dataclasses
import functools
import math
import random
import time
from collections.abc import Callable, Iterator
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import torch

from onn_core import data
from onn_core.adapters.lora import add_adapter, describe_experts, trained_layers
from onn_core.adapters.preference import N_ROWS, run_pairs, train_adapters_only
from onn_core.config import TrainConfig, dtype_name
from onn_core.data.corpus import prepare, require_packing, with_steps
from onn_core.data.tokenizer import require_context
from onn_core.errors import ConfigError, NonFiniteError
from onn_core.memory.process import memory_bytes, peak_memory_bytes, reset_peak_memory
from onn_core.processes import ALONE, Processes
from onn_core.record import EvalRecord, RunRecord, StepRecord, describe_environment
from onn_core.run.checkpoints import require_writable
from onn_core.run.nonfinite import first_non_finite, grad_norm_by_layer
from onn_core.run.progress import step_bar
from onn_core.run.resume import RunSaver, TrainingState, describe_run
from onn_core.run.step import FixedScaler, optimizer_step
from onn_core.run.stopping import Stop, early_stop
from onn_core.streaming.gathering import Gathering
from onn_core.streaming.loading import open_streamed
from onn_core.streaming.skeleton import resolve_device
from onn_core.streaming.together import Together
from onn_core.weights.reader import give_back_memory
from onn_core.weights.stream import CLOSE_S

MAX_SKIPS = 20  # steps in a row that loss scaling may skip; from 2^16 it has then tried 2^-3


class ChunkedLoraTrainer:
    """Trains a LoRA on a streamed model.

    config: all settings. on_step: called after each optimizer step with the record so far.
    together: what the run has in common with others of `onn_core.train_many`.

    Under torchrun or accelerate launch every process calls the same: each takes a part of the rows
    of a batch, which `batch_size` counts for all; `memory_budget` is of one process. Only the first
    process writes, shows progress and calls `on_step`.

    Files in `config.output_dir`: `adapter/`, a standard PEFT folder, `record.json`, and
    `checkpoints/`, from which `train(resume=True)` continues.
    """

    def __init__(
        self,
        config: TrainConfig,
        on_step: Callable[[RunRecord], None] = lambda record: None,
        together: Together | None = None,
    ):
        self.config = config
        self.by_pairs = config.objective == "dpo"
        self.n_sides = 2 if self.by_pairs else 1  # rows of a sample in a batch
        self.on_step = on_step
        self.together = together
        self.output_dir = Path(config.output_dir)
        self.stop = Stop()
        self.processes: Processes = ALONE

    def setup(self) -> None:
        """Open everything a run needs; raises OnnError before any long work."""
        self.processes = Processes.of_run(resolve_device(self.config.device))
        with self.processes.together():
            self._open()

    def _open(self) -> None:
        config, processes = self.config, self.processes
        if processes.is_first:
            require_writable(self.output_dir)
        give_back_memory()  # else what was freed here before would hide what the run takes
        memory_before = memory_bytes()
        self.base = open_streamed(
            config.model_dir,
            chunk_size=config.chunk_size,
            micro_batch_size=config.micro_batch_size,
            memory_budget=config.memory_budget,
            host_budget=config.host_budget,
            quantize=config.quantize,
            progress=config.progress,
            device=config.device,
            dtype=config.dtype,
            together=self.together,
        )
        self.gathering = Gathering(self.base, processes)
        digests = self.base.hash_reads() if config.verify_weights else None
        self.device = self.base.device
        self.tokenizer = data.load_tokenizer(config.model_dir)
        require_context(self.base.config, config.max_length, "max_length")
        if config.packing:
            require_packing(self.base)
        narrow = config.lora_dtype == "model" and self.base.dtype == torch.float16
        if narrow and config.loss_scale is not None:
            raise ConfigError(
                "float16 adapters cannot take loss_scale, because their gradients would be "
                'rounded again when it is taken out: set lora_dtype to "float32".'
            )
        n_parameters = self.base.num_parameters()
        self.model = add_adapter(self.base, config)
        corpus = prepare(config, self.tokenizer, len(self.base.get_input_embeddings().weight))
        config, self.n_samples = with_steps(config, len(corpus.train))
        self.config = config
        self.train_set, self.held_out = corpus.train, corpus.held_out
        if config.eval_every and not self.held_out:
            raise ConfigError(
                "eval_every needs held-out rows, but all rows share one prompt or "
                "held_out_fraction is 0: raise it, give more rows, or set eval_every to 0."
            )
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self._train_mode()
        n_rows = self.n_rows(config.batch_size)
        self.base.fit(n_rows, config.max_length, corpus.held_bytes)
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=config.learning_rate, weight_decay=config.weight_decay
        )
        fixed = isinstance(config.loss_scale, float | int)
        self.scaler = (FixedScaler if fixed else torch.amp.GradScaler)(
            self.device.type,
            init_scale=config.loss_scale if fixed else 2.0**16,
            enabled=config.loss_scale is not None,
        )
        state = TrainingState(self.model, self.optimizer, self.scaler)
        run = describe_run(config, self.base.model_folder, corpus.digest)
        self.saver = RunSaver(config, self.model, state, run, digests, processes)
        self.record = RunRecord(
            config=config.without_paths(),
            model={
                "name": Path(config.model_dir).name,
                "type": self.base.config.model_type,
                "layers": len(self.base.streamed_layers),
                "trained_layers": trained_layers(self.base),
                "parameters": n_parameters,
                "trainable": sum(p.numel() for p in self.trained),
                "dtype": dtype_name(self.base.dtype),
                "quantised": (self.base.model_folder.quantisation or {}).get("quant_method"),
                "full_speed_tokens": self.base.sizes.full_speed_tokens,
                "plans_weighed": [dataclasses.asdict(one) for one in self.base.plan.weighed],
                **describe_experts(self.base),
            },
            data=corpus.facts,
            environment=describe_environment(self.device) | {"processes": processes.size},
        )
        self._memory_before = memory_before

    def train(self, resume: bool = False) -> RunRecord:
        """Run `max_steps` optimizer steps; `resume` continues from the newest whole checkpoint.

        Whatever stops it, what the last finished step left is saved: the adapter, the record and
        a checkpoint. Ctrl-C and SIGTERM abandon the step between two layers; a second one stops
        at once. NonFiniteError names the layer. What stops one process stops all.
        """
        self.setup()
        with self.stop:  # a signal ends the process only when all is saved
            try:
                return self.run(resume)
            except BaseException as error:
                self.part(error)
                raise

    def run(self, resume: bool = False) -> RunRecord:
        """`train`, once `setup` is done; `part` must follow if it raises."""
        record = self.record = self.saver.begin(self.record, resume)
        reset_peak_memory(self.device)
        with self.stop:
            try:
                self._steps(record)
                record.status = "finished"
                self.saver.save(record)
                self.processes.meet()
            except BaseException as error:
                if isinstance(error, Exception):  # perhaps for memory: saving needs some
                    self.base.close()
                if self.processes.is_first and not self.stop.at_once:
                    self.saver.save_stopped(record, error)
                self.processes.tell(error)
                raise
            finally:
                self.base.close(0 if self.stop.at_once else CLOSE_S)
        return record

    def part(self, error: BaseException) -> None:
        """Wait until the other processes know of the error that ended `run`.

        If one of them is lost, perhaps the one that writes, the others save the last finished step.
        """
        self.processes.tell(error)
        if self.processes.size > 1 and not self.stop.at_once:
            self.processes.wait_until_told()
            if not self.processes.is_first:
                self.saver.save_stopped(self.record, error)

    def _steps(self, record: RunRecord) -> None:
        """The steps that are left, each with its evaluation and its checkpoint."""
        config, n_done = self.config, len(record.steps)
        started = time.perf_counter() - record.wall_s
        batches = self._batches(n_done)
        name = self.output_dir.name if self.together else ""
        shown = config.progress and self.processes.is_first
        bar = step_bar(self.base, config.max_steps, shown, name)
        with self.base.stoppable(self.stop.check), bar as bar:
            bar.update(n_done)
            for step in range(n_done, config.max_steps + 1):
                if step > n_done:
                    record.steps.append(self._step(step, next(batches)))
                    self.saver.whole = True
                self._evaluate_if_due(record, started)
                record.wall_s = time.perf_counter() - started
                if step < config.max_steps:
                    rule = config.early_stopping_patience, config.early_stopping_threshold
                    record.stopped_early = early_stop(record.evals, *rule)
                if step > n_done:
                    bar.update()
                    bar.set_postfix_str(f"loss {record.steps[-1].loss:.4f}")
                    peak = peak_memory_bytes(self.device, self._memory_before)
                    record.peak_memory_bytes = max(record.peak_memory_bytes, peak)
                    if self.processes.is_first:
                        self.on_step(record)
                    self.saver.save_if_due(record)
                    self.stop.check()
                if record.stopped_early:
                    break

    def n_rows(self, n_samples: int) -> int:
        """Rows in a visit of a layer, at most, of a batch of which each process has its part."""
        return -(-n_samples // self.processes.size) * (N_ROWS if self.by_pairs else 1)

    # --- one optimizer step -----------------------------------------------------------------

    def _step(self, step: int, parts: list[dict[str, torch.Tensor]]) -> StepRecord:
        """Gradients of all `parts` (each a batch), then one update."""
        config = self.config
        started, before = time.perf_counter(), self.base.counts()
        rate = learning_rate(config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        n_items = sum(map(self._count_items, parts))
        own = [self._own(part) for part in parts]
        draws = random.Random(f"step {config.seed} {step} {self.processes.rank}")  # of dropout
        torch.manual_seed(draws.getrandbits(63))
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else None
        skips = len(list(takewhile(lambda done: done.skipped, reversed(self.record.steps))))
        shapes = [(*part["labels"].shape, count_tokens(part)) for part in own]
        before_s = self.record.steps[-1].step_s if self.record.steps else math.inf
        by_layer: dict[str, float] = {}
        optimizer_started = started

        def allow(loss: float, norm: float) -> bool:
            """Whether to update: not where a loss scale, which is then lowered, overflowed."""
            nonlocal by_layer, optimizer_started
            optimizer_started = time.perf_counter()
            by_layer = grad_norm_by_layer(self.base.streamed_layers)
            finite = math.isfinite(loss) and math.isfinite(norm)
            if not finite and (scale is None or skips + 1 >= MAX_SKIPS):
                raise self._non_finite(step, own[0], loss, by_layer)
            self.saver.whole = False  # until the step is finished
            return finite

        loss, grad_norm = optimizer_step(
            self._forward,
            own,
            n_items,
            self.optimizer,
            scaler=self.scaler,
            max_grad_norm=config.max_grad_norm,
            allow=allow,
            processes=self.processes,
            fetching=self.gathering.step(shapes, before_s),
        )
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

        stopped, done = time.perf_counter(), self.base.counts() - before
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        return StepRecord(
            step=step,
            samples=sum(map(self._count_samples, parts)),
            tokens=sum(part["labels"].numel() for part in parts),
            counted_tokens=sum(map(count_tokens, parts)),
            loss=loss,
            learning_rate=rate,
            grad_norm=grad_norm,
            grad_norm_by_layer=by_layer,
            step_s=stopped - started,
            wait_s=done.wait_s,
            forward_s=done.seconds["forward"],
            backward_s=done.seconds["backward"],
            head_s=done.seconds["head"],
            optimizer_s=stopped - optimizer_started,
            bytes_read=done.bytes_read,
            layer_loads=self.base.count_unit_loads(done.weight_loads),
            nonfinite=int(not finite),
            skipped=not finite,
            loss_scale=scale,
            gathered=self.gathering.in_step,
        )

    def _non_finite(
        self, step: int, batch: dict[str, torch.Tensor], loss: float, by_layer: dict[str, float]
    ) -> NonFiniteError:
        """The error that says where it began; by_layer: the norms of the layers' gradients."""
        self.optimizer.zero_grad()
        run = functools.partial(self._forward, **batch, num_items_in_batch=1)
        where = first_non_finite(self.base.streamed_layers, run, loss, by_layer)
        where = max(self.processes.meet(where))  # "the output of ...", if one of them found it
        return NonFiniteError(
            f"step {step}: {where} became NaN or Inf (loss {loss}); the adapter of step {step - 1} "
            "is saved: lower learning_rate, or use bfloat16, float32 adapters or loss_scale."
        )

    def _forward(self, num_items_in_batch: int, **batch: torch.Tensor) -> Any:
        """The model's outputs; their loss is summed and divided by `num_items_in_batch`."""
        batch = {name: values.to(self.device) for name, values in batch.items()}
        if self.by_pairs:
            beta = self.config.dpo_beta
            return run_pairs(self.model, self.base, batch, beta, num_items_in_batch)
        return self.model(**batch, num_items_in_batch=num_items_in_batch)

    def _count_samples(self, batch: dict[str, torch.Tensor]) -> int:
        return len(batch["labels"]) // self.n_sides

    def _count_items(self, batch: dict[str, torch.Tensor]) -> int:
        """What a loss is the mean of: pairs, or tokens that count."""
        return self._count_samples(batch) if self.by_pairs else count_tokens(batch)

    def _own(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What this process takes of a batch."""
        return data.rows_of(batch, self.processes.rank, self.processes.size, self.n_sides)

    def _train_mode(self) -> None:
        train_adapters_only(self.model) if self.by_pairs else self.model.train()

    def evaluate(self) -> tuple[float, float | None]:
        """Mean loss over the counted tokens of held-out examples; no graph.

        Of pairs it is the mean over them, and the accuracy comes along, else None.
        """
        examples = self.held_out[: self.config.eval_samples]
        size = self.config.eval_batch_size or self.config.batch_size
        total, n_items, n_right = 0.0, 0, 0
        self.model.eval()
        with torch.no_grad():
            for start in range(0, len(examples), size):
                batch = data.collate(examples[start : start + size], self.tokenizer.pad_token_id)
                n_items += self._count_items(batch)
                outputs = self._forward(1, **self._own(batch))
                total += float(outputs.loss)
                n_right += outputs.n_right if self.by_pairs else 0
        self._train_mode()
        self.base.model_folder.check_unchanged()
        self.processes.meet()
        total, n_right = self.processes.sum(total), self.processes.sum(n_right)
        return total / n_items, n_right / n_items if self.by_pairs else None

    def _evaluate_if_due(self, record: RunRecord, started: float) -> None:
        step, config = len(record.steps), self.config
        due = config.eval_every and (step % config.eval_every == 0 or step == config.max_steps)
        if due and all(done.step != step for done in record.evals):
            samples, found = sum(done.samples for done in record.steps), self.evaluate()
            record.evals.append(EvalRecord(step, samples, time.perf_counter() - started, *found))

    def _batches(self, n_done: int) -> Iterator[list[dict[str, torch.Tensor]]]:
        """The batches of each step after `n_done`; number i depends on the seed and i alone."""
        config, n_parts = self.config, self.config.gradient_accumulation_steps
        first = n_done * n_parts
        order = {"start_step": first, "n_samples": self.n_samples}
        examples = data.batches(self.train_set, config.batch_size, config.seed, **order)
        while parts := list(islice(examples, n_parts)):
            yield [data.collate(part, self.tokenizer.pad_token_id) for part in parts]


def count_tokens(batch: dict[str, torch.Tensor]) -> int:
    """The tokens of a batch that have a label."""
    return int((batch["labels"] != data.IGNORED).sum())


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of step 1, 2, ...: linear warm-up, then constant, linear or cosine to 0."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    done = (step - config.warmup_steps - 1) / max(1, config.max_steps - config.warmup_steps)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
    }[config.lr_schedule]
    return config.learning_rate * factor
