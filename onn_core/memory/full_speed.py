"""From how many tokens on a micro-batch runs at full speed on this machine's processor."""

import dataclasses
import gc
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from onn_core.errors import OnnError
from onn_core.memory.footprint import one_layer
from onn_core.memory.plan import FULL_SPEED_TOKENS, HEAP_FACTOR
from onn_core.ops.matmul import prepare_linear
from onn_core.processes import alone_in
from onn_core.record import SCHEMA_VERSION, cache_dir, describe_environment, read_json, write_json
from onn_core.weights.reader import give_back_memory

MEASURED_TOKENS = (64, FULL_SPEED_TOKENS, 512, 1024, 2048)  # in samples of the first
WARM_UP_TOKENS = 16
AT_FULL_SPEED = 1.03  # the time of a token, against the least
LIMIT_S = 2.0  # a size that would take longer is not tried, nor any above
MOST_PARAMETERS = 500_000_000  # of a layer that is tried
RANDOM_VALUES = 1 << 20  # of a parameter that gets random values, as routers must have
ROOM = 0.8  # of a budget, for the layer with its activations
LEAST_BUDGET = 256 << 20  # where measuring itself, some 30 MiB, would be a part of it

Tried = dict[int, float]  # tokens of a micro-batch -> seconds a token
_known: dict[str, int] = {}  # what this process has found or read


def full_speed_tokens(
    config: Any,
    dtype: torch.dtype,
    stored: torch.dtype,
    visit_bytes: Callable[[int, int], tuple[int, int, int]],
    budget: int,
) -> int:
    """The fewest tokens whose time a token is nearly the least, in one layer of the model.

    The first layer of `config`, with LoRA, is run forward, again, and backward, as in a step.
    stored: the dtype of its matrices on disk. visit_bytes: see `footprint`; what has no room in
    `budget` is not tried. What was found is remembered in the cache for the processor, its threads,
    the versions and the layer, so that a run is planned as the last one was; one process of a host
    measures for all. A small budget goes by what is usual.
    """
    if budget < LEAST_BUDGET:
        return FULL_SPEED_TOKENS
    environment = describe_environment()
    told = [config.to_json_string(), config._attn_implementation, str(dtype), str(stored)]
    told += [environment[key] for key in ("processor", "cores", "threads", "versions")]
    told.append(budget.bit_length())
    name = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
    if name not in _known:
        layer = _Layer(config, dtype, stored, visit_bytes, budget)
        try:
            folder = cache_dir() / "full_speed"
            folder.mkdir(parents=True, exist_ok=True)
            with alone_in(folder):
                _known[name] = _remember(folder / f"{name}.json", layer)
        except (OSError, OnnError):  # no cache to remember it in
            _known[name] = _choose(layer.measure() or {})
    return _known[name]


def _remember(path: Path, layer: "_Layer") -> int:
    """What the file says; else what is measured, which it says from then on."""

    def known(found: dict[str, Any]) -> int:
        return MEASURED_TOKENS[MEASURED_TOKENS.index(found["tokens"])]

    try:
        return read_json(path, known, "a measured speed", "delete it")
    except OnnError:
        tried = layer.measure()
    if tried is not None:
        found = {
            "schema_version": SCHEMA_VERSION,
            "tokens": _choose(tried),
            "seconds_a_token": tried,
        }
        write_json(path, found)
    return _choose(tried or {})


def _choose(tried: Tried) -> int:
    """The fewest that are fast enough; what is usual unless more than that was tried."""
    if FULL_SPEED_TOKENS not in tried:
        return FULL_SPEED_TOKENS
    fast_enough_s = AT_FULL_SPEED * min(tried.values())
    return min(n for n, token_s in tried.items() if token_s <= fast_enough_s)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """The layer that is measured; see `full_speed_tokens`."""

    config: Any
    dtype: torch.dtype
    stored: torch.dtype
    visit_bytes: Callable[[int, int], tuple[int, int, int]]
    budget: int

    def measure(self) -> Tried | None:
        """Seconds a token, as far as time and budget go; None if it cannot run by itself."""
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                return self._try_sizes()
        except Exception:  # a layer that asks for more than its input
            return None
        finally:
            gc.collect()  # what runs in place of a module's forward refers to the module
            give_back_memory()

    def _try_sizes(self) -> Tried:
        tried: Tried = {}
        base = one_layer(self.config, self.dtype, init_empty_weights(include_buffers=False))
        embedding = base.get_input_embeddings()
        own = [
            (module, name, parameter)
            for module in base.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and module is not embedding
        ]
        if sum(parameter.numel() for *_, parameter in own) > MOST_PARAMETERS:
            return tried
        for module, name, parameter in own:  # as they are when they are streamed
            if name == "weight" and not parameter.requires_grad and parameter.ndim > 1:
                kind = prepare_linear(module, self.stored, parameter.dtype, torch.device("cpu"))
                parameter.data = parameter.data.to(kind)
        room = ROOM * self.budget - sum(parameter.nbytes for *_, parameter in own)
        length, known_s = MEASURED_TOKENS[0], 0.0
        for n_tokens in MEASURED_TOKENS:
            if HEAP_FACTOR * self.visit_bytes(n_tokens // length, length)[1] > room:
                break
            if not tried:
                for module, name, parameter in own:
                    module._parameters[name] = _filled(parameter)
                warm = [self._run(base, WARM_UP_TOKENS, WARM_UP_TOKENS) for _ in range(2)]
                known_s = 4 * min(warm)
            if known_s > LIMIT_S:
                break
            runs = [self._run(base, n_tokens, length) for _ in range(2)]
            known_s = 2 * sum(runs)  # the next size takes longer still
            tried[n_tokens] = min(runs) / n_tokens
        return tried

    def _run(self, base: nn.Module, n_tokens: int, length: int) -> float:
        """Seconds of a forward without a graph, one with, and its backward."""
        shape = (n_tokens // length, length, base.get_input_embeddings().embedding_dim)
        hidden = torch.randn(shape).to(self.dtype).requires_grad_()  # (B, T, C)
        trained = [p for p in base.parameters() if p.requires_grad]
        given = {"inputs_embeds": hidden, "use_cache": False}
        started = time.perf_counter()
        with torch.no_grad():
            base(**given)
        out = base(**given)[0]
        torch.autograd.grad(out, [hidden, *trained], torch.ones_like(out), allow_unused=True)
        return time.perf_counter() - started


def _filled(parameter: nn.Parameter) -> nn.Parameter:
    """The like of a parameter on meta, with values."""
    values = torch.full(parameter.shape, 1e-3, dtype=parameter.dtype)
    if parameter.numel() <= RANDOM_VALUES:
        values.normal_(std=0.02)
    return nn.Parameter(values, parameter.requires_grad)
