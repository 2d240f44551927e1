"""Embeddings that are given from outside, for some of a micro-batch's tokens, in place of those of the table.

Legend: T tokens, I tokens whose embeddings are given, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class GivenInputs(Protocol):
    """What some tokens of a micro-batch have in place of ids: something that a model makes their embeddings of."""

    def cut(self, index_S: Tensor) -> GivenInputs:
        """That of the tokens `index_S` (int64 on the host) of the micro-batch, by their places there."""


@dataclass(frozen=True)
class GivenEmbeddings:
    """Rows that take the place of the table's.

    Attributes:
        at_I: int64 [I], the tokens whose embeddings they are, each once, among those that this process goes on with.
        rows_ID: of any float dtype; gradients reach them, and none reaches the table's rows that they replace.
    """

    at_I: Tensor
    rows_ID: Tensor

    def put(self, h_TD: Tensor) -> Tensor:
        """Return the embeddings of all tokens, [T, D] of the table's dtype, with these in their places."""
        return h_TD.index_copy(0, self.at_I, self.rows_ID.to(h_TD.dtype))
