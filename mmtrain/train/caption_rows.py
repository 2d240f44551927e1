"""Pairs of an image and its caption among the documents of packed rows."""

from __future__ import annotations

import numpy as np
import torch

from mmdata.images.batch import BatchImage, ImageBatch
from mmtrain.vision.caption_pairs import CaptionPairs


def caption_pairs(batch: ImageBatch) -> CaptionPairs:
    """Documents with one image and text that is learned; the text is the caption, with the document's end.

    Documents of text, of several images, or whose image could not be decoded, have no pair.

    Args:
        batch: on the host.
    """
    bounds, learned = batch.cu_seqlens.numpy(), batch.loss_mask_BS.flatten().numpy()
    firsts = np.array([image.first for image in batch.images], dtype=np.int64)
    document = np.searchsorted(bounds, firsts, side="right") - 1
    counts = np.bincount(document, minlength=len(bounds))
    found = []
    for image, number in zip(batch.images, document.tolist(), strict=True):
        begin, end = int(bounds[number]), int(bounds[number + 1])
        if counts[number] == 1 and learned[begin:end].any():
            found.append((image.first_tile, _text(begin, end, image)))
    return CaptionPairs.of(found)


def _text(begin: int, end: int, image: BatchImage) -> torch.Tensor:
    """Places of a document's tokens that are not its image's."""
    return torch.cat([torch.arange(begin, image.first), torch.arange(image.first + image.tokens, end)])
