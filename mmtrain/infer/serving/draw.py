"""Choice of the next token of many documents at once, on the device of their logits.

Each row is treated by its own rule with its own random number, so that a document gets the same token alone and beside
any others (up to a rounding of its logits).

Legend: N documents, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmtrain.infer.sampling import Sampling


def draw_tokens(logits_NV: Tensor, rules: Sequence[Sampling], uniform_N: Sequence[float]) -> Tensor:
    """Return an id for each row of logits, int64 [N].

    Of equal logits the lower ids come first, so that `top_k` keeps exactly k. The penalty of repetition is not applied
    here: it needs what came before.

    Args:
        logits_NV: any floating dtype; at least one of a row is finite, others may be -inf: never chosen.
        rules: one a row.
        uniform_N: a number from [0, 1) a row; greedy rows do not use theirs.
    """
    chosen_N = logits_NV.argmax(1)
    width = logits_NV.shape[1]
    sampled = [n for n, rule in enumerate(rules) if rule.temperature > 0 and rule.top_k != 1]
    narrow = [n for n in sampled if (rules[n].top_k or width) < width or (rules[n].top_p or 1.0) < 1.0]
    wide = [n for n in sampled if n not in set(narrow)]
    for rows, pick in ((wide, _pick), (narrow, _pick_narrow)):
        if rows:
            index = torch.tensor(rows, device=logits_NV.device)
            chosen_N[index] = pick(_scaled(logits_NV[index], [rules[n] for n in rows]), [rules[n] for n in rows],
                                   logits_NV.new_tensor([uniform_N[n] for n in rows], dtype=torch.float64))  # fmt: skip
    return chosen_N


def penalise_repetition(logits_V: Tensor, seen_V: Tensor, penalty: float) -> Tensor:
    """Return logits in which those of ids that came before are less likely: over the penalty, or times it below 0.

    Keskar et al. 2019 (CTRL), section 4.1, with negative logits treated as transformers does.
    """
    less_V = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
    return torch.where(seen_V, less_V, logits_V)


def _scaled(logits_NV: Tensor, rules: list[Sampling]) -> Tensor:
    # The largest is 0 and the others are below, so that no temperature, however small, gives NaN.
    temperature_N = torch.tensor([rule.temperature for rule in rules], dtype=torch.float64, device=logits_NV.device)
    logits_NV = logits_NV.double()
    return (logits_NV - logits_NV.amax(1, keepdim=True)) / temperature_N[:, None]


def _pick(scaled_NV: Tensor, rules: list[Sampling], uniform_N: Tensor) -> Tensor:
    return _invert(scaled_NV.softmax(1), uniform_N)


def _pick_narrow(scaled_NV: Tensor, rules: list[Sampling], uniform_N: Tensor) -> Tensor:
    """Among the likeliest alone, which are sorted for it."""
    width = scaled_NV.shape[1]
    sorted_NV, order_NV = scaled_NV.sort(dim=1, descending=True, stable=True)
    top_k_N1 = torch.tensor([[rule.top_k or width] for rule in rules], device=scaled_NV.device)
    top_p_N1 = torch.tensor([[rule.top_p or 1.0] for rule in rules], dtype=torch.float64, device=scaled_NV.device)
    rank_V = torch.arange(width, device=scaled_NV.device)
    prob_NV = sorted_NV.masked_fill(rank_V >= top_k_N1, -torch.inf).softmax(1)
    before_NV = prob_NV.cumsum(1) - prob_NV  # the token that reaches top_p is kept
    before_NV[:, 0] = 0.0
    out_NV = (before_NV >= top_p_N1) & (top_p_N1 < 1.0)
    return order_NV.gather(1, _invert(prob_NV.masked_fill(out_NV, 0.0), uniform_N)[:, None])[:, 0]


def _invert(prob_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """Index at which the sum of the probabilities passes the random number; its own is never 0."""
    sum_NV = prob_NV.cumsum(1)
    total_N = sum_NV[:, -1]
    target_N = torch.minimum(uniform_N * total_N, torch.nextafter(total_N, torch.zeros_like(total_N)))
    return torch.searchsorted(sum_NV, target_N[:, None], right=True)[:, 0]
