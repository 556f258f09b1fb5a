"""What a streamed model does otherwise than the transformers class that it is of."""

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from onn_core.errors import ConfigError, OnnError, frozen
from onn_core.streaming.embedding import EmbeddingRows
from onn_core.streaming.head import StreamedHead, causal_lm_loss
from onn_core.streaming.layer import StreamedLayer
from onn_core.streaming.lazy import LazyWeight, is_absent
from onn_core.streaming.session import Session
from onn_core.weights.folder import ModelFolder


class StreamedModel:
    """Mixed into a transformers model class; `session` is shared by the streamed layers."""

    session: Session
    model_folder: ModelFolder
    streamed_head: StreamedHead | None
    streamed_layers: list[StreamedLayer]

    @property
    def loss_function(self) -> Callable[..., torch.Tensor]:
        return functools.partial(causal_lm_loss, super().loss_function)

    @loss_function.setter
    def loss_function(self, value: Callable[..., torch.Tensor]) -> None:
        self._loss_function = value

    def close(self) -> None:
        """Give back the weights' memory and stop the readers; the next forward starts them."""
        self.session.stream.close()

    # --- what trainers and users ask of any model --------------------------------------------

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

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True):
        """Under `.to()`, `.half()` and the like: nothing to do, or ConfigError."""
        now = torch.empty(0, dtype=self.dtype, device=self.session.device)
        then = fn(now)
        if then.dtype != now.dtype or then.device != now.device:
            raise ConfigError(
                f"a streamed model stays in {now.dtype} on {now.device}: load it again with "
                f"from_pretrained(..., dtype=..., device=...) for {then.dtype} on {then.device}."
            )
        return self


def become_streamed(
    model: PreTrainedModel,
    session: Session,
    model_folder: ModelFolder,
    layers: list[StreamedLayer],
    head: StreamedHead | None,
    embedding: EmbeddingRows | None,
) -> None:
    """Give `model`, whose layers and ends are streamed, a class of its own."""
    plain = type(model)

    @functools.wraps(plain.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(inspect.signature(plain.forward).parameters, (self, *args), strict=False))
        given |= kwargs
        with_loss = given.get("labels") is not None or given.get("shift_labels") is not None
        takes_cache = "use_cache" in inspect.signature(plain.forward).parameters
        if with_loss and takes_cache and "use_cache" not in given:
            kwargs["use_cache"] = False  # nothing is generated
        if head is not None:
            head.defers = with_loss
        try:
            args, kwargs = begin(None, args, kwargs)
            return plain.forward(self, *args, **kwargs)
        except RuntimeError as error:  # in place, on a placeholder
            if "written-to tensor" in str(error):
                raise frozen("weights") from error
            raise
        finally:
            session.batching.end(None)
            if head is not None:
                head.defers = False

    model.__class__ = type(
        f"Streamed{plain.__name__}", (StreamedModel, plain), {"forward": forward}
    )
    model.session, model.model_folder, model.streamed_layers = session, model_folder, layers
    model.streamed_head = head
    for end in filter(None, (head, embedding)):
        weight = end.module._parameters["weight"]
        if type(weight) is nn.Parameter:  # else it is tied, and replaced already
            lazy = LazyWeight.of(weight, end.rows)
            for module in model.modules():
                for name, parameter in module._parameters.items():
                    if parameter is weight:
                        module._parameters[name] = lazy
    absent = [parameter for parameter in model.parameters() if is_absent(parameter)]
    begin = functools.partial(
        _begin, plain, weakref.ref(model), absent
    )  # no cycle: it is freed at once
    base = model.base_model
    base.register_forward_pre_hook(begin, with_kwargs=True)
    base.register_forward_hook(lambda base, *_: session.batching.end(base), always_call=True)
    model.register_state_dict_post_hook(_leave_out_absent)


def _begin(
    plain: type[PreTrainedModel],
    owner: weakref.ref,
    absent: list[nn.Parameter],
    module: nn.Module | None,
    args: tuple,
    kwargs: dict[str, Any],
) -> tuple[tuple, dict[str, Any]]:
    """Before a forward pass of the model, or of its base where a trainer calls that alone."""
    model, lowest = owner(), None
    if model.session.batching.probing:
        return args, kwargs
    for layer in reversed(model.streamed_layers if torch.is_grad_enabled() else []):
        if any(parameter.requires_grad for parameter in layer.module.parameters()):
            lowest = layer.number
    if any(weight.requires_grad for weight in absent):
        raise frozen("weights")
    for name in ("output_router_logits", "output_attentions"):
        config = model.config.get_text_config()
        if kwargs.get(name, getattr(config, name, False)) and (
            lowest is not None or model.session.micro_batch_size
        ):
            raise ConfigError(
                f"{name} asks for values from inside the layers, whose gradients are not streamed: "
                f"set model.config.{name} = False (in TRL router_aux_loss_coef=0.0)."
            )
    model.session.lowest = lowest
    model.session.n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run = functools.partial(plain.forward, model) if module is None else module.forward
    if lowest is not None:
        model.session.check_trained(model)
        args, kwargs = _without_cache(run, args, kwargs)
    model.session.batching.begin(module, run, args, kwargs)
    return args, kwargs


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
