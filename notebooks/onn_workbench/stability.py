"""Where a NaN comes from: training steps with every tensor watched.

The original report names four fixes against NaN. Each is one field of a `Variant` here, so that
each can be added alone to a broken configuration and taken alone from a sound one.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from onn_core.adapters.lora import add_adapter
from onn_core.config import TrainConfig
from onn_core.errors import OnnError
from onn_core.ops.cross_entropy import IGNORED, shift_labels
from onn_core.run.step import optimizer_step
from onn_core.streaming.loading import from_pretrained

FIRST_SCALE = 2.0**10  # below the 2^16 of GradScaler, so that fewer first steps are skipped


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a step is computed.

    dtype: of weights and activations. adapter_float32: A and B, their gradients and the optimizer's
    moments are float32, else `dtype`. inputs_float32: an adapter's input is cast and its matmuls
    are taken in float32, else in `dtype`. loss: "sum" of the logits in `dtype`, or in float32 "mse"
    against the one-hot target or "cross-entropy". scaling: dynamic loss scaling.
    """

    dtype: str = "float16"
    adapter_float32: bool = True
    inputs_float32: bool = True
    loss: str = "cross-entropy"
    scaling: bool = True


SOUND = Variant()
BROKEN = Variant(adapter_float32=False, inputs_float32=False, loss="sum", scaling=False)
FIXES = {  # name of a fix -> its field
    "LoRA kept in float32": "adapter_float32",
    "inputs cast to float32": "inputs_float32",
    "a proper loss": "loss",
    "gradient scaling": "scaling",
}


def variants() -> dict[str, Variant]:
    """The broken and the sound configuration, each fix added to one or taken from the other."""
    found = {"broken": BROKEN}
    for name, field in FIXES.items():
        found[f"broken + {name}"] = dataclasses.replace(BROKEN, **{field: getattr(SOUND, field)})
    for name, field in FIXES.items():
        found[f"sound - {name}"] = dataclasses.replace(SOUND, **{field: getattr(BROKEN, field)})
    return found | {"sound": SOUND}


@dataclasses.dataclass
class Event:
    """A tensor that holds NaN or Inf.

    phase: "forward", "loss", "backward" (gradients of activations), "gradient" (of an adapter) or
    "update" (an adapter after the optimizer's step). layer: None outside the decoder layers.
    largest: the largest finite value before it in this phase and step.
    """

    step: int
    phase: str
    layer: int | None
    tensor: str
    value: str  # "NaN" or "Inf"
    share: float  # of its elements that are not finite
    largest: float

    def __str__(self) -> str:
        where = "" if self.layer is None else f"layer {self.layer}, "
        of = {"backward": "gradient of ", "gradient": "gradient of ", "update": "updated "}
        what = f"{of.get(self.phase, '')}{self.tensor}"
        return f"step {self.step}: {where}{what} is {self.value}"


@dataclasses.dataclass
class Outcome:
    """What a variant did. `first`: the first event of each phase, in order of time."""

    variant: dict[str, Any]
    steps: list[dict[str, float | bool | None]]
    first: list[Event]
    largest_by_layer: dict[str, dict[int, float]]  # phase -> layer -> largest value of step 1
    adapter_finite: bool = True
    cross_entropy_after: float = math.nan  # of the batch, after the last step

    @property
    def steps_skipped(self) -> int:
        return sum(step["skipped"] for step in self.steps)

    @property
    def learned(self) -> bool:
        """Whether cross-entropy fell by more than 2 %; a NaN has not fallen."""
        return self.cross_entropy_after < 0.98 * self.steps[0]["cross_entropy"]


class Watch:
    """Looks at the tensors of every step for the first NaN or Inf and for the largest value."""

    def __init__(self, model: Any):
        self.first: list[Event] = []
        self.step = 0
        self.largest: dict[str, dict[int | None, float]] = {}  # phase -> layer -> value
        for layer in model.streamed_layers:
            for name, module in layer.module.named_modules():
                if not isinstance(module, torch.nn.Identity):
                    name = name.replace(".default", "") or "output"
                    hook = functools.partial(self._on_output, layer.number, name)
                    module.register_forward_hook(hook)
        head = model.get_output_embeddings()
        head.register_forward_pre_hook(
            lambda _, inputs: self._on_output(None, "the head's input", None, None, inputs)
        )

    def begin(self, step: int) -> None:
        self.step, self.largest = step, collections.defaultdict(dict)

    def see(self, phase: str, layer: int | None, name: str, tensor: torch.Tensor) -> None:
        """Note the largest value of `tensor`, or, for the first time in a phase, a NaN or Inf."""
        if not tensor.numel():
            return
        largest, book = float(tensor.detach().abs().max()), self.largest[phase]
        if math.isfinite(largest):
            book[layer] = max(book.get(layer, 0.0), largest)
        elif not any(event.phase == phase for event in self.first):
            finite = tensor.isfinite()
            rest = tensor[finite].abs()
            before = [*book.values(), float(rest.max()) if rest.numel() else 0.0]
            value = "NaN" if tensor.isnan().any() else "Inf"
            share = 1 - float(finite.float().mean())
            self.first.append(Event(self.step, phase, layer, name, value, share, max(before)))

    def _on_output(self, layer: int | None, name: str, _: Any, __: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if not isinstance(output, torch.Tensor):
            return
        recompute = torch.is_grad_enabled() and layer is not None and name != "output"
        if not recompute:
            self.see("forward", layer, name, output)
        if output.requires_grad:
            output.register_hook(lambda grad: self.see("backward", layer, name, grad))


class _Scaler:
    """A torch.amp.GradScaler that also takes the gradients of float16 adapters, and is watched.

    is_on: else the scale is 1 and no step is skipped, however broken its gradients are. grad_norm:
    the last one, summed in float64, because float16 gradients may have one beyond float16.
    """

    def __init__(self, is_on: bool, trained: dict[str, torch.nn.Parameter], watch: Watch):
        self.is_on, self.trained, self.watch = is_on, trained, watch
        self.factor = FIRST_SCALE if is_on else 1.0
        self.grad_norm, self.skipped = 0.0, False

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss.float() * self.factor

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = {name: p.grad for name, p in self.trained.items() if p.grad is not None}
        for name, gradient in gradients.items():
            self.watch.see("gradient", *_split_name(name), gradient)
            gradient.div_(self.factor)
        self.grad_norm = _norm(gradients.values())
        self.skipped = self.is_on and not math.isfinite(self.grad_norm)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.skipped:
            optimizer.step()

    def update(self) -> None:
        if self.skipped:
            self.factor /= 2


class Study:
    """One pretrained model and one batch; every `run` begins from the same adapters.

    batch: input_ids, attention_mask and labels, each (B, T). Weights stay in memory.
    """

    def __init__(self, model_dir: str, batch: dict[str, torch.Tensor], dtype: str, **settings: Any):
        config = TrainConfig(model_dir, "chatterbot", "unused", dtype=dtype, **settings)
        base = from_pretrained(model_dir, device="cpu", dtype=dtype, memory_budget="64GB")
        self.batch, self.dtype = batch, base.dtype
        self.model = add_adapter(base, config)
        self.watch = Watch(base)
        self.trained = {
            name.partition(".layers.")[2].replace(".default.weight", ""): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        self.start = {name: p.detach().clone() for name, p in self.trained.items()}
        self.close = base.close

    def run(self, variant: Variant, n_steps: int, learning_rate: float = 1e-3) -> Outcome:
        """At most `n_steps` optimizer steps on the batch; fewer once an adapter is not finite."""
        self._prepare(variant)
        watch, labels = self.watch, self.batch["labels"]
        scaler = _Scaler(variant.scaling, self.trained, watch)
        model = functools.partial(self._watched_loss, variant.loss)
        optimizer = torch.optim.AdamW(self.trained.values(), lr=learning_rate, weight_decay=0.0)
        outcome = Outcome(dataclasses.asdict(variant), [], watch.first, {})
        for step in range(1, n_steps + 1):
            watch.begin(step)
            scale = scaler.factor
            loss, _ = optimizer_step(model, [self.batch], None, optimizer, scaler=scaler)
            outcome.steps.append(
                {
                    "step": step,
                    "loss": loss,
                    "cross_entropy": float(loss_of(self.logits, labels, "cross-entropy")),
                    "grad_norm": scaler.grad_norm,
                    "largest_activation": max(watch.largest["forward"].values(), default=0.0),
                    "largest_gradient": max(watch.largest["backward"].values(), default=0.0),
                    "loss_scale": scale if variant.scaling else None,
                    "skipped": scaler.skipped,
                }
            )
            if step == 1:
                outcome.largest_by_layer = {
                    phase: {k: v for k, v in watch.largest[phase].items() if k is not None}
                    for phase in ("forward", "backward")
                }
            for name, parameter in self.trained.items():
                watch.see("update", *_split_name(name), parameter)
            outcome.adapter_finite = all(p.isfinite().all() for p in self.trained.values())
            if not outcome.adapter_finite:
                return outcome
        with torch.no_grad():
            after = self.model(**self.batch | {"labels": None}).logits
        outcome.cross_entropy_after = float(loss_of(after, labels, "cross-entropy"))
        return outcome

    def gradients(self, n_counted: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
        """Of the cross-entropy summed and divided by `n_counted`, without `scale`, times n_counted.

        In exact arithmetic neither number would change them.
        """
        self._prepare(dataclasses.replace(SOUND, dtype=str(self.dtype).removeprefix("torch.")))
        self.watch.begin(1)
        n_here = int((shift_labels(self.batch["labels"]) != IGNORED).sum())
        loss = self._watched_loss("cross-entropy", **self.batch).loss
        (loss * (scale * n_here / n_counted)).backward()
        return {name: p.grad * (n_counted / scale) for name, p in self.trained.items()}

    def _watched_loss(
        self, kind: str, labels: torch.Tensor, num_items_in_batch: None = None, **inputs: Any
    ) -> Any:
        """The model's output with a loss of `kind`, which may be the faulty one; both are watched.

        The logits, (B, T, V), are kept without a graph.
        """
        output, watch = self.model(**inputs), self.watch
        watch.see("forward", None, "logits", output.logits)
        output.logits.register_hook(lambda grad: watch.see("backward", None, "logits", grad))
        output.loss = loss_of(output.logits, labels, kind)
        watch.see("loss", None, f"{kind} loss", output.loss)
        self.logits = output.logits.detach()
        return output

    def _prepare(self, variant: Variant) -> None:
        """The adapters' first values, in the variant's dtypes."""
        if getattr(torch, variant.dtype) != self.dtype:
            raise OnnError(f"this study is in {self.dtype}: make one in {variant.dtype}.")
        compute = torch.float32 if variant.inputs_float32 else self.dtype
        held = torch.float32 if variant.adapter_float32 else self.dtype
        for name, parameter in self.trained.items():
            parameter.grad, parameter.data = None, self.start[name].to(held, copy=True)
        for name, module in self.model.named_modules():
            if name.endswith((".lora_A.default", ".lora_B.default")):
                module.forward = functools.partial(_linear_in, module, compute)
        self.watch.first = []


def loss_of(logits: torch.Tensor, labels: torch.Tensor, kind: str) -> torch.Tensor:
    """logits (B, T, V), labels (B, T) -> a scalar, as `Variant.loss` says."""
    if kind == "sum":
        return logits.sum()
    targets = shift_labels(labels)
    counted = targets != IGNORED
    rows, targets = logits[counted].float(), targets[counted]  # (n, V), (n,)
    if kind == "mse":
        return F.mse_loss(rows, F.one_hot(targets, rows.shape[-1]).float())
    return F.cross_entropy(rows, targets)


def gradient_errors(
    narrow: Study, exact: Study, n_counted: Sequence[int], scales: Sequence[float]
) -> list[dict[str, float]]:
    """How far the gradients of `narrow` are from those of `exact`, relative to their norm."""
    want = exact.gradients(1)
    rows = []
    for n in n_counted:
        for scale in scales:
            found = narrow.gradients(n, scale)
            error = _norm(found[name] - want[name] for name in want) / _norm(want.values())
            rows.append({"counted_tokens": n, "loss_scale": scale, "error": error})
    return rows


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def _linear_in(module: torch.nn.Linear, dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x.to(dtype), module.weight.to(dtype))


def _split_name(name: str) -> tuple[int, str]:
    """ "3.mlp.up_proj.lora_A" -> 3, "mlp.up_proj.lora_A"."""
    number, _, rest = name.partition(".")
    return int(number), rest
