"""Causal cross-entropy over a vocabulary that is never there at once, exact."""

import dataclasses
import functools
import math
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F

from onn_core.ops.blocks import blocks_of
from onn_core.ops.matmul import has_fast_matmul, matmul, matmul_grad

IGNORED = -100  # a label that is not counted
LOGITS_BYTES = 32 << 20  # float32 logits of one chunk of tokens
HEAD_TOKENS = 1024  # at most, that meet a block of the head at once
PLAIN_FRACTION = 1 / 4  # of those that a plan has room for, where no kernel counts their logits


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
    logits (n, v), elementwise (scaling, soft cap); None leaves them. chunk_tokens: that a plan has
    room for at once.
    """

    hidden: torch.Tensor
    labels: torch.Tensor
    post: Callable[[torch.Tensor], torch.Tensor] | None
    with_grad: bool
    chunk_tokens: int | None = None

    def __post_init__(self):
        n_tokens, hidden_size = self.hidden.shape
        self._wide = torch.promote_types(self.hidden.dtype, torch.float32)
        new = functools.partial(self.hidden.new_zeros, dtype=self._wide)
        self._top = new(n_tokens).fill_(-torch.inf)  # running maximum
        self._sum = new(n_tokens)  # of exp(logit - top)
        self._target = new(n_tokens)  # logit of the label
        fusable = self.post is None and self._wide == torch.float32
        self._kernels = kernels(self.hidden.device) if fusable else None
        if self.with_grad:
            self._pull = new(n_tokens, hidden_size)  # sum of exp * weight
            self._push: torch.Tensor | None = None  # the label's weight

    def add(self, first: int, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Count vocabulary rows first: first + v; weight (v, C), bias (v,)."""
        n_tokens, at_once = len(self.labels), self.chunk_tokens
        if at_once is not None:
            part = 1 if self._kernels else PLAIN_FRACTION
            chunks = blocks_of(n_tokens, math.ceil(part * at_once))
        else:
            chunks = token_chunks(n_tokens, len(weight), HEAD_TOKENS)
        for tokens in chunks:
            self._add_tokens(tokens, first, weight, bias)

    def _add_tokens(
        self, tokens: slice, first: int, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        labels = self.labels[tokens]  # (n,)
        raw = matmul(self.hidden[tokens], weight, bias)  # (n, v)
        if self._kernels:
            totals = (self._top[tokens], self._sum[tokens], self._target[tokens])
            shrink = self._kernels.count(raw, labels, first, *totals)
            pull, slope = raw, None
        else:
            shrink, pull, slope = self._count(tokens, first, raw)
        if not self.with_grad:
            return
        if pull.device.type == "cpu" and not has_fast_matmul(pull.dtype):
            pull = pull.float()  # torch's own product with `weight` as it lies: 0.3 GFLOP/s, not 45
        self._pull[tokens].mul_(shrink[:, None]).add_(matmul_grad(pull, weight))
        if self._push is None:
            dtype = weight.dtype if slope is None else self._wide
            self._push = torch.zeros_like(self._pull, dtype=dtype)
        push = self._push[tokens]
        if self._kernels:
            self._kernels.take_rows(weight, labels, first, push)
            return
        column, here = _columns(labels - first, len(weight))
        found = weight[column] if slope is None else weight[column].to(self._wide) * slope
        # Where the label is elsewhere it is not this block's; nobody waits to learn where.
        push.copy_(torch.where(here[:, None], found, push))

    def _count(
        self, tokens: slice, first: int, raw: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """What the kernel does, in plain torch, with `post`: see `cross_entropy_triton.count`.

        Returns shrink (n,), the factors of the block's rows in the gradient (n, v), and the slope
        of `post` at the labels (n, 1), None without one.
        """
        column, here = _columns(self.labels[tokens] - first, raw.shape[1])
        with torch.set_grad_enabled(self.with_grad):
            raw = raw.requires_grad_(self.with_grad)
            logits = raw if self.post is None else self.post(raw)
        values = logits.detach().to(self._wide)
        top = torch.maximum(self._top[tokens], values.amax(-1))
        shrink = torch.exp(self._top[tokens] - top)
        target = values.gather(-1, column[:, None])[:, 0]
        self._target[tokens] = torch.where(here, target, self._target[tokens])
        exponentials = values.sub_(top[:, None]).exp_()
        self._sum[tokens] = self._sum[tokens] * shrink + exponentials.sum(-1)
        self._top[tokens] = top
        if not self.with_grad:
            return shrink, None, None
        if logits is raw:
            return shrink, exponentials.to(raw.dtype), None
        (pull,) = torch.autograd.grad(logits, raw, exponentials.to(logits.dtype), retain_graph=True)
        (slopes,) = torch.autograd.grad(logits, raw, torch.ones_like(logits))
        return shrink, pull, slopes.gather(-1, column[:, None]).to(self._wide)

    def token_losses(self) -> torch.Tensor:
        """The loss of each token (n,) in float32 or wider, 0 where it is not counted."""
        losses = self._top + torch.log(self._sum) - self._target
        return torch.where(self.labels != IGNORED, losses, 0.0)

    def gradient(self) -> torch.Tensor | None:
        """Of the sum of the counted tokens' losses (n, C), in float32 or wider; ends the sums."""
        if not self.with_grad:
            return None
        grad = self._pull.div_(self._sum[:, None])
        if self._push is not None:
            grad -= self._push
        return grad.masked_fill_((self.labels == IGNORED)[:, None], 0.0)


def _columns(offsets: torch.Tensor, n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of a block's rows each label is (n,), and whether it is one of them (n,)."""
    return offsets.clamp(0, n_rows - 1), (offsets >= 0) & (offsets < n_rows)


@functools.cache
def kernels(device: torch.device) -> ModuleType | None:
    """Those of `cross_entropy_triton`, if they are equal to plain torch on a device.

    triton comes with torch for CUDA, but needs a C compiler.
    """
    if device.type != "cuda":
        return None
    try:
        from onn_core.ops import cross_entropy_triton

        logits = torch.linspace(-3, 5, 2 * 3000, device=device).view(2, 3000)
        labels = torch.tensor([7 + 2999, 0], device=device)
        top, total, target = (torch.full((2,), start, device=device) for start in (0.0, 2.0, -9.0))
        high = torch.clamp_min(logits.amax(-1), 0)
        exponentials = torch.exp(logits - high[:, None])
        sums = 2 * torch.exp(-high) + exponentials.sum(-1)
        want = (exponentials, high, sums, torch.stack([logits[0, 2999], target[1]]))
        shrink = cross_entropy_triton.count(logits, labels, 7, top, total, target)
        rows = torch.arange(9000.0, device=device).view(3000, 3)
        taken = cross_entropy_triton.take_rows(rows, labels, 7, torch.ones(2, 3, device=device))
        equal = torch.equal(taken, torch.stack([rows[2999], torch.ones(3, device=device)]))
        equal &= torch.allclose(shrink, torch.exp(-high))
        equal &= all(map(torch.allclose, (logits, top, total, target), want))
    except Exception:  # it is missing, or cannot be built here
        return None
    return cross_entropy_triton if equal else None
