"""The definition of the embedding's gradient, in float64. It is the oracle of every backend.

Legend: T tokens, V rows of the table, D columns.
"""

from __future__ import annotations

from torch import Tensor


def naive_add_embedding_grad(total_VD: Tensor, tokens_T: Tensor, dy_TD: Tensor) -> Tensor:
    """Return ``total + onehot(tokens)^T dy`` as a new float64 tensor; a token outside of [0, V) adds nothing."""
    own_T = (tokens_T >= 0) & (tokens_T < total_VD.shape[0])
    return total_VD.double().index_add(0, tokens_T[own_T], dy_TD[own_T].double())
