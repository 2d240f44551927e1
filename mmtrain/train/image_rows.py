"""Rows with images on their way from the data to the model."""

from __future__ import annotations

from mmdata.images.batch import ImageBatch
from mmdata.images.grid import lay_image
from mmtrain.config import VisionConfig
from mmtrain.vision.image_inputs import ImageInputs
from mmtrain.vision.images import Images, tile_rules


def image_inputs(batch: ImageBatch, vision: VisionConfig) -> ImageInputs:
    """Images of a micro-batch and the places of their tokens; tiles stay where they are.

    Args:
        batch: decoded.
        vision: the eyes' options, which are the rules by which the batch's corpora were prepared.
    """
    rules = tile_rules(vision)
    layouts = tuple(lay_image(image.source.width, image.source.height, rules) for image in batch.images)
    tiles_N3SS = batch.tiles_TCHW
    if not layouts:
        tiles_N3SS = tiles_N3SS.new_empty(0, 3, vision.tile_size, vision.tile_size)
    spans = [(image.first, image.tokens) for image in batch.images]
    return ImageInputs.of_spans(Images(tiles_N3SS, layouts), spans)
