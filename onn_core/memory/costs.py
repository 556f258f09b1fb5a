"""How long a step takes under a plan: what decides between the plans that fit a device."""

import dataclasses
import functools
import time

import torch

from onn_core.memory.plan import Plan, Sizes, bytes_read
from onn_core.ops.lora import SPLIT_TOKENS
from onn_core.weights.slots import count_dense, slots_bytes

# What the host does for an adapted layer and a micro-batch, in launches of a small kernel: on one
# machine 15.7 ms forward and backward, recompute included, at 8.4 us a launch.
FORWARD_LAUNCHES = 550
BACKWARD_LAUNCHES = 1300
SPLIT_LAUNCHES = 1.5  # times as many, where LoRA multiplies in parts
# Both as measured on an H100 with Llama-3-8B's layers, 512 to 8,192 tokens in a micro-batch: of one
# that runs at half the speed of a large one, adapters included, and the share of a layer's time
# that its matmul would take alone; attention, norms and adapters take the rest.
HALF_SPEED_TOKENS = 400
MATMUL_SHARE = 0.56
# A graph of them that was captured: its kernels are this many times as fast to begin, and once a
# visit Python takes a few launches, and what is not packed is copied on the device.
CAPTURED_SPEED_UP = 6
CAPTURED_LAUNCHES = 60
DEVICE_COPY_BYTES_PER_S = 1.5e12
# Of the shorter of copy and compute: they overlap, but not wholly. Boundary activations that come
# from the host share the bus with the weights, and either may wait for the other.
NOT_OVERLAPPED = {"memory": 0.1, "host": 0.2}
# In addition, where the slots hold one layer only: a copy waits until this layer drops weights. A
# step of Llama-3-8B in 4 GB took 4 % longer. Captured visits drop all of them at their beginning.
NOT_PREFETCHED = 0.15
MEASURED_TOKENS = 4096
MEASURED_WIDTH = 4096
COPIED_BYTES = 64 << 20
N_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a device does in a second. The defaults are those of a large GPU, for predictions."""

    copy_bytes_per_s: float = 50e9  # from pinned host memory
    flops_per_s: float = 500e12  # of matmul
    launch_s: float = 10e-6  # of a small kernel
    dense_bytes_per_s: float = 1e12  # of packed weights, made dense

    def step_s(self, sizes: Sizes, plan: Plan, batch_size: int, n_tokens: int) -> float:
        """Seconds of a training step on (batch_size, n_tokens) under `plan`."""
        n_layers, n_back = len(sizes.layers), sizes.n_back
        micro_tokens = plan.micro_batch_size * n_tokens
        matmul_s = 2 * sizes.layer_parameters * (micro_tokens + HALF_SPEED_TOKENS)
        matmul_s /= MATMUL_SHARE * self.flops_per_s
        launch_s = self.launch_s * (SPLIT_LAUNCHES if micro_tokens >= SPLIT_TOKENS else 1)
        launch_s /= CAPTURED_SPEED_UP if plan.captured else 1
        forward_s = max(FORWARD_LAUNCHES * launch_s, matmul_s)
        backward_s = max(BACKWARD_LAUNCHES * launch_s, 2 * matmul_s)  # recompute and dL/dh
        compute_s = n_layers * forward_s + n_back * backward_s - plan.n_reserved * forward_s
        compute_s *= plan.n_micro_batches
        compute_s += self._dense_s(sizes, plan)
        if plan.captured:
            layer_bytes = sum(w.dense_bytes for w in sizes.layers[0] if not w.packed)
            visit_s = CAPTURED_LAUNCHES * self.launch_s + layer_bytes / DEVICE_COPY_BYTES_PER_S
            compute_s += (n_layers + n_back) * visit_s
        copied = bytes_read(sizes, plan, n_layers - n_back)
        if plan.boundaries == "host":
            copied += n_back * batch_size * n_tokens * sizes.hidden_bytes
        copy_s = copied / self.copy_bytes_per_s
        # Matrix by matrix a slot is filled when the matrix before is done.
        not_overlapped = 1 if plan.by_matrix else NOT_OVERLAPPED[plan.boundaries]
        if not (plan.by_matrix or plan.captured):
            not_overlapped += NOT_PREFETCHED * (1 - _prefetched(sizes, plan))
        return max(copy_s, compute_s) + not_overlapped * min(copy_s, compute_s)

    def _dense_s(self, sizes: Sizes, plan: Plan) -> float:
        """Packed weights: once a visit if the scratch holds a layer, else at every use."""
        layer = sum(weight.dense_bytes for weight in sizes.layers[0] if weight.packed)
        n_times = len(sizes.layers) + sizes.n_back
        if not plan.captured and plan.dense != count_dense(sizes.layers, whole_unit=True):
            n_times = (len(sizes.layers) + 2 * sizes.n_back) * plan.n_micro_batches
        return n_times * layer / self.dense_bytes_per_s


def _prefetched(sizes: Sizes, plan: Plan) -> float:
    """The part of what would be fetched ahead of a layer for which the plan has slots."""
    if not sizes.slots_ahead:
        return 1.0
    missing = sizes.resident_slots[0] - plan.slots
    return 1 - slots_bytes(missing) / slots_bytes(sizes.slots_ahead)


@functools.cache
def measure_costs(device: torch.device, dtype: torch.dtype) -> Costs:
    """The costs of a CUDA device: a copy, a matmul and small kernels, of a few ms each."""
    host = torch.empty(COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    other = torch.empty_like(there)
    a = torch.ones(MEASURED_TOKENS, MEASURED_WIDTH, dtype=dtype, device=device)
    b = torch.ones(MEASURED_WIDTH, MEASURED_WIDTH, dtype=dtype, device=device)
    small = torch.ones(1, device=device)

    def seconds(run, n_times: int) -> float:
        """The least of a few rounds: what else the host does in one only adds to it."""
        run()
        rounds = []
        for _ in range(N_ROUNDS):
            torch.cuda.synchronize(device)
            started = time.perf_counter()
            for _ in range(n_times):
                run()
            torch.cuda.synchronize(device)
            rounds.append((time.perf_counter() - started) / n_times)
        return min(rounds)

    return Costs(
        copy_bytes_per_s=COPIED_BYTES / seconds(lambda: there.copy_(host, non_blocking=True), 3),
        flops_per_s=2 * MEASURED_TOKENS * MEASURED_WIDTH**2 / seconds(lambda: a @ b, 5),
        launch_s=seconds(lambda: small.add_(1), 100),
        dense_bytes_per_s=COPIED_BYTES / seconds(lambda: there.copy_(other), 10),
    )
