"""The language model: embedding, layers, norm, head, loss.

Legend: T tokens (all rows of a micro-batch, flattened), D model width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmtrain.config import ModelConfig
from mmtrain.model.block import Block
from mmtrain.model.embedding import Embedding
from mmtrain.model.linear import Linear
from mmtrain.model.loss import LossCall, linear_cross_entropy
from mmtrain.model.mixers.cache import DecodeCache
from mmtrain.model.mixers.registry import check_layer_pattern
from mmtrain.model.moe.router import RouterStats
from mmtrain.model.norm import RMSNorm
from mmtrain.model.packed_seq import Packing
from mmtrain.model.rope import rope_table
from mmtrain.model.weights import local


class LossOutput(NamedTuple):
    """What a training step needs of a micro-batch.

    Attributes:
        ce_sum: scalar, cross-entropy summed over labelled tokens, in nats.
        aux_loss: scalar, auxiliary losses summed over layers, coefficients included; 0 without experts.
        router: one entry a layer of experts.
    """

    ce_sum: Tensor
    aux_loss: Tensor
    router: list[RouterStats]


class StageOutput(NamedTuple):
    """What some of the layers, without the head, made of a micro-batch.

    Attributes:
        h_TD: hidden states.
        aux_loss: scalar, auxiliary losses of these layers.
        router: one entry a layer of experts.
    """

    h_TD: Tensor
    aux_loss: Tensor
    router: list[RouterStats]


class HybridLM(nn.Module):
    """A decoder of lightning and softmax layers with a mixture of experts in each (MiniMax-01 section 2).

    It runs without its embedding, some of its layers, or its norm and head too: what is taken away is None, and
    `layers` keeps the numbers of those that stay.

    Attributes:
        rope_base: RoPE base; phases of training set it.
        token_loss: what turns final hidden states, the head's weight and labels into a sum; vocabulary parallelism
            puts another in its place.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        check_layer_pattern(config)
        self.config = config
        self.rope_base = config.rope_base
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.token_loss: LossCall = linear_cross_entropy

    def forward(
        self, tokens_T: Tensor, packing: Packing, labels_T: Tensor | None = None, cache: DecodeCache | None = None
    ) -> LossOutput | StageOutput | Tensor:
        """Return the loss of `labels_T` (int64 [T], -100 ignored), or without labels the logits [T, V].

        Without norm and head it returns hidden states.

        Args:
            tokens_T: int64 [T]; without an embedding, hidden states [T, D].
            packing: the documents that the tokens belong to.
            labels_T: next tokens.
            cache: what decoding remembers; the tokens continue its one document, and it is updated in place.
        """
        h_TD = tokens_T if self.embed_tokens is None else self.embed_tokens(tokens_T)
        rope = rope_table(packing.position_ids_T, self.config.rotary_dim, self.rope_base)
        router: list[RouterStats] = []
        for i, layer in enumerate(self.layers):
            h_TD, stats = layer(h_TD, packing, rope, None if cache is None else cache.layers[i])
            if stats is not None:
                router.append(stats)
        if cache is not None:
            cache.length += tokens_T.shape[0]
        if self.norm is None:
            return StageOutput(h_TD, _total(router, h_TD.new_zeros((), dtype=torch.float32)), router)
        h_TD = self.norm(h_TD)
        if labels_T is None:
            return self.lm_head(h_TD)
        ce_sum = self.token_loss(h_TD, local(self.lm_head.weight), labels_T, self.config.loss_chunk_tokens)
        return LossOutput(ce_sum, _total(router, torch.zeros_like(ce_sum)), router)


def _total(router: list[RouterStats], zero: Tensor) -> Tensor:
    return sum((stats.aux_loss for stats in router), start=zero)
