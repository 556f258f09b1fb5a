"""What a choice of settings will take, before anything is trained: an estimate at once."""

import dataclasses
import os
import time
from typing import Any

import torch

from onn_core.config import TrainConfig, parse_bytes
from onn_core.lora import linear_names, select_layers
from onn_core.meter import Ceilings, measure_read
from onn_core.model import decoder_layers, from_pretrained
from onn_core.plan import bytes_read, make_plan
from onn_core.product import product

PROBE_TOKENS = 128  # in the matrix products that are timed for the prediction
PROBE_S = 0.7  # time for each of the two measurements
PROBE_SIZE = 4096  # largest side of their matrices


class Outline:
    """The sizes of a model, and what this machine does with them; no weight is read but to time."""

    def __init__(self, model_dir: str | os.PathLike):
        model = from_pretrained(model_dir)
        stream, self.n_layers = model.session.stream, model.session.n_layers
        self.units, self.heads = stream.units[: self.n_layers], stream.units[self.n_layers :]
        self.sizes = model.session.sizes
        layers = decoder_layers(model)
        names = linear_names(layers)
        self.linears = [  # of each layer: (out, in) of what gets an adapter
            [tuple(m.weight.shape) for n, m in layer.named_modules() if n.split(".")[-1] in names]
            for layer in layers
        ]
        self.title = f"{model.config.model_type}, {model.num_parameters():,} parameters"
        shapes = [tuple(min(side, PROBE_SIZE) for side in shape) for shape in self.linears[0]]
        paths = list({entry.path for entry in model.checkpoint.tensors.values()})
        stored, device = self.units[0][0].dtype, model.session.device
        rate = _product_rate(shapes, stored, model.dtype, device)
        read_rate = measure_read(paths, n_readers=2, limit_s=PROBE_S)
        self.ceilings = Ceilings(read_rate, {PROBE_TOKENS: rate})
        model.checkpoint.close()

    def predict(self, config: TrainConfig) -> dict[str, Any]:
        """Trainable parameters, and estimates: bytes of memory, seconds of a step of full samples.

        ConfigError when the layers or the memory budget do not fit the model.
        """
        trained = select_layers(config.sparse_layers, self.n_layers)
        n_trainable = config.lora_rank * sum(
            map(sum, (s for k in trained for s in self.linears[k]))
        )
        budget, n_tokens = parse_bytes(config.memory_budget), config.batch_size * config.max_length
        sizes = dataclasses.replace(self.sizes, n_trained=n_trainable)
        plan = make_plan(
            sizes,
            config.batch_size,
            config.max_length,
            budget,
            config.chunk_size,
            config.micro_batch_size,
        )
        parameters = sum(item.shape[0] * item.shape[1] for item in self.units[0])
        head_parameters = sum(item.shape[0] * item.shape[1] for unit in self.heads for item in unit)
        n_back = self.n_layers - trained[0]  # layers that backward visits
        n_bytes = bytes_read(sizes, plan, trained[0])
        flops = 2 * n_tokens * parameters * (self.n_layers + 2 * n_back)
        flops += 4 * n_tokens * head_parameters
        read_s = n_bytes / self.ceilings.read_bytes_per_s
        step_s = max(read_s, flops / self.ceilings.flops_per_s[PROBE_TOKENS])
        return {
            "trainable": n_trainable,
            "memory_bytes": plan.peak_bytes,
            "step_s": step_s,
            "limited_by": "reading" if read_s >= step_s else "computing",
        }


def _product_rate(
    shapes: list[tuple[int, ...]], stored: torch.dtype, dtype: torch.dtype, device: torch.device
) -> float:
    """FLOP/s of products with matrices (out, in), the best of each, as other work only slows them.

    On a CPU one thread is timed, for all: two that wait for each other on a busy machine tell
    nothing.
    """
    n_threads = torch.get_num_threads() if device.type == "cpu" else 1
    matrices = [torch.randn(shape, device=device).to(stored) for shape in shapes]
    inputs = [torch.randn(PROBE_TOKENS, shape[1], dtype=dtype, device=device) for shape in shapes]
    best_s, until = [float("inf")] * len(shapes), time.perf_counter() + PROBE_S
    if n_threads > 1:
        torch.set_num_threads(1)
    while best_s[-1] == float("inf") or time.perf_counter() < until:
        for number, (values, matrix) in enumerate(zip(inputs, matrices, strict=True)):
            started = time.perf_counter()
            product(values, matrix)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best_s[number] = min(best_s[number], time.perf_counter() - started)
    if n_threads > 1:
        torch.set_num_threads(n_threads)
    return n_threads * 2 * PROBE_TOKENS * sum(out * size for out, size in shapes) / sum(best_s)
