"""Log-probabilities of given tokens, and whether they are the likeliest, a few rows of logits at a time.

Legend: T tokens, M tokens that are scored, C of these at a time, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmtrain.infer.serving.document import Document
from mmtrain.infer.serving.generation import TopTokens
from mmtrain.model.model import HybridLM


class LabelScores(NamedTuple):
    """Scores of chosen tokens.

    Attributes:
        logprobs_M: log softmax(W h)[label], fp32 (float64 for a float64 model).
        likeliest_M: bool, argmax == label; of equal logits the first is the largest, as in training
            (`mmtrain.model.label_score`).
        top_M: the likeliest ids in the place of each; empty if none are wanted.
    """

    logprobs_M: Tensor
    likeliest_M: Tensor
    top_M: list[TopTokens]


def label_scores(
    model: HybridLM, h_TD: Tensor, rows_M: Tensor, labels_M: Tensor, top: int = 0, vocab_size: int | None = None
) -> LabelScores:
    """Return the scores of chosen tokens.

    Args:
        model: whose head is W; `loss_chunk_tokens` of its configuration bounds the logits that exist at a time.
        h_TD: final hidden states.
        rows_M: int64, which of them.
        labels_M: int64, the label of each.
        top: so many of the likeliest ids of each row; the list is empty if none are wanted.
        vocab_size: ids of the tokenizer; those above are none of the likeliest.
    """
    size, wide = model.config.loss_chunk_tokens, torch.promote_types(h_TD.dtype, torch.float32)
    logprobs, likeliest = [h_TD.new_empty(0, dtype=wide)], [labels_M.new_empty(0, dtype=torch.bool)]
    top_M: list[TopTokens] = []
    for rows_C, labels_C in zip(rows_M.split(size), labels_M.split(size), strict=True):
        logits_CV = model.lm_head(h_TD[rows_C])
        logprobs.append(token_logprobs(logits_CV, labels_C))
        likeliest.append(logits_CV.argmax(1) == labels_C)
        top_M += top_tokens(logits_CV, top, vocab_size)
    return LabelScores(torch.cat(logprobs), torch.cat(likeliest), top_M)


def note_scores(scored: Sequence[tuple[Document, int]], scores: LabelScores) -> None:
    """Add scores to what documents have made: documents with their numbers of scores, in the order of these."""
    logprobs, likeliest, first = scores.logprobs_M.tolist(), scores.likeliest_M.tolist(), 0
    for document, tokens in scored:
        document.made.prompt_logprobs += logprobs[first : first + tokens]
        document.made.prompt_likeliest += likeliest[first : first + tokens]
        if count := document.request.top_logprobs:
            document.made.prompt_top_logprobs += [top[:count] for top in scores.top_M[first : first + tokens]]
        first += tokens


def token_logprobs(logits_CV: Tensor, tokens_C: Tensor) -> Tensor:
    """Return log softmax(logits)[token] of each row, in fp32 or wider."""
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    return logits_CV.gather(1, tokens_C[:, None])[:, 0] - logits_CV.logsumexp(1)


def top_tokens(logits_CV: Tensor, count: int, vocab_size: int | None = None) -> list[TopTokens]:
    """Return the likeliest ids of each row with their log-probabilities; nothing if `count` is 0.

    They are computed as :func:`token_logprobs` does, so that the likeliest id has the same number in both.
    """
    if not count:
        return []
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    known_CV = logits_CV[:, :vocab_size]
    best_CK, ids_CK = known_CV.topk(min(count, known_CV.shape[1]), dim=1)
    best_CK = best_CK - logits_CV.logsumexp(1)[:, None]
    return [list(zip(*row, strict=True)) for row in zip(ids_CK.tolist(), best_CK.tolist(), strict=True)]
