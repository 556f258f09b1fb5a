"""Causal cross-entropy over a vocabulary that is never there at once, exact."""

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from onn_core.ops.blocks import blocks_of
from onn_core.ops.matmul import matmul, matmul_grad

IGNORED = -100  # a label that is not counted
LOGITS_BYTES = 32 << 20  # float32 logits of one chunk of tokens
HEAD_TOKENS = 1024  # at most, that meet a block of the head at once
GRADIENT_BYTES = 256 << 20  # float32 sums for the gradient; beyond, they stay on the host


def shift_labels(labels: torch.Tensor) -> torch.Tensor:
    """(B, T) labels -> (B, T): position t holds the token that follows it."""
    return F.pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous()


def token_chunks(n_tokens: int, n_rows: int, at_most: int | None = None) -> list[slice]:
    """Slices of tokens whose float32 logits over `n_rows` stay within LOGITS_BYTES."""
    size = min(at_most or max(1, n_tokens), max(1, LOGITS_BYTES // (4 * n_rows)))
    return blocks_of(n_tokens, size)


@dataclasses.dataclass
class OnlineCrossEntropy:
    """Summed cross-entropy and its gradient from one pass over blocks of the vocabulary.

    The running maximum and sum of exponentials are those of the online softmax (Milakov and
    Gimelshein 2018); the gradient is carried along unnormalised and divided by the sum at the end,
    as FlashAttention (Dao et al. 2022) does for attention. The head is read once.

    hidden: (n, C). labels: (n,) shifted, IGNORED where not counted. post: raw logits (n, v) ->
    logits (n, v), elementwise (scaling, soft cap). chunk_tokens: that meet a block at once.
    on_host: whether the sums for the gradient are on the host; None decides by their size.
    """

    hidden: torch.Tensor
    labels: torch.Tensor
    post: Callable[[torch.Tensor], torch.Tensor]
    with_grad: bool
    chunk_tokens: int | None = None
    on_host: bool | None = None

    def __post_init__(self):
        n_tokens, hidden_size = self.hidden.shape
        self._wide = torch.promote_types(self.hidden.dtype, torch.float32)
        new = functools.partial(self.hidden.new_zeros, n_tokens, dtype=self._wide)
        self._top = new().fill_(-torch.inf)  # running maximum
        self._sum = new()  # of exp(logit - top)
        self._target = new()  # logit of the label
        if self.with_grad:
            if self.on_host is None:
                self.on_host = 8 * n_tokens * hidden_size > GRADIENT_BYTES
            home = torch.device("cpu") if self.on_host else self.hidden.device
            shape, pinned = (n_tokens, hidden_size), self.on_host and self.hidden.is_cuda
            self._pull = torch.zeros(  # sum of exp * weight
                shape, dtype=self._wide, device=home, pin_memory=pinned
            )
            self._push: torch.Tensor | None = None  # the label's weight

    def add(self, first: int, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Count vocabulary rows first: first + v; weight (v, C), bias (v,)."""
        n_tokens = len(self.labels)
        if self.chunk_tokens is not None:
            chunks = blocks_of(n_tokens, self.chunk_tokens)
        else:
            chunks = token_chunks(n_tokens, len(weight), HEAD_TOKENS)
        for tokens in chunks:
            self._add_tokens(tokens, first, weight, bias)

    def _add_tokens(
        self, tokens: slice, first: int, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        hidden = self.hidden[tokens]  # (n, C)
        column = self.labels[tokens] - first
        here = (column >= 0) & (column < len(weight))
        column = column.clamp(0, len(weight) - 1)
        raw = matmul(hidden, weight, bias)  # (n, v)
        with torch.set_grad_enabled(self.with_grad):
            raw = raw.requires_grad_(self.with_grad)
            logits = self.post(raw)
        values = logits.detach().to(self._wide)
        top = torch.maximum(self._top[tokens], values.amax(-1))
        shrink = torch.exp(self._top[tokens] - top)
        target = values.gather(-1, column[:, None])[:, 0]
        self._target[tokens] = torch.where(here, target, self._target[tokens])
        exponentials = values.sub_(top[:, None]).exp_()
        self._sum[tokens] = self._sum[tokens] * shrink + exponentials.sum(-1)
        self._top[tokens] = top
        if not self.with_grad:
            return
        if logits is raw:
            pull, slope = exponentials.to(raw.dtype), None
        else:
            (pull,) = torch.autograd.grad(
                logits, raw, exponentials.to(logits.dtype), retain_graph=True
            )
            (slopes,) = torch.autograd.grad(logits, raw, torch.ones_like(logits))
            slope = slopes.gather(-1, column[:, None]).to(self._wide)
        # a copy only where it stays on the host
        so_far = self._pull[tokens].to(pull.device, non_blocking=True)
        so_far.mul_(shrink[:, None]).add_(matmul_grad(pull, weight))
        if self._pull.device != pull.device:
            self._pull[tokens].copy_(so_far, non_blocking=True)
        push = weight[column] if slope is None else weight[column].to(self._wide) * slope
        if self._push is None:
            pinned = self._pull.is_pinned()
            self._push = torch.zeros_like(self._pull, dtype=push.dtype, pin_memory=pinned)
        # Where the label is elsewhere it is not this block's; nobody waits to learn where.
        so_far = self._push[tokens].to(push.device, non_blocking=True)
        push = torch.where(here[:, None], push, so_far)
        self._push[tokens].copy_(push, non_blocking=True)

    def token_losses(self) -> torch.Tensor:
        """The loss of each token (n,) in float32 or wider, 0 where it is not counted."""
        losses = self._top + torch.log(self._sum) - self._target
        return torch.where(self.labels != IGNORED, losses, 0.0)

    def result(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The summed loss over counted tokens; its gradient (n, C), in float32 or wider."""
        loss = self.token_losses().sum()
        if not self.with_grad:
            return loss, None
        home = self._pull.device
        if home != self.hidden.device:
            torch.cuda.synchronize(self.hidden.device)
        grad = self._pull.div_(self._sum[:, None].to(home))
        grad -= self._push
        return loss, grad.masked_fill_((self.labels == IGNORED)[:, None].to(home), 0.0)
