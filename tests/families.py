"""Every causal language model family of transformers at toy size: streamed against in memory.

`python tests/families.py [NAME ...]` walks them, each in a process of its own, and prints a table:
equal, refused (by an OnnError), untrainable (in memory, at this size) or WRONG, which none may be.
The toy sizes follow from the names of a configuration's settings; no family has a rule of its own.
"""

import argparse
import collections
import contextlib
import dataclasses
import inspect
import logging
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import peft
import torch
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from toy import (
    N_LAYERS,
    VOCABULARY,
    difference,
    in_memory,
    reserving_graphs,
    streamed,
    toy_batch,
)
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

import onn_core.streaming.head
from onn_core import OnnError
from onn_core.streaming.call import Call

TIMEOUT_S = 240
MEMORY_BYTES = 8 << 30
HEADS, WIDTH = 4, 32
# Setting -> toy value, wherever a configuration has it.
RULES = {
    "vocab_size n_vocab": VOCABULARY,
    "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim n_embed "
    "decoder_hidden_size emb_dim hidden_dim model_dim lru_width attention_hidden_size": WIDTH,
    "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
    "num_decoder_layers num_blocks": N_LAYERS,
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
    "encoder_attention_heads attention_heads mamba_n_heads linear_num_heads": HEADS,
    "num_key_value_heads num_kv_heads n_kv_heads num_experts_per_tok num_experts_per_token "
    "moe_topk moe_k top_k_experts num_experts_per_topk n_groups mamba_n_groups": 2,
    "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim "
    "max_position_embeddings n_positions n_ctx max_seq_len shared_expert_intermediate_size "
    "mlp_hidden_size max_sequence_length": 64,
    "head_dim attention_head_size qk_rope_head_dim qk_nope_head_dim rotary_dim v_head_dim d_kv "
    "kv_channels mamba_d_head linear_key_head_dim linear_value_head_dim mamba_d_state state_size "
    "d_state linear_head_dim": 8,
    "moe_intermediate_size expert_dim expert_intermediate_size kv_lora_rank q_lora_rank": 16,
    "num_experts num_local_experts n_routed_experts moe_num_experts sliding_window "
    "attention_window linear_num_key_heads linear_num_value_heads": 4,
    "n_shared_experts num_shared_experts": 1,
    "initializer_range init_std": 0.2,
    "pad_token_id": 0,
}
RULES = {name: value for names, value in RULES.items() for name in names.split()}


@dataclasses.dataclass
class Outcome:
    family: str
    what: str  # equal, refused, untrainable or WRONG
    why: str = ""
    seconds: float = 0.0


# The first of these that trains in memory is used: what replaces the rules, and whether settings
# that are None by default are set too.
VARIANTS = [
    ({}, False),
    ({}, True),
    (dict.fromkeys((n for n, v in RULES.items() if v == HEADS), 2 * HEADS), False),
    ({"num_key_value_heads": HEADS}, False),
    ({"head_dim": None, "num_key_value_heads": HEADS}, False),
    ({"num_key_value_heads": HEADS, "n_group": 2, "topk_group": 1}, True),
    ({"mamba_expand": 1, "mamba_d_ssm": WIDTH, "use_cache": False}, False),
    (dict.fromkeys(n for n, v in RULES.items() if v == N_LAYERS), False),  # as deep as they come
]


def small(config: PreTrainedConfig, variant: tuple[dict[str, Any], bool]) -> dict[str, Any]:
    """The settings of `config` that are to be smaller, its parts included."""
    rules, also_none = RULES | variant[0], variant[1]
    settings: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            settings[name] = small(value, variant)
        elif rules.get(name) is not None and (value is not None or also_none):
            settings[name] = rules[name]
        elif "drop" in name and isinstance(value, float):
            settings[name] = 0.0
        elif name in ("bos_token_id", "eos_token_id") and isinstance(value, int):
            settings[name] = 1
    return settings


def make(family: str, folder: Path, variant: tuple[dict[str, Any], bool] = VARIANTS[0]) -> None:
    """Save a random toy model of `family`."""
    config_class = CONFIG_MAPPING[family]
    config = config_class(**small(config_class(), variant))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            elif parameter.is_floating_point() and not parameter.any():
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)


def with_lora(load: Callable[[], PreTrainedModel]) -> peft.PeftModel:
    """Adapters on every plain linear module but the head; where PEFT refuses some, without them."""
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    for without in (".", "out_proj", None):  # out_proj: of state-space layers
        model = load()
        plain = [n for n, part in model.named_modules() if type(part) in (torch.nn.Linear, Conv1D)]
        plain = [n for n in plain if model.get_submodule(n) is not model.get_output_embeddings()]
        targets = [n for n in plain if not n.endswith(without)] if without else "all-linear"
        torch.manual_seed(1)
        try:
            return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **settings))
        except ValueError as error:
            error_of_all = error
    raise error_of_all


def results(
    load: Callable[..., PreTrainedModel], folder: Path, seed: int = 2, **settings: Any
) -> dict[str, torch.Tensor]:
    """The losses and every gradient of one training step and one evaluation."""
    batch = toy_batch()
    model = with_lora(lambda: load(folder, **settings)).train()
    torch.manual_seed(seed)
    loss = model(**batch).loss
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.eval()
    takes = inspect.signature(model.get_base_model().forward).parameters
    no_cache = {"use_cache": False} if "use_cache" in takes else {}
    with torch.no_grad():
        logits = model(**batch | {"labels": None}, **no_cache).logits
    return found | {"loss": loss.detach(), "logits": logits.detach()}


def reserving(folder: Path, n_reserved: int, **settings: Any) -> PreTrainedModel:
    return reserving_graphs(streamed(folder, **settings), n_reserved)


def furthest(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest relative difference and whose it is; infinite if one has what the other lacks."""
    zero = torch.zeros(1)
    found = [(0.0, "")]
    for name in got.keys() | want.keys():
        here, there = got.get(name, zero), want.get(name, zero)
        if there.any():
            same = here.shape == there.shape
            found.append((difference(here, there) if same else torch.inf, name))
        elif here.any():
            found.append((torch.inf, name))
    return max(found)


# chunk_size, micro_batch_size, layers whose graphs are reserved, bytes of a block of the head.
RUNS = [
    (1, None, 0, 1 << 30),
    (1, None, N_LAYERS, 1 << 30),
    (2, 2, 0, 1 << 30),
    (4, 3, 2, 10 * WIDTH * 4),
]
# Micro-batches and blocks sum the same terms in another order; where float32 goes further than
# this, float64 decides.
TOLERANCE, TOLERANCE_FLOAT64 = 5e-6, 1e-10


def check(family: str) -> Outcome:
    folder = Path(tempfile.mkdtemp(prefix="onn-family-"))
    try:
        return _check(family, folder / family)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check(family: str, folder: Path) -> Outcome:
    failures: list[str] = []
    for variant in VARIANTS:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            make(family, folder, variant)
            want = results(in_memory, folder)
        except Exception as error:
            failures.append(reason(error))
            continue
        if all(tensor.isfinite().all() for tensor in want.values()):
            break
        failures.append("gradients are not finite")
    else:
        return Outcome(family, "untrainable", " | ".join(dict.fromkeys(failures)))
    if len(want) < 6 or not all(tensor.any() for tensor in (want["loss"], want["logits"])):
        return Outcome(family, "untrainable", "hardly any gradient")
    # What draws random numbers in training draws others in micro-batches: the evaluation counts.
    draws = furthest(results(in_memory, folder, seed=3), want)[0] > TOLERANCE
    exact = None
    name, how, worst, worst_float64 = "", "", 0.0, 0.0
    for chunk_size, micro, n_reserved, block in RUNS:
        onn_core.streaming.head.HEAD_BLOCK_BYTES = block
        settings = {"chunk_size": chunk_size, "micro_batch_size": micro}
        how = f"micro_batch_size {micro}, {n_reserved} graphs reserved: "
        try:
            got = results(reserving, folder, n_reserved=n_reserved, **settings)
            if draws and micro:
                off, name = furthest({"logits": got["logits"]}, {"logits": want["logits"]})
            else:
                off, name = furthest(got, want)
            worst = max(off, worst)
            if off > TOLERANCE:
                how += f"{off:.0e} in float32, "
                if exact is None:
                    with doubles():
                        exact = results(in_memory, folder, dtype=torch.float64)
                with doubles():
                    got = results(
                        reserving, folder, n_reserved=n_reserved, dtype="float64", **settings
                    )
                off, name = furthest(got, exact)
                worst_float64 = max(off, worst_float64)
                if not off <= TOLERANCE_FLOAT64:
                    return Outcome(family, "WRONG", f"{how}{name} differs by {off:.1e} in float64")
        except OnnError as error:
            return Outcome(family, "refused", f"{how}{error}")
        except Exception as error:
            return Outcome(family, "WRONG", f"{how}{reason(error)}")
    in_float64 = f", {worst_float64:.0e} in float64" if exact else ""
    return Outcome(family, "equal", f"{worst:.0e}{in_float64}")


class Doubles(TorchFunctionMode):
    """Code that asks for float32 whatever it is given gets float64; bytes are read as they are."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function not in (torch.frombuffer, torch.Tensor.view):
            wider = {torch.float32: torch.float64}
            args, kwargs = tree_map_only(torch.dtype, lambda x: wider.get(x, x), (args, kwargs))
        function = torch.Tensor.double if function is torch.Tensor.float else function
        return function(*args, **kwargs or {})


@contextlib.contextmanager
def doubles() -> Iterator[None]:
    """`Doubles`, in a backward pass too: what recomputes a layer is outside of every mode there."""
    run = Call.run

    def run_in_doubles(call: Call, leaves: list[Any], rows: slice) -> list[Any]:
        with Doubles():
            return run(call, leaves, rows)

    with Doubles(), mock.patch.object(Call, "run", run_in_doubles):
        yield


def grouped_mm(a: torch.Tensor, b: torch.Tensor, *, offs: torch.Tensor, **_: Any) -> torch.Tensor:
    """torch's own product of experts, which refuses doubles: rows up to offs[i] times b[i]."""
    if a.dtype != torch.float64:
        return GROUPED_MM(a, b, offs=offs, **_)
    starts = [0, *offs.tolist()]
    parts = [a[i:j] @ b[n] for n, (i, j) in enumerate(zip(starts, starts[1:], strict=False))]
    return torch.cat([*parts, a.new_zeros(len(a) - starts[-1], b.shape[-1])])


GROUPED_MM = torch.nn.functional.grouped_mm
torch.nn.functional.grouped_mm = grouped_mm


def reason(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error).strip().split("\n")[0][:150]
    return f"{type(error).__name__}: {text} ({Path(frame.filename).name}:{frame.lineno})"


def _child(family: str, sender: Any) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    started = time.perf_counter()
    try:
        outcome = check(family)
    except BaseException as error:
        outcome = Outcome(family, "WRONG", reason(error))
    outcome.seconds = time.perf_counter() - started
    sender.send(outcome)


def outcome_of(family: str) -> Outcome:
    """`check` in a process of its own, which may crash or hang."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["families"])
    receiver, sender = context.Pipe(False)
    process = context.Process(target=_child, args=(family, sender))
    # The server imports `families` once for all children, where it finds it.
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(sys.path)}):
        process.start()
    sender.close()
    try:
        if not receiver.poll(TIMEOUT_S):
            return Outcome(family, "untrainable", f"no answer in {TIMEOUT_S} s at this size")
        return receiver.recv()
    except EOFError:
        process.join()
        return Outcome(family, "WRONG", f"the process died ({process.exitcode})")
    finally:
        process.kill()
        process.join()


def families() -> list[str]:
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*")
    names = parser.parse_args().families or families()
    counts: collections.Counter = collections.Counter()
    for name in names:
        outcome = outcome_of(name)
        counts[outcome.what] += 1
        print(f"{name:30} {outcome.what:11} {outcome.seconds:5.1f} s  {outcome.why}", flush=True)
    print(*(f"{what} {count}" for what, count in counts.most_common()), sep=", ")
    sys.exit(bool(counts["WRONG"]))


if __name__ == "__main__":
    main()
