"""The table of token embeddings.

Legend: T tokens, S tokens that this process goes on with (T, unless they are shared out), V vocabulary, D model width.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from mmkernels.embedding import add_embedding_grad
from mmtrain.model.gradient_sum import gradient_sum_of
from mmtrain.model.initial import XAVIER, Initial
from mmtrain.model.weights import local


class EmbeddingLookup(Protocol):
    """Lookup of tokens' rows in the table, which may lie on several ranks."""

    def __call__(self, tokens_T: Tensor, weight_VD: Tensor) -> Tensor:
        """Return the embeddings [S, D] of int64 tokens, given this process's rows of the table, in its dtype."""


class LocalLookup:
    """The whole table lies on this device."""

    def __call__(self, tokens_T: Tensor, weight_VD: Tensor) -> Tensor:
        """Return the embeddings of all T tokens."""
        if gradient_sum_of(weight_VD) is None or not weight_VD.requires_grad:
            return F.embedding(tokens_T, weight_VD)
        return _Lookup.apply(tokens_T, weight_VD)


class _Lookup(torch.autograd.Function):
    """Lookup whose gradient is added to the table's sum where its tokens' rows are, and not made as a table."""

    @staticmethod
    def forward(ctx: FunctionCtx, tokens_T: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_T)
        ctx.total_VD = gradient_sum_of(weight_VD)
        return F.embedding(tokens_T, weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_TD: Tensor) -> tuple[None, None]:
        (tokens_T,) = ctx.saved_tensors
        add_embedding_grad(ctx.total_VD, tokens_T, dy_TD)
        return None, None


class Embedding(nn.Module):
    """One row of width D for every token of the vocabulary.

    Attributes:
        lookup: finds the rows; vocabulary parallelism puts another in its place.
    """

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.initial: dict[str, Initial] = {"weight": XAVIER}
        self.lookup: EmbeddingLookup = LocalLookup()

    def forward(self, tokens_T: Tensor) -> Tensor:
        """Return the embeddings [S, D] of int64 tokens [T]."""
        return self.lookup(tokens_T, local(self.weight))

    def extra_repr(self) -> str:
        """Vocabulary and width, for printing the module."""
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"
