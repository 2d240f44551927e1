"""Images of a micro-batch with the places of their tokens, on their way to the model.

Legend: T tokens of a micro-batch, S of them on this rank, I tokens of its images, J of them on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmtrain.config import VisionConfig
from mmtrain.model.given_embeddings import GivenEmbeddings
from mmtrain.model.packed_seq import to_device
from mmtrain.vision.encoder import ImageEncoder
from mmtrain.vision.images import Images


@dataclass(frozen=True)
class ImageInputs:
    """Images of a micro-batch of whole rows, and which of their tokens this rank goes on with.

    Attributes:
        images: all of them, on every rank that shares the rows; tiles on the device.
        token_J: int64 on the host, numbers among the I tokens of the images, in the order of their places.
        at_J: int64 on the host, the place of each among this rank's tokens.
    """

    images: Images
    token_J: Tensor
    at_J: Tensor

    @staticmethod
    def whole(images: Images, at_I: Tensor) -> ImageInputs:
        """All tokens of some images.

        Args:
            images: in the order of their tokens.
            at_I: int64 on the host, places of their tokens in the micro-batch.
        """
        return ImageInputs(images, torch.arange(len(at_I)), at_I)

    @staticmethod
    def none(config: VisionConfig, device: torch.device) -> ImageInputs:
        """No images, for a model with these eyes, on this device."""
        tiles_03SS = torch.empty(0, 3, config.tile_size, config.tile_size, dtype=torch.uint8, device=device)
        return ImageInputs.whole(Images(tiles_03SS, ()), torch.empty(0, dtype=torch.int64))

    @staticmethod
    def of_spans(images: Images, spans: Sequence[tuple[int, int]]) -> ImageInputs:
        """All tokens of some images, given the first place and the number of each image's."""
        every = [torch.arange(first, first + tokens) for first, tokens in spans]
        return ImageInputs.whole(images, torch.cat(every) if every else torch.empty(0, dtype=torch.int64))

    def cut(self, index_S: Tensor) -> ImageInputs:
        """Those among the tokens `index_S` (int64 on the host) of a micro-batch, by their places there."""
        size = 1 + max((int(places.amax()) for places in (index_S, self.at_J) if len(places)), default=-1)
        number_T = index_S.new_full((size,), -1)
        number_T[self.at_J] = self.token_J
        token_S = number_T[index_S]
        at_J = (token_S >= 0).nonzero().flatten()
        return ImageInputs(self.images, token_S[at_J], at_J)


class ImageWork(Protocol):
    """The way from a micro-batch's images to the embeddings of those of their tokens that are on this rank."""

    def __call__(self, encoder: ImageEncoder, given: ImageInputs) -> GivenEmbeddings | None:
        """Return them; gradients reach the eyes. None where no rank of those that share the work has an image."""


def whole_image_work(encoder: ImageEncoder, given: ImageInputs) -> GivenEmbeddings | None:
    """Look at all images on this rank.

    Raises:
        ConfigError: the tiles are not those that the images have.
    """
    if not given.images.layouts:
        return None
    device = given.images.tiles_N3SS.device
    rows_ID = encoder(given.images)
    if len(given.token_J) < len(rows_ID):
        rows_ID = rows_ID.index_select(0, to_device(given.token_J, device))
    return GivenEmbeddings(to_device(given.at_J, device), rows_ID)
