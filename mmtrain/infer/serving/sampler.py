"""The next token of documents: what their requests forbid and ask for, applied to their logits.

Legend: N documents, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmtrain.errors import ConfigError
from mmtrain.infer.serving.document import Document
from mmtrain.infer.serving.draw import draw_tokens, penalise_repetition
from mmtrain.infer.serving.generation import TopTokens
from mmtrain.infer.serving.largest import Largest
from mmtrain.infer.serving.ranks import ALONE, Ranks
from mmtrain.infer.serving.scoring import token_logprobs, top_tokens
from mmtrain.model.packed_seq import to_device


class Choices(NamedTuple):
    """The tokens that follow documents, in their order, and what the requests want to know of them.

    Attributes:
        tokens: ids.
        logprobs: their log-probabilities by the model itself; None where no request wants any.
        top: the likeliest tokens in the place of each; None likewise.
    """

    tokens: list[int]
    logprobs: Sequence[float | None]
    top: Sequence[TopTokens | None]


class Sampler:
    """Rules that hold for all requests of an engine.

    Args:
        vocab_size: ids of the tokenizer; the model's above it are never chosen.
        eod_id: end of a document, which requests may ignore; None where there is none.
        ranks: processes that choose the same.
    """

    def __init__(self, vocab_size: int, eod_id: int | None, ranks: Ranks = ALONE) -> None:
        self._vocab_size, self._eod_id, self._ranks = vocab_size, eod_id, ranks
        self._largest = Largest(vocab_size, ranks)

    @torch.no_grad()
    def choose(self, documents: list[Document], logits_NV: Tensor) -> Choices:
        """Choose a token for each document; its own random numbers go on by one.

        Args:
            documents: whose requests say how.
            logits_NV: of the token after each, on any device.

        Raises:
            ConfigError: they are not finite numbers.
        """
        nothing = [None] * len(documents)
        if all(document.request.takes_largest for document in documents) and not self._is_endless(documents):
            tokens, are_finite = self._largest.find(logits_NV)
            _check(are_finite)
            return Choices(tokens, nothing, nothing)
        _check(bool(torch.isfinite(torch.stack(logits_NV.aminmax())).all()))  # a NaN anywhere is in both extremes
        tokens_N = self._ranks.of_first(self._draw(documents, logits_NV))
        tokens = tokens_N.tolist()
        if not any(document.request.logprobs for document in documents):
            return Choices(tokens, nothing, nothing)
        logprobs = token_logprobs(logits_NV, tokens_N).tolist()
        top = max(document.request.top_logprobs for document in documents)
        return Choices(tokens, logprobs, top_tokens(logits_NV, top, self._vocab_size) or nothing)

    def _is_endless(self, documents: list[Document]) -> bool:
        """Whether the end of a document must not follow one of them."""
        return self._eod_id is not None and any(document.request.ignore_eod for document in documents)

    def _draw(self, documents: list[Document], logits_NV: Tensor) -> Tensor:
        """The ids that follow by each document's own rule, int64 [N]."""
        ready_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32), copy=True)
        for n, document in enumerate(documents):
            if document.request.sampling.repetition_penalty != 1:
                _penalise(document, ready_NV[n])
        if self._is_endless(documents):
            endless = [n for n, document in enumerate(documents) if document.request.ignore_eod]
            ready_NV[to_device(torch.tensor(endless), ready_NV.device), self._eod_id] = -torch.inf
        ready_NV[:, self._vocab_size :] = -torch.inf
        uniform_N = [document.next_uniform() for document in documents]
        return draw_tokens(ready_NV, [document.request.sampling for document in documents], uniform_N)


def _check(finite: bool) -> None:
    if not finite:
        raise ConfigError("checkpoint", "its weights", "give logits that are not finite numbers: its run diverged",
                          "take an earlier checkpoint")  # fmt: skip


def _penalise(document: Document, logits_V: Tensor) -> None:
    """Make ids that came before less likely, in place."""
    if document.seen_V is None:
        document.seen_V = torch.zeros(len(logits_V), dtype=torch.bool, device=logits_V.device)
        document.seen_V[torch.tensor(document.tokens, device=logits_V.device)] = True
    document.seen_V[document.tokens[-1]] = True
    logits_V.copy_(penalise_repetition(logits_V, document.seen_V, document.request.sampling.repetition_penalty))
