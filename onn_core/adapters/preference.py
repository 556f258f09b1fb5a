"""Direct preference optimisation (DPO, Rafailov et al. 2023) in one visit of each layer.

A batch of P pairs has its chosen answers, then its rejected ones (2 P, T). The model runs them
twice, first with its adapter (the policy), then without (the reference), and a layer that is
resident takes both: the reference costs no second read of the weights. It has no gradient, so its
rows are not recomputed in backward.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from onn_core.adapters.by_rows import by_rows, find_tuners, repeated
from onn_core.ops.cross_entropy import IGNORED
from onn_core.streaming.model import StreamedModel

N_ROWS = 4  # of a pair, in a visit: chosen and rejected, of policy and reference


@dataclasses.dataclass(frozen=True)
class PairsOutput:
    """loss: summed over the pairs and divided by their number. n_right: pairs told right."""

    loss: torch.Tensor
    n_right: int


def run_pairs(
    model: Any, base: StreamedModel, batch: dict[str, torch.Tensor], beta: float, n_pairs: int
) -> PairsOutput:
    """The DPO loss (Rafailov et al. 2023) of a batch (2 P, T) with labels, divided by `n_pairs`.

    A pair without any label adds nothing. model: a PeftModel of the streamed `base`, whose
    adapters are in its layers.
    """
    n_rows = len(batch["labels"])
    with by_rows(base, n_rows, [True, False], n_graded=n_rows):
        losses = base.token_losses(model, repeated(batch, 2, base.device))  # (4 P, T)
    # Of each pair (P,): log-likelihoods of its answers, and the margin of their rewards. A reward
    # is beta times the log of how much likelier an answer is to the policy than to the reference.
    chosen, rejected, base_chosen, base_rejected = (-losses.sum(-1)).chunk(4)
    margins = beta * ((chosen - base_chosen) - (rejected - base_rejected))
    counts = (batch["labels"] != IGNORED).any(-1).view(2, -1).any(0).to(losses.device)  # (P,)
    return PairsOutput((-F.logsigmoid(margins) * counts).sum() / n_pairs, int((margins > 0).sum()))


def train_adapters_only(model: nn.Module) -> None:
    """Training mode for what adapters drop out; the model's own dropout is off, as in TRL.

    A reference that drops out would compare the policy with noise.
    """
    model.eval()
    for tuner in find_tuners(model):
        tuner.train()
