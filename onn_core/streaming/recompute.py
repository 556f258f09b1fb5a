"""A layer in an autograd graph: its own is reserved, or made again in backward."""

from typing import Any

import torch

from onn_core.streaming.call import INPUT, Call, cut


class Visit(torch.autograd.Function):
    """The layer on the whole batch: recomputed in backward, unless its graph was reserved."""

    @staticmethod
    def forward(ctx: Any, call: Call, n_inputs: int, *tensors: torch.Tensor) -> Any:
        inputs = tensors[:n_inputs]
        ctx.call, ctx.n_inputs, ctx.trained = call, n_inputs, tensors[n_inputs:]
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
        in_rows = [x for x, leaf in zip(call.rows_of, call.leaves, strict=True) if leaf is INPUT]
        out_rows = call.out_rows or [None] * len(grads)
        captured, sized = call.captured, len(inputs) == len(grads) == 1 and grads[0] is not None
        with weights.visit("backward", call.of):
            replays = sized and captured and captured.can_run_backward(call, *inputs, ctx.trained)
            if replays:
                input_grads[0], trained_grads = captured.backward(
                    call, *inputs, ctx.trained, *grads, *in_rows
                )
            for number in () if replays else call.graded:
                graph, rows = call.graph_of(number, inputs), call.slices[number]
                by_matrix = call.streaming.planner.plan.by_matrix
                graph.saved.drops = by_matrix or number == call.graded[-1]
                grad_of = [
                    (out, cut(grad, place, rows))
                    for out, grad, place in zip(graph.outputs, grads, out_rows, strict=True)
                    if grad is not None and out.requires_grad
                ]
                found = torch.autograd.grad(
                    [out for out, _ in grad_of],
                    [*graph.roots, *ctx.trained],
                    [grad for _, grad in grad_of],
                    allow_unused=True,
                )
                for index, grad in zip(wanted, found, strict=False):
                    if in_rows[index] is None or grad is None:
                        _add(input_grads, index, grad)
                    else:
                        if input_grads[index] is None:
                            input_grads[index] = grad.new_zeros(inputs[index].shape)
                        in_rows[index].cut(input_grads[index], rows).copy_(grad)
                for index, grad in enumerate(found[len(wanted) :]):
                    _add(trained_grads, index, grad)
                del graph, found, grad_of
        if weights.number == call.of.lowest:  # before any optimizer step can use these gradients
            call.streaming.stream.model_folder.check_unchanged()
        return None, None, *input_grads, *trained_grads


def _add(totals: list[torch.Tensor | None], index: int, grad: torch.Tensor | None) -> None:
    if grad is not None:
        total = totals[index]
        totals[index] = grad if total is None else total.add_(grad)
