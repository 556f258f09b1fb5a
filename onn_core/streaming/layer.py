"""One decoder layer whose weights are resident only while it is visited.

The layer's own forward stays; this module decides when it runs. In training, a visit of the
forward pass runs it without a graph and saves its input, the *boundary activation*; the visit of
the backward pass runs it again with a graph and takes the gradients of its inputs and adapters
(activation checkpointing, Chen et al. 2016, whose recompute also reloads the weights). Where a
plan has room, the visit of the forward pass reserves its graph, but not its weights. The whole
batch goes through one visit in micro-batches: the vertical, or layer-major, schedule of FlexGen
(Sheng et al. 2023), GreedySnake (2025) and RoundPipe (2025).
"""

import contextlib
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from onn_core.errors import ConfigError
from onn_core.memory.boundaries import OnDisk, OnHost
from onn_core.streaming.call import Call, is_cache
from onn_core.streaming.layer_weights import LayerWeights
from onn_core.streaming.recompute import Visit


class StreamedLayer:
    """Takes the place of a decoder layer's forward."""

    def __init__(self, module: nn.Module, weights: LayerWeights):
        self.module = module
        self.weights = weights
        self.number = weights.number
        self.forward = module.forward  # the class's own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=is_cache)
        batching = self.weights.streaming.batching
        if batching.probing:
            return batching.answer(leaves)
        call = Call(self.weights, self.forward, leaves, spec)
        if self.weights.streaming.passes.running is None:  # it is called by itself
            self.weights.find_parameters()
        trained = [p for p in self.weights.parameters if p.requires_grad]
        inputs = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
        if not inputs:  # of the first layer: it waits for backward as the others do
            inputs = [x for x in leaves if isinstance(x, torch.Tensor) and x is leaves[0]]
        if not torch.is_grad_enabled() or not (trained or any(x.requires_grad for x in inputs)):
            outputs = call.run_forward()
        else:
            if any(map(is_cache, leaves)):
                raise ConfigError("training cannot fill a key-value cache: pass use_cache=False.")
            with self._saving_inputs(inputs):
                outputs = Visit.apply(call, len(inputs), *inputs, *trained)
        return pytree.tree_unflatten(call.with_outputs(outputs), call.out_spec)

    def _saving_inputs(self, inputs: list[torch.Tensor]) -> contextlib.AbstractContextManager:
        """Where the inputs are saved: as planned; unplanned, on the host if CUDA has no room."""
        streaming = self.weights.streaming
        plan, device = streaming.planner.plan, streaming.device
        if plan.boundaries == "disk":
            return torch.autograd.graph.saved_tensors_hooks(OnDisk, OnDisk.read)
        on_host = plan.boundaries == "host"
        if device.type == "cuda" and streaming.planner.budget is None:
            n_bytes = streaming.n_layers * sum(x.nbytes for x in inputs)
            on_host = n_bytes > torch.cuda.mem_get_info(device)[0] // 4
        if on_host:
            save = streaming.host_boundaries.save
            return torch.autograd.graph.saved_tensors_hooks(save, OnHost.read)
        return contextlib.nullcontext()
