"""The two ends of a model: embedding rows by number, and a head that passes by in blocks."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from onn_core.checkpoint import Checkpoint
from onn_core.items import Item
from onn_core.loss import IGNORED, OnlineCrossEntropy, shift_labels, token_chunks
from onn_core.product import linear, product, product_back
from onn_core.session import Session
from onn_core.sources import Source

HEAD_BLOCK_BYTES = 128 << 20


class EmbeddingRows:
    """Takes the place of an embedding's forward: reads the rows that a batch needs."""

    def __init__(
        self, module: nn.Embedding, checkpoint: Checkpoint, source: Source, session: Session
    ):
        self.module = module
        self.forward = module.forward  # the class's own: some scale what they look up
        self.padding_idx, module.padding_idx = module.padding_idx, None
        self.absent = module.weight.data
        self.checkpoint, self.name, self.session = checkpoint, source.entry.name, session

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids (B, T) -> (B, T, C)."""
        ids, places = input_ids.unique(return_inverse=True)
        if len(ids) and (ids[0] < 0 or ids[-1] >= self.absent.shape[0]):
            raise IndexError(f"token ids lie outside the vocabulary of {self.absent.shape[0]}.")
        rows = self.checkpoint.read_rows(self.name, ids.cpu())  # (U, C)
        self.module.weight.data = rows.to(self.session.device, self.absent.dtype)
        try:
            return self.forward(places)
        finally:
            self.module.weight.data = self.absent


class StreamedHead:
    """Takes the place of the head's forward.

    module: the output projection (V, C). blocks: its weight in items of rows, in order, each with
    its first row.
    """

    def __init__(self, module: nn.Linear, blocks: list[tuple[int, Item]], session: Session):
        self.module = module
        self.forward = module.forward
        self.blocks = blocks
        self.session = session
        self.bias = module.bias
        self._replaced: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (..., C) -> logits (..., V)."""
        if self._replaced is not None:
            return self._replaced(hidden)
        return _HeadLogits.apply(self, hidden)

    @contextlib.contextmanager
    def replaced(self, forward: Callable[[torch.Tensor], torch.Tensor]):
        """Inside, `forward` is what the model takes for its head."""
        before, self._replaced = self._replaced, forward
        try:
            yield
        finally:
            self._replaced = before

    def resident_blocks(self):
        """Visits the blocks in order: yields the first row, weight (v, C) and bias (v,) of each."""
        session = self.session
        units = session.head_units
        for index, (first, item) in enumerate(self.blocks):
            future = units[index:] + session.backward_pass(session.n_layers - 1)
            with session.visit("head", units[index], future + session.forward_pass()):
                weight = item.tensor
                bias = None if self.bias is None else self.bias[first : first + len(weight)]
                try:
                    yield first, weight, bias
                finally:
                    session.stream.release(item)

    def cross_entropy(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        shifted: bool,
        n_counted: torch.Tensor | float | None,
        tail: Callable[[torch.Tensor], torch.Tensor],
        loss_function: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        """Mean cross-entropy of hidden (B, T, C) against labels (B, T): a scalar.

        n_counted: what the sum is divided by; None counts the labels here. tail: the model's
        forward after its layers, hidden (1, n, C) -> logits (1, n, V). loss_function: the model's.
        """
        if not shifted:
            labels = shift_labels(labels)
        return _HeadLoss.apply(self, hidden, labels, n_counted, tail, loss_function)


class _HeadLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head: StreamedHead, hidden: torch.Tensor) -> torch.Tensor:
        ctx.head = head
        parts = [product(hidden, weight, bias) for _, weight, bias in head.resident_blocks()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        total = None
        for first, weight, _ in ctx.head.resident_blocks():
            part = product_back(grad[..., first : first + len(weight)], weight)
            total = part if total is None else total.add_(part)
        return None, total


class _HeadLoss(torch.autograd.Function):
    """The loss and, at once, its gradient: the head is read once a step."""

    @staticmethod
    def forward(
        ctx: Any,
        head: StreamedHead,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        n_counted: torch.Tensor | float | None,
        tail: Callable,
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
            total, grad = _in_blocks(head, flat, flat_labels, tail, with_grad)
            loss = total / n_counted
            grad = None if grad is None else grad.div_(n_counted)
        else:
            losses, grads = [], []
            for _, weight, bias in head.resident_blocks():
                for tokens in chunks:
                    part = flat[tokens].detach()
                    whole_head = functools.partial(linear, weight=weight, bias=bias)
                    with head.replaced(whole_head), torch.set_grad_enabled(with_grad):
                        part.requires_grad_(with_grad)
                        loss = loss_function(
                            logits=tail(part[None]),
                            labels=None,
                            vocab_size=n_vocabulary,
                            num_items_in_batch=n_counted,
                            shift_labels=flat_labels[tokens],
                        )
                    losses.append(loss.detach())
                    if with_grad:
                        grads.append(torch.autograd.grad(loss, part)[0])
            loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
            grad = torch.cat(grads) if with_grad else None
        ctx.shape = hidden.shape
        ctx.dtype = hidden.dtype
        if with_grad:
            ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> Any:
        (grad,) = ctx.saved_tensors
        grad = (grad * grad_loss.to(grad.dtype)).to(ctx.dtype).view(ctx.shape)
        return None, grad, None, None, None, None


def _in_blocks(
    head: StreamedHead,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    tail: Callable[[torch.Tensor], torch.Tensor],
    with_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Summed loss and gradient (n, C) of hidden (n, C), one block of the vocabulary at a time."""
    like = hidden[:1].detach()[None]

    def post(raw: torch.Tensor) -> torch.Tensor:  # what the model does to logits: (n, v) -> (n, v)
        with head.replaced(lambda _: raw[None]):
            return tail(like)[0]

    entropy = OnlineCrossEntropy(hidden, labels, post, with_grad)
    for first, weight, bias in head.resident_blocks():
        entropy.add(first, weight, bias)
    return entropy.result()


def split_rows(n_rows: int, row_bytes: int) -> list[tuple[int, int]]:
    """(start, stop) of equal blocks of rows, none above HEAD_BLOCK_BYTES."""
    n_blocks = max(1, -(-n_rows * row_bytes // HEAD_BLOCK_BYTES))
    size = -(-n_rows // n_blocks)
    return [(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


def head_items(
    source: Source, n_rows: int, hidden_size: int, dtype: torch.dtype
) -> list[tuple[int, Item]]:
    """The head's weight (V, C) as items of at most HEAD_BLOCK_BYTES, each with its first row."""
    return [
        (start, Item(source.rows(start, stop), (stop - start, hidden_size), dtype))
        for start, stop in split_rows(n_rows, hidden_size * dtype.itemsize)
    ]
