"""The next token of documents: what their requests forbid and ask for, applied to their logits.

Legend: N documents, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmtrain.errors import ConfigError
from mmtrain.infer.serving.document import Document
from mmtrain.infer.serving.draw import draw_tokens, penalise_repetition
from mmtrain.infer.serving.generation import TopTokens
from mmtrain.infer.serving.ranks import ALONE, Ranks
from mmtrain.infer.serving.scoring import token_logprobs, top_tokens


class Choice(NamedTuple):
    """The token that follows a document, its log-probability by the model itself, and the likeliest tokens.

    The latter two are None where the request does not want them.
    """

    token: int
    logprob: float | None
    top: TopTokens | None = None


class Sampler:
    """Rules that hold for all requests of an engine.

    Args:
        vocab_size: ids of the tokenizer; the model's above it are never chosen.
        eod_id: end of a document, which requests may ignore; None where there is none.
        ranks: processes that choose the same.
    """

    def __init__(self, vocab_size: int, eod_id: int | None, ranks: Ranks = ALONE) -> None:
        self._vocab_size, self._eod_id, self._ranks = vocab_size, eod_id, ranks

    @torch.no_grad()
    def choose(self, documents: list[Document], logits_NV: Tensor) -> list[Choice]:
        """Choose a token for each document; its own random numbers go on by one.

        Args:
            documents: whose requests say how.
            logits_NV: of the token after each, on any device.

        Raises:
            ConfigError: they are not finite numbers.
        """
        if not torch.isfinite(logits_NV).all():
            raise ConfigError("checkpoint", "its weights", "give logits that are not finite numbers: its run diverged",
                              "take an earlier checkpoint")  # fmt: skip
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        ready_NV = logits_NV.clone()
        for n, document in enumerate(documents):
            self._apply_request(document, ready_NV[n])
        ready_NV[:, self._vocab_size :] = -torch.inf
        uniform_N = [document.next_uniform() for document in documents]
        tokens_N = draw_tokens(ready_NV, [one.request.sampling for one in documents], uniform_N)
        tokens_N = self._ranks.of_first(tokens_N)
        tokens = tokens_N.tolist()
        if not any(document.request.logprobs for document in documents):
            return [Choice(token, None) for token in tokens]
        logprobs = token_logprobs(logits_NV, tokens_N).tolist()
        top = max(document.request.top_logprobs for document in documents)
        likeliest = top_tokens(logits_NV, top, self._vocab_size) or [None] * len(documents)
        return [Choice(*parts) for parts in zip(tokens, logprobs, likeliest, strict=True)]

    def _apply_request(self, document: Document, logits_V: Tensor) -> None:
        """Change a row of logits, in place, as one request wants it."""
        request = document.request
        penalty = request.sampling.repetition_penalty
        if penalty != 1:
            if document.seen_V is None:
                document.seen_V = torch.zeros(len(logits_V), dtype=torch.bool, device=logits_V.device)
                document.seen_V[torch.tensor(document.tokens, device=logits_V.device)] = True
            document.seen_V[document.tokens[-1]] = True
            logits_V.copy_(penalise_repetition(logits_V, document.seen_V, penalty))
        if request.ignore_eod and self._eod_id is not None:
            logits_V[self._eod_id] = -torch.inf
