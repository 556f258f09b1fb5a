"""Products of frozen weights that wait to be made, and which of them may be made at once."""

import dataclasses
import time
from collections.abc import Callable

import torch

# Products at once have one of these numbers of rows, with zeros below: few, so that it is soon seen
# for each of them whether it changes a bit.
ROWS_AT_ONCE = (32, 48, 64, 96, 128, 192, 256)
# Elements that must have been equal before a product at once is taken for that of a run alone.
# Another order of sums shows in most float32 numbers, but in few that are rounded to a narrow one.
ENOUGH = {torch.float32: 1 << 10, torch.float64: 1 << 10}
ENOUGH_NARROW = 1 << 22
MOST_SIZES = 64  # of a weight's shape that are tried; where lengths vary each would be a new one


@dataclasses.dataclass(eq=False)
class Product:
    """Rows (..., C) of a member that wait to be multiplied by a frozen weight."""

    multiply: Callable[..., torch.Tensor]
    rows: torch.Tensor
    given: tuple[torch.Tensor | None, ...]  # weight, perhaps bias
    result: torch.Tensor | None = None
    error: Exception | None = None
    seconds: float = 0.0  # that it took, or its part of those that it was made with

    @property
    def n_rows(self) -> int:
        return self.rows.numel() // max(1, self.rows.shape[-1])

    @property
    def waits(self) -> bool:
        return self.result is None and self.error is None

    @property
    def kind(self) -> tuple:
        """Products of one kind may be made at once."""
        weight, has_bias = self.given[0], any(one is not None for one in self.given[1:])
        shape = tuple(weight.shape), weight.dtype, self.rows.dtype, self.rows.shape[-1]
        return weight.data_ptr(), (self.multiply, has_bias, *shape)

    def make(self) -> None:
        """As a run alone does."""
        started = time.perf_counter()
        try:
            self.result = self.multiply(self.rows, *self.given)
        except Exception as error:  # raised in the thread that waits
            self.error = error
        self.seconds += time.perf_counter() - started


class Sameness:
    """Where products at once have the bits of those of each run alone, as far as that was seen.

    The order of a row's sums is a matter of the library's, which chooses it by the sizes.
    """

    def __init__(self) -> None:
        # Shape -> size -> elements that were equal; None where one was not.
        self._equal: dict[tuple, dict[tuple, int | None]] = {}

    def may_be(self, shape: tuple, size: tuple) -> bool:
        """Whether a product at once is the same, or it is worth to look."""
        sizes = self._equal.setdefault(shape, {})
        return sizes.get(size, 0 if len(sizes) < MOST_SIZES else None) is not None

    def is_known(self, shape: tuple, size: tuple, dtype: torch.dtype) -> bool:
        return (self._equal[shape].get(size) or 0) >= ENOUGH.get(dtype, ENOUGH_NARROW)

    def note(self, shape: tuple, size: tuple, alone: torch.Tensor, at_once: torch.Tensor) -> None:
        """Compare both; neither zeros nor a NaN tell anything."""
        n = int(alone.count_nonzero())
        if 8 * n > alone.numel() and alone.isfinite().all():
            before = self._equal[shape].get(size, 0)
            equal = before is not None and torch.equal(alone, at_once)
            self._equal[shape][size] = before + n if equal else None
