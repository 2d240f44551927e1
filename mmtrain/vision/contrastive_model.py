"""The model that trains a vision transformer from nothing: captions of images, and which caption is whose.

Legend: T tokens (all rows of a micro-batch, flattened), C tokens of captions, D width of the language model, N tiles,
Q tokens of a tile, F width of the vision transformer, P pairs of an image and its caption, S pixels of a tile's side,
E width of the space that images and captions share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from mmtrain.config import ModelConfig
from mmtrain.model.given_embeddings import GivenEmbeddings
from mmtrain.model.label_score import LabelScore
from mmtrain.model.model import LossOutput, StageOutput, total_aux_loss
from mmtrain.model.packed_seq import Packing, to_device
from mmtrain.model.preference import PairScore, PreferencePairs
from mmtrain.model.weights import local
from mmtrain.vision.caption_pairs import CaptionPairs, PairedInputs, with_captions
from mmtrain.vision.contrastive import ContrastiveHead
from mmtrain.vision.image_inputs import ImageInputs
from mmtrain.vision.model import VisionLanguageModel

FIGURES = ("contrastive_loss", "image_to_text", "text_to_image", "contrastive_pairs")


@dataclass(frozen=True)
class _Sight:
    """What the eyes made of a micro-batch: mean features [N, F] of each tile's patches, and embeddings of images."""

    pooled_NF: Tensor
    given: GivenEmbeddings


class ContrastiveModel(VisionLanguageModel):
    """A model with eyes whose training loss is that of captions and, by a factor, a contrastive one.

    The caption is predicted after its image, as all text is. For the contrastive loss it must not know the image, so it
    runs through the same layers a second time, as a document of its own behind the rows, in the same pass. CoCa has
    layers that see no image for this; here image and caption are one sequence, and any kind of layer would have to be
    taught to skip a part of it. Captions are the shorter part of a row: 76 tokens at most beside 257 of an image of 224
    pixels, in MiniMax-VL-01's first stage.

    Only training has the contrastive loss: held-out loss and scores are those of captions.
    """

    figures: ClassVar[tuple[str, ...]] = FIGURES

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        vision = config.vision
        assert vision is not None and vision.contrastive is not None
        self.contrastive = ContrastiveHead(vision.contrastive, vision.hidden_size, config.hidden_size)

    def forward(
        self,
        tokens_T: Tensor,
        packing: Packing,
        labels_T: Tensor | None = None,
        rope_base: float | None = None,
        given: GivenEmbeddings | ImageInputs | None = None,
        pairs: PreferencePairs | None = None,
        *,
        score: bool = False,
    ) -> LossOutput | StageOutput | LabelScore | PairScore | Tensor:
        """Return the loss of `labels_T`, the contrastive one among the auxiliary ones, or logits or scores.

        Args:
            tokens_T: int64 [T], with as many placeholders in a row as its images have tokens.
            packing: the documents that the tokens belong to.
            labels_T: next tokens.
            rope_base: RoPE base; None takes the configuration's.
            given: images in the order of their placeholders, with the pairs among them.
            pairs: none in training: preference stages have no contrastive loss (`check_preference`).
            score: return how many of the labels are the argmax in place of the loss.

        Raises:
            ConfigError: the tiles are not those that the images have.
        """
        if not self.training or labels_T is None or score:
            return super().forward(tokens_T, packing, labels_T, rope_base, given, pairs, score=score)
        images = given if isinstance(given, ImageInputs) else None
        shown = given.pairs if isinstance(given, PairedInputs) else CaptionPairs.of([])
        sight, device = self._see(images, tokens_T.device), tokens_T.device
        caption_C = tokens_T.index_select(0, to_device(shown.at_C, device))
        every = with_captions(packing, shown.lengths)
        h_TD, router = self._run_layers(torch.cat([tokens_T, caption_C]), every, rope_base, None, sight.given)
        h_TD = self.norm(h_TD)
        rows = len(tokens_T)
        ce_sum = self.token_loss(h_TD[:rows], local(self.lm_head.weight), labels_T, self.config.loss_chunk_tokens)
        text_PD = h_TD.index_select(0, to_device(_ends(shown.lengths) + rows, device))
        image_PF = sight.pooled_NF.index_select(0, to_device(shown.tile_P, device))
        found = self.contrastive(image_PF, text_PD, self._most_pairs(packing.row_tokens))
        aux_loss = total_aux_loss(router, torch.zeros_like(ce_sum))
        aux_loss = aux_loss + self.config.vision.contrastive.weight * found.loss
        return LossOutput(ce_sum, aux_loss, router, dict(zip(FIGURES, found, strict=True)))

    def embed_images(self, tiles_N3SS: Tensor) -> Tensor:
        """Unit vectors [N, E] of images of one tile each, as the contrastive loss has them.

        Args:
            tiles_N3SS: uint8.
        """
        return self.contrastive.embed_images(_pooled(self.encoder.features(tiles_N3SS)))

    def embed_captions(self, tokens_C: Tensor, lengths: Sequence[int]) -> Tensor:
        """Unit vectors [P, E] of captions, each a document of its own, as the contrastive loss has them.

        Args:
            tokens_C: of one caption after the other, the end of its document last.
            lengths: tokens of each.
        """
        device = tokens_C.device
        h_CD = self.final_states(tokens_C, Packing.from_lengths(list(lengths), device))
        return self.contrastive.embed_texts(h_CD.index_select(0, to_device(_ends(lengths), device)))

    def _see(self, images: ImageInputs | None, device: torch.device) -> _Sight:
        """Look at all images on this rank; at a black tile if there are none.

        Every rank runs the eyes, and has gradients of all their weights: those that share weights must reduce alike.
        """
        size = self.config.vision.tile_size
        layouts = images.images.layouts if images is not None else ()
        if layouts:
            images.images.check(self.config.vision)
            tiles_N3SS = images.images.tiles_N3SS
        else:
            tiles_N3SS = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device)
        x_NQF = self.encoder.features(tiles_N3SS)
        at_J = images.at_J if layouts else torch.empty(0, dtype=torch.int64)
        given = GivenEmbeddings(to_device(at_J, device), self.encoder.embeddings(x_NQF, layouts))
        return _Sight(_pooled(x_NQF), given)

    def _most_pairs(self, tokens: int) -> int:
        """The most pairs in so many tokens: an image has a line of patches and a newline, its caption one token."""
        return max(1, tokens // (self.config.vision.patches + 2))


def _pooled(x_NQF: Tensor) -> Tensor:
    """Mean features [N, F] of each tile's patches, without the class token, which comes first."""
    return x_NQF[:, 1:].mean(1)


def _ends(lengths: Sequence[int]) -> Tensor:
    """Places of the last tokens of documents that lie one after the other, int64."""
    return torch.tensor([end - 1 for end in accumulate(lengths)], dtype=torch.int64)
