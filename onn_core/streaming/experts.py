"""The matrices of a layer's experts on a CPU: one after another, as they are stored."""

from typing import Any

import torch
from torch import nn

from onn_core.errors import ConfigError
from onn_core.ops.grouped import GroupedMatmul
from onn_core.ops.matmul import Weight
from onn_core.streaming.lazy import StreamedParameter
from onn_core.weights.dequantise import Quantised
from onn_core.weights.slots import StreamedWeight


def takes_experts(module: nn.Module, weight: StreamedWeight) -> bool:
    """Whether a module multiplies its parameter (E, ...) by transformers' grouped matmul alone."""
    config = getattr(module, "config", None)
    grouped = getattr(config, "_experts_implementation", None) == "grouped_mm"
    of_experts = hasattr(module, "is_transposed") and hasattr(module, "has_gate")
    source = weight.source
    return grouped and of_experts and isinstance(source, Quantised) and source.by_expert


class StreamedExperts(StreamedParameter):
    """Matrices (E, ...) that a grouped matmul takes from where they are stored.

    Where an adapter needs their values they are dense, as of any weight. Anything else finds NaN.
    """

    weight: StreamedWeight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name, own = getattr(func, "__name__", ""), args[0] if args else None
        if name == "transpose" and isinstance(own, cls) and own.weight.dense is None:
            with torch._C.DisableTorchFunctionSubclass():
                turned = func(torch.Tensor.data.__get__(own), *args[1:]).as_subclass(TurnedExperts)
            turned.weight = own.weight
            return turned
        if name == "__getitem__" and own.weight.dense is None:
            raise ConfigError(
                "on a CPU quantised experts are multiplied as they are stored: call "
                'set_experts_implementation("grouped_mm").'
            )
        return _grouped_matmul(super(), func, types, args, kwargs)


class TurnedExperts(torch.Tensor):
    """(E, in, out), of matrices that are stored as (E, out, in)."""

    weight: StreamedWeight

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
    lazy = name in ("grouped_mm", "_grouped_mm") and args[1].weight.dense is None
    if not lazy:
        return other.__torch_function__(func, types, args, kwargs)
    x, matrices = args
    weight, n_out = matrices.weight, matrices.shape[-1]

    def experts() -> Any:
        parts = weight.stored_tensors()

        def expert(number: int) -> Weight:
            return weight.source.expert(parts, number)

        return expert

    return GroupedMatmul.apply(x, weight.tensor, kwargs["offs"], experts, n_out)
