"""Context parallelism, applied to a whole model: its mixers meet the other tokens of a row on other ranks.

A rank has the same chunks of a row in every layer, and nothing but the states of lightning layers, and the keys and
values of softmax layers, travels (`lightning_cp`, `softmax_cp`).

Legend: S tokens of this rank, H heads, G key/value heads, K head dimension, X = 3 K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup

from mmtrain.model.document_score import DocumentScoreCall
from mmtrain.model.model import HybridLM
from mmtrain.model.packed_seq import Packing
from mmtrain.parallel.collectives import sum_alike
from mmtrain.parallel.context.lightning_cp import begin_context_lightning
from mmtrain.parallel.context.row_shard import ContextPacking
from mmtrain.parallel.context.softmax_cp import context_softmax
from mmtrain.parallel.context.state_exchange import StateExchange


def apply_context_parallel(model: HybridLM, group: ProcessGroup, softmax: str, states: str) -> StateExchange:
    """Let every mixer of a (meta) model attend to the tokens of all ranks of a group that are in its documents.

    Args:
        softmax: how keys and values travel, see `parallel.cp_softmax`.
        states: how states travel, see `parallel.cp_states`.

    Returns:
        What holds memory for the states, to be closed.
    """
    exchange = StateExchange(group, states)
    call = ContextAttention(group, softmax, exchange)
    for block in model.layers:
        block.mixer.attention = call
    model.document_score = SharedDocuments(model.document_score, group)
    return exchange


@dataclass(frozen=True)
class SharedDocuments:
    """The model's `DocumentScoreCall` where the tokens of a document lie on several ranks.

    Attributes:
        score: sums over the documents' tokens on one rank.
        group: the ranks that share rows.
    """

    score: DocumentScoreCall
    group: ProcessGroup

    def __call__(
        self, x_SD: Tensor, weight_VD: Tensor, labels_S: Tensor, document_S: Tensor, documents: int, chunk_tokens: int
    ) -> Tensor:
        """Sum over the tokens of all ranks, which all go on with the same sums: each has its own tokens' gradient."""
        return sum_alike(self.score(x_SD, weight_VD, labels_S, document_S, documents, chunk_tokens), self.group)


@dataclass(frozen=True)
class ContextAttention:
    """Both kinds of attention over rows whose chunks lie on the ranks of a group."""

    group: ProcessGroup
    softmax_way: str
    exchange: StateExchange

    def begin_lightning(self, qkv_SHX: Tensor, slopes_H: Tensor, packing: Packing) -> Callable[[], Tensor]:
        """Send the states that this rank's chunks leave on their way; the attention waits for those of the others."""
        assert isinstance(packing, ContextPacking)
        return begin_context_lightning(qkv_SHX, slopes_H, packing, self.exchange)

    def softmax(self, q_SHK: Tensor, k_SGK: Tensor, v_SGK: Tensor, packing: Packing) -> Tensor:
        """Return the attention of this rank's queries to all keys of their documents, [S, H, K]."""
        assert isinstance(packing, ContextPacking)
        return context_softmax(q_SHK, k_SGK, v_SGK, packing, self.group, self.softmax_way)
