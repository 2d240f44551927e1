"""The definitions of both functions in plain torch, differentiated by autograd; also the CPU's path.

Legend: T and N tokens, D model width, E experts.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def naive_router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """The product x @ weight^T in fp32, [T, E]; autograd saves an fp32 copy of x."""
    return F.linear(x_TD.float(), weight_ED)


def naive_balance_stats(logits_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over tokens of the softmax, [E], and of its entropy in nats, a detached scalar; zeros without tokens."""
    tokens = max(logits_NE.shape[0], 1)
    log_prob_NE = logits_NE.log_softmax(-1)
    prob_NE = log_prob_NE.exp()
    return prob_NE.sum(0) / tokens, -(prob_NE.detach() * log_prob_NE.detach()).sum() / tokens
