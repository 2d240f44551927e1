"""The contrastive loss of images and captions: each is to be nearest to its own among all of a batch.

It is CLIP's symmetric InfoNCE (Radford et al., 2021, figure 3), which CoCa adds to the captions' loss (Yu et al., 2022,
section 3.2). The batch is that of all ranks which share a step: each computes the logits of its own images and captions
with everybody's.

Legend: P pairs of this rank, M the most that it can have, W ranks, A = W M, E width of the shared space, F of the
vision transformer, D of the language model.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.config import ContrastiveConfig
from mmtrain.model.initial import XAVIER, Constant, Initial
from mmtrain.model.weights import local

LARGEST_SCALE = 100.0
"""The largest factor of cosines (1 / temperature): CLIP clips there, for stability (Radford et al., section 2.5)."""


class PairRanks(Protocol):
    """The ranks whose pairs are one batch.

    Attributes:
        ranks: W.
        rank: this one among them.
    """

    ranks: int
    rank: int

    def gather(self, x_ME: Tensor) -> Tensor:
        """Rows of all ranks, [W M, E], in their order; backward sums the ranks' gradients of this rank's rows."""


class OneRank:
    """A rank that is alone."""

    ranks, rank = 1, 0

    def gather(self, x_ME: Tensor) -> Tensor:
        """The rows themselves."""
        return x_ME


class ContrastiveLoss(NamedTuple):
    """Loss of the pairs of all ranks: the mean over ranks of what each has here.

    Attributes:
        loss: scalar in nats, with autograd's graph; 0 where no rank has a pair.
        image_to_text: scalar, share of the images whose own caption is the nearest, of equal ones the first.
        text_to_image: scalar, share of the captions whose own image is.
        pairs: scalar, the number of pairs of all ranks.
    """

    loss: Tensor
    image_to_text: Tensor
    text_to_image: Tensor
    pairs: Tensor


class ContrastiveHead(nn.Module):
    """Linear maps of images and of captions into one space, and the temperature of their cosines.

    It computes in the type of its weights, which layouts leave in fp32: the scale has steps of 1% in bf16.

    Args:
        config: of the loss.
        vision_width: F.
        hidden_size: D.

    Attributes:
        pair_ranks: the ranks whose pairs are one batch; layouts put theirs in its place.
    """

    def __init__(self, config: ContrastiveConfig, vision_width: int, hidden_size: int) -> None:
        super().__init__()
        # Names of parameters seed their initial weights and key checkpoints (`mmtrain.model.init`): do not rename.
        self.image_EF = nn.Parameter(torch.empty(config.size, vision_width))
        self.text_ED = nn.Parameter(torch.empty(config.size, hidden_size))
        self.log_scale_1 = nn.Parameter(torch.empty(1))  # of one dimension: FSDP2 takes no scalar
        self.initial: dict[str, Initial] = {
            "image_EF": XAVIER,
            "text_ED": XAVIER,
            "log_scale_1": Constant(-math.log(config.temperature)),
        }
        self.pair_ranks: PairRanks = OneRank()

    def forward(self, image_PF: Tensor, text_PD: Tensor, most: int) -> ContrastiveLoss:
        """Return the loss of pairs of an image and a caption, row by row. Collective over `pair_ranks`.

        Args:
            image_PF: features of images; there may be none.
            text_PD: hidden states of their captions.
            most: M, the same on all ranks, at least P.
        """
        image_PE, text_PE = self.embed_images(image_PF), self.embed_texts(text_PD)
        return contrastive_loss(image_PE, text_PE, self.scale, most, self.pair_ranks)

    def embed_images(self, image_PF: Tensor) -> Tensor:
        """Unit vectors [P, E] of images."""
        weight_EF = local(self.image_EF)
        return F.normalize(F.linear(image_PF.to(weight_EF.dtype), weight_EF), dim=-1)

    def embed_texts(self, text_PD: Tensor) -> Tensor:
        """Unit vectors [P, E] of captions."""
        weight_ED = local(self.text_ED)
        return F.normalize(F.linear(text_PD.to(weight_ED.dtype), weight_ED), dim=-1)

    @property
    def scale(self) -> Tensor:
        """Factor of cosines, [1]; beyond the largest it is that, and has no gradient."""
        return local(self.log_scale_1).clamp(max=math.log(LARGEST_SCALE)).exp()


def contrastive_loss(
    image_PE: Tensor, text_PE: Tensor, scale_1: Tensor, most: int, pair_ranks: PairRanks
) -> ContrastiveLoss:
    """Return the symmetric InfoNCE of the pairs of all ranks: -log softmax(scale x cosine), mean over both directions.

    Ranks may have different numbers of pairs. Each sends M rows, of which the last are empty: no rank waits to hear how
    many the others have.

    Args:
        image_PE: unit vectors of this rank's images.
        text_PE: unit vectors of their captions.
        scale_1: factor of the cosines.
        most: M, the same on all ranks, at least P.
        pair_ranks: the ranks.
    """
    pairs, size = image_PE.shape
    rows = torch.cat([image_PE, text_PE, image_PE.new_ones(pairs, 1)], dim=1)
    all_A = pair_ranks.gather(F.pad(rows, (0, 0, 0, most - pairs)))
    others_image_AE, others_text_AE, there_A1 = all_A.split([size, size, 1], dim=1)
    there_A = there_A1.detach()[:, 0] > 0
    total = there_A1.detach().sum()  # whole numbers, in the type of the vectors
    target_P = torch.arange(pairs, device=image_PE.device) + pair_ranks.rank * most
    share = pair_ranks.ranks / total.clamp(min=1)
    loss, hits = image_PE.new_zeros(()), []
    for own_PE, others_AE in ((image_PE, others_text_AE), (text_PE, others_image_AE)):
        logits_PA = (scale_1 * own_PE @ others_AE.t()).masked_fill(~there_A, -torch.inf)
        loss = loss + F.cross_entropy(logits_PA, target_P, reduction="sum") * share / 2
        hits.append((logits_PA.detach().argmax(1) == target_P).sum() * share)
    return ContrastiveLoss(loss, *hits, total)
