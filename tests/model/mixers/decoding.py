"""Continuation of one document, piece by piece, by the memory that mixers keep of documents."""

from __future__ import annotations

import torch
from torch import Tensor

from mmtrain.model.given_embeddings import GivenEmbeddings
from mmtrain.model.mixers.batch_cache import CacheShape, DocumentBatch
from mmtrain.model.mixers.registry import mixer_spec
from mmtrain.model.model import HybridLM

CPU = torch.device("cpu")


class OneDocument:
    """A document of up to 1,024 tokens.

    Attributes:
        layers: memory of each layer.
        length: tokens that have been read.
    """

    def __init__(self, model: HybridLM) -> None:
        self._model, self.length = model, 0
        self._shape = CacheShape(pages=64, page_tokens=16, slots=1)
        self.layers = [
            mixer_spec(letter).batch_cache_class()(model.config, self._shape, torch.float32, CPU)
            for letter in model.config.layer_types
        ]
        for layer in self.layers:
            layer.begin(0)

    @torch.no_grad()
    def read(self, tokens_T: Tensor, given: GivenEmbeddings | None = None) -> Tensor:
        """Read tokens that follow, some with embeddings of their own, and return their logits [T, V]."""
        count = len(tokens_T)
        self.length += count
        batch = DocumentBatch.of([count], [self.length], [0], [range(64)], self._shape, CPU)
        views = [layer.view(batch) for layer in self.layers]
        return self._model.lm_head(self._model.final_states(tokens_T, batch.packing, views, given))
