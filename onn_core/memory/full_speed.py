"""From how many tokens on a micro-batch runs at full speed on this machine's processor."""

import contextlib
import hashlib
import json
import os
import time
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from onn_core.errors import OnnError
from onn_core.memory.footprint import one_layer
from onn_core.memory.plan import FULL_SPEED_TOKENS
from onn_core.ops.matmul import prepare_linear
from onn_core.record import cache_dir, describe_environment, read_json, write_json
from onn_core.weights.reader import give_back_memory

MEASURED_TOKENS = (64, 256, 512, 1024, 2048)  # of micro-batches, in samples of the first
WARM_UP_TOKENS = 16
LIMIT_S = 2.0  # a size that would take longer is not tried, nor any above
AT_FULL_SPEED = 1.03  # the time of a token, against the least
ROOM = 0.8  # of a budget, for the layer with its activations


def full_speed_tokens(
    config: Any, dtype: torch.dtype, stored: torch.dtype, visit_bytes: Any, budget: int
) -> int:
    """The fewest tokens whose time a token is nearly the least, in one layer of the model.

    The first layer of `config`, with LoRA, is run forward, again, and backward,
    as in a step. stored: the dtype of its matrices on disk. visit_bytes: see `footprint`; what has
    no room in `budget` is not tried. What was found is remembered for the processor, its threads,
    the versions and the layer, so that a run is planned as the last one was.
    """
    environment = describe_environment()
    told = [config.to_json_string(), str(dtype), str(stored), budget.bit_length()]
    told += [environment[key] for key in ("processor", "cores", "threads", "versions")]
    name = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
    path = cache_dir() / "full_speed" / f"{name}.json"
    if path.is_file():
        with contextlib.suppress(OnnError):  # else it is measured again
            return read_json(path, lambda found: int(found["tokens"]), "a speed", "delete it")
    seconds = _measure(config, dtype, stored, visit_bytes, budget)  # of a token
    found = FULL_SPEED_TOKENS
    if seconds:
        least = min(seconds.values())
        found = min(n for n, one in seconds.items() if one <= AT_FULL_SPEED * least)
    with contextlib.suppress(OSError):
        os.makedirs(path.parent, exist_ok=True)
        write_json(path, {"schema_version": 1, "tokens": found, "seconds_a_token": seconds})
    return found


def _measure(
    config: Any, dtype: torch.dtype, stored: torch.dtype, visit_bytes: Any, budget: int
) -> dict[int, float]:
    """Tokens of a micro-batch -> seconds a token; empty if the layer cannot run alone."""
    seconds: dict[int, float] = {}
    try:
        base = one_layer(config, dtype, init_empty_weights(include_buffers=False))
        room = ROOM * budget - _fill(base, stored)
        length, known_s = MEASURED_TOKENS[0], 0.0
        for n_tokens in MEASURED_TOKENS:
            if visit_bytes(n_tokens // length, length)[1] > room:
                break
            if not seconds:
                _materialise(base)
                warm = [_run(base, dtype, WARM_UP_TOKENS, WARM_UP_TOKENS) for _ in range(2)]
                known_s = 4 * min(warm)
            if known_s > LIMIT_S:
                break
            runs = [_run(base, dtype, n_tokens, length) for _ in range(2)]
            known_s = 2 * sum(runs)  # the next size takes longer still
            seconds[n_tokens] = min(runs) / n_tokens
    except Exception:  # a layer that asks for more than its input
        pass
    give_back_memory()
    return seconds


def _fill(base: nn.Module, stored: torch.dtype) -> int:
    """Let the matrices be as they are stored, like those that are streamed; bytes of the layer."""
    embedding, n_bytes = base.get_input_embeddings(), 0
    for module in base.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or module is embedding:
                continue
            if name == "weight" and not parameter.requires_grad and parameter.ndim > 1:
                kind = prepare_linear(module, stored, parameter.dtype, torch.device("cpu"))
                parameter.data = parameter.data.to(kind)
            n_bytes += parameter.nbytes
    return n_bytes


def _materialise(base: nn.Module) -> None:
    """Give every parameter but the embedding a value; the time does not depend on which."""
    embedding = base.get_input_embeddings()
    for module in base.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and module is not embedding:
                values = torch.full(parameter.shape, 1e-3, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(values, parameter.requires_grad)


def _run(base: nn.Module, dtype: torch.dtype, n_tokens: int, length: int) -> float:
    """Seconds of a forward without a graph, one with, and its backward."""
    width = base.get_input_embeddings().embedding_dim
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n_tokens // length, length, width, generator=generator).to(dtype)
    hidden.requires_grad_()
    trained = [p for p in base.parameters() if p.requires_grad]
    given = {"inputs_embeds": hidden, "use_cache": False}  # (B, T, C)
    started = time.perf_counter()
    with torch.no_grad():
        base(**given)
    out = base(**given)[0]
    torch.autograd.grad(out, [hidden, *trained], torch.ones_like(out), allow_unused=True)
    return time.perf_counter() - started
