"""What a streamed model does otherwise than the transformers class that it is of.

`streamed_class` makes a subclass with the family's own name and module, because libraries tell
families by them: label smoothing, saved adapters, automatic classes.
"""

import contextlib
import functools
import inspect
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from onn_core.errors import ConfigError, OnnError, frozen, sharded
from onn_core.memory.plan import Plan, Sizes
from onn_core.ops.cross_entropy import IGNORED, shift_labels
from onn_core.streaming.embedding import EmbeddingRows
from onn_core.streaming.head import Logits, StreamedHead, causal_lm_loss
from onn_core.streaming.layer import StreamedLayer
from onn_core.streaming.lazy import LazyWeight, find_parameters, is_absent
from onn_core.streaming.passes import Pass, RowHook
from onn_core.streaming.visits import Counts, Event, Streaming
from onn_core.weights.folder import ModelFolder
from onn_core.weights.slots import StreamedWeight
from onn_core.weights.stream import CLOSE_S


class StreamedModel:
    """Mixed into a transformers model class; `connect` gives it its parts."""

    streaming: Streaming
    model_folder: ModelFolder
    streamed_layers: list[StreamedLayer]
    streamed_head: StreamedHead | None
    _defers_logits = False  # whether logits wait until they are used: see `head.Logits`
    _checked: set[int]  # ids of trained parameters

    # --- what the trainer, a bar or a benchmark asks ------------------------------------------

    @property
    def plan(self) -> Plan:
        """The present plan: slots, micro-batch, terms of the peak memory."""
        return self.streaming.planner.plan

    @property
    def micro_batch_size(self) -> int | None:
        """Samples that go through a layer together now; None is the whole batch."""
        return self.streaming.planner.micro_batch_size

    def counts(self) -> Counts:
        """What was waited, read and computed since the model was loaded."""
        done, seconds = self.streaming.stream.counts, Counter(self.streaming.seconds)
        n_bytes, n_loads = (done.bytes_read, done.bytes_fetched), done.weight_loads.total()
        return Counts(done.wait_s, *n_bytes, n_loads, seconds)

    def count_reserved_graphs(self) -> int:
        """Layers whose graph is reserved at the moment."""
        return len(+self.streaming.planner.graphs.by_layer)

    def layer_weights(self, number: int = 0) -> list[StreamedWeight]:
        """The streamed weights of a decoder layer, in the order in which they are fetched."""
        return list(self.streaming.stream.units[number])

    def set_experts_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As transformers' own. On a CPU any but "grouped_mm" makes a layer's experts dense."""
        super().set_experts_implementation(*args, **kwargs)
        for layer in self.streamed_layers:
            layer.weights.find_looked_at()

    @property
    def sizes(self) -> Sizes:
        """What predictions need to know of the model."""
        return self.streaming.planner.sizes

    def count_unit_loads(self, weight_loads: int) -> int:
        """As how many whole units a number of fetched weights counts."""
        units = self.streaming.stream.units
        return weight_loads * len(units) // sum(len(unit) for unit in units)

    def on_visit(self, callback: Callable[[str, int], None]) -> RemovableHandle:
        """Call `callback(phase, unit)` when a visit begins; phase: forward, head or backward."""
        handle = RemovableHandle(self.streaming.watchers)
        self.streaming.watchers[handle.id] = callback
        return handle

    def n_visits_in_step(self) -> int:
        """Visits of a training step like the latest."""
        return len(self.streaming.step_uses(self.streaming.passes.latest.lowest))

    @contextlib.contextmanager
    def trace(self) -> Iterator[list[Event]]:
        """Inside, what is computed and read is noted: (phase or "read", unit, start, stop)."""
        events: list[Event] = []
        with changed(self.streaming.stream, trace=events):
            yield events

    def stoppable(self, check: Callable[[], None]) -> AbstractContextManager[None]:
        """Inside, `check` is called at each visit and while it waits; it may raise."""
        return changed(self.streaming.stream, check=check)

    def rows_hook(
        self, hook: RowHook, group_size: int | None = None, n_graded: int | None = None
    ) -> AbstractContextManager[None]:
        """Inside, `hook(layer, rows, args, kwargs)` is entered around each micro-batch in a layer.

        It is a context manager that yields the arguments for the layer. group_size: samples; no
        micro-batch and no cache crosses a multiple of it. n_graded: such a multiple; samples from
        there on have no gradient, and backward does not recompute them.
        """
        groups = {"row_hook": hook, "group_size": group_size, "n_graded": n_graded}
        return changed(self.streaming.passes, **groups)

    def token_losses(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of each token that follows in a batch (B, T), 0 where it is not counted: (B, T).

        model: this one, or what wraps it. batch: with labels, as for a loss. The head is read once,
        also for the gradient, and all logits are never there at once.
        """
        labels = shift_labels(batch["labels"])
        inputs = {name: values for name, values in batch.items() if name != "labels"}
        with changed(self, _defers_logits=True):
            logits = model(**inputs).logits
            if isinstance(logits, Logits) and not logits.changed:
                return logits.token_losses(labels)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).transpose(1, 2)
            return F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)

    def fit(self, batch_size: int, n_tokens: int, host_bytes: int = 0) -> None:
        """Plan for batches (B, T) before any comes; ConfigError, with the sum, if none fits.

        host_bytes: what else the trainer holds in host memory for as long as it trains.
        """
        self.streaming.planner.leave_room(host_bytes)
        trained = self._trained()
        self._fit(batch_size, n_tokens, trained, self._lowest_trained(trained, {}))

    def hash_reads(self) -> dict[str, str]:
        """From now on every read is hashed and compared with its first; returns the hashes."""
        return self.streaming.stream.hash_reads()

    @property
    def reads_page_cache(self) -> bool:
        """Whether reads go through the system's page cache, not straight to the disk."""
        return self.streaming.stream.files.cached

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Give back the weights' memory and stop the readers; the next forward starts them."""
        self.streaming.stream.close(timeout_s)
        if self.streaming.captures is not None:
            self.streaming.captures.clear()

    # --- what trainers and users ask of any model --------------------------------------------

    @property
    def loss_function(self) -> Callable[..., torch.Tensor]:
        return functools.partial(causal_lm_loss, super().loss_function)

    @loss_function.setter
    def loss_function(self, value: Callable[..., torch.Tensor]) -> None:
        self._loss_function = value

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise OnnError(
            "a streamed model holds no weights to save: save its adapter, or use onn_core.merge."
        )

    def resize_token_embeddings(self, n_tokens: int | None = None, *args: Any, **kwargs: Any):
        """The embedding as it is; ConfigError for another size."""
        embedding = self.get_input_embeddings()
        if n_tokens not in (None, embedding.num_embeddings):
            raise frozen("vocabulary rows")
        return embedding

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: streaming is activation checkpointing already."""

    def enable_input_require_grads(self) -> None:
        """Nothing: the recompute needs no gradient of its inputs to reach the adapters."""

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DistributedDataParallel leaves alone: all that is frozen; adapters are reduced."""
        frozen_names = [name for name, p in self.named_parameters() if not p.requires_grad]
        prefixes = ("", "base_model.", "base_model.model.")  # of PEFT's wrappers
        return [prefix + name for name in frozen_names for prefix in prefixes]

    def _replicate_for_data_parallel(self) -> Any:
        raise sharded("nn.DataParallel")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True):
        """Under `.to()`, `.half()` and the like: nothing to do, or ConfigError."""
        if "streaming" not in vars(self):  # it is being made
            return super()._apply(fn, recurse)
        now = torch.empty(0, dtype=self.dtype, device=self.streaming.device)
        then = fn(now)
        if then.dtype != now.dtype or then.device != now.device:
            raise ConfigError(
                f"a streamed model stays in {now.dtype} on {now.device}: load it again with "
                f"from_pretrained(..., dtype=..., device=...) for {then.dtype} on {then.device}."
            )
        return self

    # --- a pass -------------------------------------------------------------------------------

    def connect(
        self,
        streaming: Streaming,
        model_folder: ModelFolder,
        layers: list[StreamedLayer],
        head: StreamedHead | None,
        embedding: EmbeddingRows | None,
    ) -> None:
        """Take the streamed parts, and watch for passes of the model and of its base."""
        self.streaming, self.model_folder, self.streamed_layers = streaming, model_folder, layers
        self.streamed_head = head
        self._checked = set()
        for end in filter(None, (head, embedding)):
            weight = end.module._parameters["weight"]
            if type(weight) is nn.Parameter:  # else it is tied, and replaced already
                lazy = LazyWeight.of(weight, end.rows)
                for module in self.modules():
                    for name, parameter in module._parameters.items():
                        if parameter is weight:
                            module._parameters[name] = lazy
        owner = weakref.ref(self)  # no cycle: it is freed at once
        if head is not None:
            head.owner = owner
        base = self.base_model
        base.register_forward_pre_hook(
            lambda module, args, kwargs: owner().begin_pass(module, args, kwargs),
            with_kwargs=True,
        )
        base.register_forward_hook(
            lambda module, *_: streaming.passes.end(module), always_call=True
        )
        self.register_state_dict_post_hook(_leave_out_absent)

    def begin_pass(
        self,
        module: nn.Module | None,
        args: tuple,
        kwargs: dict[str, Any],
        defers_logits: bool = False,
    ) -> tuple[tuple, dict[str, Any]]:
        """Before a forward pass of the model (None), or of its base where that is called alone."""
        streaming = self.streaming
        if streaming.batching.probing:
            return args, kwargs
        running = streaming.passes.running
        if module is not None and running is not None and running.owner is None:  # the model's own
            is_trained = running.lowest is not None
            return _without_cache(module.forward, args, kwargs) if is_trained else (args, kwargs)
        run = super().forward if module is None else module.forward
        given = inspect.signature(run).bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        trained = self._trained()
        lowest = self._lowest_trained(trained, given) if torch.is_grad_enabled() else None
        self._require_streamable(trained, lowest, given)
        if lowest is not None:
            self._check_trained(trained)
            args, kwargs = _without_cache(run, args, kwargs)
        samples = (given.get(name) for name in ("input_ids", "inputs_embeds"))
        batch = next((x for x in samples if x is not None), None)  # (B, T) or (B, T, C)
        size = (None, None) if batch is None else batch.shape[:2]
        begun = Pass(module, run, args, kwargs, lowest, *size, defers_logits)
        streaming.passes.latest = begun
        if batch is not None:
            self._fit(begun.batch_size, begun.n_tokens, trained, lowest)
        return args, kwargs

    def _require_streamable(
        self,
        trained: dict[int | None, list[nn.Parameter]],
        lowest: int | None,
        given: dict[str, Any],
    ) -> None:
        """ConfigError for a pass that needs what streamed layers do not have."""
        require_no_sharding()
        if any(map(is_absent, chain.from_iterable(trained.values()))):
            raise frozen("weights")
        config = self.config.get_text_config()
        for name in ("output_router_logits", "output_attentions"):
            if given.get(name, getattr(config, name, False)) and (
                lowest is not None or self.streaming.planner.micro_batch_size
            ):
                raise ConfigError(
                    f"{name} asks for values from inside the layers, whose gradients are not "
                    f"streamed: set model.config.{name} = False (in TRL router_aux_loss_coef=0.0)."
                )
        cache = given.get("past_key_values") if torch.is_grad_enabled() else None
        filled = (layer for layer in getattr(cache, "layers", ()) if layer.is_initialized)
        if any(layer.keys.requires_grad for layer in filled):
            raise ConfigError(
                "prefix tuning trains a key-value cache, which streamed layers give no gradient: "
                "use LoRA or prompt tuning."
            )

    def _fit(
        self,
        batch_size: int,
        n_tokens: int,
        trained: dict[int | None, list[nn.Parameter]],
        lowest: int | None,
    ) -> None:
        n_trained = sum(p.numel() for p in chain.from_iterable(trained.values()))
        n_back = 0 if lowest is None else len(self.streamed_layers) - lowest
        streaming = self.streaming
        if streaming.member is not None:
            streaming.member.fit(batch_size, n_tokens, n_trained, n_back)
            return
        streaming.planner.fit(batch_size, n_tokens, n_trained, n_back)
        streaming.stream.set_slots(self.plan.slots, self.plan.dense, self.plan.casts_once)
        if streaming.captures is not None and not self.plan.captured:
            streaming.captures.clear()

    def _trained(self) -> dict[int | None, list[nn.Parameter]]:
        """The trained parameters of each layer that has some; None: of all that is outside them.

        Looked up once a pass: in a deep model with adapters a look at every module takes long.
        """
        layers = {layer.module for layer in self.streamed_layers}
        trained = {layer.number: layer.weights.find_parameters() for layer in self.streamed_layers}
        trained[None] = find_parameters(self, without=layers)
        trained = {n: [p for p in found if p.requires_grad] for n, found in trained.items()}
        return {number: found for number, found in trained.items() if found}

    def _lowest_trained(
        self, trained: dict[int | None, list[nn.Parameter]], given: dict[str, Any]
    ) -> int | None:
        """The lowest layer that backward reaches: below what is trained, or None."""
        embeds = given.get("inputs_embeds")
        head = self.get_output_embeddings()
        of_head = {id(p) for p in head.parameters()} if head else set()
        below = any(id(p) not in of_head for p in trained.get(None, ()))
        if below or embeds is not None and embeds.requires_grad:  # or a norm after the layers
            return 0
        return min((number for number in trained if number is not None), default=None)

    def _check_trained(self, trained: dict[int | None, list[nn.Parameter]]) -> None:
        """ConfigError if a trained parameter was made from weights that were not there."""
        if all(id(p) in self._checked for p in chain.from_iterable(trained.values())):
            return
        visited = {id(p) for number, found in trained.items() if number is not None for p in found}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad or id(parameter) in self._checked:
                continue
            self._checked.add(id(parameter))
            later = "lora_magnitude_vector" in name and id(parameter) in visited
            if not later and parameter.isnan().any():
                raise ConfigError(
                    f"{name} is NaN: it cannot be made from weights that are streamed; use LoRA or "
                    "DoRA with init_lora_weights True."
                )


@contextlib.contextmanager
def changed(owner: Any, **values: Any) -> Iterator[None]:
    """Inside, `owner` has these values of its attributes."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def require_no_sharding() -> None:
    """ConfigError where accelerate, or transformers.Trainer through it, is told to shard."""
    for name in ("FSDP", "DeepSpeed"):
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() in ("true", "1"):
            raise sharded(name)


@functools.cache
def streamed_class(plain: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of `plain`, of the same name and module, whose instances `connect`."""
    signature = inspect.signature(plain.forward)

    @torch.compiler.disable  # torch.compile may take what is around; weights are fetched in Python
    @functools.wraps(plain.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(signature.parameters, (self, *args), strict=False)) | kwargs
        with_loss = given.get("labels") is not None or given.get("shift_labels") is not None
        scores = with_loss or self._defers_logits  # and nothing is generated
        if scores and "use_cache" in signature.parameters and "use_cache" not in given:
            kwargs["use_cache"] = False
        try:
            args, kwargs = self.begin_pass(None, args, kwargs, defers_logits=scores)
            return plain.forward(self, *args, **kwargs)
        except RuntimeError as error:  # in place, on a placeholder
            if "written-to tensor" in str(error):
                raise frozen("weights") from error
            raise
        finally:
            self.streaming.passes.end(None)

    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
    return type(plain.__name__, (StreamedModel, plain), names | {"forward": forward})


def _without_cache(run: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The arguments with use_cache=False: a recompute must not fill a cache twice."""
    signature = inspect.signature(run)
    if "use_cache" not in {*kwargs, *signature.parameters}:
        return args, kwargs
    try:
        bound = signature.bind(*args, **{"use_cache": None} | kwargs)
    except TypeError:  # it is among args
        bound = signature.bind(*args, **kwargs)
        bound.arguments["use_cache"] = False
        return bound.args, bound.kwargs
    return args, kwargs | {"use_cache": False}


def _leave_out_absent(
    model: PreTrainedModel, state: dict[str, torch.Tensor], prefix: str, metadata: Any
) -> None:
    """What a wrapper's state_dict (PEFT's) holds: only what is there."""
    if not prefix:
        raise OnnError("a streamed model has no state_dict: its weights stay on disk.")
    for name in [name for name in state if name.startswith(prefix)]:
        if is_absent(state[name]):
            del state[name]
