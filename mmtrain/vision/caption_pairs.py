"""Images and captions of a micro-batch that belong together, on their way to the contrastive loss.

Legend: P pairs, C tokens of their captions, J tokens of images on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmtrain.model.packed_seq import Packing, RealTokens, to_device
from mmtrain.vision.image_inputs import ImageInputs


@dataclass(frozen=True)
class CaptionPairs:
    """Documents of one image and its caption, in the order of the rows.

    Attributes:
        tile_P: int64 on the host, the first tile of each image among those of the micro-batch.
        at_C: int64 on the host, the places of the captions' tokens, one caption after another.
        lengths: tokens of each caption, at least one.
    """

    tile_P: Tensor
    at_C: Tensor
    lengths: tuple[int, ...]

    @staticmethod
    def of(pairs: Sequence[tuple[int, Tensor]]) -> CaptionPairs:
        """Pairs, given the first tile of each image and the places (int64) of its caption's tokens."""
        tile_P = torch.tensor([tile for tile, _ in pairs], dtype=torch.int64)
        places = [at for _, at in pairs]
        at_C = torch.cat(places) if places else torch.empty(0, dtype=torch.int64)
        return CaptionPairs(tile_P, at_C, tuple(map(len, places)))


@dataclass(frozen=True)
class PairedInputs(ImageInputs):
    """Images of a micro-batch, and which of them have captions.

    Attributes:
        pairs: of the whole rows.
    """

    pairs: CaptionPairs

    @staticmethod
    def over(images: ImageInputs, pairs: CaptionPairs) -> PairedInputs:
        """Images of a micro-batch with their captions."""
        return PairedInputs(images.images, images.token_J, images.at_J, pairs)


def with_captions(packing: Packing, lengths: Sequence[int]) -> Packing:
    """Return the documents of some rows and, after their tokens, captions as documents of their own.

    A caption that is a document sees no image and no other document, whatever the layers are.

    Args:
        packing: of the rows.
        lengths: tokens of each caption; without captions `packing` itself is returned.
    """
    if not lengths:
        return packing
    device, rows = packing.cu_seqlens.device, packing.row_tokens
    own = Packing.from_lengths(list(lengths))
    return Packing(
        torch.cat([packing.cu_seqlens, to_device(own.cu_seqlens[1:] + rows, device)]),
        torch.cat([packing.position_ids_T, to_device(own.position_ids_T, device)]),
        max(packing.max_seqlen, own.max_seqlen),
        (*packing.lengths, *lengths),
        None if packing.real is None else _with_more(packing.real, rows, sum(lengths)),
    )


def _with_more(real: RealTokens, rows: int, tokens: int) -> RealTokens:
    """The tokens that are no padding, and as many more after the T of the rows, as rows of the same length."""
    whole, rest = divmod(tokens, real.row_length)
    more = torch.arange(rows, rows + tokens)
    per_row = (*real.per_row, *[real.row_length] * whole, *([rest] if rest else []))
    return RealTokens(torch.cat([real.index_M, to_device(more, real.index_M.device)]), per_row, real.row_length)
