"""Rows with images on their way from the data to the model."""

from __future__ import annotations

from mmdata.images.batch import ImageBatch
from mmtrain.config import VisionConfig
from mmtrain.vision.image_inputs import ImageInputs
from mmtrain.vision.images import Images


def image_inputs(batch: ImageBatch, vision: VisionConfig) -> ImageInputs:
    """Images of a micro-batch and the places of their tokens; tiles stay where they are.

    Args:
        batch: decoded.
        vision: the eyes' options. Its images are laid out by the rules of their corpus, whose tiles are the eyes' own,
            and whose grids are among theirs or none: a fixed resolution (`mmtrain.train.source_images`).
    """
    layouts = tuple(image.layout for image in batch.images)
    tiles_N3SS = batch.tiles_TCHW
    if not layouts:
        tiles_N3SS = tiles_N3SS.new_empty(0, 3, vision.tile_size, vision.tile_size)
    spans = [(image.first, image.tokens) for image in batch.images]
    return ImageInputs.of_spans(Images(tiles_N3SS, layouts), spans)
