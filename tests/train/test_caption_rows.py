"""Which documents of packed rows are an image and its caption."""

from __future__ import annotations

from dataclasses import replace

from mmdata.images.batch import mask_failed
from mmtrain.train.caption_rows import caption_pairs
from tests.dist.contrastive_steps import CAPTIONS, IMAGE, caption_rows


def test_captions_are_the_documents_texts_and_tiles_those_of_their_images() -> None:
    batch = caption_rows(0, 4)
    pairs = caption_pairs(batch)
    lengths = [caption for row in CAPTIONS[:4] for caption in row]
    assert pairs.lengths == tuple(lengths) and pairs.tile_P.tolist() == list(range(len(lengths)))
    tokens = batch.tokens_BS.flatten()
    assert not (tokens[pairs.at_C] == IMAGE).any()
    for image, at in zip(batch.images, pairs.at_C.split(lengths), strict=True):
        assert at.tolist() == list(range(image.first + image.tokens, image.first + image.tokens + len(at)))


def test_documents_of_several_images_or_broken_ones_or_nothing_learned_have_none() -> None:
    batch = caption_rows(0, 1)
    first, second, third = batch.images
    broken = mask_failed(replace(batch, images=(first, replace(second, failed="truncated"), third)))
    assert caption_pairs(broken).tile_P.tolist() == [0, 2]
    bounds = batch.cu_seqlens.tolist()
    joined = replace(batch, cu_seqlens=batch.cu_seqlens[[0, 2, *range(3, len(bounds))]])  # the first two are one
    assert caption_pairs(joined).tile_P.tolist() == [2]
    mask = batch.loss_mask_BS.clone()
    mask[0, : bounds[1]] = False
    assert caption_pairs(replace(batch, loss_mask_BS=mask)).tile_P.tolist() == [1, 2]
