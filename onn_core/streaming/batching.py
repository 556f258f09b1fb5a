"""Which axis of a layer's argument is the batch: asked of the model, not guessed from shapes.

The model's own forward pass is run up to a layer with one sample more and with layers that do
nothing; what grows is cut into micro-batches, what does not grow is passed whole. So nothing is cut
that only looks like a batch (as many tokens as samples), and nothing is missed that holds several
rows a sample (ALiBi) or has the batch elsewhere than in front.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from onn_core.errors import ConfigError
from onn_core.streaming.passes import Pass

CANNOT_CUT = "set micro_batch_size to None: {} cannot be cut into micro-batches ({})."


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor holds its samples: `per_sample` rows each, one after another, on `axis`."""

    axis: int
    per_sample: int

    def cut(self, tensor: torch.Tensor, rows: slice) -> torch.Tensor:
        start, n_rows = rows.start * self.per_sample, (rows.stop - rows.start) * self.per_sample
        return tensor.narrow(self.axis, start, n_rows)

    def holds(self, tensor: torch.Tensor, n_samples: int) -> bool:
        return self.axis < tensor.ndim and tensor.shape[self.axis] == n_samples * self.per_sample


class Reached(Exception):
    """The probe is where it was to go."""


class Batching:
    """Knows of each call of a layer in a pass where its arguments and outputs hold the samples."""

    def __init__(self) -> None:
        self.probing = False
        self._returns: list[tuple[Any, list[Callable]]] = []  # of each call, see `note`
        self._seen: list[list[Any]] = []  # shapes of the leaves of each call, in a probe
        # shapes of a pass's arguments -> shapes of the leaves of each call with one sample more
        self._known: dict[Any, list[list[Any]]] = {}

    def answer(self, leaves: list[Any]) -> Any:
        """What a layer returns in a probe."""
        self._seen.append([x.shape if torch.is_tensor(x) else None for x in leaves])
        if not self._returns:
            raise Reached
        spec, outputs = self._returns[min(len(self._seen), len(self._returns)) - 1]
        return pytree.tree_unflatten([make(leaves) for make in outputs], spec)

    def note(
        self,
        number: int,
        batch_size: int,
        leaves: list[Any],
        outputs: list[Any],
        places: list[Place],
        spec: Any,
    ) -> None:
        """Remember what a call returns; places: of the tensors among the outputs."""
        if number == len(self._returns):
            remaining = iter(places)
            makers = [_maker(x, leaves, remaining, batch_size + 1) for x in outputs]
            self._returns.append((spec, makers))

    def find_places(
        self, in_pass: Pass, number: int, leaves: list[Any], what: str
    ) -> list[Place | None]:
        """Of each leaf of a call: where its samples are, None if it goes whole. ConfigError."""
        if in_pass.run is None or in_pass.batch_size is None:
            raise ConfigError(CANNOT_CUT.format(what, "it was not called by its model"))
        given = pytree.tree_leaves((in_pass.args, in_pass.kwargs))
        key = tuple(getattr(x, "shape", None) for x in given)
        for attempt in range(2):
            known = self._known.get(key, [])
            if attempt or len(known) <= number:
                known = self._known[key] = self._probe(in_pass)
            if len(known) > number:
                grown = known[number]
                size, pairs = in_pass.batch_size, zip(leaves, grown, strict=False)
                places = [_compare(leaf, shape, size) for leaf, shape in pairs]
                if len(leaves) == len(grown) and False not in places:
                    return places
        raise ConfigError(CANNOT_CUT.format(what, "its arguments do not follow the batch"))

    def _probe(self, in_pass: Pass) -> list[list[Any]]:
        """The shapes of the leaves of each call, with one sample more, as far as it gets."""

        def grow(x: Any) -> Any:
            batched = torch.is_tensor(x) and x.shape[:1] == (in_pass.batch_size,)
            return torch.cat([x, x[:1]]) if batched else x

        self.probing, self._seen = True, []
        devices = list(range(torch.cuda.device_count()))
        # An evaluation draws nothing: to set the generator back would undo another run's draws.
        draws = getattr(getattr(in_pass.run, "__self__", None), "training", True)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices, enabled=draws):
                args, kwargs = pytree.tree_map(grow, (in_pass.args, in_pass.kwargs))
                in_pass.run(*args, **kwargs)
        except Exception:
            pass  # it got as far as it could; what it did not see is refused
        finally:
            self.probing = False
        return self._seen


def _compare(leaf: Any, grown: torch.Size | None, batch_size: int) -> Place | None | bool:
    """Where a leaf holds its samples, from its shape with one sample more; False if unclear."""
    if not torch.is_tensor(leaf) or grown is None:
        return None if not torch.is_tensor(leaf) and grown is None else False
    if leaf.ndim != len(grown):
        return False
    axes = [axis for axis in range(leaf.ndim) if leaf.shape[axis] != grown[axis]]
    if not axes:
        return None
    place = Place(axes[0], leaf.shape[axes[0]] // batch_size)
    sizes = (batch_size * place.per_sample, (batch_size + 1) * place.per_sample)
    fits = len(axes) == 1 and (leaf.shape[axes[0]], grown[axes[0]]) == sizes
    return place if fits else False


def _maker(output: Any, leaves: list[Any], places: Iterator[Place], grown: int) -> Callable:
    """What makes the like of an output in a probe, from the leaves that the layer is given."""
    if not torch.is_tensor(output):
        return lambda leaves: output
    place, shape, dtype, device = next(places), list(output.shape), output.dtype, output.device
    for index, leaf in enumerate(leaves):
        if torch.is_tensor(leaf) and (leaf.shape, leaf.dtype) == (output.shape, dtype):
            return lambda leaves: leaves[index]
    shape[place.axis] = grown * place.per_sample
    return lambda leaves: torch.zeros(shape, dtype=dtype, device=device)
