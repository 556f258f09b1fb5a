"""A head that passes by in blocks, and its logits and loss, which never need it whole."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.loss.loss_utils import ForCausalLMLoss

from onn_core.ops.blocks import blocks_of
from onn_core.ops.cross_entropy import IGNORED, OnlineCrossEntropy, shift_labels, token_chunks
from onn_core.ops.matmul import linear, matmul, matmul_grad
from onn_core.streaming.batching import Reached
from onn_core.streaming.lazy import LazyTensor, changes_its_tensor
from onn_core.streaming.visits import Streaming
from onn_core.weights.dequantise import Source
from onn_core.weights.slots import StreamedWeight

SUMS_BYTES = 256 << 20  # of a round on a device, where no budget says how much room there is
CAST_TOKENS = 4096  # whose gradient is in float32 at once
HEAD_BLOCK_BYTES = 64 << 20  # a head of one block has the very loss of a head in memory
# Elementwise functions of logits, with numbers at most, that wait until the logits are made.
ELEMENTWISE = {
    *("float", "to", "type", "contiguous", "clone", "neg", "__neg__", "tanh", "mul", "__mul__"),
    *("__rmul__", "multiply", "div", "true_divide", "__truediv__"),
}
Op = Callable[[torch.Tensor], torch.Tensor]


class StreamedHead:
    """Takes the place of the head's forward.

    module: the output projection (V, C). blocks: its weight in blocks of rows, in order, each with
    its first row. In a pass that defers logits they wait until they are used: a loss that takes
    them as they are never has them all at once.
    """

    def __init__(
        self, module: nn.Linear, blocks: list[tuple[int, StreamedWeight]], streaming: Streaming
    ):
        self.module = module
        self.blocks = blocks
        self.streaming = streaming
        self.owner: Callable[[], Any] = lambda: None  # the model, while there is one
        self.n_rows = len(module.weight)

    @property
    def bias(self) -> torch.Tensor | None:
        return self.module.bias

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (..., C) -> logits (..., V)."""
        if self.streaming.batching.probing:
            raise Reached
        if self.bias is not None and self.bias.requires_grad and torch.is_grad_enabled():
            return _HeadLogits.apply(self, hidden, False) + self.bias
        running = self.streaming.passes.running
        if running is not None and running.defers_logits:
            return Logits.of(self, hidden)
        return _HeadLogits.apply(self, hidden, True)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """A copy of rows start:stop of the weight (V, C)."""
        parts = [
            weight[max(start - first, 0) : stop - first].to(self.module.weight.dtype, copy=True)
            for first, weight, _ in self.resident_blocks(start, stop)
        ]
        return torch.cat(parts) if parts else self.module.weight.data[:0]

    def resident_blocks(self, start: int = 0, stop: int | None = None):
        """Visits the blocks of rows start:stop: the first row, weight (v, C), bias (v,) of each."""
        streaming, units = self.streaming, self.streaming.head_units
        for unit, (first, stored) in zip(units, self.blocks, strict=True):
            if first + stored.shape[0] <= start or stop is not None and first >= stop:
                continue
            with streaming.visit("head", unit, streaming.passes.latest):
                weight = stored.tensor
                bias = None if self.bias is None else self.bias[first : first + len(weight)]
                try:
                    yield first, weight, bias
                finally:
                    streaming.stream.release(stored)


class Logits(LazyTensor):
    """Logits (..., V) of hidden (..., C) that wait until they are used.

    ops: elementwise functions that the model applied to them (scaling, soft cap, cast).
    """

    head: StreamedHead
    model: Any  # so that it, which stops the readers, outlives these
    hidden: torch.Tensor
    ops: tuple[Op, ...]
    made: torch.Tensor | None
    changed: bool  # by an operation in place

    @staticmethod
    def of(head: StreamedHead, hidden: torch.Tensor, ops: tuple[Op, ...] = ()) -> "Logits":
        device, dtype = hidden.device, hidden.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        one = apply(ops, torch.zeros(1, dtype=dtype, device=device))
        graph = hidden.requires_grad and torch.is_grad_enabled()
        shape = (*hidden.shape[:-1], head.n_rows)
        tensor = Logits.absent(shape, one.dtype, device, graph)
        tensor.head, tensor.model, tensor.hidden, tensor.ops = head, head.owner(), hidden, ops
        tensor.made, tensor.changed = None, False
        return tensor

    def values(self) -> torch.Tensor:
        lacks_graph = torch.is_grad_enabled() and self.requires_grad
        lacks_graph = lacks_graph and self.made is not None and not self.made.requires_grad
        if self.made is None or lacks_graph and not self.changed:
            self.made = apply(self.ops, _HeadLogits.apply(self.head, self.hidden, True))
        return self.made

    def answer(self, func: Any, name: str, args: tuple, kwargs: dict) -> Any:
        if changes_its_tensor(name):
            self.values()
            self.changed = True
        if name not in ELEMENTWISE or self.changed:
            return NotImplemented
        others = [*args[1:], *kwargs.values()]
        if any(torch.is_tensor(x) and (x.ndim or x.requires_grad) for x in others):
            return NotImplemented

        def op(logits: torch.Tensor) -> torch.Tensor:
            return func(logits, *args[1:], **kwargs)

        one = op(torch.zeros((1,) * self.ndim, dtype=self.dtype, device=self.device))
        if one.ndim != self.ndim or one.device != self.device:
            return NotImplemented
        return Logits.of(self.head, self.hidden, (*self.ops, op))

    def token_losses(self, shifted_labels: torch.Tensor) -> torch.Tensor:
        """The loss of each token (B, T), 0 where it is not counted."""
        return _TokenLosses.apply(self.head, self.hidden, shifted_labels, self.ops)


def apply(ops: tuple[Op, ...], logits: torch.Tensor) -> torch.Tensor:
    for op in ops:
        logits = op(logits)
    return logits


def causal_lm_loss(loss_function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any):
    """`loss_function`, in blocks where it is the usual one and the logits still wait."""
    if loss_function is ForCausalLMLoss:
        bound = inspect.signature(loss_function).bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        logits, labels, shifted = given["logits"], given["labels"], given["shift_labels"]
        if isinstance(logits, Logits) and not logits.changed:
            labels = shift_labels(labels) if shifted is None else shifted
            fits = labels.shape == logits.shape[:-1] and given["vocab_size"] == logits.head.n_rows
            if fits and given["ignore_index"] == IGNORED:
                args = labels.to(logits.device), given["num_items_in_batch"], logits.ops
                return _HeadLoss.apply(logits.head, logits.hidden, *args, loss_function)
    return loss_function(*args, **kwargs)


class _HeadLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, head: StreamedHead, hidden: torch.Tensor, with_bias: bool
    ) -> torch.Tensor:
        ctx.head = head
        parts = [
            matmul(hidden, weight, bias if with_bias else None)
            for _, weight, bias in head.resident_blocks()
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        total = None
        for first, weight, _ in ctx.head.resident_blocks():
            part = matmul_grad(grad[..., first : first + len(weight)], weight)
            total = part if total is None else total.add_(part)
        return None, total, None


class _HeadLoss(torch.autograd.Function):
    """The loss and, at once, its gradient: the head is read once a step."""

    @staticmethod
    def forward(
        ctx: Any,
        head: StreamedHead,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        n_counted: torch.Tensor | float | None,
        ops: tuple[Op, ...],
        loss_function: Callable,
    ) -> torch.Tensor:
        with_grad = ctx.needs_input_grad[1]
        # float16 goes by blocks: their gradient stays in float32 until a loss scale has lifted it
        whole_in_one = len(head.blocks) == 1 and hidden.dtype != torch.float16
        n_vocabulary = head.module.weight.shape[0]
        chunks = token_chunks(labels.numel(), n_vocabulary)
        if n_counted is None and not (whole_in_one and len(chunks) == 1):
            n_counted = (labels != IGNORED).sum()
        flat_labels = labels.reshape(-1)  # (n,)
        flat = hidden.reshape(-1, hidden.shape[-1])  # (n, C)
        if not whole_in_one:
            groups = [(flat, flat_labels, with_grad)]
            ((token_losses, grad),) = _in_blocks(head, groups, ops, n_counted)
            loss = token_losses.sum() / n_counted
        else:
            losses = torch.zeros(len(chunks), dtype=torch.float64, device=flat.device)
            grad = torch.empty_like(flat) if with_grad else None
            for _, weight, bias in head.resident_blocks():
                for number, tokens in enumerate(chunks):
                    part = flat[tokens].detach()
                    with torch.set_grad_enabled(with_grad):
                        part.requires_grad_(with_grad)
                        loss = loss_function(
                            logits=apply(ops, linear(part, weight, bias)),
                            labels=None,
                            vocab_size=n_vocabulary,
                            num_items_in_batch=n_counted,
                            shift_labels=flat_labels[tokens],
                        )
                    losses[number] = loss.detach()
                    if with_grad:
                        grad[tokens] = torch.autograd.grad(loss, part)[0]
            loss = losses.sum().to(loss.dtype)
        ctx.shape = hidden.shape
        ctx.dtype = hidden.dtype
        if with_grad:
            ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> Any:
        (grad,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        found = torch.empty_like(grad, dtype=ctx.dtype)
        for rows in blocks_of(len(grad), CAST_TOKENS):
            found[rows] = grad[rows].to(wide) * grad_loss.to(wide)
        return None, found.view(ctx.shape), None, None, None, None


class _TokenLosses(torch.autograd.Function):
    """The loss of each token that counts and, at once, its gradient: the head is read once.

    Groups of samples that a pass holds apart (`rows_hook`) are apart here, too: what one of them
    gives does not depend on the others.
    """

    @staticmethod
    def forward(
        ctx: Any,
        head: StreamedHead,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        ops: tuple[Op, ...],
    ) -> torch.Tensor:
        passes, n_samples = head.streaming.passes, len(labels)
        size, n_graded = passes.group_size or n_samples, passes.n_graded
        flat, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        groups = []
        for start in range(0, n_samples, size):
            graded = ctx.needs_input_grad[1] and (n_graded is None or start < n_graded)
            counted = (labels[start : start + size] != IGNORED).flatten().nonzero()[:, 0]
            counted += start * labels.shape[1]  # places (n,) in the flat batch
            groups.append((counted, flat[counted], flat_labels[counted], graded))
        results = _in_blocks(head, [group[1:] for group in groups], ops)
        losses, ctx.grads = None, []
        for (counted, _, _, graded), (found, grad) in zip(groups, results, strict=True):
            losses = found.new_zeros(len(flat_labels)) if losses is None else losses
            losses[counted] = found
            if graded and len(counted):
                ctx.grads.append((counted, grad))
        ctx.like = hidden.new_empty(0), hidden.shape
        return losses.view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: torch.Tensor) -> Any:
        like, shape = ctx.like
        grad, of_losses = like.new_zeros(shape), grad_losses.reshape(-1)
        for counted, unit in ctx.grads:  # unit (n, C), of a loss's gradient of one
            wide = torch.promote_types(unit.dtype, torch.float32)
            here = unit * of_losses[counted][:, None].to(wide)
            grad.view(-1, shape[-1])[counted] = here.to(grad)
        return None, grad, None, None


def _in_blocks(
    head: StreamedHead,
    groups: Sequence[tuple[torch.Tensor, torch.Tensor, bool]],
    ops: tuple[Op, ...],
    n_counted: torch.Tensor | float = 1,
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """The losses (n,) of each group's tokens, and the gradient (n, C) of their sum / n_counted.

    The cross-entropy is counted one block of the vocabulary at a time. A group: hidden (n, C),
    labels (n,), and whether its gradient is wanted. What has no room at once goes in rounds, whose
    gradients wait in the dtype of hidden (float16's in float32, since no loss scale has lifted it).
    """
    streaming, post = head.streaming, functools.partial(apply, ops) if ops else None
    most = max(1, *(len(labels) for _, labels, _ in groups))
    n_graded, width = sum(with_grad for *_, with_grad in groups), groups[0][0].shape[1]
    at_once, plan = most, streaming.planner.plan.head
    if plan is not None and plan.n_rounds > 1 and n_graded:
        at_once = -(-plan.n_tokens // n_graded)
    # Else the other members would wait at the visits of further rounds.
    alone = streaming.member is None and streaming.device.type == "cuda"
    if plan is None and alone and n_graded:
        at_once = max(1, SUMS_BYTES // (8 * width * n_graded))
    dtype = groups[0][0].dtype
    waits_in = torch.float32 if dtype == torch.float16 else dtype
    losses: list[list[torch.Tensor]] = [[] for _ in groups]
    grads: list[torch.Tensor | None] = [None] * len(groups)
    for rows in blocks_of(most, at_once):
        entropies = [
            OnlineCrossEntropy(hidden[rows], labels[rows], post, with_grad, plan and plan.n_tokens)
            for hidden, labels, with_grad in groups
        ]
        streaming.rounds_left = -(-(most - rows.stop) // at_once)
        try:
            for first, weight, bias in head.resident_blocks():
                for entropy in entropies:
                    entropy.add(first, weight, bias)
        finally:
            streaming.rounds_left = 0
        for number in range(len(groups)):
            entropy = entropies.pop(0)  # whose sums end here
            losses[number].append(entropy.token_losses())
            grad = entropy.gradient()
            if grad is None:
                continue
            grad = grad.div_(n_counted)
            if at_once < most:
                if grads[number] is None:
                    grads[number] = torch.empty_like(groups[number][0], dtype=waits_in)
                grads[number][rows] = grad
                del grad, entropy  # before the sums of the next round
            else:
                grads[number] = grad
    return [(torch.cat(parts), grad) for parts, grad in zip(losses, grads, strict=True)]


def split_rows(n_rows: int, row_bytes: int) -> list[slice]:
    """Slices of one block up to HEAD_BLOCK_BYTES, else of blocks of at most half of it.

    All have as many rows if some number of blocks, up to twice the least, divides them: a last
    block of another size would need slots of its own.
    """
    n_bytes = n_rows * row_bytes
    least = 1 if n_bytes <= HEAD_BLOCK_BYTES else -(-2 * n_bytes // HEAD_BLOCK_BYTES)
    n_blocks = next((n for n in range(least, 2 * least) if n_rows % n == 0), least)
    return blocks_of(n_rows, -(-n_rows // n_blocks))


def head_blocks(
    source: Source, n_rows: int, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[int, StreamedWeight]]:
    """The head's weight (V, C) in blocks of rows, each with its first row."""
    found = []
    for rows in split_rows(n_rows, hidden_size * dtype.itemsize):
        part, shape = source.part(rows.start, rows.stop), (rows.stop - rows.start, hidden_size)
        found.append((rows.start, StreamedWeight(part, shape, dtype, device.type != "cpu")))
    return found
