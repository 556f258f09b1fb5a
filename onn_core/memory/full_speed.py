"""From how many tokens on a micro-batch runs at full speed on this machine's processor."""

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
from onn_core.record import cache_dir, describe_environment, read_json, write_json
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
        given = (config, dtype, stored, visit_bytes, budget)
        try:
            folder = cache_dir() / "full_speed"
            folder.mkdir(parents=True, exist_ok=True)
            with alone_in(folder):
                _known[name] = _remember(folder / f"{name}.json", given)
        except (OSError, OnnError):  # no cache to remember it in
            _known.setdefault(name, _choose(_measure(*given) or {}))
    return _known[name]


def _remember(path: Path, given: Any) -> int:
    """What the file says; else what is measured, which it says from then on."""
    try:
        return read_json(path, _tokens, "a measured speed", "delete it")
    except OnnError:
        tried = _measure(*given)
    if tried is not None:
        found = {"schema_version": 1, "tokens": _choose(tried), "seconds_a_token": tried}
        write_json(path, found)
    return _choose(tried or {})


def _tokens(found: dict[str, Any]) -> int:
    if found["tokens"] not in MEASURED_TOKENS:
        raise ValueError(f"{found['tokens']!r} tokens")
    return int(found["tokens"])


def _choose(tried: Tried) -> int:
    """The fewest that are fast enough; what is usual unless more than that was tried."""
    if FULL_SPEED_TOKENS not in tried:
        return FULL_SPEED_TOKENS
    fast_enough_s = AT_FULL_SPEED * min(tried.values())
    return min(n for n, token_s in tried.items() if token_s <= fast_enough_s)


def _measure(*given: Any) -> Tried | None:
    """Seconds a token, as far as time and budget go; None if the layer cannot run by itself."""
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            return _time_layer(*given)
    except Exception:  # a layer that asks for more than its input
        return None
    finally:
        gc.collect()  # what runs in place of a module's forward refers to the module
        give_back_memory()


def _time_layer(
    config: Any,
    dtype: torch.dtype,
    stored: torch.dtype,
    visit_bytes: Callable[[int, int], tuple[int, int, int]],
    budget: int,
) -> Tried:
    tried: Tried = {}
    base = one_layer(config, dtype, init_empty_weights(include_buffers=False))
    parameters = _prepare(base, stored)
    if sum(p.numel() for p in parameters) > MOST_PARAMETERS:
        return tried
    room = ROOM * budget - sum(p.nbytes for p in parameters)
    length, known_s = MEASURED_TOKENS[0], 0.0
    for n_tokens in MEASURED_TOKENS:
        if HEAP_FACTOR * visit_bytes(n_tokens // length, length)[1] > room:
            break
        if not tried:
            _fill(base)
            warm = [_run(base, dtype, WARM_UP_TOKENS, WARM_UP_TOKENS) for _ in range(2)]
            known_s = 4 * min(warm)
        if known_s > LIMIT_S:
            break
        runs = [_run(base, dtype, n_tokens, length) for _ in range(2)]
        known_s = 2 * sum(runs)  # the next size takes longer still
        tried[n_tokens] = min(runs) / n_tokens
    return tried


def _prepare(base: nn.Module, stored: torch.dtype) -> list[nn.Parameter]:
    """Let the matrices be as they are stored, like those that are streamed; all but embeddings."""
    embedding, found = base.get_input_embeddings(), []
    for module in base.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or module is embedding:
                continue
            if name == "weight" and not parameter.requires_grad and parameter.ndim > 1:
                kind = prepare_linear(module, stored, parameter.dtype, torch.device("cpu"))
                parameter.data = parameter.data.to(kind)
            found.append(parameter)
    return found


def _fill(base: nn.Module) -> None:
    """Give every parameter but the embedding values."""
    embedding = base.get_input_embeddings()
    for module in base.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or module is embedding:
                continue
            values = torch.full(parameter.shape, 1e-3, dtype=parameter.dtype)
            if parameter.numel() <= RANDOM_VALUES:
                values.normal_(std=0.02)
            module._parameters[name] = nn.Parameter(values, parameter.requires_grad)


def _run(base: nn.Module, dtype: torch.dtype, n_tokens: int, length: int) -> float:
    """Seconds of a forward without a graph, one with, and its backward."""
    width = base.get_input_embeddings().embedding_dim
    hidden = torch.randn(n_tokens // length, length, width).to(dtype).requires_grad_()  # (B, T, C)
    trained = [p for p in base.parameters() if p.requires_grad]
    given = {"inputs_embeds": hidden, "use_cache": False}
    started = time.perf_counter()
    with torch.no_grad():
        base(**given)
    out = base(**given)[0]
    torch.autograd.grad(out, [hidden, *trained], torch.ones_like(out), allow_unused=True)
    return time.perf_counter() - started
