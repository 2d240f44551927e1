"""Log-probabilities of given tokens, and whether they are the likeliest, a few rows of logits at a time.

Legend: T tokens, M tokens that are scored, C of these at a time, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmtrain.model.model import HybridLM


def label_scores(model: HybridLM, h_TD: Tensor, rows_M: Tensor, labels_M: Tensor) -> tuple[Tensor, Tensor]:
    """Return log softmax(W h)[label] of chosen tokens, fp32 [M] (float64 for a float64 model), and argmax == label [M].

    Of equal logits the first is the largest, as in training (`mmtrain.model.label_score`).

    Args:
        model: whose head is W; `loss_chunk_tokens` of its configuration bounds the logits that exist at a time.
        h_TD: final hidden states.
        rows_M: int64, which of them.
        labels_M: int64, the label of each.
    """
    size, wide = model.config.loss_chunk_tokens, torch.promote_types(h_TD.dtype, torch.float32)
    logprobs, likeliest = [h_TD.new_empty(0, dtype=wide)], [labels_M.new_empty(0, dtype=torch.bool)]
    for rows_C, labels_C in zip(rows_M.split(size), labels_M.split(size), strict=True):
        logits_CV = model.lm_head(h_TD[rows_C])
        logprobs.append(token_logprobs(logits_CV, labels_C))
        likeliest.append(logits_CV.argmax(1) == labels_C)
    return torch.cat(logprobs), torch.cat(likeliest)


def token_logprobs(logits_CV: Tensor, tokens_C: Tensor) -> Tensor:
    """Return log softmax(logits)[token] of each row, in fp32 or wider."""
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    return logits_CV.gather(1, tokens_C[:, None])[:, 0] - logits_CV.logsumexp(1)
