"""What several GPUs and hosts give, on paper: a step's limits by copy, exchange and compute."""

import dataclasses
from typing import Any

from onn_core.run import estimate


@dataclasses.dataclass(frozen=True)
class Host:
    """The ceilings of a host with several GPUs, each measured on its own.

    flops_per_s: of one GPU. copy_bytes_per_s: from host memory to one GPU while all copy.
    exchange_bytes_per_s: at which a weight arrives whole when each GPU brings a part; 0 where they
    have no links, so that each copies all. network_bytes_per_s: of a host, to others.
    """

    flops_per_s: float
    copy_bytes_per_s: float
    exchange_bytes_per_s: float = 0.0
    network_bytes_per_s: float = 0.0

    def fetch_bytes_per_s(self, n_gpus: int) -> float:
        """At which weights arrive at every GPU of the host."""
        together = min(n_gpus * self.copy_bytes_per_s, self.exchange_bytes_per_s)
        return max(self.copy_bytes_per_s, together if n_gpus > 1 else 0.0)


def predict(
    geometry: estimate.Geometry,
    batch_size: int,
    n_tokens: int,
    host: Host,
    *,
    n_gpus: int = 1,
    n_hosts: int = 1,
    memory_budget: int | str | None = None,
) -> dict[str, Any]:
    """A step on a batch of all GPUs, whose weights are in the host memory of every host.

    memory_budget: of one GPU. `fetch_s`, `compute_s` and `gradients_s`, the exchange between
    hosts, are the parts; `limited_by` the largest. What does not fit has "refused".
    """
    n_all = n_gpus * n_hosts
    found = estimate.predict(
        geometry,
        -(-batch_size // n_all),
        n_tokens,
        read_bytes_per_s=host.fetch_bytes_per_s(n_gpus),
        flops_per_s=host.flops_per_s,
        memory_budget=memory_budget,
    )
    if "refused" in found:
        return found
    gradients_s = 0.0
    if n_hosts > 1:  # each sends and receives the sum in float32 once
        gradients_s = 2 * 4 * found["trainable"] / host.network_bytes_per_s
    parts = {"fetch": found["read_s"], "compute": found["compute_s"], "gradients": gradients_s}
    return {
        "gpus": n_all,
        "step_s": found["step_s"] + gradients_s,
        **{f"{name}_s": seconds for name, seconds in parts.items()},
        "limited_by": max(parts, key=parts.get),
        "tokens_s": batch_size * n_tokens / (found["step_s"] + gradients_s),
    }
