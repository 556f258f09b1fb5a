"""What a memory budget holds, and the least time that a step can take."""

from collections import Counter
from collections.abc import Sequence

from onn_core.errors import ConfigError
from onn_core.items import Item, count_slots
from onn_core.meter import Ceilings


def activation_bytes(memory_budget: int) -> int:
    """The part of a budget that is left to activations: a quarter, 1 GiB at most."""
    return min(memory_budget // 4, 1 << 30)


def plan_slots(
    units: Sequence[Sequence[Item]],
    head_units: Sequence[Sequence[Item]],
    chunk_size: int,
    memory_budget: int | None,
    held_bytes: int,
) -> Counter:
    """Slots by size for the layers' and the head's weights.

    Without a budget: `chunk_size` layers and the look-ahead. With one: as many layers as it holds,
    and the whole head once all layers fit. ConfigError, with the arithmetic, if not even the
    chunk fits.
    """
    head = count_slots(head_units, 1)
    if memory_budget is None:
        return count_slots(units, chunk_size) + head
    room = memory_budget - activation_bytes(memory_budget) - held_bytes
    everything = count_slots(units, len(units)) + count_slots(head_units, len(head_units) or 1)
    if slots_bytes(everything) <= room:
        return everything
    for n_resident in range(len(units), chunk_size - 1, -1):
        slots = count_slots(units, n_resident) + head
        if slots_bytes(slots) <= room:
            return slots
    raise ConfigError(
        f"memory_budget of {memory_budget / 2**30:.3f} GiB is too small: "
        f"{activation_bytes(memory_budget) / 2**30:.2f} for activations + {held_bytes / 2**30:.2f} "
        f"for what always stays + {slots_bytes(slots) / 2**30:.2f} for {chunk_size} layers, the "
        "look-ahead and the head's blocks: raise it, or lower chunk_size."
    )


def slots_bytes(slots: Counter) -> int:
    """Memory of all slots."""
    return sum(size * count for size, count in slots.items())


def limit_s(bytes_read: int, flops: float, n_tokens: int, ceilings: Ceilings) -> float:
    """The least time of a step: its reads or its matrix products, whichever takes longer.

    flops: 6 P n for P streamed parameters that are passed forward, again, and back by n tokens.
    """
    read_s = bytes_read / ceilings.read_bytes_per_s
    return max(read_s, flops / ceilings.flops_per_s[n_tokens])
