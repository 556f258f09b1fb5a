"""The loss of direct preference optimisation (DPO, Rafailov et al. 2023)."""

import torch
import torch.nn.functional as F


def dpo_losses(losses: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each pair (P,), and the margin of its rewards (P,): above 0 it is told right.

    losses: cross-entropies of tokens (4 P, T), 0 where not counted: of the policy on the chosen
    answers and on the rejected ones, then of the reference on both. A reward is `beta` times the
    logarithm of how much likelier an answer is to the policy than to the reference.
    """
    chosen, rejected, base_chosen, base_rejected = (-losses.sum(-1)).chunk(4)
    margins = beta * ((chosen - base_chosen) - (rejected - base_rejected))
    return -F.logsigmoid(margins), margins
