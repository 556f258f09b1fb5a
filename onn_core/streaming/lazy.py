"""Tensors that are not there until something uses their values.

Until then they are one NaN seen as the whole shape: code that cannot be intercepted reads NaN,
never a wrong number.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.utils import _pytree as pytree

from onn_core.errors import frozen
from onn_core.weights.slots import StreamedWeight

# What a tensor tells, or takes, without its values.
METADATA = {
    *("shape", "dtype", "device", "requires_grad", "grad", "grad_fn", "is_leaf", "data", "layout"),
    *("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_nested", "is_quantized", "is_mkldnn"),
    *("is_mps", "is_xpu", "is_xla", "is_vulkan", "is_mtia", "is_maia", "is_ipu", "retains_grad"),
    *("ndim", "nbytes", "itemsize", "size", "dim", "numel", "nelement", "element_size", "stride"),
    *("storage_offset", "untyped_storage", "data_ptr", "is_floating_point", "is_complex"),
    *("is_contiguous", "requires_grad_", "_version", "__hash__", "__len__"),
}


def nan_of(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One NaN that is seen as the whole shape."""
    return torch.full((1,) * len(shape), torch.nan, dtype=dtype, device=device).expand(shape)


class LazyTensor(torch.Tensor):
    """A tensor whose `values` are asked for when something uses them."""

    @classmethod
    def absent(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        requires_grad: bool = False,
    ) -> "LazyTensor":
        return torch.Tensor._make_subclass(cls, nan_of(shape, dtype, device), requires_grad)

    def values(self) -> torch.Tensor:
        raise NotImplementedError

    def set_data(self, values: torch.Tensor) -> None:
        """Refused, unless it changes nothing: `.to()` the same device and dtype sets it, too."""
        if not same_memory(self, values):
            raise frozen("weights")

    def answer(self, func: Any, name: str, args: tuple, kwargs: dict) -> Any:
        """What `func` gives without the values, or NotImplemented; args[0] is this tensor."""
        return NotImplemented

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "__delete__"):  # a property
            kind, name = name, func.__self__.__name__
            if name == "data" and kind == "__set__":
                return args[0].set_data(args[1])
        if name in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if args and isinstance(args[0], LazyTensor):
            answer = args[0].answer(func, name, args, kwargs)
            if answer is not NotImplemented:
                return answer
        args, kwargs = pytree.tree_map_only(LazyTensor, lambda x: x.values(), (args, kwargs))
        return func(*args, **kwargs)


class LazyWeight(LazyTensor):
    """A weight (V, C) on disk, for code that reads it past its module: rows as they are sliced."""

    rows: Callable[[int, int], torch.Tensor]
    _is_param = True  # an nn.Parameter for isinstance

    @staticmethod
    def of(like: torch.Tensor, rows: Callable[[int, int], torch.Tensor]) -> "LazyWeight":
        tensor = LazyWeight.absent(like.shape, like.dtype, like.device)
        tensor.rows = rows
        return tensor

    def values(self) -> torch.Tensor:
        return self.rows(0, len(self))

    def answer(self, func: Any, name: str, args: tuple, kwargs: dict) -> Any:
        if name == "__getitem__" and isinstance(args[1], slice):
            start, stop, step = args[1].indices(len(self))
            return self.rows(start, stop) if step == 1 else NotImplemented
        if name in ("detach", "__repr__"):
            return func(self.data, **kwargs)
        if name in CONVERSIONS:  # of a module: nothing to read where nothing changes
            like = torch.empty(0, dtype=self.dtype, device=self.device)
            then = func(like, *args[1:], **kwargs)
            if (then.dtype, then.device) == (like.dtype, like.device):
                return self
        if name == "__deepcopy__" or changes_its_tensor(name):
            raise frozen("vocabulary rows")
        return NotImplemented


class StreamedParameter(torch.nn.Parameter):
    """A parameter of a decoder layer, which outside a visit is one NaN seen as the whole shape.

    weight: its matrix, which several parameters may share. as_stored: its module multiplies by what
    is stored, and it stays NaN. What reads its data outside a visit, or converts it, is given an
    `AbsentWeight`, which says why it cannot be merged, factorised or changed.
    """

    weight: StreamedWeight
    as_stored: bool = False

    @property
    def data(self) -> torch.Tensor:
        data = torch.Tensor.data.__get__(self)
        return data.as_subclass(AbsentWeight) if is_absent(data) else data

    @data.setter
    def data(self, values: torch.Tensor) -> None:
        if not same_memory(self, values):
            raise frozen("weights")

    def set(self, values: torch.Tensor) -> None:
        """Hold `values` (same shape) from now on."""
        torch.Tensor.data.__set__(self, values)

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        converted = super().to(*args, **kwargs)
        if converted is self or not is_absent(self):
            return converted
        return converted.as_subclass(AbsentWeight)


class AbsentWeight(torch.Tensor):
    """NaN in place of a weight: refuses by name what would need or change the weight."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):  # a property
            name = func.__self__.__name__
        if changes_its_tensor(name) or name.startswith(("linalg_", "svd", "qr")):
            raise frozen("weights")
        with torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **(kwargs or {}))
        return made.as_subclass(AbsentWeight) if name in STILL_ABSENT else made


# What gives an absent weight in another form.
STILL_ABSENT = {"data", "detach", "T", "mT", "t", "transpose", "float", "to", "contiguous"}


CONVERSIONS = {"to", "float", "half", "bfloat16", "double", "cpu", "cuda"}


def find_parameters(
    module: torch.nn.Module, without: Collection[torch.nn.Module] = ()
) -> list[torch.nn.Parameter]:
    """As `module.parameters()`, many times faster; without: modules inside that are left out."""
    found: dict[int, torch.nn.Parameter] = {}
    modules, left = {module}, [module]
    while left:
        one = left.pop()
        for parameter in one._parameters.values():
            if parameter is not None:
                found[id(parameter)] = parameter
        for part in one._modules.values():
            if part is not None and part not in modules and part not in without:
                modules.add(part)
                left.append(part)
    return list(found.values())


def same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same values in the same place."""
    with torch._C.DisableTorchFunctionSubclass():
        places = [x.untyped_storage().data_ptr() for x in (one, other)]
        return places[0] == places[1] and one.dtype == other.dtype


def changes_its_tensor(name: str) -> bool:
    """Whether a function of tensors writes into its first argument."""
    single = name.endswith("_") and not name.endswith("__")
    return single or name == "__setitem__" or name[:3] == "__i" and name != "__invert__"


def is_absent(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a placeholder: fewer bytes than it shows."""
    return tensor.untyped_storage().nbytes() < tensor.nbytes
