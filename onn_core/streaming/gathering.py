"""When the GPUs of a host exchange parts of the weights instead of each copying all of them.

It is chosen with ONN_GATHER=1, for a run of `train`, since it has a price: where a process stops or
is killed within a step, the others wait for its part until NCCL ends them, and only the last
checkpoint may be left. On two GPUs it was exact at full size: see results/README.md.
"""

import contextlib
import dataclasses
import json
import math
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import distributed as dist

from onn_core.errors import OnnError
from onn_core.memory.costs import Costs, measure_costs
from onn_core.memory.plan import bytes_read
from onn_core.processes import Processes, chooses_gather
from onn_core.weights.gather import NOT_EXCHANGED, Gather

# Of the step before: an exchange pays where the copy of all weights would take longer than this.
COPIED_SHARE = 0.6


class Gathering:
    """The steps of a model, each of whose processes has its own part of the batch.

    From here on all plan by the costs that the first process measured, so that their plans agree.
    """

    def __init__(self, base: Any, processes: Processes):
        self._base, self._processes = base, processes
        self._gather: Gather | None = None
        self.in_step = False  # whether parts were exchanged in the latest step
        if chooses_gather() and processes.gather_group is None and processes.is_first:
            warnings.warn(
                "ONN_GATHER=1 does nothing here: it takes a process for each of several GPUs of "
                "one host, which reach each other's memory.",
                stacklevel=2,
            )
        if processes.gather_group is not None:
            costs = dataclasses.asdict(measure_costs(base.device, base.dtype))
            measured = processes.share(lambda: json.dumps(costs).encode())
            self._costs = Costs(**json.loads(measured))
            planner = base.streaming.planner
            planner.sizes = dataclasses.replace(planner.sizes, step_s=self._costs.step_s)

    @contextlib.contextmanager
    def step(self, shapes: Sequence[tuple[int, int, int]], before_s: float) -> Iterator[None]:
        """Inside, each process copies a part of each weight, and all parts are gathered.

        Only if all processes will fetch the same and each would gain by it. All enter it, around
        the passes of a step. shapes: rows, tokens of a row, and counted tokens, of each of its
        batches. before_s: seconds of the step before. OnnError if an exchange fails.
        """
        group = self._processes.gather_group
        if group is not None:
            alike = self._fetches(shapes, before_s)
            heard = set(self._processes.meet(alike))  # all meet, also those that will not gain
            self.in_step = heard == {alike} and alike != ""
        if not self.in_step:
            yield
            return
        stream = self._base.streaming.stream
        self._gather = self._gather or Gather(stream.copy_stream, group)
        stream.gather = self._gather
        try:
            yield
            self._processes.meet()  # who has stopped is heard of first
            self._gather.require_same()
        except dist.DistError as error:  # the group ended: one of them did not come in time
            raise OnnError(NOT_EXCHANGED) from error
        finally:
            stream.gather = None

    def _fetches(self, shapes: Sequence[tuple[int, int, int]], before_s: float) -> str:
        """What decides which weights are fetched in a step; "" where an exchange does not pay."""
        plan, streaming = self._base.plan, self._base.streaming
        lowest = streaming.passes.latest.lowest  # None after an evaluation, whose visits differ
        if streaming.member is not None or plan.by_matrix or lowest is None:
            return ""
        if streaming.planner.budget is None and len(streaming.head_units) > 1:
            return ""
        copied = bytes_read(streaming.planner.sizes, plan, lowest)
        if copied < COPIED_SHARE * before_s * self._costs.copy_bytes_per_s:
            return ""
        state = streaming.stream.state()
        # The head is fetched once for each round of counted tokens.
        at_once = plan.head.n_tokens if plan.head and plan.head.n_rounds > 1 else math.inf
        visits = [(*size, math.ceil(n_counted / at_once)) for *size, n_counted in shapes]
        said = [lowest, visits, plan.n_resident, plan.n_reserved, streaming.captures.state]
        return state and f"{state} {zlib.crc32(repr(said).encode()):x}"
