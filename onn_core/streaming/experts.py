"""The matrices of a layer's experts on a CPU: one after another, as they are stored."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from onn_core.errors import ConfigError
from onn_core.ops.grouped import GroupedMatmul
from onn_core.ops.matmul import Weight
from onn_core.streaming.lazy import StreamedParameter
from onn_core.weights.slots import StreamedWeight


def groups_experts(module: nn.Module) -> bool:
    """Whether a module multiplies its parameters (E, ...) by transformers' grouped matmul."""
    config = getattr(module, "config", None)
    grouped = getattr(config, "_experts_implementation", None) == "grouped_mm"
    return grouped and hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def looks_at_experts(module: nn.Module) -> bool:
    """Whether a module that was loaded with a grouped matmul multiplies in another way now."""
    of_experts = any(isinstance(x, StreamedExperts) for x in module._parameters.values())
    return of_experts and not groups_experts(module)


class StreamedExperts(StreamedParameter):
    """Matrices (E, ...) that a grouped matmul takes from where they are stored.

    Where an adapter looks at their values they are there, as any weight's; else all finds NaN.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name, own = getattr(func, "__name__", ""), args[0] if args else None
        if name == "transpose" and isinstance(own, cls) and own.as_stored:
            with torch._C.DisableTorchFunctionSubclass():
                turned = func(torch.Tensor.data.__get__(own), *args[1:]).as_subclass(TurnedExperts)
            turned.weight = own.weight
            return turned
        if name == "__getitem__" and own.as_stored:
            raise ConfigError(
                "experts are multiplied as they are stored: call the model's "
                "set_experts_implementation to choose another way, and do not set its config."
            )
        return _grouped_matmul(super(), func, types, args, kwargs)


class TurnedExperts(torch.Tensor):
    """(E, in, out), of matrices that are stored as (E, out, in)."""

    weight: StreamedWeight
    as_stored = True

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return _grouped_matmul(super(), func, types, args, kwargs)


def _grouped_matmul(
    other: Any, func: Any, types: Any, args: tuple, kwargs: dict | None
) -> torch.Tensor:
    """What a grouped matmul gives; any other function is torch's."""
    kwargs = kwargs or {}
    name = getattr(func, "__name__", "")
    lazy = name in ("grouped_mm", "_grouped_mm") and args[1].as_stored
    if not lazy:
        return other.__torch_function__(func, types, args, kwargs)
    x, matrices = args
    weight, source = matrices.weight, matrices.weight.source

    def experts() -> Callable[[int], Weight]:
        if not weight.packed:
            return weight.tensor.__getitem__
        return functools.partial(source.expert, weight.stored_tensors())

    # Some models have parameters (E, in, out), which some formats store as (E, out, in).
    turned = isinstance(matrices, StreamedExperts) != source.turned
    n_out = matrices.shape[-1]
    return GroupedMatmul.apply(x, weight.tensor, kwargs["offs"], experts, turned, n_out)
