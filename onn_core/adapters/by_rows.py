"""Which adapter the rows of a batch meet: several, or none, in one visit of each layer.

A batch holds its rows once for each choice of adapters, one choice after another. A layer that is
resident runs each group of rows with its own choice, in micro-batches of its own, so the numbers
are those of separate passes over the weights for the reading of one.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils import _pytree as pytree

from onn_core.streaming.call import is_cache
from onn_core.streaming.model import StreamedModel

Choice = str | bool  # an adapter by its name; True: as the layers are; False: none


def find_tuners(module: nn.Module) -> list[BaseTunerLayer | AuxiliaryTrainingWrapper]:
    """What an adapter put into `module`: its layers, and copies of modules that are trained."""
    kinds = BaseTunerLayer | AuxiliaryTrainingWrapper
    return [part for part in module.modules() if isinstance(part, kinds)]


def repeated(
    batch: dict[str, torch.Tensor], n_ways: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """A batch (B, T) that holds its rows `n_ways` times: (n_ways * B, T)."""
    return {name: values.repeat(n_ways, 1).to(device) for name, values in batch.items()}


@contextlib.contextmanager
def by_rows(
    base: StreamedModel, n_rows: int, choices: Sequence[Choice], n_graded: int | None = None
) -> Iterator[None]:
    """Inside, layers run `n_rows` rows of a batch with each of `choices`, one after another.

    n_graded: rows from there on have no gradient and are not recomputed; None grades all.
    """
    twins: dict[Any, list[Any]] = {}  # cache -> that of each choice
    tuners: dict[nn.Module, list[Any]] = {}

    @contextlib.contextmanager
    def chosen(layer: nn.Module, rows: slice, args: tuple, kwargs: dict) -> Iterator[Any]:
        number = rows.start // n_rows
        for cache in filter(is_cache, pytree.tree_leaves((args, kwargs), is_leaf=is_cache)):
            if cache not in twins:  # it is still empty
                twins[cache] = [cache, *(copy.deepcopy(cache) for _ in choices[1:])]
        args, kwargs = pytree.tree_map(
            lambda x: twins[x][number] if is_cache(x) else x, (args, kwargs), is_leaf=is_cache
        )
        if choices[number] is True:
            yield args, kwargs
            return
        if layer not in tuners:
            tuners[layer] = find_tuners(layer)
        with _switched(tuners[layer], choices[number]):
            yield args, kwargs

    with base.rows_hook(chosen, group_size=n_rows, n_graded=n_graded):
        yield


@contextlib.contextmanager
def _switched(tuners: Sequence[Any], choice: Choice) -> Iterator[None]:
    """Inside, the adapters of a layer are off, or one of them is on; after, all is as it was."""
    active = [(tuner, tuner.active_adapters) for tuner in tuners if not tuner.disable_adapters]
    trained = [(p, p.requires_grad) for tuner, _ in active for p in tuner.parameters()]
    for tuner, _ in active:
        if choice is False:
            tuner.enable_adapters(False)
        else:
            tuner.set_adapter(choice)
    try:
        yield
    finally:
        for tuner, names in active:
            if choice is False:
                tuner.enable_adapters(True)
            else:
                tuner.set_adapter(names)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
