"""The language model: embedding, layers, norm, head, loss.

Legend: T tokens (all rows of a micro-batch, flattened), D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mmtrain.config import ModelConfig
from mmtrain.model.block import Block
from mmtrain.model.document_score import DocumentScoreCall, document_log_probs
from mmtrain.model.embedding import Embedding
from mmtrain.model.given_embeddings import GivenEmbeddings, GivenInputs
from mmtrain.model.label_score import LabelScore, ScoreCall, score_labels
from mmtrain.model.linear import Linear
from mmtrain.model.loss import LossCall, linear_cross_entropy
from mmtrain.model.mixers.registry import check_layer_pattern
from mmtrain.model.moe.router import RouterStats
from mmtrain.model.norm import RMSNorm
from mmtrain.model.packed_seq import Packing
from mmtrain.model.preference import PairScore, PreferencePairs, pair_scores, preference_loss, told_once
from mmtrain.model.rope import rope_table
from mmtrain.model.weights import local

NO_FIGURES: Mapping[str, Tensor] = MappingProxyType({})


class ModelInputs(NamedTuple):
    """Arguments of a training or validation pass over one micro-batch.

    Attributes:
        tokens_T: int64 [T].
        packing: the documents that the tokens belong to.
        labels_T: int64 [T], next tokens, -100 ignored.
        rope_base: of the softmax layers; phases of training have bases of their own.
        given: what some of the tokens have in place of ids; None: all are text.
        pairs: preference pairs among the documents, whose loss is wanted; None: that of the labels is.
    """

    tokens_T: Tensor
    packing: Packing
    labels_T: Tensor
    rope_base: float
    given: GivenInputs | None = None
    pairs: PreferencePairs | None = None


class LossOutput(NamedTuple):
    """Losses of a micro-batch, and figures of its routing.

    Attributes:
        ce_sum: scalar, cross-entropy summed over labelled tokens, or the loss summed over preference pairs, in nats.
        aux_loss: scalar, auxiliary losses summed over layers, coefficients included; 0 without experts.
        router: one entry a layer of experts.
        figures: scalars of the model's own, by the names of its `figures`, of which the step has the mean over
            micro-batches.
        preference: of pairs, `PreferenceLoss.figures`; the same on ranks that share their rows.
    """

    ce_sum: Tensor
    aux_loss: Tensor
    router: list[RouterStats]
    figures: Mapping[str, Tensor] = NO_FIGURES
    preference: Tensor | None = None


class StageOutput(NamedTuple):
    """Output of some of the layers, without the head, for a micro-batch.

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

    It runs without its embedding, some of its layers, or its norm and head too (:meth:`prune`).

    Attributes:
        token_loss: turns final hidden states, the head's weight and labels into a sum; vocabulary parallelism puts
            another in its place.
        figures: names of what a training pass tells besides its losses; none here.
        label_score: turns the same into the score of the labels; vocabulary parallelism replaces it likewise.
        document_score: turns the same, with the number of each token's document, into log-probabilities of documents;
            vocabulary and context parallelism replace it.
    """

    figures: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        check_layer_pattern(config)
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.token_loss: LossCall = linear_cross_entropy
        self.label_score: ScoreCall = score_labels
        self.document_score: DocumentScoreCall = document_log_probs

    def forward(
        self,
        tokens_T: Tensor,
        packing: Packing,
        labels_T: Tensor | None = None,
        rope_base: float | None = None,
        given: GivenEmbeddings | None = None,
        pairs: PreferencePairs | None = None,
        *,
        score: bool = False,
    ) -> LossOutput | StageOutput | LabelScore | PairScore | Tensor:
        """Return the loss of `labels_T` (int64 [T], -100 ignored) or of `pairs`, or without labels the logits [T, V].

        Without norm and head it returns hidden states.

        Args:
            tokens_T: int64 [T]; without an embedding, hidden states [T, D].
            packing: the documents that the tokens belong to.
            labels_T: next tokens.
            rope_base: RoPE base; None takes the configuration's.
            given: embeddings that some of the tokens have in place of the table's; nothing without an embedding.
            pairs: preference pairs among the documents; their loss is that of their labels' log-probabilities.
            score: return how many of the labels are the argmax (:class:`LabelScore`) in place of the loss, or of pairs
                the log-probabilities (:class:`PairScore`).
        """
        h_TD, router = self._run_layers(tokens_T, packing, rope_base, None, given)
        if self.norm is None:
            return StageOutput(h_TD, total_aux_loss(router, h_TD.new_zeros((), dtype=torch.float32)), router)
        h_TD = self.norm(h_TD)
        if labels_T is None:
            return self.lm_head(h_TD)
        if pairs is not None:
            return self._preference(h_TD, router, packing, labels_T, pairs, score=score)
        head = local(self.lm_head.weight), labels_T, self.config.loss_chunk_tokens
        if score:
            return self.label_score(h_TD, *head)
        ce_sum = self.token_loss(h_TD, *head)
        return LossOutput(ce_sum, total_aux_loss(router, torch.zeros_like(ce_sum)), router)

    def _preference(
        self,
        h_TD: Tensor,
        router: list[RouterStats],
        packing: Packing,
        labels_T: Tensor,
        pairs: PreferencePairs,
        *,
        score: bool,
    ) -> LossOutput | PairScore:
        """The loss of preference pairs, or their log-probabilities, of final hidden states."""
        log_prob_N = self.document_score(
            h_TD, local(self.lm_head.weight), labels_T, packing.document_T, packing.num_documents,
            self.config.loss_chunk_tokens,
        )  # fmt: skip
        found = pair_scores(log_prob_N, pairs)
        if score:
            return found
        loss = preference_loss(found, pairs)
        total = told_once(loss.loss, packing.speaks_for_rows).to(torch.promote_types(h_TD.dtype, torch.float32))
        return LossOutput(total, total_aux_loss(router, torch.zeros_like(total)), router, preference=loss.figures)

    def final_states(
        self,
        tokens_T: Tensor,
        packing: Packing,
        caches: Sequence[Any] | None = None,
        given: GivenEmbeddings | None = None,
    ) -> Tensor:
        """Return the normed hidden states [T, D], of which `lm_head` makes the logits of those tokens that need any.

        Args:
            tokens_T: int64 [T].
            packing: the documents that the tokens belong to.
            caches: what each layer's mixer remembers of documents that the tokens continue; updated in place.
            given: embeddings that some of the tokens have in place of the table's.
        """
        return self.norm(self._run_layers(tokens_T, packing, None, caches, given)[0])

    def _run_layers(
        self,
        tokens_T: Tensor,
        packing: Packing,
        rope_base: float | None,
        caches: Sequence[Any] | None = None,
        given: GivenEmbeddings | None = None,
    ) -> tuple[Tensor, list[RouterStats]]:
        h_TD = tokens_T if self.embed_tokens is None else self.embed_tokens(tokens_T)
        if given is not None and self.embed_tokens is not None:
            h_TD = given.put(h_TD)
        rope = rope_table(packing.position_ids_T, self.config.rotary_dim, rope_base or self.config.rope_base)
        router: list[RouterStats] = []
        for i, layer in enumerate(self.layers):
            h_TD, stats = layer(h_TD, packing, rope, None if caches is None else caches[i])
            if stats is not None:
                router.append(stats)
        return h_TD, router

    def prune(self, layers: set[int], *, embedding: bool, head: bool) -> None:
        """Take away all layers but `layers`, and the embedding, or norm and head, unless they are to stay.

        Parts that are gone are None; layers and parameters that stay keep their numbers and names.
        """
        for number in self.layer_numbers:
            if number not in layers:
                delattr(self.layers, str(number))  # unlike `del self.layers[i]`, others keep their names
        if not embedding:
            self.embed_tokens = None
        if not head:
            self.norm = self.lm_head = None

    @property
    def layer_numbers(self) -> list[int]:
        """Numbers, in the whole model, of the layers that are here."""
        return [int(name) for name, _ in self.layers.named_children()]


def total_aux_loss(router: list[RouterStats], zero: Tensor) -> Tensor:
    """Return the auxiliary losses of all layers, summed from the first to the last, given a zero of their type."""
    return sum((stats.aux_loss for stats in router), start=zero)
