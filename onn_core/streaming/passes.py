"""A forward pass of the model and its backward: what belongs to both and ends with them."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

# Called around each micro-batch in a layer with (layer, rows, args, kwargs); it yields the args and
# kwargs that the layer is given.
RowHook = Callable[[nn.Module, slice, tuple, dict], AbstractContextManager[tuple[tuple, dict]]]


@dataclasses.dataclass(eq=False)
class Pass:
    """One forward pass and its backward.

    owner: the module that began it, None for the model itself; a trainer may call its base alone.
    run, args, kwargs: the call, for a probe of it; gone when the forward pass has ended.
    lowest: the lowest layer that backward reaches; None without gradients.
    """

    owner: nn.Module | None = None
    run: Callable | None = None
    args: tuple = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    lowest: int | None = None
    batch_size: int | None = None
    n_tokens: int | None = None  # of a sample
    defers_logits: bool = False  # they wait until they are used: a loss never needs all at once
    calls: Iterator[int] = dataclasses.field(default_factory=itertools.count)  # of layers


class Passes:
    """The pass that runs or ran last, and how the rows of the passes from here on are run.

    latest: that pass; its backward may be to come. running: the same until its forward pass ends.
    row_hook: around each micro-batch in a layer. group_size: samples; no micro-batch and no cache
    crosses a multiple of it. None is the whole batch. n_graded: a number of groups' samples; those
    from there on have no gradient. None grades all.
    """

    def __init__(self) -> None:
        self.latest = Pass()
        self.row_hook: RowHook | None = None
        self.group_size: int | None = None
        self.n_graded: int | None = None

    @property
    def running(self) -> Pass | None:
        return None if self.latest.run is None else self.latest

    def end(self, owner: nn.Module | None) -> None:
        """The forward pass that `owner` began has ended; its backward has what it needs."""
        if self.running is not None and owner is self.latest.owner:
            self.latest.run, self.latest.args, self.latest.kwargs = None, (), {}


def random_state(device: torch.device) -> Any:
    """The state of the generators that layers draw from, on the host and on the device."""
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_device


def set_random_state(state: Any, device: torch.device) -> None:
    """Draw from here on what was drawn after `random_state` gave `state`."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
