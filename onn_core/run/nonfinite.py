"""The layers' gradient norms, and where a loss or a gradient first became NaN or Inf."""

import math
from collections.abc import Callable, Sequence

import torch

from onn_core.streaming.layer import StreamedLayer


def grad_norm_by_layer(layers: Sequence[StreamedLayer]) -> dict[str, float]:
    """Number of each layer that has gradients -> their norm."""
    norms = {}
    for layer in layers:
        grads = [p.grad for p in layer.weights.parameters if p.grad is not None]
        if grads:
            norms[str(layer.number)] = torch.nn.utils.get_total_norm(grads)
    found = torch.stack(list(norms.values())).tolist() if norms else []  # the device waits once
    return dict(zip(norms, found, strict=True))


def first_non_finite(
    layers: Sequence[StreamedLayer],
    forward: Callable[[], object],
    loss: float,
    norms: dict[str, float],
) -> str:
    """Where it began, in words: `forward` is run again, and each layer's output looked at."""
    found: list[int] = []
    hooks = [
        layer.module.register_forward_hook(
            lambda _, __, output, number=layer.number: (
                found.append(number)
                if not torch.isfinite(output[0] if isinstance(output, tuple) else output).all()
                else None
            )
        )
        for layer in layers
    ]
    with torch.no_grad():
        forward()
    for hook in hooks:
        hook.remove()
    bad = [layer for layer, norm in norms.items() if not math.isfinite(norm)]
    if found:
        return f"the output of layer {found[0]}"
    return f"the gradient of layer {bad[-1] if bad else '?'}" if math.isfinite(loss) else "the head"
