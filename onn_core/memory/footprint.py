"""The activations of one decoder layer, counted on the meta device: no memory is taken."""

import copy
import warnings
import weakref
from typing import Any, ClassVar

import peft
import torch
import torch._meta_registrations  # the shapes of the CPU's attention kernel
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from onn_core.ops.lora import fuse_lora
from onn_core.ops.making import MAKING


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside, while something refers to them."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):  # made before: not counted
                self._known.add(tensor.untyped_storage()._cdata)
        made = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, n_bytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += n_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, n_bytes)

    def _drop(self, key: int, n_bytes: int) -> None:
        self._known.discard(key)
        self.now -= n_bytes


def visit_bytes(
    config: Any, batch_size: int, n_tokens: int, dtype: torch.dtype
) -> tuple[int, int, int]:
    """Bytes of the activations of one adapted layer on (batch_size, n_tokens).

    The peak forward, the peak backward, and what the graph holds between the two. The first layer
    of `config` stands for all; attention counts as the fused kernel.
    """
    base = one_layer(config, dtype, torch.device("meta"))
    with MAKING, torch.device("meta"):
        size = (batch_size, n_tokens, base.get_input_embeddings().embedding_dim)
        hidden = torch.zeros(size, dtype=dtype, requires_grad=True)  # (B, T, C)
        mask = torch.ones(batch_size, 1, n_tokens, n_tokens, dtype=torch.bool)
        given = {"inputs_embeds": hidden, "attention_mask": mask, "use_cache": False}
        with FusedAttention():
            with LiveBytes() as forward, torch.no_grad():
                base(**given)
            with LiveBytes() as live:
                out = base(**given)[0]
                graph_bytes = live.now
                trained = [p for p in base.parameters() if p.requires_grad]
                at = [hidden, *trained]
                torch.autograd.grad(out, at, torch.zeros_like(out), allow_unused=True)
    return forward.peak, live.peak, graph_bytes


def one_layer(config: Any, dtype: torch.dtype, where: Any) -> Any:
    """The first layer of `config` with LoRA on its linear modules, in its model without a head.

    where: a context in which modules are made, such as `torch.device("meta")`.
    """
    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    with MAKING, where:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        lora = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
        with warnings.catch_warnings():  # PEFT asks transformers for a property that was renamed
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            base = peft.get_peft_model(model, lora).train().base_model.model.base_model
    fuse_lora(base)
    return base


class Footprint:
    """`visit_bytes` of a model for any batch, traced at few sizes of each length.

    A peak is the largest of several moments, each about linear in the samples, so it lies below
    the line between two sizes; above the largest one moment has long been the peak. What was traced
    is known to every model of the same config in this process: many runs open one folder.
    """

    _known: ClassVar[dict[tuple, tuple[int, ...]]] = {}

    def __init__(self, config: Any, dtype: torch.dtype):
        self.config, self.dtype = config, dtype
        self._traced: dict[tuple[int, int], tuple[int, ...]] = {}  # (B, T)

    def __call__(self, batch_size: int, n_tokens: int) -> tuple[int, int, int]:
        few, many = (1, 32) if batch_size <= 32 else (32, 64)
        for size in (few, many):
            if (size, n_tokens) not in self._traced:
                self._traced[size, n_tokens] = self._trace(size, n_tokens)
        ends = zip(self._traced[few, n_tokens], self._traced[many, n_tokens], strict=True)
        part = (batch_size - few) / (many - few)
        return tuple(round(one + part * (other - one)) for one, other in ends)

    def _trace(self, batch_size: int, n_tokens: int) -> tuple[int, int, int]:
        text = self.config.get_text_config()
        # The JSON leaves out by what attention and experts are computed; both may change later.
        ways = [getattr(text, f"_{what}_implementation", None) for what in ("attn", "experts")]
        described = self.config.to_json_string(use_diff=False)
        key = (described, *ways, self.dtype, batch_size, n_tokens)
        if key in self._known:
            return self._known[key]
        try:
            self._known[key] = visit_bytes(self.config, batch_size, n_tokens, self.dtype)
            return self._known[key]
        except Exception:  # a layer whose code asks for values: as a dense layer of its widths
            width = 4 * getattr(text, "intermediate_size", 0) or 16 * text.hidden_size
            values = batch_size * n_tokens * (width + 16 * text.hidden_size)
            return 3 * (values * (self.dtype.itemsize + 4),)


class FusedAttention(TorchFunctionMode):
    """Attention as the fused kernel of a CPU or a GPU computes it; in this thread alone."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fused_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """q (B, H, T, D), k and v (B, H or fewer, T, D) -> (B, H, T, D)."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
