"""One optimizer step: of the trainer, of every study and of the benchmark."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from onn_core.processes import ALONE, Processes


def optimizer_step(
    model: Callable[..., Any],
    parts: Iterable[dict[str, torch.Tensor]],
    n_counted: int | None,
    optimizer: torch.optim.Optimizer,
    *,
    scaler: Any = None,
    max_grad_norm: float | None = None,
    allow: Callable[[float, float], bool] = lambda loss, norm: True,
    processes: Processes = ALONE,
    fetching: AbstractContextManager | None = None,
) -> tuple[float, float]:
    """Gradients of all `parts` (each a batch), then one update: the loss, and the gradients' norm.

    model: called with a batch and `num_items_in_batch`; what it returns has a `loss`. n_counted:
    counted tokens of all parts, by which each part's summed loss is divided; None leaves a part's
    own mean. scaler: with the methods of torch.amp.GradScaler; it decides whether to update.
    max_grad_norm: None leaves the gradients as they are, whatever their norm. allow: asked with
    the loss and the norm before the update; False leaves the update out, and it may raise.
    processes: that have the other rows of each part; loss and norm are those of all rows.
    fetching: entered around the passes, as `Gathering.step` is.
    """
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    loss = 0.0
    with fetching or nullcontext():
        for part in parts:
            part_loss = model(**part, num_items_in_batch=n_counted).loss
            scaler.scale(part_loss).backward()
            loss += float(part_loss.detach())
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    loss = processes.sum_gradients(trained, loss)
    scaler.unscale_(optimizer)
    norm = get_total_norm([p.grad for p in trained if p.grad is not None])
    if allow(loss, float(norm)):
        if max_grad_norm is not None:
            clip_grads_with_norm_(trained, max_grad_norm, norm)
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return loss, float(norm)


class FixedScaler(torch.amp.GradScaler):
    """A loss scale that stays as it is, whether steps overflow or not."""

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        super().update(self.get_scale() if self.is_enabled() else None)
