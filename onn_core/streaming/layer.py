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
from onn_core.streaming.call import INPUT, Call, cut, is_cache
from onn_core.streaming.layer_weights import LayerWeights


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
        # What waits for backward where the plan says; the other arguments are held as they are.
        inputs = [x for x in leaves if torch.is_tensor(x) and x.requires_grad]
        if not inputs:  # The lowest trained layer's needs no gradient, but waits for backward too.
            inputs = [x for x in leaves if torch.is_tensor(x) and x is leaves[0]]
        if not torch.is_grad_enabled() or not (trained or any(x.requires_grad for x in inputs)):
            outputs = call.run_forward()
        else:
            if any(map(is_cache, leaves)):
                raise ConfigError("training cannot fill a key-value cache: pass use_cache=False.")
            with self._saving_inputs(inputs):
                outputs = Recompute.apply(call, len(inputs), *inputs, *trained)
        return pytree.tree_unflatten(call.with_outputs(outputs), call.out_spec)

    def _saving_inputs(self, inputs: list[torch.Tensor]) -> contextlib.AbstractContextManager:
        """Where the inputs are saved: as planned; unplanned, on the host if CUDA has no room.

        Their copies to the host begin at once, and end before the layer is done.
        """
        streaming = self.weights.streaming
        plan, device = streaming.planner.plan, streaming.device
        if plan.boundaries == "disk":
            return torch.autograd.graph.saved_tensors_hooks(OnDisk, OnDisk.read)
        on_host = plan.boundaries == "host"
        if device.type == "cuda" and streaming.planner.budget is None:
            n_bytes = streaming.n_layers * sum(x.nbytes for x in inputs)
            on_host = n_bytes > torch.cuda.mem_get_info(device)[0] // 4
        if not on_host:
            return contextlib.nullcontext()
        copies = {(x.data_ptr(), x.shape): streaming.host_boundaries.save(x) for x in inputs}

        def pack(tensor: torch.Tensor) -> OnHost:
            """Called when the layer has run, with another view of an input."""
            copy = copies[tensor.data_ptr(), tensor.shape]
            copy.wait_for_copy()
            return copy

        return torch.autograd.graph.saved_tensors_hooks(pack, OnHost.read)


class Recompute(torch.autograd.Function):
    """The layer on the whole batch: recomputed in backward, unless its graph was reserved.

    forward and backward are a visit each; in between only the inputs wait.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, n_inputs: int, *tensors: torch.Tensor) -> Any:
        inputs = tensors[:n_inputs]
        ctx.call, ctx.trained = call, tensors[n_inputs:]
        outputs = call.run_forward(inputs)
        call.leaves = [INPUT if any(leaf is x for x in inputs) else leaf for leaf in call.leaves]
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(*(x for x in outputs if not x.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        call, weights = ctx.call, ctx.call.weights
        inputs = list(ctx.saved_tensors)
        input_grads: list[torch.Tensor | None] = [None] * len(inputs)
        trained_grads: list[torch.Tensor | None] = [None] * len(ctx.trained)
        wanted = [index for index, x in enumerate(inputs) if x.requires_grad]
        in_places = [x for x, leaf in zip(call.places, call.leaves, strict=True) if leaf is INPUT]
        out_places = call.out_places or [None] * len(grads)
        captured, sized = call.captured, len(inputs) == len(grads) == 1 and grads[0] is not None
        with weights.visit("backward", call.in_pass):
            replays = sized and captured and captured.can_run_backward(call, *inputs, ctx.trained)
            if replays:
                input_grads[0], trained_grads = captured.backward(
                    call, *inputs, ctx.trained, *grads, *in_places
                )
            for number in () if replays else call.graded:
                graph, rows = call.graph_of(number, inputs), call.slices[number]
                by_matrix = call.streaming.planner.plan.by_matrix
                graph.saved.drops = by_matrix or number == call.graded[-1]
                grad_of = [
                    (out, cut(grad, place, rows))
                    for out, grad, place in zip(graph.outputs, grads, out_places, strict=True)
                    if grad is not None and out.requires_grad
                ]
                found = torch.autograd.grad(
                    [out for out, _ in grad_of],
                    [*graph.roots, *ctx.trained],
                    [grad for _, grad in grad_of],
                    allow_unused=True,
                )
                for index, grad in zip(wanted, found, strict=False):
                    if in_places[index] is None or grad is None:
                        _add(input_grads, index, grad)
                    else:
                        if input_grads[index] is None:
                            input_grads[index] = grad.new_zeros(inputs[index].shape)
                        in_places[index].cut(input_grads[index], rows).copy_(grad)
                for index, grad in enumerate(found[len(wanted) :]):
                    _add(trained_grads, index, grad)
                del graph, found, grad_of
        if weights.number == call.in_pass.lowest:  # before an optimizer step uses the gradients
            call.streaming.stream.model_folder.check_unchanged()
        return None, None, *input_grads, *trained_grads


def _add(totals: list[torch.Tensor | None], index: int, grad: torch.Tensor | None) -> None:
    if grad is not None:
        total = totals[index]
        totals[index] = grad if total is None else total.add_(grad)
